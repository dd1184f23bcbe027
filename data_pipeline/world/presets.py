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
    told: int = 0  # films told in words; see texts.told_items
    options: int = 0  # conversations about lists of options; see texts.option_items
    vocabulary: int = 512  # of the tokenizer, at most; as many rows as the model's embedding has
    px: int = 96
    short_s: tuple[float, float] = (4.0, 12.5)  # 4 to 12 frames at 1 fps; one length alone does not generalize
    long_s: tuple[float, float] = (24.0, 64.0)
    middle: tuple[int, int, int] = (0, 0, 0)  # films between short and long, in train, val and test
    middle_s: tuple[float, float] = (16.0, 32.0)  # room for up to eight cards
    image_recipes: dict[str, float] = dataclasses.field(default_factory=lambda: {"card": 1.0})
    middle_recipes: dict[str, float] = dataclasses.field(default_factory=lambda: {"chain": 1.0})
    card_s: tuple[float, float] = (3.0, 5.0)
    contents: tuple[str, ...] = DIGITS  # what is written on cards
    written: float = 0.0  # share of cards with something written
    turns: int = 3  # questions in one conversation
    conversations: int = 2  # conversations about one video
    choice_share: float = 0.0  # share of questions asked as multiple choice
    paper_share: float = 0.0  # share of questions about needles and chains asked in the words of the paper's files
    think_share: float = 0.0  # share of those about chains whose answer names every card on the way


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

# What hico-nano learns from: everything, larger frames, long films, and chains of hints (the paper's multi-hop test).
HICO_NANO = Preset(
    train=(10000, 500, 3000),
    val=(200, 24, 0),
    test=(400, 48, 0),
    px=112,
    texts=400,
    told=24000,
    options=36000,
    vocabulary=1024,
    long_s=(32.0, 512.0),
    recipes={
        "card": 0.19, "hint": 0.08, "two_cards": 0.14, "three_cards": 0.1, "chain": 0.12, "two_chains": 0.08,
        "mover": 0.14, "count": 0.08, "blink": 0.04, "scenes": 0.03,
    },
    image_recipes={"card": 0.6, "hint": 0.4},
    middle=(7200, 48, 96),
    middle_recipes={
        "card": 0.08, "two_cards": 0.06, "three_cards": 0.06, "chain": 0.35, "two_chains": 0.35, "mover": 0.06,
        "count": 0.04,
    },
    long_recipes={
        "card": 0.3, "two_cards": 0.12, "three_cards": 0.08, "chain": 0.2, "two_chains": 0.15,
        "mover": 0.07, "count": 0.04, "blink": 0.04,
    },
    weights={
        **_NEEDLE, "first": 1.5, "second": 1.5, "order": 1.0, "shape": 1.5, "hint": 2.0, "chain": 4.0, "walk": 3.0,
        "when": 1.0, "part": 1.0, "present": 0.2, "count": 1.0, "mover": 1.0, "direction": 3.0, "blinks": 1.0,
        "caption": 0.3,
    },
    contents=(*DIGITS, *LETTERS, *WORDS),
    written=0.25,
    turns=4,
    conversations=4,
    choice_share=0.1,
    paper_share=0.3,
    think_share=0.5,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "hico_nano": HICO_NANO,
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
