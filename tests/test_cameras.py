"""Cameras: colours that differ, boxes that are not perfect, things that stand in the way, light from one side."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.cameras import Box, draw_box, make_camera, put, render, spread
from affscl.data.people import Frame, Garment, Person, Pose, stream

PLAIN = Person(Garment("t-shirt", (40, 80, 160)), Garment("trousers", (30, 30, 30)))


def test_looks_are_different_times_of_day():
    day, evening = (np.mean([make_camera(0, look, c).scene.mean() for c in (1, 2, 3)]) for look in (0, 1))
    assert evening < 0.8 * day


def test_camera_shift_zero_makes_colours_equal():
    gains = {make_camera(0, 0, c, camera_shift=0).gains for c in range(1, 7)}
    assert gains == {(1.0, 1.0, 1.0)}
    assert len({make_camera(0, 0, c).gains for c in range(1, 7)}) == 6


@settings(deadline=None, max_examples=30)
@given(start=st.floats(0, 1, exclude_max=True), n=st.integers(2, 40))
def test_spread_keeps_its_distance(start, n):
    values = np.sort([spread(i, start) for i in range(n)])
    assert values[0] >= -1 and values[-1] < 1 + 1e-12 and np.diff(values).min() > 0.7 / n


@pytest.mark.parametrize("occluder", ["post", "bush", "bonnet", "passer-by"])
def test_occluders_hide_something(occluder):
    camera = make_camera(0, 0, 1)
    free, hidden = (render(camera, stream(5), PLAIN, box=Box(occluder=o)) for o in ("none", occluder))
    assert (np.abs(free.astype(int) - hidden).max(axis=2) > 40).mean() > 0.02


def test_no_nuisance_gives_equal_boxes_without_occluders():
    boxes = [draw_box(stream(i), nuisance=0) for i in range(20)]
    assert {(box.x, box.size, box.occluder) for box in boxes} == {(0.5, 0.94, "none")}
    assert len({draw_box(stream(i)).size for i in range(20)}) == 20


def test_nobody_passes_where_nobody_is_given():
    camera = replace(make_camera(0, 0, 1), noise=0)
    free, passed = (render(camera, stream(5), box=Box(occluder=o)) for o in ("none", "passer-by"))
    assert np.array_equal(free, passed)


def test_light_comes_from_its_side():
    def halves(light):
        canvas = np.full((128, 64, 3), 128, np.float32)
        put(canvas, PLAIN, Pose(), Frame(32, 6, 116), light)
        body = (canvas != 128).any(axis=2)[:110]
        left, right = np.arange(64) < 32, np.arange(64) >= 32
        return [canvas[:110][body & side].mean() for side in (left, right)]

    assert halves(-1)[0] > halves(0)[0] > halves(1)[0] and halves(-1)[1] < halves(0)[1] < halves(1)[1]
