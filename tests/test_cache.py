"""The cache: what is ours is found and nothing else, deleted on request, and bounded by itself."""

import os
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from affscl.data import store as stores
from affscl.data.datasets import Sample
from affscl.data.store import STORE, ImageStore, bound_stores, store_name
from affscl.data.synthetic import draft_of, make_dataset
from affscl.use.cache import CacheArguments, cache_command, cache_items, cache_run, told_size

DAY = 86_400


def crops(folder, n=3):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.new("RGB", (8, 16), (i, 0, 0)).save(folder / f"{i}.png")
    return [Sample(str(folder / f"{i}.png")) for i in range(n)]


def aged(path, days):
    os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def full(tmp_path):
    """A cache with one thing of each kind, and things of somebody else's beside them."""
    cache = tmp_path / "cache"
    ImageStore(crops(tmp_path / "crops"), 16, 8, cache=cache, progress=False)
    make_dataset(cache / "worlds" / "one", n_ids=4, n_cams=2, seed=0)
    (cache / "compiled" / "deep").mkdir(parents=True)
    (cache / "compiled" / "deep" / "code.nbc").write_bytes(b"1" * 100)
    draft = draft_of(cache / "x.npy")
    draft.with_name(re.sub(r"@\d+@", "@999999999@", draft.name)).write_bytes(b"half")
    for name in ("holiday.npy", "0123456789abcdef.npy", "notes.txt", "worlds/readme.txt"):
        (cache / name).write_bytes(b"mine")
    (cache / "photos").mkdir()
    (cache / "photos" / f"{'0' * 16}-{'1' * 16}.npy").write_bytes(b"mine")
    (cache / f"{'0' * 16}-{'2' * 16}.npy").symlink_to(tmp_path / "crops" / "0.png")
    return cache


def test_ours_and_nothing_else(full, capsys):
    found = cache_items(full)
    assert sorted(item.kind for item in found) == ["compiled", "draft", "store", "world"]
    assert all(item.size > 0 and time.time() - item.used < DAY for item in found)
    others = {path for path in full.rglob("*") if not any(path.is_relative_to(item.path) for item in found)}
    cache_command(["--cache", str(full)])
    assert cache_items(full) == found and "4 items" in capsys.readouterr().out, "a look deletes nothing"
    cache_command(["--cache", str(full), "--empty"])
    assert set(full.rglob("*")) == others and (full / "holiday.npy").read_bytes() == b"mine"
    out = capsys.readouterr().out
    assert f"Freed: {told_size(sum(item.size for item in found))}" in out and not cache_items(full)


def test_only_what_is_unused(full):
    (store,) = (item for item in cache_items(full) if item.kind == "store")
    aged(store.path, 40)
    assert [item.path for item in cache_run(CacheArguments(str(full), unused=30))] == [store.path]
    cache_run(CacheArguments(str(full), empty=True, unused=30))
    assert sorted(item.kind for item in cache_items(full)) == ["compiled", "draft", "world"]


def test_an_open_store_survives_and_comes_back(tmp_path):
    cache, samples = tmp_path / "cache", crops(tmp_path / "crops")
    store = ImageStore(samples, 16, 8, cache=cache, progress=False)
    before = store.batch([0, 1, 2])
    cache_run(CacheArguments(str(cache), empty=True))
    assert (store.batch([0, 1, 2]) == before).all() and not store.path.exists()
    assert (ImageStore(samples, 16, 8, cache=cache, progress=False).batch([0, 1, 2]) == before).all()


@pytest.mark.parametrize(
    "words, told",
    [
        (["--unused", "-1"], "--unused -1"),
        (["--unused", "nan"], "--unused"),
        (["--unused", "soon"], "--unused"),
        (["--cache", "FILE"], "is a file"),
        (["--emty"], "--empty"),
    ],
)
def test_mistakes(words, told, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        cache_command([str(tmp_path / "file") if word == "FILE" else word for word in words])
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_a_cache_that_is_not_there(tmp_path, capsys):
    cache_command(["--cache", str(tmp_path / "none"), "--empty"])
    assert "0 bytes in 0 items" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_what_cannot_be_removed_is_told(full, capsys, monkeypatch):
    real = Path.unlink

    def refused(self, **more):
        if re.fullmatch(STORE, self.name):
            raise PermissionError(13, "in use", str(self))
        return real(self, **more)

    monkeypatch.setattr(Path, "unlink", refused)
    cache_command(["--cache", str(full), "--empty"])
    assert "stays: " in capsys.readouterr().out and [item.kind for item in cache_items(full)] == ["store"]


class TestTheBound:
    def filled(self, folder, ages):
        """Stores of 1000 bytes, unused for so many days."""
        paths = []
        for i, days in enumerate(ages):
            paths.append(folder / store_name([f"/{i}.jpg"], 8, 8))
            paths[-1].write_bytes(b"x" * 1000)
            aged(paths[-1], days)
        return paths

    @pytest.mark.parametrize("limit, left", [("1", 5), ("0.000004", 4), ("0.000003", 3), ("0", 2)])
    def test_the_longest_unused_go_first_and_none_of_this_week(self, tmp_path, monkeypatch, limit, left):
        paths = self.filled(tmp_path, [9, 30, 1, 20, 6])
        (tmp_path / "mine.npy").write_bytes(b"x" * 9000)
        aged(tmp_path / "mine.npy", 99)
        monkeypatch.setenv("AFFSCL_CACHE_GB", limit)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            bound_stores(tmp_path)
        order = [paths[i] for i in (1, 3, 0)]
        assert [path for path in paths if path.exists()] == [p for p in paths if p not in order[: 5 - left]]
        assert len(told) == (left < 5) and (tmp_path / "mine.npy").exists()

    def test_a_new_store_makes_room(self, tmp_path, monkeypatch):
        paths = self.filled(tmp_path, [9, 1])
        monkeypatch.setenv("AFFSCL_CACHE_GB", "0.0000001")
        with pytest.warns(UserWarning, match="unused for a week"):
            made = ImageStore(crops(tmp_path / "crops"), 16, 8, cache=tmp_path, progress=False)
        assert made.path.exists() and [path.exists() for path in paths] == [False, True]
        assert np.array_equal(made.batch([2])[0, 0], np.full((16, 8), 2))

    @pytest.mark.parametrize("given", ["much", "-1", "nan", "1e9 "])
    def test_a_bound_that_is_none_is_told(self, tmp_path, monkeypatch, given):
        monkeypatch.setenv("AFFSCL_CACHE_GB", given)
        with pytest.raises(ValueError, match="AFFSCL_CACHE_GB"):
            bound_stores(tmp_path)

    def test_no_bound_is_fifty(self, tmp_path, monkeypatch):
        monkeypatch.delenv("AFFSCL_CACHE_GB", raising=False)
        paths = self.filled(tmp_path, [99])
        bound_stores(tmp_path)
        assert paths[0].exists() and stores.UNUSED == 7 * DAY
