"""Programs compiled ahead: at once what a first answer needs, the rest while people ask already.

XLA takes a second or so for each of a hundred. They are compiled from shapes alone, so nothing runs, no lane is
touched, and a thread may do it whenever the engine has nothing to do; a request that comes before its turn compiles
what it needs.

In: an engine that has not started, and its model. Out: compiled programs in JAX's own cache.
Next: hico_jax/serve/programs.py
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hico_jax.api import Model
from hico_jax.generate import GenerationConfig
from hico_jax.serve import programs, prompts, sampling
from hico_jax.serve.engine import Engine
from hico_jax.serve.pool import Pool, Ready

log = logging.getLogger(__name__)
Work = Callable[[], Any]
NEAR = 4  # pieces from the beginning of a row on that the first answer may need


class Warming:
    """`begin` before the engine starts, then `finish` or, while it answers, `go_on`."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self.engine, self.model = engine, model
        each = [Programs(pool) for pool in engine.pools]
        self.needed: list[Work] = [*each[0].prefill(), *each[0].steps(1), self._first_answer, self._first_clip]
        self.rest: list[Work] = [*each[0].far(), *each[0].others()]
        for one in each[1:]:
            self.rest += [*one.prefill(), *one.far(), *one.steps(1), *one.others()]
        self.rest += [work for one in each for work in one.sampled()]
        self.left = len(self.needed) + len(self.rest)
        self.closed = threading.Event()
        self.thread: threading.Thread | None = None

    def begin(self) -> None:
        """What the first answer about a short film needs."""
        self._run(self.needed)

    def finish(self) -> None:
        """Everything else, before anybody is let in."""
        self._run(self.rest)

    def go_on(self) -> None:
        """Everything else, in a thread of its own, while nobody asks anything."""
        self.thread = threading.Thread(target=self._quietly, name="warming", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop behind the program that is being compiled."""
        self.closed.set()
        if self.thread is not None:
            self.thread.join()

    def _run(self, works: list[Work]) -> None:
        for work in works:
            if self.closed.is_set():
                return
            work()
            self.left -= 1

    def _quietly(self) -> None:
        try:
            for work in self.rest:
                while not self.engine.idle and not self.closed.is_set():
                    self.closed.wait(0.05)  # who asks now needs the processor
                self._run([work])
        except Exception:  # who needs the program finds out the same, and is told
            log.exception("compiling ahead failed; requests compile what they need")

    def _first_answer(self) -> None:
        """Small things around the programs, by answering."""
        pool, config = self.engine.pools[0], GenerationConfig(max_new_tokens=2)
        row, media = self.model.row([{"role": "user", "content": "Hello?", "seen": ()}])
        lane = pool.lanes[0]
        *_, ready = pool.fill(lane, prompts.prompt(row, media, self.model.geometry))
        assert isinstance(ready, Ready)
        said = pool.first(lane, ready, config)
        pool.step([lane], [int(said.ids[0])], [config], [1])
        lane.held = None
        pool.leave(lane)

    def _first_clip(self) -> None:
        geometry = self.model.geometry
        blank = np.zeros((geometry.frames_per_clip, geometry.image_px, geometry.image_px, 3), np.uint8)
        jax.block_until_ready(self.model.viewer._encode(blank))


class Programs:
    """What the lanes of one size need; every item compiles one program."""

    def __init__(self, pool: Pool) -> None:
        config = pool.model.config.llm
        self.pool, self.llm, self.count = pool, pool.model.llm, len(pool.lanes)
        self.state, self.seen = _shapes(pool.state), _shapes(pool.seen)  # the arrays themselves go with each call
        self.rows = lambda size: jax.ShapeDtypeStruct((size, config.embed_dim), pool.dtype)
        self.logits = jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32)
        self.greedy = GenerationConfig(max_new_tokens=1)

    def prefill(self) -> Iterator[Work]:
        """Pieces of a short prompt in every group of layers, and the first token."""
        pool, zero = self.pool, np.int32(0)
        for group, places in enumerate(pool.places):
            buffer = self.rows(places + pool.piece)
            for size in pool.sizes:
                if group:
                    yield lambda buffer=buffer, size=size: programs.cut.lower(buffer, zero, size=size).compile()
                if group or pool.guided:
                    yield lambda buffer=buffer, size=size: programs.scatter.lower(
                        buffer, self.rows(size), np.zeros(size, np.int32)
                    ).compile()
            yield from self._runs(group, [seen for seen in self._sights(group) if self._near(group, seen)])
        yield from self._choices()
        yield lambda: self._first(self.greedy)

    def far(self) -> Iterator[Work]:
        """Pieces that stand further behind in a row."""
        for group in range(len(self.pool.places)):
            yield from self._runs(group, [seen for seen in self._sights(group) if not self._near(group, seen)])

    def _sights(self, group: int) -> list[int]:
        pool = self.pool
        ends = range(pool.piece, pool.places[group] + pool.piece + 1, pool.piece)
        return sorted({pool.sight(group, end) for end in ends})

    def _near(self, group: int, seen: int) -> bool:
        return seen <= max(NEAR * self.pool.piece, self._sights(group)[0])

    def _runs(self, group: int, sights: list[int]) -> Iterator[Work]:
        pool, where = self.pool, np.zeros(4, np.int32)
        for seen in sights:
            for size in pool.sizes:
                yield lambda seen=seen, size=size: programs.run.lower(
                    self.llm, self.state, self.rows(size), where, group=group, first=pool.edges[group], seen=seen
                ).compile()

    def _choices(self) -> Iterator[Work]:
        """Attention-guided stages."""
        pool, schedule, zero = self.pool, self.pool.schedule, np.int32(0)
        for stage in range(schedule.num_uniform, schedule.num_stages):
            before = pool.places[stage] + pool.piece
            visual = np.zeros(before, np.int32)
            yield lambda stage=stage, before=before, visual=visual: programs.select.lower(
                self.llm, self.rows(before), visual, zero, zero, layer=schedule.layers[stage],
                kept=pool.places[stage + 1] + pool.piece,
            ).compile()  # fmt: skip

    def steps(self, number: int, config: GenerationConfig | None = None) -> Iterator[Work]:
        """A step of so many answers, by how far their lanes are filled."""
        pool, number, config = self.pool, min(number, self.count), config or self.greedy
        for seen in dict.fromkeys(pool.reach(length) for length in range(0, pool.capacity, pool.piece)):
            yield lambda seen=seen: programs.step.lower(
                self.llm, self.state, self.seen, np.zeros(number, np.int32), np.zeros(number, np.int32),
                np.zeros((len(pool.places), number), np.int32), sampling.knobs([config] * number, [0] * number),
                seen_to=seen, everyone=number == self.count, sampled=config.do_sample, top=False,
            ).compile()  # fmt: skip

    def others(self) -> Iterator[Work]:
        """What a question looks at, several answers at once, and a lane that is copied."""
        pool, zero = self.pool, np.int32(0)
        if not pool.guided:
            group, layer = pool.looking
            yield lambda: programs.attended.lower(
                self.llm, self.state, jax.ShapeDtypeStruct(self.rows(1).shape[1:], pool.dtype), zero, zero,
                group=group, first=pool.edges[group], layer=layer,
            ).compile()  # fmt: skip
        for number in self._numbers()[1:]:
            yield from self.steps(number)
        if self.count > 1:
            yield lambda: programs.copy.lower(self.state, zero, zero).compile()

    def sampled(self) -> Iterator[Work]:
        """The same steps with a temperature."""
        config = GenerationConfig(max_new_tokens=1, do_sample=True)
        yield lambda: self._first(config)
        for number in self._numbers():
            yield from self.steps(number, config)

    def _numbers(self) -> list[int]:
        return sorted({min(self.count, 1 << i) for i in range(self.count.bit_length() + 1)})

    def _first(self, config: GenerationConfig) -> Any:
        return programs.first.lower(
            self.logits, self.seen, np.int32(0), sampling.knobs([config], [0]), sampled=config.do_sample, top=False
        ).compile()


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
