from __future__ import annotations

import dataclasses
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from hico_jax import metrics
from hico_jax.batch import Batch, Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=6, tokens_per_image=2, max_length=64)


@pytest.fixture
def batch() -> Batch:
    return Batch.fake(GEOMETRY, rows=2, clips=2, images=1, text=12, vocab=50)


def test_lines_after_the_resumed_step_are_dropped(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(str(tmp_path))
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 3})
    writer.close()
    again = metrics.Writer(str(tmp_path), resume=2)
    again.write(3, {"loss": 9.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in metrics.read(str(tmp_path))] == [(1, 1 / 3), (2, 2 / 3), (3, 9.0)]
    assert list((tmp_path / "events").iterdir())


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: pathlib.Path) -> None:
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [line["step"] for line in metrics.read(str(tmp_path))] == [1]
    assert metrics.read(str(tmp_path / "nothing")) == []


def test_a_kill_while_a_run_begins_again_loses_no_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the last lines only: the file must be whole at every moment."""
    whole = "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 101))
    (tmp_path / metrics.FILE).write_text(whole)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(metrics.epath.Path(tmp_path)), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Writer(str(tmp_path), resume=60)
    assert (tmp_path / metrics.FILE).read_text() == whole
    monkeypatch.undo()
    metrics.Writer(str(tmp_path), resume=60).close()
    assert [line["step"] for line in metrics.read(str(tmp_path))] == list(range(1, 61))


def test_tokens_and_frames_are_counted_without_padding(batch: Batch) -> None:
    segments = batch.segments.copy()
    segments[0, -3:] = 0
    slots = batch.slots.copy()
    slots[1, slots[1] >= 6] = -1  # the second row has one clip only, and no picture
    found = metrics.counts(dataclasses.replace(batch, segments=segments, slots=slots), GEOMETRY)
    assert found == {"tokens": 2 * 26 - 3, "frames": 3 * 4}


def test_rates() -> None:
    found = metrics.rates({"tokens": 100}, step_s=2.0, wait_s=0.5, flops=3e12, peak=1e13)
    assert found == {"tokens_per_s": 50.0, "step_s": 2.0, "wait_percent": 25.0, "mfu_percent": 15.0}
    assert "mfu_percent" not in metrics.rates({}, 1.0, 0.0, 1.0, None)


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_peaks_are_known_by_the_longest_name(kind: str, peak: float | None) -> None:
    assert metrics.peak_flops(kind) == peak


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    progress = metrics.Progress(10, 5, title="stage1", out=out)
    progress.say("compiling ...")
    for step in range(1, 11):
        progress.step(step, {"loss": 1.5, "lr": 1e-3, "other": 1.0})
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "compiling ..."
    assert [line.split()[1] for line in lines[1:]] == ["1/10", "5/10", "10/10"]
    assert "loss 1.5000  lr 0.001" in lines[1]
    assert lines[2].endswith("left")
    assert "\x1b" not in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_line_on_a_terminal() -> None:
    out = Terminal()
    progress = metrics.Progress(4, 1, title="stage1", out=out)
    progress.say("compiling ...")
    progress.step(4, {"loss": 0.25})
    progress.close()
    assert "compiling ..." in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "loss 0.2500" in out.getvalue()


def test_a_row_reads_as_text(batch: Batch) -> None:
    tokens, slots = np.asarray(batch.tokens[0]), np.asarray(batch.slots[0])
    text, answer = metrics.row_text(batch, 0)
    first, last = tokens[:4].tolist(), tokens[slots < 0][4:].tolist()
    assert text == " ".join(map(str, first)) + "[14 visual]" + " ".join(map(str, last))
    assert answer == " ".join(map(str, last[-5:]))
    assert metrics.row_text(batch, 0, decode=lambda ids: "x" * len(ids))[1] == "xxxxx"


def test_the_first_batch_is_drawn(batch: Batch, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "first.png"
    batch.clips[0, 0, 0] = (200, 30, 60)
    metrics.contact_sheet(batch, path)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * (96 + 66), 8 * 96, 3)
    assert (sheet[:96, :96] == (200, 30, 60)).all()
    assert (sheet[96 + 66 :][:96, :96] != (200, 30, 60)).any()
    text_only = dataclasses.replace(batch, clips=batch.clips[:, :0], images=batch.images[:, :0])
    metrics.contact_sheet(text_only, path)
