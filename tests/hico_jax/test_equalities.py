"""What must not change a loss: packing, recomputation, slices (meshes, micro-batches: test_train.py, test_scale.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline import layout
from hico_jax import losses, registry
from hico_jax.batch import Batch, DropSchedule
from hico_jax.models.hico import HiCoConfig

PLAIN = registry.model_config("tiny")
DROPS = dataclasses.replace(PLAIN, drop=DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25)))


def weights(config: HiCoConfig) -> tuple[Any, Any]:
    """Structure, and random numbers of a fixed seed: no initializer is compiled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def value(keys: Any, leaf: Any) -> Any:
        norm = any(getattr(key, "key", None) == "scale" for key in keys)
        return jnp.asarray(np.ones(leaf.shape) if norm else rng.normal(0, 0.1, leaf.shape), leaf.dtype)

    return graph, jax.tree_util.tree_map_with_path(value, state)


def samples(config: HiCoConfig) -> list[layout.Row]:
    """Conversations about films of one and of two clips, about a picture, and about nothing."""
    g, rng = config.geometry(), np.random.default_rng(1)
    rows = []
    for visual, text in ((layout.Visual.film(4, g), 7), (layout.Visual.film(8, g), 9), (layout.Visual.picture(), 5)):
        ids = rng.integers(1, config.llm.vocab_size, text)
        ids[1] = -200
        rows.append([*ids.tolist(), visual])
    rows.append([*rng.integers(1, config.llm.vocab_size, 8).tolist(), None])
    made = []
    for *ids, visual in rows:
        labels = [-100 if i < 3 or token < 0 else token for i, token in enumerate(ids)]
        px = g.image_px
        clips = tiles = None
        if visual is not None and visual.num_clips:
            clips = rng.integers(0, 255, (visual.num_clips, g.frames_per_clip, px, px, 3), np.uint8)
        elif visual is not None:
            tiles = rng.integers(0, 255, (visual.num_tiles, px, px, 3), np.uint8)
        made.append(layout.row(ids, labels, [visual] if visual else [], g, clips=clips, tiles=tiles))
    return made


def loss_of(config: HiCoConfig, graph: Any, chunk: int = 512) -> Callable[[Any, Batch], jax.Array]:
    def loss(state: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, state)
        stream = model(batch)
        found = losses.next_token(stream.x, model.llm.unembed_weight(), stream.targets, stream.weights, chunk=chunk)
        return found.total

    return loss


def packed(config: HiCoConfig) -> tuple[Batch, Batch]:
    """The same conversations, one a row, and all in one row."""
    rows, g = samples(config), config.geometry()
    return tuple(jax.tree.map(jnp.asarray, layout.collate(r, g)) for r in (rows, [layout.pack(rows, g)]))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "config", [pytest.param(PLAIN, marks=pytest.mark.slow, id="plain"), pytest.param(DROPS, id="drops")]
)
def test_a_packed_row_has_the_loss_of_its_samples(config: HiCoConfig) -> None:
    """Films in different segments neither see each other nor share what compression keeps."""
    graph, state = weights(config)
    apart, together = packed(config)
    assert apart.tokens.shape[0] == 4
    assert together.tokens.shape[0] == 1
    run = jax.jit(loss_of(config, graph))
    np.testing.assert_allclose(run(state, together), run(state, apart), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("config", [PLAIN, DROPS], ids=["plain", "drops"])
def test_packing_recomputing_and_slicing_change_no_gradient(config: HiCoConfig) -> None:
    graph, state = weights(config)
    apart, together = packed(config)
    want, grads = jax.jit(jax.value_and_grad(loss_of(config, graph)))(state, apart)
    vision = dataclasses.replace(config.vision, remat=True)
    ways = {"packed": (config, 512, together), "sliced": (config, 8, apart)}
    for keeps in ("attention", "nothing", "offload"):
        llm = dataclasses.replace(config.llm, remat=True, remat_keeps=keeps)
        ways[keeps] = dataclasses.replace(config, vision=vision, llm=llm), 512, apart
    for name, (other, chunk, batch) in ways.items():
        with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
            structure = weights(other)[0]
            loss, found = jax.jit(jax.value_and_grad(loss_of(other, structure, chunk)))(state, batch)
        np.testing.assert_allclose(loss, want, rtol=1e-6, err_msg=name)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True):
            scale = max(1e-6, float(jnp.abs(b).max()))
            np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=name)
