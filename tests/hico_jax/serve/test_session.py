"""A session answers as `Model.ask` does with the same history, and runs only what is new."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from hico_jax.api import Model
from hico_jax.batch import DropSchedule
from hico_jax.generate import GenerationConfig
from hico_jax.serve.session import Session
from tests.hico_jax.serve.conftest import GUIDED

FEW = GenerationConfig(max_new_tokens=4, eos=())
QUESTIONS = ("What is seen?", "Which colour is it, and is it there at the end?")


FIRST = DropSchedule("attention", (1, 2), (1.0, 0.6, 0.3))


@pytest.mark.parametrize(
    "drop",
    [
        pytest.param(DropSchedule(), marks=pytest.mark.slow),
        GUIDED,
        pytest.param(FIRST, marks=pytest.mark.slow),
        pytest.param(DropSchedule("uniform", (1, 2), (1.0, 0.6, 0.3)), marks=pytest.mark.slow),
    ],
    ids=lambda d: d.kind,
)
def test_a_session_answers_as_ask_does(
    drop: DropSchedule, make_model: Callable[..., Model], films: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Single questions, a talk, reopened from disk in the middle of it."""
    model = make_model(drop)
    talk = Session(model, films[0], settings=FEW, piece=64)
    seen = talk.media[0]
    first = talk.ask(QUESTIONS[0])
    assert (first.ids, first.text) == ((want := model.ask(seen, QUESTIONS[0], settings=FEW)).ids, want.text)
    assert (first.prompt_tokens, first.visual_tokens, first.kept) == (want.prompt_tokens, want.visual_tokens, want.kept)
    second = talk.ask(QUESTIONS[1])
    assert second.ids == model.ask(seen, QUESTIONS[1], settings=FEW).ids != first.ids
    assert first.reused == 0 < second.visual_tokens < second.reused < second.prompt_tokens  # all of the film
    chat = model.chat(seen, settings=FEW)
    assert talk.say(QUESTIONS[0]).ids == chat.say(QUESTIONS[0]).ids
    talk.save(tmp_path / "talk")
    again = Session.open(model, tmp_path / "talk", settings=FEW)
    want = chat.say(QUESTIONS[1])
    for one in (again, talk):
        reply = one.say(QUESTIONS[1])
        assert reply.ids == want.ids
        assert reply.reused > reply.visual_tokens
    assert talk.history[-1] == {"role": "assistant", "content": want.text}


@pytest.mark.slow
def test_more_films_and_pictures_join_a_talk(make_model: Callable[..., Model], films: list[pathlib.Path]) -> None:
    model = make_model()
    talk = Session(model, films[0], settings=FEW, piece=64)
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)) for i in (0, 1)]
    one, other, still = talk.media[0], talk.look(films[1]), model.look(pictures)
    talk.say(QUESTIONS[0])
    got = talk.say(QUESTIONS[1], media=[other, still])
    history = [dict(turn) for turn in talk.history[:2]]
    history[0]["seen"] = (one,)
    turns = [*history, {"role": "user", "content": QUESTIONS[1], "seen": (other, still)}]
    chat = model._reply(turns, FEW)
    assert got.ids == chat.ids
    assert got.visual_tokens == chat.visual_tokens > 12
    assert got.reused > 0
    reply = talk.ask("Where?", attention=True)
    assert [len(a) for a in reply.attention] == [3]
    assert sum(reply.attention[0]) == pytest.approx(1, abs=1e-5)


def test_a_session_of_another_model_or_none_is_refused(
    make_model: Callable[..., Model], films: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    Session(make_model(), films[0], settings=FEW).save(tmp_path)
    with pytest.raises(ValueError, match="other weights or settings"):
        Session.open(make_model(GUIDED), tmp_path)
    with pytest.raises(ValueError, match=r"holds no session\.json"):
        Session.open(make_model(), tmp_path / "none")
    (tmp_path / "session.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="damaged session"):
        Session.open(make_model(), tmp_path)
