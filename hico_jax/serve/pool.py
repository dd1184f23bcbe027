"""Lanes of one size: prompts run in pieces, and continue from what a lane holds already.

A lane remembers the row that ran in it last. A new prompt that begins alike (same text, same film, same owner) runs
only from where it differs, so a second question about a film costs its own tokens. What may be kept of a model that
drops visual tokens is what no question changes: the layers before the first attention-guided stage, and what enters it.

In: `Prompt`s and settings. Out: tokens. The engine and the session decide whose turn it is.
Next: hico_jax/serve/engine.py
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from hico_jax.models.llm import lanes as device
from hico_jax.serve import programs, sampling
from hico_jax.serve.prompts import Prompt, common
from hico_jax.shapes import Array, Float, Int, ndarray

PIECE = 256  # tokens of a prompt that run at a time
SMALL, SMALL_CPU = 64, 32  # of a short rest; a CPU's time grows with the tokens from the first one on
COPY_CPU = 32  # a lane is worth copying for this part of its tokens; on a GPU for a piece of them
NOWHERE = 2**30  # beyond every buffer


class NoRoomError(ValueError):
    """A prompt and its answer do not fit a lane."""


@dataclasses.dataclass
class Lane:
    """What the host knows of a lane."""

    index: int
    lengths: Int[ndarray, " G"]  # filled places of each group
    held: Prompt | None = None  # whose beginning may be continued
    entering: Any = None  # Float[S D]: what enters the first attention-guided stage
    busy: bool = False
    used: int = 0  # when; the one unused longest is given away first


@dataclasses.dataclass(frozen=True)
class Look:
    """Attention of a prompt's last token to its visual tokens, in the layer that would choose among them."""

    origins: Int[ndarray, " M"]  # places of the row
    weights: Float[ndarray, " M"]


@dataclasses.dataclass(frozen=True)
class Ready:
    """A prompt has run: the logits behind it."""

    logits: Float[Array, "1 V"]
    reused: int  # tokens that did not have to run
    look: Look | None = None


class Pool:
    """`count` lanes that hold rows of up to `capacity` tokens, answer included.

    Layers behind a drop hold fewer visual tokens, so their part of a lane is shorter by the schedule's ratio, but never
    shorter than `text_room`.
    """

    def __init__(self, model: HiCo, *, count: int, capacity: int, piece: int = PIECE, text_room: int = 2048) -> None:
        self.model, self.capacity, self.text_room = model, capacity, min(text_room, capacity)
        self.piece = min(piece, capacity)
        self.small = min(SMALL_CPU if jax.default_backend() == "cpu" else SMALL, self.piece)
        self.sizes = sorted({self.small, self.piece})
        self.worth = self.piece  # tokens that must not run again for a lane to be copied
        if jax.default_backend() == "cpu":
            self.sizes = sorted({self.small, max(self.small, self.piece // 2), self.piece})
            self.worth = min(self.piece, max(2 * self.small, capacity // COPY_CPU))
        self.schedule = model.config.drop
        self.guided = self.schedule.num_stages - self.schedule.num_uniform  # attention-guided stages
        self.edges = device.bounds(self.schedule, model.config.llm.num_layers)
        ratios = self.schedule.ratios if self.schedule.num_stages else (1.0,)
        self.places = [min(capacity, int(np.ceil(capacity * r)) + self.text_room) for r in ratios]
        self.places[0] = capacity
        self.dtype = jnp.dtype(model.config.dtype)
        sizes = [size + self.piece for size in self.places]  # a piece's padding is written, too
        self.state = device.Lanes.empty(model.config.llm, self.schedule, count, sizes, self.dtype)
        self.seen = jnp.zeros((count, model.config.llm.vocab_size), bool)
        self.lanes = [Lane(i, np.zeros(len(sizes), np.int32)) for i in range(count)]
        self.clock = itertools.count(1)

    @property
    def num_bytes(self) -> int:
        """What the lanes take on the device."""
        return sum(a.nbytes for a in jax.tree.leaves(self.state))

    def check(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Whether a prompt and its answer fit.

        Raises:
          NoRoomError: they do not.
        """
        text = len(prompt) - prompt.num_visual
        counts = [len(prompt), *(text + kept for kept in prompt.kept)]
        for count, places in zip(counts, self.places, strict=True):
            if count + max_new_tokens > places:
                raise NoRoomError(
                    f"the conversation has {len(prompt)} tokens ({prompt.num_visual} visual) and may grow by "
                    f"{max_new_tokens}, but there is room for {places} in every layer; ask for fewer frames or tokens"
                )

    def free(self) -> list[Lane]:
        """Lanes that nobody uses, the one unused longest first."""
        return sorted((lane for lane in self.lanes if not lane.busy), key=lambda lane: lane.used)

    def best(self, prompt: Prompt) -> tuple[Lane | None, int]:
        """The free lane to take, and how many tokens of the prompt it holds.

        A lane that the prompt continues is taken as it is. Otherwise one goes whose row is short or also stands in
        another lane, else the one unused longest; where another lane holds much of the prompt, it is copied there.
        """
        free = self.free()
        if not free:
            return None, 0
        match = {lane.index: self.common(lane, prompt) for lane in self.lanes}
        source = max(self.lanes, key=lambda one: match[one.index])
        near = max(free, key=lambda one: (match[one.index], -one.used))
        lost = len(near.held.names) - match[near.index] if near.held is not None else 0
        if lost < self.worth and match[source.index] < match[near.index] + self.worth:
            return near, match[near.index]
        lane = min(free, key=lambda one: (self._only_here(one) >= self.worth, one.used))
        if match[source.index] < match[lane.index] + self.worth:
            return lane, match[lane.index]
        self.state = programs.copy(self.state, np.int32(source.index), np.int32(lane.index))
        lane.held, lane.lengths = source.held, source.lengths.copy()
        lane.entering = None if source.entering is None else jnp.copy(source.entering)  # each is written in place
        return lane, match[source.index]

    def _only_here(self, lane: Lane) -> int:
        """Tokens at the end of a lane's row that no other lane holds: what is lost when it is given away."""
        held = lane.held
        if held is None:
            return 0
        others = [one.held for one in self.lanes if one is not lane and one.held is not None]
        return len(held.names) - max((held.same(other) for other in others), default=0)

    def common(self, lane: Lane, prompt: Prompt) -> int:
        """How many of a prompt's first tokens need not run in a lane."""
        held = lane.held
        if held is None:
            return 0
        same = min(held.same(prompt), len(prompt) - 1)
        for stage in range(1, self.schedule.num_uniform + 1):
            ours, theirs = prompt.rows(stage), held.rows(stage)
            count = common(prompt.names[ours], held.names[theirs])
            if count < len(ours):
                same = min(same, int(ours[count]))
        return same

    def fill(self, lane: Lane, prompt: Prompt, *, look: bool = False) -> Iterator[int | Ready]:
        """Run a prompt in a lane: says how many tokens the next step will run; the last step brings what is behind it.

        Closed before its end it leaves what has run to whoever comes next, where the model drops nothing.
        """
        try:
            yield from self._fill(lane, prompt, look)
        finally:
            if lane.held is None and not self.schedule.num_stages:
                lane.held = _row_of(prompt, prompt.names[: lane.lengths[0]])

    def _fill(self, lane: Lane, prompt: Prompt, look: bool) -> Iterator[int | Ready]:
        same = self.common(lane, prompt)
        lane.busy, lane.held, lane.used = True, None, next(self.clock)
        if not self.schedule.num_stages:
            lane.lengths[0] = same
        x, trail, count = None, None, 0
        shallow = self.schedule.num_uniform + 1 if self.guided else len(self.edges) - 1
        buffers: list[Any] = [None] * len(self.places)
        if self.guided and lane.entering is None:
            lane.entering = self._buffer(shallow - 1)
        for group in range(shallow):
            rows = prompt.rows(group)
            done = int(np.searchsorted(rows, same))
            following = prompt.rows(group + 1) if group + 1 < shallow else rows if self.guided else None
            for at, count, size in self._sizes(done, len(rows)):
                yield size
                origins = rows[at : at + count]
                if group == 0:
                    x = self._embedded(prompt, origins, size)
                else:
                    x = programs.cut(buffers[group], np.int32(at), size=size)
                x, trail = self._piece(lane, group, at, count, len(rows), x)
                lane.lengths[group] = at + count
                if following is not None:
                    target = self._targets(origins, following, size)
                    if group + 1 == shallow:
                        lane.entering = programs.scatter(lane.entering, x, target)
                    else:
                        buffers[group + 1] = (
                            self._buffer(group + 1) if buffers[group + 1] is None else buffers[group + 1]
                        )
                        buffers[group + 1] = programs.scatter(buffers[group + 1], x, target)
            lane.lengths[group] = len(rows)
        entering, origins, seen = lane.entering, prompt.rows(self.schedule.num_uniform) if self.guided else None, None
        for stage in range(self.schedule.num_uniform, self.schedule.num_stages):
            assert origins is not None
            visual = np.zeros(entering.shape[0], np.int32)
            visual[: len(origins)] = prompt.slots[origins] >= 0
            entering, where, scores = programs.select(
                self.model.llm, entering, visual, np.int32(len(origins)), np.int32(prompt.kept[stage]),
                layer=self.schedule.layers[stage], kept=self.places[stage + 1] + self.piece,
            )  # fmt: skip
            if look and seen is None:
                seen = (origins, scores)
            group, number = stage + 1, len(prompt) - prompt.num_visual + prompt.kept[stage]
            after = self._buffer(group) if stage + 1 < self.schedule.num_stages else None  # what enters the next choice
            lane.lengths[group] = 0  # a step of all lanes writes behind this, so never among the pieces that have run
            for at, count, size in self._sizes(0, number):
                yield size
                x = programs.cut(entering, np.int32(at), size=size)
                x, trail = self._piece(lane, group, at, count, number, x)
                lane.lengths[group] = at + count
                if after is not None:
                    place = np.arange(size, dtype=np.int32)
                    after = programs.scatter(after, x, np.where(place < count, at + place, np.int32(NOWHERE)))
            if after is not None:
                entering, origins = after, origins[np.asarray(where)[:number]]
        assert x is not None
        lane.held = _row_of(prompt, prompt.names)
        logits = programs.logits(self.model.llm, x, np.int32(count - 1))
        yield Ready(logits, same, self._look(lane, prompt, trail, seen, look))

    def _sizes(self, done: int, total: int) -> Iterator[tuple[int, int, int]]:
        """Where each piece begins, its real tokens, and with padding: a question behind a film is one or two small."""
        while done < total:
            rest = total - done
            if rest <= 2 * self.small:
                size = self.small
            else:
                size = next((s for s in self.sizes[1:] if rest <= s + self.small), self.piece)
            count = min(size, total - done)
            yield done, count, size
            done += count

    def _embedded(self, prompt: Prompt, origins: ndarray, size: int) -> Float[Array, "Q D"]:
        pad = (0, size - len(origins))
        slots = np.pad(prompt.slots[origins], pad, constant_values=-1)
        visual = prompt.visual
        if not visual.shape[1]:
            visual = jnp.zeros((1, 1, self.model.config.llm.embed_dim), self.dtype)
        return programs.embed(self.model.llm, np.pad(prompt.tokens[origins], pad), slots, visual)

    def _piece(self, lane: Lane, group: int, at: int, count: int, total: int, x: Any) -> tuple[Any, Any]:
        seen = self.sight(group, at + x.shape[0])
        where = np.array([lane.index, at, count, total - 1], np.int32)
        x, self.state, trail = programs.run(
            self.model.llm, self.state, x, where, group=group, first=self.edges[group], seen=seen
        )  # fmt: skip
        return x, trail

    def sight(self, group: int, end: int) -> int:
        """How far a piece that ends before place `end` looks, in a few sizes; all where kernels skip what is empty."""
        whole = self.places[group] + self.piece
        if jax.default_backend() != "cpu":  # `attend_piece` visits what is there: one program is enough
            return whole
        return min(whole, self.piece << (-(-end // self.piece) - 1).bit_length())

    def _buffer(self, group: int) -> Float[Array, "S D"]:
        return jnp.zeros((self.places[group] + self.piece, self.model.config.llm.embed_dim), self.dtype)

    def _targets(self, origins: ndarray, following: ndarray, size: int) -> Int[ndarray, " Q"]:
        """Where the survivors of a piece stand in the next group; beyond the end for the others."""
        place = np.searchsorted(following, origins)
        alive = following[np.minimum(place, len(following) - 1)] == origins
        out = np.full(size, NOWHERE, np.int32)
        out[: len(origins)] = np.where(alive, place, NOWHERE)
        return out

    def _look(self, lane: Lane, prompt: Prompt, trail: Any, seen: Any, wanted: bool) -> Look | None:
        """What the last token attends to: in the layer that chose, or in the middle one of a model that does not."""
        if not wanted or not prompt.num_visual:
            return None
        if seen is None:
            group, layer = self.looking
            rows = prompt.rows(group)
            weights = programs.attended(
                self.model.llm, self.state, trail[layer], np.int32(lane.index), np.int32(len(rows)),
                group=group, first=self.edges[group], layer=layer,
            )  # fmt: skip
        else:
            rows, weights = seen
        weights = np.asarray(weights, np.float32)[: len(rows)]
        visual = prompt.slots[rows] >= 0
        return Look(rows[visual], weights[visual])

    @property
    def looking(self) -> tuple[int, int]:
        """The group and the layer of it whose attention is told where no stage chooses by it: the middle one's."""
        group = len(self.edges) - 2
        return group, max(0, self.model.config.llm.num_layers // 2 - self.edges[group])

    def first(self, lane: Lane, ready: Ready, config: GenerationConfig, *, top: bool = False) -> sampling.Said:
        """The first token of an answer."""
        knobs = sampling.knobs([config], [0])
        said, self.seen = programs.first(
            ready.logits, self.seen, np.int32(lane.index), knobs, sampled=config.do_sample, top=top
        )
        return jax.tree.map(np.asarray, said)

    def step(
        self, rows: Sequence[Lane], tokens: Sequence[int], configs: Sequence[GenerationConfig], steps: Sequence[int],
        *, top: bool = False,
    ) -> sampling.Said:  # fmt: skip
        """One more token of each of these lanes, given the one each said last."""
        number = min(len(self.lanes), 1 << (len(rows) - 1).bit_length())
        everyone = number == len(self.lanes)
        order = list(range(number)) if everyone else [lane.index for lane in rows]
        order += order[:1] * (number - len(order))  # a lane twice does the same twice
        place = {lane.index: i for i, lane in enumerate(rows)}
        pick = lambda values, other: [values[place[i]] if i in place else other for i in order]
        knobs = sampling.knobs(pick(configs, configs[0]), pick(steps, 0))
        lengths = np.stack([self.lanes[i].lengths for i in order], 1).astype(np.int32)
        said, self.state, self.seen = programs.step(
            self.model.llm, self.state, self.seen, np.array(pick(tokens, 0), np.int32), np.array(order, np.int32),
            lengths, knobs, seen_to=self.reach(max(int(lane.lengths[0]) for lane in rows)), everyone=everyone,
            sampled=any(c.do_sample for c in configs), top=top,
        )  # fmt: skip
        for lane, token in zip(rows, tokens, strict=True):
            lane.lengths += 1
            if not self.schedule.num_stages and lane.held is not None:
                lane.held = _grown(lane.held, token)
        found = [order.index(lane.index) for lane in rows]
        return jax.tree.map(lambda a: np.asarray(a)[found], said)

    def reach(self, length: int) -> int | None:
        """How far a step reads lanes of this length, in a few sizes; all of a lane where kernels skip what is empty."""
        if jax.default_backend() != "cpu":
            return None
        size = 2 * self.piece
        while size <= length:
            size *= 4
        return size if size < self.capacity else None

    def leave(self, lane: Lane) -> None:
        """Somebody is done with a lane; what it holds stays until another prompt takes it."""
        lane.busy, lane.used = False, next(self.clock)


def _row_of(prompt: Prompt, names: ndarray) -> Prompt:
    """What a lane remembers of a prompt: not its visual tokens, which would outlive the film they belong to."""
    return dataclasses.replace(prompt, names=names, visual=jnp.zeros((1, 0, 0)))


def _grown(held: Prompt, token: int) -> Prompt:
    """What a lane holds once a token of the answer has run in it."""
    names = np.append(held.names, np.int64(token))
    return dataclasses.replace(held, names=names)
