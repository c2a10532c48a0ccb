"""InfoNCE, balanced L1 and rivals against formulas typed out, and the criteria with memories against their pieces."""

import math

import pytest
import torch
import torch.nn.functional as F
from criteria_data import B, D, K, outputs, world
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.criteria.contrast import (
    BALANCES,
    Criterion,
    SingleContrast,
    SymmetricContrast,
    balance_loss,
    balanced_l1,
    cameras_of,
    info_nce,
    rivals_only,
)
from affscl.criteria.memory import ClusterMemory, DualMemory

cases = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)


# InfoNCE


def naive_info_nce(q, rows, targets, tau):
    """Eqs. 7, 9, 11, an image at a time, in double precision."""
    total = 0.0
    for f, t in zip(q.double().tolist(), targets.tolist()):
        scores = [sum(a * b for a, b in zip(f, row)) / tau for row in rows.double().tolist()]
        top = max(scores)
        total -= scores[t] - top - math.log(sum(math.exp(s - top) for s in scores))
    return total / len(targets)


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


@pytest.mark.parametrize("balance", ["off", "on"])
def test_balance_without_operands_is_refused(balance):
    rows, hard, x, targets, *_ = world()
    memory = DualMemory(rows, hard)
    with pytest.raises(ValueError, match="'stop_gradient', 'both', 'features', 'memory'$"):
        balance_loss(memory, memory.logits(x), x, targets, balance)


# Rivals within a camera

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
    with pytest.raises(ValueError, match="have none"):
        cameras_of([0, 1], [1, None])


# Criteria


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


def test_single_contrast_is_info_nce_against_its_memory():
    rows, _, x, targets, *_ = world()
    unit = outputs(x).unit.detach()
    parts = SingleContrast(ClusterMemory(rows, temperature=0.2))(outputs(x), targets)
    assert {name: float(part.detach()) for name, part in parts.items()} == {
        "contrast": pytest.approx(naive_info_nce(unit, rows, targets, 0.2), rel=1e-4)
    }


def test_a_criterion_remembers_nothing_unless_it_says_so():
    _, _, x, targets, *_ = world()
    assert Criterion().update(outputs(x), targets) is None
    with pytest.raises(NotImplementedError):
        Criterion()(outputs(x), targets)


def test_wrong_weights_and_balance_are_refused_together():
    rows, *_ = world()
    with pytest.raises(ValueError, match="'off'"):
        SymmetricContrast(DualMemory(rows), balance="on")
    with pytest.raises(ValueError, match="targets"):
        SymmetricContrast(DualMemory(rows), 0, 0)
    with pytest.raises(ValueError) as caught:
        SymmetricContrast(DualMemory(rows), -1, 0, "on")
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ValueError, match="outliers"):
        SingleContrast(ClusterMemory(rows))(outputs(torch.randn(2, D)), torch.tensor([0, -1]))
