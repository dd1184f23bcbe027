from __future__ import annotations

import pytest

from data_pipeline.world.presets import PRESETS
from data_pipeline.world.questions import KINDS
from data_pipeline.world.recipes import RECIPES


@pytest.mark.parametrize("name", PRESETS)
def test_every_name_in_a_preset_exists(name: str):
    preset = PRESETS[name]
    assert set(preset.recipes) | set(preset.long_recipes) <= set(RECIPES)
    assert set(preset.weights) <= set(KINDS) | {kind.split("_")[0] for kind in KINDS}


@pytest.mark.parametrize("name", PRESETS)
def test_short_films_give_one_to_three_clips(name: str):
    low, high = PRESETS[name].short_s
    assert (low // 4, high // 4) == (1, 3), "dynamic_fps1 takes whole clips of four seconds"
