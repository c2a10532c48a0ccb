"""MMT's and MEB-Net's losses against the authors' own numbers, naive oracles, the criteria of a pair and of experts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.classifier import CrossEntropyTriplet
from affscl.criteria.factory import make_criterion
from affscl.criteria.mutual import MutualTeaching, authorities, scatter, soft_entropy, soft_triplet
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


WIDTHS = (16, 10, 12)


@pytest.fixture
def experts(golden):
    """Random features of three experts, and what the authors' step says: `tools/golden_experts.py` has the command."""
    return {name: torch.as_tensor(np.asarray(value)) for name, value in golden("experts").items()}


def wide(parts):
    """Features of several lengths as a team has them: (b, N, d), short ones with zeros at their end."""
    return torch.stack([F.pad(part.float(), (0, max(WIDTHS) - part.shape[1])) for part in parts], 1)


def of_experts(experts, kept=(0, 1, 2), **options):
    """The criterion, an output and the leaves of each expert's features."""
    leaves = {name: [experts[f"{name}{i}"].float().requires_grad_() for i in kept] for name in ("pooled", "neck")}
    taught = {name: [experts[f"taught_{name}{i}"] for i in kept] for name in ("pooled", "neck")}
    options = dict(label_smoothing=0.1, authority=experts["authority"][list(kept)]) | options
    criterion = MutualTeaching([F.normalize(experts[f"rows{i}"]) for i in kept], **options)
    for place, i in enumerate(kept):
        criterion.classifiers[place].data = wide([experts[f"rows{i}"]])[:, 0]
        criterion.means[place] = wide([experts[f"taught_rows{i}"]])[:, 0]
    pooled, neck = (wide([*leaves[name], *taught[name]]) for name in ("pooled", "neck"))
    return criterion, Output(pooled, neck, neck), leaves


def test_experts_losses_gradients_and_authorities_are_the_published_ones(experts):
    features = [experts[f"features{i}"].float() for i in range(3)]
    found = torch.stack([scatter(rows, experts["labels"]) for rows in features])
    torch.testing.assert_close(found, experts["scatters"].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        authorities(features, experts["labels"]), experts["authority"].float(), atol=1e-5, rtol=0
    )
    criterion, output, leaves = of_experts(experts)
    parts = criterion(output, experts["targets"])
    for name in PARTS:
        assert float(parts[name].detach() / SHARES[name]) == pytest.approx(float(experts[name]), abs=1e-5)
    sum(parts.values()).backward()
    for i, d in enumerate(WIDTHS):
        for name, own in leaves.items():
            torch.testing.assert_close(own[i].grad, experts[f"{name}{i}_grad"].float(), atol=1e-5, rtol=0)
        rows = criterion.classifiers[i].grad
        torch.testing.assert_close(rows[:, :d], experts[f"rows{i}_grad"].float(), atol=1e-5, rtol=0)
        assert not rows[:, d:].any(), "numbers that an expert does not have learn nothing"


def test_an_expert_learns_from_the_teachers_of_others_alone(experts):
    """What a student hears is changed by each other teacher, by its own never, and by one without authority neither."""
    criterion, output, _ = of_experts(experts, authority=torch.tensor([1.0, 0.0, 2.0]))
    heard = criterion.judged(0, output, experts["targets"])
    for j, changes in enumerate((False, False, True)):
        other = Output(*(part.clone() for part in output))
        for part in other:
            part[:, 3 + j, : WIDTHS[j]] += torch.randn(12, WIDTHS[j])
        now = criterion.judged(0, other, experts["targets"])
        assert torch.equal(now[0], heard[0]) and torch.equal(now[1], heard[1])
        assert [not torch.equal(a, b) for a, b in zip(now[2:], heard[2:])] == [changes] * 2


def test_two_experts_of_equal_authority_are_mmts_pair(published):
    rows = F.normalize(published["rows"][0])
    pair, experts = MutualTeaching(rows), MutualTeaching([rows, rows], authority=torch.ones(2))
    output, targets = output_of(published), published["targets"]
    assert all(torch.equal(pair(output, targets)[name], part) for name, part in experts(output, targets).items())


def test_the_order_of_experts_does_not_matter(experts):
    one, other = (of_experts(experts, order)[:2] for order in ((0, 1, 2), (2, 0, 1)))
    for name, part in one[0](one[1], experts["targets"]).items():
        torch.testing.assert_close(other[0](other[1], experts["targets"])[name], part)


def test_authority_knows_no_order_no_place_and_no_outliers():
    x, labels = F.normalize(torch.randn(30, 8)), torch.arange(30) % 4
    found = authorities([x, x[:, :5]], labels)
    assert float(found.mean()) == pytest.approx(1, abs=1e-6)
    order = torch.randperm(30)
    torch.testing.assert_close(authorities([x[order], x[order, :5]], labels[order]), found)
    torch.testing.assert_close(scatter(x @ torch.linalg.qr(torch.randn(8, 8))[0] + 3, labels), scatter(x, labels))
    stranger = torch.cat([x, 9 * torch.ones(1, 8)]), torch.cat([labels, torch.tensor([-1])])
    torch.testing.assert_close(scatter(*stranger), scatter(x, labels))
    means = F.one_hot(labels).float() @ torch.stack([x[labels == k].mean(0) for k in range(4)])
    assert authorities([x, 0.5 * (x + means)], labels).argmax() == 1, "nearer to the clusters' means: more authority"
    assert authorities([x, x[:, :5]], torch.zeros(30, dtype=int)).tolist() == [1, 1], "one cluster tells nothing"
    assert authorities([means, x], labels).isfinite().all(), "crops that are their mean"


def test_an_epoch_of_experts(experts):
    features, labels = torch.randn(8, 256 + 512), np.array([0, 0, 1, 1, 2, 2, -1, 2])
    features = F.normalize(torch.cat([F.normalize(part) for part in features.split([256, 512], 1)], 1))
    own = dict(experts=("resnet18",), expert_weights=("none",), soft_triplet=0.6)
    config = Config(teacher="brainstorming", backbone="resnet10", criterion="cross_entropy_triplet", **own)
    criterion = make_criterion(config, features, labels)
    assert criterion.means.shape == (2, 3, 512) and criterion.shares == (0.5, 0.6)
    torch.testing.assert_close(criterion.authority, authorities(features.split([256, 512], 1), labels))
    for i, (d, part) in enumerate(zip((256, 512), features.split([256, 512], 1))):
        rows = torch.stack([F.normalize(part[labels == k].mean(0), dim=0) for k in range(3)])
        torch.testing.assert_close(criterion.classifiers[i][:, :d].detach(), rows / (0.05 * d**0.5))
        assert not criterion.classifiers[i][:, d:].any()


def test_a_criterion_of_one_network_is_refused():
    with pytest.raises(ValueError, match="nobody to learn from"):
        MutualTeaching([F.normalize(torch.randn(3, 4))])
