"""Re-ranking: golden values, square arrays, memory, and what it is for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from affscl.scores import evaluation, reranking
from affscl.scores.evaluation import evaluate, score
from affscl.scores.reranking import rerank

GOLDEN = np.load(Path(__file__).parent / "golden" / "evaluation.npz")
IDS = [GOLDEN[name] for name in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
FEATURES = Q, G = GOLDEN["query_features"], GOLDEN["gallery_features"]


def test_golden():
    distance = rerank(*FEATURES)
    assert distance.shape == (90, 420) and distance.dtype == np.float32
    assert np.abs(distance - GOLDEN["reranked_distance"]).max() < 1e-5
    found = score(distance, *IDS)
    assert abs(found.mAP - GOLDEN["reranked_mAP"]) < 1e-6
    np.testing.assert_allclose(found.cmc, GOLDEN["reranked_cmc"], atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_golden_on_a_gpu():
    features = [torch.from_numpy(x).cuda() for x in FEATURES]
    assert np.abs(rerank(*features) - GOLDEN["reranked_distance"]).max() < 1e-5


def test_memory_stays_within_a_block(monkeypatch):
    sizes = []

    def squared_distance(*args):
        sizes.append(evaluation.squared_distance(*args))
        return sizes[-1]

    monkeypatch.setattr(reranking, "BLOCK", 5 * 420)
    monkeypatch.setattr(reranking, "squared_distance", squared_distance)
    rerank(*FEATURES)
    assert len(sizes) > 100 and max(block.numel() for block in sizes) <= 5 * 420


def dense_rerank(query, gallery, k1, k2, lambda_value):
    """k-reciprocal re-ranking with square arrays."""
    x = np.concatenate([query, gallery]).astype(float)
    d = ((x[:, None] - x[None]) ** 2).sum(2)
    delta = (d / d.max(1, keepdims=True)) ** 2
    np.fill_diagonal(d, -1)
    order, half = np.argsort(d, 1, kind="stable"), int(np.around(k1 / 2)) + 1

    def mutual(i, k):
        return {j for j in order[i, :k] if i in order[j, :k]}

    v = np.zeros_like(d)
    for i in range(len(x)):
        core = mutual(i, k1 + 1)
        members = core.union(*(s for s in (mutual(j, half) for j in core) if len(s & core) > 2 / 3 * len(s)))
        v[i, list(members)] = np.exp(-delta[i, list(members)])
        v[i] /= v[i].sum()
    v, q = v[order[:, :k2]].mean(1), len(query)
    shared = np.minimum(v[:q, None], v[None, q:]).sum(2)
    return (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * delta[:q, q:]


@pytest.mark.parametrize(
    "k1, k2, lambda_value, scale", [(1, 1, 0.0, 1), (5, 3, 0.3, 1), (8, 9, 1.0, 1), (20, 6, 0.5, 30)]
)
def test_equals_square_arrays(k1, k2, lambda_value, scale, monkeypatch):
    monkeypatch.setattr(reranking, "BLOCK", 700)
    rng = np.random.default_rng(k1)
    people = rng.normal(size=(9, 12))
    query, gallery = (
        scale * (people[rng.integers(0, 9, n)] + 0.6 * rng.normal(size=(n, 12))).astype(np.float32) for n in (17, 60)
    )
    np.testing.assert_allclose(
        rerank(query, gallery, k1, k2, lambda_value), dense_rerank(query, gallery, k1, k2, lambda_value), atol=2e-5
    )


def test_few_or_equal_crops():
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(2, 4)), rng.normal(size=(3, 4))
    with pytest.warns(UserWarning, match="only 5 crops: using k1=4"):
        distance = rerank(query, gallery)
    np.testing.assert_allclose(distance, dense_rerank(query, gallery, 4, 5, 0.3), atol=1e-5)
    assert np.isfinite(rerank(np.ones((3, 4)), np.ones((30, 4)))).all()


def test_helps_where_neighbours_agree():
    rng = np.random.default_rng(0)
    people = rng.normal(size=(30, 16))
    pids = [np.repeat(np.arange(30), n) for n in (1, 10)]
    query, gallery = (people[p] + 0.7 * rng.normal(size=(len(p), 16)) for p in pids)
    assert (
        score(rerank(query, gallery, k1=9, k2=3), *pids, None, None).mAP
        > evaluate(query, gallery, *pids, None, None).mAP + 0.05
    )


@pytest.mark.parametrize(
    "args, message",
    [
        ((Q, G, 20, 30), "k2"),
        ((Q, G, 0), "k1"),
        ((Q, G, 20, 6, 1.5), "lambda_value"),
        ((Q, G[:0]), "empty"),
        ((Q, G[:, :5]), r"\(90, 48\) and \(420, 5\)"),
        ((Q * np.nan, G), "query_features holds nan"),
    ],
)
def test_mistakes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        rerank(*args)
