"""What happens in a made-up video, exactly: the ground truth from which pixels and questions both come.

Times are seconds, lengths are fractions of the frame's side (x to the right, y down). Nothing here draws.

In: nothing. Out: `Scene`, read by `draw.py` (pixels) and `questions.py` (text).
"""

from __future__ import annotations

import dataclasses
from typing import Any

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 25),
    "orange": (255, 140, 0),
    "yellow": (245, 235, 30),
    "green": (20, 170, 40),
    "cyan": (30, 220, 230),
    "blue": (35, 55, 235),
    "magenta": (230, 40, 215),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
DIGITS = tuple("0123456789")
LETTERS = tuple("ACEFHKLMPTUX")
WORDS = ("CAT", "DOG", "SUN", "MAP", "KEY", "BOX", "TEA", "ZIP")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Ground:
    """One camera setting of the film: a textured ground with muted shapes drifting over it."""

    start_s: float
    seed: int  # texture, palette and drifting shapes all follow from it
    num_drifters: int = 4


@dataclasses.dataclass(frozen=True)
class Mover:
    """A bright shape that appears, moves (or stands) and leaves; with `blink_s` it is off every other period."""

    shape: str
    colour: str
    start_s: float
    end_s: float
    x: float = 0.5  # centre at start_s
    y: float = 0.5
    vx: float = 0.0  # per second
    vy: float = 0.0
    size: float = 0.4
    blink_s: float = 0.0
    shade: float = 1.0  # brightness of the colour

    def visible(self, time_s: float) -> bool:
        if not self.start_s <= time_s < self.end_s:
            return False
        return not self.blink_s or int((time_s - self.start_s) / self.blink_s) % 2 == 0

    @property
    def direction(self) -> str:
        """left, right, up or down; "" for a shape that stands still."""
        if not self.vx and not self.vy:
            return ""
        if abs(self.vx) > abs(self.vy):
            return "left" if self.vx < 0 else "right"
        return "up" if self.vy < 0 else "down"


@dataclasses.dataclass(frozen=True)
class Card:
    """A framed card that fills the frame for a few seconds: the needle. Shows a shape, or something written."""

    content: str  # a name of SHAPES, or the text written on the card
    colour: str
    start_s: float
    end_s: float
    size: float = 0.72
    shade: float = 1.0  # brightness of the colour
    hint: str = ""  # written along its lower edge: the colour of the card to look at next

    @property
    def is_shape(self) -> bool:
        return self.content in SHAPES


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that is seen in one video, and when.

    Raises:
      ValueError: no ground at 0 s, an unknown colour, an event outside the film, or cards that overlap.
    """

    seed: int  # sensor noise
    duration_s: float
    fps: float
    px: int
    grounds: tuple[Ground, ...]
    cards: tuple[Card, ...] = ()  # in order of time
    movers: tuple[Mover, ...] = ()
    pan: tuple[float, float] = (0.0, 0.0)  # camera motion per second
    noise: int = 2  # largest change of a byte by sensor noise

    def __post_init__(self) -> None:
        if not self.grounds or self.grounds[0].start_s != 0:
            raise ValueError("a scene needs a ground that starts at 0 s")
        for event in (*self.cards, *self.movers):
            if event.colour not in COLOURS:
                raise ValueError(f"colour is {event.colour!r}; it must be one of {', '.join(COLOURS)}")
            if not 0 <= event.start_s < event.end_s <= self.duration_s:
                raise ValueError(
                    f"an event lasts from {event.start_s} s to {event.end_s} s; "
                    f"it must lie inside the film (0 to {self.duration_s} s)"
                )
        for mover in self.movers:
            if mover.shape not in SHAPES:
                raise ValueError(f"shape is {mover.shape!r}; it must be one of {', '.join(SHAPES)}")
        for before, after in zip(self.cards, self.cards[1:], strict=False):
            if after.start_s < before.end_s:
                raise ValueError(f"the card at {after.start_s} s starts before the card at {before.start_s} s ends")

    @property
    def num_frames(self) -> int:
        return round(self.duration_s * self.fps)

    def frames(self, event: Card | Mover) -> range:
        """Indices of the frames during which an event goes on."""
        times = [i for i in range(self.num_frames) if event.start_s <= i / self.fps < event.end_s]
        return range(times[0], times[-1] + 1) if times else range(0)

    def describe(self) -> dict[str, Any]:
        """The scene as plain data, for `world.json` and for people."""
        return dataclasses.asdict(self)
