"""Nothing is left to compile for requests of any length behind the warming; a thread does it beside the answers."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hico_jax.api import Model
from hico_jax.batch import DropSchedule
from hico_jax.generate import GenerationConfig
from hico_jax.serve.engine import Engine, Request, collect
from hico_jax.serve.pool import Pool
from hico_jax.serve.warming import Programs, Warming
from tests.hico_jax.serve.conftest import GUIDED
from tests.hico_jax.serve.test_engine import request as asked

NAMES = ("run", "step", "first", "select", "scatter", "cut", "logits", "copy")


class Compiled(logging.Handler):
    """Programs of ours that JAX says it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split()
        if words[:1] == ["Compiling"] and words[1].removeprefix("jit(").rstrip(")") in NAMES:
            self.found.append(words[1])


@pytest.fixture
def compiled() -> Any:
    ears, logger = Compiled(), logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(ears)
    with jax.log_compiles():
        yield ears.found
    logger.removeHandler(ears)


@pytest.mark.parametrize(
    "drop", [DropSchedule(), pytest.param(GUIDED, marks=pytest.mark.slow)], ids=lambda drop: drop.kind
)
def test_nothing_compiles_behind_it(
    drop: DropSchedule, make_model: Callable[..., Model], films: list[pathlib.Path], compiled: list[str]
) -> None:
    """Short and long prompts, one and several at once, a lane copied, attention asked for, greedy and sampled."""
    model = make_model(drop)
    engine = Engine(model.hico, model.tokenizer, buckets=((2, 128),), piece=64)
    warming = Warming(engine, model)
    assert warming.left > 0
    warming.begin()
    warming.finish()
    assert warming.left == 0
    assert compiled  # or this says nothing
    film = model.watch(films[2])
    del compiled[:]
    draw = GenerationConfig(max_new_tokens=3, eos=(), do_sample=True)
    wanted: list[Request] = [
        asked(model, None, "What"), asked(model, film, "is", tokens=20), asked(model, film, "is seen at the end?"),
        asked(model, film, "Who", settings=draw, look=True), asked(model, None, "at " * 60),
    ]  # fmt: skip
    assert {reason for *_, reason in collect(engine, wanted)} == {"length"}
    assert engine.counts.reused_tokens > 0
    assert compiled == []


def test_pieces_have_the_models_own_type(make_model: Callable[..., Model]) -> None:
    """In bfloat16 pieces are bfloat16, too: compiled for float32 they would all be compiled again."""
    model = make_model()
    config = dataclasses.replace(model.hico.config, dtype="bfloat16")
    bare: Any = type("Bare", (), {"config": config, "llm": model.hico.llm})()
    pool = Pool(bare, count=1, capacity=128, piece=64)
    assert pool.dtype == jnp.bfloat16
    assert Programs(pool).rows(64).dtype == jnp.bfloat16


def test_a_thread_warms_and_stops(make_model: Callable[..., Model], caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    engine = Engine(model.hico, model.tokenizer, buckets=((1, 128),), piece=64)
    warming, done = Warming(engine, model), []
    warming.rest, warming.left = [lambda: done.append(1), lambda: 1 // 0, lambda: done.append(2)], 3
    with caplog.at_level(logging.ERROR):
        warming.go_on()
        assert warming.thread is not None
        warming.thread.join(20)
    assert (done, warming.left) == ([1], 2)
    assert "compiling ahead failed" in caplog.text  # and nobody's request with it
    warming.close()
    warming.go_on()
    warming.close()
    assert done == [1]
