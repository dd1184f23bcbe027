from __future__ import annotations

import json
import pathlib

from benchmarks import loader
from data_pipeline import decode, video


def test_a_small_run_tells_every_figure(tmp_path: pathlib.Path) -> None:
    before = decode.SMALL_PIXELS
    assert loader.main(["--parts", "dense", "--frames", "3", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["film"] for row in found["dense"]] == ["320x240", "640x360", "1280x720"]
    assert all(row["loader / decoding alone"] > 0 for row in found["dense"])
    assert before == decode.SMALL_PIXELS


def test_a_film_repeated_is_read_like_any_other(tmp_path: pathlib.Path) -> None:
    once = video.write_video(tmp_path / "once.mp4", loader.scenes(20, 64, 48), 25.0, gop=10)
    info = video.open_video(loader.repeat(once, tmp_path / "thrice.mp4", 3))
    assert (info.num_frames, info.fps, info.damaged) == (60, 25.0, False)
