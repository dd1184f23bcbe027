from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest

from data_pipeline.world.draw import frame, render, sprite, still
from data_pipeline.world.scene import COLOURS, DIGITS, SHAPES, Card, Ground, Mover, Scene

PLAIN = Scene(seed=5, duration_s=8.0, fps=2.0, px=48, grounds=(Ground(0.0, 9), Ground(4.0, 10)))


def test_same_scene_same_pixels_and_any_frame_on_its_own():
    frames = list(render(PLAIN))
    assert len(frames) == 16
    assert all(f.shape == (48, 48, 3) and f.dtype == np.uint8 for f in frames)
    np.testing.assert_array_equal(frames[11], frame(PLAIN, 11))
    assert all((a != b).any() for a, b in itertools.pairwise(frames)), "nothing moves"


def test_a_card_changes_its_own_frames_and_no_other():
    card = Card("ring", "cyan", 2.0, 5.0)
    with_card = dataclasses.replace(PLAIN, cards=(card,))
    changed = [i for i in range(16) if (frame(PLAIN, i) != frame(with_card, i)).any()]
    assert changed == list(with_card.frames(card)) == list(range(4, 10))


@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_of_a_card_has_its_colour(colour: str):
    picture = still(Card("circle", colour, 0.0, 1.0), 96)
    np.testing.assert_array_equal(picture[48, 48], COLOURS[colour])
    assert picture[0, 0].min() > 180, "the frame is bright"
    assert picture[10, 10].max() < 40, "the inside is dark"


def test_shapes_and_digits_are_unlike_each_other():
    for a, b in itertools.combinations((*SHAPES, *DIGITS), 2):
        assert abs(sprite(a, 32) - sprite(b, 32)).mean() > 0.02, (a, b)
    for a, b in itertools.combinations(SHAPES, 2):
        assert abs(sprite(a, 32) - sprite(b, 32)).mean() > 0.06, (a, b)


def test_shapes_have_the_areas_of_geometry():
    share = {shape: float(sprite(shape, 64).mean()) for shape in SHAPES}
    expected = {
        "circle": np.pi * 0.98**2 / 4,
        "ring": np.pi * (0.98**2 - 0.55**2) / 4,
        "square": 0.88**2,
        "triangle": 0.5 * (0.88 + 0.95) / 0.95 * (0.88 + 0.95) / 4,
        "cross": 0.6 - 0.3**2,
        "star": 5 * 0.4 * np.sin(np.pi / 5) / 4,
    }
    for shape in SHAPES:
        assert share[shape] == pytest.approx(expected[shape], abs=0.01), shape  # a pixel row at the edge


@pytest.mark.parametrize("way", ["left", "right", "up", "down"])
def test_a_mover_moves_the_way_it_says(way: str):
    vx, vy = {"left": (-0.1, 0.0), "right": (0.1, 0.0), "up": (0.0, -0.1), "down": (0.0, 0.1)}[way]
    mover = Mover("square", "red", 0.0, 4.0, 0.5, 0.5, vx, vy, size=0.3)
    scene = Scene(seed=1, duration_s=4.0, fps=1.0, px=64, grounds=(Ground(0.0, 4, 0),), movers=(mover,), noise=0)
    centres = []
    for pixels in (frame(scene, 0), frame(scene, 3)):
        y, x = np.nonzero((pixels == COLOURS["red"]).all(-1))
        centres.append((x.mean(), y.mean()))
    (x0, y0), (x1, y1) = centres
    assert mover.direction == way
    assert (x1 - x0, y1 - y0) == pytest.approx((64 * 3 * vx, 64 * 3 * vy), abs=1.0)


def test_a_blinking_shape_vanishes_and_returns():
    mover = Mover("square", "white", 0.0, 8.0, size=0.5, blink_s=2.0)
    scene = dataclasses.replace(PLAIN, movers=(mover,), noise=0, pan=(0.0, 0.0))
    lit = [bool((frame(scene, i)[24, 24] == 250).all()) for i in range(0, 16, 2)]
    assert lit == [True, True, False, False, True, True, False, False]


def test_the_camera_pans():
    ground = (Ground(0.0, 4, 0),)
    scene = Scene(seed=1, duration_s=4.0, fps=1.0, px=64, grounds=ground, pan=(0.25, 0.0), noise=0)
    np.testing.assert_array_equal(frame(scene, 1)[:, :48], frame(scene, 0)[:, 16:])


def test_a_long_film_needs_the_memory_of_one_frame():
    scene = Scene(seed=1, duration_s=3000.0, fps=1.0, px=32, grounds=tuple(Ground(10.0 * i, 3 * i) for i in range(300)))
    for _ in zip(render(scene), range(50), strict=False):  # fill the caches
        pass
    tracemalloc.start()
    count = sum(1 for _ in render(scene))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert peak < 2_000_000, "3000 frames of 3 KB are 9 MB; nothing of that may be kept"
