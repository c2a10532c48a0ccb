"""Evaluation: golden values, a naive loop, scikit-learn, ties, and both ways of counting."""

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from affscl.scores import evaluation
from affscl.scores.evaluation import Scores, evaluate, nothing_to_find, same_person_pairs, score

GOLDEN = np.load(Path(__file__).parent / "golden" / "evaluation.npz")
IDS = [GOLDEN[name] for name in ("query_pids", "gallery_pids", "query_camids", "gallery_camids")]
FEATURES = GOLDEN["query_features"], GOLDEN["gallery_features"]


def naive(distance, query_pids, gallery_pids, query_camids, gallery_camids, ap="sum"):
    """One query at a time, by sorting, with Market-1501's own loop for the trapezoid."""
    aps, cmc = [], []
    for i, row in enumerate(distance):
        hit = gallery_pids == query_pids[i]
        keep = np.ones(len(hit), bool) if query_camids is None else ~(hit & (gallery_camids == query_camids[i]))
        hit = hit[keep][np.lexsort((hit[keep], row[keep]))]
        if not hit.any():
            aps.append(np.nan)
            continue
        total, found, precision, recall = 0.0, 0, 1.0, 0.0
        for rank, right in enumerate(hit, 1):
            found += right
            now, reached = found / rank, found / hit.sum()
            total += (reached - recall) * (now if ap == "sum" else (precision + now) / 2)
            precision, recall = now, reached
        aps.append(total)
        cmc.append(np.argmax(hit) + 1 <= np.arange(1, 51))
    return np.array(aps), np.mean(cmc, 0) if cmc else np.full(50, np.nan)


@st.composite
def problems(draw):
    """A small evaluation full of ties, distractors, unknown cameras and queries without a match."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, g, people, cameras = (draw(st.integers(1, high)) for high in (12, 70, 6, 4))
    distance = rng.integers(0, draw(st.integers(1, 40)), (q, g)).astype(draw(st.sampled_from([np.float32, np.float64])))
    distance[rng.random((q, g)) < 0.05] = np.inf
    ids = [
        rng.integers(1, people + 1, q),
        rng.integers(0, people + 1, g),
        rng.integers(0, cameras, q),
        rng.integers(0, cameras, g),
    ]
    cameras = draw(st.sampled_from(["known", "none", "some"]))
    if cameras == "none":
        ids[2:] = None, None
    elif cameras == "some":  # nan is an unknown camera, and equals nothing
        ids[2:] = [np.where(rng.random(len(x)) < 0.3, np.nan, x) for x in ids[2:]]
    return distance, ids


@pytest.fixture
def in_torch(monkeypatch):
    monkeypatch.setattr(evaluation, "_block_ranks", evaluation._ranks_torch)


def unsure_pairs(query_pids, gallery_pids, query_camids, gallery_camids):
    """How many pairs of one person have a crop whose camera is unknown, and how many pairs there are."""
    pairs = [(i, j) for i, pid in enumerate(query_pids) for j, other in enumerate(gallery_pids) if pid == other]
    if query_camids is None:
        return len(pairs), len(pairs)
    return sum(bool(np.isnan(query_camids[i]) or np.isnan(gallery_camids[j])) for i, j in pairs), len(pairs)


def check(distance, ids, ap):
    aps, cmc = naive(distance, *ids, ap=ap)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = score(distance, *ids, ap=ap)
    said = [str(warning.message) for warning in caught]
    np.testing.assert_allclose(found.ap, aps, atol=1e-12)
    np.testing.assert_allclose(found.cmc, cmc, atol=1e-12)
    assert found.cmc.shape == (50,)
    if np.isnan(aps).all():
        assert np.isnan(found.mAP) and "no query has a match" in said.pop()
    else:
        assert np.isclose(found.mAP, np.nanmean(aps))
    unsure, pairs = unsure_pairs(*ids)
    if unsure:
        assert f"{unsure} of {pairs} pairs of one person count" in said.pop()
    assert not said


@settings(deadline=None, max_examples=80)
@given(problems(), st.sampled_from(["sum", "trapezoid"]))
def test_equals_the_naive_loop(problem, ap):
    check(*problem, ap)


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(["sum", "trapezoid"]))
def test_the_count_in_torch_equals_the_naive_loop(problem, ap):
    compiled = evaluation._block_ranks
    evaluation._block_ranks = evaluation._ranks_torch
    try:
        check(*problem, ap)
    finally:
        evaluation._block_ranks = compiled


@pytest.mark.parametrize(
    "found", [score(GOLDEN["distance"], *IDS), evaluate(*FEATURES, *IDS)], ids=["score", "evaluate"]
)
def test_golden(found):
    assert abs(found.mAP - GOLDEN["mAP"]) < 1e-6
    np.testing.assert_allclose(found.cmc, GOLDEN["cmc"], atol=1e-6)
    np.testing.assert_allclose(found.ap, GOLDEN["ap_per_query"], atol=1e-6)


def test_golden_in_torch_and_in_small_blocks(in_torch, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 7 * 420)
    np.testing.assert_allclose(score(GOLDEN["distance"], *IDS).ap, GOLDEN["ap_per_query"], atol=1e-6)
    np.testing.assert_allclose(evaluate(*FEATURES, *IDS).ap, GOLDEN["ap_per_query"], atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_golden_on_a_gpu():
    features = [torch.from_numpy(x).cuda() for x in FEATURES]
    np.testing.assert_allclose(evaluate(*features, *IDS).ap, GOLDEN["ap_per_query"], atol=1e-6)


def test_memory_stays_within_a_block(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 5 * 420)
    squared, sizes = evaluation.squared_distance, []
    monkeypatch.setattr(evaluation, "squared_distance", lambda *args: sizes.append(squared(*args)) or sizes[-1])
    evaluate(*FEATURES, *IDS)
    assert max(block.numel() for block in sizes) <= 5 * 420 and len(sizes) == 18


def test_by_hand():
    hits = np.array([1, 0, 1, 0, 0, 1, 0, 0])
    found = score(np.arange(8.0)[None], [1], hits, None, None)
    assert np.isclose(found.mAP, 13 / 18) and found.rank(1) == 1
    assert np.isclose(score(np.arange(8.0)[None], [1], hits, None, None, ap="trapezoid").mAP, (2 + 7 / 6 + 9 / 10) / 6)
    late = score(np.arange(8.0)[None], [1], np.array([0, 0, 1, 0, 0, 0, 0, 0]), None, None)
    assert late.cmc[:4].tolist() == [0, 0, 1, 1] and late.cmc[49] == 1


def test_scikit_learn_agrees():
    rng = np.random.default_rng(0)
    distance, pids = rng.random((5, 200)), rng.integers(0, 5, 200)
    found = score(distance, np.arange(5), pids, None, None)
    np.testing.assert_allclose(found.ap, [average_precision_score(pids == i, -distance[i]) for i in range(5)])


def test_order_of_the_gallery_does_not_matter():
    order = np.random.default_rng(0).permutation(420)
    shuffled = score(np.round(GOLDEN["distance"], 1)[:, order], IDS[0], IDS[1][order], IDS[2], IDS[3][order])
    np.testing.assert_allclose(shuffled.ap, score(np.round(GOLDEN["distance"], 1), *IDS).ap)


@pytest.mark.parametrize("q, g, d", [(3, 17, 511), (7, 1003, 256), (1, 50, 2048), (40, 333, 64)])
def test_a_collapsed_network_gets_the_worst_score(q, g, d):
    # These shapes leave odd edges in the matrix product, where sums are rounded differently.
    one = torch.nn.functional.normalize(torch.randn(1, d, generator=torch.Generator().manual_seed(d)), dim=1)
    found = evaluate(one.expand(q, -1), one.expand(g, -1), np.zeros(q, int), np.arange(g), None, None)
    assert np.isclose(found.mAP, 1 / g)


def test_repeated_crops_tie_exactly():
    rng = np.random.default_rng(1)
    gallery = rng.normal(size=(40, 33)).astype(np.float32)[rng.integers(0, 40, 300)]
    query, pids = rng.normal(size=(9, 33)).astype(np.float32), rng.integers(0, 9, 300)
    exact = ((query[:, None].astype(float) - gallery[None]) ** 2).sum(2)
    np.testing.assert_allclose(
        evaluate(query, gallery, np.arange(9), pids, None, None).ap, naive(exact, np.arange(9), pids, None, None)[0]
    )


def test_same_camera_is_ignored_and_distractors_stay():
    distance = np.array([[0.1, 0.2, 0.3, 0.4]])
    pids, cameras = [1, 0, 1, 1], [0, 0, 1, 0]
    assert score(distance, [1], pids, [0], cameras).ap[0] == 1 / 2  # only the third counts, behind the distractor
    assert np.isclose(score(distance, [1], pids, None, None).ap[0], (1 + 2 / 3 + 3 / 4) / 3)
    assert np.isclose(score(distance, [1], pids, [None], cameras).ap[0], (1 + 2 / 3 + 3 / 4) / 3)


def world(seed=0):
    """Features in which a camera's tint is stronger than a person, and their four lists of ids."""
    rng = np.random.default_rng(seed)
    people, tints = rng.normal(size=(21, 16)), 3 * rng.normal(size=(4, 16))
    ids = [rng.integers(1, 21, 60), rng.integers(0, 21, 300), rng.integers(0, 4, 60), rng.integers(0, 4, 300)]
    features = [people[p] + tints[c] + 0.5 * rng.normal(size=(len(p), 16)) for p, c in (ids[::2], ids[1::2])]
    return features, ids


def told(function, *args):
    """A function's value, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args)
    return value, [str(warning.message) for warning in caught]


def with_unknown(ids, where, share, kind):
    """The ids with some cameras unknown: `where` is 2 (queries), 3 (gallery) or both."""
    ids = list(ids)
    rng = np.random.default_rng(1)
    for i in where:
        unknown = rng.random(len(ids[i])) < share
        unknown[np.flatnonzero(ids[i - 2] > 0)[0]] = True  # somebody's, not a distractor's
        ids[i] = kind([None if u else int(c) for u, c in zip(unknown, ids[i])])
    return ids


KINDS = {"list": list, "objects": lambda x: np.array(x, object), "floats": lambda x: np.array(x, float)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("where", [(2,), (3,), (2, 3)], ids=["query", "gallery", "both"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_unknown_cameras_leave_the_rule_on_for_the_others(where, share, kind):
    features, ids = world()
    some = with_unknown(ids, where, share, kind)
    strict, loose = evaluate(*features, *ids), told(evaluate, *features, *ids[:2], None, None)[0]
    found, said = told(evaluate, *features, *some)
    known = [np.array(x, float) for x in some[2:]]
    distance = ((features[0][:, None] - features[1][None]) ** 2).sum(2)
    np.testing.assert_allclose(found.ap, naive(distance, *ids[:2], *known)[0])
    unsure, pairs = unsure_pairs(*ids[:2], *known)
    assert strict.mAP <= found.mAP < loose.mAP and loose.mAP - strict.mAP > 0.1
    if share == 0:  # one unknown camera
        assert found.mAP < strict.mAP + 0.05
    assert len(said) == 1 and "holds in part only" in said[0] and f"{unsure} of {pairs} pairs" in said[0]
    assert f"({found.left_out} are left out)" in said[0] and 0 < found.left_out <= strict.left_out


def test_how_many_cameras_are_unknown_is_told():
    features, ids = world()
    ids[2] = [None, None, *ids[2][2:]]
    said = told(evaluate, *features, *ids)[1][0]
    assert "unknown for 2 of 60 queries and 0 of 300 gallery crops" in said


@pytest.mark.parametrize("unknown", [lambda x: None, lambda x: [None] * len(x), lambda x: np.full(len(x), np.nan)])
def test_a_rule_that_is_off_is_told(unknown):
    features, ids = world()
    found, said = told(evaluate, *features, *ids[:2], unknown(ids[2]), unknown(ids[3]))
    assert len(said) == 1 and "the same-camera rule is off" in said[0] and found.left_out == 0
    assert "60 of 60 queries and 300 of 300 gallery crops" in said[0]


def test_unknown_cameras_of_crops_that_match_nobody_are_not_told():
    features, ids = world()
    distractors = ids[1] == 0
    assert distractors.sum() > 5
    ids[3] = np.where(distractors, np.nan, ids[3])
    found, said = told(evaluate, *features, *ids)
    assert not said and found.mAP == evaluate(*features, *world()[1]).mAP


def test_the_pairs_left_out_are_counted():
    _, (qp, gp, qc, gc) = world()
    pairs = same_person_pairs(qp, gp, qc, gc)
    both = (qp[:, None] == gp) & (qc[:, None] == gc)
    assert evaluate(*world()[0], qp, gp, qc, gc).left_out == pairs.left_out.sum() == both.sum() > 0
    assert not pairs.unsure.any() and nothing_to_find(pairs) is None


@pytest.mark.parametrize("function", [evaluate, lambda q, g, *ids: score(np.ones((len(q), len(g))), *ids)])
def test_one_camera_for_all_is_named_with_what_to_do(function):
    features, ids = world()
    ids[2:] = np.full(60, 7), np.full(300, 7)
    found, said = told(function, *features, *ids)
    assert np.isnan(found.mAP) and np.isnan(found.ap).all() and len(said) == 1
    assert "no query has a match" in said[0] and "one camera took both crops" in said[0]
    assert f"each of the {found.left_out} pairs" in said[0] and "leave all camids out" in said[0]


def test_one_camera_for_each_person_is_named_too():
    features, ids = world()
    ids[2:] = ids[0] % 4, ids[1] % 4  # nobody is ever seen by two cameras
    assert "one camera took both crops" in told(evaluate, *features, *ids)[1][0]


def test_strangers_only_are_named():
    features, ids = world()
    found, said = told(evaluate, *features, ids[0] + 1000, *ids[1:])
    assert np.isnan(found.mAP) and "no person in common" in said[0] and len(said) == 1


def test_inputs_may_be_tensors_lists_and_half_precision():
    expected = score(GOLDEN["distance"], *IDS)
    assert score(torch.from_numpy(GOLDEN["distance"]), *(torch.from_numpy(x) for x in IDS)).mAP == expected.mAP
    assert score(GOLDEN["distance"].tolist(), *(x.tolist() for x in IDS)).mAP == expected.mAP
    assert score(np.asfortranarray(GOLDEN["distance"]), *IDS).mAP == expected.mAP
    half = [torch.from_numpy(x).half() for x in FEATURES]
    assert abs(evaluate(*half, *IDS).mAP - expected.mAP) < 0.01
    wide = [x.astype(np.float64) for x in FEATURES]
    assert abs(evaluate(*wide, *IDS).mAP - expected.mAP) < 1e-6


def test_scores_print_percentages():
    text = repr(Scores(0.788, np.linspace(0.909, 1, 50), np.array([0.5, np.nan])))
    assert text.startswith("mAP 78.8 %, Rank-1 90.9 %, Rank-5") and "(1 of 2 queries" in text
    with pytest.raises(ValueError, match="Rank-51"):
        score(GOLDEN["distance"], *IDS).rank(51)


QP, GP, QC, GC = IDS
Q, G = FEATURES


@pytest.mark.parametrize(
    "function, args, message",
    [
        (evaluate, (Q, G[:, :5], *IDS), r"\(90, 48\) and \(420, 5\)"),
        (evaluate, (Q, G, QP[:3], GP, QC, GC), r"query_pids .* 90 crops.*\(3,\)"),
        (evaluate, (Q, G, QP, GP, QC, GC[:3]), r"gallery_camids .* 420 crops"),
        (evaluate, (Q, G, QP, GP + 0.5, QC, GC), "gallery_pids must be integers"),
        (evaluate, (Q, G, QP, GP, QC, None), "both"),
        (evaluate, (Q * np.nan, G, *IDS), "query_features holds nan"),
        (evaluate, (Q, G * np.inf, *IDS), "gallery_features holds nan or inf"),
        (evaluate, (Q[:0], G, *IDS), "query_features is empty"),
        (evaluate, (Q, G[:0], *IDS), "gallery_features is empty"),
        (score, (GOLDEN["distance"][0], *IDS), "row for each query"),
        (score, (np.where(GOLDEN["distance"] > 2, np.nan, 1), *IDS), "distance holds nan"),
        (score, (np.zeros((0, 5)), [], [1, 2, 3, 4, 5], None, None), "0 queries and 5 gallery"),
        (score, (GOLDEN["distance"], *IDS, "area"), "'area'"),
    ],
)
def test_mistakes_are_named(function, args, message):
    with pytest.raises(ValueError, match=message):
        function(*args)


def test_the_count_is_faster_than_a_sort():
    # No full sort: far below the time of one, with a wide margin for a busy machine.
    rng = np.random.default_rng(0)
    distance = rng.random((600, 8000), dtype=np.float32)
    ids = rng.integers(1, 400, 600), rng.integers(0, 400, 8000), rng.integers(0, 6, 600), rng.integers(0, 6, 8000)
    score(distance[:2], ids[0][:2], ids[1], ids[2][:2], ids[3])

    def seconds(function):
        times = []
        for _ in range(5):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(lambda: score(distance, *ids)) < 0.4 * seconds(lambda: np.argsort(distance, axis=1))
