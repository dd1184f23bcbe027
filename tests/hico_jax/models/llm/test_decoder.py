"""The loop over layer groups: who may influence whom, and where the loss may sit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax.batch import Batch, DropPlan, DropSchedule, Geometry
from hico_jax.models.llm import decoder, qwen2
from hico_jax.models.llm.decoder import Stream
from hico_jax.parallel import sharding
from hico_jax.parallel.mesh import MeshConfig, make_mesh

TINY = qwen2.VARIANTS["tiny"]
SCHEDULE = DropSchedule("attention", (1, 2), (1.0, 0.5, 0.25))


def model_and_stream(length: int = 16, visual: slice = slice(4, 12)) -> tuple[qwen2.Qwen2, Stream]:
    slots = np.full((1, length), -1, np.int32)
    slots[0, visual] = np.arange(visual.stop - visual.start)
    return TINY.build(rngs=nnx.Rngs(0)), Stream(
        x=jax.random.normal(jax.random.key(1), (1, length, TINY.embed_dim)),
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        segments=jnp.ones((1, length), jnp.int32),
        slots=jnp.asarray(slots),
    )


def test_begin_carries_everything_that_the_batch_says() -> None:
    batch = Batch.fake(Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=2, tokens_per_image=2, max_length=32))
    none = np.zeros(batch.shape, bool)
    plan = DropPlan(survives=none.astype(np.int8), keep=np.zeros((2, 1, 0)), labelled=none)
    stream = Stream.begin(jnp.zeros((*batch.shape, 4)), batch.replace(drop=plan))
    for name in ("positions", "segments", "slots", "targets", "weights"):
        assert getattr(stream, name) is getattr(batch, name)
    assert stream.survives is plan.survives
    assert stream.labelled is plan.labelled
    assert Stream.begin(jnp.zeros((*batch.shape, 4)), batch).survives is None


def test_a_schedule_without_a_plan_is_refused() -> None:
    model, stream = model_and_stream()
    with pytest.raises(ValueError, match="no drop plan"):
        model(stream, None, schedule=SCHEDULE)


@pytest.mark.parametrize("dropping", [False, True])
def test_text_before_a_video_does_not_depend_on_its_frames(dropping: bool, make_plan: Any) -> None:
    model, stream = model_and_stream()
    schedule = SCHEDULE if dropping else DropSchedule()
    plan = make_plan(stream, SCHEDULE, training=False) if dropping else None

    def before(x: Any) -> Any:
        return jnp.square(model(stream.replace(x=x), plan, schedule=schedule)[0].x[0, :4]).sum()

    gradient = jnp.abs(jax.jit(jax.grad(before))(stream.x)[0]).max(-1)
    assert (gradient[:4] > 0).all()
    assert (gradient[4:] == 0).all()


def test_what_padding_holds_does_not_matter(make_plan: Any) -> None:
    model, stream = model_and_stream(20)
    stream = stream.replace(segments=jnp.asarray([[1] * 16 + [0] * 4]))
    plan = make_plan(stream, SCHEDULE, training=False, margin=3)

    @jax.jit
    def run(x: Any) -> Any:
        out, _ = model(stream.replace(x=x), plan, schedule=SCHEDULE)
        return out.x[:, :-3]

    np.testing.assert_array_equal(run(stream.x), run(stream.x.at[:, 16:].set(1e4)))
    gradient = jax.jit(jax.grad(lambda x: run(x).sum()))(stream.x)
    assert np.isfinite(gradient).all()
    assert (gradient[:, 16:] == 0).all()


def test_the_loss_sits_on_the_last_living_token_of_a_visual_run() -> None:
    model, stream = model_and_stream(9, slice(1, 3))
    slots = jnp.asarray([[-1, 0, 1, -1, 2, 3, 4, -1, -1]])
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 0]])  # a new segment is no continuation
    weights = jnp.full((1, 9), 0.5)
    out = decoder.final_weights(stream.replace(slots=slots, segments=segments, weights=weights))
    np.testing.assert_array_equal(out.weights[0], [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.5])
    whole, _ = model(stream.replace(slots=slots, segments=segments, weights=weights), None)
    np.testing.assert_array_equal(whole.weights, out.weights)


def test_a_mesh_changes_nothing(make_plan: Any) -> None:
    """Four rows over data and fsdp, heads over tensor, one stage of attention-guided dropping in between."""
    model, one = model_and_stream()
    x = jax.random.normal(jax.random.key(2), (4, *one.x.shape[1:]))
    stream = jax.tree.map(lambda a: jnp.broadcast_to(a, (4, *a.shape[1:])), one).replace(x=x)
    schedule = DropSchedule("attention", (2,), (1.0, 0.5))
    plan = make_plan(stream, schedule, training=False)
    run = jax.jit(lambda model, stream, plan: model(stream, plan, schedule=schedule)[0])
    expected = run(model, stream, plan)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(model, sharding.shardings(model, mesh))
    with jax.set_mesh(mesh):
        got = run(placed, jax.device_put(stream, sharding.batch_shardings(stream, mesh)), plan)
    np.testing.assert_array_equal(got.slots, expected.slots)
    np.testing.assert_allclose(got.x, expected.x, atol=1e-5)  # partial sums in another order
    assert len(got.x.sharding.device_set) == 8
