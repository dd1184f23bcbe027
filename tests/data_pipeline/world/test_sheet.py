from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.world.sheet import contact_sheet


def test_frames_keep_their_place_and_colour():
    frames = [np.full((10, 10, 3), c, np.uint8) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    sheet = np.asarray(contact_sheet(frames, ["a", "b", "c"], columns=2, px=20))
    assert sheet.shape == (2 * (20 + 14 + 6) + 6, 2 * 26 + 6, 3)
    for (y, x), colour in zip(((6, 6), (6, 32), (46, 6)), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), strict=True):
        assert (sheet[y : y + 20, x : x + 20] == colour).all()


def test_marked_frames_get_a_border():
    frames = [np.zeros((10, 10, 3), np.uint8)] * 2
    plain, marked = (np.asarray(contact_sheet(frames, ["", ""], px=20, marked=m)) for m in ((), (1,)))
    changed = np.nonzero((plain != marked).any((0, 2)))[0]
    assert changed.min() == 32 - 3


def test_captions_must_match():
    with pytest.raises(ValueError, match="1 frames and 2 captions"):
        contact_sheet([np.zeros((4, 4, 3), np.uint8)], ["a", "b"])
