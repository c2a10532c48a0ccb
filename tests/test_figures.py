"""Figures have the panels they promise, show the right things, and refuse what they cannot show."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from affscl.scores import figures
from affscl.scores.evaluation import score

RNG = np.random.default_rng(0)
CROPS = RNG.integers(0, 256, (12, 3, 16, 8), dtype=np.uint8)
FEATURES = torch.nn.functional.normalize(torch.from_numpy(RNG.normal(size=(60, 8))).float(), dim=1)
PIDS, CAMIDS = RNG.integers(1, 6, 60), RNG.integers(0, 3, 60)
ROWS = [
    {"epoch": 0, "mAP": 0.1, "rank1": 0.2, "seconds": {}},
    {
        "epoch": 1,
        "mAP": None,
        "loss": 3.0,
        "loss_hard": 2.0,
        "clusters": 9,
        "outlier_share": 0.5,
        "multi_camera_share": None,
        "ari": None,
    },
    {
        "epoch": 2,
        "mAP": 0.3,
        "loss": 2.0,
        "loss_hard": 1.0,
        "clusters": 8,
        "outlier_share": 0.4,
        "multi_camera_share": None,
        "ari": None,
    },
]


def drawn(figure, tmp_path):
    """The figure's axes, once it has been written to a file without pyplot's help."""
    assert isinstance(figure, Figure) and not plt.get_fignums()
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 500
    return figure.axes


def frame(ax):
    """The colour of a crop's frame, None where there is none."""
    return ax.spines["left"].get_edgecolor() if ax.spines["left"].get_visible() else None


def shown(axes):
    return [ax for ax in axes if ax.images]


def test_image_grid(tmp_path):
    axes = drawn(
        figures.image_grid(CROPS, [f"{i}" for i in range(12)], columns=5, right=np.arange(12) % 2 == 0), tmp_path
    )
    assert len(axes) == 15 and len(shown(axes)) == 12
    np.testing.assert_array_equal(axes[7].images[0].get_array(), CROPS[7].transpose(1, 2, 0))
    assert (
        axes[7].get_title() == "7"
        and same_color(frame(axes[7]), figures.RED)
        and same_color(frame(axes[6]), figures.GREEN)
    )
    assert len(drawn(figures.image_grid(torch.from_numpy(CROPS[:3])), tmp_path)) == 3


def test_top_follows_the_rules_of_evaluation():
    distance = np.array([[0.1, 0.2, 0.2, 0.5, 0.3]])
    pids, camids = np.array([1, 1, 2, 1, 0]), np.array([0, 1, 0, 2, 0])
    indices, matches = figures.top(distance, [1], pids, [0], camids, k=6)
    assert indices.tolist() == [[2, 1, 4, 3, -1, -1]] and matches.tolist() == [[False, True, False, True, False, False]]
    assert figures.top(distance, [1], pids, None, None, k=2)[0].tolist() == [[0, 2]]


def test_the_first_of_every_list_is_rank_1():
    distance = np.round(RNG.random((20, 60)), 1)
    ids = RNG.integers(1, 6, 20), PIDS, RNG.integers(0, 3, 20), CAMIDS
    found = figures.top(distance, *ids, k=50)[1]
    np.testing.assert_allclose(np.maximum.accumulate(found, 1).mean(0)[:10], score(distance, *ids).cmc[:10])


def test_ranked_list(tmp_path):
    indices, matches = np.array([[3, 1, 0], [2, -1, -1]]), np.array([[True, False, False], [False, False, False]])
    axes = drawn(figures.ranked_list(CROPS[:2], CROPS[4:], indices, matches), tmp_path)
    assert len(axes) == 8 and len(shown(axes)) == 6
    np.testing.assert_array_equal(axes[1].images[0].get_array(), CROPS[7].transpose(1, 2, 0))
    assert (
        frame(axes[0]) is None and same_color(frame(axes[1]), figures.GREEN) and same_color(frame(axes[2]), figures.RED)
    )
    assert axes[1].spines["left"].get_linestyle() != axes[2].spines["left"].get_linestyle()


def test_cmc_curve(tmp_path):
    scores = score(RNG.random((9, 60)), PIDS[:9], PIDS, None, None)
    (ax,) = drawn(figures.cmc_curve({"one": scores, "two": scores}, ranks=10), tmp_path)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 100 * scores.cmc[:10])
    assert f"one: mAP {100 * scores.mAP:.1f}" in ax.get_legend().get_texts()[0].get_text()


def test_history_draws_what_was_measured(tmp_path):
    axes = drawn(figures.history(ROWS), tmp_path)
    assert [ax.get_title() for ax in axes] == ["retrieval (%)", "loss", "clusters", "shares (%)"]
    assert axes[0].lines[0].get_xdata().tolist() == [0, 2] and np.allclose(axes[0].lines[0].get_ydata(), [10, 30])
    assert [line.get_label() for line in axes[1].lines] == ["loss", "hard"]


def test_sweep_means_over_seeds(tmp_path):
    rows = [{"eps": e, "mAP": m, "rank1": 0.9} for e, m in ((0.6, 0.5), (0.5, 0.3), (0.6, 0.7))]
    (ax,) = drawn(figures.sweep(rows, "eps"), tmp_path)
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5, 30], [0.6, 60]])


def test_distances(tmp_path):
    (ax,) = drawn(figures.distances(FEATURES, PIDS, CAMIDS, pairs=1000), tmp_path)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(texts) == 4 and texts[0].startswith("same person, same camera")
    (ax,) = drawn(figures.distances(FEATURES, PIDS), tmp_path)
    same = np.triu(PIDS[:, None] == PIDS, 1)
    exact = (1 - FEATURES @ FEATURES.T).numpy()[same].mean()
    assert ax.get_legend().get_texts()[0].get_text() == f"same person, mean {exact:.2f}"


def test_pairs_are_sorted_by_kind():
    kinds = figures._pair_kinds(PIDS, CAMIDS, 500, np.random.default_rng(0))
    for name, (i, j) in kinds.items():
        assert len(i) and (i != j).all()
        assert ((PIDS[i] == PIDS[j]) == name.startswith("same person")).all()
        assert ((CAMIDS[i] == CAMIDS[j]) == name.endswith("same camera")).all()


def test_tsne_is_seeded(tmp_path):
    labels = np.where(np.arange(60) < 5, -1, PIDS)
    axes = drawn(figures.tsne(FEATURES, labels, CAMIDS), tmp_path)
    again = figures.tsne(FEATURES, labels, CAMIDS).axes
    assert len(axes) == 2 and len(drawn(figures.tsne(FEATURES, PIDS), tmp_path)) == 1
    assert len(axes[0].collections[-1].get_offsets()) == 5
    for one, two in zip(axes[1].collections, again[1].collections):
        np.testing.assert_array_equal(one.get_offsets(), two.get_offsets())


def test_cluster_montage(tmp_path):
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -1])
    pids = np.array([5, 5, 7, 5, 7, 7, 1, 2, 2, 9, 9, 9])
    axes = drawn(figures.cluster_montage(CROPS, labels, pids, columns=3), tmp_path)
    assert len(axes) == 9 and len(shown(axes)) == 8
    assert [axes[i].get_ylabel() for i in (0, 3, 6)] == [
        "cluster 0\n4 crops",
        "cluster 2\n3 crops",
        "cluster 1\n2 crops",
    ]
    assert same_color(frame(axes[2]), figures.RED) and same_color(frame(axes[0]), figures.GREEN)
    assert len(drawn(figures.cluster_montage(CROPS, labels, clusters=[1], columns=4), tmp_path)) == 4


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("image_grid", (CROPS / 255,), "uint8 crops"),
        ("image_grid", (CROPS.transpose(0, 2, 3, 1),), "uint8 crops"),
        ("image_grid", (CROPS, ["one"]), "12 images, 1 titles"),
        ("image_grid", (CROPS[:0],), "no images"),
        ("ranked_list", (CROPS[:2], CROPS, np.zeros((3, 4), int), np.zeros((3, 4), bool)), r"must be \(2, k\)"),
        ("top", (np.zeros((2, 3)), [1, 2], [1, 2], None, None), "2 queries and 2 gallery"),
        ("cmc_curve", ({},), "empty"),
        ("history", ([],), "rows"),
        ("history", ([{"mAP": 1}],), "epoch"),
        ("history", ([{"epoch": 1, "mAP": None}],), "no metric"),
        ("sweep", ([{"eps": 1, "mAP": 0.5}], "eps"), "eps, mAP and rank1"),
        ("distances", (FEATURES, PIDS[:4]), "60 features, 4 pids"),
        ("tsne", (FEATURES[:9], PIDS[:9]), "perplexity"),
        ("tsne", (FEATURES, PIDS, CAMIDS[:3]), "3 camids"),
        ("cluster_montage", (CROPS, np.full(12, -1)), "0 clusters"),
        ("cluster_montage", (CROPS, np.zeros(12, int), None, [3]), "no such clusters"),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(figures, name)(*args)


def test_unknown_cameras_equal_nothing(tmp_path):
    distance, pids = np.array([[0.0, 1.0, 2.0, 3.0]]), [1, 2, 1, 1]
    indices, matches = figures.top(distance, [1], pids, [None], [None, None, None, 3], k=4)
    assert indices.tolist() == [[0, 1, 2, 3]] and matches.sum() == 3
    assert figures.top(distance, [1], pids, [3], [None, None, 3, 3], k=3)[0].tolist() == [[0, 1, -1]]
    camids = np.where(np.arange(60) < 20, None, CAMIDS)
    kinds = figures._pair_kinds(PIDS, figures._cameras(camids), 1000, np.random.default_rng(0))
    assert len(kinds) == 4 and all(min(i.min(), j.min()) >= 20 for i, j in kinds.values())
    assert len(drawn(figures.tsne(FEATURES, PIDS, camids), tmp_path)) == 2


def test_tsne_takes_names(tmp_path):
    (ax,) = drawn(figures.tsne(FEATURES, np.where(PIDS > 3, "source", "target")), tmp_path)
    assert ax.get_legend_handles_labels()[1] == ["source", "target"]
