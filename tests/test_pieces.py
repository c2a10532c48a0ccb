"""SSG: its code's triplets, naive loops, labels of pieces with and without a source, refusals, runs."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.classifier import batch_hard_triplet
from affscl.criteria.factory import LossOptions, make_criterion
from affscl.criteria.pieces import PieceTriplets, piece_labels
from affscl.data.domains import SOURCE, TARGET
from affscl.labels.clustering import pseudo_labels
from affscl.model.network import Output
from affscl.studies.catalogue import STUDIES
from affscl.studies.sweeps import plan
from affscl.training.config import RECIPES, Config
from affscl.training.loop import train

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "ssg.npz").items()}
X, LABELS = GOLDEN["features"], GOLDEN["labels"]
ROWS = torch.arange(len(X))
SSG = replace(RECIPES["tiny"], criterion="ssg", network="ssg", fusion="multiply")


def output(x):
    return Output(x, x, F.normalize(x))


def cluster(rows):
    return pseudo_labels(rows, 0.5, 3, 8, 3)


def crowd(seed=0):
    """Ten people of eight crops; three pieces of 16 numbers that show them, a coat of five, trousers of two."""
    g = torch.Generator().manual_seed(seed)
    people = torch.arange(10).repeat_interleave(8)
    pieces = [torch.randn(10, 16, generator=g)[of] for of in (people, people // 2, people % 2)]
    return F.normalize(torch.cat(pieces, 1) + 0.3 * torch.randn(80, 48, generator=g)), people


@pytest.mark.parametrize("margin", [0.3, 0.5, 4.0])
def test_golden_loss_and_gradient(margin):
    x = X.clone().requires_grad_()
    loss = sum(PieceTriplets(LABELS, margin)(output(x), ROWS * 0, ROWS).values())
    torch.testing.assert_close(loss.detach(), GOLDEN[f"loss_{margin}"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], GOLDEN[f"grad_{margin}"], atol=1e-5, rtol=1e-4)


def test_unknown_crops_are_neither_mates_nor_strangers():
    labels = torch.where(ROWS % 3 == 0, -1, LABELS[:, 1])
    x = X[:, :16].clone().requires_grad_()
    naive = []
    for i in range(len(x)):
        known = [j for j in range(len(x)) if labels[j] >= 0]
        if labels[i] >= 0:
            away = {j: (x[i] - x[j]).norm() for j in known}
            mates = [away[j] for j in known if labels[j] == labels[i]]
            naive.append((max(mates) - min(away[j] for j in known if labels[j] != labels[i]) + 2).clamp(min=0))
    loss, expected = batch_hard_triplet(x, labels, 2.0), sum(naive) / len(naive)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(part, x, retain_graph=True)[0] for part in (loss, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert (mine[labels < 0] == 0).all()


@pytest.mark.parametrize("labels", [[-1] * 6, [2] * 6, [0, -1, -1, -1, -1, -1]], ids=str)
def test_nobody_known_or_no_strangers_cost_nothing(labels):
    x = X[:6].clone().requires_grad_()
    loss = batch_hard_triplet(x, torch.tensor(labels))
    assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


def test_a_crop_that_a_batch_holds_twice_has_a_finite_gradient():
    x = X[[0, 0, 4, 4, 8]].clone().requires_grad_()
    loss = batch_hard_triplet(x, torch.tensor([0, 0, 1, 1, -1]), 20.0)
    assert loss > 0 and torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_gradients_stay_in_their_piece_and_the_order_does_not_matter():
    x = X.clone().requires_grad_()
    criterion = PieceTriplets(LABELS, 4.0)
    parts = criterion(output(x), ROWS, ROWS)
    for (i, part), j in itertools.product(enumerate(parts.values()), range(3)):
        slope = torch.autograd.grad(part, x, retain_graph=True)[0].chunk(3, 1)[j]
        assert bool(slope.any()) == (i == j)
    order = ROWS.flip(0)
    torch.testing.assert_close(criterion(output(x[order]), order, order), parts)
    renamed = PieceTriplets(torch.tensor([5, 3, 9, 0, 1, 2, 4, 6])[LABELS], 4.0)
    torch.testing.assert_close(renamed(output(x), ROWS, ROWS), parts)


def test_pieces_are_clustered_by_themselves():
    features, people = crowd()
    labels = piece_labels(features, 3, cluster)
    for piece, found in zip(features.split(16, 1), labels.T):
        assert (found.numpy() == cluster(F.normalize(piece))).all()
    assert len(labels[:, 1].unique()) < len(labels[:, 0].unique())
    known = torch.where(people < 3, people, -1)
    both, alone = piece_labels(features, 3, cluster, known), piece_labels(features[24:], 3, cluster)
    assert (both[:24] == people[:24, None]).all() and (both[24:] == torch.where(alone < 0, -1, alone + 3)).all()
    assert (piece_labels(features, 3, lambda rows: 1 / 0, people) == people[:, None]).all()  # nobody is left to cluster
    with pytest.raises(ValueError, match="48 numbers cannot consist of 5"):
        piece_labels(features, 5, cluster)


def test_by_name_with_what_is_known():
    features, people = crowd()
    config = replace(SSG, k1=8, eps=0.5, min_samples=3, margin=0.5)
    made = make_criterion(config, features, people.numpy())
    assert isinstance(made, PieceTriplets) and made.margin == 0.5 and not made.outliers
    assert torch.equal(made.labels, piece_labels(features, 3, cluster))
    joint = make_criterion(config, features, people, None, [SOURCE] * 24 + [TARGET] * 56)
    assert torch.equal(joint.labels, piece_labels(features, 3, cluster, torch.where(people < 3, people, -1)))
    truth = make_criterion(replace(config, labels="truth"), features, people)
    assert torch.equal(truth.labels, people[:, None].repeat(1, 3))
    one = make_criterion(LossOptions(criterion="ssg"), features, people)
    assert one.labels.shape == (80, 1)


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(network="aff"), "network='aff' has one piece: give --network ssg"),
        (dict(clustering="single"), "leave clustering at 'dbscan'"),
        (dict(camera_map=True), "leave camera_map at False"),
        (dict(negatives="camera"), "the criterion 'ssg' has none"),
        (dict(hard_start="hardest"), "the criterion 'ssg' has none"),
        (dict(teacher="mutual"), "criterion='ssg' has none"),
        (dict(pooling="gem"), "pooling='gem' contradicts network='ssg'"),
        (dict(margin=-1.0), "margin must not be negative"),
    ],
)
def test_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        replace(SSG, **changes)


def test_what_goes_together():
    for changes in (
        dict(network="hpm"),
        dict(backbone="mobilenet_v2", weights=None),
        dict(teacher="mean"),
        dict(k1="auto"),
    ):
        assert isinstance(replace(SSG, **changes), Config)
    with pytest.raises(ValueError, match="remembers crops"):
        PieceTriplets(LABELS)(output(X), ROWS)


def test_table3_has_a_line_with_its_own_network():
    config = replace(
        RECIPES["tiny"], source="synthetic", network="mhn", orders=2, clustering="bottom_up", fusion="multiply"
    )
    runs = {run.setting: run.config for run in plan("table3", config, [1])}
    line = runs["SSG, pre-trained"]
    assert (line.network, line.criterion, line.clustering, line.adapt) == ("ssg", "ssg", "dbscan", "pretrain")
    assert (runs["joint"].network, runs["joint"].orders, runs["AE, joint"].network) == ("mhn", 2, "mhn")
    settings = STUDIES["table3"].settings(Config(source="market1501", dataset="dukemtmc"))
    assert {s.name: (s.mAP, s.rank1) for s in settings}["SSG, pre-trained"] == (53.4, 73.0)


@pytest.mark.parametrize("changes", [dict(source="synthetic"), dict(source="synthetic", adapt="pretrain")], ids=str)
def test_a_run(tmp_path, changes):
    small = dict(world_ids=24, world_cams=3, iterations=2, epochs=1, p=4, k=4, height=32, width=16, device="cpu", k1=10)
    history = train(replace(SSG, **small | changes), out=tmp_path / "run").history
    assert np.isfinite(history[1]["loss"]) and {"loss_piece_1", "loss_piece_3"} <= history[1].keys()
