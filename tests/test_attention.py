"""Attention against the equations written as einsum and loops, gradients, invariances, layouts, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from affscl.model.attention import CAM, CASAM, ChannelMLP, MaxPool, SplitAttention

MODULES = {
    "cam": lambda c: CAM(c, 4),
    "cam_residual": lambda c: CAM(c, 4, fusion="residual"),
    "casam": lambda c: CASAM(c, 4),
    "casam_literal": lambda c: CASAM(c, 4, relu=False),
    "casam_residual": lambda c: CASAM(c, 4, fusion="residual"),
    "split": lambda c: SplitAttention(c).eval(),
}
shapes = st.tuples(st.integers(1, 3), st.integers(2, 6).map(lambda c: 2 * c), st.integers(1, 7), st.integers(1, 5))


@pytest.fixture(params=MODULES, ids=str)
def module(request):
    torch.manual_seed(0)
    return MODULES[request.param](8)


def bottleneck(mlp, pooled, relu=True):
    """W1 (ReLU) W0 of a pooled (n, c)."""
    hidden = pooled @ mlp.down.weight.T
    return (hidden.clamp(min=0) if relu else hidden) @ mlp.up.weight.T


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999))
def test_cam_is_equations_5_and_6(shape, seed):
    torch.manual_seed(seed)
    cam, x = CAM(shape[1], 2), torch.randn(shape)
    weights = 1 / (1 + torch.exp(-bottleneck(cam.mlp, x.flatten(2).sum(-1) / (shape[2] * shape[3]))))
    torch.testing.assert_close(cam(x), torch.einsum("nchw,nc->nchw", x, weights))


@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 999), relu=st.booleans(), kernel=st.sampled_from([1, 3, 7]))
def test_casam_is_equations_1_to_4(shape, seed, relu, kernel):
    torch.manual_seed(seed)
    casam, x = CASAM(shape[1], 2, kernel, relu=relu), torch.randn(shape)
    flat = x.flatten(2)
    logits = bottleneck(casam.mlp, flat.max(-1).values, relu) + bottleneck(casam.mlp, flat.mean(-1), relu)
    refined = torch.einsum("nchw,nc->nchw", x, torch.sigmoid(logits))
    r = kernel // 2
    pair = nn.functional.pad(torch.stack([refined.max(1).values, refined.mean(1)], 1), (r, r, r, r))
    windows = pair.unfold(2, kernel, 1).unfold(3, kernel, 1)  # (n, 2, h, w, k, k)
    spatial = torch.sigmoid(torch.einsum("nphwij,pij->nhw", windows, casam.spatial.weight[0]))
    torch.testing.assert_close(casam(x), refined * spatial[:, None], rtol=1e-4, atol=1e-5)


def test_split_attention_by_hand():
    split = SplitAttention(2).eval()  # one channel in each half: every weight is a single number
    with torch.no_grad():
        split.down.weight.fill_(2.0), split.down.bias.fill_(1.0)
        split.up.weight.copy_(torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)), split.up.bias.copy_(torch.tensor([0.0, 1.0]))
    split.norm.running_var.fill_(1 - split.norm.eps)
    x = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    hidden = torch.tensor(2.0 * (3 + 1) + 1)
    first = torch.sigmoid(0.5 * hidden - (-0.5 * hidden + 1))  # softmax of two is a sigmoid of the difference
    torch.testing.assert_close(split(x).flatten(), torch.stack([3 * first, 1 - first]))


def test_split_weights_of_a_channel_sum_to_one():
    torch.manual_seed(0)
    weights = SplitAttention(12).channel_weights(torch.randn(5, 12, 4, 3))
    first, second = weights.chunk(2, 1)
    torch.testing.assert_close(first + second, torch.ones_like(first))


def test_residual_adds_the_input():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 3)
    for kind in (CAM, CASAM):
        multiply, residual = kind(8, 2), kind(8, 2, fusion="residual")
        residual.load_state_dict(multiply.state_dict())
        torch.testing.assert_close(residual(x), x + multiply(x))


def test_gradients_reach_everything(module):
    x = torch.randn(4, 8, 5, 3, requires_grad=True)
    module(x).square().sum().backward()
    for name, tensor in [("input", x), *module.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name


def test_gradients_are_right(module):
    module = module.double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, fast_mode=True)


def test_images_do_not_see_each_other(module):
    x, order = torch.randn(5, 8, 4, 3), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(module(x)[order], module(x[order]))
    torch.testing.assert_close(module(x)[2:3], module(x[2:3]))


def test_multiplication_never_makes_a_number_larger():
    torch.manual_seed(0)
    x = torch.randn(4, 8, 4, 3)
    for build in (MODULES["cam"], MODULES["casam"], MODULES["split"]):
        out = build(8)(x)
        assert (out.abs() <= x.abs()).all() and (out * x >= 0).all()


def test_channel_attention_is_blind_to_place_and_casam_is_not():
    torch.manual_seed(0)
    x, order = torch.rand(2, 8, 16, 8), torch.randperm(128)
    shuffled = x.flatten(2)[..., order].view_as(x)
    cam, casam, split = CAM(8, 2), CASAM(8, 2), SplitAttention(8).eval()
    for blind in (cam, split):
        torch.testing.assert_close(blind(shuffled).flatten(2), blind(x).flatten(2)[..., order])
    assert (casam(shuffled).flatten(2) - casam(x).flatten(2)[..., order]).abs().max() > 1e-3


def test_tied_maxima_share_the_gradient():
    x = torch.zeros(1, 1, 2, 3, requires_grad=True)
    MaxPool()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 6))


def test_channels_last_goes_through(module):
    x = torch.randn(2, 8, 5, 3)
    out = module(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, module(x))


def test_autocast_stays_finite_and_close(module):
    x = 100 * torch.randn(4, 8, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(x)
    assert rough.isfinite().all()
    assert (rough - module(x)).abs().max() < 0.05 * x.abs().max()


def test_no_biases_in_the_equations_modules():
    assert sum(p.numel() for p in CAM(1024).parameters()) == 2 * 1024 * 64
    assert sum(p.numel() for p in CASAM(2048).parameters()) == 2 * 2048 * 128 + 2 * 49
    assert sum(p.numel() for p in SplitAttention(2048).parameters()) == 3_150_848


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: ChannelMLP(8, 9), ("reduction=9", "8 channels", "1 to 8")),
        (lambda: CAM(8, 0), ("reduction=0",)),
        (lambda: CAM(8, 2, fusion="add"), ("'add'", "multiply", "residual")),
        (lambda: CASAM(8, 2, fusion="sum"), ("'sum'", "multiply", "residual")),
        (lambda: CASAM(8, 2, kernel_size=6), ("kernel_size=6", "odd")),
        (lambda: SplitAttention(5), ("5 channels", "halves")),
    ],
)
def test_mistakes_are_named(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    assert all(word in str(caught.value) for word in words)
