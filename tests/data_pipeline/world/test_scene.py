from __future__ import annotations

import pytest

from data_pipeline.world.scene import Card, Ground, Mover, Scene

GROUND = (Ground(0.0, 3),)


def test_frames_of_an_event_are_those_whose_time_lies_inside_it():
    card = Card("circle", "red", 2.0, 4.5)
    scene = Scene(0, 8.0, 2.0, 32, GROUND, cards=(card,))
    assert scene.num_frames == 16
    assert scene.frames(card) == range(4, 9)


def test_an_event_between_two_frames_has_none():
    card = Card("circle", "red", 2.1, 2.4)
    assert len(Scene(0, 8.0, 2.0, 32, GROUND, cards=(card,)).frames(card)) == 0


@pytest.mark.parametrize(
    ("vx", "vy", "way"),
    [(-0.1, 0.0, "left"), (0.1, 0.05, "right"), (0.0, -0.1, "up"), (0.05, 0.1, "down"), (0.0, 0.0, "")],
)
def test_direction_follows_the_larger_speed(vx: float, vy: float, way: str):
    assert Mover("star", "red", 0.0, 1.0, vx=vx, vy=vy).direction == way


def test_a_blinking_shape_is_off_every_other_period():
    mover = Mover("star", "red", 1.0, 9.0, blink_s=2.0)
    assert [mover.visible(t) for t in (0.5, 1.0, 2.9, 3.0, 4.9, 5.0, 8.9, 9.0)] == [
        False, True, True, False, False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grounds": (Ground(1.0, 3),)}, "ground that starts at 0 s"),
        ({"cards": (Card("circle", "pink", 0.0, 1.0),)}, "'pink'"),
        ({"cards": (Card("circle", "red", 7.0, 9.0),)}, "inside the film"),
        ({"cards": (Card("circle", "red", 0.0, 3.0), Card("ring", "blue", 2.0, 4.0))}, "starts before"),
        ({"movers": (Mover("blob", "red", 0.0, 1.0),)}, "'blob'"),
    ],
)
def test_impossible_scenes_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Scene(**{"seed": 0, "duration_s": 8.0, "fps": 2.0, "px": 32, "grounds": GROUND, **changes})
