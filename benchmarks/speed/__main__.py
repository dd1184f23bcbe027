"""Run rows, each in a process of its own, and say what came out."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.speed import report  # noqa: E402
from benchmarks.speed.rows import BY_NAME, ROWS, TWINS, Row  # noqa: E402

MARK = "RESULT "  # begins the line with a row's figures in what its process prints


def main(argv: Sequence[str] | None = None) -> int:
    """All rows that are asked for; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--rows", default="", help="names, by comma; all when empty (see --list)")
    parser.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument("--small", action="store_true", help="the same programs on nano, in seconds")
    parser.add_argument("--torch", action="store_true", help="also plain PyTorch twins, where torch is installed")
    parser.add_argument("--json", type=pathlib.Path, help="figures, written after every row")
    parser.add_argument("--timeout", type=float, default=400.0, help="seconds of one row")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of all rows; 0: no limit")
    parser.add_argument("--cache", default="", help="folder of compiled programs, shared by the rows")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{row.name:28} about {row.estimate_s:3} s  {row.what}" for row in (*ROWS, *TWINS)))
        return 0
    rows = [*ROWS, *(TWINS if args.torch else ())]
    if args.rows:
        unknown = sorted(set(args.rows.split(",")) - BY_NAME.keys())
        if unknown:
            print(f"unknown rows {', '.join(unknown)}; known are {', '.join(BY_NAME)}", file=sys.stderr)
            return 2
        rows = [BY_NAME[name] for name in args.rows.split(",")]
    if args.here:
        return _here(rows, args.small)
    return _all(rows, args)


def _here(rows: Sequence[Row], small: bool) -> int:
    """Measure in this process and print the figures for the process that started this one."""
    from benchmarks.speed import measure

    for row in rows:
        found = row.run(small)
        print(MARK + json.dumps({**found, "environment": measure.environment()}), flush=True)
    return 0


def _all(rows: Sequence[Row], args: argparse.Namespace) -> int:
    began, results, roofs = time.monotonic(), [], {}
    for row in rows:
        left = args.budget - (time.monotonic() - began) if args.budget else args.timeout
        if left < min(15.0, row.estimate_s):
            found: dict[str, Any] = {"failed": "no time left"}
        else:
            print(f"-- {row.name}: {row.what} (about {row.estimate_s} s)", flush=True)
            found = _run(row, args, roofs, min(args.timeout, left))
        roofs = found.get("roofs", roofs)
        results.append(report.complete(row, found))
        print(report.line(results[-1]), flush=True)
        if args.json:
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1) + "\n")
            part.replace(args.json)
    print("\n" + report.table(results), flush=True)
    return int(any("failed" in r for r in results))


def _run(row: Row, args: argparse.Namespace, roofs: dict[str, float], limit: float) -> dict[str, Any]:
    """One row in a new process, which may die without taking the others along."""
    command = [sys.executable, "-u", "-m", "benchmarks.speed", "--here", "--rows", row.name]
    command += ["--small"] if args.small else []
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ}
    environment["HICO_SPEED_ROOFS"] = json.dumps(roofs)
    if args.cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": args.cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    timer = threading.Timer(limit, process.kill)
    timer.start()
    found: dict[str, Any] | None = None
    tail: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            found = json.loads(line.removeprefix(MARK))
        else:
            tail = [*tail[-40:], line.rstrip()]
            if not line.startswith(("W0", "I0", "E0")):
                print(f"   {line.rstrip()[:300]}", flush=True)
    code = process.wait()
    late = not timer.is_alive()
    timer.cancel()
    took = {"row_s": time.monotonic() - began}
    if found is not None:
        return found | took
    reason = f"not done after {limit:.0f} s" if late else f"exit code {code}: {report.reason(tail)}"
    return {"failed": reason, "tail": tail[-25:], **took}


if __name__ == "__main__":
    sys.exit(main())
