"""The gallery: the order of the naive product, filters, a table in step with its index, files that survive a crash."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from long_forms import LONG
from PIL import Image

from affscl import AFF
from affscl.data.datasets import Sample
from affscl.use.gallery import Gallery, fingerprint

OPTIONS = dict(backbone="resnet10", height=32, width=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return AFF(**OPTIONS).eval()


def unit(n, d, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def filled(model, n=60, cams=3):
    rows, made = unit(n, model.dim), Gallery(model)
    made.add(
        [Sample(f"/crops/{i}.jpg", None, i % cams) for i in range(n)],
        clusters=[i // 4 for i in range(n)],
        features=rows,
    )
    return made, rows


def numbers(hits):
    return [int(Path(hit.crop.path).stem) for hit in hits]


def test_the_order_is_that_of_the_products(model):
    made, rows = filled(model)
    queries = unit(4, model.dim, 9)
    for found in (made.search_features(queries, 12), [made.search_features(q[None], 12)[0] for q in queries]):
        for query, hits in zip(queries, found):
            products = rows @ query
            assert numbers(hits) == products.argsort(descending=True)[:12].tolist()
            assert np.allclose([hit.similarity for hit in hits], products[numbers(hits)], atol=2e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_finds_the_same(model, threads):
    made, rows = filled(model, 61)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (hits,) = made.search_features(rows[5:6], 100)
    finally:
        torch.set_num_threads(before)
    assert numbers(hits) == (rows @ rows[5]).argsort(descending=True).tolist() and len(hits) == 61


def test_cameras_are_filtered_by_number_and_name(model):
    made, rows = Gallery(model), unit(9, model.dim)
    names = ["folder:lobby", "folder:gate", None]
    crops = [Sample(f"/c/{i}.jpg", None, i % 3 if i % 3 < 2 else None) for i in range(9)]
    if "camera" in Sample._fields:
        crops = [s._replace(camera=names[i % 3]) for i, s in enumerate(crops)]
    made.add(crops, features=rows)
    if "camera" in Sample._fields:
        assert {n % 3 for n in numbers(made.search_features(rows[:1], 9, cameras=["lobby"])[0])} == {0}
    assert len(made) == 9
    (only,), (rest,) = made.search_features(rows[:1], 9, cameras=[1]), made.search_features(rows[:1], 9, without=["1"])
    assert {n % 3 for n in numbers(only)} == {1} and {n % 3 for n in numbers(rest)} == {0, 2}
    with pytest.raises(ValueError, match="no crop of camera 7; the cameras here are"):
        made.search_features(rows[:1], cameras=[7])
    with pytest.raises(ValueError, match="no crop to look at"):
        made.search_features(rows[:1], cameras=[1], without=[1])


def test_removed_and_replaced_crops_leave_table_and_index_in_step(model):
    made, rows = filled(model)
    made.remove([f"/crops/{i}.jpg" for i in (0, 17, 59)])
    made.add([Sample("/crops/30.jpg", None, 8)], features=unit(1, model.dim, 5))
    assert len(made) == 57 == made.index.ntotal
    for i in (1, 18, 58):
        assert numbers(made.search_features(rows[i : i + 1], 1)[0]) == [i]
    (hit,) = made.search_features(unit(1, model.dim, 5), 1)[0]
    assert hit.crop.path == "/crops/30.jpg" and hit.crop.camid == 8 and hit.crop.cluster is None
    with pytest.raises(ValueError, match="1 of 2 crops are not in this gallery, /crops/17.jpg first"):
        made.remove(["/crops/17.jpg", "/crops/1.jpg"])
    assert len(made) == 57


def test_a_kept_gallery_answers_as_before(model, tmp_path):
    made, rows = filled(model)
    odd = Sample('/crops/a "b", c\n\udcff.jpg', None, None)
    made.add([odd], features=unit(1, model.dim, 4))
    made.save(tmp_path / "a" / "b")
    again = Gallery.load(tmp_path / "a" / "b", model)
    assert again.table == made.table
    assert again.search_features(rows[:3]) == made.search_features(rows[:3])
    again.remove([odd.path])
    again.save(tmp_path / "a" / "b")
    assert len(Gallery.load(tmp_path / "a" / "b", model)) == 60
    assert len(list((tmp_path / "a" / "b").iterdir())) == 3


@pytest.mark.parametrize("where", ["write_index", "os.replace", "os.fsync"])
def test_a_crash_in_the_middle_leaves_the_older_gallery_whole(model, tmp_path, monkeypatch, where):
    made, rows = filled(model)
    made.save(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    owner, name = {
        "write_index": (faiss, "write_index"),
        "os.replace": (os, "replace"),
        "os.fsync": (os, "fsync"),
    }[where]
    made.remove(["/crops/3.jpg"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, crash)
        made.save(tmp_path)
    assert len(Gallery.load(tmp_path, model)) == 60
    made.save(tmp_path)
    assert len(Gallery.load(tmp_path, model)) == 59


def test_another_network_is_refused(model, tmp_path):
    made, _ = filled(model)
    made.save(tmp_path)
    for other in (AFF(**OPTIONS), AFF(**OPTIONS, mirror=True)):
        if other.options.mirror:
            other.load_state_dict(model.state_dict())
        with pytest.raises(ValueError, match="made by another network"):
            Gallery.load(tmp_path, other)
    same = AFF(**OPTIONS)
    same.load_state_dict(model.state_dict())
    assert fingerprint(same) == fingerprint(model) and len(Gallery.load(tmp_path, same)) == 60


def test_missing_and_damaged_galleries_are_told(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no gallery in"):
        Gallery.load(tmp_path / "none", model)
    made, _ = filled(model)
    made.save(tmp_path)
    (index,) = tmp_path.glob("index-*")
    index.write_bytes(index.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged: index-"):
        Gallery.load(tmp_path, model)
    (tmp_path / "gallery.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest"):
        Gallery.load(tmp_path, model)


def test_unreadable_crops_are_warned_of_and_left_out(model, tmp_path):
    for i in range(4):
        Image.new("RGB", (8, 16), (60 * i, 90, 200)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    made = Gallery(model)
    with pytest.warns(UserWarning, match="2 of 5 images cannot be read and are left out"):
        assert made.add([*sorted(tmp_path.glob("*.png")), tmp_path / "3.png", tmp_path / "gone.png"]) == 3
    assert [Path(entry.path).stem for entry in made.table] == ["0", "1", "3"]
    assert numbers(made.search([str(tmp_path / "1.png")], 1)[0]) == [1]


@pytest.mark.parametrize(
    "words, call",
    [
        ("2 crops but 1 features", lambda g: g.add(["a", "b"], features=unit(1, g.model.dim))),
        ("2 crops but 1 clusters", lambda g: g.add(["a", "b"], clusters=[1], features=unit(2, g.model.dim))),
        ("features have 5 numbers", lambda g: g.add(["a"], features=unit(1, 5))),
        ("features have 5 numbers", lambda g: g.search_features(unit(1, 5))),
        ("k=0", lambda g: g.search_features(unit(1, g.model.dim), 0)),
        ("unit rows", lambda g: g.add(["a"], features=2 * unit(1, g.model.dim))),
    ],
)
def test_mistakes_are_told_and_change_nothing(model, words, call):
    made, _ = filled(model, 5)
    with pytest.raises(ValueError, match=words):
        call(made)
    assert len(made) == 5 == made.index.ntotal


def test_an_empty_gallery_says_so(model):
    with pytest.raises(ValueError, match="no crop to look at: 0 in the gallery"):
        Gallery(model).search_features(unit(1, model.dim))


@LONG  # a timing
def test_a_hundred_thousand_crops_answer_soon(model):
    import time

    rows, made = unit(100_000, model.dim), Gallery(model)
    made.add([f"/crops/{i}.jpg" for i in range(len(rows))], features=rows)
    times = []
    for i in range(20):
        start = time.perf_counter()
        made.search_features(rows[i : i + 1])
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.05
