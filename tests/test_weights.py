"""Weights: names looked through, what does not fit is told, files that run no code, what is shipped and cached."""

import warnings

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from small_networks import SMALL, images, small
from torch import nn

from affscl.model.backbones import make_backbone
from affscl.model.network import AFF, NetworkOptions
from affscl.model.weights import load_weights, read_weights, shipped_weights


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """A file as torchvision's users have them: the state of MobileNetV2, without its classifier."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.pth"
    torch.save(
        {k: v for k, v in torchvision.models.mobilenet_v2().state_dict().items() if k.startswith("features.")}, path
    )
    return path


def test_torchvision_names_load(mobilenet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AFF("mobilenet_v2", weights=str(mobilenet), height=64, width=32)
    state = torch.load(mobilenet, weights_only=True)
    assert len(model.loaded.matched) == len(state) == 312 and not model.loaded.missing and not model.loaded.unexpected
    assert all(torch.equal(model.state_dict()[f"backbone.{k}"], v) for k, v in state.items())


def test_classifier_and_wrappers_are_looked_through(tmp_path):
    torch.manual_seed(1)
    state = torchvision.models.resnet18().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "wrapped.pt")
    model = AFF("resnet18", weights=str(tmp_path / "wrapped.pt"), domains=2)
    assert not model.loaded.missing and not model.loaded.unexpected
    norm = model.backbone.bn1
    assert torch.equal(norm.weight, state["bn1.weight"]) and torch.equal(
        norm.others[0].running_var, state["bn1.running_var"]
    )


def test_a_whole_network_loads(tmp_path):
    trained = small()
    trained(images())  # the statistics move
    save_file(trained.state_dict(), tmp_path / "whole.safetensors")
    model = AFF(**SMALL, weights=str(tmp_path / "whole.safetensors"))
    assert not model.loaded.missing and not model.loaded.unexpected
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.warns(UserWarning, match="unexpected .*attention"):
        bare = AFF(**SMALL, parts="none", weights=str(tmp_path / "whole.safetensors"))
    assert bare.loaded.unexpected and all(name.startswith("attention.") for name in bare.loaded.unexpected)


def test_missing_and_unexpected_are_told(tmp_path):
    state = {k: v for k, v in make_backbone("resnet10").state_dict().items() if not k.startswith("layer4.")}
    save_file(state | {"extra": torch.zeros(1)}, tmp_path / "part.safetensors")
    with pytest.warns(UserWarning, match="15 missing .*layer4.*1 unexpected .*extra"):
        loaded = AFF(**SMALL, weights=str(tmp_path / "part.safetensors")).loaded
    assert loaded.unexpected == ["backbone.extra"] and all("layer4" in name for name in loaded.missing)


def test_weights_that_cannot_be_right(tmp_path, mobilenet):
    with pytest.raises(ValueError, match="nothing in .*mobilenet.pth fits resnet10.*features.0.0.weight"):
        small(weights=str(mobilenet))
    save_file(make_backbone("resnet18").state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"another shape.*backbone.conv1.weight \(64, 3, 7, 7\) for \(32, 3, 7, 7\)"):
        small(weights=str(tmp_path / "wide.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no weights at .*imagnet: give 'imagenet', 'synthetic', or the path"):
        small(weights="imagnet")
    with pytest.raises(ValueError, match="no imagenet weights for resnet10: .*resnet50"):
        small(weights="imagenet")
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("broken.safetensors", "broken.pth", "list.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold a dictionary of plain tensors"):
            read_weights(tmp_path / name)


def test_any_module_with_a_named_backbone_can_be_loaded(tmp_path):
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.options = make_backbone("resnet10"), NetworkOptions(backbone="resnet10")

    state = make_backbone("resnet10").state_dict()
    save_file(state, tmp_path / "body.safetensors")
    body = Body()
    assert len(load_weights(body, tmp_path / "body.safetensors").matched) == len(state)
    assert torch.equal(body.backbone.conv1.weight, state["conv1.weight"])


def test_shipped_weights_fit():
    assert "resnet10" in shipped_weights()
    assert not small(weights="synthetic").loaded.missing


class Trap:
    def __reduce__(self):
        return print, ("code in a weights file ran",)


def test_weights_files_run_no_code(tmp_path, capsys):
    torch.save({"conv1.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="plain tensors"):
        read_weights(tmp_path / "trap.pth")
    assert capsys.readouterr().out == ""


def test_synthetic_weights_are_found_or_the_others_named(tmp_path, monkeypatch):
    monkeypatch.setattr("affscl.model.weights.SHIPPED", tmp_path)
    with pytest.raises(ValueError, match="no synthetic weights for resnet10: there are some for none"):
        small(weights="synthetic")
    save_file(make_backbone("resnet10").state_dict(), tmp_path / "resnet10_synthetic.safetensors")
    assert not small(weights="synthetic").loaded.missing
    with pytest.raises(ValueError, match="no synthetic weights for resnet18: there are some for resnet10"):
        AFF("resnet18", weights="synthetic")


def test_imagenet_comes_from_torchvisions_cache_and_its_absence_is_explained(monkeypatch):
    state, asked = torchvision.models.resnet18().state_dict(), []
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1

    def get(self, **options):
        asked.append((self, options))
        return state

    monkeypatch.setattr(type(entry), "get_state_dict", get)
    model = AFF("resnet18", weights="imagenet")
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"]) and not model.loaded.missing
    assert asked[0][0] is entry and asked[0][1]["check_hash"]

    def unreachable(self, **options):
        raise OSError("no route")

    monkeypatch.setattr(type(entry), "get_state_dict", unreachable)
    with pytest.raises(FileNotFoundError, match="resnet18-.*checkpoints.*no route.*path as weights"):
        load_weights(model, "imagenet")
