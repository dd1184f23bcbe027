"""Damage checkpoints in every way a disk can, and see that none is restored silently.

    python benchmarks/corrupt_checkpoints.py --flips 2000 --truncations 200 --swaps 200

Each time one file of the newest of two checkpoints is damaged: a flipped bit, a cut, or the file of another
checkpoint in its place. A restore may then give the older one (fall-back), or the newest with every array and every
value as written (the damage lay where nothing is read). Anything else is counted as silent corruption.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax import checkpoint
from hico_jax.config import CheckpointConfig

OLD, NEW = 3, 5


def tree(step: int) -> tuple[Any, Any, dict[str, Any]]:
    """A small run's arrays: several types, shapes and a scalar."""
    rng = np.random.default_rng(step)
    params = {
        "vision": {"w": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32), "b": jnp.zeros(24, jnp.float32)},
        "llm": {"w": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.bfloat16), "n": jnp.ones(8, jnp.float32)},
    }
    moments = {"0": {"count": jnp.int32(step), "mu": jax.tree.map(lambda a: a * 0.5, params)}}
    tail = [{"step": s, "loss": float(rng.normal())} for s in range(step)]
    return params, moments, {"data": {"data": "abc", "step": step}, "config": {"a": 1.5}, "metrics": tail}


def write(folder: pathlib.Path) -> None:
    """Two sound checkpoints."""
    saved = checkpoint.Checkpointer(str(folder), CheckpointConfig(keep=5))
    for step in (OLD, NEW):
        saved.save(step, *tree(step))
    saved.close()


def damage(folder: pathlib.Path, kind: str, rng: np.random.Generator) -> str:
    """Damage one file of the newest checkpoint; what was done, in words."""
    newest = folder / checkpoint.FOLDER / str(NEW)
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    victim = files[rng.integers(len(files))]
    name = victim.relative_to(newest)
    content = victim.read_bytes()
    if kind == "flips":
        at, bit = int(rng.integers(len(content))), int(rng.integers(8))
        victim.write_bytes(content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
        return f"bit {bit} of byte {at} of {name}"
    if kind == "truncations":
        length = int(rng.integers(len(content)))
        victim.write_bytes(content[:length])
        return f"{name} cut from {len(content)} to {length} bytes"
    others = [p for p in files if p != victim and p.read_bytes() != content]
    twin = folder / checkpoint.FOLDER / str(OLD) / name
    if twin.is_file() and twin.read_bytes() != content and rng.integers(2):
        shutil.copy(twin, victim)  # the older checkpoint stays sound
        return f"{name} replaced by that of step {OLD}"
    other = others[rng.integers(len(others))]
    victim.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"{name} and {other.relative_to(newest)} swapped"


def verdict(folder: pathlib.Path) -> str:
    """fall-back, untouched, refused or SILENT."""
    wanted = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), t) for t in tree(NEW)[:2]]
    saved = checkpoint.Checkpointer(str(folder), CheckpointConfig(keep=5))
    try:
        found = saved.restore(*wanted)
    except ValueError:
        return "refused"
    finally:
        saved.close()
    step = found.meta["step"]
    params, moments, meta = tree(step)
    got = jax.tree.leaves((found.params, found.optimizer))
    same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes()
               for a, b in zip(got, jax.tree.leaves((params, moments)), strict=True))  # fmt: skip
    same &= all(found.meta[k] == json.loads(json.dumps(v)) for k, v in meta.items())
    if not same:
        return "SILENT"
    if step == OLD:
        return "fall-back" if found.skipped and str(NEW) in found.skipped[0] else "SILENT"
    return "untouched"


def trial(counts: dict[str, int], seed: int = 0, say: bool = False) -> dict[str, collections.Counter[str]]:
    """Damage and restore so many times of each kind."""
    for noisy in ("absl", "asyncio"):  # they report the damage as well
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    found: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write(folder / "sound")
        for kind, count in counts.items():
            found[kind] = collections.Counter()
            for i in range(count):
                rng = np.random.default_rng((seed, len(found), i))
                shutil.copytree(folder / "sound", folder / "hurt")
                what = damage(folder / "hurt", kind, rng)
                how = verdict(folder / "hurt")
                found[kind][how] += 1
                if how in ("SILENT", "refused"):
                    print(f"{kind} {i}: {what}: {how}", file=sys.stderr)
                shutil.rmtree(folder / "hurt")
                if say and i % 100 == 99:
                    print(f"{kind}: {i + 1} of {count} {dict(found[kind])}", file=sys.stderr, flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    """Counts from the command line; 1 if anything came back wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in (("flips", 2000), ("truncations", 200), ("swaps", 200)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    began = time.monotonic()
    found = trial({k: getattr(args, k) for k in ("flips", "truncations", "swaps")}, args.seed, say=True)
    print(
        json.dumps({k: dict(v) for k, v in found.items()} | {"seconds": round(time.monotonic() - began, 1)}, indent=2)
    )
    return int(any(v["SILENT"] or v["refused"] for v in found.values()))


if __name__ == "__main__":
    sys.exit(main())
