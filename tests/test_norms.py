"""BatchNorm by chunk, domain and camera against separate passes; no group outlives its batch."""

import pytest
import torch
import torch.nn.functional as F
from small_networks import images, small
from torch import nn

from affscl.model.norms import CameraNorm, GroupedNorm, Groups


def test_chunks_are_separate_forward_passes():
    plain, chunked = small(), small(bn_chunk=4)
    chunked.load_state_dict(plain.state_dict())
    x = images(8)
    direction = torch.randn(8, 256)
    passes = torch.cat([plain(x[:4]).unit, plain(x[4:]).unit])
    whole = chunked(x).unit
    torch.testing.assert_close(whole, passes, rtol=1e-3, atol=1e-5)
    (whole * direction).sum().backward(), (passes * direction).sum().backward()
    grads = [m.backbone.conv1.weight.grad for m in (plain, chunked)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-3 * grads[0].abs().max().item())
    for (name, a), b in zip(plain.state_dict().items(), chunked.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=name)
    plain.eval(), chunked.eval()
    torch.testing.assert_close(chunked(x).unit, plain(x).unit)


def test_uneven_chunks_are_shared_out():
    norm = GroupedNorm(nn.BatchNorm1d(3), groups := Groups(1, 4))
    x = torch.randn(9, 3)
    plain = nn.BatchNorm1d(3)
    with groups.of(0, 9):
        torch.testing.assert_close(norm(x), torch.cat([plain(x[:3]), plain(x[3:6]), plain(x[6:])]))


def test_domains_have_statistics_and_scales_of_their_own():
    both, first, second = small(domains=2), small(), small()
    a, b = images(6, seed=1), 3 * images(4, seed=2) + 1
    torch.testing.assert_close(
        both(torch.cat([a, b]), torch.tensor([0] * 6 + [1] * 4)).unit,
        torch.cat([first(a).unit, second(b).unit]),
        rtol=1e-3,
        atol=1e-5,
    )
    for model in (both, first, second):
        model.eval()
    for domain, alone in enumerate((first, second)):
        torch.testing.assert_close(both(a, domain).unit, alone(a).unit, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(both(a, 0).unit, both(a, 1).unit, atol=1e-2)
    # the order of the domains in a batch is free, and scales are not shared
    torch.testing.assert_close(
        both(torch.cat([b, a]), [1] * 4 + [0] * 6).unit,
        torch.cat([both(b, 1).unit, both(a).unit]),
        rtol=1e-3,
        atol=1e-5,
    )
    assert both.backbone.bn1.weight is not both.backbone.bn1.others[0].weight
    assert not both.neck.others[0].bias.requires_grad


def test_one_domain_without_chunks_is_plain():
    plain, chunked = small(), small(bn_chunk=4)
    assert not any(isinstance(m, GroupedNorm) for m in plain.modules())
    assert sum(isinstance(m, GroupedNorm) for m in chunked.modules()) == sum(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules()
    )
    assert plain.state_dict().keys() == chunked.state_dict().keys()


@pytest.mark.parametrize(
    "domain, words",
    [(2, "domains=2"), (-1, "domains=2"), ([0, 1], "2 domains for 3 crops"), ([0, 1, 0], "side by side")],
)
def test_wrong_domains(domain, words):
    with pytest.raises(ValueError, match=words):
        small(domains=2)(images(3), domain)


def test_no_group_outlives_its_batch():
    model, x = small(domains=2), images(4)
    model(x, [0, 0, 1, 1])
    assert model.groups.batch is None
    for wrong in (lambda: model(x, 2), lambda: model(torch.zeros(2, 5, 64, 32)), lambda: model(x[:1])):
        with pytest.raises(ValueError):
            wrong()
        assert model.groups.batch is None
    for lost in (lambda: model.backbone(x), lambda: small(bn_chunk=2).backbone(x), lambda: model.eval().backbone(x)):
        with pytest.raises(RuntimeError, match=r"with network.groups.of\(domain, len\(images\)\)"):
            lost()
    with model.groups.of(1, 4):
        inside = model.attention(model.backbone(x))
    torch.testing.assert_close(inside, model.feature_maps(x, 1))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_chunked_network_of_one_domain_is_plain_in_eval_mode():
    plain, chunked, x = small().eval(), small(bn_chunk=2).eval(), images(5)
    expected = plain.backbone(x)
    assert torch.equal(chunked.backbone(x), expected), "layer by layer, without groups"
    assert torch.equal(torch.jit.trace(chunked.backbone, x[:2])(x), expected)
    assert torch.equal(torch.jit.script(chunked.backbone)(x), expected)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(chunked, (x[:3],), dynamic_shapes=({0: batch},), strict=False).module()
    torch.testing.assert_close(exported(x).unit, plain(x).unit)


# ---- the neck of each camera


def camera_neck(x, camids, training=True):
    """The layer of cameras 3 and 7 and what it says of `x`."""
    neck = CameraNorm(x.shape[1], [3, 7]).train(training)
    return neck, neck(x, camids)


def test_each_camera_is_normalised_by_itself():
    x, camids = torch.rand(20, 4) + torch.arange(20)[:, None] % 2 * 5, torch.tensor([3, 7] * 10)
    neck, out = camera_neck(x, camids)
    for camid in (3, 7):
        own = camids == camid
        assert torch.allclose(out[own], F.batch_norm(x[own], None, None, training=True), atol=1e-4)
        fresh = nn.BatchNorm1d(4)
        fresh(x[own])
        assert torch.allclose(neck.camera_mean[(3, 7).index(camid)], fresh.running_mean, atol=1e-6)
        assert torch.allclose(neck.camera_var[(3, 7).index(camid)], fresh.running_var, atol=1e-5)


def test_a_rare_or_unknown_camera_is_treated_as_by_the_plain_neck():
    x, camids = torch.rand(12, 4), torch.tensor([3] * 8 + [7] * 3 + [-1])
    neck, out = camera_neck(x, camids)
    plain = F.batch_norm(x, None, None, training=True)
    assert torch.allclose(out[8:], plain[8:], atol=1e-5) and not torch.allclose(out[:8], plain[:8], atol=1e-2)
    assert torch.equal(neck.camera_mean[1], torch.zeros(4)), "three crops move no statistics"
    neck.eval()
    assert torch.equal(neck(x, torch.full((12,), 9)), neck(x)), "of an unknown camera: those of all"


def test_gradients_of_the_camera_neck():
    x, camids = torch.randn(10, 3, dtype=torch.double, requires_grad=True), torch.tensor([3, 7] * 5)
    neck = CameraNorm(3, [3, 7]).double()
    assert torch.autograd.gradcheck(lambda x: neck(x, camids), x)


def test_cameras_are_found_by_name_whatever_their_numbers():
    neck = CameraNorm(4, {1: "folder:gate", 2: "folder:lobby"})
    again = CameraNorm(4, [1, 2])
    again.load_state_dict(neck.state_dict())
    crops = [(1, "folder:attic"), (2, "folder:gate"), (3, "folder:lobby"), (1, "market1501:1"), (2, None), (None, None)]
    for layer in (neck, again):
        assert layer.known_as(crops).tolist() == [-1, 1, 2, -1, 2, -1], "a number alone is the layer's own"
    assert CameraNorm(4, [1, 2]).known_as(crops[:2]).tolist() == [1, 2], "without names there are only numbers"


def test_a_state_of_other_cameras_gives_its_rows_by_name():
    held = CameraNorm(2, {1: "a", 2: "b"})
    held.camera_mean.copy_(torch.tensor([[1.0, 1], [2, 2]])), held.camera_var.mul_(5)
    neck = CameraNorm(2, {1: "new", 2: "a", 3: "b"})
    neck.load_state_dict(held.state_dict())
    assert neck.names == ["new", "a", "b"] and neck.camids.tolist() == [1, 2, 3]
    assert neck.camera_mean.tolist() == [[0, 0], [1, 1], [2, 2]] and neck.camera_var[:, 0].tolist() == [1, 5, 5]
    assert neck.observed().tolist() == [False, True, True]
    old = {name: value for name, value in held.state_dict().items() if name != "_extra_state"}
    neck.load_state_dict(
        {name: value.repeat_interleave(2, 0)[:3] if "cam" in name else value for name, value in old.items()}
        | {"camids": torch.tensor([3, 9, 1])}
    )
    assert neck.camera_mean[:, 0].tolist() == [2, 0, 1], "a state without names is older: its numbers count"


@pytest.mark.parametrize("names", [b"[1]", b'["a"]', b"{", b"\xff\xfe", b'"ab"'])
def test_damaged_names_are_told(names):
    state = CameraNorm(2, {1: "a", 2: "b"}).state_dict() | {
        "_extra_state": torch.tensor(list(names), dtype=torch.uint8)
    }
    with pytest.raises(ValueError, match="names"):
        CameraNorm(2, [1, 2]).load_state_dict(state)


def test_a_camera_that_was_never_seen_often_enough_is_served_by_what_is_shared():
    torch.manual_seed(0)
    neck = CameraNorm(4, [3, 7])
    for _ in range(5):
        neck(5 + 2 * torch.randn(10, 4), torch.tensor([3] * 9 + [7]))
    x = 5 + 2 * torch.randn(6, 4)
    neck.eval()
    assert torch.equal(neck(x, torch.full((6,), 7)), neck(x)) and not torch.equal(neck(x, torch.full((6,), 3)), neck(x))
    neck.train()
    before = neck.running_mean.clone()
    late = 9 + torch.randn(8, 4)
    neck(late, torch.full((8,), 7))
    assert torch.allclose(neck.camera_mean[1], before.lerp(late.mean(0), 0.1)), (
        "a late camera starts from what is shared"
    )
