from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hico_jax import optim, registry
from hico_jax.models import layers
from hico_jax.optim import OptimConfig

STAGE4 = ((r"llm/.*", None), (r"vision/.*", 2e-6), (r".*", "lr"))


class Two(nnx.Module):
    """A stack of three layers and one more."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(params=0)
        self.blocks = layers.stack(lambda r: layers.Linear(3, 3, ("embed", None), rngs=r), 3, rngs)
        self.out = layers.Linear(3, 2, ("embed", None), rngs=rngs)


def test_the_first_row_that_matches_the_whole_path_wins() -> None:
    names = ["vision/blocks/w", "projector/first/w", "llm/embedding"]
    table = ((r"vision/.*", 2e-6), (r"llm", None), (r".*", "lr"))
    with pytest.raises(ValueError, match=r"row 'llm' .* matches no parameter"):
        optim.assign(names, table)
    found = optim.assign(names, (table[0], (r"llm/.*", None), table[2]))
    assert found == {"vision/blocks/w": 2e-6, "projector/first/w": "lr", "llm/embedding": None}


def test_a_parameter_without_a_row_is_named() -> None:
    with pytest.raises(ValueError, match=r"matches the parameter llm/norm\..*None freezes"):
        optim.assign(["vision/w", "llm/norm"], ((r"vision/.*", "lr"),))


@pytest.mark.parametrize("row", [("a",), ("(", 1.0), ("a", "fast"), ("a", -1.0), ("a", True), ["a", 1.0]])
def test_a_bad_row_is_refused(row: object) -> None:
    with pytest.raises(ValueError, match=r"optim\.rates"):
        OptimConfig(rates=(row,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"schedule": "step"}, {"loss_average": "mean"}, {"accumulate": 0}, {"warmup_ratio": 1.5}]
)
def test_a_number_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="optim"):
        OptimConfig(**change)  # type: ignore[arg-type]


def test_frozen_parameters_have_no_state() -> None:
    model = nnx.eval_shape(lambda: registry.model_config("tiny").build(rngs=nnx.Rngs(0)))
    whole = layers.num_params(model)
    llm = layers.num_params(model.llm)
    parts = optim.split(model, STAGE4)
    assert layers.num_params(parts.frozen) == llm
    assert layers.num_params(parts.trainable) == whole - llm
    state = jax.eval_shape(optim.optimizer(OptimConfig(rates=STAGE4), 10, parts.trainable).init, parts.trainable)
    assert layers.num_params(state) == 2 * (whole - llm) + 2  # two moments, two counters


def test_the_schedule_is_that_of_transformers() -> None:
    config = OptimConfig(warmup_ratio=0.03)
    steps, warmup = 101, 4  # ceil(0.03 * 101)
    share = optim.schedule(config, steps)

    def reference(step: int) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))

    found = [float(share(i)) for i in range(steps + 1)]
    np.testing.assert_allclose(found, [reference(i) for i in range(steps + 1)], atol=1e-6)
    assert found[0] == 0
    assert optim.num_warmup(OptimConfig(warmup_steps=7), 100) == 7


def test_constant_stays_at_its_peak_after_the_warm_up() -> None:
    share = optim.schedule(OptimConfig(schedule="constant", warmup_steps=2), 10)
    assert [float(share(i)) for i in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_three_updates_equal_adamw_in_float64() -> None:
    config = OptimConfig(
        lr=0.1, rates=((r"out/.*", 0.5), (r".*", "lr")), schedule="constant", warmup_steps=0, weight_decay=0.01
    )
    parts = optim.split(Two(), config.rates)
    tx = optim.optimizer(config, 10, parts.trainable)
    params, state = parts.trainable, tx.init(parts.trainable)
    want = {name: np.float64(v) for name, v in flat(params).items()}
    m, v = ({name: np.zeros_like(x) for name, x in want.items()} for _ in range(2))
    for step in range(1, 4):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(p * 7 + step), params)
        for name, g in flat(grads).items():
            g = np.float64(g)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            rate = 0.5 if name.startswith("out/") else 0.1
            decay = 0.01 if name.endswith("w") else 0.0  # a bias is a vector
            direction = m[name] / (1 - 0.9**step) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)
            want[name] = want[name] - rate * (direction + decay * want[name])
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, x in flat(params).items():
        np.testing.assert_allclose(x, want[name], rtol=0, atol=2e-6, err_msg=name)


def flat(state: object) -> dict[str, np.ndarray]:
    return dict(zip(optim.parameter_names(state), map(np.asarray, jax.tree.leaves(state)), strict=True))


def test_clipping_is_that_of_torch() -> None:
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped = optim.clip(grads, jnp.float32(5.0), 1.0)
    np.testing.assert_allclose(clipped["a"], 3 / (5 + 1e-6), rtol=1e-6)
    same = optim.clip(grads, jnp.float32(5.0), 6.0)
    assert same["b"] == 4
    assert optim.clip(grads, jnp.float32(5.0), 0.0) is grads


def _descend(**changed: Any) -> tuple[float, Any]:
    """The distance left after 200 steps towards a matrix, and the optimizer's state."""
    config = optim.OptimConfig(lr=3e-2, warmup_steps=0, schedule="constant", **changed)
    goal = jax.random.normal(jax.random.key(0), (130, 140))
    params = {"w": nnx.Param(jnp.zeros_like(goal), axes=("embed", "mlp"))}
    tx = optim.optimizer(config, 200, params)

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.tree.map(lambda p: p - goal, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=200))((params, tx.init(params)))
    return float(jnp.abs(params["w"][...] - goal).mean()), state


@pytest.mark.parametrize(("changed", "room"), [({}, 8.0), ({"moments": "bfloat16"}, 4.0), ({"kind": "adafactor"}, 0.2)])
def test_every_kind_descends_in_the_memory_it_promises(changed: dict[str, str], room: float) -> None:
    left, state = _descend(**changed)
    assert left < 0.05
    held = sum(a.nbytes for a in jax.tree.leaves(state))
    assert held < room * 130 * 140 * 1.01


def test_rounding_at_random_keeps_the_mean() -> None:
    x = jnp.full(100_000, 1.0 + 2**-11, jnp.float32)  # a sixteenth of the way to the next bfloat16
    rounded = optim._round_at_random([x], jnp.int32(1), 0)[0]
    assert set(np.unique(rounded.astype(jnp.float32)).tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.astype(jnp.float32).mean()) == pytest.approx(1.0 + 2**-11, abs=5e-5)


@pytest.mark.parametrize("changed", [{"kind": "sgd"}, {"moments": "int8"}])
def test_an_unknown_kind_is_refused(changed: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        optim.OptimConfig(**changed)
