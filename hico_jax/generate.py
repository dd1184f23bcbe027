"""Answer a batch of prompts: prefill once, then decode on the device until every row has ended.

In: a model and a `Batch` whose rows end where the answer begins. Out: token ids on the host. One compilation per
combination of shapes, sampling options and number of new tokens; asking again with the same ones compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.batch import Batch, DropPlan, DropSchedule
from hico_jax.models.compress import progressive
from hico_jax.models.hico import HiCo
from hico_jax.models.llm.cache import Cache, take_last
from hico_jax.models.llm.decoder import Stream
from hico_jax.models.llm.reuse import Memory
from hico_jax.parallel import sharding, zigzag
from hico_jax.shapes import Array, Bool, Float, Int, ndarray

NO_DROP = DropSchedule()


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to choose the next token, and when to stop.

    The released models ship sampling with temperature 0.7, top_k 20, top_p 0.8; their evaluation scripts switch
    sampling off but keep the repetition penalty of `generation_config.json`, so greedy answers have it too.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False  # False: the likeliest token, and the next three fields do nothing
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # 1: all
    repetition_penalty: float = 1.0  # of tokens already generated; 1: none
    eos: tuple[int, ...] = (151645, 151643)
    seed: int = 0  # row b draws from seed + b

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": (self.max_new_tokens < 1, "at least 1"),
            "temperature": (self.do_sample and self.temperature <= 0, "positive; do_sample=False is greedy"),
            "top_k": (self.top_k < 0, "0 (all) or more"),
            "top_p": (not 0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty <= 0, "positive"),
        }
        for name, (bad, rule) in wrong.items():
            if bad:
                raise ValueError(f"generation.{name} is {getattr(self, name)}; it must be {rule}")


class Generated(NamedTuple):
    """What came out, on the host."""

    ids: Int[ndarray, "B T"]  # 0 after a row's end
    lengths: Int[ndarray, " B"]  # tokens of each row, its end token included


def generate(
    model: HiCo, prompt: Batch | tuple[Batch, Float[Array, "B S D"]], config: GenerationConfig, *, piece: int = 0
) -> Generated:
    """Continue every row of `prompt`, which runs `piece` tokens at a time (0: all at once).

    Visual tokens given beside the batch (`HiCo.encode` of the same clips, which may be left empty) are not encoded
    again, so one video serves many questions.
    """
    batch, visual = prompt if isinstance(prompt, tuple) else (prompt, None)
    batch = zigzag.deal(batch, sharding.ring())
    if visual is None:
        visual = _encode(model, batch.clips, batch.images)
    stream = spliced(model, batch, visual)
    return continue_stream(model.llm, stream, batch.drop, config, schedule=model.config.drop, piece=piece)


def spliced(model: HiCo, batch: Batch, visual: Float[Array, "B S D"]) -> Stream:
    """A prompt's stream from visual tokens that are encoded already."""
    stream = _splice(model, dataclasses.replace(batch, clips=None, images=None), visual)
    return stream.replace(plain=stream.ring == 1 and _is_plain(batch))


def _is_plain(batch: Batch) -> bool:
    """Whether the host can see that every row is one segment of rising positions, then padding."""
    segments, positions = batch.segments, batch.positions
    if not isinstance(segments, np.ndarray) or not isinstance(positions, np.ndarray):
        return False
    real = segments == 1
    ends = (real | (segments == 0)).all() and (real[:, 1:] <= real[:, :-1]).all()
    return bool(ends and ((np.diff(positions, axis=1) > 0) | ~real[:, 1:]).all())


def continue_stream(
    llm: Any, stream: Stream, plan: DropPlan | None, config: GenerationConfig, *,
    schedule: DropSchedule = NO_DROP, piece: int = 0,
) -> Generated:  # fmt: skip
    """Continue every row of a stream of embeddings with a language model alone."""
    logits, cache = begin(llm, stream, plan, schedule=schedule, room=config.max_new_tokens, piece=piece)
    return finish(llm, logits, cache, config)


def begin(
    llm: Any, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP, room: int,
    piece: int = 0,
) -> tuple[Float[Array, "B V"], Cache]:  # fmt: skip
    """`prefill`, compiled once for each shape: the first half of an answer."""
    return _prefill(llm, stream, plan, schedule=schedule, room=room, piece=piece)


def remember(llm: Any, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP, room: int) -> Memory:
    """The beginning of a prompt, up to its last visual token, run once for many questions."""
    return _remember(llm, stream, plan, schedule=schedule, room=room)


def resume(
    llm: Any, memory: Memory, question: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP
) -> tuple[Float[Array, "B V"], Cache]:
    """`begin` for a question behind what is remembered; `plan` is that of the whole prompt."""
    return _resume(llm, memory, question, plan, schedule=schedule)


def finish(llm: Any, logits: Float[Array, "B V"], cache: Cache, config: GenerationConfig) -> Generated:
    """The second half: decode from what `begin` gave. The cache is used up."""
    seeds = ((config.seed + np.arange(logits.shape[0])) % 2**31).astype(np.int32)
    static = dataclasses.replace(config, seed=0)  # a new seed is no reason to compile
    ids, lengths, _ = _decode(llm, logits, cache, seeds, config=static)
    return Generated(np.asarray(ids), np.asarray(lengths))


def prefill(
    llm: Any, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule = NO_DROP, room: int,
    piece: int = 0,
) -> tuple[Float[Array, "B V"], Cache]:  # fmt: skip
    """Run the prompt: float32 logits after each row's last token, and the cache with `room` free places.

    With `piece`, so many tokens run at a time: the same result, and activations no longer grow with the prompt.
    """
    stream, cache = llm(stream, plan, schedule=schedule, cache_room=room, piece=piece)
    return logits_of(llm, take_last(stream.x, stream.segments))[:, 0], cache


def logits_of(llm: Any, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Float32 logits of hidden states. Hand in few positions: the vocabulary is wide."""
    return llm.logits(x)


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Array, config: GenerationConfig
) -> Int[Array, " B"]:
    """The next token of each row: penalty, then temperature, top-k, top-p, then a draw (the order of transformers)."""
    if config.repetition_penalty != 1.0:
        penalized = jnp.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = jnp.where(seen, penalized, logits)
    if not config.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, order = jax.lax.top_k(logits / config.temperature, min(config.top_k or logits.shape[-1], logits.shape[-1]))
    weights = jax.nn.softmax(logits, axis=-1)
    before = jnp.cumsum(weights, axis=-1) - weights  # of all likelier tokens; 0 for the first, which always stays
    logits = jnp.where(before < config.top_p, logits, -jnp.inf) if config.top_p < 1 else logits
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _decode_loop(
    llm: Any, logits: Float[Array, "B V"], cache: Cache, seeds: Int[Array, " B"], config: GenerationConfig
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Cache]:
    """Choose, embed, run one token, until every row has ended or the room is used up."""
    rows = logits.shape[0]
    dtype = cache.groups[0].k.dtype
    keys = jax.vmap(jax.random.key)(seeds)
    eos = jnp.asarray(config.eos, jnp.int32)

    def emit(step: Array, logits: Array, state: tuple) -> tuple:
        token, done, ids, lengths, seen = state
        chosen = choose(logits, seen, jax.vmap(jax.random.fold_in, (0, None))(keys, step), config)
        token = jnp.where(done, 0, chosen)  # an ended row runs on, unheard
        lengths = lengths + (~done).astype(jnp.int32)
        done = done | (token[:, None] == eos[None]).any(-1)
        ids = jax.lax.dynamic_update_slice(ids, token[:, None], (jnp.zeros((), jnp.int32), step))
        return token, done, ids, lengths, seen.at[jnp.arange(rows), token].set(True)

    def more(carry: tuple) -> Array:
        step, (_, done, *_), _ = carry
        return (step < config.max_new_tokens) & ~done.all()

    def body(carry: tuple) -> tuple:
        step, state, cache = carry
        x, cache = llm.decode(llm.embed(state[0][:, None]).astype(dtype), cache)
        return step + 1, emit(step, logits_of(llm, x)[:, 0], state), cache

    state = (
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        jnp.zeros((rows, config.max_new_tokens), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(logits.shape, bool),
    )
    zero = jnp.zeros((), jnp.int32)
    step, state, cache = jax.lax.while_loop(more, body, (zero + 1, emit(zero, logits, state), cache))
    del step
    return state[2], state[3], cache


class Score(NamedTuple):
    """How likely a given continuation is, token by token."""

    log_probs: Float[Array, "B A"]
    correct: Bool[Array, "B A"]  # it is the likeliest token
    valid: Bool[Array, "B A"]  # False where the row has fewer answer tokens


def score(llm: Any, stream: Stream, num_targets: int) -> Score:
    """Teacher-forced score of the targets that carry weight, at most `num_targets` a row.

    `stream` is what a model returned for a batch that holds prompt and answer. Only the positions that predict the
    answer meet the unembedding.

    Raises:
      ValueError: rows are split over devices.
    """
    if stream.ring > 1:
        raise ValueError("scores of given answers need whole rows; set mesh.sequence to 1")
    index, valid = progressive.compact(stream.weights > 0, num_targets)
    x, targets = (progressive.take(a, index, valid) for a in (stream.x, stream.targets))
    logits = logits_of(llm, x)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return Score(jnp.where(valid, log_probs, 0.0), correct & valid, valid)


@jax.jit
def _encode(model: HiCo, clips: Array, images: Array) -> Array:
    return model.encode(clips, images)


@jax.jit
def _splice(model: HiCo, batch: Batch, visual: Array) -> Stream:
    stream = model.splice(batch, visual)
    return stream.replace(targets=None, weights=None)


_prefill = jax.jit(prefill, static_argnames=("schedule", "room", "piece"))


@functools.partial(jax.jit, static_argnames=("schedule", "room"))
def _remember(llm: Any, stream: Stream, plan: DropPlan | None, *, schedule: DropSchedule, room: int) -> Memory:
    return llm.remember(stream, plan, schedule=schedule, room=room)


@functools.partial(jax.jit, static_argnames="schedule")
def _resume(
    llm: Any, memory: Memory, question: Stream, plan: DropPlan | None, *, schedule: DropSchedule
) -> tuple[Array, Cache]:
    stream, cache = llm.resume(memory, question, plan, schedule=schedule)
    return logits_of(llm, take_last(stream.x, stream.segments))[:, 0], cache


# The cache goes in and comes out so that the loop may write into it where it lies.
_decode = jax.jit(_decode_loop, static_argnames="config", donate_argnames="cache")
