"""Scoring a dataset's features in several ways at once: samples' ids, the mixed gallery, and what is warned of."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch

from affscl.data.datasets import Dataset, Sample, load_dataset
from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.model.extraction import extract
from affscl.model.network import AFF
from affscl.scores import benchmark
from affscl.scores.benchmark import can_score, evaluate_model, score_features
from affscl.scores.evaluation import evaluate, score
from affscl.scores.reranking import rerank


def some_samples(folder, n, seed, cameras=3):
    rng = np.random.default_rng(seed)
    return [Sample(f"{folder}/{i}.jpg", int(rng.integers(1, 9)), int(rng.integers(cameras))) for i in range(n)]


def tinted(samples, seed=0, tint=2.0):
    """Features in which a camera speaks louder than a person."""
    rng = np.random.default_rng(seed)
    people, cameras = rng.normal(size=(9, 16)), tint * rng.normal(size=(6, 16))
    x = np.stack([people[s.pid] + cameras[s.camid or 0] + 0.5 * rng.normal(size=16) for s in samples])
    return torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1)


QUERY, GALLERY = some_samples("q", 30, 1), some_samples("g", 120, 2)
FEATURES = tinted(QUERY, 3), tinted(GALLERY, 4)
IDS = [np.array([getattr(s, field) for s in part]) for field in ("pid", "camid") for part in (QUERY, GALLERY)]


def told(function, *args, **options):
    """A function's value, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args, **options)
    return value, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def without_cameras(samples, which=lambda i: True):
    return [s._replace(camid=None) if which(i) else s for i, s in enumerate(samples)]


def test_all_ways_equal_the_evaluators_own():
    found, said = told(score_features, *FEATURES, (QUERY, GALLERY), reranked=True, mixed=True)
    assert not said and list(found) == ["as extracted", "re-ranked", "mixed gallery"]
    np.testing.assert_array_equal(found["as extracted"].ap, evaluate(*FEATURES, *IDS).ap)
    np.testing.assert_array_equal(found["re-ranked"].ap, score(rerank(*FEATURES), *IDS).ap)
    both = torch.cat([FEATURES[1], FEATURES[0]])
    qp, gp, qc, gc = IDS
    wanted = evaluate(FEATURES[0], both, qp, np.concatenate([gp, qp]), qc, np.concatenate([gc, qc]))
    np.testing.assert_array_equal(found["mixed gallery"].ap, wanted.ap)


@pytest.mark.parametrize("asked", [{}, {"reranked": True}, {"mixed": True}])
def test_only_what_was_asked_for(asked):
    names = {"reranked": "re-ranked", "mixed": "mixed gallery"}
    assert list(score_features(*FEATURES, (QUERY, GALLERY), **asked)) == ["as extracted", *(names[x] for x in asked)]


def test_strangers_of_the_queries_camera_join_a_gallery_of_another():
    query = [s._replace(camid=0) for s in QUERY]
    gallery = [s._replace(camid=1) for s in GALLERY]
    features = tinted(query, 3, tint=9.0), tinted(gallery, 3, tint=9.0)
    found = score_features(*features, (query, gallery), mixed=True)
    matches = [sum(s.pid == q.pid for s in gallery) for q in query]
    for name in (
        "as extracted",
        "mixed gallery",
    ):  # the same matches: a query's own person in its own camera is left out
        assert np.count_nonzero(~np.isnan(found[name].ap)) == np.count_nonzero(matches)
    assert found["mixed gallery"].rank(1) == 0 < found["as extracted"].rank(1)


def test_no_query_finds_itself_in_the_mixed_gallery_though_its_camera_is_unknown():
    alone = [Sample(f"q/{pid}.jpg", pid) for pid in range(1, 9)]  # each person once
    crops = [Sample(f"g/{pid}.jpg", pid, 1) for pid in range(1, 9)]
    query = torch.eye(8)
    found, _ = told(score_features, query, query.roll(1, 0), (alone, crops), mixed=True)
    assert found["mixed gallery"].rank(1) == 0, "the nearest crop of each query is itself"
    assert found["mixed gallery"].left_out == 8


@pytest.mark.parametrize("part", [0, 1])
def test_one_unknown_camera_leaves_the_rule_on(part):
    samples = [QUERY, GALLERY]
    samples[part] = without_cameras(samples[part], lambda i: i == 5)
    found, said = told(score_features, *FEATURES, samples)
    strict = score_features(*FEATURES, (QUERY, GALLERY))["as extracted"]
    loose, told_off = told(score_features, *FEATURES, [without_cameras(QUERY), without_cameras(GALLERY)])
    assert strict.mAP <= found["as extracted"].mAP < strict.mAP + 0.05 < loose["as extracted"].mAP
    assert len(said) == 1 and "holds in part only" in said[0]
    assert len(told_off) == 1 and "the same-camera rule is off" in told_off[0]


def test_queries_that_stand_in_the_gallery_are_told_unless_the_rule_leaves_them_out():
    same = GALLERY[:30]
    features = FEATURES[1][:30], FEATURES[1]
    assert told(score_features, *features, (same, GALLERY))[1] == []
    found, said = told(score_features, *features, (without_cameras(same), GALLERY))
    assert found["as extracted"].rank(1) == 1 and any("30 of 30 queries are in the gallery too" in x for x in said)
    said = told(score_features, *features, (without_cameras(same, lambda i: i < 4), GALLERY))[1]
    assert any("4 of 30 queries are in the gallery too" in x for x in said)
    said = told(score_features, *features, (same, without_cameras(GALLERY, lambda i: i == 7)))[1]
    assert any("1 of 30 queries are in the gallery too" in x for x in said)
    said = told(score_features, *features, ([s._replace(camid=s.camid + 1) for s in same], GALLERY))[1]
    assert any("30 of 30 queries are in the gallery too" in x for x in said)


def dataset(query, gallery):
    return Dataset("people", "/data", QUERY, query, gallery)


@pytest.mark.parametrize(
    "query, gallery, message",
    [
        ([], GALLERY, "no query and gallery"),
        (QUERY, [], "no query and gallery"),
        ([s._replace(pid=None) for s in QUERY], GALLERY, "have no pid"),
        ([s._replace(pid=s.pid + 100) for s in QUERY], GALLERY, "no person in common"),
        ([s._replace(camid=4) for s in QUERY], [s._replace(camid=4) for s in GALLERY], "leave all camids out"),
        ([s._replace(camid=s.pid) for s in QUERY], [s._replace(camid=s.pid) for s in GALLERY], "one camera took both"),
    ],
)
def test_what_cannot_be_scored_is_told_why(query, gallery, message):
    assert message in can_score(dataset(query, gallery))


def test_what_can_be_scored():
    assert can_score(dataset(QUERY, GALLERY)) is None
    one = [s._replace(camid=4) for s in GALLERY]
    assert told(can_score, dataset(without_cameras(QUERY), without_cameras(one)))[0] is None


def test_a_model_extracts_once_for_all_ways(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "people", n_ids=12, n_cams=3, seed=0, size=(64, 32))
    data = load_dataset("market1501", root)
    stores = [ImageStore(part, 64, 32) for part in (data.query, data.gallery)]
    calls = []
    monkeypatch.setattr(benchmark, "extract", lambda *args: calls.append(args[1]) or extract(*args))
    torch.manual_seed(0)
    model = AFF("resnet10", height=64, width=32)
    found = evaluate_model(model, *stores, reranked=True, mixed=True)
    assert len(found) == 3 and calls == stores
    wanted = score_features(*(extract(model, x) for x in stores), (data.query, data.gallery))
    assert found["as extracted"].mAP == wanted["as extracted"].mAP


@pytest.mark.parametrize("how", [os.link, os.symlink, shutil.copyfile])
def test_copies_of_queries_in_the_gallery_are_told(how, tmp_path):
    for i in range(30):
        (tmp_path / f"q{i}").write_bytes(bytes([i]) * (5 + i // 3))
        how(tmp_path / f"q{i}", tmp_path / f"g{i}")
    queries = [s._replace(path=str(tmp_path / f"q{i}"), camid=None) for i, s in enumerate(GALLERY[:30])]
    crops = [s._replace(path=str(tmp_path / f"g{i}") if i < 20 else s.path) for i, s in enumerate(GALLERY)]
    said = told(score_features, FEATURES[1][:30], FEATURES[1], (queries, crops))[1]
    assert any("20 of 30 queries are in the gallery too" in x for x in said)
    said = told(score_features, *FEATURES, (queries[20:] + QUERY[10:], crops))[1]
    assert not any("in the gallery too" in x for x in said)
