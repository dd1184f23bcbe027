"""Each function on a split row against its whole-row twin in `progressive.py`, on rows of drawn segments."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from hico_jax.models.compress import progressive, sharded
from hico_jax.parallel import zigzag

RING, ROWS, LENGTH, SEGMENTS = 4, 3, 48, 4
AXIS = sharded.Axis("sequence", RING)
PLACES = zigzag.order(LENGTH, RING)
BACK = np.argsort(PLACES)


def split(f: Callable[..., Any], *arrays: Any, whole: tuple[Any, ...] = ()) -> Any:
    """`f` of dealt rows on four devices, its results back in row order; `whole` arguments follow."""
    mesh = jax.make_mesh((RING,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:RING])
    part = PartitionSpec(None, "sequence")
    specs = (*(part for _ in arrays), *(PartitionSpec() for _ in whole))
    run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False))
    out = run(*(np.asarray(a)[:, PLACES] for a in arrays), *whole)
    return jax.tree.map(lambda a: np.asarray(a)[:, BACK] if a.shape[1] == LENGTH else np.asarray(a), out)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Segments, slots, labels and positions of rows."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for b in range(ROWS):
        cuts = np.sort(rng.integers(1, LENGTH + 1, int(rng.integers(1, SEGMENTS + 1))))
        for s, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[b, start:stop] = s + 1
        segments[b] = np.unique(segments[b], return_inverse=True)[1].reshape(-1) + (0 if 0 in segments[b] else 1)
    slots = np.where((rng.random((ROWS, LENGTH)) < 0.6) & (segments > 0), 1, -1).astype(np.int32)
    labelled = (rng.random((ROWS, LENGTH)) < 0.3) & (slots < 0) & (segments > 0)
    return segments, slots, labelled, np.asarray(progressive.renumber(jnp.asarray(segments)))


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_ranks_and_positions(seed: int) -> None:
    segments, _, labelled, positions = drawn(seed)
    after = split(lambda x: sharded.following(x, -1, AXIS), segments)
    np.testing.assert_array_equal(after, np.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1))
    before = split(lambda x: sharded.preceding(x, -1, AXIS), segments)
    np.testing.assert_array_equal(before, np.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
    ranks = split(lambda x: sharded.rank(x, AXIS), labelled)
    np.testing.assert_array_equal(ranks, np.cumsum(labelled, 1) - labelled)
    found = split(lambda s: sharded.positions(s, SEGMENTS, AXIS), segments)
    np.testing.assert_array_equal(found, positions)


@pytest.mark.parametrize("num_queries", [0, 12])
def test_who_asks_and_what_they_find(num_queries: int) -> None:
    segments, _, labelled, positions = drawn(3)
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(ROWS, LENGTH, heads, 4)).astype(np.float32) for heads in (4, 2))
    asks = progressive.queries(jnp.asarray(segments), jnp.asarray(labelled), num_queries)
    found = split(lambda s, l: sharded.queries(s, l, num_queries, SEGMENTS, AXIS), segments, labelled)
    np.testing.assert_array_equal(found, asks)
    most = num_queries or SEGMENTS
    expected = progressive.scores(*(jnp.asarray(a) for a in (q, k, positions, segments)), asks, most)
    scores = split(lambda *a: sharded.scores(*a, most, AXIS), q, k, positions, segments, np.asarray(asks))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_same_tokens_are_best(levels: int) -> None:
    """Also where scores are equal: the earlier wins."""
    for seed in range(4):
        segments, slots, _, _ = drawn(seed)
        rng = np.random.default_rng(seed)
        scores = (rng.integers(0, levels, (ROWS, LENGTH)) / levels).astype(np.float32)
        counts = np.stack([((segments == s + 1) & (slots >= 0)).sum(1) for s in range(SEGMENTS)], 1)
        keep = rng.integers(0, counts + 1).astype(np.int32)
        expected = progressive.best(*(jnp.asarray(a) for a in (scores, slots, segments, keep)))
        found = split(lambda a, b, c, d: sharded.best(a, b, c, d, AXIS), scores, slots, segments, whole=(keep,))
        np.testing.assert_array_equal(found, expected)


def test_survivors_close_ranks_and_are_dealt_anew() -> None:
    rng = np.random.default_rng(0)
    alive = rng.random((ROWS, LENGTH)) < 0.4
    x = rng.normal(size=(ROWS, LENGTH, 5)).astype(np.float32)
    length = 32
    index, real = progressive.compact(jnp.asarray(alive), length)
    expected = progressive.take(jnp.asarray(x), index, real)
    taken, filled = split(lambda x, a: sharded.close_ranks(x, a, length, AXIS), x, alive)
    places = zigzag.order(length, RING)
    np.testing.assert_array_equal(taken, np.asarray(expected)[:, places])
    np.testing.assert_array_equal(filled, np.asarray(real)[:, places])


def test_the_last_token() -> None:
    segments = drawn(5)[0]
    last = split(lambda p, s: sharded.last(p, s, AXIS), np.arange(LENGTH)[None].repeat(ROWS, 0), segments)
    ends = [np.flatnonzero(row)[-1] for row in segments]
    np.testing.assert_array_equal(last[:, 0], ends)


def test_nothing_is_gathered_or_sorted() -> None:
    """The program of a whole stage: edges, counts, thresholds; hidden states in one round of permutes."""
    mesh = jax.make_mesh((RING,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:RING])
    part, width = PartitionSpec(None, "sequence"), 64

    def stage(x: Any, scores: Any, slots: Any, segments: Any, keep: Any) -> Any:
        alive = sharded.best(scores, slots, segments, keep, AXIS)
        return sharded.close_ranks((x, segments), alive, LENGTH // 2 // 8 * 8, AXIS)

    run = jax.jit(
        jax.shard_map(stage, mesh=mesh, in_specs=(part,) * 4 + (PartitionSpec(),), out_specs=part, check_vma=False)
    )
    segments, slots, _, _ = drawn(0)
    x = np.zeros((ROWS, LENGTH, width), np.float32)
    keep = np.ones((ROWS, SEGMENTS), np.int32)
    text = run.lower(x, x[..., 0], slots, segments, keep).compile().as_text()
    assert " sort(" not in text
    sizes = [line for line in text.splitlines() if "all-gather" in line and f"{width}]" in line]
    assert sizes == []


def test_scaled_is_exact() -> None:
    rng = np.random.default_rng(0)
    c = rng.integers(0, 2**29, 200).astype(np.int32)
    b, a = (np.minimum(rng.integers(0, 2**29, 200), c).astype(np.int32) for _ in range(2))
    expected = [int(x) * int(y) // max(1, int(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(progressive.scaled(*(jnp.asarray(v) for v in (a, b, c))), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_equal_shares_are_the_same_on_any_number_of_devices(size: int) -> None:
    """Against the rule written out in NumPy: each of 16 parts keeps the best of its own, together exactly `keep`."""
    shares, length = 16, 64
    rng = np.random.default_rng(size)
    segments = np.repeat([[1] * 40 + [2] * 20 + [0] * 4, [1] * 64], 1, axis=0).astype(np.int32)
    slots = np.where((rng.random(segments.shape) < 0.7) & (segments > 0), 1, -1).astype(np.int32)
    scores = (rng.integers(0, 5, segments.shape) / 5).astype(np.float32)
    counts = np.stack([((segments == s) & (slots >= 0)).sum(1) for s in (1, 2)], 1)
    keep = (counts * 0.4).astype(np.int32)
    expected = np.zeros(segments.shape, bool)
    for b, row in enumerate(segments):
        for s in (1, 2):
            seen = 0
            for part in range(shares):
                at = [i for i in range(part * 4, part * 4 + 4) if row[i] == s and slots[b, i] >= 0]
                total, kept = max(1, counts[b, s - 1]), keep[b, s - 1]
                share = kept * (seen + len(at)) // total - kept * seen // total
                expected[b, sorted(at, key=lambda i: (-scores[b, i], i))[:share]] = True
                seen += len(at)
            assert expected[b, (row == s) & (slots[b] >= 0)].sum() == keep[b, s - 1]
    expected |= (segments > 0) & (slots < 0)
    whole = progressive.best_of_shares(*(jnp.asarray(a) for a in (scores, slots, segments, keep)), shares)
    np.testing.assert_array_equal(whole, expected)
    axis, places = sharded.Axis("sequence", size), zigzag.order(length, size)
    mesh = jax.make_mesh((size,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    part, choose = PartitionSpec(None, "sequence"), lambda *a: sharded.best_of_shares(*a, shares, axis)
    run = jax.jit(
        jax.shard_map(choose, mesh=mesh, in_specs=(part,) * 3 + (PartitionSpec(),), out_specs=part, check_vma=False)
    )
    dealt = tuple(a[:, places] for a in (scores, slots, segments))
    np.testing.assert_array_equal(run(*dealt, keep), expected[:, places])
    text = run.lower(*dealt, keep).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    moved = re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({kinds})(?:-start)?\(", text)
    assert all(kind == "all-gather" and dtype == "s32" for dtype, _, kind in moved), moved
    assert all(np.prod([int(n) for n in shape.split(",")]) <= size * 2 * 2 * 2 for _, shape, _ in moved), moved


def test_shares_that_lie_on_two_devices_are_refused() -> None:
    segments, slots, _, _ = drawn(0)
    keep = np.zeros((ROWS, SEGMENTS), np.int32)
    with pytest.raises(ValueError, match=r"drop\.shares is 12 but rows are dealt to 4 devices in 8 chunks; .* 8, or 1"):
        split(
            lambda a, b, c: sharded.best_of_shares(a, b, b, c, 12, AXIS), slots.astype(np.float32), segments,
            whole=(keep,),
        )  # fmt: skip
