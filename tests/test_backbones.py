"""Backbones against torchvision's own bodies; the stride of the last stage."""

import pytest
import torch
import torchvision
from small_networks import images

from affscl.model.backbones import BACKBONES, make_backbone


@pytest.mark.parametrize("name", [n for n in BACKBONES if n != "resnet10"])
def test_backbone_is_torchvisions_body(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    body = make_backbone(name, last_stride=2).eval()
    body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("fc.", "classifier."))})
    x, head = images(2), theirs.classifier if name == "mobilenet_v2" else theirs.fc
    with torch.no_grad():
        torch.testing.assert_close(head(body(x).mean((2, 3))), theirs(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_last_stride_doubles_the_map_and_no_parameter(name):
    with torch.device("meta"):
        fine, coarse = make_backbone(name, 1), make_backbone(name, 2)
        assert fine(images(2, 128, 64).to("meta")).shape == (2, BACKBONES[name], 8, 4)
        assert coarse(images(2, 128, 64).to("meta")).shape == (2, BACKBONES[name], 4, 2)
    assert fine.state_dict().keys() == coarse.state_dict().keys()
