"""Grad-CAM by hand, without a trace in the network, and its pictures."""

import numpy as np
import pytest
import torch
from torch import nn

from affscl.model.network import AFF, Output
from affscl.scores.gradcam import grad_cam, show_heat

RNG = np.random.default_rng(0)
CROPS = RNG.integers(0, 256, (12, 3, 16, 8), dtype=np.uint8)


class Tiny(nn.Module):
    """Two channels: the first sees red, the second green; the embedding is their mean."""

    def __init__(self):
        super().__init__()
        self.scale, self.pool = nn.Parameter(torch.ones(1)), nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        pooled = self.pool(self.scale * images[:, :2]).flatten(1)
        return Output(pooled, pooled, nn.functional.normalize(pooled))


def test_grad_cam_by_hand():
    image = torch.zeros(1, 3, 8, 4)
    image[0, 0, :4] = 2.0
    image[0, 1, 4:] = 1.0
    model = Tiny()
    red, green = (grad_cam(model, image, torch.tensor(r)) for r in ([1.0, 0.0], [0.0, 1.0]))
    assert red.shape == (1, 8, 4) and red[0, :4].min() == 1 and red[0, 4:].max() == 0
    assert green[0, 4:].min() == 1 and green[0, :4].max() == 0
    own = grad_cam(model, image)[0]  # weights 2 : 1 times maps 2 : 1
    assert own[0, 0] == 1 and torch.isclose(own[7, 0], torch.tensor(0.25))
    assert grad_cam(model, image, torch.tensor([-1.0, -1.0])).max() == 0


def test_grad_cam_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    model = AFF("resnet10", height=64, width=32).train()
    model.neck.eval()
    images = torch.randint(0, 256, (3, 3, 64, 32), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        heat = grad_cam(model, images)
    assert heat.shape == (3, 64, 32) and heat.min() >= 0 and torch.allclose(heat.amax((1, 2)), torch.ones(3))
    assert model.training and not model.neck.training and not model.pool._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    np.testing.assert_allclose(grad_cam(model, images[1:2])[0], heat[1], atol=1e-4)


def test_show_heat(tmp_path):
    heat = RNG.random((12, 16, 8))
    figure = show_heat(CROPS, heat, columns=5)
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert len(figure.axes) == 10 and (tmp_path / "figure.png").stat().st_size > 500
    axes = show_heat(CROPS[:2], {"a": heat[:2], "b": torch.from_numpy(heat[:2])}).axes
    assert len(axes) == 6 and axes[4].get_ylabel() == "b" and len(axes[2].images) == 2


@pytest.mark.parametrize(
    "function, args, message",
    [
        (grad_cam, (Tiny(), CROPS[0]), r"\(b, 3, h, w\)"),
        (show_heat, (CROPS, np.zeros((12, 5, 5))), "one map for each image"),
        (show_heat, (CROPS / 255, np.zeros((12, 16, 8))), "uint8 crops"),
    ],
)
def test_mistakes_are_named(function, args, message):
    with pytest.raises(ValueError, match=message):
        function(*args)
