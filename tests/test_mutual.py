"""MMT's losses against the authors' own numbers, naive oracles, and the criterion of a pair."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.classifier import CrossEntropyTriplet
from affscl.criteria.factory import make_criterion
from affscl.criteria.mutual import MutualTeaching, soft_entropy, soft_triplet
from affscl.model.network import Output
from affscl.training.config import Config

PARTS = ("cross_entropy", "triplet", "soft_entropy", "soft_triplet")
SHARES = dict(zip(PARTS, (0.5, 0.2, 0.5, 0.8)))


@pytest.fixture
def published(golden):
    """Random features of a pair, and what the authors' losses say of them: `tools/golden_mutual.py` has the command."""
    return {name: torch.as_tensor(np.asarray(value)) for name, value in golden("mutual").items()}


def criterion_of(published, **options):
    criterion = MutualTeaching(F.normalize(published["rows"][0]), **options).double()
    for own, rows in zip(criterion.classifiers, published["rows"]):
        own.data = rows.clone()
    criterion.means.copy_(published["means"])
    return criterion


def output_of(published):
    pooled, neck = (published[name].float().requires_grad_() for name in ("pooled", "neck"))
    return Output(pooled, neck, neck)


def test_losses_and_gradients_are_the_published_ones(published):
    criterion, output = criterion_of(published).float(), output_of(published)
    parts = criterion(output, published["targets"])
    for name in PARTS:
        assert float(parts[name].detach() / SHARES[name]) == pytest.approx(float(published[name]), abs=1e-5)
    loss = sum(parts.values())
    assert float(loss.detach()) == pytest.approx(float(published["loss"]), abs=1e-5)
    loss.backward()
    for name in ("pooled", "neck"):
        found = getattr(output, name).grad
        torch.testing.assert_close(found, published[f"{name}_grad"].float(), atol=1e-5, rtol=0)
        assert not found[:, 2:].any(), "teachers learn nothing"
    rows = torch.stack([own.grad for own in criterion.classifiers])
    torch.testing.assert_close(rows, published["rows_grad"].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shares", [(0, 0), (1, 1), (0.3, 0), (0, 1)])
def test_a_share_of_zero_leaves_its_part_out(published, shares):
    parts = criterion_of(published, shares=shares).float()(output_of(published), published["targets"])
    weights = dict(zip(PARTS, (1 - shares[0], 1 - shares[1], *shares)))
    assert set(parts) == {name for name, weight in weights.items() if weight}
    for name, part in parts.items():
        assert float(part.detach()) == pytest.approx(weights[name] * float(published[name]), abs=1e-4)


def test_the_teachers_classifiers_follow(published):
    criterion = criterion_of(published)
    criterion.follow(0.75)
    torch.testing.assert_close(criterion.means, 0.75 * published["means"] + 0.25 * published["rows"])
    criterion.follow(0.0)
    torch.testing.assert_close(criterion.means, published["rows"])
    assert {name for name, _ in criterion.named_parameters()} == {"classifiers.0", "classifiers.1"}


def test_a_crop_alone_in_its_cluster_is_its_own_mate():
    x = torch.randn(3, 4, requires_grad=True)
    loss = soft_triplet(x, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_order_of_a_batch_does_not_matter(published):
    criterion, order = criterion_of(published).float(), torch.randperm(12)
    output, targets = output_of(published), published["targets"]
    turned = Output(*(part[order] for part in output))
    for name, part in criterion(output, targets).items():
        torch.testing.assert_close(criterion(turned, targets[order])[name], part)


def test_a_sure_teacher_is_a_label():
    logits, taught = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(soft_entropy(logits, 1e5 * taught), F.cross_entropy(logits, taught.argmax(1)))


def test_the_criterion_of_an_epoch():
    features, labels = F.normalize(torch.randn(8, 16)), np.array([0, 0, 1, 1, 2, 2, -1, 2])
    pair = Config(teacher="mutual", criterion="cross_entropy_triplet", label_smoothing=0.1, soft_triplet=0.6)
    criterion = make_criterion(pair, features, labels)
    assert isinstance(criterion, MutualTeaching) and criterion.shares == (0.5, 0.6)
    assert criterion.label_smoothing == 0.1 and criterion.means.shape == (2, 3, 16)
    alone = Config(teacher="mean", criterion="cross_entropy_triplet")
    assert isinstance(make_criterion(alone, features, labels), CrossEntropyTriplet)
