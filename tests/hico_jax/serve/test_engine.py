"""Thirty-two mixed requests say what `ask` says; cancelling, deadlines and a full queue end what they should."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hico_jax.api import Model
from hico_jax.batch import DropSchedule
from hico_jax.generate import GenerationConfig
from hico_jax.serve import prompts
from hico_jax.serve.engine import BusyError, Ended, Engine, Request, Spoke, Started, collect
from hico_jax.serve.pool import NoRoomError
from tests.hico_jax.serve.conftest import GUIDED

WORDS = ("What", "is", "seen", "at", "the", "end?", "Which", "colour", "Who", "there")


def request(model: Model, seen: Any, question: str, **options: Any) -> Request:
    turn = {"role": "user", "content": question, "seen": () if seen is None else (seen,)}
    settings = options.pop("settings", None) or GenerationConfig(max_new_tokens=options.pop("tokens", 4), eos=())
    row, media = model.row([turn])
    return Request(prompts.prompt(row, media, model.geometry), settings, **options)


@pytest.fixture(
    scope="module", params=[DropSchedule(), pytest.param(GUIDED, marks=pytest.mark.slow)], ids=lambda d: d.kind
)
def model(request: pytest.FixtureRequest, make_model: Callable[..., Model]) -> Model:
    return make_model(request.param)


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    return Engine(model.hico, model.tokenizer, buckets=((4, 192), (1, 320)), piece=64, queue=40)


def test_mixed_requests_say_what_ask_says(model: Model, engine: Engine, films: list[pathlib.Path]) -> None:
    """Films of three lengths and none, questions of all lengths, greedy and sampled, with and without a penalty."""
    rng = np.random.default_rng(0)
    seen = [None, *(model.watch(f) for f in films)]
    kinds = [
        GenerationConfig(max_new_tokens=4, eos=(), seed=5),
        GenerationConfig(max_new_tokens=4, eos=(), repetition_penalty=1.3, seed=5),
        GenerationConfig(max_new_tokens=4, eos=(), do_sample=True, temperature=1.5, top_k=40, top_p=0.9, seed=5),
    ]
    asked = []
    for i in range(32):
        question = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
        asked.append((seen[rng.integers(4)], question, kinds[0] if i % 4 else kinds[1 + (i // 4) % 2]))
    asked = [
        (s, q, dataclasses.replace(k, seed=5 + sum(k is b[2] for b in asked[:i]))) for i, (s, q, k) in enumerate(asked)
    ]
    got = collect(engine, [request(model, s, q, settings=k) for s, q, k in asked])
    want: list[Any] = [None] * 32
    for kind in kinds:  # row b draws from seed + b
        mine = [
            i
            for i, (_, _, k) in enumerate(asked)
            if dataclasses.replace(k, seed=0) == dataclasses.replace(kind, seed=0)
        ]
        replies = model.viewer.ask_many([asked[i][0] for i in mine], [asked[i][1] for i in mine], config=kind)
        for i, reply in zip(mine, replies, strict=True):
            want[i] = reply
    assert [g[0] for g in got] == [list(w.ids) for w in want]
    assert [g[1] for g in got] == [w.text for w in want]
    assert {g[2] for g in got} == {"length"}
    assert len({w.ids for w in want}) > 24  # or equality says little
    assert engine.counts.reused_tokens > 0
    assert engine.idle
    assert not any(lane.busy for pool in engine.pools for lane in pool.lanes)


def test_what_ends_a_request(model: Model, engine: Engine, films: list[pathlib.Path]) -> None:
    seen = model.watch(films[0])
    events: dict[str, list[Any]] = {}

    def submit(name: str, **options: Any) -> Any:
        events[name] = []
        return engine.submit(request(model, seen, name, **options), events[name].append)

    whole = model.viewer.ask(seen, "stop", config=GenerationConfig(max_new_tokens=12, eos=()))
    stop = whole.text[len(whole.text) // 2 :][:3]
    tickets = {
        "cancelled": submit("cancelled", tokens=30),
        "deadline": submit("deadline", tokens=30, deadline=time.monotonic() - 1),
        "stop": submit("stop", tokens=12, stop=(stop,), top=True, look=True),
        "length": submit("length", tokens=2),
    }
    for _ in range(6):
        engine.round()
    tickets["cancelled"].cancel()
    for _ in range(100):
        if engine.idle:
            break
        engine.round()
    for name, told in events.items():
        assert isinstance(told[-1], Ended), name
        assert told[-1].reason == name
        assert sum(isinstance(e, Ended) for e in told) == 1
    said = "".join(e.text for e in events["stop"] if isinstance(e, Spoke | Ended))
    assert said == whole.text[: whole.text.index(stop)]
    started = next(e for e in events["stop"] if isinstance(e, Started))
    assert started.look is not None
    assert len(started.look.origins) == len(started.look.weights) > 0
    first = next(e for e in events["stop"] if isinstance(e, Spoke))
    assert len(first.top) == 20
    assert max(p for _, p in first.top) == pytest.approx(first.log_prob)
    assert not events["deadline"][:-1]


def test_a_full_queue_and_too_long_a_prompt_are_refused(
    model: Model, engine: Engine, films: list[pathlib.Path]
) -> None:
    with pytest.raises(NoRoomError, match=r"may grow by 9000, but there is room for 320"):
        engine.submit(request(model, None, "hello", tokens=9000), print)
    waiting = [engine.submit(request(model, None, "hello"), lambda e: None) for _ in range(40)]
    with pytest.raises(BusyError, match="40 requests wait already"):
        engine.submit(request(model, None, "hello"), print)
    for ticket in waiting:
        ticket.cancel()
    engine.round()
    assert engine.idle


def test_the_thread_serves_and_a_fault_ends_only_what_it_hit(
    model: Model, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.start()
    try:
        assert engine.call(lambda: 7).result(10) == 7
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 // 0).result(10)
        one = request(model, None, "hello")
        want = collect(engine, [one])
        monkeypatch.setattr(type(engine.pools[0]), "first", lambda *a, **k: 1 // 0)
        assert collect(engine, [one]) == [([], "", "error")]
        monkeypatch.undo()
        assert collect(engine, [one]) == want
    finally:
        engine.close()
    with pytest.raises(BusyError, match="stopping"):
        engine.submit(one, print)


def test_a_copy_that_fails_ends_its_request_alone(
    model: Model, films: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving a lane may run on the device, too; a failure there once ended the engine's thread."""
    engine = Engine(model.hico, model.tokenizer, buckets=((4, 192), (1, 320)), piece=64).start()
    try:
        one = request(model, None, "hello")
        monkeypatch.setattr(type(engine.pools[0]), "best", lambda *a: 1 // 0)
        assert collect(engine, [one]) == [([], "", "error")]
        monkeypatch.undo()
        assert collect(engine, [one])[0][2] == "length"
        assert engine.pools[0].lanes[0].held is not None
        assert not engine.pools[0].lanes[0].held.visual.size  # a lane keeps no film alive

        engine.make[:1] = [lambda *a: 1 // 0]  # type: ignore[list-item]  # nor can the lanes be made anew: nobody may wait for ever
        monkeypatch.setattr(type(engine.pools[0]), "first", lambda *a, **k: 1 // 0)
        assert collect(engine, [one]) == [([], "", "error")]
        assert engine.thread is not None
        engine.thread.join(20)
        with pytest.raises(BusyError, match="stopping"):
            engine.submit(one, print)
    finally:
        engine.close()


@pytest.mark.slow
def test_a_step_of_all_lanes_leaves_a_prompt_alone_that_is_still_run(
    make_model: Callable[..., Model], films: list[pathlib.Path]
) -> None:
    """Behind an attention-guided choice a prompt of several pieces runs where a shorter one stood before."""
    model = make_model(GUIDED)
    engine = Engine(model.hico, model.tokenizer, buckets=((4, 192),), piece=32)
    film = model.watch(films[2])
    short, long = request(model, None, "What is it?"), request(model, film, "Who is seen at the " * 6 + "end?")

    def said(engine: Engine) -> list[float]:
        """How likely each token was: the tokens themselves may survive a key or two that are wrong."""
        heard: list[Any] = []
        ticket = engine.submit(long, heard.append)
        while not ticket.ended.is_set():
            engine.round()
        return [event.log_prob for event in heard if isinstance(event, Spoke)]

    want = said(Engine(model.hico, model.tokenizer, buckets=((4, 192),), piece=32))
    collect(engine, [short] * 4)
    talking = [engine.submit(request(model, None, f"hello {i}", tokens=60), lambda event: None) for i in range(3)]
    while len(engine.speaking) < 3:
        engine.round()
    assert said(engine) == pytest.approx(want, abs=1e-5)
    assert not any(ticket.ended.is_set() for ticket in talking)
