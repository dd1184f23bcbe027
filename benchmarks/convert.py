"""How long `hico convert` and `hico export` take, and how much memory, at the real sizes of the released models.

    python benchmarks/convert.py umt_hd_qwen2_5_1_5b --folder /somewhere/large
    python benchmarks/convert.py umt_qwen2_7b --folder /somewhere/large --json convert_7b.json

A synthetic checkpoint of the model's shapes in bfloat16 (random bits that are finite numbers) is written in shards of
5 GB, imported and exported by the command line in processes of their own, and the checksum of all tensors before is
compared with that after. Memory is sampled from /proc: `anonymous` is what a process holds itself, `resident` counts
pages of the files it maps too, which the system takes back when it needs them. Two copies are on disk at most.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from hico_jax import registry
from hico_jax.convert import export, hf_config, load, safetensors_io


def write_source(name: str, folder: pathlib.Path) -> int:
    """A checkpoint in the released layout; its bytes."""
    config = registry.model_config(name)
    wanted = load.by_path(nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1])
    found = export._sources(config, wanted, False)
    specs = {n: (np.dtype(ml_dtypes.bfloat16), shape) for n, (_, _, _, shape) in found.items()}
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2**16, 1 << 24, dtype=np.uint16)
    block = np.where((block & 0x7F80) == 0x7F80, block & 0xBFFF, block)  # no infinity, no NaN

    def read(tensor: str) -> np.ndarray:
        shape = specs[tensor][1]
        size = int(np.prod(shape))
        start = int(rng.integers(0, 1 << 16))  # so that no two tensors are equal
        return np.resize(block[start:], size).view(ml_dtypes.bfloat16).reshape(shape)

    folder.mkdir(parents=True)
    safetensors_io.write_tensors(folder, specs, read)
    raw = hf_config.to_raw(config, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return sum(int(np.prod(shape)) * 2 for _, shape in specs.values())


def measured(*line: str) -> dict[str, Any]:
    """Seconds by the clock and of all cores, and peaks of memory in bytes, of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, peaks = time.perf_counter(), {"resident": 0, "anonymous": 0}
    with subprocess.Popen([sys.executable, "-m", "hico_jax", *line], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for row in status.splitlines():
                for key, mark in (("resident", "VmRSS:"), ("anonymous", "RssAnon:")):
                    if row.startswith(mark):
                        peaks[key] = max(peaks[key], int(row.split()[1]) * 1024)
            time.sleep(0.05)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"hico {' '.join(line)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "core_seconds": round(core, 1), "said": said.strip().splitlines()} | peaks


def report(step: str, size: int, row: dict[str, Any]) -> None:
    """One line of one step, as soon as it is known."""
    print(
        f"{step}: {row['seconds']} s ({size / 1e9 / row['seconds']:.2f} GB/s), {row['core_seconds']} s of cores, peak "
        f"{row['anonymous'] / 2**30:.2f} GiB of its own, {row['resident'] / 2**30:.2f} GiB with mapped files",
        flush=True,
    )


def main() -> None:
    """Write, import, export, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of `hico models`")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new folder, with room for two copies")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here too")
    args = parser.parse_args()
    source, ours, back = (args.folder / part for part in ("source", "ours", "back"))
    try:
        size = write_source(args.model, source)
        print(f"{args.model}: {size / 1e9:.2f} GB of bfloat16", flush=True)
        out: dict[str, Any] = {"model": args.model, "bytes": size, "cpus": os.cpu_count()}
        out["import"] = measured("convert", str(source), str(ours))
        report("import", size, out["import"])
        shutil.rmtree(source)
        out["export"] = measured("export", str(ours), str(back))
        report("export", size, out["export"])
        sums = [out[step]["said"][-1].split()[-1] for step in ("import", "export")]
        out["equal"] = sums[0] == sums[1]
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(f"exported equal to the source: {out['equal']}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
