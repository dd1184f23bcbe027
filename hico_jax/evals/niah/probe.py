"""One question about a haystack with its needle: one prefill, then the answer two ways.

Teacher-forced, as in the paper: is every token of the right answer the likeliest one after those before it?
Generated: what does the model say, and is that the answer?
A model that thinks names the card of every frame it passes, then an option: only what it says counts.

In: a trial's visual tokens and a question. Out: `Found`.
Next: hico_jax/evals/niah/grid.py
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline import chat, layout
from data_pipeline.buckets import ladder
from data_pipeline.frames import time_message
from data_pipeline.tokenizer import IMAGE_TEXT, Tokenizer
from hico_jax import generate
from hico_jax.ask import with_drop
from hico_jax.batch import DropSchedule
from hico_jax.evals.bench.matchers import LETTERS, strict_letter
from hico_jax.evals.niah import haystack
from hico_jax.evals.niah.haystack import Haystack, Trial
from hico_jax.evals.niah.needles import Asked
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from hico_jax.models.llm.cache import Cache
from hico_jax.parallel import sharding, zigzag
from hico_jax.shapes import Array, Float, Int

NO_LIMIT = 1 << 30  # the test goes beyond the length the model was trained for, as the paper does


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of one question."""

    forced: bool  # teacher-forced: every answer token was the likeliest; of a model that thinks, as `generated`
    log_prob: float  # of the whole answer
    generated: bool
    answer: str
    visual_tokens: int
    prompt_tokens: int
    seconds: float  # prefill and both scores
    followed: float | None = None  # of a thought: the share of the hints followed before the first one missed
    named: bool | None = None  # of a thought: whether it describes the last card rightly


@dataclasses.dataclass(frozen=True)
class Probe:
    """A model that answers questions about visual tokens. `prompt` is "paper" (no time message) or "chat"."""

    model: HiCo
    tokenizer: Tokenizer
    prompt: str = "paper"
    max_new_tokens: int = 8
    think: bool = False  # questions end with `questions.THINK`: the way is told before the answer
    max_thought_tokens: int = 64

    def dropped(self) -> Probe:
        """The same with every visual token dropped after the second layer, a control."""
        after = min(2, self.model.config.llm.num_layers - 1)
        return dataclasses.replace(self, model=with_drop(self.model, DropSchedule("uniform", (after,), (1.0, 0.0))))

    def ids(self, question: str, num_frames: int) -> list[int]:
        """The prompt with one placeholder for all frames; without frames it has none.

        In the paper the question follows the last frame at once. In a chat, as `hico ask` writes it, a newline and
        the sentence about the film's length stand between them.
        """
        text = f"{IMAGE_TEXT}{question}" if num_frames else question
        if num_frames and self.prompt == "chat":
            text = chat.first_question(question, time_message(float(num_frames), range(num_frames), 1.0))
        return chat.prompt_ids(self.tokenizer, [{"role": "user", "content": text}])

    def ask(self, hay: Haystack, trial: Trial, asked: Asked) -> Found:
        """Prefill, then score the right answer and let the model speak. A trial without tokens asks without a film."""
        geometry = self.model.config.geometry()
        num_clips = len(trial.index) // geometry.tokens_per_clip
        began = time.perf_counter()
        ids = self.ids(asked.question, num_clips * geometry.frames_per_clip)
        row = layout.row(
            ids, None, [layout.Visual(num_clips=num_clips)] if num_clips else [], geometry, max_length=NO_LIMIT
        )
        batch = layout.collate(
            [row], geometry, ladder(len(row), 64), num_clips, training=False, pixels=False, drop_multiple=32
        )  # fmt: skip
        batch = zigzag.deal(batch, sharding.ring())
        visual = haystack.gather(hay.tokens, trial.extra, trial.index)
        answer = self.tokenizer.encode(asked.answer)
        most = self.max_thought_tokens if self.think else max(self.max_new_tokens, len(answer))
        config = GenerationConfig(max_new_tokens=most, eos=self.tokenizer.eos_ids)
        stream, schedule = generate.spliced(self.model, batch, visual), self.model.config.drop
        logits, cache = generate.begin(
            self.model.llm, stream, batch.drop, schedule=schedule, room=config.max_new_tokens
        )  # fmt: skip
        likeliest, log_prob = forced(self.model.llm, logits, cache, np.asarray(answer, np.int32))
        made = generate.finish(self.model.llm, logits, cache, config)
        said = chat.clean_answer(self.tokenizer, made.ids[0, : made.lengths[0]])
        told = self.tokenizer.decode(np.asarray(likeliest))
        right = concluded(said) == asked.answer if self.think else _means(said, asked)
        return Found(
            forced=right if self.think else _same(told, asked.answer),
            log_prob=float(log_prob),
            generated=right,
            answer=said,
            visual_tokens=int((row.slots >= 0).sum()),
            prompt_tokens=len(row),
            seconds=time.perf_counter() - began,
            **(walked(said, asked.way) if self.think and asked.way else {}),
        )


@jax.jit
def forced(
    llm: Any, logits: Float[Array, "1 V"], cache: Cache, answer: Int[Array, " A"]
) -> tuple[Int[Array, " A"], Float[Array, ""]]:
    """The likeliest token at each place of the answer, given the right ones before it; the answer's log-probability."""

    def step(carry: tuple[Array, Cache], token: Array) -> tuple[tuple[Array, Cache], tuple[Array, Array]]:
        logits, cache = carry
        found = jnp.argmax(logits[0]).astype(jnp.int32), jax.nn.log_softmax(logits[0])[token]
        x = llm.embed(token[None, None]).astype(cache.groups[0].k.dtype)
        x, cache = llm.decode(x, cache)
        return (generate.logits_of(llm, x)[:, 0], cache), found

    _, (likeliest, log_probs) = jax.lax.scan(step, (logits, cache), answer)
    return likeliest, log_probs.sum()


def concluded(said: str) -> str:
    """The option that a thought ends with: the last letter in brackets, "" without one.

    Example:
      >>> concluded("red, blue: blue circle (C)")
      'C'
    """
    letters = re.findall(r"\(([A-H])\)", said)
    return letters[-1] if letters else ""


def walked(said: str, way: str) -> dict[str, Any]:
    """How far a thought follows the right way, and whether it ends with the right card: fields of `Found`.

    Example:
      >>> walked("red, blue, cyan: cyan star (A)", "red, blue, white: white ring")
      {'followed': 0.5, 'named': False}
    """
    steps, last = (part.strip() for part in way.split(":"))
    said_steps, _, conclusion = said.partition(":")
    right, found = ([step.strip() for step in text.split(",")] for text in (steps, said_steps))
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(right, found, strict=False)))
    named = re.sub(r"\([A-H]\)", "", conclusion).strip() == last
    return {"followed": max(0, len(same) - 1) / (len(right) - 1), "named": named}


def _same(found: str, answer: str) -> bool:
    """The paper's comparison: without brackets, whatever the case."""
    return re.sub(r"[()]", "", found).strip().lower() == answer.strip().lower()


def _means(said: str, asked: Asked) -> bool:
    """Whether what was said is the answer: the same word, or the option where the answer is a letter."""
    if asked.answer in LETTERS:
        options = re.findall(r"^(?:Options: )?\([A-Z]\) (.*)$", asked.question, re.MULTILINE)
        return strict_letter(said, options) == asked.answer
    return _same(re.sub(r"[.!]$", "", said.strip()), asked.answer)
