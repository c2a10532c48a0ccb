"""Weights: names looked through, what does not fit is told, files that run no code, what is shipped and cached."""

import pickle
import re
import warnings
from collections import OrderedDict

import numpy as np
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


# ---- files of other projects

INNER = {"epoch": 3, "rank1": np.float64(0.9), "top": np.float32(0.5), "seen": np.int64(7), "ok": np.bool_(True)}


class Body(nn.Module):
    """No more than a backbone."""

    def __init__(self, name="resnet10"):
        super().__init__()
        self.backbone, self.options = make_backbone(name), NetworkOptions(backbone=name)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(2)
    return make_backbone("resnet10").state_dict()


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("a.pth.tar", "module."),
        ("a.ckpt", "model."),
        ("a.bin", "base."),
        ("a", "backbone."),
        ("a.pkl", "module.base."),
        ("a.safetensors", "model.backbone."),
        ("a.PTH", "module.encoder.0.net."),
        ("a.pth.tar-60", ""),
    ],
)
def test_prefixes_and_suffixes(name, prefix, theirs, tmp_path):
    torch.save({f"{prefix}{key}": value for key, value in theirs.items()}, tmp_path / name)
    model = Body()
    loaded = load_weights(model, str(tmp_path / name))
    assert not loaded.missing and not loaded.unexpected
    assert torch.equal(model.backbone.layer4[0].conv2.weight, theirs["layer4.0.conv2.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s | INNER,
        lambda s: {"state_dict": s} | INNER,
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}},
        lambda s: {"net": s, "best": np.float64(1)},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"somebody's": s, "other": {"a": torch.zeros(1)}},
        lambda s: OrderedDict(model_state_dict=OrderedDict(s), args={"lr": 0.1}),
    ],
)
def test_wrappers(wrap, theirs, tmp_path):
    torch.save(wrap({f"module.{key}": value for key, value in theirs.items()}), tmp_path / "a.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_weights(Body(), str(tmp_path / "a.pth"))
    assert len(loaded.matched) == len(theirs) and not loaded.missing and not loaded.unexpected


def test_a_safetensors_file_is_known_whatever_the_length_of_its_header(tmp_path):
    """The file begins with that length, whose first byte may be what a pickle begins with, 0x80, or a zip, P."""
    path, value, firsts = tmp_path / "a.bin", torch.arange(3.0), set()
    for length in range(0, 256, 8):
        save_file({"x": value}, path, metadata={"note": "n" * length})
        firsts.add(path.read_bytes()[0])
        assert torch.equal(read_weights(path)["x"], value)
    assert firsts >= {0x80, ord("P")}
    torch.save({"x": value}, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[0] == 0x80 and torch.equal(read_weights(path)["x"], value)


def test_another_projects_neck_and_classifier_are_told(theirs, tmp_path):
    state = {f"base.{key}": value for key, value in theirs.items() if "layer4.0" not in key}
    state |= {"bottleneck.weight": torch.ones(9), "classifier.weight": torch.ones(9, 5), "neck.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    with pytest.warns(UserWarning, match="missing .*layer4.0.*3 unexpected .bottleneck.weight, cl.*, neck"):
        loaded = small(weights=str(tmp_path / "a.pth.tar")).loaded
    assert loaded.unexpected == ["bottleneck.weight", "classifier.weight", "neck.weight"]


def test_a_wrapped_whole_network_is_one(tmp_path):
    trained = small()
    torch.save({"model": {f"model.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "a.pth")
    loaded = AFF(**SMALL, weights=str(tmp_path / "a.pth")).loaded
    assert not loaded.missing and not loaded.unexpected


def hostile(folder):
    """Files that hold no weights that could be used: name to what is said of them."""
    good, said = {"conv1.weight": torch.ones(32, 3, 7, 7)}, {}

    def file(name, message):
        said[name] = message
        return folder / name

    file("empty.pth", "it is empty").touch()
    file("notes.pth", "begins with b'epoch 1, '").write_text("epoch 1, loss 2.3\n" * 40)
    file("page.pth.tar", "begins with b'<!DOCTYP").write_text("<!DOCTYPE html><html>not found</html>")
    file("picture.pth", "begins with").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    torch.save(good, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    file("cut.pth", "plain tensors").write_bytes(whole[: len(whole) // 2])
    file("zip.pth", "plain tensors").write_bytes(b"PK\x03\x04" + bytes(100))
    save_file(good, folder / "whole.safetensors")
    whole = (folder / "whole.safetensors").read_bytes()
    file("cut.safetensors", "plain tensors").write_bytes(whole[: len(whole) // 2])
    file("head.safetensors", "plain tensors").write_bytes(b"\xff" * 7 + b"\x7f{" + whole[9:])
    torch.save({"conv1.weight": torch.eye(4).to_sparse()}, file("sparse.pth", "conv1.weight are sparse or quantised"))
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    torch.save({"a": quantised}, file("quantised.pth", "a are sparse or quantised"))
    torch.save({"a": torch.tensor([1.0, float("nan")])}, file("nan.pth", "NaN or infinity in a"))
    torch.save({"epoch": 3, 4: torch.ones(2)}, file("numbers.pth", "holds no tensor under a name"))
    torch.save(nn.Linear(2, 2), file("module.pth", "code is not run: save the network's state_dict"))
    torch.save({"a": np.array([object()], dtype=object)}, file("objects.pth", "plain tensors"))
    (folder / "pickle.pth").write_bytes(pickle.dumps({"a": Trap()}))
    said["pickle.pth"] = "plain tensors"
    return said


def test_what_holds_no_weights_is_named(tmp_path, capsys):
    for name, message in hostile(tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(name)) as refused:
            read_weights(tmp_path / name)
        assert message in str(refused.value), (name, str(refused.value))
    assert "ran" not in capsys.readouterr().out


def test_a_damaged_cache_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    for damage in (b"", b"PK\x03\x04 and nothing", b"<html>"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="resnet18-f37072fd.pth is damaged: delete it"):
            load_weights(Body("resnet18"), "imagenet")


def test_weights_of_other_cameras_keep_the_cameras_of_this_run(tmp_path):
    held = small(camera_norm=True, camids={1: "a:1", 2: "a:2"})
    held.neck.camera_mean += 1
    save_file(held.state_dict(), tmp_path / "run.safetensors")
    model = small(camera_norm=True, camids={1: "b:1", 2: "a:2", 3: "b:3"}, weights=str(tmp_path / "run.safetensors"))
    assert model.neck.names == ["b:1", "a:2", "b:3"] and model.neck.observed().tolist() == [False, True, False]
