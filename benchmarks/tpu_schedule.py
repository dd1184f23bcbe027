"""Which buffers live when a TPU's memory is fullest: half a minute of compiling instead of many.

    python benchmarks/tpu_schedule.py "one row | umt_qwen2_7b | v5p:4x4x4" [--keep schedule.txt] [--write]
    python benchmarks/tpu_schedule.py --text schedule.txt

The TPU compiler schedules a program early and then spends minutes on machine code. Here it is stopped once its
schedule is written down, and the sizes (as laid out, tiles filled up) and lifetimes of the buffers in it are added up:
an estimate of `hico plan --compile`'s figure, made from the compiler's own program. The rows are those of `hico plan
--table`, by part of their key; `--write` keeps the sum among the records of that table, marked as such. Buffers that
share memory by rules of the compiler that the text does not show are counted twice.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from hico_jax.plan import table
from hico_jax.plan.program import BYTES

THROUGH = ("bitcast", "optimization-barrier", "copy-done", "all-gather-done", "collective-permute-done",
           "all-reduce-done", "async-done", "async-update")  # fmt: skip
STARTS = ("copy-start", "collective-permute-start", "all-gather-start", "all-reduce-start", "async-start")


class Line(NamedTuple):
    """One instruction."""

    name: str
    shape: Any  # bytes, or a list of shapes
    op: str
    args: list[str]
    rest: str
    root: bool
    number: int | None  # of a parameter


def size_of(dtype: str, dims: str, layout: str) -> int:
    """Bytes in the device's main memory, tiles filled up."""
    if "S(" in layout or dtype == "token":
        return 0
    shape = [int(n) for n in dims.replace("<=", "").split(",") if n]
    found, tile = re.match(r"([\d,]+)", layout), re.search(r"T\((\d+)(?:,(\d+))?\)", layout)
    order = [int(n) for n in found[1].split(",")] if found else list(range(len(shape)))[::-1]
    sides = [shape[i] for i in order]
    if tile and sides:
        steps = (int(tile[2]), int(tile[1])) if tile[2] else (int(tile[1]),)
        for i, step in enumerate(steps[: len(sides)]):
            sides[i] = -(-sides[i] // step) * step
    return math.prod(sides) * BYTES.get(dtype, 4)


def shape_at(text: str, at: int) -> tuple[Any, int]:
    """The shape that begins there, and where it ends."""
    if text[at] != "(":
        found = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?").match(text, at)
        assert found is not None, text[at : at + 40]
        return size_of(found[1], found[2], found[3] or ""), found.end()
    parts, at = [], at + 1
    while text[at] != ")":
        if text[at] in ", ":
            at += 1
        elif text.startswith("/*", at):
            at = text.index("*/", at) + 2
        else:
            part, at = shape_at(text, at)
            parts.append(part)
    return parts, at + 1


def parse(text: str) -> tuple[dict[str, list[Line]], str]:
    """The lines of each computation, and the name of the first."""
    bodies: dict[str, list[Line]] = {}
    entry, lines = "", None
    for text_line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", text_line)
        if head and not text_line.startswith(("HloModule", " ")):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", text_line)
        if lines is None or not found:
            continue
        shape, at = shape_at(text_line, found.end())
        op = re.compile(r"\s*([\w\-]+)\(").match(text_line, at)
        assert op is not None
        end, depth = op.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text_line[end], 0)
            end += 1
        inside = re.sub(r"/\*.*?\*/", "", text_line[op.end() : end - 1])
        number = int(inside) if op[1] == "parameter" else None
        args = re.findall(r"%([\w.\-]+)", inside)
        lines.append(Line(found[2], shape, op[1], args, text_line[end:], bool(found[1]), number))
    return bodies, entry


class Peak(NamedTuple):
    """The most bytes at once, and who holds them: size, operation, where it comes from."""

    size: int
    holders: list[tuple[int, str, str]]


def flat(tree: Any) -> list[int]:
    """All buffers of a value."""
    return [b for part in tree for b in flat(part)] if isinstance(tree, list) else [tree]


class Lives:
    """Sizes and lifetimes of the buffers of a program."""

    def __init__(self, text: str) -> None:
        self.bodies, self.entry = parse(text)
        self._known: dict[str, Peak] = {}

    def peak(self, name: str) -> Peak:
        """Of one computation, what its arguments hold left out (but for the program's own)."""
        if name not in self._known:
            self._known[name] = self._peak(name)
        return self._known[name]

    def _peak(self, name: str) -> Peak:
        size: list[int] = []
        born: list[int] = []
        last: list[int] = []
        about: list[tuple[str, str]] = []
        value: dict[str, Any] = {}
        inner: dict[int, Peak] = {}
        given: set[int] = set()
        arguments: Any = None
        root: Any = None

        def new(shape: Any, line: Line, at: int) -> Any:
            if isinstance(shape, list):
                return [new(part, line, at) for part in shape]
            origin = re.search(r'op_name="([^"]*)"', line.rest)
            size.append(shape)
            born.append(at)
            last.append(at)
            about.append((line.op, origin[1][-90:] if origin else line.name))
            return len(size) - 1

        for at, line in enumerate(self.bodies[name]):
            args: list[Any] = [value.get(a) for a in line.args]
            made: Any
            if line.op not in ("get-tuple-element", "tuple", "bitcast"):
                for b in (b for a in args if a is not None for b in flat(a)):
                    last[b] = at
            if line.op == "parameter":
                made = new(line.shape, line, -1)
                given.update(flat(made))
                arguments = made
            elif line.op == "tuple":
                made = args
            elif line.op == "get-tuple-element":
                index = re.search(r"index=(\d+)", line.rest)
                made = args[0][int(index[1])] if index and isinstance(args[0], list) else args[0]
            elif line.op in THROUGH and args and args[0] is not None:
                made = args[0][-1] if line.op.endswith("-done") and isinstance(args[0], list) else args[0]
            elif line.op == "while":
                made, body = args[0], re.search(r"body=%?([\w.\-]+)", line.rest)
                inner[at] = self.peak(body[1]) if body else Peak(0, [])
            elif line.op in ("conditional", "call"):
                names = re.findall(r"(?:true_computation|false_computation|to_apply)=%?([\w.\-]+)", line.rest)
                branches = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
                names += re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
                inner[at] = max((self.peak(n) for n in names), key=lambda p: p.size)
                made = new(line.shape, line, at)
            elif line.op == "dynamic-update-slice":
                made = args[0]
            elif line.op in STARTS:
                parts = line.shape if isinstance(line.shape, list) else [line.shape, line.shape]
                made = [args[0], new(parts[0 if line.op == "copy-start" else 1], line, at)]
            else:
                made = self._in_place(line, args)
                made = new(line.shape, line, at) if made is None else made
            value[line.name] = made
            root = made if line.root else root
        end = len(self.bodies[name])
        for b in flat(root) if root is not None else ():
            last[b] = end
        if (
            name != self.entry
            and isinstance(arguments, list)
            and isinstance(root, list)
            and len(root) == len(arguments)
        ):
            for a, b in zip(arguments, root, strict=True):  # what a loop hands on lies where it came from
                if isinstance(a, int) and isinstance(b, int) and b not in given and last[a] <= born[b]:
                    size[b] = 0
        first = name == self.entry
        life = [(0, end) if first and b in given else (born[b], last[b]) for b in range(len(size))]
        mine = [b for b in range(len(size)) if first or b not in given]
        change: dict[int, int] = collections.Counter()
        for b in mine:
            change[life[b][0]] += size[b]
            change[life[b][1] + 1] -= size[b]
        now, most, when = 0, -1, 0
        for at in range(min(change, default=0), end + 1):
            now += change[at]
            total = now + (inner[at].size if at in inner else 0)
            if total > most:
                most, when = total, at
        holders = [(size[b], *about[b]) for b in mine if life[b][0] <= when <= life[b][1] and size[b]]
        return Peak(most, holders + (inner[when].holders if when in inner else []))

    def _in_place(self, line: Line, args: list[Any]) -> Any:
        """The argument that a fusion writes into, if it does."""
        called = re.search(r"calls=%?([\w.\-]+)", line.rest)
        if line.op != "fusion" or not called or isinstance(line.shape, list):
            return None
        body = {x.name: x for x in self.bodies[called[1]]}
        at = next(x for x in body.values() if x.root)
        if at.op == "bitcast":
            at = body[at.args[0]]
        if at.op != "dynamic-update-slice":
            return None
        while at.op != "parameter" and at.args:
            at = body[at.args[0]]
        return args[at.number] if at.number is not None else None


def schedule_of(key: str, within_s: float) -> str:
    """Compile a row of the table in another process, until its schedule is written down."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="hico_schedule_"))
    flags = ("to_filter=TLP", "hlo_text=true", "llo_text=false", f"to={folder}")
    env = os.environ | {"LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_dump_{flag}" for flag in flags), "JAX_PLATFORMS": "cpu"}
    code = "import sys; from hico_jax.plan import table; table.compiled(table.find(sys.argv[1]))"
    began = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", code, key], env=env, cwd=pathlib.Path(__file__).parents[1], stderr=subprocess.DEVNULL
    )
    try:
        while time.monotonic() - began < within_s:
            done = child.poll() is not None
            for file in sorted(folder.glob("*TLP-hlo.txt")):
                text = file.read_text()
                if text.startswith("HloModule jit_train_step") and text.rstrip().endswith("}"):
                    return text
            if done:
                break
            time.sleep(1)
        raise SystemExit(f"no schedule of {key!r} came within {within_s:.0f} s; is libtpu installed and free?")
    finally:
        child.kill()
        child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Print the peak and the largest buffers of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", nargs="?", help="part of a row's key in `hico plan --table`")
    parser.add_argument("--text", help="a schedule that is there already")
    parser.add_argument("--keep", help="where to put the schedule")
    parser.add_argument("--write", action="store_true", help="among the records of the table")
    parser.add_argument("--within", type=float, default=900, help="seconds")
    args = parser.parse_args()
    text = pathlib.Path(args.text).read_text() if args.text else schedule_of(args.key, args.within)
    if args.keep:
        pathlib.Path(args.keep).write_text(text)
    lives = Lives(text)
    found = lives.peak(lives.entry)
    print(f"{found.size / 2**30:.2f} GiB at once")
    for size, op, origin in sorted(found.holders, reverse=True)[:25]:
        print(f"{size / 2**20:9.1f} MiB  {op:20} {origin}")
    if args.write and not args.text:
        known = table.records()
        known[table.find(args.key).key] = {"peak_gib": round(found.size / 2**30, 2), "of_schedule": True}
        table.RECORDS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
