"""Exported files answer as the network does, whatever its options, and a file that does not is never kept."""

import csv
import importlib.util
from dataclasses import fields

import numpy as np
import pytest
import torch
from long_forms import LONG
from PIL import Image
from small_networks import small, write_run

import affscl.use.export as export
from affscl.data.datasets import Sample
from affscl.model.backbones import BACKBONES
from affscl.model.extraction import extract, extract_boxes
from affscl.model.network import CHOICES, FIXED_BY_TABLE8, NetworkOptions
from affscl.model.norms import CameraMap
from affscl.use.export import (
    BATCHES,
    Portable,
    check_answers,
    export_command,
    plain_norms,
    probes,
    save_features,
    save_onnx,
    save_program,
)

ALL = dict(bn_chunk=4, camera_norm=True, camids=[3, 5], mirror=True, domains=2, pooling="gem", fusion="residual")
OTHER = dict(reduction=4, attention_relu=False, swapped=True, mirror=True, camera_norm=True, bn_chunk=4)


def variants():
    """Each option at each of its values, alone, and many together."""
    for field in fields(NetworkOptions):
        if field.name in ("height", "width", "weights", "backbone"):
            continue
        values = CHOICES.get(field.name, (OTHER.get(field.name),))
        yield from ({field.name: value} for value in values if value not in (field.default, None))
    yield from ({"backbone": name} for name in BACKBONES if name in ("mobilenet_v2", "resnet18"))
    yield from ({"network": "mhn", "orders": 2}, {"map": True}, {"map": True, "camera_norm": True, "mirror": True})
    yield from ({"layout": "table8", "bn_chunk": 4, "domains": 2}, ALL, {"swapped": True} | ALL | {"parts": "local"})


def trained(map=False, **options):
    """A network whose norms have seen crops of several cameras and domains, perhaps with a camera map."""
    if options.get("camera_norm"):
        options.setdefault("camids", [3, 5])
    network = small(**options).train()
    camids = torch.tensor([3, 5] * 4) if options.get("camera_norm") else None
    domain = torch.tensor([0] * 4 + [1] * 4) if options.get("domains") else 0
    with torch.no_grad():
        for seed in range(2):
            crops = torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(seed))
            network(crops + seed, domain, camids)
    if map:
        d = network.dim
        network.camera_map = CameraMap(torch.tensor([3, 7]), torch.randn(2, d) / d, torch.randn(2, d, d), ["a", "b"])
    return network.eval()


def test_every_option_is_tried():
    tried = {name for variant in variants() for name in variant}
    assert {field.name for field in fields(NetworkOptions)} - tried == {"height", "width", "weights"}
    assert set(FIXED_BY_TABLE8) <= tried


@pytest.mark.parametrize("options", list(variants()), ids=str)
def test_bytes_in_and_the_same_vectors_out(options):
    network = trained(**options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    portable = Portable(network)
    assert not any("Grouped" in type(module).__name__ for module in portable.modules())

    def answer(*inputs):
        return portable(*map(torch.from_numpy, inputs)).numpy()

    assert check_answers(answer, network, "x.onnx") < 1e-6
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@LONG  # 20 seconds each
@pytest.mark.parametrize("options", list(variants()), ids=str)
def test_files_of_every_option(tmp_path, options):
    network = trained(**options)
    assert save_program(network, tmp_path / "x.pt2") < 1e-5
    assert save_onnx(network, tmp_path / "x.onnx") < 1e-5


def test_a_camera_changes_the_answer_of_a_network_with_camera_necks():
    network = trained(camera_norm=True)
    (crops, camids), _ = probes(network, 6)
    portable = Portable(network)
    crops = torch.from_numpy(crops)
    known, unknown = portable(crops, torch.full((6,), 3)), portable(crops, torch.full((6,), -1))
    assert set(camids.tolist()) == {-1, 3, 5} and not torch.allclose(known, unknown)


def test_plain_norms_take_the_targets_statistics():
    network = trained(domains=2)
    expected = network(torch.ones(2, 3, 64, 32), 0).unit
    assert not torch.allclose(expected, network(torch.ones(2, 3, 64, 32), 1).unit)
    torch.testing.assert_close(plain_norms(network)(torch.ones(2, 3, 64, 32), 0).unit, expected)


def fails_above(limit):
    def answer(crops):
        if len(crops) > limit:
            raise RuntimeError("got 3, expected 2")
        return probes(small().eval(), max(BATCHES))[1][: len(crops)].numpy()

    return answer


@pytest.mark.parametrize(
    "answer, message",
    [
        (fails_above(2), "batch of 3 crops.*expected 2"),
        (lambda crops: np.zeros((2, 512), np.float32), "batch of 1 crops it differs from the network by inf"),
        (lambda crops: np.full((len(crops), 256), np.nan, np.float32), "differs from the network by nan"),
    ],
)
def test_a_file_that_answers_otherwise_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        check_answers(answer, small().eval(), "x.onnx")


def test_the_old_file_stays_when_the_new_one_is_no_good(tmp_path, monkeypatch):
    network, path = small().eval(), tmp_path / "model.pt2"
    path.write_text("old")
    with torch.no_grad():
        network.neck.weight.fill_(float("nan"))
    monkeypatch.setattr(export, "recorded", lambda model: torch.export.export(torch.nn.Identity(), (torch.ones(1),)))
    with pytest.raises(ValueError, match="did it diverge"):
        save_program(network, path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_missing_packages_are_named_with_the_line_that_installs_them(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ValueError, match="needs onnxscript, not installed here: pip install onnx onnxruntime"):
        save_onnx(small().eval(), tmp_path / "x.onnx")


def photos(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), (10 * i, 50, 90)).save(folder / name)
    return [str(folder / name) for name in names]


def test_rows_of_both_files_belong_together(tmp_path):
    network, paths = small().eval(), photos(tmp_path, ["a, b.png", "ü.png"])
    samples = [("query", Sample(paths[0], 7, 2)), ("gallery", Sample(paths[1]))]
    features = save_features(network, samples, tmp_path / "out" / "f.npz", tmp_path)
    with open(tmp_path / "out" / "f.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    stored = np.load(tmp_path / "out" / "f.npz")
    assert [line["path"] for line in table] == stored["path"].tolist() == paths
    assert [line["camid"] for line in table] == ["2", ""] and stored["split"].tolist() == ["query", "gallery"]
    np.testing.assert_array_equal(stored["features"], features)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_the_command_writes_features_of_any_folder(tmp_path, capsys):
    write_run(tmp_path / "run", small())
    photos(tmp_path / "new", ["1.png", "sub/2.png", "sub/3.png"])
    export_command([str(tmp_path / "run"), "features", "--images", str(tmp_path / "new"), "--device", "cpu"])
    assert np.load(tmp_path / "run" / "features.npz")["features"].shape == (3, 256)
    assert "features (3, 256) of 3 crops" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["no-such-run", "onnx"], "no config.json in"),
        (["RUN", "torch", "--images", "x"], "--images and --pattern are for features"),
        (["RUN", "features", "--pattern", "x"], "name that folder, too"),
        (["RUN", "features", "--out", "x.csv"], "features are written as .npz"),
        (["RUN", "features", "--images", "no-such-folder"], "no-such-folder"),
        (["RUN", "torch", "--out", "DIR"], "is a folder: name a file in it"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, words, message):
    write_run(tmp_path / "RUN", small())
    here = {"RUN": str(tmp_path / "RUN"), "DIR": str(tmp_path)}
    with pytest.raises(SystemExit) as stop:
        export_command([here.get(word, word) for word in words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_damaged_weights_are_told(tmp_path, capsys):
    write_run(tmp_path / "run", small())
    (tmp_path / "run" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit) as stop:
        export_command([str(tmp_path / "run"), "torch"])
    assert stop.value.code == 2 and "model.safetensors" in capsys.readouterr().err


def test_a_detectors_boxes():
    network, frame = small().eval(), np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    boxes = [[10.2, 5.7, 40.9, 80.1], [-30, -9, 20, 400]]
    expected = extract(network, [frame[5:81, 10:41], frame[:, :20]])
    for kind in (frame, Image.fromarray(frame)):
        for given in (boxes, np.array(boxes), torch.tensor(boxes)):
            torch.testing.assert_close(extract_boxes(network, kind, given), expected)
    for none in ([], np.empty((0, 4)), torch.empty(0, 4)):
        assert extract_boxes(network, frame, none).shape == (0, network.dim)


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([[0, 0, 9, 9], [130, 0, 140, 9]], r"1 of 2 boxes.*120 wide and 90 high: box 1 \[130"),
        ([[5, 5, 5, 9]], "box 0"),
        ([[9, 9, 3, 3]], "box 0"),
        ([[float("nan"), 0, 9, 9]], "box 0"),
        ([[0, 0, float("inf"), 9]], "box 0"),
        ([1, 2, 3, 4], r"must be \(n, 4\)"),
        ([[1, 2, 3]], r"must be \(n, 4\)"),
    ],
)
def test_boxes_without_a_pixel_are_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        extract_boxes(small().eval(), np.zeros((90, 120, 3), np.uint8), boxes)
