"""Damage films, pictures and annotations of a mixture at random, read it, and count what became of every sample.

    python benchmarks/damage.py --items 1000

Each dataset of the mixture is whole in one half and damaged in the other: flipped bits, cuts, bytes of another file,
empty files, missing files; in annotations also wrong types, missing keys and lines that are no JSON. A damaged sample
may turn out to be readable (a flipped bit in a pixel), else it must be a masked row that is counted by source and
reason and named by its id. A sound sample must never be counted. A crash, a hang or another sample in its place ends
with code 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
from typing import Any

import numpy as np
import yaml
from PIL import Image

from data_pipeline import loader, video
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import train_bpe
from hico_jax.batch import Geometry

GEOMETRY = Geometry(image_px=16, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=512)
HANG_S = 30  # one batch may take no longer
CONTAINERS = ("mp4", "mkv", "avi", "gif")


def main(argv: list[str] | None = None) -> int:
    """Counts from the command line; 1 if a sample was lost, swapped or not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000, help="damaged ones; as many again are whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = trial(pathlib.Path(folder), args.items, args.seed)
    print(json.dumps(found, indent=2))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
    return int(bool(found["wrong"]))


def trial(folder: pathlib.Path, items: int, seed: int) -> dict[str, Any]:
    """Make, damage, read twice (the second time with a limit that stops), and compare."""
    rng = random.Random(seed)
    hurt = make(folder, items, rng)
    tokenizer = train_bpe(["What is seen? The video lasts for seconds, and frames are sampled."] * 4, 330)
    config = DataConfig(
        annotations=str(folder / "all.yaml"), batch_size=8, min_frames=4, max_frames=8, group_by_modality_length=False,
        max_bad_fraction=1.0, read_threads=2,
    )  # fmt: skip
    cpu, began = time.process_time(), time.monotonic()
    loaded = loader.make_loader(config, GEOMETRY, tokenizer)
    names, bad, wrong = collections.Counter[str](), {}, []
    longest, last = 0.0, None
    signal.signal(signal.SIGALRM, _hangs)
    while True:
        signal.alarm(HANG_S)
        at = time.monotonic()
        last, previous = next(loaded, None), last
        longest = max(longest, time.monotonic() - at)
        if last is None:
            break
        batch, info = last
        names.update(info.ids)
        told = {text.split(" ", 1)[0]: text for text in info.bad}
        bad |= told
        for i, name in enumerate(info.ids):
            masked = not np.asarray(batch.weights)[i].any()
            if masked != (name in told):
                wrong.append(f"{name}: masked {masked}, told {name in told}")
    signal.alarm(0)
    assert previous is not None
    counted = previous.info
    seconds = {"cpu": round(time.process_time() - cpu, 1), "wall": round(time.monotonic() - began, 1)}
    wrong += [f"{name}: sound, but {text}" for name, text in bad.items() if name not in hurt]
    wrong += [f"{name}: seen {n} times" for name, n in names.items() if n != 1]
    whole = len(loaded.plan.samples) - loaded.num_steps * config.batch_size  # the last rows fill no batch
    if len(names) != len(loaded.plan.samples) - whole:
        wrong.append(f"{len(names)} names in {loaded.num_steps} batches")
    if not sum(counted.bad_total.values()) == sum(counted.bad_reasons.values()) == len(bad):
        wrong.append(f"{len(bad)} told, {counted.bad_total} by source, {counted.bad_reasons} by reason")
    stopped = stops(config, tokenizer, len(bad) / len(names) / 2)
    if "max_bad_fraction" not in stopped:
        wrong.append(f"half the fraction of bad samples did not stop the run: {stopped!r}")
    by_kind = collections.Counter(
        (hurt[name], "masked" if name in bad else "readable") for name in names if name in hurt
    )
    return {
        "samples": len(names), "damaged": sum(by_kind.values()), "masked, counted and named": len(bad),
        "by damage": {f"{kind}: {end}": n for (kind, end), n in sorted(by_kind.items())},
        "by source": dict(counted.bad_total), "reasons": len(counted.bad_reasons),
        "longest wait for a batch, s": round(longest, 2), "seconds": seconds,
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "stopped with": stopped,
        "wrong": wrong[:20],
    }  # fmt: skip


def stops(config: DataConfig, tokenizer: Any, share: float) -> str:
    """The sentence with which a run ends that allows too few bad samples."""
    settings = {**config.__dict__, "max_bad_fraction": share}
    try:
        for _ in loader.make_loader(DataConfig(**settings), GEOMETRY, tokenizer):
            pass
    except loader.TooManyBadSamplesError as error:
        return str(error)
    return ""


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"a batch took more than {HANG_S} s")


def make(folder: pathlib.Path, items: int, rng: random.Random) -> dict[str, str]:
    """A mixture of films, pictures and text below `folder`; which ids are damaged, and how."""
    films = {name: _film(folder, name, rng) for name in CONTAINERS}
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)).save(picture)
    sources = {**films, "png": picture.read_bytes()}
    hurt: dict[str, str] = {}
    entries, kinds = [], [*CONTAINERS, "png", "text"]
    for kind in kinds:
        lines = []
        for i in range(2 * -(-items // len(kinds))):
            name = f"{kind}-{i}"
            item: dict[str, Any] = {"id": name, "conversations": _talk(kind != "text", i)}
            if kind != "text":
                item["image" if kind == "png" else "video"] = f"{name}.{kind}"
            content = sources.get(kind, b"")
            line = json.dumps(item).encode()
            if i % 2:
                if kind == "text" or rng.random() < 0.3:
                    how, line = _hurt_annotation(item, rng)
                else:
                    how, content = _hurt_bytes(content, rng, sources["png"] if kind == "mp4" else sources["mp4"])
                hurt[name] = how
                if "not JSON" in how:
                    hurt[f"{kind}.jsonl:{i}"] = hurt.pop(name)
            if kind != "text" and content is not None:
                (folder / f"{name}.{kind}").write_bytes(content)
            lines.append(line)
        (folder / f"{kind}.jsonl").write_bytes(b"\n".join(lines))
        entries.append({"json_path": f"{kind}.jsonl", "data_root": "."})
    (folder / "all.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return hurt


def _film(folder: pathlib.Path, kind: str, rng: random.Random) -> bytes:
    """Twelve noisy frames, so that there are many bytes to hit."""
    path = folder / f"film.{kind}"
    frames = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 255, (12, 24, 32, 3), np.uint8)
    if kind == "gif":
        first, *others = [Image.fromarray(f) for f in frames]
        first.save(path, save_all=True, append_images=others, duration=40)
    elif kind == "mp4":
        video.write_video(path, frames, 2.0, gop=6)
    else:
        import av

        with av.open(str(path), "w") as film:
            stream: Any = film.add_stream("mpeg4" if kind == "avi" else "libx264", rate=2)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for frame in frames:
                film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            film.mux(stream.encode())
    return path.read_bytes()


def _talk(media: bool, number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?" if media else "Say."}, {"from": "gpt", "value": f"n {number}"}]


def _hurt_bytes(content: bytes, rng: random.Random, other: bytes) -> tuple[str, bytes | None]:
    """Damage a file; None: it is not there."""
    how = rng.choice(("bits", "bits", "cut", "spliced", "zeros", "other file", "empty", "missing"))
    hurt = bytearray(content)
    at = rng.randrange(len(content))
    if how == "bits":
        for _ in range(rng.choice((1, 8, 64))):
            hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del hurt[at:]
    elif how == "spliced":
        hurt[at : at + 64] = other[:64]
    elif how == "zeros":
        hurt[at : at + 256] = bytes(len(hurt[at : at + 256]))
    else:
        return how, {"other file": other, "empty": b"", "missing": None}[how]
    return how, bytes(hurt)


def _hurt_annotation(item: dict[str, Any], rng: random.Random) -> tuple[str, bytes]:
    """Damage a line of annotations."""
    name, item = item["id"], json.loads(json.dumps(item))
    media = next((m for m in ("image", "video") if m in item), None)
    how = rng.choice(("not JSON: bits", "not JSON: cut", "wrong type", "missing key", "odd text", "no answer", "clip"))
    line = json.dumps(item).encode()
    if how == "not JSON: cut":
        return how, line[: rng.randrange(1, len(line) - 1)]
    if how == "not JSON: bits":
        return how, b"\xff" + line
    strange = rng.choice((None, 3, [], {}, "", [None], [[]], True, 1e999, {"a": [1]}, ["a", 4]))
    turn = rng.choice(item["conversations"])
    where = rng.choice(("conversations", "turn", "from", "value", "media"))
    if how == "clip":
        item |= {"start": rng.choice((-5, 1e9, "x", 1e999, None, [])), "end": rng.choice((0, -1, "1", None, {}))}
    elif how == "no answer":
        item["conversations"] = item["conversations"][:1]
    elif how == "odd text":
        odd = ("\ud800", "<|im_end|>\n<|im_start|>", "<image>" * 5, "\0", "x " * 3000, "")
        item["conversations"][0]["value"] += rng.choice(odd)
    elif where == "media" and media:
        item.pop(media) if how == "missing key" else item.update({media: strange})
    elif where in ("from", "value"):
        turn.pop(where) if how == "missing key" else turn.update({where: strange})
    elif how == "missing key":
        item.pop("conversations")
    else:
        item["conversations"] = [strange] if where == "turn" else strange
    return how, json.dumps(item | {"id": name}).encode()


if __name__ == "__main__":
    sys.exit(main())
