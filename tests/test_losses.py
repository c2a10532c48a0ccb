"""Losses against golden values, formulas typed out, gradients, and the criteria against their pieces."""

import math
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.criteria.classifier import CrossEntropyTriplet, batch_hard_triplet
from affscl.criteria.contrast import (
    BALANCES,
    SingleContrast,
    SymmetricContrast,
    balance_loss,
    balanced_l1,
    cameras_of,
    info_nce,
    rivals_only,
)
from affscl.criteria.factory import CRITERIA, LossOptions, check_loss_options, make_criterion
from affscl.criteria.memory import ClusterMemory, DualMemory

GOLDEN = Path(__file__).parent / "golden" / "memory.npz"
Output = namedtuple("Output", "pooled neck unit")
K, D, B = 5, 8, 12
cases = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
MEMORY_CRITERIA = [name for name in CRITERIA if name != "cross_entropy_triplet"]


@pytest.fixture(scope="module")
def golden():
    return {name: torch.as_tensor(value) for name, value in np.load(GOLDEN).items()}


def outputs(x):
    return Output(x, F.batch_norm(x, None, None, training=True), F.normalize(x, dim=1))


def world(seed=0):
    """Two tables of unit rows, a batch as leaf tensor, its targets; features and labels of a training set with outliers."""
    g = torch.Generator().manual_seed(seed)
    rows, hard = (F.normalize(torch.randn(K, D, generator=g), dim=1) for _ in range(2))
    targets = torch.randint(0, K, (B,), generator=g)
    x = torch.randn(B, D, generator=g).requires_grad_()
    features = F.normalize(torch.randn(40, D, generator=g), dim=1)
    labels = torch.cat([torch.arange(K), torch.randint(-1, K, (40 - K,), generator=g)])
    return rows, hard, x, targets, features, labels


def naive_info_nce(q, rows, targets, tau):
    """Eqs. 7, 9, 11, an image at a time, in double precision."""
    total = 0.0
    for f, t in zip(q.double().tolist(), targets.tolist()):
        scores = [sum(a * b for a, b in zip(f, row)) / tau for row in rows.double().tolist()]
        top = max(scores)
        total -= scores[t] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total / len(targets)


# InfoNCE


@cases
@given(seeds, st.sampled_from([0.05, 0.2, 1.0]))
def test_info_nce_is_eq_7(seed, tau):
    rows, _, x, targets, *_ = world(seed)
    q = outputs(x).unit.detach()
    assert float(info_nce(q @ rows.T / tau, targets)) == pytest.approx(
        naive_info_nce(q, rows, targets, tau), rel=1e-4, abs=1e-5
    )


def test_info_nce_by_hand():
    assert float(info_nce(torch.zeros(2, 4), torch.tensor([0, 3]))) == pytest.approx(math.log(4))
    # one positive at 1, one negative at 0, tau 0.5: log(1 + exp(-2))
    assert float(info_nce(torch.tensor([[1.0, 0.0]]) / 0.5, torch.tensor([0]))) == pytest.approx(
        math.log1p(math.exp(-2))
    )


def test_info_nce_gradient_is_softmax_minus_one_hot():
    logits = torch.randn(6, K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    info_nce(logits, targets).backward()
    expected = (logits.detach().softmax(1) - F.one_hot(targets, K)) / 6
    torch.testing.assert_close(logits.grad, expected)


def test_info_nce_survives_large_and_half_precision_logits():
    loss = info_nce(torch.tensor([[500.0, -500.0], [-500.0, 500.0]], dtype=torch.bfloat16), torch.tensor([0, 0]))
    assert loss.dtype == torch.float32 and float(loss) == 500


def test_info_nce_refuses_outliers():
    with pytest.raises(ValueError, match="outliers"):
        info_nce(torch.zeros(2, 3), torch.tensor([0, -1]))


# Balanced L1


def reference_balanced_l1(x, alpha=0.9, gamma=1.5):
    """Eq. 14 in Python's double precision."""
    b, size = math.exp(gamma / alpha) - 1, abs(x)
    if size < 1:
        return (alpha / b * (b * size + 1) * math.log(b * size + 1) - alpha * size) / 4
    return (gamma * size + gamma / b - alpha) / 4


@cases
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8),
    st.sampled_from([(0.9, 1.5), (0.5, 1.5), (0.5, 1.0)]),
)
def test_balanced_l1_is_eq_14(values, constants):
    found = balanced_l1(torch.tensor(values), *constants)
    expected = torch.tensor([reference_balanced_l1(v, *constants) for v in values])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found >= 0).all()


def test_balanced_l1_by_hand():
    b = math.exp(1.5 / 0.9) - 1
    assert b == pytest.approx(4.2945, abs=1e-4)
    found = balanced_l1(torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.double))
    expected = [0, 0.94928 / 4, 0.94928 / 4, (4.5 + 1.5 / b - 0.9) / 4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), atol=2e-6, rtol=0)


def test_balanced_l1_derivatives():
    x = torch.cat([torch.linspace(-3, 3, 24), torch.tensor([0.999, 1.001, 1e-3])]).double().requires_grad_()
    assert torch.autograd.gradcheck(balanced_l1, x)
    assert torch.autograd.gradgradcheck(balanced_l1, x)


def test_balanced_l1_slope_is_exact_everywhere():
    sizes = [0.0, 1e-30, 1e-12, 1e-8, 1e-4, 0.1, 0.999, 1.0, 1.001, 1e4]
    x = torch.tensor(sizes + [-s for s in sizes]).requires_grad_()
    balanced_l1(x).sum().backward()
    b = math.expm1(1.5 / 0.9)
    slopes = [0.9 * math.log1p(b * s) / 4 if s < 1 else 0.375 for s in sizes]
    torch.testing.assert_close(x.grad, torch.tensor(slopes + [-s for s in slopes]), rtol=1e-5, atol=0)
    assert x.grad.abs().max() <= 0.375


def test_balanced_l1_is_never_negative():
    """Near zero its two terms cancel, and rounding alone would leave some values below zero."""
    assert (balanced_l1(torch.logspace(-10, -1, 5000)) >= 0).all()


def test_balanced_l1_keeps_shape_and_scales_the_incoming_gradient():
    x = torch.full((2, 3, 4), 2.0, requires_grad=True)
    value = balanced_l1(x)
    assert value.shape == x.shape
    (7 * value).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3, 4), 7 * 0.375))


@pytest.mark.parametrize("constants", [(0, 1.5), (0.9, -1), (float("nan"), 1.5)])
def test_balanced_l1_refuses_constants(constants):
    with pytest.raises(ValueError, match="positive"):
        balanced_l1(torch.zeros(1), *constants)


# The balance loss and its operands


def test_balance_operands():
    rows, hard, x, targets, *_ = world()
    memory, unit = DualMemory(rows, hard), outputs(x).unit
    mean_logits, hard_logits = logits = memory.logits(unit)
    value = {name: balance_loss(memory, logits, unit, targets, name) for name in BALANCES if name != "off"}
    grad = {name: torch.autograd.grad(v, x, retain_graph=True)[0] for name, v in value.items() if v.requires_grad}

    predictions = balanced_l1(mean_logits - hard_logits)
    torch.testing.assert_close(value["stop_gradient"], predictions.sum() / (B * K))
    torch.testing.assert_close(value["both"], value["stop_gradient"])
    entries = [balanced_l1(unit[j] - table[t]).sum() for j, t in enumerate(targets) for table in (rows, hard)]
    torch.testing.assert_close(value["features"], sum(entries) / (2 * B * D))
    pairs = [balanced_l1(rows[t] - hard[t]).sum() for t in targets]
    torch.testing.assert_close(value["memory"], sum(pairs) / (B * D))

    assert set(grad) == {"stop_gradient", "both", "features"}  # memory rows: no gradient at all
    slope = torch.autograd.grad(predictions.mean(), mean_logits, retain_graph=True)[0]
    one_way = torch.autograd.grad(mean_logits, x, slope, retain_graph=True)[0]
    other_way = torch.autograd.grad(hard_logits, x, -slope, retain_graph=True)[0]
    torch.testing.assert_close(grad["stop_gradient"], one_way)
    torch.testing.assert_close(grad["both"], one_way + other_way)
    assert (grad["both"] - grad["stop_gradient"]).norm() > 1e-3


def test_balance_of_one_logit_is_bounded():
    rows, hard, x, targets, *_ = world()
    memory = DualMemory(rows, hard)
    mean_logits, hard_logits = memory.logits(outputs(x).unit.detach())
    mean_logits.requires_grad_()
    balance_loss(memory, (mean_logits, hard_logits), x, targets).backward()
    bound = 0.375 / (B * K)
    assert 0.9 * bound < mean_logits.grad.abs().max() <= bound * (1 + 1e-6)


def test_balance_starts_at_zero():
    """Both memories start alike, so the balance loss and its gradient are exactly zero before the first update."""
    _, _, x, targets, features, labels = world()
    part = make_criterion(LossOptions(), features, labels)(outputs(x), targets)["balance"]
    assert part == 0 and not torch.autograd.grad(part, x)[0].any()


# Criteria


def test_hhcl_criterion_is_the_published_one(golden):
    labels = torch.arange(40)
    criterion = make_criterion(LossOptions(criterion="hhcl"), golden["initial_bank"], labels)
    for step in range(6):
        q, targets = golden["queries"][step].clone().requires_grad_(), golden["targets"][step]
        output = Output(None, None, q)
        parts = criterion(output, targets)
        sum(parts.values()).backward()
        criterion.update(output, targets)
        found = torch.stack([parts["hard"] / 0.75, parts["mean"] / 0.25]).detach()
        torch.testing.assert_close(found, golden["hhcl_hybrid_loss"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(q.grad, golden["hhcl_hybrid_grad"][step], atol=1e-5, rtol=0)
        bank = torch.cat([criterion.memory.hard, criterion.memory.mean])
        torch.testing.assert_close(bank, golden["hhcl_hybrid_bank"][step], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, key", [("cluster_contrast", "cluster_contrast_mean"), ("cluster_contrast_hard",) * 2])
def test_cluster_contrast_criteria_are_the_published_ones(golden, name, key):
    criterion = make_criterion(LossOptions(criterion=name), golden["initial_bank"], np.arange(40))
    for step in range(6):
        q, targets = golden["queries"][step].clone().requires_grad_(), golden["targets"][step]
        parts = criterion(Output(None, None, q), targets)
        parts["contrast"].backward()
        criterion.update(Output(None, None, q), targets)
        torch.testing.assert_close(parts["contrast"].detach(), golden[key + "_loss"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(q.grad, golden[key + "_grad"][step], atol=1e-5, rtol=0)
        torch.testing.assert_close(criterion.memory.bank, golden[key + "_bank"][step], atol=1e-5, rtol=0)


@cases
@given(seeds, st.sampled_from([(0.75, 0.25), (0.5, 0.5), (1, 0), (0, 1), (2, 3)]), st.sampled_from(BALANCES))
def test_symmetric_is_eq_8(seed, weights, balance):
    rows, hard, x, targets, *_ = world(seed)
    criterion = SymmetricContrast(DualMemory(rows, hard, temperature=0.2), *weights, balance)
    output = outputs(x)
    parts, unit = criterion(output, targets), output.unit.detach()
    expected = {}
    if weights[0]:
        expected["hard"] = weights[0] * naive_info_nce(unit, hard, targets, 0.2)
    if weights[1]:
        expected["mean"] = weights[1] * naive_info_nce(unit, rows, targets, 0.2)
    if balance != "off":
        expected["balance"] = float(
            balance_loss(criterion.memory, criterion.memory.logits(unit), unit, targets, balance)
        )
    assert {name: float(part.detach()) for name, part in parts.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", CRITERIA)
def test_gradients_are_finite_differences(name):
    """The whole criterion, along random directions; the balance is off because its stop-gradient is no true gradient."""
    _, _, x, targets, features, labels = world(1)
    criterion = make_criterion(LossOptions(criterion=name, balance="off", temperature=0.5), features, labels)
    value = lambda x: sum(criterion(outputs(x), targets).values())
    grad = torch.autograd.grad(value(x), x)[0]
    g = torch.Generator().manual_seed(2)
    for _ in range(4):
        direction = torch.randn(B, D, generator=g)
        with torch.no_grad():
            slope = (value(x + 1e-3 * direction) - value(x - 1e-3 * direction)) / 2e-3
        assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=1e-2, abs=2e-3)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_learns_in_one_loop(name):
    _, _, x, targets, features, labels = world(3)
    criterion = make_criterion(LossOptions(criterion=name, temperature=0.2), features, labels)
    x = (x.detach() + 0.5 * F.normalize(features[:K], dim=1)[targets]).requires_grad_()
    optimizer, history = torch.optim.SGD([x, *criterion.parameters()], lr=0.5), []
    for _ in range(60):
        output = outputs(x)
        parts = criterion(output, targets)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        criterion.update(output, targets)
        optimizer.step()
        history.append(sum(float(part.detach()) for key, part in parts.items() if key != "balance"))
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("name", CRITERIA)
def test_one_small_step_lowers_the_loss(name):
    _, _, x, targets, features, labels = world(4)
    criterion = make_criterion(LossOptions(criterion=name), features, labels)
    before = sum(criterion(outputs(x), targets).values())
    grad = torch.autograd.grad(before, x)[0]
    after = sum(criterion(outputs(x - 1e-3 * grad / grad.norm()), targets).values())
    assert after < before


@pytest.mark.parametrize("name", MEMORY_CRITERIA)
def test_memories_are_buffers_and_only_update_moves_them(name):
    _, _, x, targets, features, labels = world()
    criterion = make_criterion(LossOptions(criterion=name), features, labels)
    start = {key: value.clone() for key, value in criterion.state_dict().items()}
    output = outputs(x)
    sum(criterion(output, targets).values()).backward()
    assert not list(criterion.parameters()) and start
    assert all(torch.equal(value, start[key]) for key, value in criterion.state_dict().items())
    criterion.update(output, targets)
    assert not any(torch.equal(value, start[key]) for key, value in criterion.state_dict().items())


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_under_autocast(name):
    """In a bfloat16 step the parts stay float32 and close to those of a plain step on the same values."""
    _, _, x, targets, features, labels = world(5)
    criterion = make_criterion(LossOptions(criterion=name), features, labels)
    half = Output(*(o.detach().bfloat16() for o in outputs(x)))
    plain = criterion(Output(*(o.float() for o in half)), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = criterion(half, targets)
        criterion.update(half, targets)
    for key, part in parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, plain[key], rtol=2e-2 if key == "cross_entropy" else 1e-6, atol=0)


# The baseline


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


def test_baseline_starts_with_the_memorys_logits():
    rows, _, _, _, *_ = world()
    baseline = CrossEntropyTriplet(rows, temperature=0.05)
    g = torch.Generator().manual_seed(0)
    neck = F.normalize(torch.randn(B, D, generator=g), dim=1) * D**0.5  # as long as BatchNorm leaves it on average
    torch.testing.assert_close(
        baseline.classifier(neck), F.normalize(neck, dim=1) @ rows.T / 0.05, rtol=1e-4, atol=1e-4
    )
    (weight,) = baseline.parameters()
    assert weight.shape == (K, D) and weight.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_spreads_the_target(smoothing):
    rows, _, x, targets, *_ = world()
    baseline, output = CrossEntropyTriplet(rows, label_smoothing=smoothing), outputs(x.detach())
    log_probability = baseline.classifier(output.neck).log_softmax(1)
    goal = (1 - smoothing) * F.one_hot(targets, K) + smoothing / K
    parts = baseline(output, targets)
    torch.testing.assert_close(parts["cross_entropy"], -(goal * log_probability).sum(1).mean())
    torch.testing.assert_close(parts["triplet"], batch_hard_triplet(output.pooled, targets, 0.3))


def test_baseline_update_changes_nothing():
    rows, _, x, targets, *_ = world()
    baseline = CrossEntropyTriplet(rows)
    before = baseline.classifier.weight.detach().clone()
    baseline.update(outputs(x), targets)
    assert torch.equal(baseline.classifier.weight, before)


# Options


def test_defaults_are_the_papers():
    o = LossOptions()
    assert (o.criterion, o.hard_weight, o.mean_weight, o.momentum, o.temperature) == (
        "symmetric",
        0.75,
        0.25,
        0.1,
        0.05,
    )
    assert all(f.name == f.name.lower() for f in fields(o))


def test_make_criterion_follows_the_options():
    *_, features, labels = world()
    centres = torch.stack([F.normalize(features[labels == i].mean(0), dim=0) for i in range(K)])

    def made(**options):
        return make_criterion(LossOptions(**options), features, labels)

    c = made(
        momentum=0.3,
        temperature=0.1,
        hard_weight=0.6,
        mean_weight=0.2,
        balance="both",
        hard_reference="hard",
        normalise_mean=True,
    )
    torch.testing.assert_close(c.memory.mean, centres)
    torch.testing.assert_close(c.memory.hard, centres)
    assert (c.memory.momentum, c.memory.temperature, c.memory.hard_reference, c.memory.normalise_mean) == (
        0.3,
        0.1,
        "hard",
        True,
    )
    assert (c.hard_weight, c.mean_weight, c.balance) == (0.6, 0.2, "both")

    start = made(hard_start="hardest").memory.hard
    for i in range(K):
        members = features[labels == i]
        torch.testing.assert_close(start[i], members[(members @ centres[i]).argmin()])

    table = {name: made(criterion=name) for name in CRITERIA}
    kinds = {name: type(c) for name, c in table.items()}
    assert kinds == {
        "symmetric": SymmetricContrast,
        "mean": SymmetricContrast,
        "hard": SymmetricContrast,
        "hhcl": SymmetricContrast,
        "cluster_contrast": SingleContrast,
        "cluster_contrast_hard": SingleContrast,
        "cross_entropy_triplet": CrossEntropyTriplet,
    }
    assert [
        (table[n].hard_weight, table[n].mean_weight, table[n].balance) for n in ("symmetric", "mean", "hard", "hhcl")
    ] == [(0.75, 0.25, "stop_gradient"), (0, 1, "off"), (1, 0, "off"), (0.75, 0.25, "off")]
    assert table["hhcl"].memory.hard_reference == "hard" and table["symmetric"].memory.hard_reference == "mean"
    assert (
        table["cluster_contrast"].memory.rule == "sequential" and table["cluster_contrast_hard"].memory.rule == "hard"
    )
    baseline = made(criterion="cross_entropy_triplet", label_smoothing=0.2, margin=0.5)
    assert (baseline.label_smoothing, baseline.margin) == (0.2, 0.5)


@pytest.mark.parametrize("name", ["mean", "hard"])
def test_single_losses_with_and_without_balance(name):
    """Decision 19: both readings of Tables 4 and 5 can be run."""
    _, _, x, targets, features, labels = world()
    parts = {
        b: make_criterion(LossOptions(criterion=name, balance=b), features, labels)(outputs(x), targets)
        for b in ("off", "stop_gradient")
    }
    assert list(parts["off"]) == [name] and list(parts["stop_gradient"]) == [name, "balance"]
    weights = dict(hard_weight=1.0, mean_weight=0.0) if name == "hard" else dict(hard_weight=0.0, mean_weight=1.0)
    same = make_criterion(LossOptions(**weights), features, labels)(outputs(x), targets)
    assert {k: float(v.detach()) for k, v in same.items()} == {
        k: float(v.detach()) for k, v in parts["stop_gradient"].items()
    }


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(criterion="centre"), "'symmetric', 'mean', 'hard', 'cluster_contrast'"),
        (dict(balance="on"), "'stop_gradient', 'both', 'features', 'memory', 'off'"),
        (dict(hard_reference="own"), "'mean', 'hard'"),
        (dict(hard_start="random"), "'mean', 'hardest'"),
        (dict(momentum=1.0), "momentum"),
        (dict(temperature=0.0), "temperature"),
        (dict(hard_weight=0.0, mean_weight=0.0), "never looks at the targets"),
        (dict(hard_weight=-0.5), "negative"),
        (dict(label_smoothing=1.0), "label_smoothing"),
        (dict(margin=-0.1), "margin"),
        (dict(criterion="cluster_contrast", balance="both"), "'cluster_contrast' has one memory"),
        (dict(criterion="cluster_contrast_hard", hard_start="hardest"), "hard_start = 'hardest'.*one memory"),
        (dict(criterion="cluster_contrast", normalise_mean=True), "normalise_mean = True"),
        (dict(criterion="cross_entropy_triplet", balance="stop_gradient"), "has none"),
        (dict(criterion="hhcl", balance="stop_gradient"), "HHCL has no balance"),
    ],
)
def test_wrong_options_are_refused(options, words):
    *_, features, labels = world()
    for refuse in (
        lambda: check_loss_options(LossOptions(**options)),
        lambda: make_criterion(LossOptions(**options), features, labels),
    ):
        with pytest.raises(ValueError, match=words):
            refuse()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("balance", ["auto", "off"])
def test_defaults_suit_every_criterion(name, balance):
    check_loss_options(replace(LossOptions(), criterion=name, balance=balance))


def test_classes_refuse_on_their_own():
    rows, *_ = world()
    with pytest.raises(ValueError, match="'off'"):
        SymmetricContrast(DualMemory(rows), balance="on")
    with pytest.raises(ValueError, match="targets"):
        SymmetricContrast(DualMemory(rows), 0, 0)
    with pytest.raises(ValueError, match="temperature"):
        CrossEntropyTriplet(rows, temperature=-1)
    with pytest.raises(ValueError, match="outliers"):
        SingleContrast(ClusterMemory(rows))(outputs(torch.randn(2, D)), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="outliers"):
        CrossEntropyTriplet(rows)(outputs(torch.randn(2, D)), torch.tensor([0, K]))


# --- rivals within a camera --------------------------------------------------------------------------------------

HELD = [{1}, {2}, {1, 2}, {2}, {3}, {1, 3}]
CAMERAS = torch.tensor([[float(c in held) for c in (1, 2, 3)] for held in HELD])


def loss_by_hand(row, target):
    """InfoNCE of one image over the clusters that share a camera with the target."""
    rivals = [s for s, held in zip(row.tolist(), HELD) if held & HELD[target]]
    return float(torch.tensor(rivals).double().logsumexp(0)) - float(row[target])


@pytest.mark.parametrize("target", range(len(HELD)))
def test_rivals_share_a_camera_with_the_positive(target):
    row = torch.randn(1, len(HELD), generator=torch.Generator().manual_seed(target))
    loss = info_nce(rivals_only(row, torch.tensor([target]), CAMERAS), torch.tensor([target]))
    assert float(loss) == pytest.approx(loss_by_hand(row[0], target), abs=1e-5)


def test_who_is_no_rival_gets_no_gradient():
    logits = torch.randn(1, len(HELD), requires_grad=True)
    info_nce(rivals_only(logits, torch.tensor([0]), CAMERAS), torch.tensor([0])).backward()
    rival = torch.tensor([bool(held & HELD[0]) for held in HELD])
    assert (logits.grad[0, ~rival] == 0).all() and (logits.grad[0, rival] != 0).all()


def test_cameras_of_clusters():
    found = cameras_of([0, 0, 1, -1, 2, 2], [7, 9, 9, 4, 7, 7])
    assert found.tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0]], "cameras 4, 7, 9; outliers count for nothing"
    with pytest.raises(ValueError, match="some are unknown"):
        cameras_of([0, 1], [1, None])


@pytest.mark.parametrize("criterion", ["symmetric", "mean", "hard", "cluster_contrast", "hhcl"])
def test_with_one_camera_nothing_changes_and_with_two_the_others_are_gone(criterion):
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(40, 8, generator=g))
    labels, q, targets = torch.arange(40) % 4, features[:8], torch.arange(8) % 4
    output = Output(q, q, q)

    def total(**options):
        camids = options.pop("camids", None)
        criterion_ = make_criterion(LossOptions(criterion=criterion, **options), features, labels, camids)
        return float(sum(criterion_(output, targets).values()))

    assert total(negatives="camera", camids=[5] * 40) == pytest.approx(total())
    assert total(negatives="camera", camids=(labels % 2).tolist()) < total()


def test_rivals_of_a_criterion_without_a_memory_are_refused():
    with pytest.raises(ValueError, match="leave negatives at 'all'"):
        check_loss_options(LossOptions(criterion="cross_entropy_triplet", negatives="camera"))
    with pytest.raises(ValueError, match="'all', 'camera'"):
        check_loss_options(LossOptions(negatives="none"))
