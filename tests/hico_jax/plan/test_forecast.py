"""The formulas against numbers worked out elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from configs import finetune_lora, stage3_sft, stage4_highres
from hico_jax import config
from hico_jax.parallel.mesh import MeshConfig
from hico_jax.plan import table
from hico_jax.plan.chips import CHIPS, Topology
from hico_jax.plan.forecast import Shape, check_memory, choose_mesh, forecast, ring_bound, sizes_of

POD = Topology.parse("v5p:4x4x4")
MILLION = Shape(1, 1 << 20, 16_128)
EXPERIMENT = config.freeze(stage3_sft.get_config("umt_qwen2_7b"))
HIGH = config.freeze(stage4_highres.get_config("umt_hd_qwen2_7b"))
MESH = MeshConfig(1, 64, 1, 1)
ONCE = dataclasses.replace(EXPERIMENT, optim=dataclasses.replace(EXPERIMENT.optim, accumulate=1))


def test_parameters_are_counted_by_what_trains() -> None:
    assert sizes_of(EXPERIMENT) == {"vision": (290_479_104, 0), "projector": (16_522_240, 0), "llm": (7_615_616_512, 0)}
    frozen = sizes_of(HIGH)
    assert frozen["llm"] == (0, 7_615_616_512)


def test_what_is_frozen_costs_no_gradient_of_its_own() -> None:
    """Stage 4: forward and back through a frozen language model, 4 products of 6; attention and tower in full."""
    shape = Shape(256, 32_768, 128)
    found, whole = (
        forecast(dataclasses.replace(HIGH, optim=dataclasses.replace(HIGH.optim, rates=rates)), POD, MESH, shape)
        for rates in (HIGH.optim.rates, EXPERIMENT.optim.rates)
    )
    linear = 2.0 * 256 * 32_768 * (sum(sizes_of(HIGH)["llm"]) - 152_064 * 3584)  # the embedding multiplies nothing
    assert whole.flops - found.flops == pytest.approx(linear, rel=1e-3)
    assert found.memory["optimizer"] < whole.memory["optimizer"] / 10


def test_adapters_are_planned_as_they_train() -> None:
    """A frozen base of 7B in float32, or its large matrices in 8 bits; optimizer and gradients of adapters only."""
    full, words = (config.freeze(finetune_lora.get_config(f"umt_qwen2_7b,base={base}")) for base in ("full", "int8"))
    trains, frozen = sizes_of(full)["llm"]
    assert (trains, frozen) == (40_370_176, 7_615_616_512)  # 28 layers x rank 16 x (inputs + outputs of seven matrices)
    place, shape = Topology.parse("h100:1"), Shape(16, 8192, 16)
    found = [forecast(e, place, MeshConfig(1, 1, 1, 1), shape).memory for e in (full, words)]
    assert found[0]["parameters"] == 4.0 * sum(map(sum, sizes_of(full).values()))
    assert found[1]["parameters"] < 0.5 * found[0]["parameters"]
    assert found[0]["optimizer"] == 8.0 * trains


def test_forecasts_are_near_what_the_compiler_says() -> None:
    """Every row of the tables that was compiled, to its end or as far as buffers."""
    left = table.records()
    assert len(left) >= 4
    for row in itertools.takewhile(lambda _: left, table.rows()):
        record = left.pop(row.key, None)
        if record is not None:
            short = 1 - row.forecast().peak / 2**30 / record["peak_gib"]
            if record.get("code", True):
                assert abs(short) <= 0.04, row.key
            else:  # gaps between buffers are in the record; and rows that need little are forecast 10 to 14 % short
                assert -0.04 <= short <= 0.15, row.key
    assert not left, "records of rows that are in no table"


@pytest.mark.parametrize(
    ("chip", "forward", "backward"), [("v5p", 1457, 1749), ("v6e", 2914, 3497), ("v5e", 1251, 1501)]
)
def test_from_how_many_tokens_the_ring_is_free(chip: str, forward: int, backward: int) -> None:
    llm, ratio = EXPERIMENT.model.llm, CHIPS[chip].ratio
    assert ring_bound(llm, ratio, False) == pytest.approx(forward, abs=1)
    assert ring_bound(llm, ratio) == pytest.approx(backward, abs=1)


def test_a_million_tokens_on_64_chips() -> None:
    """7.07e17 FLOP of the language model (half-causal); 43 s at 55.9 % of the peak."""
    found = forecast(ONCE, POD, choose_mesh(MILLION, POD), MILLION)
    assert found.mesh.sequence == 64
    assert found.strategy == "ring"
    assert 7.0e17 < found.flops < 7.7e17
    assert 40 < found.step_s < 60
    assert found.peak < 13 * 2**30
    assert found.exposed_s < 1


def test_meshes() -> None:
    assert choose_mesh(Shape(256, 32_768, 100), POD) == MeshConfig(1, 64, 1, 1)
    assert choose_mesh(Shape(4, 262_144, 100), POD) == MeshConfig(1, 4, 16, 1)
    assert choose_mesh(Shape(2, 1 << 20, 100), Topology.parse("2*v5p:4x4x4")) == MeshConfig(1, 1, 64, 1, slices=2)


def test_too_little_memory_says_by_how_much_and_what_would_help() -> None:
    small = Topology.parse("v5e:2x2")
    found = forecast(ONCE, small, choose_mesh(MILLION, small), MILLION)
    says = r"needs (\d+\.\d) GiB a chip but v5e has 15\.2 GiB to use, \d+\.\d GiB too few; .*remat_keeps=nothing \("
    with pytest.raises(ValueError, match=says) as told:
        check_memory(found, small, ONCE, MILLION)
    need, *then = (float(n) for n in re.findall(r"(\d+\.\d) GiB(?= a chip|\))", str(told.value)))
    assert len(then) == 3
    assert then == sorted(then)
    assert then[-1] < need
    check_memory(found, small, ONCE, MILLION, peak=1.0)
    with pytest.raises(ValueError, match=r"the prefill needs .* --topology=v5e:2x4 with mesh.sequence=8"):
        check_memory(found, small, ONCE, MILLION, training=False)


@pytest.mark.parametrize(
    ("topology", "rows", "tokens", "says"),
    [
        ("v5e:4x4", 256, 32_768, "--config.mesh.fsdp=1 --config.mesh.sequence=16 --config.optim.accumulate=256 ("),
        ("h100:8", 256, 32_768, "--config.optim.accumulate=32"),
    ],
)
def test_what_would_help_is_forecast(topology: str, rows: int, tokens: int, says: str) -> None:
    place, shape = Topology.parse(topology), Shape(rows, tokens, 128)
    found = forecast(ONCE, place, choose_mesh(shape, place), shape)
    with pytest.raises(ValueError, match=re.escape(says)):
        check_memory(found, place, ONCE, shape)
