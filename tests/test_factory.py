"""Every criterion by its name: golden values, gradients, learning, and the options that are refused."""

import re
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from criteria_data import B, D, K, outputs, world

from affscl.criteria.classifier import CrossEntropyTriplet
from affscl.criteria.contrast import SingleContrast, SymmetricContrast
from affscl.criteria.factory import (
    CRITERIA,
    LossOptions,
    centre_use_problems,
    is_supervised,
    loss_problems,
    make_criterion,
)
from affscl.model.network import Output

MEMORY_CRITERIA = [name for name in CRITERIA if name != "cross_entropy_triplet"]


@pytest.fixture
def golden(golden):
    return {name: torch.as_tensor(value) for name, value in golden("memory").items()}


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


def test_balance_starts_at_zero():
    """Both memories start alike, so the balance loss and its gradient are exactly zero before the first update."""
    _, _, x, targets, features, labels = world()
    part = make_criterion(LossOptions(), features, labels)(outputs(x), targets)["balance"]
    assert part == 0 and not torch.autograd.grad(part, x)[0].any()


@pytest.mark.parametrize("name", CRITERIA)
def test_gradients_are_finite_differences(name):
    """The whole criterion, along random directions; without the balance, whose stop-gradient is no true gradient."""
    _, _, x, targets, features, labels = world(1)
    criterion = make_criterion(LossOptions(criterion=name, balance="off", temperature=0.5), features, labels)

    def value(x):
        return sum(criterion(outputs(x), targets).values())

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
    (problem,) = loss_problems(LossOptions(**options))
    assert re.search(words, problem)
    with pytest.raises(ValueError, match=re.escape(problem)):
        make_criterion(LossOptions(**options), features, labels)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("balance", ["auto", "off"])
def test_defaults_suit_every_criterion(name, balance):
    assert loss_problems(replace(LossOptions(), criterion=name, balance=balance)) == []


def test_rivals_of_a_criterion_without_a_memory_are_refused():
    (problem,) = loss_problems(LossOptions(criterion="cross_entropy_triplet", negatives="camera"))
    assert problem.endswith("leave negatives at 'all'")
    (problem,) = loss_problems(LossOptions(negatives="none"))
    assert "'all', 'camera'" in problem


def test_all_problems_are_told_at_once():
    wrong = LossOptions("hhcl", momentum=2, temperature=0, balance="both", hard_start="random", margin=-1)
    problems = loss_problems(wrong)
    words = "hard_start", "momentum", "temperature", "margin", "HHCL has no balance"
    assert len(problems) == 5 and all(word in problem for word, problem in zip(words, problems))
    *_, features, labels = world()
    with pytest.raises(ValueError) as caught:
        make_criterion(wrong, features, labels)
    assert str(caught.value).splitlines() == problems


@pytest.mark.parametrize("labels", ["clusters", "truth"])
@pytest.mark.parametrize("name", CRITERIA)
def test_centres_need_supervised_training(labels, name):
    options = SimpleNamespace(labels=labels, criterion=name, centre_weight=0.0)
    assert is_supervised(options) == (labels == "truth" and name == "cross_entropy_triplet")
    assert centre_use_problems(options) == []
    options.centre_weight = 0.1
    problems = centre_use_problems(options)
    assert problems == [] if is_supervised(options) else "only supervised training has a centre loss" in problems[0]
