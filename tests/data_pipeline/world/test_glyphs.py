from __future__ import annotations

import itertools
import string

import numpy as np
import pytest

from data_pipeline.world.glyphs import bitmap


def test_a_letter_drawn_by_hand():
    picture = ["".join(".#"[int(p)] for p in row) for row in bitmap("T")]
    assert picture == ["#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."]


def test_every_character_has_its_own_picture():
    for a, b in itertools.combinations(string.digits + string.ascii_uppercase, 2):
        assert (bitmap(a) != bitmap(b)).sum() >= 2, (a, b)


def test_words_are_letters_with_a_gap():
    np.testing.assert_array_equal(bitmap("AX")[:, 6:], bitmap("X"))
    assert not bitmap("AX")[:, 5].any()


@pytest.mark.parametrize("text", ["", "a", "A B"])
def test_what_cannot_be_written_is_refused(text: str):
    with pytest.raises(ValueError, match="cannot write"):
        bitmap(text)
