"""A batch in other cameras' statistics: the equation, who lends to whom, gradients, any criterion."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, small

from affscl.criteria.contrast import Criterion
from affscl.criteria.crossing import ENOUGH, batch_losses, crossed, other_cameras
from affscl.criteria.factory import CRITERIA, LossOptions, make_criterion
from affscl.model.network import Output, make_neck
from affscl.model.norms import CameraNorm


def batch(camids, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    neck = make_neck(d)
    neck.weight.data = torch.rand(d, generator=g) + 0.5
    pooled = (torch.randn(len(camids), d, generator=g) + torch.tensor(camids)[:, None]).requires_grad_()
    out = neck(pooled)
    return Output(pooled, out, F.normalize(out)), torch.tensor(camids), neck


def by_hand(output, camids, lenders, neck):
    rows = []
    for feature, own, lender in zip(output.pooled, output.neck, lenders):
        if lender is None:
            rows.append(own)
        else:
            lent = output.pooled[camids == lender]
            rows.append(neck.weight * (feature - lent.mean(0)) / (lent.var(0, unbiased=False) + neck.eps).sqrt())
    return torch.stack(rows)


def test_equals_the_equation_with_two_cameras():
    output, camids, neck = batch([1] * 5 + [4] * 6)
    found = crossed(output, (0, camids), neck)
    wanted = by_hand(output, camids, [4] * 5 + [1] * 6, neck)
    torch.testing.assert_close(found.neck, wanted)
    torch.testing.assert_close(found.unit, F.normalize(wanted))
    assert found.pooled is output.pooled


def test_nobody_borrows_from_its_own_camera_from_few_crops_or_unknown():
    camids = torch.tensor([1] * 5 + [2] * ENOUGH + [3] * (ENOUGH - 1) + [9] * 6 + [-1] * 5)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        belongs, borrowed = other_cameras(camids)
        cameras = torch.tensor([1, 2, 3, 9])
        for i, row in enumerate(borrowed):
            assert row.sum() == (camids[i] >= 0), "one lender, and none for an unknown camera"
            seen |= {(int(camids[i]), int(c)) for c in cameras[row]}
    assert seen == {(a, b) for a in (1, 2, 3, 9) for b in (1, 2, 9) if a != b}


@pytest.mark.parametrize("camids", ([5] * 8, [-1] * 8, [1, 2, 3, 4] * 2, [1] * 5 + [-1] * 5))
def test_without_a_lender_the_loss_is_what_it_was(camids):
    output, camids, neck = batch(camids)
    assert torch.equal(crossed(output, (0, camids), neck).unit, output.unit)
    rows = F.normalize(torch.randn(8, 6))
    criterion = make_criterion(LossOptions(), rows, torch.arange(8) % 4)
    targets = torch.arange(len(camids)) % 4
    plain, both = (batch_losses(criterion, output, targets, (0, camids), n) for n in (None, neck))
    assert plain.keys() == both.keys()
    torch.testing.assert_close(sum(plain.values()), sum(both.values()))


@pytest.mark.parametrize("name", CRITERIA)
def test_any_criterion_judges_both_halves(name):
    output, camids, neck = batch([1] * 6 + [2] * 6)
    criterion = make_criterion(LossOptions(criterion=name), F.normalize(torch.randn(12, 6)), torch.arange(12) % 4)
    targets = torch.arange(12) % 4
    before = {key: value.clone() for key, value in criterion.state_dict().items()}
    parts = batch_losses(criterion, output, targets, (0, camids), neck)
    halves = [sum(criterion(o, targets).values()) / 2 for o in (output, crossed(output, (0, camids), neck))]
    torch.testing.assert_close(sum(parts.values()), sum(halves))
    assert all(torch.equal(before[key], value) for key, value in criterion.state_dict().items()), "memories wait"


def test_gradients_flow_through_the_lender():
    output, camids, neck = batch([1] * 5 + [2] * 5)

    class First(Criterion):
        def forward(self, output, targets):
            return {"first": output.unit[0, 0]}

    loss = batch_losses(First(), output, camids, (0, camids), neck)["first"]
    grad = torch.autograd.grad(crossed(output, (0, camids), neck).unit[0, 0], output.pooled, retain_graph=True)[0]
    assert (grad.abs().sum(1) > 0).tolist() == [True] + [False] * 4 + [True] * 5
    loss.backward()
    assert neck.weight.grad.abs().sum() > 0


def test_equal_cameras_and_a_camera_neck_cross_to_themselves():
    pooled = torch.randn(6, 5).repeat(2, 1)
    camids = torch.tensor([1] * 6 + [2] * 6)
    neck = CameraNorm(5, [1, 2])
    out = neck(pooled, camids)
    output = Output(pooled, out, F.normalize(out))
    torch.testing.assert_close(crossed(output, (0, camids), neck).neck, out)


def test_each_domain_has_its_own_weight():
    model = small(domains=2, camera_norm=False).train()
    model.neck.weight.data.fill_(1.0)
    model.neck.others[0].weight.data.fill_(3.0)
    domains = torch.tensor([0] * 8 + [1] * 8)
    camids = torch.tensor([1] * 4 + [2] * 4 + [11] * 4 + [12] * 4)
    output = model(images(16), domains, camids)
    torch.manual_seed(4)
    found = crossed(output, (domains, camids), model.neck).neck
    torch.manual_seed(4)
    same = crossed(output, (domains * 0, camids), model.neck).neck
    torch.testing.assert_close(found[:8], same[:8])
    torch.testing.assert_close(found[8:], 3 * same[8:])
