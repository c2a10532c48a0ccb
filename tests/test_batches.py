"""Chapter 02: the store, the augmentation, P x K batches and the loader, against naive versions and injected faults."""

import io
import os
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import affscl.data.store
from affscl.data.augmentation import ATTEMPTS, DRAWS, MEAN, STD, augment, erase_boxes, moved, normalise
from affscl.data.datasets import Sample
from affscl.data.sampling import camera_codes, cluster_turns, instances, pk_batches
from affscl.data.store import PART, ImageStore, cache_folder
from affscl.training.config import BatchOptions
from affscl.training.loading import train_loader

SIZES = [(48, 24), (80, 31), (20, 20), (64, 32)]


@pytest.fixture
def samples(tmp_path):
    """Twelve crops of noise in several sizes, formats and colour modes."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(12):
        height, width = SIZES[i % 4]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        path = tmp_path / "crops" / f"{i:04d}_c{i % 3}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        image.convert({4: "L", 5: "P", 7: "RGBA"}.get(i, "RGB")).save(path)
        made.append(Sample(str(path), i // 2, i % 3))
    return made


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def random_crops(n, height=32, width=16, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


class TestImageStore:
    def test_equals_decoding_one_by_one(self, samples, cache):
        store = ImageStore(samples, 40, 20, cache)
        assert len(store) == 12 and store.samples == samples
        for i, sample in enumerate(samples):
            image = Image.open(sample.path).convert("RGB").resize((20, 40), Image.Resampling.BICUBIC)
            expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            assert torch.equal(store.batch([i])[0], expected)

    def test_batch_takes_any_indices_in_their_order(self, samples, cache):
        store = ImageStore(samples, 40, 20, cache)
        everything = store.batch(range(12))
        wanted = [7, 0, 7, 11]
        for indices in (wanted, np.array(wanted), torch.tensor(wanted)):
            assert torch.equal(store.batch(indices), everything[wanted])
        assert store.batch([]).shape == (0, 3, 40, 20)
        assert everything.dtype == torch.uint8

    def test_a_batch_is_a_copy(self, samples, cache):
        store = ImageStore(samples, 40, 20, cache)
        before = store.batch([3])
        store.batch([3]).zero_()
        assert torch.equal(store.batch([3]), before) and before.any()

    @pytest.mark.parametrize("workers", [1, 2, 5])
    def test_the_number_of_threads_changes_nothing(self, samples, cache, workers):
        one = ImageStore(samples, 40, 20, cache / "one", workers=1)
        other = ImageStore(samples, 40, 20, cache / "other", workers=workers)
        assert one.path.read_bytes() == other.path.read_bytes()

    def test_built_once_as_long_as_nothing_changes(self, samples, cache, monkeypatch):
        first = ImageStore(samples, 40, 20, cache)
        monkeypatch.setattr(affscl.data.store, "load_crop", lambda *_: pytest.fail("decoded again"))
        second = ImageStore(samples, 40, 20, str(cache))
        assert second.path == first.path and torch.equal(second.batch([5]), first.batch([5]))

    def test_rebuilt_when_a_file_changes_and_the_stale_store_goes(self, samples, cache):
        old = ImageStore(samples, 40, 20, cache)
        Image.new("RGB", (9, 9), (200, 0, 0)).save(samples[3].path)
        new = ImageStore(samples, 40, 20, cache)
        assert new.path != old.path and list(cache.iterdir()) == [new.path]
        assert torch.equal(new.batch([3])[0, :, 5, 5], torch.tensor([200, 0, 0], dtype=torch.uint8))
        assert torch.equal(new.batch([2]), old.batch([2]))  # and who still has the old one open keeps it

    def test_same_length_but_newer(self, samples, cache):
        old = ImageStore(samples, 40, 20, cache)
        stat = os.stat(samples[0].path)
        os.utime(samples[0].path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
        assert ImageStore(samples, 40, 20, cache).path != old.path

    def test_other_sizes_and_other_lists_live_side_by_side(self, samples, cache):
        stores = [
            ImageStore(samples, 40, 20, cache),
            ImageStore(samples, 20, 40, cache),
            ImageStore(samples, 20, 10, cache),
            ImageStore(samples[:5], 40, 20, cache),
            ImageStore(samples[::-1], 40, 20, cache),
        ]
        assert len({s.path for s in stores}) == len(list(cache.iterdir())) == 5

    def test_ids_are_no_part_of_the_store(self, samples, cache):
        relabelled = [Sample(s.path, None, 9, 1) for s in samples]
        store = ImageStore(samples, 40, 20, cache)
        assert ImageStore(relabelled, 40, 20, cache).path == store.path
        assert ImageStore(relabelled, 40, 20, cache).samples == relabelled

    def test_many_building_at_once(self, samples, cache):
        with ThreadPoolExecutor(6) as pool:
            stores = list(pool.map(lambda _: ImageStore(samples, 40, 20, cache, workers=1), range(6)))
        assert len({s.path for s in stores}) == 1 and list(cache.iterdir()) == [stores[0].path]
        assert all(torch.equal(s.batch(range(12)), stores[0].batch(range(12))) for s in stores)

    @pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
    def test_an_interrupted_build_leaves_nothing(self, samples, cache, monkeypatch, fault):
        real = affscl.batches.try_crop

        def interrupted(path, height, width):
            if path == samples[5].path:
                raise fault
            return real(path, height, width)

        monkeypatch.setattr(affscl.data.store, "try_crop", interrupted)
        with pytest.raises(fault):
            ImageStore(samples, 40, 20, cache)
        assert list(cache.iterdir()) == []

    def test_what_nobody_has_begun_is_cancelled(self, samples, cache, monkeypatch):
        seen = []

        def failing(path, start, paths, height, width):
            seen.append(start)
            if len(seen) > 1:
                time.sleep(0.05)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(affscl.data.store, "write_part", failing)
        with pytest.raises(OSError, match="No space left"):
            ImageStore(samples * 200, 4, 2, cache, workers=1)
        assert len(seen) < 12 * 200 / PART / 2

    @pytest.mark.parametrize("part", [1, 5, 12, 100])
    def test_parts_of_any_length_leave_the_same_bytes(self, samples, cache, monkeypatch, part):
        whole = ImageStore(samples, 40, 20, cache / "whole").path.read_bytes()
        monkeypatch.setattr(affscl.data.store, "PART", part)
        assert ImageStore(samples, 40, 20, cache / "parts", workers=3).path.read_bytes() == whole

    def test_few_crops_are_in_memory_at_a_time(self, samples, cache, monkeypatch):
        """A decoded crop is written before the same thread decodes another."""
        decoded, writing = Counter(), affscl.batches.try_crop

        def counting(path, height, width):
            decoded[threading.get_ident()] += 1
            on_disk = sum(p.stat().st_size for p in cache.iterdir())
            assert on_disk >= 128 + 3 * 40 * 20 * (decoded[threading.get_ident()] - 1) - io.DEFAULT_BUFFER_SIZE
            return writing(path, height, width)

        monkeypatch.setattr(affscl.data.store, "try_crop", counting)
        ImageStore(samples * 10, 40, 20, cache, workers=1)
        assert sum(decoded.values()) == 120

    def test_leftovers_of_a_killed_process_go_after_a_day(self, samples, cache):
        store = ImageStore(samples, 40, 20, cache)
        key = store.path.name.split("-")[0]
        yesterday, today, foreign = (cache / name for name in (f"{key}-a.tmp", f"{key}-b.tmp", "other-c.tmp"))
        for path in (yesterday, today, foreign):
            path.touch()
        for path in (yesterday, foreign):
            os.utime(path, (1, 1))
        store.path.unlink()
        ImageStore(samples, 40, 20, cache)
        assert set(cache.iterdir()) == {store.path, today, foreign}

    def test_unreadable_images_are_all_named_with_reasons(self, samples, cache, tmp_path):
        open(samples[1].path, "wb").close()
        os.remove(samples[4].path)
        data = open(samples[6].path, "rb").read()
        open(samples[6].path, "wb").write(data[: len(data) // 2])
        with pytest.raises(ValueError) as error:
            ImageStore(samples, 40, 20, cache)
        lines = str(error.value).splitlines()
        assert "3 of 12 images" in lines[0] and len(lines) == 4
        for line, i, reason in zip(lines[1:], (1, 4, 6), ("cannot identify", "no such file", "truncated"), strict=True):
            assert samples[i].path in line and reason in line.lower()
        assert list(cache.iterdir()) == []

    def test_a_long_list_of_unreadable_images_is_cut(self, cache, tmp_path):
        with pytest.raises(ValueError) as error:
            ImageStore([Sample(str(tmp_path / f"{i}.jpg")) for i in range(1234)], 8, 4, cache)
        lines = str(error.value).splitlines()
        assert lines[0].startswith("1,234 of 1,234 images") and lines[-1].endswith("1,214 more") and len(lines) == 22

    def test_no_samples(self, cache):
        with pytest.raises(ValueError, match="no samples"):
            ImageStore([], 40, 20, cache)

    def test_a_cache_that_cannot_be_written(self, samples, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="Set `cache`"):
            ImageStore(samples, 40, 20, tmp_path / "file")

    def test_a_full_disk_says_how_much_is_needed(self, samples, cache, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(affscl.data.store, "write_store", full)
        with pytest.raises(OSError, match=r"12 decoded crops \(0.00 GB\).*No space left"):
            ImageStore(samples, 40, 20, cache)

    def test_the_default_place(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "affscl" and cache_folder(tmp_path / "b") == tmp_path / "b"
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == tmp_path / "home" / ".cache" / "affscl"

    def test_travels_to_another_process_without_its_pixels(self, samples, cache):
        store = ImageStore(samples, 256, 128, cache)
        sent = pickle.dumps(store)
        assert len(sent) < 10_000
        assert torch.equal(pickle.loads(sent).batch([2, 9]), store.batch([2, 9]))

    def test_progress_is_silent_where_nobody_watches(self, samples, cache, capfd):
        ImageStore(samples, 40, 20, cache)
        assert capfd.readouterr() == ("", "")


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
    def test_rows_do_not_depend_on_the_rows_before(self, first, seed):
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


configurations = st.integers(1, 12).flatmap(
    lambda clusters: st.tuples(
        st.lists(st.integers(-1, clusters - 1), min_size=1, max_size=60).filter(lambda labels: max(labels) >= 0),
        st.integers(1, 6),
        st.integers(1, 6),
        st.integers(0, 2**32),
        st.integers(1, 4),
        st.booleans(),
        st.booleans(),
    )
)


class TestPkBatches:
    @given(configurations)
    @settings(deadline=None, max_examples=150)
    def test_the_promises(self, configuration):
        labels, p, k, seed, n_cams, with_cameras, some_unknown = configuration
        rng = np.random.default_rng(seed)
        camids = (
            [int(c) if c or not some_unknown else None for c in rng.integers(0, n_cams, len(labels))]
            if with_cameras
            else None
        )
        labels = np.array(labels)
        sizes = Counter(labels[labels >= 0].tolist())
        batches = pk_batches(labels, camids, p, k, 15, rng)
        assert len(batches) == 15
        visits = Counter({label: 0 for label in sizes})
        for batch in batches:
            assert batch.dtype == np.int64 and batch.shape == (p * k,)
            of_cluster = Counter(labels[batch].tolist())
            assert -1 not in of_cluster and len(of_cluster) == min(p, len(sizes))
            assert max(of_cluster.values()) - min(of_cluster.values()) <= (len(sizes) < p)  # exactly K, if there are P
            order = [labels[i] for i in batch]
            assert len([1 for a, b in zip(order, order[1:]) if a != b]) == len(of_cluster) - 1  # side by side
            for label, count in of_cluster.items():
                times = Counter(i for i in batch if labels[i] == label)
                assert len(times) == min(count, sizes[label])  # all distinct crops before any repeats
                assert max(times.values()) - min(times.values()) <= 1 or len(times) < sizes[label]
                self.check_cameras([i for i in batch if labels[i] == label], np.flatnonzero(labels == label), camids)
            visits.update(of_cluster.keys())
            assert max(visits.values()) - min(visits.values()) <= 1  # at every moment, not only in the end

    @staticmethod
    def check_cameras(drawn, members, camids):
        """While crops of other cameras than the anchor's are left, none of its own camera (or an unknown one) is drawn."""
        if camids is None or camids[drawn[0]] is None:
            return
        other = {i for i in members if camids[i] is not None and camids[i] != camids[drawn[0]]}
        assert set(drawn[1 : 1 + len(other)]) <= other
        assert set(drawn[1 : 1 + len(other)]) == other or len(drawn) - 1 < len(other)

    def test_the_anchor_is_any_crop(self):
        anchors = Counter(int(b[0]) for b in pk_batches([0] * 5, [1, 1, 1, 1, 2], 1, 2, 3000, np.random.default_rng(0)))
        assert set(anchors) == set(range(5)) and all(500 < count < 700 for count in anchors.values())

    def test_cameras_can_be_ignored(self):
        labels, camids = [0] * 8, [1] * 7 + [2]
        partners = {
            on: [
                camids[a] != camids[b] for a, b in pk_batches(labels, camids, 1, 2, 2000, np.random.default_rng(0), on)
            ]
            for on in (True, False)
        }
        assert np.mean(partners[True]) == 1 and 0.2 < np.mean(partners[False]) < 0.3  # 2/8 by chance

    def test_unknown_cameras_are_not_other_cameras(self):
        assert camera_codes([5, None, 3, 5]).tolist() == [1, -1, 0, 1]
        for seed in range(50):
            drawn = instances(np.arange(4), camera_codes([1, None, None, 2]), 3, np.random.default_rng(seed)).tolist()
            if drawn[0] in (0, 3):
                assert drawn[1] == 3 - drawn[0]

    def test_all_cameras_unknown_is_like_none_given(self):
        labels = np.arange(30) % 5
        a = pk_batches(labels, [None] * 30, 3, 4, 10, np.random.default_rng(0))
        b = pk_batches(labels, None, 3, 4, 10, np.random.default_rng(0))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    def test_reproducible_and_pure(self):
        labels, camids = np.arange(40) % 7 - 1, (np.arange(40) % 3).tolist()
        before = labels.copy()
        one, two = (pk_batches(labels, camids, 4, 3, 20, np.random.default_rng(3)) for _ in range(2))
        assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True)) and np.array_equal(labels, before)
        longer = pk_batches(labels, camids, 4, 3, 25, np.random.default_rng(3))
        assert all(np.array_equal(x, y) for x, y in zip(one, longer))
        tensors = pk_batches(torch.from_numpy(labels), np.array(camids), 4, 3, 20, np.random.default_rng(3))
        assert all(np.array_equal(x, y) for x, y in zip(one, tensors, strict=True))

    def test_order_of_clusters_is_shuffled(self):
        firsts = Counter(int(next(cluster_turns(4, 2, np.random.default_rng(seed)))[0]) for seed in range(400))
        assert set(firsts) == {0, 1, 2, 3} and min(firsts.values()) > 60

    @pytest.mark.parametrize("labels", [[], [-1], [-1, -1, -1]])
    def test_nothing_is_labelled(self, labels):
        with pytest.raises(ValueError, match=f"all {len(labels)} are outliers"):
            pk_batches(labels, None, 4, 2, 1, np.random.default_rng(0))

    @pytest.mark.parametrize("p, k", [(0, 4), (4, 0)])
    def test_empty_batches_are_refused(self, p, k):
        with pytest.raises(ValueError, match=f"p is {p} and k is {k}"):
            pk_batches([0, 1], None, p, k, 1, np.random.default_rng(0))

    def test_camids_of_another_length(self):
        with pytest.raises(ValueError, match="2 labels but 3 camids"):
            pk_batches([0, 1], [1, 2, 3], 1, 1, 1, np.random.default_rng(0))

    def test_no_iterations(self):
        assert pk_batches([0], None, 1, 1, 0, np.random.default_rng(0)) == []


class TestTrainLoader:
    @pytest.fixture
    def parts(self, samples, cache):
        labels = np.array([s.pid for s in samples])
        labels[-1] = -1
        store = ImageStore(samples, 32, 16, cache)
        batches = pk_batches(labels, [s.camid for s in samples], 3, 4, 5, np.random.default_rng(0))
        return store, labels, batches

    @staticmethod
    def tensors(*arguments, workers=0, **named):
        return list(train_loader(*arguments, BatchOptions(workers=workers, pad=4), **named))

    def assert_same(self, one, other):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_what_a_batch_holds(self, parts):
        store, labels, batches = parts
        for i, (images, targets, indices) in enumerate(self.tensors(*parts, seed=1, epoch=2)):
            assert torch.equal(indices, torch.from_numpy(batches[i])) and indices.dtype == torch.int64
            assert torch.equal(targets, torch.from_numpy(labels[batches[i]])) and targets.dtype == torch.int64
            expected = augment(store.batch(batches[i]), np.random.default_rng((1, 2, i)), pad=4)
            assert torch.equal(images, expected) and images.dtype == torch.float32

    def test_options_reach_the_augmentation(self, parts):
        store, labels, batches = parts
        plain = BatchOptions(flip=0, pad=0, erase=0)
        for images, _, indices in train_loader(store, labels, batches, plain, seed=0, epoch=0):
            assert torch.equal(images, normalise(store.batch(indices)))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_same_tensors_whatever_the_number_of_workers(self, parts, workers):
        self.assert_same(self.tensors(*parts, seed=3, epoch=4), self.tensors(*parts, seed=3, epoch=4, workers=workers))

    @pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
    def test_processes_share_a_batch_exactly(self, parts, world):
        whole = self.tensors(*parts, seed=3, epoch=4)
        shares = [self.tensors(*parts, seed=3, epoch=4, rank=rank, world=world) for rank in range(world)]
        self.assert_same(
            whole, [[torch.cat(rows) for rows in zip(*batch, strict=True)] for batch in zip(*shares, strict=True)]
        )

    def test_seed_epoch_and_iteration_all_matter(self, parts):
        store, labels, batches = parts
        same = [batches[0]] * 2
        runs = [self.tensors(store, labels, same, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
        seen = [images for run in runs for images, _, _ in run]
        assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    def test_global_generators_are_left_alone(self, parts):
        torch.manual_seed(5)
        np.random.seed(5)
        expected = torch.rand(3), np.random.rand(3)
        torch.manual_seed(5)
        np.random.seed(5)
        self.tensors(*parts, seed=0, epoch=0)
        assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])

    def test_batches_of_two_domains_may_be_joined(self, parts):
        store, labels, batches = parts
        joined = [np.concatenate([a, b[:4]]) for a, b in zip(batches, batches[::-1], strict=True)]
        assert [len(t) for _, t, _ in self.tensors(store, labels, joined, seed=0, epoch=0)] == [16] * 5

    def test_rows_that_do_not_divide(self, parts):
        with pytest.raises(ValueError, match="12 crops does not divide among 5"):
            self.tensors(*parts, seed=0, epoch=0, world=5)

    def test_labels_of_any_kind(self, parts):
        store, labels, batches = parts
        for kind in (labels.tolist(), torch.from_numpy(labels), labels.astype(np.int32)):
            self.assert_same(self.tensors(*parts, seed=0, epoch=0), self.tensors(store, kind, batches, seed=0, epoch=0))
