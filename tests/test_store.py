"""The store: decoding in every mode, names, threads and injected faults."""

import io
import os
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import affscl.data.store
from affscl.data.datasets import Sample
from affscl.data.store import PART, ImageStore, cache_folder

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
        real = affscl.data.store.try_crop

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
        decoded, writing = Counter(), affscl.data.store.try_crop

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
        Path(samples[1].path).write_bytes(b"")
        os.remove(samples[4].path)
        data = Path(samples[6].path).read_bytes()
        Path(samples[6].path).write_bytes(data[: len(data) // 2])
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
