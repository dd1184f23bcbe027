"""Every method on a tiny model: the same weights, the promised tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from hico_jax import registry
from hico_jax.batch import DropSchedule
from hico_jax.evals.compress import methods
from hico_jax.models.hico import HiCo


def test_at_least_eight_and_each_once(asked_model: HiCo) -> None:
    found = methods.methods(asked_model)
    names = [m.name for m in found]
    assert len(set(names)) == len(names) >= 10
    assert found[0].compressor == asked_model.config.compressor
    assert [m.name for m in found if m.control] == ["drop-all", "shuffled", "blank", "blind"]


def test_every_method_has_the_same_weights_and_its_own_tokens(asked_model: HiCo) -> None:
    clip = jax.ShapeDtypeStruct((1, 2, 4, 32, 32, 3), np.uint8)
    none = jax.ShapeDtypeStruct((1, 0, 32, 32, 3), np.uint8)
    for method in methods.methods(asked_model):
        made = methods.apply(asked_model, method)
        for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(asked_model), strict=True):
            assert ours is theirs
        out = jax.eval_shape(lambda m, c, n: m.encode(c, n), made, clip, none)
        assert out.shape[1] == 2 * 4 * method.compressor.tokens_per_frame, method.name
        expected = 4 if method.name in ("none", "fastv", "pyramid") else 1
        assert method.compressor.tokens_per_frame == expected, method.name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("umt_qwen2_7b", "umt_hd_qwen2_7b")] + ["nano"]
)
def test_released_sizes_fit_every_method(name: str) -> None:
    config = registry.model_config(name)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(params=0)))
    found = {m.name: m for m in methods.methods(model)}
    for method in found.values():
        methods.apply(model, method)
    patches = methods.patches_per_frame(model)
    assert found["none"].compressor.tokens_per_frame == patches
    squares = {"umt_qwen2_7b": 16, "umt_hd_qwen2_7b": 16, "nano": 4}
    assert found["pool-2x2"].compressor.tokens_per_frame >= squares[name]


def test_drops_end_with_the_tokens_of_the_others(asked_model: HiCo) -> None:
    found = {m.name: m for m in methods.methods(asked_model)}
    for name in ("fastv", "pyramid"):
        method = found[name]
        assert method.compressor.tokens_per_frame * method.drop.ratios[-1] == pytest.approx(1.0)


def test_tokens_by_layer() -> None:
    method = methods.Method("x", "x", registry.model_config("nano").compressor, DropSchedule("uniform", (1,), (1, 0.5)))
    assert methods.tokens_by_layer(method, 4) == (4.0, pytest.approx((4 + 3 * 2) / 4))
    assert methods.tokens_by_layer(methods.Method("x", "x", method.compressor), 4) == (4.0, 4.0)


def test_more_tokens_than_patches(asked_model: HiCo) -> None:
    with pytest.raises(ValueError, match="--tokens-per-frame is 5; the tower gives 4 patches"):
        methods.methods(asked_model, 5)
    assert methods.patches_per_frame(asked_model) == 4
