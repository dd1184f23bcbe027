"""The sizes of the demo fit the world, the configurations and the model they are for."""

from __future__ import annotations

import pathlib

import pytest

import configs
from data_pipeline.world.presets import PRESETS
from hico_jax import registry
from hico_jax.demo import plan

FOLDER = pathlib.Path(next(iter(configs.__path__)))


@pytest.fixture(params=["QUICK", "FULL"])
def chosen(request: pytest.FixtureRequest) -> plan.Plan:
    return getattr(plan, request.param)


def test_what_a_plan_names_exists(chosen: plan.Plan) -> None:
    assert chosen.preset in PRESETS
    assert all((FOLDER / f"{stage.config}.py").is_file() for stage in chosen.stages)
    assert len({stage.name for stage in chosen.stages}) == len(chosen.stages)
    assert all("=" in tune for stage in chosen.stages for tune in stage.tune)
    assert chosen.asked in {stage.name for stage in chosen.stages}


def test_the_plug_is_pulled_once_and_before_the_end(chosen: plan.Plan) -> None:
    killed = [stage for stage in chosen.stages if stage.kill_at is not None]
    assert len(killed) == 1  # the report tells of one
    assert all(0 < stage.kill_at < stage.steps for stage in killed)


def test_the_longest_film_fits_the_model(chosen: plan.Plan) -> None:
    geometry = registry.model_config("nano").geometry()
    per_frame = geometry.tokens_per_clip // geometry.frames_per_clip
    longest = max(*chosen.lengths, chosen.film_s, chosen.compare_s, chosen.control_s)
    assert longest * per_frame + 128 <= geometry.max_length  # 128: a generous question
    assert list(chosen.lengths) == sorted(set(chosen.lengths))
    assert all(0 <= depth <= 1 for depth in chosen.depths)


def test_quick_is_smaller() -> None:
    quick, full = plan.QUICK, plan.FULL
    assert sum(s.steps for s in quick.stages) < sum(s.steps for s in full.stages)
    assert quick.lengths[-1] <= full.lengths[-1]
