"""Run a decoder's layers in groups, and let visual tokens leave between the groups.

In: a `Stream` (embeddings and everything that travels with them) and the batch's `DropPlan`. Out: the stream of
the tokens still alive, and the keys and values of every group when a cache is asked for. Knows nothing of the
architecture: a block must offer `block(x, place) -> (x, (k, v))` and
`block.attention_query_key(x, place) -> (q, k)`.
Next: hico_jax/models/compress/progressive.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from hico_jax.batch import Batch, DropPlan, DropSchedule
from hico_jax.kernels import blockwise
from hico_jax.kernels import decode as decode_kernels
from hico_jax.models import layers
from hico_jax.models.compress import progressive, sharded
from hico_jax.models.llm import cache as kv_cache
from hico_jax.parallel import sharding
from hico_jax.parallel.sharding import shard
from hico_jax.shapes import Array, Float, Int

# Of a recomputed layer: attention's output; no more; that on the host; or that and every product with a matrix, so
# that only norms, rotations and activations are computed again.
KEEPS = ("attention", "nothing", "offload", "products")
# Tokens in an MLP at a time: training, training on several devices, and not training.
SLICE, MESH_SLICE, FRUGAL_SLICE = 65_536, 8192, 16_384


class Place(NamedTuple):
    """Where each token sits: rotary angles, positions and segments."""

    cos: Float[Array, "B L d"]
    sin: Float[Array, "B L d"]
    positions: Int[Array, "B L"]
    segments: Int[Array, "B L"]
    plain: bool = False  # see `Stream`
    slice: int = SLICE  # tokens in an MLP at a time


class Stream(flax.struct.PyTreeNode):
    """The tokens on their way through the layers, and what travels with each of them.

    A token is visual iff its slot is not negative; it is padding iff its segment is 0. `targets` and `weights`
    are the loss of each position, `survives` and `labelled` come from the `DropPlan`; None where not needed.
    """

    x: Any  # Float[B L D]
    positions: Any  # Int[B L]
    segments: Any  # Int[B L]
    slots: Any  # Int[B L]
    targets: Any = None  # Int[B L]
    weights: Any = None  # Float[B L]
    survives: Any = None  # Int8[B L]
    labelled: Any = None  # Bool[B L]
    ring: int = flax.struct.field(pytree_node=False, default=1)  # devices the tokens are dealt to
    plain: bool = flax.struct.field(pytree_node=False, default=False)  # known: every row is one segment, then padding

    @classmethod
    def begin(cls, x: Float[Array, "B L D"], batch: Batch) -> Stream:
        """The stream before the first layer."""
        plan = batch.drop
        return cls(
            x=x,
            positions=batch.positions,
            segments=batch.segments,
            slots=batch.slots,
            targets=batch.targets,
            weights=batch.weights,
            survives=None if plan is None else plan.survives,
            labelled=None if plan is None else plan.labelled,
            ring=batch.ring,
        )


class Stage(NamedTuple):
    """What one stage of the drop left, for pictures and tests."""

    stream: Stream  # right after the stage
    scores: Float[Array, "B L"] | None  # of the tokens before it; None where the choice was even


def run(
    blocks: Any,
    stream: Stream,
    plan: DropPlan | None,
    *,
    schedule: DropSchedule,
    angles: Callable[[Array], tuple[Array, Array]],
    remat: str = "",
    cache_room: int = 0,
    first: int = 0,
    last: int | None = None,
    piece: int = 0,
) -> tuple[Stream, kv_cache.Cache | None, tuple[Stage, ...]]:
    """All layers of `blocks` (stacked), dropping visual tokens after the layers `schedule` names.

    `remat` is empty (keep all activations) or one of `KEEPS`. `first` and `last` choose some of the groups of layers
    between the stages of the drop; the stage before the first one is done. With a cache, `piece` runs that many tokens
    at a time: the result is the same, and memory for activations no longer grows with the row.

    Raises:
      ValueError: the schedule drops but the batch has no plan, or rows are not dealt as the mesh splits them.
    """
    if stream.ring != sharding.ring():
        raise ValueError(
            f"the batch is dealt to {stream.ring} devices but the mesh splits rows over {sharding.ring()}; "
            "deal it with hico_jax.parallel.zigzag.deal(batch, mesh.sequence)"
        )
    if schedule.num_stages and plan is None:
        raise ValueError(
            f"drop.kind is {schedule.kind!r} but the batch has no drop plan; make one with "
            "data_pipeline.layout.plan_drop, or set drop.kind to 'none'"
        )
    num_layers = jax.tree.leaves(blocks)[0].shape[0]
    bounds = (0, *(schedule.layers if schedule.num_stages else ()), num_layers)
    groups, stages = [], []
    for stage, (start, stop) in list(enumerate(itertools.pairwise(bounds)))[first:last]:
        if stage > 0:
            assert plan is not None
            stream, scores = _drop(blocks, stream, plan, schedule, stage - 1, angles)
            stages.append(Stage(stream, scores))
        most = MESH_SLICE if remat != "products" and sharding.count() > 1 else SLICE
        place = _place(stream, angles)._replace(slice=FRUGAL_SLICE if cache_room else most)
        if cache_room and 0 < piece < stream.x.shape[1] and stream.ring == 1:
            x, group = _run_in_pieces(blocks, start, stop, stream.x, place, piece=piece, cache_room=cache_room)
        else:
            x, group = _run_layers(blocks, start, stop, stream.x, place, remat=remat, cache_room=cache_room)
        stream = stream.replace(x=x)
        if cache_room:
            k, v = group
            groups.append(kv_cache.Group.begin(k, v, place.segments, place.positions, cache_room))
    cache = kv_cache.Cache.begin(groups, stream.segments, cache_room) if cache_room else None
    return final_weights(stream), cache, tuple(stages)


def _place(stream: Stream, angles: Callable[[Array], tuple[Array, Array]]) -> Place:
    return Place(*angles(stream.positions), stream.positions, stream.segments, stream.plain)


def _run_layers(
    blocks: Any, start: int, stop: int, x: Array, place: Place, *, remat: str, cache_room: int
) -> tuple[Array, Any]:
    """Layers `start` to `stop`. Keys and values come back only when there is a cache to fill."""

    def step(x: Array, block: Any) -> tuple[Array, Any]:
        x, key_value = sharding.gathered(block, x.dtype)(x, place)
        x = shard(x, "batch", "length", None)
        return x, kv_cache.with_room(key_value, cache_room) if cache_room else None

    if cache_room:  # no gradient is wanted: index the stack, since a slice of it would copy the weights
        picked = lambda i: jax.tree.map(lambda p: p[i], blocks)
        return jax.lax.scan(lambda x, i: step(x, picked(i)), x, jnp.arange(start, stop))
    if remat:
        policy = _policy(remat)
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    return jax.lax.scan(step, x, layers.layer_slice(blocks, start, stop))


def _run_in_pieces(
    blocks: Any, start: int, stop: int, x: Float[Array, "B L D"], place: Place, *, piece: int, cache_room: int
) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
    """`_run_layers` for a cache, `piece` tokens at a time: activations of one piece exist, whatever the row's length.

    A piece looks at the places before it in doubling steps, so that half of what it reads at worst is masked.
    """
    rows, length, _ = x.shape
    one = jax.eval_shape(lambda x: jax.tree.map(lambda p: p[start], blocks)(x, place), x)[1][0]
    shape = (stop - start, rows, one.shape[2], length + cache_room, one.shape[3])
    carry = (x, jnp.zeros(shape, one.dtype), jnp.zeros(shape, one.dtype))
    edges = [0, *(piece << i for i in range(64) if piece << i < length), length]

    def run(carry: tuple[Array, Array, Array], at: Array | int, size: int, seen: int) -> tuple[Array, Array, Array]:
        x, keys, values = carry
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, axis=1)
        here = Place(
            cut(place.cos), cut(place.sin), cut(place.positions), cut(place.segments), place.plain, place.slice
        )

        def layer(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            block = jax.tree.map(lambda p: p[start + i], blocks)
            return block.extend(carry[0], here, *carry[1:], i, at, place.segments[:, :seen])

        part, keys, values = jax.lax.fori_loop(0, stop - start, layer, (cut(x), keys, values))
        return jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=1), keys, values

    for begin, end in itertools.pairwise(edges):
        whole = (end - begin) // piece
        step = lambda i, carry, begin=begin, end=end: run(carry, begin + i * piece, piece, end)
        carry = jax.lax.fori_loop(0, whole, step, carry) if whole else carry
        if rest := (end - begin) % piece:
            carry = run(carry, end - rest, rest, end)
    return carry[0], carry[1:]


def _policy(keeps: str) -> Any:
    """What a recomputed layer keeps beside its input."""
    policies = jax.checkpoint_policies
    if keeps == "attention":  # most of the arithmetic of a long row, for as many bytes as the input
        return policies.save_only_these_names(blockwise.SAVED)
    if keeps == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[blockwise.SAVED],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    if keeps == "products":
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(blockwise.SAVED)
        )
    assert keeps == "nothing", keeps
    return policies.nothing_saveable


def _drop(
    blocks: Any, stream: Stream, plan: DropPlan, schedule: DropSchedule, stage: int, angles: Callable
) -> tuple[Stream, Array | None]:
    """One stage: choose the survivors, close the gaps, count positions anew."""
    scores = None
    if stream.ring > 1:
        return _drop_over_devices(blocks, stream, plan, schedule, stage, angles), None
    if stage < schedule.num_uniform:
        alive = (stream.segments != 0) & (stream.survives > stage)
    else:
        layer = schedule.layers[stage]
        block = jax.tree.map(lambda p: p[layer], blocks)
        real = stream.segments != 0
        # A padding place may ask (see `progressive.queries`); it is empty, and counted on only before the first stage.
        beyond = real.sum(1, dtype=jnp.int32).max() - 1 if stage == 0 else 0
        place = _place(stream.replace(positions=jnp.where(real, stream.positions, beyond)), angles)
        x = jnp.where(real[..., None], jax.lax.stop_gradient(stream.x), jnp.zeros((), stream.x.dtype))
        q, k = block.attention_query_key(x, place)
        asks = progressive.queries(stream.segments, stream.labelled, plan.num_queries)
        num_queries = plan.num_queries or plan.keep.shape[1]
        scores = progressive.scores(q, k, stream.positions, stream.segments, asks, num_queries)
        candidates = (scores, stream.slots, stream.segments, plan.keep[:, :, stage])
        if schedule.shares > 1:
            alive = progressive.best_of_shares(*candidates, schedule.shares)
        else:
            alive = progressive.best(*candidates)
    index, real = progressive.compact(alive, plan.lengths[stage])
    taken = jax.tree.map(lambda a: progressive.take(a, index, real), stream)
    slots = jnp.where(real, taken.slots, -1)
    return taken.replace(slots=slots, positions=progressive.renumber(taken.segments)), scores


def _drop_over_devices(
    blocks: Any, stream: Stream, plan: DropPlan, schedule: DropSchedule, stage: int, angles: Callable
) -> Stream:
    """`_drop` for rows that are split over devices."""
    axis = sharded.Axis(sharding.SEQUENCE, stream.ring)
    count, even, length = plan.keep.shape[1], stage < schedule.num_uniform, plan.lengths[stage]
    layer = schedule.layers[stage]
    block = None if even else sharding.gathered(jax.tree.map(lambda p: p[layer], blocks), stream.x.dtype)

    def choose(stream: Stream, keep: Array, block: Any) -> Stream:
        real = stream.segments != 0
        if even:
            alive = real & (stream.survives > stage)
        else:
            beyond = axis.sum(real.sum(1, dtype=jnp.int32)).max() - 1 if stage == 0 else 0
            place = _place(stream.replace(positions=jnp.where(real, stream.positions, beyond)), angles)
            x = jnp.where(real[..., None], jax.lax.stop_gradient(stream.x), jnp.zeros((), stream.x.dtype))
            q, k = jax.lax.stop_gradient(block.attention_query_key(x, place))
            asks = sharded.queries(stream.segments, stream.labelled, plan.num_queries, count, axis)
            scores = sharded.scores(q, k, stream.positions, stream.segments, asks, plan.num_queries or count, axis)
            candidates = (scores, stream.slots, stream.segments, keep[:, :, stage])
            if schedule.shares > 1:
                alive = sharded.best_of_shares(*candidates, schedule.shares, axis)
            else:
                alive = sharded.best(*candidates, axis)
        taken, filled = sharded.close_ranks(stream, alive, length, axis)
        return taken.replace(
            slots=jnp.where(filled, taken.slots, -1), positions=sharded.positions(taken.segments, count, axis)
        )

    row = ("batch", "length")
    return sharding.local(choose, stream, plan.keep, block, axes=(row, ("batch",), ()), out=row)


def decode(
    blocks: Any, x: Float[Array, "B 1 D"], cache: kv_cache.Cache, *, angles: Callable[[Array], tuple[Array, Array]]
) -> tuple[Float[Array, "B 1 D"], kv_cache.Cache]:
    """One token of every row through all layers, each against the tokens its own group has kept."""
    first, groups, dtype = 0, [], x.dtype
    x = decode_kernels.widened(blocks, x)
    for group in cache.groups:
        count = group.k.shape[0]
        segments = kv_cache.mark(group.segments, cache.segment, cache.step, cache.room)
        place = Place(*angles(group.position[:, None]), group.position[:, None], cache.segment[:, None])
        visible = segments == cache.segment[:, None]

        def step(
            i: Array,
            carry: tuple[Array, Array, Array],
            first: int = first,
            place: Place = place,
            visible: Array = visible,
        ) -> tuple[Array, Array, Array]:
            block = decode_kernels.layer_of(blocks, first + i, carry[0])
            return block.decode(carry[0], place, *carry[1:], i, (cache.step, cache.room), visible)

        x, k, v = jax.lax.fori_loop(0, count, step, (x, group.k, group.v))
        groups.append(group.replace(k=k, v=v, segments=segments, position=group.position + 1))
        first += count
    return x.astype(dtype), cache.replace(groups=tuple(groups), step=cache.step + 1)


def final_weights(stream: Stream) -> Stream:
    """Take the loss off every position whose next living token is visual.

    The host gives a run of visual tokens the target of the token after it, because it cannot know which of
    them will be the last alive; this keeps the last only. It must happen before any loss, dropped or not.
    """
    if stream.weights is None:
        return stream
    if stream.ring > 1:
        axis, row = sharded.Axis(sharding.SEQUENCE, stream.ring), ("batch", "length")
        find = lambda slots, segments: sharded.before_visual(slots, segments, axis)
        before = sharding.local(find, stream.slots, stream.segments, axes=(row, row), out=row)
        return stream.replace(weights=jnp.where(before, 0.0, stream.weights))
    same = stream.segments[:, 1:] == stream.segments[:, :-1]
    before_visual = jnp.pad(same & (stream.slots[:, 1:] >= 0), ((0, 0), (0, 1)))
    return stream.replace(weights=jnp.where(before_visual, 0.0, stream.weights))
