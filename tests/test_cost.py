"""Cost: Table 8 is met, multiplications counted a second way, layers by hand, the network left alone."""

import copy

import pytest
import torch
from small_networks import images, small
from torch import nn

from affscl.model.cost import layer_flops, network_cost
from affscl.model.network import AFF


def on_meta(**options):
    with torch.device("meta"):
        return AFF(**options)


@pytest.mark.parametrize("reduction, millions", [(16, 24.30), (4, 26.66)])
def test_parameters_of_the_equations_to_the_letter(reduction, millions):
    assert round(network_cost(on_meta(reduction=reduction)).params / 1e6, 2) == millions


def test_table8_is_met():
    cost = network_cost(on_meta(layout="table8"), 384, 192)
    assert cost.params == 26_699_938
    assert cost.flops == pytest.approx(9.173e9, rel=1e-3)
    assert cost.memory == pytest.approx(186.256, rel=1e-3)
    assert "26.70 M" in str(cost) and "9.17 G" in str(cost) and "186.26 MB" in str(cost)


def test_only_table8s_input_size_fits():
    own = network_cost(on_meta(layout="table8"))
    assert own == network_cost(on_meta(layout="table8"), 256, 128)
    assert own.flops == pytest.approx(9.173e9 / 2.25, rel=2e-3)


def test_macs_are_those_of_convolutions_and_linear_layers():
    model = small()
    seen = []

    def note(module, x, y):
        taps = module.weight[0].numel()
        seen.append(taps * y.numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note)
    model.eval()(images(1))
    assert network_cost(small()).macs == sum(seen)


def test_layer_flops_by_hand():
    conv, x = nn.Conv2d(4, 6, 3, groups=2), torch.zeros(1, 4, 5, 7)
    assert layer_flops(conv, x, conv(x)) == 6 * 3 * 5 * (2 * 9 + 1)
    assert layer_flops(nn.BatchNorm2d(4), x, x) == 2 * 140 and layer_flops(nn.ReLU6(), x, x) == 140
    assert layer_flops(nn.Linear(8, 3), torch.zeros(1, 8), torch.zeros(1, 3)) == 24
    assert layer_flops(nn.Sigmoid(), x, x) == 0


def test_cost_leaves_the_model_alone_and_counts_grouped_norms_too():
    model = small(bn_chunk=4)
    before = copy.deepcopy(model.state_dict())
    assert network_cost(model) == network_cost(small())
    assert model.training and not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
