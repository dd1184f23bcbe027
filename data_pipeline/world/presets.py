"""How large a world is and what it is made of. Data, not code."""

from __future__ import annotations

import dataclasses

from data_pipeline.world.scene import DIGITS, LETTERS, WORDS


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of one world. Counts are (short videos, long videos, images)."""

    train: tuple[int, int, int]
    val: tuple[int, int, int]
    test: tuple[int, int, int]
    recipes: dict[str, float]  # share of each recipe among short videos
    long_recipes: dict[str, float]
    weights: dict[str, float]  # how often each kind of question is asked where it makes sense; see questions.choose
    texts: int = 60  # text-only conversations
    px: int = 96
    short_s: tuple[float, float] = (4.0, 12.5)  # 4 to 12 frames at 1 fps; one length alone does not generalize
    long_s: tuple[float, float] = (24.0, 64.0)
    card_s: tuple[float, float] = (3.0, 5.0)
    contents: tuple[str, ...] = DIGITS  # what is written on cards
    written: float = 0.0  # share of cards with something written
    turns: int = 3  # questions in one conversation
    conversations: int = 2  # conversations about one video
    choice_share: float = 0.0  # share of questions asked as multiple choice


# The main skill (what is on the card?) keeps most of the weight; the rest must not crowd it out of a small model.
_NEEDLE = {"card_colour": 4.0, "card_shape": 4.0, "card_text": 4.0}
_ORDER = {"first_colour": 3.0, "second_colour": 3.0, "first_shape": 1.0, "second_shape": 1.0, "order": 0.5}

NANO = Preset(
    train=(1400, 90, 800),
    val=(60, 8, 0),
    test=(120, 16, 0),
    long_s=(128.0, 256.0),
    recipes={"card": 0.94, "two_cards": 0.06},
    long_recipes={"card": 0.9, "two_cards": 0.1},
    weights={
        **_NEEDLE, **_ORDER, "part": 0.1, "present": 0.1, "count_cards": 0.1, "caption": 0.1,
        "mover_colour": 1.0, "mover_shape": 1.0, "direction": 2.0, "count_shapes": 2.0,
    },
    turns=2,
    conversations=3,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    # For tests: everything once, in about a second.
    "tiny": dataclasses.replace(
        NANO, train=(12, 2, 8), val=(3, 1, 0), test=(3, 1, 0), px=32, texts=6, long_s=(16.0, 20.0), written=0.1,
        recipes={"card": 0.3, "two_cards": 0.2, "mover": 0.2, "count": 0.1, "blink": 0.1, "scenes": 0.1},
    ),
    # As nano, but fewer of everything.
    "quick": dataclasses.replace(
        NANO, train=(500, 16, 400), val=(24, 4, 0), test=(48, 8, 0),
    ),
    "nano": NANO,
    # Everything, for a model that has more than minutes.
    "full": dataclasses.replace(
        NANO, train=(6000, 400, 1500), val=(200, 24, 0), test=(400, 48, 0), texts=400, long_s=(32.0, 256.0),
        recipes={
            "card": 0.4, "two_cards": 0.2, "three_cards": 0.08,
            "mover": 0.12, "count": 0.08, "blink": 0.06, "scenes": 0.06,
        },
        long_recipes={"card": 0.5, "two_cards": 0.3, "three_cards": 0.2},
        weights={**NANO.weights, "part": 0.4, "count_cards": 0.4, "caption": 0.4, "when": 1.0,
            "blinks": 1.0, "count_scenes": 1.0},
        contents=(*DIGITS, *LETTERS, *WORDS), written=0.3, choice_share=0.15,
    ),
}  # fmt: skip
