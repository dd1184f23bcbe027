"""What is measured: the rows, the opponent's recorded figure beside each, and how long a row may take.

Recorded figures are those of the PyTorch reference (torch 2.11, SDPA/cuDNN attention, bf16, random weights, batch 1)
on another H100 80 GB, not of this run. `--torch` measures a plain twin of some rows in the same run.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure. `code` is `module:function` in this package, called with `options` and `small`."""

    name: str
    what: str
    unit: str
    code: str
    estimate_s: int  # of the whole row on an H100, compilation included
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recorded: float | None = None  # the opponent's, in the same unit
    goal: str = ""
    lower_is_better: bool = False
    optional: bool = False  # only when named, or with --torch

    def run(self, small: bool) -> dict[str, Any]:
        """The row's figures, measured in this process."""
        module, function = self.code.split(":")
        found = importlib.import_module(f"benchmarks.speed.{module}")
        return getattr(found, function)(small=small, **self.options)


DROP = {"layers": (8, 16, 24), "ratios": (1.0, 0.5, 0.25, 0.125)}
_7B, _2B = "umt_qwen2_7b", "umt_hd_qwen2_5_1_5b"


def _prefill(name: str, model: str, frames: int, kind: str, estimate: int, recorded: float | None, goal: str) -> Row:
    size = "Qwen2-7B" if model == _7B else "Qwen2.5-1.5B"
    return Row(
        name, f"prefill {size}, {frames:,} frames, drop {kind}", "s", "language:prefill", estimate,
        {"model": model, "frames": frames, "kind": kind}, recorded, goal, lower_is_better=True,
    )  # fmt: skip


def _train(tokens: int, estimate: int, recorded: float | None, goal: str, **options: Any) -> Row:
    return Row(
        f"train_{tokens}" + ("_bf16" if options.get("weights") == "bfloat16" else ""),
        f"full training step of Qwen2.5-1.5B, one row of {tokens:,} tokens", "tokens/s",
        "training:step", estimate, {"model": _2B, "tokens": tokens, **options}, recorded, goal,
    )  # fmt: skip


def _decode(name: str, model: str, estimate: int, recorded: float | None, goal: str, **options: Any) -> Row:
    size = "Qwen2-7B" if model == _7B else "Qwen2.5-1.5B"
    how = {"int8": ", int8 weights", "": ", weights as trained"}.get(options.get("packing", ""), "")
    return Row(
        name, f"decode {size} after 2,048 frames, batch 1{how}", "tokens/s", "language:decode", estimate,
        {"model": model, "frames": 2048, **options}, recorded, goal,
    )  # fmt: skip


# By worth: a run that is cut short has the most telling rows.
ROWS = (
    Row("roofs", "bf16 product 8192^3, causal attention, copy in HBM", "", "roofs:roofs", 25),
    Row(
        "vision_224",
        "UMT-L 224 + merge + projector, 64 clips",
        "frames/s",
        "vision:vision",
        40,
        {"model": _7B, "clips": 64},
        2395,
        ">= 3,593 (1.5x), merging <= 5 %",
    ),
    _prefill("prefill_7b_2048", _7B, 2048, "none", 40, 1.22, "<= 1.06 s (1.15x)"),
    _decode("decode_7b", _7B, 40, 15, ">= 160", packing="rows"),
    _decode("decode_7b_int8", _7B, 40, None, ">= 1.6x decode_7b", packing="int8"),
    _train(8704, 50, 24_300, ">= 36,450 (1.5x)", keeps="products"),
    _train(8704, 50, 24_300, ">= 36,450 (1.5x)", keeps="products", weights="bfloat16"),
    _prefill("prefill_7b_10000_attention", _7B, 10_000, "attention", 60, None, "<= 45 % of the time without drop"),
    _prefill("prefill_7b_10000", _7B, 10_000, "none", 75, 13.9, "<= 12.1 s (1.15x), <= 32 GiB"),
    Row(
        "second_question_7b",
        "another question about 10,000 frames, Qwen2-7B",
        "s",
        "language:second",
        50,
        {"model": _7B, "frames": 10_000},
        goal="<= 10 % of the first",
        lower_is_better=True,
    ),
    _train(131_072, 90, None, "fits, >= 50 % MFU", keeps="attention"),
    _decode("decode_2b", _2B, 30, None, ">= 600", packing="rows"),
    _decode("decode_2b_int8", _2B, 30, None, ">= 1.6x decode_2b", packing="int8"),
    Row(
        "probe_decode",
        "forms of the products and of the attention of decoding",
        "TB/s",
        "probes:decode",
        90,
    ),
    Row(
        "second_start_2b",
        "a second start: compiling tower, prefill and decoding, from the persistent cache",
        "s",
        "start:second",
        60,
        {"model": _2B, "frames": 2048},
        goal="<= 10 s",
        lower_is_better=True,
    ),
    Row("probe_packed", "cuts of products out of packed stacks", "TB/s", "probes:packed", 45),
    _decode("decode_7b_stacks", _7B, 55, 15, ""),
    _decode("decode_2b_stacks", _2B, 40, None, ""),
    _decode("decode_7b_xla", _7B, 55, 15, "", kernels=False),
    Row(
        "vision_448",
        "UMT-L 448 + merge + projector, 32 clips",
        "frames/s",
        "vision:vision",
        45,
        {"model": "umt_hd_qwen2_7b", "clips": 32},
        480,
        ">= 720 (1.5x), merging <= 5 %",
    ),
    _train(16_896, 50, 22_500, "beside 22,500", keeps="products"),
    _train(33_280, 60, None, "the reference has no memory for it", keeps="products"),
    _prefill("prefill_7b_10000_uniform", _7B, 10_000, "uniform", 60, 5.8, "<= 5.0 s"),
    _prefill("prefill_2b_10000", _2B, 10_000, "none", 40, 5.2, "<= 4.5 s"),
    _prefill("prefill_2b_10000_uniform", _2B, 10_000, "uniform", 40, 2.1, "<= 1.8 s"),
)
TWINS = tuple(
    dataclasses.replace(
        BY[name], name=f"torch_{name}", what=f"{BY[name].what}: a plain PyTorch twin", optional=True, goal="",
        code=f"twin:{function}", estimate_s=60,
        options={k: v for k, v in BY[name].options.items() if k != "kind"},
    )
    for BY in ({row.name: row for row in ROWS},)
    for name, function in (
        ("vision_224", "vision"), ("prefill_7b_2048", "prefill"), ("decode_7b", "decode"), ("vision_448", "vision"),
    )
)  # fmt: skip
BY_NAME = {row.name: row for row in (*ROWS, *TWINS)}
