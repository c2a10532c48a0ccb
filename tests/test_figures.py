"""Figures have the panels they promise, show the right things, and refuse what they cannot show."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from torch import nn

from affscl.model.network import AFF, Output
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


class Tiny(nn.Module):
    """Two channels: the first sees red, the second green; the embedding is their mean."""

    def __init__(self):
        super().__init__()
        self.scale, self.pool = nn.Parameter(torch.ones(1)), nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        pooled = self.pool(self.scale * images[:, :2]).flatten(1)
        return Output(pooled, pooled, nn.functional.normalize(pooled))


def test_grad_cam_by_hand():
    image = torch.zeros(1, 3, 8, 4)
    image[0, 0, :4] = 2.0
    image[0, 1, 4:] = 1.0
    model = Tiny()
    red, green = (figures.grad_cam(model, image, torch.tensor(r)) for r in ([1.0, 0.0], [0.0, 1.0]))
    assert red.shape == (1, 8, 4) and red[0, :4].min() == 1 and red[0, 4:].max() == 0
    assert green[0, 4:].min() == 1 and green[0, :4].max() == 0
    own = figures.grad_cam(model, image)[0]  # weights 2 : 1 times maps 2 : 1
    assert own[0, 0] == 1 and torch.isclose(own[7, 0], torch.tensor(0.25))
    assert figures.grad_cam(model, image, torch.tensor([-1.0, -1.0])).max() == 0


def test_grad_cam_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    model = AFF("resnet10", height=64, width=32).train()
    model.neck.eval()
    images = torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        heat = figures.grad_cam(model, images)
    assert heat.shape == (3, 64, 32) and heat.min() >= 0 and torch.allclose(heat.amax((1, 2)), torch.ones(3))
    assert model.training and not model.neck.training and not model.pool._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    np.testing.assert_allclose(figures.grad_cam(model, images[1:2])[0], heat[1], atol=1e-4)


def test_show_heat(tmp_path):
    heat = RNG.random((12, 16, 8))
    assert len(drawn(figures.show_heat(CROPS, heat, columns=5), tmp_path)) == 10
    axes = drawn(figures.show_heat(CROPS[:2], {"a": heat[:2], "b": torch.from_numpy(heat[:2])}), tmp_path)
    assert len(axes) == 6 and axes[4].get_ylabel() == "b" and len(axes[2].images) == 2


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
        ("grad_cam", (Tiny(), CROPS[0]), r"\(b, 3, h, w\)"),
        ("show_heat", (CROPS, np.zeros((12, 5, 5))), "one map for each image"),
    ],
)
def test_mistakes_are_named(name, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(figures, name)(*args)
