"""A whole tiny model filled with plain random numbers: no initializer is compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hico_jax import registry
from hico_jax.models.hico import HiCo


def random_model(dtype: str = "float32", *, tied: bool = True) -> HiCo:
    config = registry.model_config("tiny")
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, tied=tied))
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), state))


@pytest.fixture(scope="session")
def tiny_model() -> HiCo:
    return random_model()


@pytest.fixture(scope="session")
def tiny_untied() -> HiCo:
    return random_model("bfloat16", tied=False)
