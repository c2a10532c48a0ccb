"""A memory of crops: golden values of SpCL and DSCE, naive loops over classes, and the promises of both criteria."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from affscl.criteria.contrast import info_nce
from affscl.criteria.factory import LossOptions, make_criterion
from affscl.criteria.hybrid import HybridContrast, HybridMemory, reverse_cross_entropy
from affscl.labels.labellers import own_classes
from affscl.model.network import Output

THEIRS = {"momentum": 0.2, "temperature": 0.05}  # SpCL's and DSCE's


@pytest.fixture
def golden(golden):
    return {name: torch.as_tensor(value) for name, value in golden("field").items()}


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_spcl_is_the_published_one(golden):
    criterion = make_criterion(LossOptions("spcl", **THEIRS), golden["features"], golden["labels"])
    classes = torch.from_numpy(own_classes(golden["labels"].numpy()))
    for step in range(5):
        q, indices = golden["queries"][step].clone().requires_grad_(), golden["indices"][step]
        logits = criterion.memory.logits(q)
        # The published code adds 1e-6 to each probability (chapter 35).
        floored = -(logits.softmax(1).gather(1, classes[indices, None]) + 1e-6).log().mean()
        floored.backward()
        close(floored.detach(), golden["spcl_loss"][step])
        close(q.grad, golden["spcl_grad"][step])
        parts = criterion(Output(q, q, q), classes[indices], indices)
        close(parts["contrast"], info_nce(logits, classes[indices]))
        criterion.update(Output(q, q, q), classes[indices], indices)
        close(criterion.memory.rows, golden["spcl_rows"][step])


@pytest.mark.parametrize("name", ["plain", "dsce"])
def test_dsce_is_the_published_one(golden, name):
    features, labels = golden["features"], golden["labels"]
    criterion = make_criterion(LossOptions("dsce", **THEIRS), features, labels)
    criterion.symmetric = name == "dsce"
    for step in range(5):
        q, indices = golden["clustered_queries"][step].clone().requires_grad_(), golden["clustered"][step]
        output = Output(q, q, q)
        loss = sum(criterion(output, labels[indices], indices).values())
        loss.backward()
        criterion.update(output, labels[indices], indices)
        close(loss.detach(), golden[name + "_loss"][step])
        close(q.grad, golden[name + "_grad"][step])
        close(criterion.memory.rows, golden[name + "_rows"][step])


def test_reverse_cross_entropy_is_the_cross_entropy_with_its_roles_exchanged():
    g = torch.Generator().manual_seed(0)
    for classes in (1, 2, 9):
        logits, targets = 3 * torch.randn(6, classes, generator=g), torch.randint(0, classes, (6,), generator=g)
        soft = F.one_hot(targets, classes).float().log_softmax(1)
        close(reverse_cross_entropy(logits, targets), -(logits.softmax(1) * soft).sum(1).mean())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_class_is_the_mean_of_its_crops(share):
    g = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(40, 6, generator=g), dim=1)
    labels = np.where(np.arange(40) < 40 * share, -1, np.arange(40) % 3)
    for classes in (labels, own_classes(labels)):
        memory, q = HybridMemory(features, classes, temperature=0.3), features[:5]
        naive = torch.stack([features[torch.from_numpy(classes == c)].mean(0) for c in range(classes.max() + 1)])
        close(memory.logits(q), q @ naive.T / 0.3)


def test_a_crop_that_comes_twice_moves_its_row_twice_in_batch_order():
    g = torch.Generator().manual_seed(2)
    features, q = (F.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (9, 5))
    memory = HybridMemory(features, np.arange(9) % 3, momentum=0.4)
    memory.update(q, torch.tensor([4, 8, 4, 0, 4]))
    naive = features.clone()
    for row, crop in zip((4, 8, 4, 0, 4), q):
        naive[row] = F.normalize(0.4 * naive[row] + 0.6 * crop, dim=0)
    close(memory.rows, naive, 1e-6)


def test_outliers_are_rivals_in_spcl_and_absent_in_dsce():
    g = torch.Generator().manual_seed(3)
    features, labels = F.normalize(torch.randn(10, 6, generator=g), dim=1), np.array([0, 0, 0, 1, 1, 1, -1, -1, -1, -1])
    spcl, dsce = (make_criterion(LossOptions(name), features, labels) for name in ("spcl", "dsce"))
    assert (spcl.outliers, dsce.outliers) == (True, False)
    assert spcl.memory.logits(features).shape == (10, 6) and dsce.memory.logits(features).shape == (10, 2)
    # An outlier finds itself: its own class is the nearest one.
    assert (spcl.memory.logits(features[6:]).argmax(1) == torch.arange(2, 6)).all()


@pytest.mark.parametrize("name", ["spcl", "dsce"])
def test_gradients_learning_autocast_and_buffers(name):
    g = torch.Generator().manual_seed(4)
    features, labels = F.normalize(torch.randn(24, 8, generator=g), dim=1), np.arange(24) % 4
    criterion = make_criterion(LossOptions(name, temperature=0.3), features, labels)
    indices, targets = torch.arange(12), torch.arange(12) % 4
    x, direction = torch.randn(12, 8, generator=g, requires_grad=True), torch.randn(12, 8, generator=g)

    def value(x):
        return sum(criterion(Output(x, x, F.normalize(x, dim=1)), targets, indices).values())

    (grad,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        slope = (value(x + 1e-2 * direction) - value(x - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=1e-2, abs=1e-3)
    assert not list(criterion.parameters()) and "memory.rows" in criterion.state_dict()
    optimizer, before = torch.optim.SGD([x], lr=1.0), float(value(x).detach())
    for _ in range(40):
        optimizer.zero_grad()
        value(x).backward()
        criterion.update(Output(x, x, F.normalize(x, dim=1)), targets, indices)
        optimizer.step()
    floor = math.log(math.e + 3) - 1 if name == "dsce" else 0  # of the reversed part
    assert float(value(x).detach()) - floor < 0.5 * (before - floor)
    half = F.normalize(x.detach(), dim=1).bfloat16()
    plain = criterion(Output(half, half, half.float()), targets, indices)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = criterion(Output(half, half, half), targets, indices)
        criterion.update(Output(half, half, half), targets, indices)
    for key, part in parts.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, plain[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "classes, told",
    [
        (np.zeros(5, np.int64), "one for each"),
        (np.array([0, 2, 2, 0]), "without a gap"),
        (np.full(4, -1), "each needs a crop"),
    ],
)
def test_classes_that_cannot_work_are_refused(classes, told):
    with pytest.raises(ValueError, match=told):
        HybridMemory(torch.eye(4), classes)


def test_what_cannot_work_is_told():
    with pytest.raises(ValueError, match="momentum must lie"):
        HybridMemory(torch.eye(4), np.arange(4), momentum=1)
    q = torch.eye(4)
    with pytest.raises(ValueError, match="remembers crops"):
        HybridContrast(HybridMemory(q, np.arange(4))).update(Output(q, q, q), torch.arange(4))
    for name in ("spcl", "dsce"):
        for wrong, told in (
            ({"negatives": "camera"}, "leave negatives at 'all'"),
            ({"hard_start": "hardest"}, "one mem"),
        ):
            with pytest.raises(ValueError, match=told):
                make_criterion(LossOptions(name, **wrong), q, np.arange(4))
