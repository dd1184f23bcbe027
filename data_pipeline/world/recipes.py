"""Random scenes: one recipe per thing that can happen, and the rule that keeps train, val and test apart.

Two rules hold by arithmetic, not by luck:

1. Every scene and every ground has a seed whose remainder modulo 3 is its split (train 0, val 1, test 2), so
   no two splits share a scene, a texture or a drifting shape, whatever the world's own seed is.
2. A pair of colour and content is *held out* when their indices add up to a multiple of 6. Test scenes use
   held-out pairs only; train and val scenes never do. Each of the 8 colours is held out with one shape, and
   each of the 6 shapes with one or two colours, so answers stay balanced.

In: a recipe's name and seeds. Out: `Scene`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from data_pipeline.world.scene import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    LETTERS,
    SHAPES,
    WORDS,
    Card,
    Ground,
    Mover,
    Scene,
)

SPLITS = ("train", "val", "test")
_CONTENTS = (*SHAPES, *DIGITS, *LETTERS, *WORDS)


@functools.cache
def held_out(colour: str, content: str) -> bool:
    """True for the pairs that only test scenes show.

    Example:
      >>> held_out("red", "circle"), held_out("red", "square")
      (True, False)
    """
    return (list(COLOURS).index(colour) + _CONTENTS.index(content)) % 6 == 0


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of scene `index` of a split; its remainder modulo 3 is the split.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    return ((seed << 32) + index) * 3 + SPLITS.index(split)


@dataclasses.dataclass(frozen=True)
class Look:
    """What the scenes of one file have in common."""

    px: int = 96
    fps: float = 2.0
    seconds: tuple[float, float] = (8.0, 12.0)  # shortest and longest film, in whole half-seconds
    card_s: tuple[float, float] = (3.0, 5.0)
    contents: tuple[str, ...] = SHAPES  # what cards may show besides shapes
    written: float = 0.0  # share of cards with something written, drawn from `contents`
    noise: int = 2


class Dice:
    """The random choices of one scene, each allowed by the scene's split."""

    def __init__(self, seed: int, split: str, index: int, look: Look) -> None:
        self.seed, self.split, self.look = scene_seed(seed, split, index), split, look
        self.rng = np.random.default_rng(self.seed)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def between(self, low: float, high: float, step: float | None = None) -> float:
        """A number in [low, high], on the grid of the frames unless `step` is given."""
        step = 1 / self.look.fps if step is None else step
        return low + step * int(self.rng.integers(max(0, int((high - low) / step + 1e-9)) + 1))

    def pair(self, contents: Sequence[str] | None = None, avoid: Collection[str] = ()) -> tuple[str, str]:
        """A colour (none of `avoid`) and a content, held out exactly in the test split."""
        if contents is None:
            contents = self.look.contents if self.rng.uniform() < self.look.written else SHAPES
        allowed = [
            (colour, content)
            for colour in COLOURS
            for content in contents
            if colour not in avoid and held_out(colour, content) == (self.split == "test")
        ]
        return allowed[int(self.rng.integers(len(allowed)))]

    def scene(self, duration_s: float, *, grounds: tuple[Ground, ...] = (), cards: Sequence[Card] = (),
              movers: Sequence[Mover] = ()) -> Scene:  # fmt: skip
        """The scene around some events: ground, camera and noise."""
        pan = tuple(float(v) for v in self.rng.uniform(-0.12, 0.12, 2)) if self.rng.uniform() < 0.5 else (0.0, 0.0)
        return Scene(
            seed=self.seed, duration_s=duration_s, fps=self.look.fps, px=self.look.px, cards=tuple(cards),
            movers=tuple(movers), grounds=grounds or (self.ground(0.0),), pan=(pan[0], pan[1]), noise=self.look.noise,
        )  # fmt: skip

    def ground(self, start_s: float, num_drifters: int = 4) -> Ground:
        """A ground that no other split can have."""
        seed = int(self.rng.integers(1 << 60)) * 3 + SPLITS.index(self.split)
        return Ground(start_s, seed, num_drifters)

    def cuts(self, duration_s: float, every_s: tuple[float, float]) -> tuple[Ground, ...]:
        """Grounds that follow each other, each lasting between the two times."""
        starts = [0.0]
        while starts[-1] + 2 * every_s[0] <= duration_s:
            starts.append(starts[-1] + self.between(every_s[0], min(every_s[1], duration_s - starts[-1] - every_s[0])))
        return tuple(self.ground(s) for s in starts)

    def shade(self) -> float:
        """Brightness varies so that a shape is learnt apart from its exact colour."""
        return float(self.rng.uniform(0.75, 1.0))

    def duration(self) -> float:
        return self.between(*self.look.seconds)


def cards(dice: Dice, count: int) -> Scene:
    """Some cards of different colours, one after another, amid the haystack; cuts in long films."""
    duration = max(dice.duration(), 4.0 * count)
    slot = int(duration / count * dice.look.fps) / dice.look.fps
    made: list[Card] = []
    for i in range(count):
        colour, content = dice.pair(avoid={c.colour for c in made})
        low, high = dice.look.card_s
        gap = 1.0 if count > 1 else 0.0
        lasts = max(2.0, min(dice.between(low, high), slot - gap))
        start = i * slot + dice.between(0.0, max(0.0, slot - lasts - gap))
        size = float(dice.rng.uniform(0.64, 0.78))
        made.append(Card(content, colour, start, start + lasts, size, dice.shade()))
    grounds = dice.cuts(duration, (8.0, 24.0)) if duration > 16 else ()
    return dice.scene(duration, grounds=grounds, cards=made)


def chain(dice: Dice) -> Scene:
    """Cards that name each other: each has the colour of the next one written on it, the last has nothing.

    Two to seven of them in any order; a film too short for many has few.
    """
    longest = min(7, len(COLOURS), int(dice.look.seconds[1] / 4))
    scene = cards(dice, int(dice.rng.integers(2, max(2, longest) + 1)))
    return _with_hints(scene, [dice.rng.permutation(len(scene.cards))])


def hint(dice: Dice) -> Scene:
    """One card that names another, which is not there: what is written is to be read, nothing to be followed."""
    scene = cards(dice, 1)
    (card,) = scene.cards
    named = dice.pick([colour for colour in COLOURS if colour != card.colour])
    return dataclasses.replace(scene, cards=(dataclasses.replace(card, hint=named),))


def two_chains(dice: Dice) -> Scene:
    """A chain amid the cards of another, or beside one that nothing names: the last card is not the only blank one.

    Three to eight cards; two or more of them are a chain, and the rest is one, too.
    """
    longest = min(len(COLOURS), int(dice.look.seconds[1] / 4))
    scene = cards(dice, int(dice.rng.integers(3, max(3, longest) + 1)))
    order = dice.rng.permutation(len(scene.cards))
    first = int(dice.rng.integers(2, len(order)))
    return _with_hints(scene, [order[:first], order[first:]])


def _with_hints(scene: Scene, chains: Sequence[np.ndarray]) -> Scene:
    """The scene with the colour of the next card of its chain written on each card."""
    hints = {i: scene.cards[after].colour for chain in chains for i, after in itertools.pairwise(chain)}
    written = tuple(dataclasses.replace(card, hint=hints.get(i, "")) for i, card in enumerate(scene.cards))
    return dataclasses.replace(scene, cards=written)


def mover(dice: Dice) -> Scene:
    """One bright shape crosses the frame: it appears, moves, leaves."""
    duration = dice.duration()
    colour, shape = dice.pair(SHAPES)
    ux, uy = DIRECTIONS[dice.pick(tuple(DIRECTIONS))]
    lasts = min(dice.between(6.0, 8.0), duration)
    start = dice.between(0.0, duration - lasts)
    speed, drift = 0.8 / lasts, float(dice.rng.uniform(0.4, 0.6))
    x, y = (0.5 - 0.4 * ux if ux else drift), (0.5 - 0.4 * uy if uy else drift)
    size = float(dice.rng.uniform(0.4, 0.5))
    made = Mover(shape, colour, start, start + lasts, x, y, speed * ux, speed * uy, size, shade=dice.shade())
    return dice.scene(duration, grounds=(dice.ground(0.0, 2),), movers=(made,))


def count(dice: Dice) -> Scene:
    """One to four bright shapes stand in the frame, each in its own quarter."""
    duration = dice.duration()
    quarters = dice.rng.permutation(4)[: int(dice.rng.integers(1, 5))]
    made = []
    for quarter in quarters:
        colour, shape = dice.pair(SHAPES)
        x, y = 0.27 + 0.46 * (quarter % 2), 0.27 + 0.46 * (quarter // 2)
        made.append(Mover(shape, colour, 0.0, duration, x, y, size=0.36, shade=dice.shade()))
    return dice.scene(duration, grounds=(dice.ground(0.0, 0),), movers=made)


def blink(dice: Dice) -> Scene:
    """One bright shape in the middle, which blinks or not."""
    duration = dice.duration()
    colour, shape = dice.pair(SHAPES)
    period = 2.0 if dice.rng.uniform() < 0.5 else 0.0
    size = float(dice.rng.uniform(0.5, 0.65))
    made = Mover(shape, colour, 0.0, duration, size=size, blink_s=period, shade=dice.shade())
    return dice.scene(duration, grounds=(dice.ground(0.0, 2),), movers=(made,))


def scenes(dice: Dice) -> Scene:
    """Nothing but grounds: one, two or three of them."""
    duration = dice.duration()
    number = int(dice.rng.integers(1, 4))
    third = int(duration / 3 * dice.look.fps) / dice.look.fps
    starts = [0.0, *(k * third for k in range(1, number))]
    return dice.scene(duration, grounds=tuple(dice.ground(s) for s in starts))


RECIPES: dict[str, Callable[[Dice], Scene]] = {
    "card": lambda dice: cards(dice, 1),
    "two_cards": lambda dice: cards(dice, 2),
    "three_cards": lambda dice: cards(dice, 3),
    "hint": hint,
    "chain": chain,
    "two_chains": two_chains,
    "mover": mover,
    "count": count,
    "blink": blink,
    "scenes": scenes,
}


def make_scene(recipe: str, *, seed: int, split: str, index: int, look: Look = Look()) -> Scene:
    """Scene `index` of a split, by one recipe of RECIPES. The same arguments give the same scene.

    Raises:
      ValueError: an unknown recipe or split.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}")
    return RECIPES[recipe](Dice(seed, split, index, look))


def in_proportion(weights: Mapping[str, float], number: int) -> list[str]:
    """Names in proportion to their weights, interleaved so that every prefix is in proportion too."""
    total, given = sum(weights.values()), dict.fromkeys(weights, 0)
    out = []
    for i in range(number):
        name = max(weights, key=lambda n: weights[n] / total * (i + 1) - given[n])
        given[name] += 1
        out.append(name)
    return out
