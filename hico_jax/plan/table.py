"""The tables of docs/scale.md: stages and released models on slices that are for rent, and rows of a million tokens.

In: nothing but the configurations. Out: Markdown, from formulas at once; with `--compile`, also what the TPU compiler
says of every row that is marked, kept in a file of records, so that an hour's compiling can be printed again.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from hico_jax import config
from hico_jax.parallel.mesh import MeshConfig
from hico_jax.plan.chips import Topology
from hico_jax.plan.forecast import USABLE, Forecast, Shape, choose_mesh, forecast, recommend, shape_of

STAGES = {
    "1 align": ("configs.stage1_align", ("umt_qwen2_7b", "umt_hd_qwen2_5_1_5b", "internvideo2_qwen2_5_7b")),
    "2 pre-train": (
        "configs.stage2_pretrain",
        ("umt_qwen2_7b", "umt_hd_qwen2_5_1_5b", "umt_qwen2_5_7b_1m", "internvideo2_qwen2_5_7b"),
    ),
    "3 instruct": (
        "configs.stage3_sft",
        (
            "umt_qwen2_7b", "umt_hd_qwen2_5_1_5b", "umt_qwen2_5_7b_1m", "internvideo2_qwen2_5_7b", "internvl_hico_r16",
            "internvl_hico_r64",
        ),
    ),
    "4 high resolution": ("configs.stage4_highres", ("umt_hd_qwen2_7b",)),
}  # fmt: skip
SLICES = ("v5e:4x8", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")
RECOMMENDED = {"v5p": "v5p:2x2x4", "v6e": "v6e:4x4"}  # the smallest that every stage fits
OF_INTERN = RECOMMENDED | {"v6e": "v6e:8x8"}  # rows of 65,536 tokens; a tower of 1.1 billion, 30.5 GiB of 4x4's 32
LONG = (  # topology, tokens of one row, what a recomputed layer keeps
    ("v5p:4x4x4", 1 << 20, "nothing"),
    ("v5p:4x4x4", 1 << 20, "attention"),
    ("v6e:4x4", 1 << 20, "nothing"),
    ("v5p:4x4x4", 1 << 22, "nothing"),
    ("v5p:4x8x8", 10 << 20, "nothing"),
)
RECORDS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "scale_compiled.json"
BEGIN, END = "<!-- hico plan --table -->", "<!-- end of table -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: what runs where."""

    name: str
    experiment: config.Experiment
    topology: Topology
    mesh: MeshConfig
    shape: Shape
    marked: bool  # compiled by `--compile`

    @property
    def key(self) -> str:
        """What a record is found by."""
        return f"{self.name} | {self.experiment.model_name} | {self.topology.name} | {self.layout}"

    @property
    def layout(self) -> str:
        """Mesh, rows, tokens and what recomputation keeps."""
        keeps, mesh = self.experiment.model.llm.remat_keeps, self.mesh
        return (
            f"{mesh.fsdp} x {mesh.sequence}, {self.shape.rows} x {self.shape.tokens:,} / "
            f"{self.experiment.optim.accumulate}, {keeps}"
        )

    def forecast(self) -> Forecast:
        """From formulas."""
        return forecast(self.experiment, self.topology, self.mesh, self.shape)


def rows() -> Iterator[Row]:
    """Every line of both tables: first the long rows."""
    for topology, tokens, keeps in LONG:
        yield long_row(topology, tokens, keeps)
    for stage, (module, models) in STAGES.items():
        for model in models:
            experiment = config.freeze(importlib.import_module(module).get_config(model))
            shape = shape_of(experiment, {})
            for name in SLICES:
                topology = Topology.parse(name)
                fitted, mesh = recommend(experiment, topology, shape)
                yield Row(stage, fitted, topology, mesh, shape, name in recommended(model))


def recommended(model: str) -> tuple[str, ...]:
    """The slices to rent for a released model: of each chip, the smallest that holds all its stages.

    Example:
      >>> recommended("internvl_hico_r16")
      ('v5p:2x2x4', 'v6e:8x8')
    """
    return tuple((OF_INTERN if model.startswith("intern") else RECOMMENDED).values())


def find(part: str) -> Row:
    """The first row whose key holds `part`.

    Raises:
      ValueError: none does.
    """
    for row in rows():
        if part in row.key:
            return row
    raise ValueError(f"no row of the tables has {part!r} in its key; keys read {next(rows()).key!r}")


def long_row(topology: str, tokens: int, keeps: str) -> Row:
    """Full fine-tuning of Qwen2-7B, UMT-L and merging on one row over all chips, with a ring."""
    place = Topology.parse(topology)
    experiment = config.freeze(importlib.import_module("configs.stage3_sft").get_config("umt_qwen2_7b"))
    llm = dataclasses.replace(experiment.model.llm, remat_keeps=keeps)
    clips = (tokens - 4096) // experiment.model.geometry().tokens_per_clip // place.count * place.count
    shape = Shape(1, tokens, clips)
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, max_length=tokens, llm=llm),
        optim=dataclasses.replace(experiment.optim, accumulate=1),
        data=dataclasses.replace(experiment.data, batch_size=1),
    )  # fmt: skip
    mesh = dataclasses.replace(choose_mesh(shape, place), context="ring")
    return Row("one row", dataclasses.replace(experiment, mesh=mesh), place, mesh, shape, True)


def compiled(row: Row) -> dict[str, Any]:
    """What the compiler says of a row, as a record."""
    from hico_jax.parallel.mesh import make_mesh
    from hico_jax.plan import compile as c

    experiment = dataclasses.replace(row.experiment, mesh=row.mesh)
    mesh = make_mesh(row.mesh, c.devices_of(row.topology.name))
    found = c.train_step(experiment, mesh, rows=row.shape.rows, tokens=row.shape.tokens, clips=row.shape.clips)
    return c.record(found)


def compile_all(
    path: pathlib.Path = RECORDS, *, only: str = "", again: bool = False, placed: bool = False
) -> None:  # fmt: skip
    """Compile every marked row whose key holds `only` and that has no record yet, or all of them again.

    With `placed` only until all buffers have their place: a minute or two of the many that code takes.
    """
    from hico_jax.plan import buffers

    known = records(path)
    for row in rows():
        done = row.key in known and (placed or known[row.key].get("code", True))
        if not row.marked or only not in row.key or (done and not again):
            continue
        print(f"compiling {row.key} ...", flush=True)
        known[row.key] = buffers.of_row(row.key) if placed else compiled(row)
        print(f"  {known[row.key]['peak_gib']} GiB a chip, {known[row.key]['compile_s']} s", flush=True)
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def records(path: pathlib.Path = RECORDS) -> dict[str, dict[str, Any]]:
    """What was compiled before."""
    return json.loads(path.read_text()) if path.exists() else {}


def markdown(path: pathlib.Path = RECORDS) -> str:
    """Both tables."""
    known = records(path)
    head = (
        "| {} | slice | mesh (fsdp x sequence), rows x tokens / accumulation, kept | GiB a chip, forecast | compiled "
        "| of | s a step | MFU | chip-hours / 1,000 steps |\n|---|---|---|--:|--:|--:|--:|--:|--:|"
    )
    every = list(rows())
    long, stages = ([row for row in every if (row.shape.rows == 1) is one] for one in (True, False))
    out = [head.format("one row of Qwen2-7B + UMT-L, full fine-tuning"), *(line(row, known) for row in long)]
    return "\n".join([*out, "", head.format("stage, model"), *(line(row, known) for row in stages)])


def line(row: Row, known: Mapping[str, Mapping[str, Any]]) -> str:
    """One line of a table."""
    found, chip = row.forecast(), row.topology.chip
    usable = chip.memory * USABLE
    record = known.get(row.key)
    said = "" if record is None else f"{record['peak_gib']:.1f}{_warn(record['peak_gib'] * 2**30 > usable)}"
    said += "" if record is None or record.get("code", True) else " *"
    name = f"{row.shape.clips * 4:,} frames" if row.shape.rows == 1 else f"{row.name}, {row.experiment.model_name}"
    mfu = found.flops / (found.step_s * row.topology.count * chip.peak)
    hours = found.step_s * row.topology.count / 3.6
    return (
        f"| {name} | {row.topology.name} | {row.layout} | {found.peak / 2**30:.1f}{_warn(found.peak > usable)} "
        f"| {said} | {chip.memory / 2**30:.0f} | {found.step_s:.1f} | {mfu:.0%} | {hours:,.0f} |"
    )


def _warn(too_much: bool) -> str:
    return " (too much)" if too_much else ""


def write(page: pathlib.Path, path: pathlib.Path = RECORDS) -> None:
    """Put the tables between their marks in a page.

    Raises:
      ValueError: the page has no marks.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}; the tables go between them")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{markdown(path)}\n\n{END}{after}")
