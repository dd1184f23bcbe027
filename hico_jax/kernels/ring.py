"""Exact causal attention over a sequence that is split over devices: `ring`, `gather` and `usp`, forward and backward.

Runs inside `jax.shard_map`; the only thing it knows of a mesh is the name and size of one axis. Tokens are dealt to
n devices as `parallel/zigzag.py` deals them: of 2n chunks in row order, device i holds chunk i and chunk 2n-1-i, one
behind the other. Then a device's own keys are one ordinary causal square, and against the keys of any other device it
has exactly two chunk pairs to compute, both without a causal mask: (its late chunk, their early chunk), and (early,
early) or (late, late), whichever of the two devices comes first. Work is equal everywhere, every step has the same
shape, and no mask metadata exist at all.

    ring     keys and values travel n-1 steps; each step's travel overlaps the step's compute (Liu et al., 2310.01889)
    gather   keys and values are gathered, the same steps then run without travel
    usp      groups of neighbours exchange heads for sequence, the ring runs between groups (Fang and Zhao, 2405.07719)

All three are one custom gradient: partial softmaxes merge by their log-sum-exp, and the backward pass hands every step
the *global* output and log-sum-exp. Differentiating through the merge would ask each kernel for the cotangent of its
log-sum-exp, which stock kernels drop silently. The readable reference is `reference.py` on the whole row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hico_jax.kernels import blockwise
from hico_jax.shapes import Array, Float, Int

STRATEGIES = ("ring", "gather", "usp")
MOST_EXCHANGED = 4  # devices that exchange heads under `usp`
MOST_SUMS, SLICE_STEP = 1 << 30, 128  # bytes of a slice's float32 sums, about, and what its length is a multiple of
_LOW = -1e30


class Backend(NamedTuple):
    """The kernel of one step, over keys of which a query may see none.

    `forward(q, k, v, q_segments, k_segments, positions) -> (out, lse)` and `backward(q, k, v, out, lse, d_out,
    q_segments, k_segments, positions) -> (d_q, d_k, d_v)`. With positions, queries and keys are the same tokens in row
    order and attention is causal; with None all keys come before all queries, and only segments hide some.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]


def _blockwise_forward(
    q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, positions: Array | None
) -> tuple[Array, Array]:
    where = _where(q_segments, k_segments, positions)
    return blockwise.forward(q, k, v, *where, causal=positions is not None, dtype=jnp.float32)


def _blockwise_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array,
    q_segments: Array, k_segments: Array, positions: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    where = _where(q_segments, k_segments, positions)
    return blockwise.backward(q, k, v, out, lse, d_out, *where, causal=positions is not None, dtype=jnp.float32)


def _where(q_segments: Array, k_segments: Array, positions: Array | None) -> tuple[Array, Array, Array, Array]:
    if positions is None:
        return jnp.zeros_like(q_segments), jnp.zeros_like(k_segments), q_segments, k_segments
    return positions, positions, q_segments, k_segments


BLOCKWISE = Backend(_blockwise_forward, _blockwise_backward)


class _Plan(NamedTuple):
    """What is static: the axis, how many devices it has, how many of them are one station of the ring."""

    axis: str
    size: int
    exchanged: int
    gathers: bool
    backend: Backend

    @property
    def stations(self) -> int:
        return self.size // self.exchanged

    def me(self) -> Array:
        """The station of this device; 0 of one, where no axis need exist."""
        return jax.lax.axis_index(self.axis) // self.exchanged if self.size > 1 else jnp.zeros((), jnp.int32)


class _Side(NamedTuple):
    """Keys and values of one device, and their segments: what travels."""

    k: Array
    v: Array
    segments: Array


def attention(
    q: Float[Array, "B L H d"],
    k: Float[Array, "B L K d"],
    v: Float[Array, "B L K d"],
    positions: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    *,
    axis: str,
    size: int,
    strategy: str = "ring",
    backend: Backend = BLOCKWISE,
) -> Float[Array, "B L H d"]:
    """This device's part of `softmax(q k / sqrt(d)) v`; L is the local length. A padding query gives zeros.

    Of one device it is the backend's kernel, and needs no mesh.

    Raises:
      ValueError: an unknown strategy, an odd local length, or (`usp`) heads that cannot be exchanged.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"mesh.context is {strategy!r}; it must be one of {', '.join(STRATEGIES)}, or 'auto'")
    if q.shape[1] % 2:
        raise ValueError(
            f"a device holds {q.shape[1]} tokens of a row, which are not two equal chunks; make the row's length a "
            f"multiple of {2 * size} (twice mesh.sequence)"
        )
    exchanged = exchange(size, k.shape[2]) if strategy == "usp" else 1
    plan = _Plan(axis, size, exchanged, strategy == "gather", backend)
    if exchanged == 1:
        return _attention(plan, q, k, v, positions, segments)
    groups = [[g * exchanged + i for i in range(exchanged)] for g in range(plan.stations)]

    def to_heads(x: Array) -> Array:
        x = jax.lax.all_to_all(x, axis, 2, 1, axis_index_groups=groups, tiled=True)
        return _join(x, exchanged)

    def whole(x: Array) -> Array:
        return _join(jax.lax.all_gather(x, axis, axis_index_groups=groups, axis=1, tiled=True), exchanged)

    out: Any = _attention(plan, to_heads(q), to_heads(k), to_heads(v), whole(positions), whole(segments))
    return jax.lax.all_to_all(_part(out, exchanged), axis, 1, 2, axis_index_groups=groups, tiled=True)


def exchange(size: int, kv_heads: int) -> int:
    """How many neighbours exchange heads under `usp`: the most that divides the ring and the key/value heads.

    Raises:
      ValueError: only 1 would.
    """
    for count in range(min(MOST_EXCHANGED, size), 1, -1):
        if size % count == 0 and kv_heads % count == 0:
            return count
    raise ValueError(
        f"mesh.context is 'usp', but {kv_heads} key/value heads on a device and mesh.sequence={size} share no divisor "
        f"up to {MOST_EXCHANGED}; use 'ring' or 'gather'"
    )


def _join(x: Array, count: int) -> Array:
    """[early late] of `count` neighbours, one behind the other, to all early chunks and then all late ones."""
    parts = x.reshape(x.shape[0], count, 2, -1, *x.shape[2:])
    both = jnp.stack([parts[:, :, 0], parts[:, ::-1, 1]], 1)
    return both.reshape(x.shape)


def _part(x: Array, count: int) -> Array:
    """The inverse of `_join`."""
    both = x.reshape(x.shape[0], 2, count, -1, *x.shape[2:])
    return jnp.stack([both[:, 0], both[:, 1, ::-1]], 2).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, positions: Array, segments: Array) -> Array:
    return _forward(plan, q, k, v, positions, segments)[0]


def _attention_fwd(
    plan: _Plan, q: Array, k: Array, v: Array, positions: Array, segments: Array
) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _forward(plan, q, k, v, positions, segments)
    out, lse = checkpoint_name(out, blockwise.SAVED), checkpoint_name(lse, blockwise.SAVED)
    return out, (q, k, v, positions, segments, out, lse)


def _attention_bwd(plan: _Plan, saved: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    d_q, d_k, d_v = _backward(plan, saved, d_out)
    return d_q, d_k, d_v, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(
    plan: _Plan, q: Array, k: Array, v: Array, positions: Array, segments: Array
) -> tuple[Float[Array, "B L H d"], Float[Array, "B L H"]]:
    me = plan.me()
    mine = _Side(k, v, segments)
    gathers = plan.gathers and plan.stations > 1
    sides = jax.tree.map(lambda a: jax.lax.all_gather(a, plan.axis), mine) if gathers else None

    def of_slice(q: Array, q_segments: Array, own: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        def other(sums: tuple[Array, Array], side: _Side, source: Array) -> tuple[Array, Array]:
            pair = _pair(q, q_segments, side, source < me)
            return _merge(sums, *_floating(plan.backend.forward(*pair, None)), source < me)

        sums = _travel(plan, me, mine, own, other, sides)
        real = q_segments != 0
        out = jnp.where(real[..., None, None], sums[0], 0.0).astype(q.dtype)
        return out, jnp.where(real[..., None], sums[1], -_LOW)  # exp(score - this) is 0 in any kernel

    count = slices_of(q)
    if count == 1:
        return of_slice(q, segments, lambda: _floating(plan.backend.forward(q, k, v, segments, segments, positions)))
    found: list[tuple[Array, Array]] = []
    for number in range(count):
        part = [_slice(a, number, count) for a in (q, segments, positions)]
        if found:  # one slice after the other: the point is that only one exists
            part[0], _ = jax.lax.optimization_barrier((part[0], found[-1]))
        found.append(of_slice(part[0], part[1], functools.partial(_own_slice, plan, number, mine, *part)))
    out, lse = (_unslice([f[i] for f in found]) for i in range(2))
    return out, lse


def slices_of(q: Float[Array, "B L H d"]) -> int:
    """In how many slices the queries of a device run forward: the sums of one are float32, and some exist at once."""
    half = q.shape[1] // 2
    least = max(1, 4 * q.size // MOST_SUMS)
    fitting = (n for n in range(least, half // SLICE_STEP + 1) if half % (n * SLICE_STEP) == 0)
    return next(fitting, 1)


def _slice(x: Array, number: int, count: int) -> Array:
    """The same slice of both chunks."""
    parts = x.reshape(x.shape[0], 2, count, -1, *x.shape[2:])[:, :, number]
    return parts.reshape(x.shape[0], -1, *x.shape[2:])


def _unslice(parts: list[Array]) -> Array:
    """The inverse of `_slice`, of all slices."""
    halves = [x.reshape(x.shape[0], 2, -1, *x.shape[2:]) for x in parts]
    return jnp.concatenate(halves, 2).reshape(parts[0].shape[0], -1, *parts[0].shape[2:])


def _floating(found: tuple[Array, Array]) -> tuple[Array, Array]:
    return found[0].astype(jnp.float32), jnp.maximum(found[1], _LOW)


def _own_slice(
    plan: _Plan, number: int, mine: _Side, q: Array, q_segments: Array, positions: Array
) -> tuple[Array, Array]:
    """A slice's queries against the device's own keys: causal squares, and whole keys that come before."""
    size = q.shape[1] // 2

    def against(half: int, keys: int, start: int, stop: int, square: bool) -> tuple[Array, Array]:
        rows = slice(half * size, (half + 1) * size)
        first = keys * mine.k.shape[1] // 2
        k, v, segments = (a[:, first + start : first + stop] for a in mine)
        where = positions[:, rows] if square else None
        return _floating(plan.backend.forward(q[:, rows], k, v, q_segments[:, rows], segments, where))

    def of_half(half: int) -> tuple[Array, Array]:
        sums = against(half, half, number * size, (number + 1) * size, True)
        if half:
            sums = _add(sums, against(half, 0, 0, mine.k.shape[1] // 2, False))
        return _add(sums, against(half, half, 0, number * size, False)) if number else sums

    early, late = of_half(0), of_half(1)
    return jnp.concatenate([early[0], late[0]], 1), jnp.concatenate([early[1], late[1]], 1)


def _travel(
    plan: _Plan,
    me: Array,
    mine: _Side,
    own: Callable[[], Any],
    other: Callable[[Any, _Side, Array], Any],
    sides: _Side | None,
) -> Any:
    """`own()` on the device's keys, then fold `other` over the keys of every other station (`sides`, if gathered)."""
    if plan.stations == 1:
        return own()
    if sides is not None:

        def near(sums: Any, step: Array) -> tuple[Any, None]:
            source = (me - step) % plan.stations
            return other(sums, jax.tree.map(lambda a: a[source], sides), source), None

        return jax.lax.scan(near, own(), jnp.arange(1, plan.stations))[0]
    side = _next(plan, mine)  # sent before the compute that hides it
    sums = own()

    def step(carry: tuple[Any, _Side], number: Array) -> tuple[tuple[Any, _Side], None]:
        sums, side = carry
        following = _next(plan, side)
        return (other(sums, side, (me - number) % plan.stations), following), None

    if plan.stations > 2:
        (sums, side), _ = jax.lax.scan(step, (sums, side), jnp.arange(1, plan.stations - 1))
    return other(sums, side, (me - plan.stations + 1) % plan.stations)


def _next(plan: _Plan, tree: Any) -> Any:
    """Everything moves one station on."""
    moves = [(i, (i + plan.exchanged) % plan.size) for i in range(plan.size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, plan.axis, moves), tree)


class _Pair(NamedTuple):
    """Two chunk pairs of one step as two rows of a batch: (late, early), then (early, early) or (late, late)."""

    q: Array
    k: Array
    v: Array
    q_segments: Array
    k_segments: Array


def _halves(x: Array) -> tuple[Array, Array]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _queries(x: Array, before: Array) -> Array:
    early, late = _halves(x)
    return jnp.concatenate([late, jnp.where(before, early, late)])


def _keys(x: Array, before: Array) -> Array:
    early, late = _halves(x)
    return jnp.concatenate([early, jnp.where(before, early, late)])


def _pair(q: Array, segments: Array, side: _Side, before: Array) -> _Pair:
    k, v, k_segments = (_keys(a, before) for a in side)
    return _Pair(_queries(q, before), k, v, _queries(segments, before), k_segments)


def _merge(sums: tuple[Array, Array], out: Array, lse: Array, before: Array) -> tuple[Array, Array]:
    """Add the partial softmaxes of one step. The second row is of the early chunk if `before`, else of the late."""
    (early_out, late_out), (early_lse, late_lse) = _halves(sums[0]), _halves(sums[1])
    first_out, second_out = jnp.split(out, 2)
    first_lse, second_lse = jnp.split(lse, 2)
    late = _add((late_out, late_lse), (first_out, first_lse))
    into = tuple(jnp.where(before, a, b) for a, b in zip((early_out, early_lse), late, strict=True))
    both = _add((into[0], into[1]), (second_out, second_lse))
    early = (jnp.where(before, both[0], early_out), jnp.where(before, both[1], early_lse))
    late = (jnp.where(before, late[0], both[0]), jnp.where(before, late[1], both[1]))
    return jnp.concatenate([early[0], late[0]], 1), jnp.concatenate([early[1], late[1]], 1)


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    top = jnp.maximum(a[1], b[1])
    left, right = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    total = left + right
    return (a[0] * left[..., None] + b[0] * right[..., None]) / total[..., None], top + jnp.log(total)


def _backward(plan: _Plan, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
    q, k, v, positions, segments, out, lse = saved
    me = plan.me()
    d_out = jnp.where((segments != 0)[..., None, None], d_out, jnp.zeros((), d_out.dtype))
    mine = _Side(k, v, segments)

    def own() -> tuple[Array, tuple[Array, Array]]:
        d_q, *d_kv = plan.backend.backward(q, k, v, out, lse, d_out, segments, segments, positions)
        return d_q.astype(jnp.float32), _floats(d_kv)

    def other(d_q: Array, side: _Side, source: Array) -> tuple[Array, tuple[Array, Array]]:
        before = source < me
        pair = _pair(q, segments, side, before)
        rest = (_queries(a, before) for a in (out, lse, d_out))
        part, *d_kv = plan.backend.backward(*pair[:3], *rest, *pair[3:], None)
        first, second = jnp.split(part.astype(jnp.float32), 2)
        early = jnp.where(before, second, 0.0)
        d_q += jnp.concatenate([early, first + second - early], 1)
        return d_q, _floats([_to_keys(a.astype(jnp.float32), before) for a in d_kv])

    d_q, d_kv = _travel_back(plan, me, mine, own, other)
    return d_q.astype(q.dtype), d_kv[0].astype(k.dtype), d_kv[1].astype(v.dtype)


def _floats(pair: Any) -> tuple[Array, Array]:
    return pair[0].astype(jnp.float32), pair[1].astype(jnp.float32)


def _to_keys(x: Array, before: Array) -> Array:
    """Gradients of `_keys`, back in the places of the chunks."""
    first, second = jnp.split(x, 2)
    late = jnp.where(before, 0.0, second)
    return jnp.concatenate([first + second - late, late], 1)


def _travel_back(
    plan: _Plan,
    me: Array,
    mine: _Side,
    own: Callable[[], tuple[Array, tuple[Array, Array]]],
    other: Callable[[Array, _Side, Array], tuple[Array, tuple[Array, Array]]],
) -> tuple[Array, tuple[Array, Array]]:
    """Gradients of queries add up at home; those of keys travel with their keys, one step behind, and come home."""
    if plan.stations == 1:
        return own()
    if plan.gathers:
        return _gather_back(plan, me, mine, own, other)
    side = _next(plan, mine)
    d_q, d_kv = own()

    def step(carry: tuple[Array, Any, _Side], number: Array) -> tuple[tuple[Array, Any, _Side], None]:
        d_q, d_kv, side = carry
        following, d_kv = _next(plan, side), _next(plan, d_kv)  # neither waits for this step's compute
        d_q, part = other(d_q, side, (me - number) % plan.stations)
        return (d_q, jax.tree.map(jnp.add, d_kv, part), following), None

    if plan.stations > 2:
        (d_q, d_kv, side), _ = jax.lax.scan(step, (d_q, d_kv, side), jnp.arange(1, plan.stations - 1))
    d_kv = _next(plan, d_kv)
    d_q, part = other(d_q, side, (me - plan.stations + 1) % plan.stations)
    return d_q, _next(plan, jax.tree.map(jnp.add, d_kv, part))


def _gather_back(
    plan: _Plan, me: Array, mine: _Side, own: Callable[[], Any], other: Callable[..., Any]
) -> tuple[Array, tuple[Array, Array]]:
    sides = jax.tree.map(lambda a: jax.lax.all_gather(a, plan.axis), mine)
    d_q, d_kv = own()
    sums = jax.tree.map(lambda a: jnp.zeros((plan.stations, *a.shape), a.dtype).at[me].set(a), d_kv)

    def near(carry: tuple[Array, Any], step: Array) -> tuple[tuple[Array, Any], None]:
        d_q, sums = carry
        source = (me - step) % plan.stations
        d_q, part = other(d_q, jax.tree.map(lambda a: a[source], sides), source)
        return (d_q, jax.tree.map(lambda s, p: s.at[source].set(p), sums, part)), None

    (d_q, sums), _ = jax.lax.scan(near, (d_q, sums), jnp.arange(1, plan.stations))
    return d_q, jax.tree.map(lambda s: jax.lax.psum_scatter(s, plan.axis), sums)
