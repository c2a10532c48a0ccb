"""The store: decoding in every mode, names, threads and injected faults."""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import affscl.data.store
from affscl.data.datasets import Sample
from affscl.data.store import PART, ImageStore, as_rgb, cache_folder, eight_bits, load_crop, store_name, try_crop
from affscl.data.synthetic import draft_of, sweep

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

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-1],
            lambda data: data[: len(data) // 2],
            lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
            lambda data: data[:-40] + bytes([data[-40] ^ 4]) + data[-39:],
            lambda data: data[:-1] + bytes([data[-1] ^ 128]),
            lambda data: data.replace(b"(12, 3,", b"(11, 3,"),
            lambda data: b"\x93NUMPY\x01\x00" + os.urandom(200),
            lambda data: data + b"\0",
        ],
    )
    def test_a_damaged_store_is_made_again_and_said(self, damage, samples, cache):
        path = ImageStore(samples, 40, 20, cache).path
        whole = path.read_bytes()
        path.unlink()  # the store above still maps the old file
        path.write_bytes(damage(whole))
        with pytest.warns(UserWarning, match="damaged"):
            again = ImageStore(samples, 40, 20, cache)
        assert path.read_bytes() == whole and bytes.fromhex(again.digest) == whole[-32:]

    def test_drafts_of_dead_processes_go_and_those_of_living_ones_stay(self, samples, cache):
        cache.mkdir()
        dead = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pathlib; from affscl.data.synthetic import draft_of;"
                "draft_of(pathlib.Path(sys.argv[1])).touch()",
                str(cache / "a.npy"),
            ],
            check=True,
        )
        assert dead.returncode == 0 and len(list(cache.iterdir())) == 1
        mine, foreign, folder = draft_of(cache / "b.npy"), cache / ".c@elsewhere@1@00000000", draft_of(cache / "d")
        mine.touch()
        foreign.touch()
        folder.mkdir()
        path = ImageStore(samples, 40, 20, cache).path
        assert set(cache.iterdir()) == {path, mine, foreign, folder}
        os.utime(mine, (1, 1))  # older than this process: somebody else had its number
        os.utime(foreign, (1, 1))
        assert set(sweep(cache)) == {mine, foreign} and set(cache.iterdir()) == {path, folder}

    def test_no_home(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
        with pytest.raises(ValueError, match="--cache"):
            cache_folder()

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
        with pytest.raises(OSError, match=r"12 decoded crops of 40 x 20 \(0.00 GB\).*No space left"):
            ImageStore(samples, 40, 20, cache)

    def test_a_disk_without_space_is_told_before_a_crop_is_decoded(self, samples, cache, monkeypatch):
        free = shutil.disk_usage(cache.parent)._replace(free=12 * 3 * 400 * 200 - 1)
        monkeypatch.setattr(affscl.data.store.shutil, "disk_usage", lambda _: free)
        monkeypatch.setattr(affscl.data.store, "load_crop", lambda *_: pytest.fail("decoded"))
        with pytest.raises(
            OSError, match=r"of 400 x 200 \(0.00 GB\) in .*: only 0.00 GB are free. Set .cache. \(--cache\)"
        ):
            ImageStore(samples, 400, 200, cache)
        assert not cache.exists() or not list(cache.iterdir())
        monkeypatch.undo()
        assert len(ImageStore(samples, 40, 20, cache)) == 12

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


def ramp(height=16, width=32):
    """Grey values from 0 to 255, all of them."""
    return np.arange(256, dtype=np.uint8).repeat(height * width // 256).reshape(height, width)


def colours(height=16, width=32):
    """An RGB image in which no two corners are alike."""
    down, right = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([down * 15, right * 8, (down + right) * 5], 2).astype(np.uint8))


def opaque_in(mode):
    """The image of `colours` in any mode, and what it should look like in RGB."""
    image, grey = colours(), np.stack([ramp()] * 3, 2)
    if mode.startswith("I;16"):
        kind = {"B": ">u2", "N": "=u2"}.get(mode[-1], "<u2")
        return Image.frombytes(mode, (32, 16), (ramp().astype(np.uint16) * 257).astype(kind).tobytes()), grey
    if mode in ("I", "F"):
        return Image.fromarray(ramp().astype({"I": np.int32, "F": np.float32}[mode])), grey
    if mode == "LAB":
        return Image.frombytes(
            "LAB", (32, 16), np.asarray(image).tobytes()
        ), None  # any colours; no other decoder at hand
    if mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    if mode == "PA":
        image = image.convert("P")
    image = image.convert(mode)
    plain = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    return image, np.asarray((image.convert(plain) if plain else image).convert("RGB"))


class TestModes:
    @pytest.mark.parametrize("mode", Image.MODES)
    def test_every_mode_that_pillow_has(self, mode):
        if mode == "LAB" and not features.check("littlecms2"):
            pytest.skip("this Pillow was built without colour management")
        image, expected = opaque_in(mode)
        rgb = as_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (32, 16) and np.asarray(rgb).std() > 20
        assert expected is None or np.array_equal(np.asarray(rgb), expected)

    @pytest.mark.parametrize("mode", Image.MODES)
    def test_every_mode_in_every_kind_of_file(self, mode, tmp_path):
        """Whatever a file holds, it decodes to what the same pixels in memory do, or nearly if the kind loses some."""
        image, _ = opaque_in(mode)
        for kind in ("png", "tif", "jpg", "webp", "gif", "bmp", "ppm", "tga"):
            path = tmp_path / f"a.{kind}"
            if kind in ("webp", "gif") and mode.startswith("I;16"):
                continue  # Pillow itself writes white
            if kind == "png" and mode == "I":
                continue  # until Pillow 13 that is a file of 16 bits, in which these numbers are nearly black
            try:
                image.save(path)
                with Image.open(path) as again:
                    again.load()
                    exact = kind not in ("jpg", "webp", "gif") and again.mode == mode
            except (OSError, ValueError):
                continue  # there is no such kind of this mode, or Pillow does not read its own (YCbCr in tif, 12.3)
            crop = load_crop(path, 16, 32)
            assert crop.shape == (3, 16, 32) and crop.dtype == np.uint8 and crop.std() > 20, kind
            assert not exact or np.array_equal(crop.transpose(1, 2, 0), as_rgb(image)), kind

    @pytest.mark.parametrize(
        "kind, modes", [("jpg", ["RGB", "L", "CMYK", "YCbCr", "1"]), ("png", ["RGB", "L", "P", "1"]), ("bmp", ["RGB"])]
    )
    def test_ordinary_files_keep_their_bytes(self, kind, modes, tmp_path):
        noise, path = np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8), tmp_path / f"a.{kind}"
        for mode in modes:
            Image.fromarray(noise).convert(mode).save(path)
            with Image.open(path) as image:
                expected = np.asarray(image.convert("RGB").resize((20, 40), Image.Resampling.BICUBIC))
            assert np.array_equal(load_crop(path, 40, 20).transpose(1, 2, 0), expected)


class TestDeepPixels:
    def of(self, values, kind):
        return np.asarray(eight_bits(Image.fromarray(np.array([values]).astype(kind))))[0].tolist()

    def test_sixteen_bits_by_their_full_range(self):
        assert self.of([0, 128, 129, 257, 32768, 65406, 65407, 65535], np.uint16) == [0, 0, 1, 1, 128, 254, 255, 255]
        assert self.of([0, 4095], np.uint16) == [0, 16]  # 12 bits in 16: dark, as the table says

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    def test_values_of_a_byte_stay(self, kind):
        assert self.of([0, 7, 200], kind) == [0, 7, 200] and self.of([3, 255], kind) == [3, 255]

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    @pytest.mark.parametrize(
        "values, expected",
        [
            ([0, 500, 1000], [0, 128, 255]),
            ([-100, 0, 100], [0, 128, 255]),
            ([-2147483648, 0, 2147483520], [0, 128, 255]),
            ([1000, 1000], [0, 0]),
            ([-1, -1], [0, 0]),
            ([16000, 16256], [0, 255]),
        ],
    )
    def test_others_by_their_own_range(self, kind, values, expected):
        assert self.of(values, kind) == expected

    def test_floats_up_to_one(self):
        assert self.of([0, 0.5, 1], np.float32) == [0, 128, 255]
        assert self.of([0, 0.1], np.float32) == [0, 26] and self.of([0, 0], np.float32) == [0, 0]
        assert self.of([0, 1], np.int32) == [0, 1]  # whole numbers are no shares

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_floats_that_are_no_numbers_are_reported(self, bad, cache, tmp_path):
        values = np.full((8, 4), 3, np.float32)
        values[2, 1] = bad
        Image.fromarray(values).save(tmp_path / "bad.tif")
        with pytest.raises(ValueError, match=r"1 of 1 images.*\n.*bad\.tif: ValueError: some pixels are not finite"):
            ImageStore([Sample(str(tmp_path / "bad.tif"))], 8, 4, cache)

    def test_signed_16_bits(self, tmp_path):
        """Pillow writes no such file: a TIFF of unsigned 16 bits is told that it is signed."""
        Image.fromarray(np.full((2, 2), 7, np.uint16)).save(tmp_path / "a.tif", tiffinfo={339: 2})
        assert load_crop(tmp_path / "a.tif", 2, 2).max() == 7  # mode I, values of a byte


class TestTransparency:
    MASK = np.tile(np.arange(32) < 16, (16, 1))  # the left half is opaque

    def expected(self):
        return np.asarray(colours()) * self.MASK[:, :, None]

    def cut_out(self):
        image = colours().convert("RGBA")
        image.putalpha(Image.fromarray((255 * self.MASK).astype(np.uint8)))
        return image

    def test_lies_over_black(self):
        assert np.array_equal(as_rgb(self.cut_out()), self.expected())
        assert np.array_equal(as_rgb(self.cut_out().convert("RGBa")), self.expected())

    @pytest.mark.parametrize("mode", ["LA", "La"])
    def test_grey(self, mode):
        image = self.cut_out().convert("LA")
        expected = np.asarray(colours().convert("L")) * self.MASK
        assert np.array_equal(np.asarray(as_rgb(image.convert(mode)))[:, :, 1], expected)

    def test_half_transparent(self):
        image = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
        assert np.asarray(as_rgb(image))[0, 0].tolist() == [100, 50, 25]

    @pytest.mark.parametrize("kind", ["png", "webp", "tif", "tga"])
    def test_in_files(self, kind, tmp_path):
        self.cut_out().save(tmp_path / f"a.{kind}", **dict(lossless=True, exact=True) if kind == "webp" else {})
        assert np.array_equal(load_crop(tmp_path / f"a.{kind}", 16, 32).transpose(1, 2, 0), self.expected())

    @pytest.mark.parametrize(
        "kind, mode, colour",
        [
            ("png", "RGB", (0, 8, 5)),
            ("png", "L", 40),
            ("png", "P", None),
            ("png", "1", 255),
            ("gif", "L", 40),
            ("gif", "P", None),
            ("gif", "1", 255),
        ],
    )
    def test_one_transparent_colour(self, kind, mode, colour, tmp_path):
        """A PNG or GIF may name one colour that is not to be seen, in modes without a channel for it."""
        image = colours().convert(mode)
        image.save(tmp_path / f"a.{kind}", transparency=image.getpixel((0, 0)) if colour is None else colour)
        with Image.open(tmp_path / f"a.{kind}") as again:
            seen = np.asarray(again.convert("RGBA"))
        crop = load_crop(tmp_path / f"a.{kind}", 16, 32).transpose(1, 2, 0)
        assert (seen[:, :, 3] == 0).any() and (crop[seen[:, :, 3] == 0] == 0).all()
        assert np.array_equal(crop[seen[:, :, 3] == 255], seen[seen[:, :, 3] == 255][:, :3])

    def test_the_first_picture_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        for kind in ("gif", "png", "webp", "tif"):
            frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
            assert load_crop(tmp_path / f"a.{kind}", 4, 4)[:, 0, 0].argmax() == 0


class TestOrientation:
    @pytest.mark.parametrize("number", range(1, 9))
    @pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
    def test_every_note_in_every_kind_of_file(self, number, kind, tmp_path):
        note = Image.Exif()
        note[0x0112] = number
        colours().save(tmp_path / f"a.{kind}", exif=note)
        with Image.open(tmp_path / f"a.{kind}") as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        with Image.open(tmp_path / f"a.{kind}") as image:
            assert np.array_equal(as_rgb(image), expected)
        assert expected.shape[:2] == ((16, 32) if number < 5 else (32, 16))

    def test_by_hand(self):
        """Where the white pixel at the top left has to go, for each number."""
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[0, 0] = 255
        image = Image.fromarray(pixels)
        for number, corner in {
            1: (0, 0),
            2: (0, 2),
            3: (1, 2),
            4: (1, 0),
            5: (0, 0),
            6: (0, 1),
            7: (2, 1),
            8: (2, 0),
        }.items():
            image.getexif()[0x0112] = number
            assert np.argwhere(np.asarray(as_rgb(image))[:, :, 0]).tolist() == [list(corner)], number

    @pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P", "F"])
    def test_in_other_modes(self, mode, tmp_path):
        note = Image.Exif()
        note[0x0112] = 6
        image, expected = opaque_in(mode)
        kind = "tif" if mode == "F" else "png"
        image.save(tmp_path / f"a.{kind}", exif=note)
        assert np.array_equal(load_crop(tmp_path / f"a.{kind}", 32, 16).transpose(1, 2, 0), np.rot90(expected, -1))

    @pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
    @pytest.mark.parametrize("rubbish", [b"Exif\0\0rubbish", b"x", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
    def test_damaged_notes_say_nothing(self, kind, rubbish, tmp_path):
        colours().save(tmp_path / f"a.{kind}", exif=rubbish)
        colours().save(tmp_path / f"b.{kind}")
        assert np.array_equal(load_crop(tmp_path / f"a.{kind}", 16, 32), load_crop(tmp_path / f"b.{kind}", 16, 32))

    @pytest.mark.parametrize("number", [0, 9, 65535])
    def test_numbers_without_meaning(self, number, tmp_path):
        note = Image.Exif()
        note[0x0112] = number
        colours().save(tmp_path / "a.png", exif=note)
        assert np.array_equal(load_crop(tmp_path / "a.png", 16, 32).transpose(1, 2, 0), colours())


class TestPrograms:
    @pytest.mark.parametrize("name", ["x.eps", "x.jpg", "x.png"])
    def test_a_picture_that_is_a_program_is_not_run(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("run"))
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
        assert "PostScript" in try_crop(tmp_path / name, 8, 4)


class TestNames:
    def test_another_way_of_decoding_is_another_store(self, samples, cache, monkeypatch):
        old = ImageStore(samples, 40, 20, cache)
        monkeypatch.setattr(affscl.data.store, "DECODING", 99)
        new = ImageStore(samples, 40, 20, cache)
        assert new.path != old.path and list(cache.iterdir()) == [new.path]  # the old one goes

    def test_no_store_of_the_first_edition_is_found(self, samples, cache):
        """The name that the same crops had before images were turned and deep pixels scaled."""
        paths = [sample.path for sample in samples]
        which, state = hashlib.sha256(b"bicubic 40x20"), hashlib.sha256()
        for path in paths:
            which.update(os.fsencode(path) + b"\0")
            state.update(f"{path}\0{os.stat(path).st_size} {os.stat(path).st_mtime_ns}\0".encode())
        old = cache / f"{which.hexdigest()[:16]}-{state.hexdigest()[:16]}.npy"
        cache.mkdir()
        old.touch()
        assert store_name(paths, 40, 20) != old.name
        ImageStore(samples, 40, 20, cache)
        assert not old.exists()


class TestLargeFiles:
    """JPEG files are decoded no larger than need be; what comes out is nearly the same."""

    @pytest.fixture
    def decoded(self, monkeypatch):
        """The sizes in which pictures were decoded."""
        sizes = []

        def spy(image):
            sizes.append(image.size)
            return as_rgb(image)

        monkeypatch.setattr(affscl.data.store, "as_rgb", spy)
        return sizes

    def saved(self, path, times, **words):
        """A smooth picture of `times` 24 x 48 pixels, as a file."""
        x, y = np.meshgrid(np.linspace(0, 6, 24 * times), np.linspace(0, 6, 48 * times))
        waves = 127 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)
        Image.fromarray(waves.astype(np.uint8)).save(path, **words)
        return path

    @pytest.mark.parametrize(("times", "part"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (9, 4), (16, 8), (40, 8)])
    def test_no_larger_than_need_be(self, tmp_path, decoded, times, part):
        path = self.saved(tmp_path / "a.jpg", times, quality=95)
        crop = load_crop(path, 48, 24)
        assert decoded == [(24 * times // part, 48 * times // part)]
        whole = Image.open(path).resize((24, 48), Image.Resampling.BICUBIC)
        assert np.abs(crop - np.asarray(whole).transpose(2, 0, 1).astype(float)).mean() < 1

    def test_the_narrower_side_decides(self, tmp_path, decoded):
        load_crop(self.saved(tmp_path / "a.jpg", 8), 48, 90)
        assert decoded == [(192, 384)]

    @pytest.mark.parametrize("kind", ["png", "webp", "tif", "bmp"])
    def test_other_kinds_are_read_whole(self, tmp_path, decoded, kind):
        load_crop(self.saved(tmp_path / f"a.{kind}", 8), 48, 24)
        assert decoded == [(192, 384)]

    def test_grey_ones_too_and_in_print_colours(self, tmp_path, decoded):
        for mode in ("L", "CMYK"):
            Image.open(self.saved(tmp_path / "a.png", 8)).convert(mode).save(tmp_path / "b.jpg", quality=95)
            whole = Image.open(tmp_path / "b.jpg").convert("RGB").resize((24, 48), Image.Resampling.BICUBIC)
            crop = load_crop(tmp_path / "b.jpg", 48, 24)
            assert np.abs(crop - np.asarray(whole).transpose(2, 0, 1).astype(float)).mean() < 2
        assert decoded == [(48, 96)] * 2

    def test_one_on_its_side_is_turned(self, tmp_path):
        upright = Image.open(self.saved(tmp_path / "a.png", 8))
        note = Image.Exif()
        note[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.jpg", exif=note, quality=95)
        wanted = np.asarray(upright.resize((24, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert np.abs(load_crop(tmp_path / "b.jpg", 48, 24) - wanted.astype(float)).mean() < 1.5

    def test_one_that_is_cut_off_is_still_refused(self, tmp_path):
        path = self.saved(tmp_path / "a.jpg", 8)
        path.write_bytes(path.read_bytes()[:3000])
        assert "truncated" in try_crop(path, 48, 24)
