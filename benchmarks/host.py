"""The host's share of a question: one frame a second of a 720p film, in frames a second of one core.

    python benchmarks/host.py                 # three structures of groups, 20 s of film each, about two minutes
    python benchmarks/host.py --seconds 4     # short

    everything   every frame decoded and turned to RGB only where wanted, then squashed to 224 pixels (Pillow's bicubic)
    ours         `video.iter_frames`: keyframes are jumped to where that saves work, and frames no other leans on and
                 nobody wants are not decoded. The pixels of both must be the same.

Figures are CPU seconds of the whole process, all threads, the best of several. The films are synthetic: panning
textures with cuts, so ratios say more than frames a second.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline import image, video  # noqa: E402

PX, FPS = 224, 30
# What x264 chooses by itself; a keyframe every second, as cameras and streams have; no frame that can be left out.
STRUCTURES = {"usual": (250, {}), "keyframe each second": (FPS, {}), "no B frames": (250, {"bf": "0"})}


def main(argv: list[str] | None = None) -> int:
    """All structures; 1 when a pixel differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="of film")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    width, height = (int(n) for n in args.size.split("x"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (gop, options) in STRUCTURES.items():
            path = pathlib.Path(folder) / "film.mp4"
            frames = scenes(args.seconds * FPS, width, height)
            video.write_video(path, frames, FPS, crf=23, gop=gop, options=options)
            rows.append({"film": name} | measured(path, args.seconds, args.repeats))
    print("| film | everything, frames/s/core | ours, frames/s/core | ratio | same pixels |\n|---|--:|--:|--:|---|")
    for r in rows:
        print("| {film} | {everything:.1f} | {ours:.1f} | {ratio:.2f} | {same} |".format(**r))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not all(r["same"] for r in rows))


def measured(path: pathlib.Path, seconds: int, repeats: int) -> dict[str, Any]:
    """Both ways over one film."""
    wanted = np.arange(seconds) * FPS + FPS // 2
    video.open_video(path)  # its packets are listed once and kept, as for a second question
    plain, everything = best(lambda: np.stack(list(decode_all(path, wanted))), repeats)
    made, ours = best(lambda: np.concatenate(list(video.iter_frames(path, wanted, (PX, PX)))), repeats)
    return {
        "everything": seconds / everything, "ours": seconds / ours, "ratio": everything / ours,
        "same": bool(np.array_equal(plain, made)),
    }  # fmt: skip


def decode_all(path: pathlib.Path, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Every frame decoded by one thread, the wanted ones squashed."""
    chosen = set(wanted.tolist())
    with av.open(str(path)) as film:
        film.streams.video[0].codec_context.thread_count = 1
        film.streams.video[0].codec_context.thread_type = "NONE"
        for i, frame in enumerate(film.decode(video=0)):
            if i in chosen:
                yield image.resize(frame.to_ndarray(format="rgb24"), PX, PX)


def best(work: Callable[[], np.ndarray], repeats: int) -> tuple[np.ndarray, float]:
    """What came out, and the least CPU seconds it took."""
    times, out = [], np.zeros(0)
    for _ in range(repeats):
        began = time.process_time()
        out = work()
        times.append(time.process_time() - began)
    return out, min(times)


def scenes(count: int, width: int, height: int) -> Iterator[np.ndarray]:
    """Textures that pan, with a cut every four seconds."""
    rng = np.random.default_rng(0)
    wide = np.zeros(0)
    for i in range(count):
        if i % (4 * FPS) == 0:
            small = rng.integers(0, 255, (height // 8 + 2, width // 4 + 2, 3), np.uint8)
            wide = image.resize(small, height, 2 * width)
        at = (3 * i) % width
        yield wide[:, at : at + width]


if __name__ == "__main__":
    sys.exit(main())
