"""`hico plan`: will it fit, how long will a step take, before a pod is rented.

In: a configuration, a topology, a batch. Out: memory, time and chip-hours from formulas at once; with `--compile`, what
the real compiler says of the real step. Exit code 2 when it does not fit.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from hico_jax.plan.chips import Topology

OWN = {
    "topology": str,
    "tokens": int,
    "rows": int,
    "clips": int,
    "prefill": bool,
    "compile": bool,
    "json": bool,
    "table": bool,
    "only": str,
    "again": bool,
    "placed": bool,
    "write": str,
}

KNOWN = f"known are --config, --config.KEY and {', '.join(f'--{name}' for name in OWN)}"
NO_TEXT = "  what is sent: unknown, this jaxlib cannot print what this compiler made; other versions of the two may"


def main(argv: Sequence[str]) -> int:
    """Print the plan.

    Raises:
      ValueError: a flag, a mesh or a topology that does not fit, or too little memory.
    """
    own, rest = _flags(argv)
    if own.get("table"):
        return _table(own)
    if "topology" not in own:
        raise ValueError("no --topology is given; for example --topology=v5p:4x4x4, or --topology=h100:8")
    from hico_jax import config
    from hico_jax.plan import forecast as f

    topology = Topology.parse(own["topology"])
    experiment = config.from_flags(rest)
    shape = f.shape_of(experiment, own)
    parts = 1 if own.get("prefill") else min(experiment.optim.accumulate, shape.rows)
    if shape.rows % parts:
        raise ValueError(
            f"{shape.rows} rows do not divide into optim.accumulate={parts} parts; add --config.optim.accumulate=1, or "
            f"give a multiple of {parts} rows"
        )
    experiment = dataclasses.replace(
        experiment, optim=dataclasses.replace(experiment.optim, accumulate=parts),
        data=dataclasses.replace(experiment.data, batch_size=shape.rows),
    )  # fmt: skip
    given = any(a.startswith("--config.mesh.") and not a.startswith("--config.mesh.context") for a in rest)
    micro = dataclasses.replace(shape, rows=max(1, shape.rows // parts))
    chosen = (
        experiment.mesh
        if given
        else dataclasses.replace(f.choose_mesh(micro, topology), context=experiment.mesh.context)
    )
    mesh = chosen.fitted(topology.count)
    check_shape(experiment, mesh, shape)
    found = f.forecast(experiment, topology, mesh, shape, training=not own.get("prefill"))
    report = describe(experiment, topology, shape, found)
    if own.get("compile"):
        report |= {"compiled": _compiled(experiment, topology, mesh, shape, bool(own.get("prefill")))}
    print(json.dumps(report, indent=1) if own.get("json") else "\n".join(lines(report)))
    peak = report["compiled"]["peak_gib"] * 2**30 if own.get("compile") else None
    f.check_memory(found, topology, experiment, shape, peak=peak, training=not own.get("prefill"))
    return 0


def _table(own: dict[str, Any]) -> int:
    """`--table [--compile [--only=PART] [--again] [--placed]] [--write=PAGE]`: the tables of docs/scale.md."""
    from hico_jax.plan import table

    if own.get("compile"):
        table.compile_all(only=own.get("only", ""), again=bool(own.get("again")), placed=bool(own.get("placed")))
    if "write" in own:
        table.write(pathlib.Path(own["write"]))
    else:
        print(table.markdown())
    return 0


def _flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our flags, and those of the configuration. `--config.data.max_tokens` is another name of `--tokens`."""
    own: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, has, value = word.replace("--config.data.max_tokens", "--tokens").removeprefix("--").partition("=")
        if name not in OWN:
            near = difflib.get_close_matches(name, OWN, n=1)
            if not name.startswith("config") and word.startswith("--"):
                raise ValueError(f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else KNOWN))
            rest.append(word)
            continue
        kind = OWN[name]
        if kind is bool:
            own[name] = True
            continue
        value = value if has else next(words, "")
        try:
            own[name] = kind(value)
        except ValueError:
            raise ValueError(f"--{name} is {value!r}; it must be a whole number") from None
        if kind is int and own[name] < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    return own, rest


def check_shape(experiment: Any, mesh: Any, shape: Any) -> None:
    """Refuse a batch that the mesh cannot split.

    Raises:
      ValueError: heads or tokens do not divide.
    """
    llm = experiment.model.llm
    if llm.num_heads % mesh.tensor or llm.num_kv_heads % mesh.tensor:
        raise ValueError(
            f"{llm.num_heads} heads and {llm.num_kv_heads} key/value heads cannot be split over "
            f"mesh.tensor={mesh.tensor}; use a divisor of {math.gcd(llm.num_heads, llm.num_kv_heads)}"
        )
    share, micro = mesh.slices * mesh.data * mesh.fsdp, shape.rows // experiment.optim.accumulate
    if shape.rows % experiment.optim.accumulate or micro % share:
        raise ValueError(
            f"{shape.rows} rows in optim.accumulate={experiment.optim.accumulate} parts do not divide over slices x "
            f"data x fsdp = {share}; use a multiple of {share} rows a part, or raise mesh.sequence: devices share rows"
        )
    block = 128
    if mesh.sequence > 1 and shape.tokens % (2 * mesh.sequence * block):
        step = 2 * mesh.sequence * block
        raise ValueError(
            f"rows of {shape.tokens} tokens cannot be split over mesh.sequence={mesh.sequence} in two chunks of whole "
            f"blocks of {block}; use a multiple of {step}, for example {shape.tokens + -shape.tokens % step}"
        )


def describe(experiment: Any, topology: Topology, shape: Any, found: Any) -> dict[str, Any]:
    """The forecast as plain numbers."""
    mesh, chip = found.mesh, topology.chip
    steps = experiment.train.steps
    report = {
        "model": experiment.model_name, "stage": experiment.stage, "topology": topology.name, "chips": topology.count,
        "rows": shape.rows, "tokens": shape.tokens, "clips": shape.clips,
        "mesh": {name: getattr(mesh, name) for name in ("slices", "data", "fsdp", "sequence", "tensor")},
        "attention": found.strategy,
        "memory_gib": {name: round(size / 2**30, 2) for name, size in found.memory.items()},
        "peak_gib": round(found.peak / 2**30, 2), "hbm_gib": round(chip.memory / 2**30, 1),
        "flops": found.flops, "step_s": round(found.step_s, 3), "exposed_s": round(found.exposed_s, 3),
        "mfu": round(found.flops / (found.step_s * topology.count * chip.peak), 3),
        "tokens_per_s_chip": round(shape.rows * shape.tokens / found.step_s / topology.count, 1),
        "chip_hours_per_1000_steps": round(found.step_s * topology.count / 3.6, 1),
        "ring_hides_travel_from": round(found.ring_bound),
    }  # fmt: skip
    if steps:
        report["chip_hours"] = round(found.step_s * topology.count * steps / 3600, 1)
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    mesh = " x ".join(f"{name} {n}" for name, n in report["mesh"].items() if n > 1) or "one device"
    rows = "one row" if report["rows"] == 1 else f"{report['rows']} rows"
    out = [
        f"{report['model']}, {report['stage']}: {rows} of {report['tokens']:,} tokens, {report['clips']:,} clips each",
        f"{report['chips']} chips ({report['topology']}), mesh {mesh}, attention over devices: {report['attention']}",
        "",
        *(f"  {name:32} {size:8.2f} GiB" for name, size in report["memory_gib"].items() if size),
        f"  {'a chip, forecast':32} {report['peak_gib']:8.2f} GiB of {report['hbm_gib']}",
        "",
        f"  {report['step_s']:.2f} s a step ({report['exposed_s']:.2f} s of it travel that nothing hides), "
        f"{report['tokens_per_s_chip']:,} tokens/s a chip, {report['mfu']:.1%} of the peak",
        f"  {report['chip_hours_per_1000_steps']:,} chip-hours for 1,000 steps"
        + (f", {report['chip_hours']:,} for the run" if "chip_hours" in report else ""),
        f"  the ring hides its travel from {report['ring_hides_travel_from']:,} tokens a chip",
    ]
    if "compiled" in report:
        found = report["compiled"]
        out += [
            "", f"compiled in {found['compile_s']:.0f} s:",
            f"  {'a chip, peak':32} {found['peak_gib']:8.2f} GiB",
            f"  {'arguments':32} {found['argument_gib']:8.2f} GiB",
            f"  {'temporary':32} {found['temporary_gib']:8.2f} GiB",
            *(
                f"  {kind:32} {n:5} of {size / 2**20:9.1f} MiB in all"
                for kind, (n, size) in (found["collectives"] or {}).items()
            ),
            *([] if found["collectives"] else [NO_TEXT] if found["collectives"] is None else ["  nothing is sent"]),
        ]  # fmt: skip
    return out


def _compiled(experiment: Any, topology: Topology, mesh: Any, shape: Any, prefill: bool) -> dict[str, Any]:
    import jax

    from hico_jax.parallel.mesh import make_mesh
    from hico_jax.plan import compile as c

    devices = c.devices_of(topology.name) if topology.chip.tpu else jax.devices()
    experiment = dataclasses.replace(experiment, mesh=mesh)
    batch = {"rows": shape.rows, "tokens": shape.tokens, "clips": shape.clips}
    run = c.prefill if prefill else c.train_step
    found = run(experiment, make_mesh(mesh, devices), **batch)
    return c.record(found)
