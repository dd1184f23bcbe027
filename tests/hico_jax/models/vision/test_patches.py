"""Stochastic depth: what is drawn, and towers against their blocks taken branch by branch, sample by sample."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.models.vision import internvideo2, internvit, patches, umt


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(jax.random.key(seed), n)))(jnp.arange(count))


def test_rates_rise_from_none_to_the_last_blocks() -> None:
    drawn = np.asarray(jax.jit(lambda k: patches.branches(k, 0.5, 5, 3))(keys_of(3000)))
    assert drawn.shape == (5, 2, 9000)
    for rate, of_block in zip((0, 0.125, 0.25, 0.375, 0.5), drawn, strict=True):
        assert set(np.unique(of_block)) <= {0.0, np.float32(1) / np.float32(1 - rate)}
        bound = 4 * np.sqrt(rate * (1 - rate) / 9000)  # four standard deviations
        for of_branch in of_block:
            assert abs((of_branch == 0).mean() - rate) <= bound
    # Blocks, their two branches and samples are drawn apart.
    gone = (drawn[1:] == 0).reshape(8, 3000, 3)
    for a, b in ((gone[7], gone[6]), (gone[7], gone[5]), (gone[7, :, 0], gone[7, :, 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


def test_a_clip_draws_the_same_in_any_company() -> None:
    draw = jax.jit(lambda k: patches.branches(k, 0.5, 3))
    keys = keys_of(6)
    np.testing.assert_array_equal(draw(keys)[..., 2:4], draw(keys[2:4]))
    assert (np.asarray(draw(keys)) != draw(keys_of(6, seed=1))).any()


def filled(config: Any) -> Any:
    """A tower with random numbers everywhere, so that every branch counts."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.3, a.shape), jnp.float32), state))


def branch_of(block: Any, which: int, x: jax.Array) -> jax.Array:
    """What one branch of a block adds when it is not dropped."""
    if which == 0:
        y = block.attn(block.norm1(x))
    else:
        y = block.down(jax.nn.gelu(block.up(block.norm2(x)), approximate=False))
    return y * (block.scale1, block.scale2)[which][...]


@pytest.mark.parametrize("module", [internvideo2, internvit])
def test_branches_are_dropped_sample_by_sample(module: Any) -> None:
    """Of a clip, or of a frame where frames are encoded alone; also where blocks are computed again."""
    config = dataclasses.replace(module.VARIANTS["tiny"], num_blocks=3, drop_path=0.6, remat=True)
    tower, px = filled(config), config.image_px
    pixels = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, px, px, 3)), jnp.float32)
    keys = keys_of(3, seed=2)

    def restated(tower: Any, pixels: jax.Array, keys: jax.Array) -> jax.Array:
        x = through_nothing(tower, pixels, module)
        each = len(x) // len(keys)
        drawn = [jax.random.uniform(jax.random.wrap_key_data(key), (each, 3, 2)) for key in keys]
        drawn = jnp.concatenate(drawn)
        for i, rate in enumerate((0.0, 0.3, 0.6)):
            block = jax.tree.map(lambda p, i=i: p[i], tower.blocks)
            for which in range(2):
                stays = drawn[:, i, which, None, None] < 1 - rate
                x = jnp.where(stays, x + branch_of(block, which, x) / (1 - rate), x)
        x = x[:, 1:]
        if module is internvit:
            side = px // config.patch_px
            x = internvit.pixel_shuffle(x.reshape(len(x), side, side, -1)).reshape(len(keys), -1, config.embed_dim)
        return x

    want = jax.jit(restated)(tower, pixels, keys)
    scale = float(jnp.abs(want).max())
    found = jax.jit(lambda t, x, k: t(x, k))(tower, pixels, keys)
    np.testing.assert_allclose(found / scale, want / scale, atol=1e-5)


def through_nothing(tower: Any, pixels: jax.Array, module: Any) -> jax.Array:
    """Every sample before the first block."""
    if module is internvit:
        pixels = pixels.reshape(-1, 1, *pixels.shape[2:])
        table = tower.positions[...]
    else:
        table = tower._table(pixels.shape[1])
    x = tower.patch(pixels)
    cls = jnp.broadcast_to(tower.cls[...], (len(x), 1, x.shape[-1]))
    return jnp.concatenate([cls, x], axis=1) + table


def test_without_keys_nothing_is_dropped_and_rates_are_checked() -> None:
    assert internvideo2.VARIANTS["internvideo2-1b"].drop_path == 0.25
    assert internvit.VARIANTS["internvit-300m"].drop_path == 0.1
    assert not hasattr(umt.VARIANTS["umt-large"], "drop_path")
    for module in (internvideo2, internvit):
        with pytest.raises(ValueError, match=r"vision.drop_path is 1.0; it must be at least 0 and below 1"):
            dataclasses.replace(module.VARIANTS["tiny"], drop_path=1.0)
