"""A body in pixels: everything that makes a person can be seen, from where it should."""

import math

import numpy as np
import pytest

from affscl.data.drawing import build, draw_body, rasterise
from affscl.data.people import (
    BAGS,
    BOTTOMS,
    HAIRSTYLES,
    HEADWEAR,
    PATTERNS,
    TOPS,
    Frame,
    Garment,
    Person,
    Pose,
    draw_person,
    make_fashion,
    stream,
)

PLAIN = Person(Garment("t-shirt", (40, 80, 160)), Garment("trousers", (30, 30, 30)))


def drawn(person, yaw):
    colours, mask = draw_body(person, Pose(yaw, phase=1.0), Frame(32, 6, 116, yaw), 128, 64)
    return np.where(mask[..., None], colours, np.float32(128))


@pytest.mark.parametrize(
    "changes",
    [{"top": Garment(kind, (40, 80, 160))} for kind in TOPS if kind != "t-shirt"]
    + [{"bottom": Garment(kind, (30, 30, 30))} for kind in BOTTOMS if kind != "trousers"]
    + [{"top": Garment("t-shirt", (40, 80, 160), pattern)} for pattern in PATTERNS if pattern != "plain"]
    + [{"hairstyle": style} for style in HAIRSTYLES if style != "short"]
    + [{"headwear": kind} for kind in HEADWEAR if kind != "none"]
    + [{"bag": kind} for kind in BAGS if kind != "none"]
    + [{"glasses": True}, {"beard": True}, {"scarf": (200, 0, 0)}, {"boots": True}, {"girth": 1.3}, {"head": 1.14}],
    ids=lambda c: str(next(iter(c.values()))),
)
def test_everything_that_makes_a_person_can_be_seen(changes):
    other = Person(**{"top": PLAIN.top, "bottom": PLAIN.bottom} | changes)
    assert max(np.abs(drawn(other, yaw) - drawn(PLAIN, yaw)).max() for yaw in (0.3, 2.8)) > 20


def test_the_view_decides_what_is_seen():
    def visible(yaw, colour=(250, 0, 250), **changes):
        image = drawn(Person(**{"top": PLAIN.top, "bottom": PLAIN.bottom} | changes), yaw)
        return int(
            (
                np.abs(image / np.maximum(image.max(axis=2, keepdims=True), 1) - np.array(colour) / 250).max(axis=2)
                < 0.05
            ).sum()
        )

    logo = {"top": Garment("t-shirt", (40, 80, 160), "logo", (250, 0, 250))}
    assert visible(0, **logo) > 20 and visible(math.pi, **logo) == 0
    inner = {"top": Garment("open jacket", (40, 80, 160)), "inner": (250, 0, 250)}
    assert visible(0, **inner) > 40 and visible(math.pi, **inner) == 0
    pack = {"bag": "backpack", "bag_colour": (250, 0, 250)}
    assert visible(math.pi, **pack) > 3 * visible(0, **pack) > 0


def test_every_part_has_a_number_that_fits_a_byte():
    for number in range(50):
        body = build(
            draw_person(stream(number), make_fashion(0)), Pose(0.3 * number, 1), Frame(32, 6, 116, 0.3 * number)
        )
        parts = rasterise(body, 128, 64)
        assert parts.max() <= len(body.parts) < 256 and (parts > 0).mean() > 0.1


def test_what_is_nearer_covers_what_is_farther():
    body = build(PLAIN, Pose(), Frame(32, 6, 116))
    parts = rasterise(body, 128, 64)
    assert [part.layer for part in body.parts] == sorted(part.layer for part in body.parts)
    body.parts = body.parts[:3]
    fewer = rasterise(body, 128, 64)
    assert np.all((parts == fewer) | (parts > 3))
