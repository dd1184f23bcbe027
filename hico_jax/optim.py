"""What trains, how fast, and the update: one table of `pattern -> rate`, AdamW, and a cosine.

    optim.rates = ((r"vision/.*", 2e-6), (r".*", "lr"))     # the tower slower, the rest at optim.lr
    optim.rates = ((r"projector/.*", "lr"), (r".*", None))  # None is frozen

A parameter takes the first row whose pattern matches its whole path. Frozen weights have neither gradients
nor optimizer state: they are split off before differentiation.

In: a model and an `OptimConfig`. Out: its trainable and frozen halves, and an optax transformation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hico_jax.losses import AVERAGES
from hico_jax.shapes import Array, Float

Rate = float | str | None
Table = tuple[tuple[str, Rate], ...]
SCHEDULES = ("cosine", "constant")
KINDS = ("adamw", "adafactor")
MOMENTS = ("float32", "bfloat16")
BASES = ("full", "int8")
LLM = r"llm/blocks/(attn/w[qkvo]|mlp/(gate|up|down))"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with the reference's numbers.

    Raises:
      ValueError: a rate that is neither a number, `"lr"` nor None, a bad pattern, or a number out of range.
    """

    kind: str = "adamw"  # one of KINDS; Adafactor keeps a row and a column of second moments, and no first
    moments: str = "float32"  # one of MOMENTS, of AdamW; bfloat16 halves them and rounds at random
    lr: float = 1e-5  # peak rate of rows that say "lr"
    rates: Table = ((r".*", "lr"),)  # pattern -> rate | "lr" | None (frozen); first full match wins
    schedule: str = "cosine"  # one of SCHEDULES, after the warm-up
    warmup_ratio: float = 0.03  # of train.steps, rounded up
    warmup_steps: int | None = None  # instead of the ratio
    clip_norm: float = 1.0  # largest global gradient norm; 0 never clips
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices only: vectors (norms, biases) never decay
    accumulate: int = 1  # micro-batches per step
    loss_average: str = "tokens"  # one of losses.AVERAGES

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("moments", MOMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"optim.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if self.loss_average not in AVERAGES:
            raise ValueError(f"optim.loss_average is {self.loss_average!r}; it must be one of {', '.join(AVERAGES)}")
        if self.accumulate < 1:
            raise ValueError(f"optim.accumulate is {self.accumulate}; it must be at least 1")
        if self.lr <= 0 or self.clip_norm < 0 or self.weight_decay < 0 or not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"optim has lr={self.lr}, clip_norm={self.clip_norm}, weight_decay={self.weight_decay}, "
                f"warmup_ratio={self.warmup_ratio}; lr must be positive, the next two not negative, the ratio in [0, 1)"
            )
        for row in self.rates:
            _check_row(row)

    def resolve(self, rate: Rate) -> float | None:
        """A row's rate as a number; None is frozen."""
        return self.lr if isinstance(rate, str) else rate


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get adapters. Everything else is frozen.

    Raises:
      ValueError: a number out of range, or a base that is not known.
    """

    rank: int = 0  # 0: no adapters, the table of rates says what trains
    alpha: float = 16.0  # the adapter counts alpha / rank times
    targets: tuple[str, ...] = (LLM,)  # patterns of whole parameter paths
    base: str = "full"  # one of BASES: how the frozen weights that have adapters are held

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora has rank={self.rank}, alpha={self.alpha}, targets={self.targets}; the rank must not be "
                "negative, alpha positive, and targets name at least one pattern"
            )
        if self.base not in BASES:
            raise ValueError(f"lora.base is {self.base!r}; it must be one of {', '.join(BASES)}")


def _check_row(row: Any) -> None:
    if not isinstance(row, tuple) or len(row) != 2 or not isinstance(row[0], str):
        raise ValueError(f'optim.rates has the row {row!r}; a row is ("pattern", rate)')
    pattern, rate = row
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"optim.rates has the pattern {pattern!r}, which is no regular expression: {e}") from None
    if rate is None or rate == "lr" or (isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0):
        return
    raise ValueError(f'optim.rates gives {pattern!r} the rate {rate!r}; use a positive number, "lr", or None to freeze')


def path_name(path: Iterable[Any]) -> str:
    """A parameter's path as the table and the checkpoint write it.

    Example:
      >>> path_name(("vision", "blocks", "attn", "wq"))
      'vision/blocks/attn/wq'
    """
    return "/".join(str(part) for part in path)


def assign(names: Iterable[str], table: Table) -> dict[str, Rate]:
    """The rate of every parameter: the first row that matches its whole name.

    Raises:
      ValueError: a parameter that no row matches, or a row that matches no parameter.

    Example:
      >>> assign(["projector/first/w", "llm/embed"], (("projector/.*", 1e-3), (".*", None)))
      {'projector/first/w': 0.001, 'llm/embed': None}
    """
    names = list(names)
    found: dict[str, Rate] = {}
    for name in names:
        for pattern, rate in table:
            if re.fullmatch(pattern, name):
                found[name] = rate
                break
        else:
            raise ValueError(
                f"no row of optim.rates matches the parameter {name}. "
                f'Add a row for it, for example ("{name.split("/")[0]}/.*", "lr"); the rate None freezes.'
            )
    for pattern, _ in table:
        if not any(re.fullmatch(pattern, name) for name in names):
            tops = ", ".join(sorted({name.split("/")[0] + "/" for name in names}))
            raise ValueError(f"the row {pattern!r} of optim.rates matches no parameter; paths begin with {tops}")
    return found


class Parts(NamedTuple):
    """A model taken apart: structure, what trains, what does not."""

    graphdef: Any
    trainable: Any  # nnx.State
    frozen: Any  # nnx.State


def split(model: nnx.Module, table: Table) -> Parts:
    """Take the model apart by the table."""
    rates = assign(parameter_names(nnx.state(model)), table)
    return Parts(*nnx.split(model, lambda path, _: rates[path_name(path)] is not None, ...))


def parameter_names(state: Any) -> list[str]:
    """Slash paths of every parameter, in tree order."""
    return [path_name(_keys(path)) for path, _ in _variables(state)]


def _variables(state: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _keys(path: Any) -> list[Any]:
    return [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]


def num_warmup(config: OptimConfig, steps: int) -> int:
    """Warm-up steps of a run: given, or the ratio of all steps rounded up (`get_warmup_steps` in transformers)."""
    return math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The share of the peak rate at a step: linear from 0, then a cosine to 0 (`get_cosine_schedule_with_warmup`).

    The first step's share is 0 whenever there is a warm-up, as in the reference.
    """
    warmup = num_warmup(config, steps)

    def share(step: Any) -> Float[Array, ""]:
        now = jnp.asarray(step, jnp.float32)
        rising = now / max(1, warmup)
        if config.schedule == "constant":
            falling = jnp.ones_like(now)
        else:
            falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((now - warmup) / max(1, steps - warmup), 0, 1)))
        return jnp.where(now < warmup, rising, falling)

    return share


def optimizer(config: OptimConfig, steps: int, trainable: Any) -> optax.GradientTransformation:
    """AdamW (or Adafactor) for the trainable half, each parameter at its row's rate times the schedule.

    Clipping is `clip`, outside this chain: the norm it needs is logged as well.
    """
    rates = assign_resolved(config, parameter_names(trainable))
    if config.kind == "adafactor":  # Shazeer and Stern 2018, without the scaling by a parameter's own size
        chain = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    else:
        chain = [_scale_by_adam(config)]
    if config.weight_decay:
        matrices = _like(trainable, lambda _, v: len(v.get_metadata("axes")) > 1)
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=matrices))
    chain.append(_scale_by_rates(_like(trainable, lambda name, _: rates[name]), schedule(config, steps)))
    return optax.chain(*chain)


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    """Adam's direction. Not optax's, whose `1 - beta ** count` in float32 is off by 6e-5 of itself at the start."""

    dtype = jnp.dtype(config.moments)

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
        mu = jax.tree.map(lambda m, g: config.beta1 * m + (1 - config.beta1) * g, wide(state.mu), updates)
        nu = jax.tree.map(lambda v, g: config.beta2 * v + (1 - config.beta2) * jnp.square(g), wide(state.nu), updates)
        first, second = (-jnp.expm1(count.astype(jnp.float32) * math.log(b)) for b in (config.beta1, config.beta2))
        direction = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + config.eps), mu, nu)
        if dtype != jnp.float32:
            mu, nu = (_round_at_random(tree, count, i) for i, tree in enumerate((mu, nu)))
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _round_at_random(tree: Any, count: jax.Array, salt: int) -> Any:
    """float32 to bfloat16, up or down with the chances that keep the mean: nearest would lose every small change.

    The noise depends on the step alone, so a resumed run repeats it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    key = jax.random.fold_in(jax.random.key(salt), count)

    def one(i: int, x: jax.Array) -> jax.Array:
        noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16).astype(jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

    return jax.tree.unflatten(treedef, [one(i, x) for i, x in enumerate(leaves)])


def _scale_by_rates(rates: Any, share: optax.Schedule) -> optax.GradientTransformation:
    """Minus each parameter's rate times the schedule. Not `multi_transform`, whose state is named by the rates:
    a run resumed at another rate could not read it."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        now = share(state.count)
        scaled = jax.tree.map(lambda rate, part: jax.tree.map(lambda u: u * (-rate * now), part), rates, updates)
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def assign_resolved(config: OptimConfig, names: Iterable[str]) -> Mapping[str, float]:
    """The peak rate of each trainable parameter."""
    rates: dict[str, float] = {}
    for name in names:
        row = next(rate for pattern, rate in config.rates if re.fullmatch(pattern, name))
        number = config.resolve(row)
        assert number is not None, name
        rates[name] = number
    return rates


def _like(state: Any, f: Any) -> Any:
    """`f(name, variable)` at the place of every parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, v: f(path_name(_keys(path)), v), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def clip(grads: Any, norm: Float[Array, ""], limit: float) -> Any:
    """Scale gradients so that their norm is at most `limit` (`torch.nn.utils.clip_grad_norm_`, its 1e-6 included)."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
