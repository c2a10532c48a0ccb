"""Triplet, classifier, centre loss and strong baseline against naive loops, autograd with SGD, and values by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from criteria_data import D as LENGTH
from criteria_data import K as CLUSTERS
from criteria_data import outputs, world
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.criteria.classifier import CentreLoss, CrossEntropyTriplet, StrongBaseline, batch_hard_triplet
from affscl.model.network import AFF, Output, make_neck

K, D = 6, 5
cases = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)


def batch(seed=0, b=12, d=D, k=K):
    """Features as a leaf, targets with repetitions and absentees."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, d, generator=g).requires_grad_(), torch.randint(0, k, (b,), generator=g)


# Triplet loss


def naive_triplet(x, targets, margin):
    losses = []
    for i, t in enumerate(targets.tolist()):
        distances = [(math.dist(x[i].tolist(), other.tolist()), u == t) for other, u in zip(x, targets.tolist())]
        negatives = [d for d, same in distances if not same]
        farthest = max(d for d, same in distances if same)
        losses.append(max(0.0, farthest - min(negatives) + margin) if negatives else 0.0)
    return sum(losses) / len(losses)


@cases
@given(seeds, st.sampled_from([0.0, 0.3, 1.0]))
def test_triplet_is_the_search_for_the_hardest_pairs(seed, margin):
    _, _, x, targets, *_ = world(seed)
    x = x.detach()
    assert float(batch_hard_triplet(x, targets, margin)) == pytest.approx(naive_triplet(x, targets, margin), abs=1e-4)


def test_triplet_corner_cases():
    twins = torch.ones(4, 3, requires_grad=True)  # identical features: every distance is zero
    loss = batch_hard_triplet(twins, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and torch.isfinite(twins.grad).all()
    alone = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = batch_hard_triplet(alone, torch.zeros(4, dtype=torch.long))  # no stranger
    loss.backward()
    assert loss == 0 and not alone.grad.any()


# The baseline of Table 4


def test_baseline_starts_with_the_memorys_logits():
    rows, _, _, _, *_ = world()
    baseline = CrossEntropyTriplet(rows, temperature=0.05)
    g = torch.Generator().manual_seed(0)
    neck = (
        F.normalize(torch.randn(12, LENGTH, generator=g), dim=1) * LENGTH**0.5
    )  # as long as BatchNorm leaves it on average
    torch.testing.assert_close(
        baseline.classifier(neck), F.normalize(neck, dim=1) @ rows.T / 0.05, rtol=1e-4, atol=1e-4
    )
    (weight,) = baseline.parameters()
    assert weight.shape == (CLUSTERS, LENGTH) and weight.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_the_target(smoothing):
    rows, _, x, targets, *_ = world()
    baseline, output = CrossEntropyTriplet(rows, label_smoothing=smoothing), outputs(x.detach())
    log_probability = baseline.classifier(output.neck).log_softmax(1)
    goal = (1 - smoothing) * F.one_hot(targets, CLUSTERS) + smoothing / CLUSTERS
    parts = baseline(output, targets)
    torch.testing.assert_close(parts["cross_entropy"], -(goal * log_probability).sum(1).mean())
    torch.testing.assert_close(parts["triplet"], batch_hard_triplet(output.pooled, targets, 0.3))


def test_baseline_update_changes_nothing():
    rows, _, x, targets, *_ = world()
    baseline = CrossEntropyTriplet(rows)
    before = baseline.classifier.weight.detach().clone()
    baseline.update(outputs(x), targets)
    assert torch.equal(baseline.classifier.weight, before)


def test_the_baseline_refuses_on_its_own():
    rows, *_ = world()
    with pytest.raises(ValueError, match="temperature"):
        CrossEntropyTriplet(rows, temperature=-1)
    with pytest.raises(ValueError) as caught:
        CrossEntropyTriplet(rows, temperature=-1, label_smoothing=2, margin=-1)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ValueError, match="outliers"):
        CrossEntropyTriplet(rows)(outputs(torch.randn(2, LENGTH)), torch.tensor([0, CLUSTERS]))


# Centre loss


def naive_centre(features, targets, centres):
    """Mean squared distance to the own centre, a number at a time."""
    total = 0.0
    for x, t in zip(features.tolist(), targets.tolist()):
        total += sum((a - c) ** 2 for a, c in zip(x, centres[t].tolist()))
    return total / len(features)


@cases
@given(seeds)
def test_centre_loss_is_the_naive_loop(seed):
    torch.manual_seed(seed)
    x, targets = batch(seed)
    loss = CentreLoss(K, D)
    assert float(loss(x, targets).detach()) == pytest.approx(naive_centre(x, targets, loss.centres), rel=1e-5)


def test_centre_loss_by_hand():
    loss = CentreLoss(2, 2)
    loss.centres.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    x, targets = torch.tensor([[3.0, 4.0], [1.0, 3.0]]), torch.tensor([0, 1])
    assert float(loss(x, targets)) == (25 + 4) / 2
    loss.update(x, targets, rate=0.5)  # 2 * 0.5 / 2: halfway
    assert loss.centres.tolist() == [[1.5, 2.0], [1.0, 2.0]]


def test_centre_loss_pulls_features_and_learns_nothing_itself():
    x, targets = batch()
    loss = CentreLoss(K, D)
    loss(x, targets).backward()
    torch.testing.assert_close(x.grad, 2 * (x - loss.centres[targets]).detach() / len(x))
    assert not list(loss.parameters()) and set(loss.state_dict()) == {"centres"}


@cases
@given(seeds, st.floats(0.05, 1), st.floats(1e-4, 10))
def test_update_is_sgd_on_the_gradient_divided_by_the_weight(seed, rate, weight):
    """The published trainer: the weighted loss's gradient at the centres, divided by the weight, makes SGD's step."""
    torch.manual_seed(seed)
    x, targets = batch(seed)
    loss = CentreLoss(K, D)
    leaf = torch.nn.Parameter(loss.centres.clone())
    (weight * (x - leaf[targets]).square().sum(1).mean()).backward()
    leaf.grad /= weight
    torch.optim.SGD([leaf], lr=rate).step()
    loss.update(x, targets, rate)
    torch.testing.assert_close(loss.centres, leaf.detach(), rtol=1e-4, atol=1e-5)


def test_update_leaves_absent_people_alone_and_ignores_order():
    x, targets = batch(3)
    targets = targets % 4  # 4 and 5 are absent
    one, other = CentreLoss(K, D), CentreLoss(K, D)
    other.load_state_dict(one.state_dict())
    before, order = one.centres.clone(), torch.randperm(len(x))
    one.update(x, targets, 0.5)
    other.update(x[order], targets[order], 0.5)
    assert torch.equal(one.centres[4:], before[4:]) and not torch.equal(one.centres[:4], before[:4])
    torch.testing.assert_close(one.centres, other.centres)


def test_at_half_a_batch_of_one_person_lands_on_its_mean():
    x, _ = batch()
    loss = CentreLoss(K, D)
    loss.update(x, torch.full((len(x),), 2), 0.5)
    torch.testing.assert_close(loss.centres[2], x.detach().mean(0))


def test_update_between_forward_and_backward_does_not_change_the_gradient():
    x, targets = batch()
    loss = CentreLoss(K, D)
    expected = 2 * (x - loss.centres[targets]).detach() / len(x)
    value = loss(x, targets)
    loss.update(x, targets, 0.5)
    value.backward()
    torch.testing.assert_close(x.grad, expected)


def test_centre_loss_computes_in_float32_under_autocast():
    x, targets = batch(b=64, d=32)
    one, other = CentreLoss(K, 32), CentreLoss(K, 32)
    other.load_state_dict(one.state_dict())
    expected = one(x, targets)
    one.update(x, targets, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(other(x, targets), expected)
        other.update(x, targets, 0.5)
    assert torch.equal(one.centres, other.centres)
    assert other(x.bfloat16(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    "features, targets, message",
    [
        (torch.zeros(3, D + 1), [0, 1, 2], r"features must be \(b, 5\)"),
        (torch.zeros(3, 1), [0, 1, 2], r"features must be \(b, 5\)"),
        (torch.zeros(3, D), [0, 1, K], r"targets must lie in 0\.\.5"),
        (torch.zeros(3, D), [0, 1, -1], "outliers"),
    ],
)
def test_centre_loss_refuses(features, targets, message):
    loss = CentreLoss(K, D)
    with pytest.raises(ValueError, match=message):
        loss(features, torch.tensor(targets))
    with pytest.raises(ValueError, match=message):
        loss.update(features, torch.tensor(targets))


# The strong baseline


def naive_smoothed(logits, targets, share):
    """Cross-entropy with (1 - share) on the target and share / K on everybody, the target among them."""
    total = 0.0
    for row, t in zip(logits.double().tolist(), targets.tolist()):
        norm = math.log(sum(math.exp(v) for v in row))
        total -= sum((share / len(row) + (1 - share) * (i == t)) * (v - norm) for i, v in enumerate(row))
    return total / len(targets)


@cases
@given(seeds, st.sampled_from([0.0, 0.1, 0.5]))
def test_parts_are_the_pieces(seed, share):
    torch.manual_seed(seed)
    x, targets = batch(seed)
    criterion, output = StrongBaseline(K, D, label_smoothing=share, margin=0.2, centre_weight=0.01), outputs(x)
    criterion.classifier.weight.data.mul_(1000)  # logits worth looking at
    parts = criterion(output, targets)
    assert list(parts) == ["cross_entropy", "triplet", "centre"]
    logits = (output.neck @ criterion.classifier.weight.T).detach()
    assert float(parts["cross_entropy"].detach()) == pytest.approx(naive_smoothed(logits, targets, share), rel=1e-4)
    torch.testing.assert_close(parts["triplet"], batch_hard_triplet(x, targets, 0.2))
    torch.testing.assert_close(parts["centre"], 0.01 * criterion.centre(x, targets))


def test_starts_as_published():
    torch.manual_seed(0)
    criterion = StrongBaseline(300, 400)
    (weight,) = criterion.parameters()
    assert weight is criterion.classifier.weight and criterion.classifier.bias is None
    assert weight.shape == (300, 400) and weight.requires_grad
    assert abs(float(weight.detach().mean())) < 1e-5 and float(weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    x = torch.randn(8, 400)
    first = criterion(outputs(x), torch.arange(8))["cross_entropy"]
    assert float(first.detach()) == pytest.approx(math.log(300), abs=0.05)  # it cannot tell anybody apart yet


def test_is_a_baseline():
    assert isinstance(StrongBaseline(K, D), CrossEntropyTriplet)


def test_which_part_reads_which_vector():
    """Cross-entropy reads the neck alone, the other two what lies before it; nothing reads unit rows."""
    torch.manual_seed(0)
    criterion = StrongBaseline(K, D, centre_weight=0.01)
    _, targets = batch()
    leaves = Output(*(torch.randn(12, D, requires_grad=True) for _ in range(3)))
    readers = {}
    for name, part in criterion(leaves, targets).items():
        grads = torch.autograd.grad(part, leaves, allow_unused=True, retain_graph=True)
        readers[name] = [field for field, grad in zip(Output._fields, grads) if grad is not None]
    assert readers == {"cross_entropy": ["neck"], "triplet": ["pooled"], "centre": ["pooled"]}


@cases
@given(seeds)
def test_behind_the_neck_the_classifier_can_neither_move_nor_stretch_the_features(seed):
    """Why the baseline has a neck: size and place of the pooled features are the other losses' affair."""
    torch.manual_seed(seed)
    x, targets = batch(seed, b=32)
    criterion, neck = StrongBaseline(K, D), make_neck(D)
    criterion.classifier.weight.data.mul_(1000)
    (slope,) = torch.autograd.grad(criterion(Output(x, neck(x), x), targets)["cross_entropy"], x)
    assert float(slope.abs().max()) > 1e-3  # it has wishes, but not these
    away = (x - x.mean(0)).detach()
    torch.testing.assert_close(slope.sum(0), torch.zeros(D), rtol=0, atol=1e-5)
    torch.testing.assert_close((slope * away).sum(0), torch.zeros(D), rtol=0, atol=1e-3)


def test_centre_loss_comes_off():
    torch.manual_seed(0)
    criterion, (x, targets) = StrongBaseline(K, D), batch()
    assert list(criterion(outputs(x), targets)) == ["cross_entropy", "triplet"]
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.update(outputs(x), targets)
    assert set(before) == {"classifier.weight"} and torch.equal(
        before["classifier.weight"], criterion.classifier.weight
    )


def test_one_step_equals_the_published_two_optimizers():
    """Classifier, features and centres after one step, against autograd and a second optimizer for the centres."""
    torch.manual_seed(0)
    criterion, (x, targets) = StrongBaseline(K, D, centre_weight=0.0005), batch()
    weight = criterion.classifier.weight.detach().clone().requires_grad_()
    centres, y = criterion.centre.centres.clone().requires_grad_(), x.detach().clone().requires_grad_()

    one = torch.optim.Adam([x, *criterion.parameters()], lr=0.1)
    output = outputs(x)
    sum(criterion(output, targets).values()).backward()
    criterion.update(output, targets)
    one.step()

    two, slow = torch.optim.Adam([y, weight], lr=0.1), torch.optim.SGD([centres], lr=0.5)
    output = outputs(y)
    loss = F.cross_entropy(output.neck @ weight.T, targets, label_smoothing=0.1) + batch_hard_triplet(y, targets, 0.3)
    (loss + 0.0005 * (y - centres[targets]).square().sum(1).mean()).backward()
    two.step()
    centres.grad *= 1 / 0.0005
    slow.step()
    torch.testing.assert_close(criterion.classifier.weight, weight)
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(criterion.centre.centres, centres.detach(), rtol=1e-4, atol=1e-5)


def test_state_travels():
    torch.manual_seed(0)
    criterion, (x, targets) = StrongBaseline(K, D, centre_weight=0.01), batch()
    other = StrongBaseline(K, D, centre_weight=0.01)
    other.load_state_dict(criterion.state_dict())
    for one, two in zip(criterion(outputs(x), targets).values(), other(outputs(x), targets).values()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("parts", ["none", "local", "global", "both"])
def test_trains_a_network_with_any_of_the_parts(parts):
    torch.manual_seed(0)
    model = AFF("resnet10", height=64, width=32, parts=parts)
    images, targets = torch.randn(8, 3, 64, 32), torch.arange(4).repeat_interleave(2)
    criterion = StrongBaseline(4, model.dim, centre_weight=0.0005)
    optimizer = torch.optim.Adam([*model.parameters(), *criterion.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        output = model(images)
        loss = sum(criterion(output, targets).values())
        optimizer.zero_grad()
        loss.backward()
        criterion.update(output, targets)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert model.neck.bias.grad is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n_classes=1), "two people or more to tell apart, found 1"),
        (dict(label_smoothing=1.0), "label_smoothing must lie in"),
        (dict(margin=-0.1), "margin must not be negative"),
        (dict(centre_weight=-1.0), "centre_weight=-1.0: must be 0"),
        (dict(centre_weight=float("nan")), "centre_weight=nan"),
        (dict(centre_weight=0.1, centre_rate=1.5), "centre_rate=1.5: must lie between 0 and 1"),
    ],
)
def test_criterion_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        StrongBaseline(**{"n_classes": K, "d": D} | wrong)


def test_criterion_refuses_unknown_people():
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.5"):
        StrongBaseline(K, D)(outputs(torch.randn(2, D)), torch.tensor([0, K]))
