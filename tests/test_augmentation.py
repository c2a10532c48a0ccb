"""Normalisation, moves and erasing, against naive versions and by counting."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.augmentation import ATTEMPTS, DRAWS, MEAN, STD, augment, erase_boxes, moved, normalise


def random_crops(n, height=32, width=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


class TestNormalise:
    def test_formula(self):
        images = random_crops(4)
        expected = (images.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(
            STD
        ).double().view(3, 1, 1)
        torch.testing.assert_close(normalise(images).double(), expected, atol=1e-5, rtol=1e-5)
        assert normalise(images).dtype == torch.float32

    def test_by_hand(self):
        white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
        torch.testing.assert_close(
            normalise(white).flatten(), torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4, rtol=0
        )

    def test_leaves_its_input_alone(self):
        images = random_crops(2)
        before = images.clone()
        normalise(images)
        augment(images, np.random.default_rng(0))
        assert torch.equal(images, before)


class TestAugment:
    def test_off_is_normalise(self):
        images = random_crops(5)
        assert torch.equal(augment(images, np.random.default_rng(0), flip=0, pad=0, erase=0), normalise(images))

    def test_flip_always(self):
        images = random_crops(5)
        assert torch.equal(augment(images, np.random.default_rng(0), flip=1, pad=0, erase=0), normalise(images.flip(3)))

    def test_flip_half_the_time(self):
        images = random_crops(1).repeat(2000, 1, 1, 1)
        out = augment(images, np.random.default_rng(0), pad=0, erase=0)
        flipped = (out == normalise(images[:1].flip(3))).flatten(1).all(1)
        assert ((out == normalise(images[:1])).flatten(1).all(1) ^ flipped).all()
        assert 900 < flipped.sum() < 1100

    @given(down=st.integers(-7, 7), right=st.integers(-5, 5), mirror=st.booleans())
    @settings(deadline=None, max_examples=60)
    def test_moved_is_padding_and_cutting(self, down, right, mirror):
        image = random_crops(1, 8, 6)[0].numpy()
        source = image[:, :, ::-1] if mirror else image
        expected = np.zeros_like(image)
        for y in range(8):
            for x in range(6):
                if 0 <= y - down < 8 and 0 <= x - right < 6:
                    expected[:, y, x] = source[:, y - down, x - right]
        assert np.array_equal(moved(image, mirror, down, right), expected)

    def test_every_offset_comes_equally_often(self):
        """One white pixel in the middle tells how far a crop was moved."""
        images = torch.zeros(9000, 3, 9, 9, dtype=torch.uint8)
        images[:, :, 4, 4] = 255
        out = augment(images, np.random.default_rng(0), flip=0, pad=1, erase=0)
        places = Counter(map(tuple, (out[:, 0] > 0).nonzero()[:, 1:].tolist()))
        assert set(places) == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
        assert all(880 < count < 1120 for count in places.values())

    def test_the_border_is_black(self):
        white = torch.full((40, 3, 32, 16), 255, dtype=torch.uint8)
        out = augment(white, np.random.default_rng(0), pad=10, erase=0)
        black, bright = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)), normalise(white[:1, :, :1, :1])
        assert ((out == black).all(1) | (out == bright).all(1)).all()
        assert (out == black).any()

    def test_erased_pixels_are_exactly_zero_and_a_rectangle(self):
        """No colour of a byte is normalised to exactly 0, so zeros are erased pixels and nothing else."""
        every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 3, 256, 1)
        assert (normalise(every_byte) != 0).all()
        images = random_crops(300, 64, 32)
        out = augment(images, np.random.default_rng(0), flip=0, pad=0, erase=1)
        for x, original in zip(out, normalise(images), strict=True):
            hole = (x == 0).all(0)
            rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
            high, wide = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
            assert hole.sum() == high * wide
            assert torch.equal(x[:, ~hole], original[:, ~hole])
            # rounding to whole pixels moves the limits by at most half a pixel on each side
            assert (high - 0.5) * (wide - 0.5) <= 0.4 * 64 * 32 and (high + 0.5) * (wide + 0.5) >= 0.02 * 64 * 32
            assert (high - 0.5) / (wide + 0.5) <= 1 / 0.3 and (high + 0.5) / (wide - 0.5) >= 0.3

    def test_erases_half_the_time(self):
        out = augment(random_crops(2000, 16, 8), np.random.default_rng(0), flip=0, pad=0)
        assert 900 < (out == 0).flatten(1).any(1).sum() < 1100

    @given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**32))
    @settings(deadline=None, max_examples=60)
    def test_boxes_lie_inside(self, height, width, seed):
        draws = np.random.default_rng(seed).random((50, 2 + 2 * ATTEMPTS))
        draws[:5] = np.nextafter(1, 0)  # the largest numbers a generator gives
        draws[5:10] = 0
        for top, left, high, wide in erase_boxes(draws, height, width):
            assert top >= 0 and left >= 0 and 0 <= high < height and 0 <= wide < width
            assert top + high <= height and left + wide <= width

    def test_boxes_reach_every_corner(self):
        top, left, high, wide = erase_boxes(np.random.default_rng(0).random((4000, 2 + 2 * ATTEMPTS)), 16, 8).T
        assert top.min() == left.min() == 0 and (top + high).max() == 16 and (left + wide).max() == 8

    def test_the_first_fitting_attempt_counts(self):
        """Ten attempts by hand: too wide, then one that fits, then another that would fit."""
        draws = np.zeros((2, 2 + 2 * ATTEMPTS))
        draws[:, 2 : 2 + ATTEMPTS] = 1  # 40 % of 64 x 32 = 819 pixels
        draws[:, 2 + ATTEMPTS :] = 0  # aspect 0.3: 16 x 52, wider than 32
        draws[0, 2 + ATTEMPTS + 3] = (2 - 0.3) / (1 / 0.3 - 0.3)  # aspect 2: 40 x 20
        draws[0, 2 + ATTEMPTS + 4] = (1 - 0.3) / (1 / 0.3 - 0.3)  # aspect 1: 29 x 29
        boxes = erase_boxes(draws, 64, 32)
        assert boxes[0].tolist() == [0, 0, 40, 20] and boxes[1, 2] == 0

    @given(st.integers(0, 6), st.integers(0, 2**32))
    @settings(deadline=None, max_examples=30)
    def test_crops_do_not_depend_on_the_crops_before(self, first, seed):
        images = random_crops(6)
        rng = np.random.default_rng(seed)
        rng.bit_generator.advance(first * DRAWS)
        assert torch.equal(
            augment(images[first:], rng, pad=3), augment(images, np.random.default_rng(seed), pad=3)[first:]
        )

    @pytest.mark.parametrize("pad", [16, 40, -1])
    def test_pad_must_fit(self, pad):
        with pytest.raises(ValueError, match="32 x 16"):
            augment(random_crops(1), np.random.default_rng(0), pad=pad)

    def test_widest_pad(self):
        assert augment(random_crops(200), np.random.default_rng(0), pad=15).isfinite().all()
