"""What the loader costs: frames a second of one core beside decoding alone, long films, memory, and the step's wait.

    python benchmarks/loader.py                          # all parts
    python benchmarks/loader.py --parts dense long       # without a model

    dense   every frame decoded, squashed to 224 px and normalised, beside PyAV decoding the same film and no more;
            --film adds one of your own to the three made up
    long    64 frames of an hour-long film beside decoding all of it
    memory  resident memory over 10,000 examples
    step    a nano step with the real loader beside the same step on one batch that stays

Times of `dense` and `long` are CPU seconds of one thread, the best of several; `step` is wall time and wants a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np

from data_pipeline import decode, image, loader, video
from data_pipeline.frames import Sampling
from data_pipeline.options import DataConfig

PX = 224
SIZES = ((320, 240), (640, 360), (1280, 720))


def main(argv: list[str] | None = None) -> int:
    """Parts from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--frames", type=int, default=150, help="of the films of `dense`")
    parser.add_argument("--film", action="append", type=pathlib.Path, default=[], help="one more for `dense`")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the film of `long`")
    parser.add_argument("--examples", type=int, default=10_000, help="of `memory`")
    parser.add_argument("--steps", type=int, default=30, help="of `step`, each way")
    parser.add_argument("--world", help="a folder of `hico world` for `memory` and `step`; made if not given")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    threads, decode.SMALL_PIXELS = decode.SMALL_PIXELS, 1 << 30  # one thread, whatever the size of a film
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part in args.parts:
                found[part] = PARTS[part](pathlib.Path(folder), args)
                print(json.dumps({part: found[part]}, indent=2), flush=True)
    finally:
        decode.SMALL_PIXELS = threads
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def scenes(count: int, width: int, height: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Textured frames that pan, with a cut every few seconds: neither still nor noise."""
    rng = np.random.default_rng(seed)
    wide = None
    for i in range(count):
        if i % 120 == 0:
            small = rng.integers(0, 255, (height // 8 + 2, width // 4 + 2, 3), np.uint8)
            wide = image.resize(small, height, 2 * width)
        assert wide is not None
        at = (3 * i) % width
        yield wide[:, at : at + width]


def cpu(work: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of the quickest of several runs."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def decode_all(path: pathlib.Path, rgb: bool = False) -> int:
    """PyAV alone, one thread."""
    with av.open(str(path)) as film:
        film.streams.video[0].codec_context.thread_count = 1
        film.streams.video[0].codec_context.thread_type = "NONE"
        count = 0
        for frame in film.decode(video=0):
            count += 1
            if rgb:
                frame.to_ndarray(format="rgb24")
    return count


def dense(folder: pathlib.Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every frame of films of three sizes, and of the films given."""
    rows = []
    made = (
        video.write_video(folder / f"{width}.mp4", scenes(args.frames, width, height), 25.0, crf=23)
        for width, height in SIZES
    )
    for path in (*made, *args.film):
        info = video.open_video(path)  # its list of packets is kept from then on, as in an epoch
        count = info.num_frames

        def read(normal: bool = False, fast: bool = False, path: pathlib.Path = path, count: int = count) -> None:
            for piece in video.iter_frames(path, np.arange(count), (PX, PX), fast=fast):
                if normal:
                    image.normalize(piece)

        alone, rgb = cpu(lambda p=path: decode_all(p)), cpu(lambda p=path: decode_all(p, True))
        ours, normal, fast = cpu(read), cpu(lambda r=read: r(normal=True)), cpu(lambda r=read: r(fast=True))
        rows.append(
            {
                "film": f"{info.width}x{info.height}", "decoding alone, frames/s": round(count / alone),
                "decoding to RGB, frames/s": round(count / rgb),
                "loader (uint8, as it goes to the device), frames/s": round(count / ours),
                "loader and normalising on the host, frames/s": round(count / normal),
                "loader with data.resize=fast, frames/s": round(count / fast),
                "loader / decoding alone": round(alone / ours, 3), "loader / decoding to RGB": round(rgb / ours, 3),
                "fast loader / decoding alone": round(alone / fast, 3),
            }
        )  # fmt: skip
    return rows


def long(folder: pathlib.Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """64 frames of a long film, with the encoder's usual keyframes and with one every two seconds."""
    rows = []
    for gop in (250, 50):
        minute = video.write_video(folder / "minute.mp4", scenes(1500, 640, 360), 25.0, crf=28, gop=gop)
        path = repeat(minute, folder / f"long{gop}.mp4", round(args.minutes))

        def sample(path: pathlib.Path = path) -> None:
            decode._small.cache_clear()
            decode._large.cache_clear()  # the packets are listed anew
            made = video.read_frames(path, sampling=Sampling("dynamic_fps1", 64, 64, 4), size=(PX, PX))
            assert len(made.frames) == 64

        few, everything = cpu(sample, 2), cpu(lambda p=path: decode_all(p), 1)
        listing = cpu(lambda p=path: decode._index(str(p), "mov", 0, 0), 2)
        rows.append(
            {
                "film": f"{args.minutes:g} min of 640x360, 25 frames/s", "longest distance of keyframes": gop,
                "64 frames, s": round(few, 3), "of which listing packets, s": round(listing, 3),
                "decoding all, s": round(everything, 3), "times faster": round(everything / few, 1),
            }
        )  # fmt: skip
    return rows


def repeat(source: pathlib.Path, target: pathlib.Path, times: int) -> pathlib.Path:
    """The film so many times in a row, its packets copied."""
    with av.open(str(source)) as film:
        packets = [p for p in film.demux(video=0) if p.dts is not None]
        stream = film.streams.video[0]
        span, told = stream.duration, [(bytes(p), p.pts, p.dts, p.is_keyframe, p.duration) for p in packets]
        assert span
        with av.open(str(target), "w") as made:
            out = made.add_stream_from_template(stream)
            for i in range(times):
                for content, pts, dts, key, duration in told:
                    packet = av.Packet(content)
                    packet.stream, packet.time_base = out, stream.time_base
                    packet.pts, packet.dts, packet.duration = pts + i * span, dts + i * span, duration
                    packet.is_keyframe = key
                    made.mux(packet)
    return target


def world(folder: pathlib.Path, args: argparse.Namespace) -> pathlib.Path:
    """Films to train on."""
    if args.world:
        return pathlib.Path(args.world)
    from hico_jax.world import main as make

    if not (folder / "world").exists():
        make(argparse.Namespace(out=str(folder / "world"), preset="tiny", seed=0, only=None, workers=1))
    return folder / "world"


def resident() -> float:
    """Megabytes of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """Read many examples; memory after a tenth of them, and after all."""
    from data_pipeline.tokenizer import load_tokenizer
    from hico_jax import registry

    data = world(folder, args)
    config = DataConfig(
        annotations=str(data / "short.yaml"), batch_size=8, min_frames=4, max_frames=8, num_epochs=0, read_threads=2,
        length_step=16, group_by_modality_length=False,
    )  # fmt: skip
    made = loader.make_loader(config, registry.model_config("nano").geometry(), load_tokenizer(data))
    seen, marks, began = 0, [], time.process_time()
    while seen < args.examples:
        seen += len(next(made).ids)
        if seen >= args.examples * (len(marks) + 1) // 10:
            marks.append(round(resident(), 1))
    made.close()
    return {
        "examples": seen, "resident MB after each tenth": marks,
        "growth after the first tenth, MB": round(marks[-1] - marks[0], 1),
        "examples per CPU second": round(seen / (time.process_time() - began), 1),
    }  # fmt: skip


def step(folder: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """Steps in turns: one on the batch that stays, one on the loader's next batch of the same shape."""
    import jax

    from data_pipeline.tokenizer import load_tokenizer
    from hico_jax import config as configs
    from hico_jax import train
    from hico_jax.parallel import context

    root = pathlib.Path(__file__).resolve().parents[1]
    data = world(folder, args)
    experiment = configs.from_flags(
        [
            f"--config={root}/configs/stage3_sft.py:nano", f"--config.workdir={folder}/step",
            f"--config.data.annotations={data}/short.yaml", f"--config.data.tokenizer={data}",
            "--config.train.steps=100000", "--config.data.length_buckets=(128,)", "--config.data.clip_buckets=(3,)",
            "--config.data.tile_buckets=(0,)",
        ]
    )  # fmt: skip
    mesh = train.make_mesh(experiment.mesh)
    made = loader.make_loader(experiment.data, experiment.model.geometry(), load_tokenizer(data))
    with jax.set_mesh(mesh), context.using(experiment.mesh.context):
        begun = train.init_state(experiment, mesh)
        stepper, state = train.Stepper(experiment, begun, mesh, print), begun.state
        fixed = next(made).batch
        state, numbers = stepper(state, stepper.put(fixed))
        jax.block_until_ready(numbers)
        times: dict[str, list[float]] = {"constant batch": [], "real loader": []}
        for _ in range(args.steps):
            for kind, spent in times.items():
                began = time.monotonic()
                batch = fixed if kind == "constant batch" else next(made).batch
                state, numbers = stepper(state, stepper.put(batch))
                jax.block_until_ready(numbers)
                spent.append(time.monotonic() - began)
    made.close()
    middle = {kind: float(np.median(spent)) for kind, spent in times.items()}
    return {
        "device": jax.devices()[0].device_kind, "rows": experiment.data.batch_size, "steps each": args.steps,
        **{f"{kind}, median s": round(v, 4) for kind, v in middle.items()},
        "slower by, percent": round(100 * (middle["real loader"] / middle["constant batch"] - 1), 1),
    }  # fmt: skip


PARTS: dict[str, Callable[[pathlib.Path, argparse.Namespace], Any]] = {
    "dense": dense, "long": long, "memory": memory, "step": step,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
