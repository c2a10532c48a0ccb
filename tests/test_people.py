"""Drawn people: streams, fashions, patterns, skeletons and their turn onto the canvas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.people import (
    PATTERNS,
    Frame,
    Pose,
    draw_garments,
    draw_person,
    make_fashion,
    pattern_mask,
    skeleton,
    stream,
)


def test_a_stream_depends_on_its_whole_key_and_on_nothing_else():
    first = stream(1, 2, 3).random(4)
    stream(1, 2).random(100)
    assert np.array_equal(stream(1, 2, 3).random(4), first)
    assert not any(np.array_equal(stream(*key).random(4), first) for key in ((1, 2), (3, 2, 1), (1, 2, 4)))


def test_looks_are_different_fashions():
    fashions = [make_fashion(look) for look in range(3)]
    assert all(np.abs(a.cloth - b.cloth).mean() > 5 for a, b in zip(fashions, fashions[1:]))


def test_similarity_makes_common_colours_more_common():
    shares = []
    for similarity in (1, 3):
        fashion, rng = make_fashion(0, similarity), stream(7)
        colours = np.array([fashion.colour(rng) for _ in range(400)])
        shares.append(np.mean(np.abs(colours - fashion.cloth[0]).max(axis=1) < 40))
    assert shares[1] > 2 * shares[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_a_pattern_can_be_told_from_its_ground(number):
    top, bottom = draw_garments(stream(number), make_fashion(0))
    assert top.pattern in PATTERNS and sum(abs(a - b) for a, b in zip(top.colour, top.second)) >= 110
    assert (bottom.kind == "dress") <= (top.colour == bottom.colour)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 2 * math.pi), st.floats(0, 1.2))
def test_skeletons_hold_together(number, phase, walk):
    person = draw_person(stream(number), make_fashion(0))
    joints = skeleton(person, Pose(phase=phase, walk=walk))
    assert max(joints[f"{side} ankle"][1] for side in ("left", "right")) == pytest.approx(0.96)
    for side in ("left", "right"):
        assert math.dist(joints[f"{side} hip"], joints[f"{side} knee"]) == pytest.approx(0.49 * (person.legs - 0.04))


def test_frame_turns_left_and_right():
    ahead = (0, 0.5, 0.1)
    assert Frame(0, 0, 100, yaw=0)(ahead)[0] == 0 and Frame(0, 0, 100).depth(ahead) == pytest.approx(0.1)
    assert Frame(0, 0, 100, yaw=math.pi / 2)(ahead)[0] > 10
    assert Frame(0, 0, 100, yaw=math.pi).depth(ahead) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "pattern, share",
    [("stripes", 0.45), ("bars", 0.4), ("checks", 0.5), ("dots", 0.09 * math.pi), ("plain", 0), ("logo", 0)],
)
def test_patterns_cover_the_share_they_should(pattern, share):
    x, y = np.arange(400)[None] / 400, np.arange(400)[:, None] / 400
    mask = pattern_mask(pattern, x, y, 0.1)
    assert mask.shape == (400, 400) and mask.mean() == pytest.approx(share, abs=0.03)
