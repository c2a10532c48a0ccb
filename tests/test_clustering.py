"""Pseudo labels against golden values and dense DBSCAN; centroids and reports against naive versions; settings."""

import inspect
import warnings
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

from affscl.labels.clustering import (
    LADDER,
    ClusterOptions,
    agreement,
    centroids,
    choose_clusters,
    cluster_problems,
    cluster_report,
    labels_within,
    pseudo_labels,
    reliable_labels,
    require_clusters,
    separation,
    thinned,
)
from affscl.labels.jaccard import jaccard_distance
from affscl.labels.neighbours import nearest

GOLDEN = np.load(Path(__file__).parent / "golden" / "jaccard.npz")


def crowd(n, people, noise, seed, d=16):
    """Unit rows around so many centres, and who is who."""
    g = torch.Generator().manual_seed(seed)
    pids = torch.arange(n) % people
    x = torch.randn(people, d, generator=g)[pids] + noise * torch.randn(n, d, generator=g)
    return torch.nn.functional.normalize(x), pids.numpy()


# --- pseudo labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k1, k2", GOLDEN["ks"].tolist())
def test_golden_labels(k1, k2):
    for eps, want in zip(GOLDEN["eps"], GOLDEN[f"labels_k{k1}_{k2}"], strict=True):
        labels = pseudo_labels(GOLDEN["features"], float(eps), 4, k1, k2)
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, want)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(31, 120),
    people=st.integers(1, 10),
    noise=st.floats(0, 2),
    eps=st.floats(0.1, 0.95),
    min_samples=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_equals_dense_dbscan(n, people, noise, eps, min_samples, seed):
    x, _ = crowd(n, people, noise, seed)
    graph = jaccard_distance(x, 15, 4)
    full = np.ones(graph.shape, np.float32)
    full[graph.tocoo().coords] = graph.data
    eps = float(np.float32(eps))
    want = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = pseudo_labels(x, eps, min_samples, 15, 4)
    np.testing.assert_array_equal(labels, want)
    assert set(labels[labels >= 0]) == set(range(labels.max() + 1))


def test_finds_well_separated_people():
    x, pids = crowd(400, 20, 0.3, 0, d=64)
    assert cluster_report(pseudo_labels(x), pids)["ari"] == 1


def test_identical_images_are_one_cluster():
    # Zero distances dropped from the graph would leave outliers only.
    x, _ = crowd(60, 60, 0, 0, d=32)
    labels = pseudo_labels(torch.cat([x[:1].repeat(12, 1), x[1:2].repeat(12, 1), x[2:]]), 0.5, 4, 12, 3)
    assert len(set(labels[:12])) == 1 and len(set(labels[12:24])) == 1
    assert labels[0] >= 0 and labels[12] >= 0 and labels[0] != labels[12]


def test_order_of_samples_does_not_change_clear_clusters():
    x, _ = crowd(300, 15, 0.4, 3, d=64)
    order = np.random.default_rng(0).permutation(300)
    labels, permuted = pseudo_labels(x), pseudo_labels(x[order])
    assert cluster_report(permuted, labels[order])["ari"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(eps=0), "between 0 and 1"),
        (dict(eps=1.0), "between 0 and 1"),
        (dict(eps=float("nan")), "between 0 and 1"),
        (dict(min_samples=0), "min_samples=0: must be 1 or more"),
        (dict(k1=3), "1 <= k2 <= k1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels(crowd(40, 4, 1, 0)[0], **options)


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(eps=0), "eps=0: must lie between 0 and 1, as Jaccard distances do"),
        (dict(min_samples=0), "min_samples=0: must be 1 or more"),
        (dict(k2=0), "k2=0: must be 1 or more"),
        (dict(links_from=-1), "links_from=-1: must be 1 or more"),
        (
            dict(link_colours=-0.5, camera_links=1.0),
            "link_colours=-0.5: a weight is 0 or more, and 1 counts them as much as features; or auto",
        ),
        (
            dict(link_colours=float("nan"), camera_links=1.0),
            "link_colours=nan: a weight is 0 or more, and 1 counts them as much as features; or auto",
        ),
        (
            dict(link_colours="much", camera_links=1.0),
            "link_colours='much': a weight is 0 or more, and 1 counts them as much as features; or auto",
        ),
        (
            dict(link_colours="auto"),
            "link_colours='auto' and camera_links=0: colours help to find links, and there are none; set camera_links"
            " too, or leave link_colours at 0",
        ),
        (
            dict(link_colours=1.0),
            "link_colours=1.0 and camera_links=0: colours help to find links, and there are none; set camera_links"
            " too, or leave link_colours at 0",
        ),
        (dict(k1=5), "k1=5 and k2=6: must satisfy 1 <= k2 <= k1"),
        (dict(search="fast"), "search='fast': choose one of exact, faiss"),
        (dict(camera_links=1.5), "camera_links=1.5: a share of pairs lies between 0 and 1"),
    ],
)
def test_each_problem_is_a_sentence(options, problem):
    assert cluster_problems(ClusterOptions(**options)) == [problem]


def test_all_problems_are_told_at_once():
    assert cluster_problems(ClusterOptions()) == []
    problems = cluster_problems(ClusterOptions(eps=2, min_samples=0, k1=3, search="fast"))
    assert len(problems) == 4
    with pytest.raises(ValueError) as refused:
        pseudo_labels(crowd(40, 4, 1, 0)[0], 2, 0, 3, 6, "fast")
    assert str(refused.value).splitlines() == problems


def test_search_by_function():
    x, seen = crowd(100, 8, 0.4, 0)[0], []

    def spying(features, k1):
        seen.append(k1)
        return nearest(features, k1)

    np.testing.assert_array_equal(pseudo_labels(x, search=spying), pseudo_labels(x))
    assert seen == [30]


def test_defaults_agree():
    defaults = {
        name: p.default for name, p in inspect.signature(pseudo_labels).parameters.items() if name != "features"
    }
    options = asdict(ClusterOptions())
    assert defaults.items() <= options.items()
    assert {name: options[name] for name in options if name not in defaults} == {
        "camera_links": 0.0,
        "links_from": 1,
        "link_colours": 0.0,
        "self_paced": 0.0,
    }, "links and self-paced clusters are off by default"


# --- centroids ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 60), clusters=st.integers(1, 8), seed=st.integers(0, 999))
def test_centroids_are_normalised_means(n, clusters, seed):
    x, _ = crowd(n, n, 1, seed, d=5)
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, clusters, n)
    _, inside = np.unique(labels[labels >= 0], return_inverse=True)
    labels[labels >= 0] = inside  # numbered without gaps
    got = centroids(x, labels)
    assert got.shape == (labels.max() + 1, 5) and got.dtype == torch.float32
    for k, row in enumerate(got):
        mean = np.mean([x[i].double().numpy() for i in range(n) if labels[i] == k], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_centroids_by_hand():
    x = torch.tensor([[1.0, 0], [0, 1], [0, -1], [-1, 0]])
    want = [[2**-0.5, 2**-0.5], [-1, 0]]
    np.testing.assert_allclose(centroids(x, [0, 0, -1, 1]), want, atol=1e-7)
    np.testing.assert_allclose(centroids(x.double().numpy(), torch.tensor([0, 0, -1, 1])), want, atol=1e-7)


def test_centroids_of_outliers_only():
    assert centroids(torch.eye(4), [-1] * 4).shape == (0, 4)


def test_centroids_refuse_other_lengths():
    with pytest.raises(ValueError, match="4 features but 3 labels"):
        centroids(torch.eye(4), [0, 0, 1])


# --- the report --------------------------------------------------------------------------------------------------


def naive_scores(labels, pids):
    """ARI by looking at every pair, NMI by entropies; each outlier a cluster of its own."""
    labels = [k if k >= 0 else f"alone {i}" for i, k in enumerate(labels)]
    pairs = list(combinations(range(len(labels)), 2))
    in_k = [labels[i] == labels[j] for i, j in pairs]
    in_p = [pids[i] == pids[j] for i, j in pairs]
    both, a, b, n = sum(x and y for x, y in zip(in_k, in_p)), sum(in_k), sum(in_p), len(pairs)

    def entropy(values):
        share = np.array([values.count(v) for v in set(values)]) / len(values)
        return -(share * np.log(share)).sum()

    h_k, h_p, h_kp = entropy(labels), entropy(list(pids)), entropy(list(zip(labels, pids)))
    return (both - a * b / n) / ((a + b) / 2 - a * b / n), 2 * (h_k + h_p - h_kp) / (h_k + h_p)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), n=st.integers(6, 40))
def test_scores_equal_naive_ones(seed, n):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 0, 1, rng.integers(-1, 5, n)]
    pids = np.r_[0, 0, 1, rng.integers(0, 4, n)].tolist()
    report = cluster_report(labels, pids)
    ari, nmi = naive_scores(labels.tolist(), pids)
    assert report["ari"] == pytest.approx(ari, abs=1e-9) and report["nmi"] == pytest.approx(nmi, abs=1e-9)


def test_report_by_hand():
    report = cluster_report([0, 0, 1, 1, -1, 2], pids=[1, 1, 2, 2, 3, 4], camids=[1, 2, 1, 1, 2, 3])
    assert report == dict(clusters=3, outlier_share=1 / 6, multi_camera_share=1 / 3, ari=1.0, nmi=1.0)


def test_report_of_what_is_unknown():
    report = cluster_report(np.array([0, 0, 1, -1]))
    assert report == dict(clusters=2, outlier_share=0.25, multi_camera_share=None, ari=None, nmi=None)
    report = cluster_report([0, 0, 1, -1], pids=[1, 1, None, 2], camids=[None] * 4)
    assert report["ari"] is None and report["nmi"] is None and report["multi_camera_share"] is None


def test_report_without_clusters():
    report = cluster_report([-1, -1, -1], pids=[1, 1, 2], camids=[1, 2, 1])
    assert report["clusters"] == 0 and report["outlier_share"] == 1 and report["multi_camera_share"] is None
    assert report["ari"] == 0  # every pair told apart


def test_outliers_cost():
    pids = np.repeat(np.arange(5), 8)
    with_outliers = pids.copy()
    with_outliers[::4] = -1
    assert cluster_report(pids, pids)["ari"] == 1 > cluster_report(with_outliers, pids)["ari"]


def test_single_camera_clusters_are_seen():
    pids, camids = np.repeat(np.arange(6), 10), np.tile([1, 2], 30)
    assert cluster_report(pids, camids=camids)["multi_camera_share"] == 1
    assert cluster_report(2 * pids + camids - 1, camids=camids)["multi_camera_share"] == 0


# --- identical crops ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=40), most=st.integers(1, 6))
def test_thinned_keeps_the_first_of_each(values, most):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kept, speakers = thinned(torch.tensor(values)[:, None].float(), most)
    gone = len(values) - len(kept)
    told = f"{gone} of {len(values)} crops look exactly like {most} others"
    assert [told in str(one.message) for one in said] == [True] * bool(gone)
    wanted = [i for i, v in enumerate(values) if values[:i].count(v) < most]
    assert kept.tolist() == wanted
    assert [values[kept[s]] for s in speakers] == values, "a row is spoken for by its like"
    assert all(kept[s] == i for i, s in enumerate(speakers) if i in wanted), "who is kept speaks for itself"


def test_identical_crops_do_not_cost_a_square():
    x, _ = crowd(300, 15, 0.3, 1, d=64)
    copied, sizes = torch.cat([x[:1].repeat(6000, 1), x]), []

    def spying(features, k1):
        sizes.append(len(features))
        return nearest(features, k1)

    with pytest.warns(UserWarning, match="5,501 of 6,300 crops look exactly like 500 others"):
        labels = pseudo_labels(copied, search=spying)
    assert sizes == [500 + 299] and len(labels) == 6300 and len(set(labels[:6001])) == 1
    with pytest.MonkeyPatch.context() as patch:  # the same as with all copies
        patch.setattr("affscl.labels.clustering.COPIES", 10**6)
        np.testing.assert_array_equal(pseudo_labels(copied[5000:]), labels[5000:])


# --- too few clusters --------------------------------------------------------------------------------------------


def test_two_clusters_will_do():
    require_clusters([0, 1, -1, -1], 0.6, 4)


@pytest.mark.parametrize(
    "labels, message",
    [
        (
            [-1] * 9 + [0],
            "found 1 cluster in 10 crops.*90% of them are outliers: raise eps .now 0.6. or lower min_samples .now 4",
        ),
        ([-1] * 7, "found 0 clusters in 7 crops.*100% of them are outliers: raise eps"),
        ([0] * 9 + [-1], "found 1 cluster in 10 crops.*9 crops are in one cluster: lower eps .now 0.6. or k1 .now 30."),
    ],
)
def test_advice(labels, message):
    with pytest.raises(ValueError, match=message):
        require_clusters(labels, 0.6, 4)


@pytest.mark.parametrize(
    "sizes, k1, message",
    [
        (
            [108, 4, 4, 4],
            30,
            "found 4 clusters in 120 crops, the largest of 108, the mean of 30.*lower eps .now 0.6. or k1",
        ),
        ([45, 44, 43], 10, "found 3 clusters in 132 crops, the largest of 45, the mean of 44"),
    ],
)
def test_few_huge_clusters_warn(sizes, k1, message):
    with pytest.warns(UserWarning, match=message):
        require_clusters(np.repeat(np.arange(len(sizes)), sizes), 0.6, 4, k1)


@pytest.mark.parametrize(
    "sizes, k1", [([17] * 50, 30), ([12] * 40, 10), ([60] * 40, 30), ([9, 1], 30), ([20, 4, 4], 30)]
)
def test_ordinary_clusters_do_not_warn(sizes, k1, recwarn):
    require_clusters(np.repeat(np.arange(len(sizes)), sizes), 0.6, 4, k1)
    assert not recwarn.list


# --- settings chosen from the features ---------------------------------------------------------------------------


def naive_separation(features, labels):
    x = (features - features.mean(0)).double()
    x = x / x.norm(dim=1, keepdim=True)
    total = 0.0
    for i, own in enumerate(labels):
        if own < 0:
            continue
        centres = {}
        for k in range(labels.max() + 1):
            centre = sum(x[j] for j in range(len(x)) if labels[j] == k and j != i)
            centres[k] = float(x[i] @ centre / torch.linalg.norm(centre)) if isinstance(centre, torch.Tensor) else 0.0
        a, b = centres.pop(own), max(centres.values())
        total += (a - b) / (1 - min(a, b))
    return total / len(x)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(8, 40), clusters=st.integers(2, 5), noise=st.floats(0.1, 2), seed=st.integers(0, 999))
def test_separation_equals_the_naive_one(n, clusters, noise, seed):
    x, _ = crowd(n, 6, noise, seed)
    labels = np.r_[np.repeat(np.arange(clusters), 2), np.random.default_rng(seed).integers(-1, clusters, n)][:n]
    labels = np.unique(labels, return_inverse=True)[1] - (labels.min() < 0)
    if labels.max() >= 1:
        assert separation(x, labels.astype(np.int64)) == pytest.approx(naive_separation(x, labels), abs=1e-4)


def test_separation_of_what_cannot_be_separated():
    assert separation(torch.eye(4), np.zeros(4, np.int64)) == separation(torch.eye(4), np.full(4, -1)) == -1


@pytest.mark.parametrize("crops", [2, 4, 8, 16, 40])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_auto_fits_however_many_crops_a_person_has(crops, shift):
    x, pids = crowd(24 * crops, 24, 1.0, seed=crops, d=64)
    x = torch.nn.functional.normalize(x + shift / 8 * torch.ones(64))  # all features have a part in common
    choice = choose_clusters(x)
    best = max(
        cluster_report(pseudo_labels(x, 0.6, m, k1, k2), pids)["ari"]
        for k1, k2 in LADDER
        if k1 < len(x)
        for m in (2, 4)
    )
    assert cluster_report(choice.labels, pids)["ari"] > best - 0.12
    np.testing.assert_array_equal(choice.labels, pseudo_labels(x, 0.6, choice.min_samples, choice.k1, choice.k2))
    np.testing.assert_array_equal(choice.labels, pseudo_labels(x, k1="auto"))


def test_auto_of_the_faults_example():
    x, pids = crowd(120, 30, 0.6, 0, d=64)  # 30 people with 4 crops
    assert cluster_report(pseudo_labels(x), pids)["ari"] < 0.2
    assert cluster_report(pseudo_labels(x, k1="auto"), pids)["ari"] > 0.95


def test_auto_searches_once_and_thins_copies():
    x, seen = crowd(200, 20, 0.4, 0, d=64)[0], []

    def spying(features, k1):
        seen.append((len(features), k1))
        return nearest(features, k1)

    labels = pseudo_labels(torch.cat([x[:1].repeat(3000, 1), x]), k1="auto", search=spying)
    assert seen == [(30 + 199, 30)] and len(labels) == 3200 and len(set(labels[:3001])) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
def test_auto_of_very_few_crops(n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choice = choose_clusters(crowd(n, 2, 0.1, 0)[0])
    assert len(choice.labels) == n and choice.k1 >= choice.k2 >= 1


def test_only_auto_is_a_word_for_k1():
    assert cluster_problems(ClusterOptions(k1="auto")) == []
    assert cluster_problems(ClusterOptions(k1="many")) == ["k1='many': must be a number, or auto"]
    require_clusters(np.repeat(np.arange(40), 3), 0.6, 4, "auto")


def sets_of(labels):
    return [{j for j, x in enumerate(labels) if x == label >= 0} or {i} for i, label in enumerate(labels)]


def naive_reliable(labels, loose, tight, threshold):
    """SpCL's choice, crop for crop, with sets."""
    own, independence, compactness = sets_of(labels), [], []
    for other, shares in (loose, independence), (tight, compactness):
        shares += [len(a & b) / len(a | b) for a, b in zip(own, sets_of(other))]
    best = {c: max(independence[i] for i in own[labels.index(c)]) for c in set(labels) - {-1}}
    if threshold is None:
        threshold = sorted(best.values(), reverse=True)[min(len(best) - 1, round(0.9 * len(best)))]
    kept = [
        x if x >= 0 and best[x] >= threshold and compactness[i] == max(compactness[j] for j in own[i]) else -1
        for i, x in enumerate(labels)
    ]
    kept = [x if kept.count(x) > 1 else -1 for x in kept]
    numbers = {x: n for n, x in enumerate(sorted(set(kept) - {-1}))} | {-1: -1}
    return [numbers[x] for x in kept], threshold


class TestReliable:
    @given(st.lists(st.tuples(*[st.integers(-1, 3)] * 3), min_size=1, max_size=24), st.sampled_from([None, 0.5, 1.0]))
    @settings(max_examples=60, deadline=None)
    def test_as_sets_would_have_it(self, rows, threshold):
        labels, loose, tight = (np.unique([row[i] for row in rows], return_inverse=True)[1] - 1 for i in range(3))
        if labels.max() >= 0:
            kept, used = reliable_labels(labels, loose, tight, threshold)
            wanted, naive = naive_reliable(labels.tolist(), loose.tolist(), tight.tolist(), threshold)
            assert kept.tolist() == wanted and used == pytest.approx(naive)

    def test_golden_choice_of_spcl(self, golden):
        values, threshold = golden("field"), None
        for epoch in range(2):
            three = (values[f"paced_{name}_{epoch}"] for name in ("labels", "loose", "tight"))
            kept, threshold = reliable_labels(*three, threshold)
            wanted = values[f"paced_kept_{epoch}"]
            assert np.array_equal(kept < 0, wanted < 0)
            assert len(set(zip(kept, wanted))) == len(set(kept)) == len(set(wanted))  # the same clusters
            assert threshold == pytest.approx(float(values[f"paced_threshold_{epoch}"]), abs=1e-6)

    def test_nobody_to_choose_from(self):
        outliers = np.full(5, -1)
        assert reliable_labels(outliers, outliers, np.zeros(5, int))[0].tolist() == [-1] * 5
        assert agreement(np.array([], int), np.array([], int)).tolist() == []

    def test_one_graph_gives_the_labels_of_each_radius(self):
        x = torch.nn.functional.normalize(torch.randn(20, 16)[torch.arange(120) % 20] + 0.6 * torch.randn(120, 16))
        x[7] = x[3]
        for eps, labels in zip((0.6, 0.3, 0.5), labels_within((0.6, 0.3, 0.5), x, 3, 12, 4)):
            assert np.array_equal(labels, pseudo_labels(x, eps, 3, 12, 4))

    @pytest.mark.parametrize("gap, eps", [(-0.1, 0.5), (0.5, 0.5), (0.3, 0.8), (float("nan"), 0.5)])
    def test_a_gap_that_leaves_no_room_is_refused(self, gap, eps):
        (problem,) = cluster_problems(ClusterOptions(eps=eps, self_paced=gap))
        assert "self_paced" in problem and "0.02" in problem
