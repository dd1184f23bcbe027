"""`ask` end to end on a long 720p film: what decoding takes alone, what the model takes alone, and both together.

    python benchmarks/ask_film.py                                 # an hour at one frame a second, nano (random weights)
    python benchmarks/ask_film.py --seconds 300                   # short
    python benchmarks/ask_film.py --film FILM --model FOLDER      # your own; with a question's answer

Frames are decoded by a thread of its own while clips are encoded (`film.ahead`), so together should take little more
than the longer of the two. The made film is a minute of panning textures, its packets repeated without decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.host import FPS, scenes  # noqa: E402
from data_pipeline import video  # noqa: E402
from data_pipeline.frames import Sampling  # noqa: E402
from hico_jax import api, ask, film, registry  # noqa: E402

ONCE = 60  # seconds of film that are drawn


def main(argv: list[str] | None = None) -> int:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600, help="of film")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--film", type=pathlib.Path, help="instead of a made one")
    parser.add_argument("--model", help="a folder; without: random weights, and no answer")
    parser.add_argument("--variant", default="nano", help="whose random weights (%(default)s; see `hico models`)")
    parser.add_argument("--question", default="What happens at the end?")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = args.film or repeated(pathlib.Path(folder), args.seconds, args.size)
        found = measured(path, args)
    print("\n".join(f"{name:22} {value:10.2f}" for name, value in found.items() if isinstance(value, int | float)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def repeated(folder: pathlib.Path, seconds: int, size: str) -> pathlib.Path:
    """A film whose first minute comes again and again."""
    width, height = (int(n) for n in size.split("x"))
    once, out = min(seconds, ONCE), folder / "film.mp4"
    first = video.write_video(folder / "once.mp4", scenes(once * FPS, width, height), FPS, crf=23, gop=250)
    with av.open(str(out), "w") as made:
        target, shift = None, 0
        for _ in range(-(-seconds // once)):
            with av.open(str(first)) as film:
                source = film.streams.video[0]
                target = target or made.add_stream_from_template(source)
                for packet in film.demux(source):
                    if packet.dts is None:
                        continue
                    packet.stream, packet.pts, packet.dts = target, packet.pts + shift, packet.dts + shift
                    made.mux(packet)
                shift += round(once / source.time_base)
    return out


def measured(path: pathlib.Path, args: argparse.Namespace) -> dict[str, Any]:
    """Each part alone, then all of it."""
    if args.model:
        model = api.load(args.model)
        whole, tokenizer = model.hico, model.tokenizer
    else:
        config, model, tokenizer = registry.model_config(args.variant), None, None
        whole = config.build(rngs=nnx.Rngs(params=0))
    began = time.perf_counter()
    info = video.open_video(path)
    opened = time.perf_counter() - began
    per_clip = whole.config.vision.frames_per_clip
    count = int(info.duration_s) // per_clip * per_clip
    room = (whole.config.max_length // whole.config.geometry().tokens_per_clip - 8) * per_clip
    if args.model:
        count = min(count, room)
    else:
        whole = ask.with_config(whole, dataclasses.replace(whole.config, max_length=1 << 20))
    viewer: Any = film.Viewer(whole, tokenizer, sampling=Sampling("dynamic_fps1", per_clip, count, per_clip))
    indices, _ = video.choose(info, viewer.sampling)
    cpu, began = time.process_time(), time.perf_counter()
    pieces = list(viewer._chunks(path, indices, None))
    decode_s, decode_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    jax.block_until_ready(viewer._encode(pieces[0]))  # compiles
    cpu, began = time.process_time(), time.perf_counter()
    for piece in pieces:
        jax.block_until_ready(viewer._encode(piece))
    encode_s, encode_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    del pieces
    cpu, began = time.process_time(), time.perf_counter()
    seen = viewer.watch(path)
    watch_s, watch_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    found = {
        "film_s": info.duration_s, "frames": len(indices), "cores": os.cpu_count(), "open_s": opened,
        "decode_s": decode_s, "decode_cpu_s": decode_cpu_s, "frames_s_core": len(indices) / decode_cpu_s,
        "encode_s": encode_s, "encode_cpu_s": encode_cpu_s, "watch_s": watch_s, "watch_cpu_s": watch_cpu_s,
        "waited_for_frames_s": seen.read_s, "overlap": (decode_s + encode_s) / watch_s,
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    if model is not None:
        for name in ("first_answer_s", "answer_s"):
            began = time.perf_counter()
            answer = viewer.ask(seen, args.question)
            found[name] = time.perf_counter() - began
        found["answer"] = answer.text
    assert np.isfinite(np.asarray(seen.visual, np.float32)).all()
    return found


if __name__ == "__main__":
    sys.exit(main())
