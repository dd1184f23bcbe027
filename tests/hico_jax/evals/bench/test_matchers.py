"""Which option an answer means: every recorded case of the reference, and what the strict rule mends."""

from __future__ import annotations

from typing import Any

import pytest

from hico_jax.evals.bench import matchers

OPTIONS = ("red", "blue", "a dog runs", "none of these")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["mvbench", "mlvu", "lvbench"])
def test_letters_as_recorded(golden: Any, name: str) -> None:
    recorded = golden.json(f"H_eval_{name}.json")
    for case in recorded["mcq_acc"]:
        assert int(matchers.mcq_text(case["pred"]) == case["answer"]) == case["score"], case
    for case in recorded["process_results"]:
        letter = matchers.mcq_letter(case["response"])
        assert int(case["gt"] is not None and letter == case["gt"]) == case["score"], case


@pytest.mark.parity
def test_perceptiontest_as_recorded(golden: Any) -> None:
    recorded = golden.json("H_eval_perceptiontest.json")
    for case in recorded["process_results"]:
        letter = matchers.perception_letter(case["response"])
        found = -1 if letter is None else matchers.LETTERS.index(letter)
        assert found == case["pred_id"], case
        assert int(str(found) == recorded["docs"][case["doc"]]["doc"]["answer_id"]) == case["correct"], case


@pytest.mark.parity
def test_videomme_as_recorded(golden: Any) -> None:
    recorded = golden.json("H_eval_videomme.json")
    pairs = [(c["in"], c["out"]) for c in recorded["extract_characters_regex"]]
    pairs += [(c["response"], c["pred_answer"]) for c in recorded["process_results"]]
    assert len(pairs) == 62 + 172
    for answer, expected in pairs:
        assert (matchers.videomme_letter(answer) or "") == expected, answer
    for case in recorded["process_results"]:
        right = recorded["docs"][case["doc"]]["doc"]["answer"] == matchers.videomme_letter(case["response"])
        assert right == case["correct"], case


@pytest.mark.parity
def test_longvideobench_as_recorded(golden: Any) -> None:
    recorded = golden.json("H_eval_longvideobench.json")
    guessed = 0
    for case in recorded["process_results"]:
        doc = recorded["docs"][case["doc"]]["doc"]
        options = [doc[f"option{i}"] for i in range(5) if doc[f"option{i}"] != "N/A"]
        assert matchers.longvideobench_letter(case["response"], options) == case["parsed_pred"], case
        assert case["answer"] == matchers.LETTERS[doc["correct_choice"]]
        guessed += case["random_fallback"]
    assert guessed == 81


def test_a_guess_repeats_and_depends_on_the_item() -> None:
    assert matchers.guess("q1", 4, 0) == matchers.guess("q1", 4, 0)
    drawn = [matchers.guess(f"q{i}", 4, 0) for i in range(400)]
    counts = [drawn.count(c) for c in "ABCD"]
    assert min(counts) > 70
    assert sum(counts) == 400
    assert drawn != [matchers.guess(f"q{i}", 4, 1) for i in range(400)]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(b).", "B"), ("B. blue", "B"), ("C: a dog runs", "C"), ("d)", "D"), ("**C**", "C"),
        ("```B```", "B"), ('"B"', "B"), ("B。", "B"), ("The answer is B.", "B"), ("The best answer is: D", "D"),
        ("Best answer: C", "C"), ("Option B", "B"), ("option (a)", "A"), ("The answer is\nB", "B"), ("blue", "B"),
        ("Blue.", "B"), ("(B) blue", "B"), ("I think it is C because the man picks up a cup.", "C"),
        ("It must be the red one", "A"), ("答案是 B", "B"), ("<answer>D</answer>", "D"), ("A. A. Milne", "A"),
        ("So the final answer is: (B).", "B"), ("A dog runs", "C"), ("Answer: C", "C"), ("b. blue", "B"),
    ],
)  # fmt: skip
def test_strict_finds_the_option(answer: str, letter: str) -> None:
    assert matchers.strict_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    "answer",
    ["", " ", "A man is walking in the park.", "E", "F", "xyz", "B or C", "Either (A) or (D)", "ABCD", "red or blue",
     "be careful", "A, C", "I cannot tell", "1,000", "E.g., something else", "The answer is a mystery"],
)  # fmt: skip
def test_strict_does_not_guess(answer: str) -> None:
    assert matchers.strict_letter(answer, OPTIONS) is None


def test_strict_knows_how_many_options_there_are() -> None:
    assert matchers.strict_letter("C", OPTIONS[:2]) is None
    assert matchers.strict_letter("F", list("uvwxyz")) == "F"
    assert matchers.strict_letter("A", []) is None
    assert matchers.strict_letter("(B) two", ["(A) one", "(B) two"]) == "B"
    assert matchers.strict_letter("two", ["(A) one", "(B) two"]) == "B"
