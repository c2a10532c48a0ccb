"""AE: its code's values, a naive loop, known people beside crops that explore, refusals, runs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.factory import LossOptions, make_criterion
from affscl.criteria.hybrid import HybridMemory
from affscl.criteria.several import Exploring, neighbour_weights
from affscl.model.network import Output
from affscl.studies.catalogue import STUDIES
from affscl.studies.sweeps import plan
from affscl.training.config import RECIPES, Config
from affscl.training.loop import train

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "ae.npz").items()}
BANK = GOLDEN["bank"]
N = len(BANK)
AE = replace(RECIPES["tiny"], criterion="ae", clustering="single")


def output(q):
    return Output(q, q, q)


def exploring(classes, threshold=0.55, delta=3.5, momentum=0.4):
    return Exploring(HybridMemory(BANK, classes, momentum, 0.05), threshold, delta)


@pytest.mark.parametrize("case, threshold, delta", [("published", 0.55, 3.5), ("others", 0.3, 2.0)])
def test_golden_losses_gradients_and_rows(case, threshold, delta):
    criterion = exploring(torch.arange(N), threshold, delta)
    for step in range(4):
        q, indices, loss, counts, grad, rows = (
            GOLDEN[f"{case}_{name}"][step] for name in ("queries", "indices", "loss", "counts", "grad", "rows")
        )
        assert ((q @ criterion.memory.rows.T > threshold).sum(1) == counts).all()
        q = q.clone().requires_grad_()
        parts = criterion(output(q), indices, indices)
        torch.testing.assert_close(sum(parts.values()).detach(), loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(sum(parts.values()), q)[0], grad, atol=1e-5, rtol=1e-5)
        criterion.update(output(q), indices, indices)
        torch.testing.assert_close(criterion.memory.rows, rows, atol=1e-5, rtol=0)


def test_neighbours_by_a_naive_loop_beside_known_people():
    """The first thirty crops are of five known people, the others are alone."""
    classes = torch.where(torch.arange(N) < 30, torch.arange(N) % 5, torch.arange(N) - 25)
    criterion = exploring(classes, 0.3)
    centres = torch.stack([BANK[classes == c].mean(0) for c in range(N - 25)])
    indices = torch.tensor([0, 7, 29, 30, 41, 55, 88, 41])
    q = F.normalize(BANK[indices] + 0.02)
    naive = 0
    for x, c in zip(q, classes[indices].tolist()):
        log_p = (centres @ x / 0.05).log_softmax(0)
        near = [j for j in range(5, len(centres)) if centres[j] @ x > 0.3] if c >= 5 else []
        share = 3.5 / (len(near) * math.log(len(near))) if len(near) > 1 else 0
        naive = naive - log_p[c] - share * sum(log_p[j] for j in near if j != c)
    loss = sum(criterion(output(q), classes[indices], indices).values())
    torch.testing.assert_close(loss, naive / len(indices), atol=1e-4, rtol=1e-5)


def test_all_neighbours_together_weigh_the_same_where_probability_is_shared():
    for k in (2, 5, 40):
        cosine = torch.full((1, 60), -1.0)
        cosine[0, :k] = 0.9
        weights = neighbour_weights(cosine, torch.tensor([0]), torch.ones(60, dtype=torch.bool))
        assert (weights > 0).sum() == k - 1
        assert float(weights.sum()) * math.log(k) == pytest.approx(3.5 * (k - 1) / k)


def test_nobody_near_leaves_plain_classification():
    criterion = exploring(torch.arange(N), threshold=1.01)
    q, indices = BANK[:6].clone().requires_grad_(), torch.arange(6)
    parts = criterion(output(q), indices, indices)
    assert parts["neighbours"] == 0
    torch.testing.assert_close(parts["own"], F.cross_entropy(q @ BANK.T / 0.05, indices))
    only_itself = exploring(torch.arange(N), threshold=0.999)(output(q), indices, indices)["neighbours"]
    assert only_itself == 0 and torch.isfinite(torch.autograd.grad(only_itself + 0 * parts["own"], q)[0]).all()


def test_the_order_of_the_crops_and_autocast_change_nothing():
    q, indices = GOLDEN["others_queries"][0], GOLDEN["others_indices"][0]
    criterion, order = exploring(torch.arange(N), 0.3), torch.arange(len(q)).flip(0)
    plain = criterion(output(q), indices, indices)
    torch.testing.assert_close(criterion(output(q[order]), indices[order], indices[order]), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(criterion(output(q), indices, indices), plain)


def test_by_name_outliers_explore_and_a_source_is_known():
    labels = np.where(np.arange(N) < 36, np.arange(N) % 4, -1)
    criterion = make_criterion(LossOptions(criterion="ae", momentum=0.5), BANK, labels)
    assert isinstance(criterion, Exploring) and criterion.outliers and criterion.memory.momentum == 0.5
    assert criterion.alone.tolist() == [False] * 4 + [True] * (N - 36)
    known = make_criterion(LossOptions(criterion="ae"), BANK, np.arange(N) % 4)
    assert known(output(BANK[:8]), torch.arange(8) % 4, torch.arange(8))["neighbours"] == 0


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(negatives="camera"), "'ae' has rivals of its own"),
        (dict(balance="both"), "the criterion 'ae' has one memory"),
        (dict(teacher="mutual"), "criterion='ae' has none: set criterion to 'cross_entropy_triplet'"),
        (dict(self_paced=0.02), "clustering='single' and self_paced=0.02"),
        (dict(momentum=1.0), "momentum"),
    ],
)
def test_refused_by_name(changes, word):
    with pytest.raises(ValueError, match=word):
        replace(AE, **changes)


def test_what_is_missing_is_told():
    with pytest.raises(ValueError, match="remembers crops"):
        exploring(torch.arange(N)).update(output(BANK[:2]), torch.arange(2))
    with pytest.raises(ValueError, match="targets"):
        exploring(torch.arange(N))(output(BANK[:2]), torch.tensor([0, N]))


def test_table3_puts_aside_what_ae_cannot_have():
    """Options of clusters and memories stay with the other lines."""
    config = replace(RECIPES["tiny"], source="synthetic", clustering="bottom_up", merged=0.8, criterion="dcc")
    runs = {run.setting: run.config for run in plan("table3", config, [1])}
    explores = runs["AE, joint"]
    assert (explores.clustering, explores.criterion, explores.adapt) == ("single", "ae", "joint")
    assert (runs["joint"].clustering, runs["joint"].merged, runs["joint"].criterion) == ("bottom_up", 0.8, "dcc")
    settings = STUDIES["table3"].settings(Config(source="dukemtmc", dataset="market1501"))
    assert {s.name: (s.mAP, s.rank1) for s in settings}["AE, joint"] == (58.0, 81.6)


@pytest.mark.parametrize("changes", [{}, dict(source="synthetic")], ids=str)
def test_a_run(tmp_path, changes):
    small = dict(world_ids=24, world_cams=3, iterations=2, epochs=1, p=4, k=4, height=32, width=16, device="cpu", k1=10)
    history = train(replace(AE, **small | changes), out=tmp_path / "run").history
    assert np.isfinite(history[1]["loss"]) and {"loss_own", "loss_neighbours"} <= history[1].keys()
