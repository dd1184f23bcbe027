"""Read a compiled program: which collectives it has, how often they run, how many bytes each brings to a device.

In: the text of an optimized XLA program, of any backend. Out: `Collective`s. A loop's collectives count as often as
the loop runs, where the program says how often; of a conditional the branch with more counts.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
_HEAD = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange of arrays of one shape."""

    kind: str  # one of COLLECTIVES
    shape: str  # the largest array it brings, as the program writes it: bf16[1,16384,4,128]
    times: int  # in one run of the program
    size: int  # bytes of all its results

    @property
    def total(self) -> int:
        """Bytes of one run of the program."""
        return self.times * self.size


def collectives_of(text: str) -> tuple[Collective, ...]:
    """Every collective of a program, the largest total first."""
    bodies, entry = _computations(text)
    found: dict[tuple[str, str, int], int] = collections.Counter()
    for name, times in _runs(bodies, entry).items():
        for kind, shape, size in _exchanges(bodies[name]):
            found[kind, shape, size] += times
    made = (Collective(kind, shape, times, size) for (kind, shape, size), times in found.items())
    return tuple(sorted(made, key=lambda c: (-c.total, c.kind, c.shape)))


def by_kind(found: tuple[Collective, ...]) -> dict[str, tuple[int, int]]:
    """How many of each kind run, and their bytes."""
    numbers: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for c in found:
        numbers[c.kind][0] += c.times
        numbers[c.kind][1] += c.total
    return {kind: (n, size) for kind, (n, size) in sorted(numbers.items())}


def operations(text: str) -> dict[str, int]:
    """How often each operation is written, fused or not: `sort`, `scatter`, `all-gather`, ..."""
    plain = re.sub(r"/\*.*?\*/", "", text)
    return dict(collections.Counter(re.findall(r"^\s+(?:ROOT )?%\S+ = [^=]*? ([a-z][\w\-]*)\(", plain, re.MULTILINE)))


def within(text: str, scope: str) -> dict[str, int]:
    """`operations` of the lines that come from a `jax.named_scope`."""
    return operations("\n".join(line for line in text.splitlines() if f"/{scope}/" in line or f"({scope})" in line))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = _HEAD.match(line) if not line.startswith((" ", "}")) else None
        if head and not line.startswith("HloModule"):
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        elif lines is not None and _LINE.match(line):
            lines.append(line)
    return (bodies, entry) if bodies else ({"": [line for line in text.splitlines() if _LINE.match(line)]}, "")


def _runs(bodies: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    counts: dict[str, int] = collections.Counter()

    def visit(name: str, times: int) -> None:
        if name not in bodies:
            return
        counts[name] += times
        for line in bodies[name]:
            for called, often in _calls(line, bodies):
                visit(called, times * often)

    visit(entry, 1)
    return counts


def _calls(line: str, bodies: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    if " while(" in line:
        body, condition = re.search(r"body=%?([\w.\-]+)", line), re.search(r"condition=%?([\w.\-]+)", line)
        assert body is not None
        yield body[1], _trips(line, bodies.get(condition[1], []) if condition else [])
    elif " conditional(" in line:
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        pair = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else pair
        yield max(names, key=lambda n: sum(size for *_, size in _exchanges(bodies.get(n, ())))), 1
    elif " call(" in line or " async-start(" in line:
        called = re.search(r"(?:to_apply|calls|called_computation)=%?([\w.\-]+)", line)
        if called:
            yield called[1], 1


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: what the line says, else the bound that its counter, from 0, is compared with."""
    known = re.search(r'known_trip_count\D*"?(\d+)', line)
    if known:
        return int(known[1])
    bounds = [int(n) for c in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", c)]
    return bounds[0] if len(bounds) == 1 else 1


def _exchanges(lines: object) -> Iterator[tuple[str, str, int]]:
    """Kind, shape and bytes of the collectives in these lines."""
    assert isinstance(lines, list | tuple)
    for line in lines:
        found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if not found:
            continue
        arrays = [(f"{t}[{dims}]", _bytes(t, dims)) for t, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", found[1]))]
        arrays = [a for a in arrays if a[1]]
        if not arrays:
            continue
        shape = max(arrays, key=lambda a: a[1])[0]
        # What a start returns is what it sends, what it receives and its flags: the largest is what comes.
        size = max(a[1] for a in arrays) if found[3] else sum(a[1] for a in arrays)
        yield found[2], shape, size


def _bytes(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
