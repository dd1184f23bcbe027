"""A growing film answers as the film of the same frames does; each policy forgets what it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hico_jax.api import Model
from hico_jax.generate import GenerationConfig
from hico_jax.serve.live import Live

FEW = GenerationConfig(max_new_tokens=4, eos=())
FRAMES = np.random.default_rng(7).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def test_questions_while_it_grows(make_model: Callable[..., Model]) -> None:
    model = make_model()
    talk = Live(model, max_frames=32, settings=FEW, piece=64)
    assert talk.append(FRAMES[:3]) == 0
    assert talk.append(FRAMES[3:13]) == 3
    first = talk.ask("What is seen?")
    frames = FRAMES[:12]
    seen = model.viewer.assemble("live", [frames[:8], frames[8:]], np.arange(12), 1.0, 12.0)
    assert first.ids == model.ask(seen, "What is seen?", settings=FEW).ids
    talk.append(FRAMES[13:20])
    second = talk.ask("What is seen?")
    frames = FRAMES[:20]
    seen = model.viewer.assemble("live", [frames[:8], frames[8:16], frames[16:]], np.arange(20), 1.0, 20.0)
    assert second.ids == model.ask(seen, "What is seen?", settings=FEW).ids
    assert second.reused > first.visual_tokens  # only the clips that are new ran
    assert second.visual_tokens == 5 * model.geometry.tokens_per_clip


@pytest.mark.parametrize(
    ("policy", "kept", "duration"),
    [("stop", list(range(8)), 32.0), ("oldest", list(range(8, 16)), 32.0), ("thin", list(range(0, 16, 2)), 64.0)],
)
def test_what_is_forgotten(policy: str, kept: list[int], duration: float, make_model: Callable[..., Model]) -> None:
    model = make_model()
    talk = Live(model, max_frames=32, policy=policy, settings=FEW, piece=64)
    talk.append(FRAMES)
    assert talk.clips == kept
    film = talk.film()
    assert (film.num_frames, film.duration_s) == (32, duration)
    per = model.geometry.tokens_per_clip

    for place, clip in ((0, kept[0]), (7, kept[7])):
        want = model.viewer._encode(FRAMES[4 * clip : 4 * clip + 4])
        np.testing.assert_allclose(film.visual[:, per * place : per * (place + 1)], want, atol=1e-5)


def test_policies_and_sizes_that_make_no_sense(make_model: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="policy is 'none'; it must be one of stop, oldest, thin"):
        Live(make_model(), policy="none")
    with pytest.raises(ValueError, match="give at least two clips, 8"):
        Live(make_model(), max_frames=7)
    with pytest.raises(ValueError, match="the model has room for"):
        Live(make_model(), max_frames=100_000)
