"""Questions and answers about a scene, derived from its ground truth alone.

A kind of question is data: its wording, the closed list of answers it may have, and the rule that reads the answer
off the scene (None where the question makes no sense). Answers are single words, so exact match is well defined.

In: `Scene`. Out: `Question`, and conversations in the annotation format of the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipeline.world.scene import COLOURS, DIGITS, DIRECTIONS, LETTERS, SHAPES, WORDS, Card, Scene

ONLY_BEST = "Only give the best option."
TAIL = "\nOnly give the best option. Best option: ("  # how every question of the paper's needle files ends
THINK = "\nName every card you pass, then give the best option in brackets."  # what it ends with to be thought about
MAX_SECONDS = 16  # "at which second" is asked of films up to this long


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of question."""

    wording: str
    answers: tuple[str, ...]  # every answer it can have; () is open text
    answer: Callable[[Scene], str | None]


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one video, ready to ask; `answer` is compared by exact match."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()  # the choices of a multiple-choice question; the answer is then a letter


def _only_card(scene: Scene) -> Card | None:
    return scene.cards[0] if len(scene.cards) == 1 else None


def follow(cards: Sequence[Card], start: str = "") -> tuple[Card, ...]:
    """The cards of a chain of hints from its first to its last; none if no hint starts it.

    A chain starts at a card with a hint that no other card names: the one of colour `start`, or the only one. A hint
    that names no card leads nowhere.
    """
    by_colour = {card.colour: card for card in cards}
    named = {card.hint for card in cards if card.hint}
    starts = [c for c in cards if c.hint in by_colour and c.colour not in named and start in ("", c.colour)]
    found = starts if len(starts) == 1 else []
    while found and found[-1].hint in by_colour:
        found.append(by_colour[found[-1].hint])
    return tuple(found)


def _from(colour: str, read: Callable[[tuple[Card, ...]], str | None]) -> Callable[[Scene], str | None]:
    """Read the chain that starts at a card of this colour."""

    def answer(scene: Scene) -> str | None:
        found = follow(scene.cards, colour)
        return read(found) if found else None

    return answer


def _walk(chain: Sequence[Card]) -> str:
    return ", ".join(card.colour for card in chain)


def _hint(colour: str) -> Callable[[Scene], str | None]:
    return lambda scene: next((c.hint for c in scene.cards if c.colour == colour and c.hint), None)


def _of_card(which: int, count: int, read: Callable[[Card], str | None]) -> Callable[[Scene], str | None]:
    """Read one of exactly `count` cards."""
    return lambda scene: read(scene.cards[which]) if len(scene.cards) == count else None


def _of_colour(colour: str) -> Callable[[Scene], str | None]:
    """The shape on the card of a colour, where there are several cards."""
    return lambda scene: next(
        (_shape(c) for c in scene.cards if c.colour == colour and len(scene.cards) > 1), None
    )  # fmt: skip


def _colour(card: Card) -> str:
    return card.colour


def _shape(card: Card) -> str | None:
    return card.content if card.is_shape else None


def _written(card: Card) -> str | None:
    return None if card.is_shape else card.content


def _when(scene: Scene) -> str | None:
    card = _only_card(scene)
    return str(int(card.start_s)) if card and scene.duration_s <= MAX_SECONDS else None


def _part(scene: Scene) -> str | None:
    card = _only_card(scene)
    if card is None:
        return None
    # Asked only where no reasonable viewer would argue: the card's middle lies well inside one third.
    place = (card.start_s + card.end_s) / 2 / scene.duration_s
    for low, high, name in ((0.0, 0.3, "start"), (0.37, 0.63, "middle"), (0.7, 1.0, "end")):
        if low <= place <= high:
            return name
    return None


def _count_cards(scene: Scene) -> str | None:
    return str(len(scene.cards)) if len(scene.cards) <= 3 else None


def _order(scene: Scene, colour: str) -> str | None:
    colours = [c.colour for c in scene.cards]
    return ("first", "second")[colours.index(colour)] if len(colours) == 2 and len(set(colours)) == 2 else None


def _one_mover(read: Callable[[Scene], str | None]) -> Callable[[Scene], str | None]:
    return lambda scene: (read(scene) or None) if len(scene.movers) == 1 and not scene.cards else None


def _caption(scene: Scene) -> str:
    if scene.cards:
        return ", then ".join(
            f"a card with a {c.colour} {c.content}" + (f" that says {c.hint}" if c.hint else "") for c in scene.cards
        )
    m = next(iter(scene.movers), None)
    if m is None:
        return "an empty scene" if len(scene.grounds) == 1 else f"{len(scene.grounds)} empty scenes"
    if len(scene.movers) > 1:
        return f"{len(scene.movers)} bright shapes"
    does = f"moves {m.direction}" if m.direction else "blinks" if m.blink_s else "stands still"
    return f"a {m.colour} {m.shape} {does}"


_COLOURS, _WAYS = tuple(COLOURS), tuple(DIRECTIONS)
_TEXTS = (*DIGITS, *LETTERS, *WORDS)

KINDS: dict[str, Kind] = {
    # the needle
    "card_colour": Kind("What colour is the card?", _COLOURS, _of_card(0, 1, _colour)),
    "card_shape": Kind("What shape is on the card?", SHAPES, _of_card(0, 1, _shape)),
    "card_text": Kind("What is written on the card?", _TEXTS, _of_card(0, 1, _written)),
    # order in time
    "first_colour": Kind("What colour is the first card?", _COLOURS, _of_card(0, 2, _colour)),
    "second_colour": Kind("What colour is the second card?", _COLOURS, _of_card(1, 2, _colour)),
    "first_shape": Kind("What shape is on the first card?", SHAPES, _of_card(0, 2, _shape)),
    "second_shape": Kind("What shape is on the second card?", SHAPES, _of_card(1, 2, _shape)),
    **{
        f"order_{colour}": Kind(
            f"Is the {colour} card the first or the second?",
            ("first", "second"),
            lambda scene, colour=colour: _order(scene, colour) if colour in (c.colour for c in scene.cards) else None,
        )
        for colour in COLOURS
    },
    # one card of several, and what is written on it
    **{f"shape_of_{c}": Kind(f"What shape is on the {c} card?", SHAPES, _of_colour(c)) for c in COLOURS},
    **{f"hint_{c}": Kind(f"Which colour is written on the {c} card?", _COLOURS, _hint(c)) for c in COLOURS},
    # a chain of hints
    **{
        f"chain_colour_{c}": Kind(
            f"Start at the {c} card and follow the colours written on the cards. What colour is the last card?",
            _COLOURS, _from(c, lambda found: _colour(found[-1])),
        )
        for c in COLOURS
    },
    **{
        f"chain_shape_{c}": Kind(
            f"Start at the {c} card and follow the colours written on the cards. What shape is on the last card?",
            SHAPES, _from(c, lambda found: _shape(found[-1])),
        )
        for c in COLOURS
    },
    **{
        f"walk_{c}": Kind(
            f"Start at the {c} card and follow the colours written on the cards. Name every card you pass.", (),
            _from(c, _walk),
        )
        for c in COLOURS
    },
    # time
    "when": Kind("At which second does the card appear?", tuple(map(str, range(MAX_SECONDS))), _when),
    "part": Kind("Is the card at the start, in the middle or at the end?", ("start", "middle", "end"), _part),
    # number
    "count_cards": Kind("How many cards are there?", ("0", "1", "2", "3"), _count_cards),
    "present": Kind("Is there a card?", ("yes", "no"), lambda s: "yes" if s.cards else "no"),
    "count_shapes": Kind(
        "How many bright shapes are there?", ("1", "2", "3", "4"),
        lambda s: str(len(s.movers)) if s.movers and not s.cards else None,
    ),
    "count_scenes": Kind(
        "How many scenes are there?", ("1", "2", "3"),
        lambda s: str(len(s.grounds)) if len(s.grounds) <= 3 and not s.cards and not s.movers else None,
    ),
    # a moving shape
    "mover_colour": Kind("What colour is the bright shape?", _COLOURS, _one_mover(lambda s: s.movers[0].colour)),
    "mover_shape": Kind("Which shape is it?", SHAPES, _one_mover(lambda s: s.movers[0].shape)),
    "direction": Kind("Which way does it move?", _WAYS, _one_mover(lambda s: s.movers[0].direction)),
    "blinks": Kind(
        "Does it blink?", ("yes", "no"),
        _one_mover(lambda s: None if s.movers[0].direction else "yes" if s.movers[0].blink_s else "no"),
    ),
    # open text
    "caption": Kind("Describe the video.", (), _caption),
}  # fmt: skip


def ask(kind: str, scene: Scene) -> Question | None:
    """The question of one kind about a scene; None where it makes no sense.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"question kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    answer = KINDS[kind].answer(scene)
    return None if answer is None else Question(kind, KINDS[kind].wording, answer)


def ask_all(scene: Scene) -> list[Question]:
    """Every question that makes sense of the scene."""
    return [q for q in (ask(kind, scene) for kind in KINDS) if q is not None]


def listed(options: Sequence[str]) -> str:
    """Options a line each, with their letters in brackets."""
    return "\n".join(f"({'ABCDEFGH'[i]}) {option}" for i, option in enumerate(options))


def multiple_choice(question: Question, rng: np.random.Generator, num_options: int = 4) -> Question:
    """The same question with lettered options, the right one in a random place; the answer is its letter.

    Raises:
      ValueError: the question is open text or already has options.
    """
    answers = KINDS[question.kind].answers
    if not answers or question.options:
        raise ValueError(f"a question of kind {question.kind!r} cannot be given options")
    if question.answer in DIGITS or question.answer in LETTERS or question.answer in WORDS:
        # Wrong options of the same sort, or the right one stands out.
        sorts = (s for s in (DIGITS, LETTERS, WORDS) if question.answer in s and set(s) <= set(answers))
        answers = next(sorts, answers)
    others = [a for a in answers if a != question.answer]
    wrong = rng.choice(others, min(num_options - 1, len(others)), replace=False).tolist()
    options = [*wrong, question.answer]
    rng.shuffle(options)
    text = f"Question: {question.text}\nOption:\n{listed(options)}\n{ONLY_BEST}"
    return Question(question.kind, text, "ABCDEFGH"[options.index(question.answer)], tuple(options))


def paper_choice(
    question: str, answer: str, allowed: Sequence[str], rng: np.random.Generator
) -> tuple[str, str]:  # fmt: skip
    """The question with up to four options as the paper's needle files write them, and the letter of the right one."""
    others = sorted({a for a in allowed if a != answer})
    options = [*rng.choice(others, min(3, len(others)), replace=False).tolist(), answer]
    rng.shuffle(options)
    return f"{question}\nOptions: {listed(options)}{TAIL}", "ABCD"[options.index(answer)]


def paper_needle(question: str, answer: str, allowed: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """A question about one card as the paper asks it, and the letter of the right option."""
    return paper_choice(f"Find the frame of a card. {question}", answer, allowed, rng)


def paper_chain(
    cards: Sequence[Card], rng: np.random.Generator, others: Sequence[Card] = ()
) -> tuple[tuple[str, str], tuple[str, str]]:
    """Both questions of the paper about a chain, in its order: which caption fits its last card, what is on it.

    `others` are in the film but not in the chain; their captions are wrong options too.
    """
    start = f"Find the frame of a {cards[0].colour} card. Locate the final frame based on the instructions in the image"
    captions = [f"a {card.colour} {card.content}" for card in (*others, *cards)]
    return (
        paper_choice(
            f"{start}, and choose the captions that best describe the frame: ", captions[-1], captions, rng
        ),
        paper_choice(
            f"{start}, and answer the following question based on the final frame: what shape is on the card",
            cards[-1].content, SHAPES, rng,
        ),
    )  # fmt: skip


def told_way(chain: Sequence[Card]) -> str:
    """The cards of a chain one by one, then what the last one shows: "red, blue: blue circle"."""
    return f"{_walk(chain)}: {chain[-1].colour} {chain[-1].content}"


def thinking(question: str, letter: str, chain: Sequence[Card]) -> tuple[str, str]:
    """A question about a chain that asks for the way as well, and the answer that follows it: one card at a time."""
    return question.removesuffix(TAIL) + THINK, f"{told_way(chain)} ({letter})"


def choose(
    scene: Scene,
    weights: Mapping[str, float],
    rng: np.random.Generator,
    *,
    turns: int,
    choice_share: float = 0.0,
    paper_share: float = 0.0,
    think_share: float = 0.0,
) -> list[Question]:
    """Up to `turns` different questions about a scene, drawn by weight; some of them as multiple choice.

    A weight of "order" or "order_red" alike counts for the kinds that begin so. `paper_share` of the questions that the
    paper's needle tests would ask are asked in its words, and `think_share` of those about a chain want the way told.
    """
    asked = [(weights.get(q.kind, weights.get(q.kind.split("_")[0], 0.0)), q) for q in ask_all(scene)]
    asked = [(w, q) for w, q in asked if w > 0]
    if not asked:
        return []
    share = np.array([w for w, _ in asked])
    picked = rng.choice(len(asked), min(turns, len(asked)), replace=False, p=share / share.sum())
    out = []
    for i in picked:
        question = asked[i][1]
        if paper_share and question.kind.startswith(("card_", "chain_")) and rng.uniform() < paper_share:
            out.append(_in_the_papers_words(question, scene, rng, think_share))
            continue
        if choice_share and len(KINDS[question.kind].answers) > 2 and rng.uniform() < choice_share:
            question = multiple_choice(question, rng)
        out.append(question)
    return out


def _in_the_papers_words(
    question: Question, scene: Scene, rng: np.random.Generator, think_share: float
) -> Question:  # fmt: skip
    if question.kind.startswith("card_"):
        text, letter = paper_needle(question.text, question.answer, KINDS[question.kind].answers, rng)
    else:
        chain = follow(scene.cards, question.kind.rsplit("_", 1)[1])
        others = [card for card in scene.cards if card not in chain]
        text, letter = paper_chain(chain, rng, others)["shape" in question.kind]
        if think_share and rng.uniform() < think_share:
            text, letter = thinking(text, letter, chain)
    return Question(question.kind, text, letter, ("A", "B", "C", "D"))


def conversation(questions: Sequence[Question], media: str = "<image>\n") -> list[dict[str, str]]:
    """Questions and answers as the turns of an annotation item; the media come before the first question."""
    turns = []
    for i, question in enumerate(questions):
        turns.append({"from": "human", "value": (media if i == 0 else "") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns
