"""Watching in pieces, prompts with and without history, answers in company, limits."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest

from data_pipeline import chat, video
from data_pipeline.frames import Sampling, time_message
from data_pipeline.tokenizer import PLACEHOLDER
from hico_jax import ask, film, generate
from hico_jax.batch import DropSchedule
from hico_jax.film import Viewer
from hico_jax.generate import GenerationConfig

FEW = GenerationConfig(max_new_tokens=4, eos=())


def encoded(viewer: Viewer, frames: np.ndarray) -> np.ndarray:
    """The visual tokens of frames, all clips at once."""
    clips = frames.reshape(1, -1, 4, *frames.shape[1:])
    return np.asarray(film.encode(viewer.model, clips, np.zeros((1, 0, *clips.shape[3:]), np.uint8)))


def test_a_film_watched_in_pieces_is_the_film(viewer: Viewer, noise_film: Any) -> None:
    """Three clips, two at a time: the second piece is padded, and padding is cut off again."""
    seen = viewer.watch(noise_film)
    assert (seen.num_clips, seen.num_frames, seen.fps, seen.duration_s) == (3, 12, 1.0, 12.0)
    per_clip, px = viewer.geometry.tokens_per_clip, viewer.geometry.image_px
    frames = np.concatenate(list(video.iter_frames(noise_film, np.arange(12), (px, px))))
    whole = encoded(viewer, frames)
    assert seen.visual.shape[1] == 4 * per_clip  # a bucket of four clips
    np.testing.assert_allclose(seen.visual[:, : 3 * per_clip], whole, atol=1e-5)  # other batch, other order of sums
    np.testing.assert_array_equal(seen.visual[:, 3 * per_clip :], 0)
    assert np.ptp(whole, axis=1).max() > 0.1  # or all of it could be equal for no reason


def test_shuffled_frames_are_seen_in_the_order_given(viewer: Viewer, noise_film: Any) -> None:
    order = np.random.default_rng(0).permutation(12)
    px = viewer.geometry.image_px
    frames = np.concatenate(list(video.iter_frames(noise_film, np.arange(12), (px, px))))
    mixed = viewer.watch(noise_film, order=order)
    used = 3 * viewer.geometry.tokens_per_clip
    np.testing.assert_allclose(mixed.visual[:, :used], encoded(viewer, frames[order]), atol=1e-5)
    straight, same = viewer.watch(noise_film), viewer.watch(noise_film, order=np.arange(12))
    np.testing.assert_array_equal(straight.visual, same.visual)
    assert np.abs(np.asarray(mixed.visual - straight.visual)).max() > 0.1


def test_a_part_of_a_film(viewer: Viewer, noise_film: Any) -> None:
    part = viewer.watch(noise_film, start=4.0, end=8.0)
    assert part.indices.tolist() == [4, 5, 6, 7]
    assert part.num_clips == 1


def test_the_prompt_of_a_first_question(viewer: Viewer, noise_film: Any) -> None:
    seen = viewer.watch(noise_film)
    row = viewer.row(seen, "What is seen?")
    message = time_message(12.0, seen.indices, 1.0)
    turns = [{"role": "user", "content": chat.first_question("What is seen?", message)}]
    ids = chat.prompt_ids(viewer.tokenizer, turns)
    place, visual = ids.index(PLACEHOLDER), 3 * viewer.geometry.tokens_per_clip
    assert row.tokens.tolist() == [*ids[:place], *[0] * visual, *ids[place + 1 :]]
    assert row.slots[place : place + visual].tolist() == list(range(visual))
    assert "12" in message


def test_the_film_stands_in_the_first_turn_of_a_history(viewer: Viewer, noise_film: Any) -> None:
    seen = viewer.watch(noise_film)
    history = [{"role": "user", "content": "What is seen?"}, {"role": "assistant", "content": "Noise."}]
    row = viewer.row(seen, "Of which colour?", history)
    first = viewer.row(seen, "What is seen?")
    assert row.tokens[: len(first)].tolist() == first.tokens.tolist()
    said = viewer.tokenizer.decode(row.tokens[len(first) :].tolist(), skip_special=False)
    assert said == "Noise.<|im_end|>\n<|im_start|>user\nOf which colour?<|im_end|>\n<|im_start|>assistant\n"
    alone = viewer.ask(seen, "Of which colour?", config=FEW)
    after = viewer.ask(seen, "Of which colour?", history=history, config=FEW)
    assert after.prompt_tokens == len(row) > alone.prompt_tokens
    assert after.visual_tokens == alone.visual_tokens == 3 * viewer.geometry.tokens_per_clip


def test_answers_in_company_are_the_answers_alone(viewer: Viewer, noise_film: Any) -> None:
    """Two films of different length and none at all, in one batch."""
    long, short = viewer.watch(noise_film), viewer.watch(noise_film, start=4.0, end=8.0)
    films, questions = [long, short, None], ["What is seen?", "Which colour?", "Hello?"]
    together = viewer.ask_many(films, questions, config=FEW)
    for seen, question, answer in zip(films, questions, together, strict=True):
        alone = viewer.ask(seen, question, config=FEW)
        assert (alone.ids, alone.text, alone.visual_tokens) == (answer.ids, answer.text, answer.visual_tokens)
    assert together[2].visual_tokens == 0
    assert len({a.ids for a in together}) == 3


def test_the_same_film_serves_a_model_that_drops(viewer: Viewer, noise_film: Any) -> None:
    seen = viewer.watch(noise_film)
    schedule = DropSchedule("uniform0_attention", (1, 2), (1.0, 0.5, 0.25))
    dropping = Viewer(ask.with_drop(viewer.model, schedule), viewer.tokenizer, sampling=viewer.sampling)
    answer = dropping.ask(seen, "What is seen?", config=FEW)
    visual = 3 * viewer.geometry.tokens_per_clip
    assert answer.kept == (visual // 2, visual // 4)
    assert film.timings(seen, answer)["kept"] == list(answer.kept)
    keeping = viewer.ask(seen, "What is seen?", config=FEW)
    assert keeping.kept == ()
    everything = DropSchedule("uniform0_attention", (1, 2), (1.0, 1.0, 1.0))  # drops nothing, so changes nothing
    idle = Viewer(ask.with_drop(viewer.model, everything), viewer.tokenizer, sampling=viewer.sampling)
    assert idle.ask(seen, "What is seen?", config=FEW).ids == keeping.ids


def test_more_frames_than_there_is_room_for(viewer: Viewer, noise_film: Any) -> None:
    config = dataclasses.replace(viewer.model.config, max_length=2 * viewer.geometry.tokens_per_clip)
    small = Viewer(viewer.model, viewer.tokenizer, sampling=viewer.sampling)
    small.geometry = config.geometry()
    with pytest.raises(ValueError, match=r"film\.mp4: 12 frames make \d+ visual tokens .* --max-frames"):
        small.watch(noise_film)


def test_frames_that_make_no_whole_clips(viewer: Viewer, noise_film: Any) -> None:
    odd = Viewer(viewer.model, viewer.tokenizer, sampling=Sampling("middle", 1, 6))
    with pytest.raises(ValueError, match="6 frames do not make whole clips of 4"):
        odd.watch(noise_film)


def test_lengths_within_a_bucket_share_their_programs(viewer: Viewer, noise_film: Any) -> None:
    """Three clips and one take four places; questions of other lengths end in the same multiple of 64 tokens."""
    whole, part = viewer.watch(noise_film), viewer.watch(noise_film, start=4.0, end=8.0)
    assert (whole.num_clips, part.num_clips) == (3, 1)
    config = GenerationConfig(max_new_tokens=2, eos=())
    rows = [viewer.row(f, q, ()) for f, q in ((whole, "What?"), (part, "What is there to see?"))]
    lengths = [viewer.prompt([row], [f])[0].tokens.shape for row, f in zip(rows, (whole, part), strict=True)]
    assert len(rows[0]) != len(rows[1])
    assert lengths[0] == lengths[1]
    viewer.ask(whole, "What?", config=config)
    compiled = (film.encode, generate._splice, generate._prefill, generate._decode)
    before = [f._cache_size() for f in compiled]
    viewer.ask(viewer.watch(noise_film, start=4.0, end=8.0), "What is there to see?", config=config)
    assert [f._cache_size() for f in compiled] == before


def test_reading_ahead_gives_everything_and_raises_what_was_raised() -> None:
    def items() -> Any:
        yield from range(5)
        raise ValueError("the sixth")

    read = film.ahead(items(), 1)
    assert [next(read) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the sixth"):
        next(read)
    for i in film.ahead(iter(range(1000)), 1):  # left early: its thread ends
        if i == 3:
            break
    assert not [t for t in threading.enumerate() if t.name == "reading ahead"]
