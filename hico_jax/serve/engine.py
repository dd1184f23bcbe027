"""Many people's questions at once: lanes in a few sizes, long prompts in pieces between everybody's next tokens.

One thread owns the device. Every round it ends what was cancelled or is too late, gives free lanes to those who wait,
runs one piece of a long prompt or several short ones, and one token of every answer that is under way. So a long film
holds nobody up for longer than a piece takes. Answers are those of `ask`, whoever else is there.

In: `Request`s. Out: events to each request's listener, from the engine's thread.
Next: hico_jax/serve/app.py
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipeline.tokenizer import Tokenizer
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo
from hico_jax.serve.pool import PIECE, Lane, Look, NoRoomError, Pool, Ready
from hico_jax.serve.prompts import Prompt
from hico_jax.serve.speech import Speech

log = logging.getLogger(__name__)
Event = Any  # Started, Spoke or Ended


class BusyError(RuntimeError):
    """Too many wait already; come back later."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question as the engine takes it."""

    prompt: Prompt
    settings: GenerationConfig
    stop: tuple[str, ...] = ()
    top: bool = False  # say the likeliest alternatives of every token
    look: bool = False  # say what the question attended to
    deadline: float | None = None  # of time.monotonic()


@dataclasses.dataclass(frozen=True)
class Started:
    """The prompt has run."""

    reused: int
    waited_s: float  # until a lane was free
    first_token_s: float  # since it was submitted
    look: Look | None


@dataclasses.dataclass(frozen=True)
class Spoke:
    """One token; its text may come later, or be none."""

    token: int
    text: str
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Ended:
    """Nothing follows. `reason` is stop, length, cancelled, deadline or error."""

    reason: str
    text: str = ""  # that was held back
    num_tokens: int = 0
    seconds: float = 0.0
    error: str = ""


class Ticket:
    """A request on its way. `cancel` may be called from anywhere, at any time."""

    def __init__(self, request: Request, listen: Callable[[Event], None], tokenizer: Tokenizer) -> None:
        self.request, self.listen = request, listen
        self.speech = Speech(tokenizer, request.stop)
        self.submitted = time.monotonic()
        self.started = 0.0  # when it got a lane
        self.cancelled = False
        self.pool: Pool | None = None
        self.lane: Lane | None = None
        self.filling: Iterator[int | Ready] | None = None
        self.due = 0  # tokens that the next piece of its prompt runs; 0 before the first
        self.ended = threading.Event()

    def cancel(self) -> None:
        """End it at the next round."""
        self.cancelled = True

    def late(self) -> str:
        """Why it should end now, if it should."""
        deadline = self.request.deadline
        return "cancelled" if self.cancelled else "deadline" if deadline and time.monotonic() > deadline else ""


@dataclasses.dataclass
class Counts:
    """What happened since the engine began."""

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by how they ended
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    pieces: int = 0


class Engine:
    """Start it with `start`, end it with `close`; or run single rounds of it (`round`) without a thread.

    Args:
      buckets: lanes and tokens of each size, such as `((8, 2048), (2, 16384))`.
      queue: how many may wait for a lane; more are refused.
    """

    def __init__(
        self,
        model: HiCo,
        tokenizer: Tokenizer,
        *,
        buckets: Sequence[tuple[int, int]],
        piece: int = PIECE,
        queue: int = 64,
    ) -> None:
        self.model, self.tokenizer, self.queue = model, tokenizer, queue
        order = sorted(buckets, key=lambda b: b[1])
        self.make = [lambda n=n, size=size: Pool(model, count=n, capacity=size, piece=piece) for n, size in order]
        self.pools = [make() for make in self.make]
        self.counts = Counts()
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.filling: collections.deque[Ticket] = collections.deque()
        self.speaking: list[Ticket] = []
        self.calls: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future]] = collections.deque()
        self.wake = threading.Condition()
        self.closed = False
        self.thread: threading.Thread | None = None

    def start(self) -> Engine:
        """Run rounds in a thread of its own."""
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()
        return self

    def close(self) -> None:
        """End everything that is under way, and the thread."""
        with self.wake:
            self.closed = True
            self.wake.notify_all()
        if self.thread is not None:
            self.thread.join()
        for ticket in (*self.waiting, *self.filling, *self.speaking):
            self._end(ticket, "cancelled")
        for _, future in self.calls:
            future.cancel()

    def check(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Whether any lane is long enough.

        Raises:
          NoRoomError: none is.
        """
        self.pools[-1].check(prompt, max_new_tokens)

    def submit(self, request: Request, listen: Callable[[Event], None]) -> Ticket:
        """Queue a request. `listen` is called in the engine's thread and must not wait.

        Raises:
          NoRoomError: it fits no lane.
          BusyError: too many wait.
        """
        self.check(request.prompt, request.settings.max_new_tokens)
        ticket = Ticket(request, listen, self.tokenizer)
        with self.wake:
            if self.closed:
                raise BusyError("the server is stopping")
            if len(self.waiting) >= self.queue:
                self.counts.requests["refused"] += 1
                raise BusyError(f"{self.queue} requests wait already; try again later")
            self.waiting.append(ticket)
            self.wake.notify_all()
        return ticket

    def call(self, work: Callable[[], Any]) -> concurrent.futures.Future:
        """Run something else on the device between two rounds, such as encoding a few clips."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self.wake:
            if self.closed:
                future.cancel()
            else:
                self.calls.append((work, future))
                self.wake.notify_all()
        return future

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        return not (self.waiting or self.filling or self.speaking or self.calls)

    def _run(self) -> None:
        try:
            self._rounds()
        except BaseException:  # a pool could not even be made anew: nobody may wait for what never comes
            log.exception("the engine stops")
            with self.wake:
                self.closed = True
            for ticket in [*self.waiting, *self.filling, *self.speaking]:
                self._end(ticket, "error")
            for _, future in self.calls:
                future.cancel()

    def _rounds(self) -> None:
        while True:
            with self.wake:
                while self.idle and not self.closed:
                    self.wake.wait()
                if self.closed:
                    return
            self.round()
            if not self.filling and not self.speaking and self.waiting:
                time.sleep(0.001)  # every lane is held for something else; look again soon

    def round(self) -> None:
        """Do what is due, then prompts, a piece's length in all, and one token of each answer."""
        if self.calls:
            work, future = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # it belongs to whoever asked
                    future.set_exception(error)
        for ticket in [*self.waiting, *self.filling, *self.speaking]:
            if reason := ticket.late():
                self._end(ticket, reason)
        self._admit()
        tokens = 0
        while self.filling and tokens < self.pools[0].piece:
            tokens += self.filling[0].due
            self._fill(self.filling[0])
        for index, pool in enumerate(self.pools):
            tickets = [t for t in self.speaking if t.pool is pool]
            if tickets:
                self._guarded(index, tickets, lambda pool=pool, tickets=tickets: self._step(pool, tickets))

    def _admit(self) -> None:
        """Give free lanes to those who wait, in their order; who needs a longer lane does not hold up the others."""
        for ticket in list(self.waiting):
            request, found = ticket.request, []
            for pool in self.pools:
                try:
                    pool.check(request.prompt, request.settings.max_new_tokens)
                except NoRoomError:
                    continue
                if pool.free():
                    reuse = max(pool.common(lane, request.prompt) for lane in pool.lanes)
                    found.append((reuse if reuse >= pool.worth else 0, -pool.capacity, pool))
            if not found or self._soon(request.prompt, max(found, key=lambda one: one[:2])):
                continue
            pool = max(found, key=lambda one: one[:2])[2]
            self._guarded(self.pools.index(pool), [ticket], lambda pool=pool, ticket=ticket: self._seat(pool, ticket))

    def _seat(self, pool: Pool, ticket: Ticket) -> None:
        """Give a request a lane, which may be copied from another on the device."""
        lane, _ = pool.best(ticket.request.prompt)
        assert lane is not None
        ticket.pool, ticket.lane, ticket.started = pool, lane, time.monotonic()
        lane.busy = True
        ticket.filling = pool.fill(lane, ticket.request.prompt, look=ticket.request.look)
        with self.wake:
            self.waiting.remove(ticket)
        self.filling.append(ticket)

    def _soon(self, prompt: Prompt, best: tuple[int, int, Pool]) -> bool:
        """Whether a prompt that runs right now begins like this one: to wait for it is cheaper than to run both."""
        reuse, _, pool = best
        return any(t.pool is pool and t.request.prompt.same(prompt) > reuse + pool.worth for t in self.filling)

    def _fill(self, ticket: Ticket) -> None:
        """The next piece of a prompt; then it is another's turn."""
        assert ticket.filling is not None
        assert ticket.pool is not None
        index = self.pools.index(ticket.pool)
        self.filling.rotate(-1)
        self._guarded(index, [ticket], lambda: self._piece(ticket))

    def _piece(self, ticket: Ticket) -> None:
        assert ticket.filling is not None
        self.counts.pieces += ticket.due > 0
        ready = next(ticket.filling)
        if isinstance(ready, int):
            ticket.due = ready
            return
        request, pool, lane = ticket.request, ticket.pool, ticket.lane
        assert pool is not None
        assert lane is not None
        said = pool.first(lane, ready, request.settings, top=request.top)
        self.filling.remove(ticket)
        self.speaking.append(ticket)
        self.counts.prompt_tokens += len(request.prompt)
        self.counts.reused_tokens += ready.reused
        now = time.monotonic()
        ticket.listen(Started(ready.reused, ticket.started - ticket.submitted, now - ticket.submitted, ready.look))
        self._say(ticket, said, 0)

    def _step(self, pool: Pool, tickets: list[Ticket]) -> None:
        said = pool.step(
            [t.lane for t in tickets if t.lane is not None],
            [t.speech.ids[-1] for t in tickets],
            [t.request.settings for t in tickets],
            [len(t.speech.ids) for t in tickets],
            top=any(t.request.top for t in tickets),
        )
        self.counts.steps += 1
        for row, ticket in enumerate(tickets):
            self._say(ticket, said, row)

    def _say(self, ticket: Ticket, said: Any, row: int) -> None:
        token, settings = int(said.ids[row]), ticket.request.settings
        text = ticket.speech.push(token)
        top = tuple(zip(said.top_ids[row].tolist(), said.top_log_probs[row].tolist(), strict=True))
        self.counts.new_tokens += 1
        ticket.listen(Spoke(token, text, float(said.log_probs[row]), top if ticket.request.top else ()))
        if ticket.speech.stopped or token in settings.eos:
            self._end(ticket, "stop")
        elif len(ticket.speech.ids) >= settings.max_new_tokens:
            self._end(ticket, "length")

    def _end(self, ticket: Ticket, reason: str, error: str = "") -> None:
        with self.wake:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
        if ticket in self.filling:
            self.filling.remove(ticket)
        if ticket in self.speaking:
            self.speaking.remove(ticket)
        if ticket.ended.is_set():
            return
        if ticket.filling is not None:
            ticket.filling.close()  # type: ignore[attr-defined]
        if ticket.pool is not None and ticket.lane is not None:
            ticket.pool.leave(ticket.lane)
        ticket.ended.set()
        self.counts.requests[reason] += 1
        seconds = time.monotonic() - ticket.submitted
        ticket.listen(Ended(reason, ticket.speech.finish(), len(ticket.speech.ids), seconds, error))

    def _guarded(self, index: int, tickets: list[Ticket], work: Callable[[], None]) -> None:
        """Device work whose failure ends these requests and nobody else's; the pool, half written, is made anew."""
        pool = self.pools[index]
        try:
            work()
        except Exception as error:
            log.exception("a round failed")
            for ticket in [t for t in (*self.filling, *self.speaking) if t.pool is pool] + tickets:
                self._end(ticket, "error", f"{type(error).__name__}")
            pool.state = None  # there may not be room for both
            self.pools[index] = self.make[index]()


def collect(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], str, str]]:
    """Ids, text and reason of each request, all submitted together; runs the rounds where no thread does."""
    ids: list[list[int]] = [[] for _ in requests]
    texts: list[list[str]] = [[] for _ in requests]
    reasons = [""] * len(requests)

    def listener(i: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Spoke):
                ids[i].append(event.token)
                texts[i].append(event.text)
            elif isinstance(event, Ended):
                texts[i].append(event.text)
                reasons[i] = event.reason

        return listen

    tickets = [engine.submit(request, listener(i)) for i, request in enumerate(requests)]
    for _ in itertools.count():
        if all(t.ended.is_set() for t in tickets):
            break
        if engine.thread is None:
            engine.round()
        else:
            tickets[int(np.argmin([t.ended.is_set() for t in tickets]))].ended.wait(0.1)
    return [(i, "".join(t), r) for i, t, r in zip(ids, texts, reasons, strict=True)]
