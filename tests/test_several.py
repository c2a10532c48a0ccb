"""Several right answers: MMCL's labels and loss as stored copies of its code have them, SSL's by naive loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.classifier import batch_hard_triplet
from affscl.criteria.factory import LossOptions, make_criterion, require_cameras
from affscl.criteria.several import (
    LastMemory,
    MultiLabel,
    Softened,
    multi_label_loss,
    several_labels,
    softened_targets,
)
from affscl.data.datasets import Sample
from affscl.model.network import Output
from affscl.training.config import Config

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "several.npz").items()}
BANK, INDICES, QUERIES = (GOLDEN[name] for name in ("bank", "indices", "queries"))


def output(q):
    return Output(q, q, q)


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.75, 0.95])
def test_golden_labels(threshold):
    found = several_labels(BANK, INDICES, threshold)
    assert torch.equal(found, GOLDEN[f"labels_{threshold}"] > 0.5)
    assert found[torch.arange(len(INDICES)), INDICES].all()


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_golden_loss_and_gradient(share):
    q = QUERIES.clone().requires_grad_()
    loss = multi_label_loss(q @ BANK.T, GOLDEN["labels_0.6"] > 0.5, share=share)
    torch.testing.assert_close(loss.detach(), GOLDEN[f"loss_{share}"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], GOLDEN[f"grad_{share}"], atol=1e-5, rtol=1e-5)


def test_the_criterion_is_labels_and_loss_and_moves_its_rows():
    criterion = MultiLabel(LastMemory(BANK, momentum=0.25))
    parts = criterion(output(QUERIES), INDICES * 0, INDICES)
    torch.testing.assert_close(parts["multi_label"], GOLDEN["loss_0.01"], atol=1e-5, rtol=1e-5)
    rows = BANK.clone()
    twice = torch.cat([INDICES, INDICES[:3]]), torch.cat([QUERIES, -QUERIES[:3]])
    for _ in range(3):
        criterion.update(output(twice[1]), twice[0], twice[0])
        new = {int(i): F.normalize(0.25 * rows[i] + 0.75 * q, dim=0) for i, q in zip(*twice)}
        for i, row in new.items():
            rows[i] = row
    torch.testing.assert_close(criterion.memory.rows, rows, atol=1e-5, rtol=1e-5)


def test_few_crops_and_identical_ones():
    for bank in (BANK[:3], BANK[:1].repeat(12, 1)):
        marks = several_labels(bank, torch.arange(len(bank)))
        assert marks.diagonal().all()
        assert torch.isfinite(multi_label_loss(bank @ bank.T, marks))


@pytest.mark.parametrize("price", [0.0, 0.02, 0.3])
def test_reliable_crops_by_a_naive_loop(price):
    cameras = [7 * (i % 3) for i in range(len(BANK))]
    found = softened_targets(BANK, cameras, 4, price)
    for i in range(0, len(BANK), 17):
        apart = [
            ((BANK[i] - BANK[j]).norm().item() + price * (cameras[i] == cameras[j]), j)
            for j in range(len(BANK))
            if j != i
        ]
        assert found[i].tolist() == [j for _, j in sorted(apart)[:4]]
    assert softened_targets(BANK[:3], cameras[:3]).shape == (3, 2)


def test_softened_loss_gradient_and_rows_by_naive_loops():
    reliable = softened_targets(BANK, [0] * len(BANK))
    criterion = Softened(LastMemory(BANK, 0.5, 0.1), reliable, own=0.6)
    ours, theirs = QUERIES.clone().requires_grad_(), QUERIES.clone().requires_grad_()
    loss = sum(criterion(output(ours), INDICES, INDICES).values())
    naive = 0
    for q, i in zip(theirs, INDICES.tolist()):
        p = torch.exp(BANK @ q / 0.1) / torch.exp(BANK @ q / 0.1).sum()
        naive = naive - 0.6 * p[i].log() - 0.1 * sum(p[j].log() for j in reliable[i].tolist())
    naive = naive / len(INDICES)
    torch.testing.assert_close(loss, naive, atol=1e-5, rtol=1e-5)
    both = torch.autograd.grad(loss, ours)[0], torch.autograd.grad(naive, theirs)[0]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    criterion.update(output(QUERIES), INDICES, INDICES)
    torch.testing.assert_close(criterion.memory.rows[INDICES], F.normalize(BANK[INDICES] + QUERIES), atol=1e-5, rtol=0)


def test_what_is_missing_is_told():
    with pytest.raises(ValueError, match="remembers crops"):
        MultiLabel(LastMemory(BANK))(output(QUERIES), INDICES)
    with pytest.raises(ValueError, match="camera of every crop"):
        softened_targets(BANK, [0, None] * 75)
    with pytest.raises(ValueError, match="momentum"):
        LastMemory(BANK, momentum=1)


def test_by_name_with_what_they_need():
    features, labels = BANK, torch.arange(len(BANK)) % 12
    made = {
        name: make_criterion(LossOptions(criterion=name, momentum=0.5, margin=0.5), features, labels, [0, 1, 2] * 50)
        for name in ("mmcl", "ssl", "triplet")
    }
    assert isinstance(made["mmcl"], MultiLabel) and isinstance(made["ssl"], Softened)
    assert made["mmcl"].outliers and made["ssl"].outliers and not made["triplet"].outliers
    loss = made["triplet"](output(QUERIES), labels[:20])["triplet"]
    torch.testing.assert_close(loss, batch_hard_triplet(QUERIES, labels[:20], 0.5))
    unknown = [Sample("a.jpg", camid=0), Sample("b.jpg")]
    require_cameras(Config(criterion="mmcl"), unknown)
    with pytest.raises(ValueError, match="criterion='ssl' needs the camera of every training crop, and 1 of 2"):
        require_cameras(Config(criterion="ssl"), unknown)
    with pytest.raises(ValueError, match="'mmcl' has rivals of its own"):
        Config(criterion="mmcl", negatives="camera")
    with pytest.raises(ValueError, match="the criterion 'triplet' has none"):
        Config(criterion="triplet", balance="both")
