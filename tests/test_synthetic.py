"""Synthetic worlds: the same bytes for the same parameters, a tree that loads, a difficulty in the wanted range."""

import colorsys
import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from affscl.data import synthetic
from affscl.data.synthetic import (
    Studio,
    World,
    complete,
    draw_crop,
    draw_distractor,
    draw_junk,
    hsv_histograms,
    make_dataset,
    world_problems,
)

SMALL = dict(n_ids=8, n_test_ids=3, n_cams=4, size=(64, 32))
NAME = re.compile(r"(-1|\d{4})_c(\d)s1_\d{6}_\d\d\.jpg")


def tree(root):
    """{relative path: bytes} of everything below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def crops(root, folder):
    """(pid, camid, path) of every crop in a folder; a name that is none of Market-1501's fails."""
    return [
        (int(m[1]), int(m[2]), path) for path in sorted((root / folder).iterdir()) for m in [NAME.fullmatch(path.name)]
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("world") / "small", **SMALL)


def test_same_parameters_same_bytes(small, tmp_path):
    assert tree(make_dataset(tmp_path / "again", **SMALL)) == tree(small)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"look": 1}, {"camera_shift": 2}, {"scenery": 0}, {"nuisance": 0}, {"similarity": 3}]
)
def test_every_parameter_changes_the_crops(small, tmp_path, change):
    one = Studio(World(**SMALL)), Studio(World(**SMALL | change))
    same = [np.array_equal(*(draw_crop(s, pid, 1, 0) for s in one)) for pid in range(1, 13)]
    assert sum(same) <= 1


def test_crops_do_not_depend_on_how_many_people_there_are(small, tmp_path):
    more = tree(make_dataset(tmp_path / "more", **SMALL | {"n_ids": 10, "distractors": 5}))
    fewer = {k: v for k, v in tree(small).items() if "train" in k}
    assert fewer and all(more[k] == v for k, v in fewer.items())
    strangers = {k: v for k, v in tree(small).items() if "/0000" in k}
    assert len(strangers) == 3 and all(more[k] == v for k, v in strangers.items())


def test_crops_do_not_depend_on_the_order_of_drawing():
    ahead, back = Studio(World(**SMALL)), Studio(World(**SMALL))
    wanted = [(pid, camid) for pid in (1, 5) for camid in (1, 3)]
    forwards = [draw_crop(ahead, *w, 0) for w in wanted]
    backwards = [draw_crop(back, *w, 0) for w in wanted[::-1]][::-1]
    assert np.array_equal(forwards, backwards)


def test_a_camera_does_not_depend_on_how_many_there_are():
    few, many = Studio(World(n_cams=2)), Studio(World(n_cams=9))
    assert np.array_equal(few.camera(2).scene, many.camera(2).scene) and few.camera(2).gains == many.camera(2).gains


def test_the_tree_is_market1501(small):
    from affscl.data.datasets import load_dataset

    data = load_dataset("market1501", small)
    assert {s.pid for s in data.train} == {1, 2, 3, 4, 5}
    assert {s.pid for s in data.query} == {6, 7, 8}
    assert {s.pid for s in data.gallery} >= {0, 6, 7, 8}
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        for _, camid, path in crops(small, folder):
            with Image.open(path) as image:
                assert image.size == (32, 64) and image.mode == "RGB" and 1 <= camid <= 4


def test_distractors_and_junk_are_in_the_gallery_only(small):
    gallery = [pid for pid, *_ in crops(small, "bounding_box_test")]
    assert gallery.count(0) == 3 and gallery.count(-1) == 1
    assert all(pid > 0 for folder in ("bounding_box_train", "query") for pid, *_ in crops(small, folder))


def test_every_query_has_a_match_in_another_camera(small):
    gallery = [(pid, camid) for pid, camid, _ in crops(small, "bounding_box_test")]
    queries = [(pid, camid) for pid, camid, _ in crops(small, "query")]
    assert len(set(queries)) == len(queries) > 3
    for pid, camid in queries:
        assert any(p == pid and c != camid for p, c in gallery)


@settings(deadline=None, max_examples=30)
@given(n_cams=st.integers(2, 12), pid=st.integers(1, 500), seed=st.integers(0, 99))
def test_everybody_is_seen_by_two_cameras_or_more(n_cams, pid, seed):
    seen = Studio(World(n_cams=n_cams, seed=seed)).seen_by(pid)
    assert len(set(seen)) == len(seen) >= max(2, 0.66 * n_cams) and set(seen) <= set(range(1, n_cams + 1))


def test_an_existing_world_is_used_as_it_is(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert make_dataset(str(small), **SMALL) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_another_world_is_refused(small):
    with pytest.raises(ValueError, match="another synthetic world .seed is 0, not 3.*another folder"):
        make_dataset(small, **SMALL | {"seed": 3})


def test_an_older_drawing_is_refused(small, monkeypatch):
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    with pytest.raises(ValueError, match="version is"):
        make_dataset(small, **SMALL)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(ValueError, match="no world.json"):
        make_dataset(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (make_dataset(tmp_path / "empty", **SMALL) / "world.json").is_file()


def test_an_interrupted_world_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    whole, calls = synthetic.draw_crop, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(synthetic, "draw_crop", failing)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "world", **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert "world.json" in tree(make_dataset(tmp_path / "world", **SMALL))


def test_two_makers_of_one_world_do_not_collide(tmp_path, monkeypatch):
    write = synthetic.write_tree

    def overtaken(root, studio):
        monkeypatch.setattr(synthetic, "write_tree", write)
        make_dataset(tmp_path / "world", **SMALL)
        write(root, studio)

    monkeypatch.setattr(synthetic, "write_tree", overtaken)
    make_dataset(tmp_path / "world", **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"n_ids": 3}, "at least 2 people to train on"),
        ({"n_test_ids": 7}, "n_test_ids"),
        ({"n_test_ids": 0}, "n_test_ids"),
        ({"n_cams": 1}, "n_cams must be at least 2"),
        ({"crops_per_camera": 1}, "crops_per_camera must be at least 2"),
        ({"size": (128, 8)}, "height, width"),
        ({"size": (64,)}, "height, width"),
        ({"seed": -1}, "seed must not be negative"),
        ({"camera_shift": -0.5}, "camera_shift must not"),
        ({"junk": -1}, "junk must not"),
    ],
)
def test_impossible_worlds_are_refused(tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        make_dataset(tmp_path / "world", **SMALL | wrong)
    assert not (tmp_path / "world").exists()


def test_all_that_is_wrong_with_a_world_is_told_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        make_dataset(tmp_path / "world", n_ids=3, n_cams=1, crops_per_camera=1, size=(8, 8), seed=-1, junk=-2)
    assert len(str(error.value).splitlines()) == 6
    assert world_problems(complete(World())) == []


def test_the_record_tells_all_parameters(small):
    record = json.loads((small / "world.json").read_text())
    assert (
        record["n_ids"] == 8
        and record["size"] == [64, 32]
        and record["junk"] == 1
        and record["version"] == synthetic.VERSION
    )


def test_distractors_and_junk_are_drawn_at_any_size():
    studio = Studio(World(size=(48, 40), n_cams=3))
    for draw in (draw_distractor, draw_junk):
        camid, image = draw(studio, 4)
        assert 1 <= camid <= 3 and image.shape == (48, 40, 3) and image.dtype == np.uint8 and image.std() > 3


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(6, 3), (13, 5), (16, 4)]))
def test_histograms_equal_a_naive_count(seed, size):
    image = np.random.default_rng(seed).integers(0, 256, (3, *size)) // 51 * 51  # many pixels on the borders of cells
    counts = np.zeros((6, 8, 4, 4))
    for row in range(size[0]):
        for column in range(size[1]):
            hue, saturation, value = colorsys.rgb_to_hsv(*(Fraction(int(v), 255) for v in image[:, row, column]))
            counts[6 * row // size[0], int(8 * hue) % 8, min(int(4 * saturation), 3), min(int(4 * value), 3)] += 1
    (found,) = hsv_histograms(image[None].astype(np.uint8))
    assert np.allclose(found, counts.ravel() / counts.sum(), atol=1e-7)


def test_histograms_come_in_blocks():
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 12, 6), dtype=np.uint8)
    assert np.array_equal(hsv_histograms(images, block=3), hsv_histograms(images))
    assert hsv_histograms(images[:0]).shape == (0, 768) and np.allclose(hsv_histograms(images).sum(axis=1), 1)


def test_histograms_find_some_but_not_most(tmp_path):
    from affscl.scores.evaluation import score

    root = make_dataset(tmp_path / "world", n_ids=32, n_test_ids=30, distractors=30)
    (query, gallery) = (crops(root, folder) for folder in ("query", "bounding_box_test"))
    features = [
        hsv_histograms(np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for *_, path in part]))
        for part in (query, gallery)
    ]
    distance = np.abs(features[0][:, None] - features[1][None]).sum(axis=2)
    (qp, qc), (gp, gc) = (np.array([row[:2] for row in part]).T for part in (query, gallery))
    keep = gp >= 0
    assert 0.08 < score(distance[:, keep], qp, gp[keep], qc, gc[keep]).mAP < 0.40
