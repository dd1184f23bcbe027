"""The table of docs/scale.md: four stages, released models, slices that are for rent."""

from __future__ import annotations

import dataclasses
import importlib
import math

from hico_jax import config
from hico_jax.plan.chips import Topology
from hico_jax.plan.forecast import USABLE, choose_mesh, forecast, shape_of

STAGES = {
    "1 align": ("configs.stage1_align", ("umt_qwen2_7b", "umt_hd_qwen2_5_1_5b")),
    "2 pre-train": ("configs.stage2_pretrain", ("umt_qwen2_7b", "umt_hd_qwen2_5_1_5b", "umt_qwen2_5_7b_1m")),
    "3 instruct": ("configs.stage3_sft", ("umt_qwen2_7b", "umt_hd_qwen2_5_1_5b", "umt_qwen2_5_7b_1m")),
    "4 high resolution": ("configs.stage4_highres", ("umt_hd_qwen2_7b",)),
}
SLICES = ("v5e:4x8", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")


def markdown() -> str:
    """One line for each stage, model and slice."""
    out = [
        "| stage | model | slice | mesh (fsdp x sequence) | rows x accumulation | GiB a chip | of | s a step | MFU | "
        "chip-hours / 1,000 steps |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for stage, (module, models) in STAGES.items():
        for model in models:
            experiment = config.freeze(importlib.import_module(module).get_config(model))
            for name in SLICES:
                out.append(_line(stage, model, experiment, Topology.parse(name)))
    return "\n".join(out)


def _line(stage: str, model: str, experiment: config.Experiment, topology: Topology) -> str:
    shape = shape_of(experiment, {})
    mesh = choose_mesh(shape, topology)
    rows = max(1, shape.rows // topology.count)  # one row a device at a time, the rest accumulated
    accumulate = math.gcd(shape.rows, max(experiment.optim.accumulate, rows))
    experiment = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, accumulate=accumulate))
    found = forecast(experiment, topology, mesh, shape)
    fits = found.peak <= topology.chip.memory * USABLE
    mfu = found.flops / (found.step_s * topology.count * topology.chip.peak)
    return (
        f"| {stage} | {model} | {topology.name} | {mesh.fsdp} x {mesh.sequence} | {shape.rows} x {accumulate} | "
        f"{found.peak / 2**30:.1f}{'' if fits else ' (too much)'} | {topology.chip.memory / 2**30:.0f} | "
        f"{found.step_s:.1f} | {mfu:.0%} | {found.step_s * topology.count / 3.6:,.0f} |"
    )
