"""The network against step-by-step computation, its options and refusals, and loading it from a run."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_networks import images, small, write_run
from torch import nn

from affscl.model.attention import CAM, CASAM
from affscl.model.backbones import BACKBONES, make_backbone
from affscl.model.network import AFF, GeMPool, NetworkOptions, Output, load_model, network_problems
from affscl.model.weights import write_tensors


def test_forward_step_by_step():
    model, x = small(), images()
    output = model(x)
    maps = model.backbone(x.contiguous(memory_format=torch.channels_last))
    refined = model.attention.global_branch(maps)
    first, second = refined[:, :128], refined[:, 128:]
    maps = torch.cat([model.attention.local_branch.first(first), model.attention.local_branch.second(second)], 1)
    pooled = maps.sum((2, 3)) / maps[0, 0].numel()
    neck = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
    assert isinstance(output, Output)
    for got, expected in zip(output, (pooled, neck, neck / neck.norm(dim=1, keepdim=True)), strict=True):
        assert got.shape == (6, 256) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = AFF(name, height=64, width=32, pooling="gem")
    direction = torch.randn(4, model.dim)
    (model(images(4)).unit * direction).sum().backward()
    still = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert still == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["neck.bias"]
    assert (model.neck.bias == 0).all()


def test_images_of_a_batch_do_not_meet_in_eval_mode():
    model, x, order = small().eval(), images(), torch.tensor([4, 2, 0, 5, 1, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(x).unit[order], model(x[order]).unit, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[1:2]).unit, model(x).unit[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_rows_have_unit_length(training):
    torch.testing.assert_close(small().train(training)(images()).unit.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), {"global_branch": CASAM, "local_branch": CAM}),
        (dict(swapped=True), {"global_branch": CAM, "local_branch": CASAM}),
        (dict(parts="global"), {"global_branch": CASAM}),
        (dict(parts="local"), {"local_branch": CAM}),
        (dict(parts="none"), {}),
    ],
)
def test_parts_and_swapped(options, expected):
    branches = dict(small(**options).attention.named_children())
    assert {n: type(getattr(b, "first", b)) for n, b in branches.items()} == expected


def test_options_reach_the_attention():
    model = small(reduction=4, attention_relu=False, fusion="residual")
    glob, half = model.attention.global_branch, model.attention.local_branch.second
    assert glob.mlp.down.out_features == 64 and half.mlp.down.out_features == 32
    assert isinstance(glob.mlp.relu, nn.Identity) and isinstance(half.mlp.relu, nn.ReLU)
    assert glob.fusion == half.fusion == "residual"


def test_halves_are_attended_apart():
    model, maps = small(parts="local"), torch.randn(2, 256, 4, 2)
    other = maps.clone()
    other[:, 128:] = torch.randn(2, 128, 4, 2)
    before, after = model.attention(maps), model.attention(other)
    torch.testing.assert_close(before[:, :128], after[:, :128])
    assert not torch.allclose(before[:, 128:], after[:, 128:])


def test_gem_pool():
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(GeMPool(3.0)(maps), (maps**3).mean((2, 3)) ** (1 / 3))
    torch.testing.assert_close(GeMPool(1.0)(maps), maps.mean((2, 3)))
    zeros = torch.zeros(1, 1, 2, 2, requires_grad=True)
    GeMPool()(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


def test_output_is_32_bit_under_autocast():
    model, x = small(), images(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x)
    assert all(part.dtype == torch.float32 for part in rough)
    assert (rough.unit * model(x).unit).sum(1).min() > 0.9


def test_feature_maps_are_what_is_pooled():
    model = small().eval()
    maps = model.feature_maps(images())
    assert maps.shape == (6, 256, 4, 2) and maps.requires_grad
    torch.testing.assert_close(F.normalize(model.neck(maps.mean((2, 3)))), model(images()).unit)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 64, 32, dtype=torch.uint8), torch.zeros(3, 64, 32), torch.zeros(2, 1, 64, 32)]
)
def test_wrong_images_are_refused(wrong):
    with pytest.raises(ValueError, match="expected float images"):
        small()(wrong)


# ---- options


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(backbone="resnet51"), ("'resnet51'", "resnet10", "mobilenet_v2")),
        (dict(layout="table9"), ("'table9'", "paper, table8")),
        (dict(pooling="max"), ("'max'", "average, gem")),
        (dict(fusion="add"), ("'add'", "multiply, residual")),
        (dict(parts="all"), ("'all'", "both, global, local, none")),
        (dict(last_stride=3), ("3", "1, 2")),
        (dict(height=0), ("height=0",)),
        (dict(width=-4), ("width=-4",)),
        (dict(bn_chunk=1), ("bn_chunk=1",)),
        (dict(layout="table8", parts="global"), ("parts='global'", "table8", "'both'")),
        (dict(layout="table8", swapped=True), ("swapped=True", "table8")),
        (dict(layout="table8", fusion="residual"), ("fusion='residual'", "table8")),
        (dict(layout="table8", reduction=4), ("reduction=4", "table8")),
        (dict(parts="none", fusion="residual"), ("fusion='residual'", "without attention")),
        (dict(parts="none", swapped=True), ("swapped=True", "without attention")),
        (dict(backbone="resnet10", reduction=200), ("reduction=200", "128 channels")),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        AFF(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_problems_are_told_at_once():
    wrong = NetworkOptions(height=0, pooling="max", parts="none", swapped=True, bn_chunk=1)
    problems = network_problems(wrong)
    named = ("pooling", "height", "bn_chunk", "swapped")
    assert len(problems) == 4 and all(name in problem for name, problem in zip(named, problems, strict=True))
    with pytest.raises(ValueError) as caught:
        AFF(height=0, pooling="max", parts="none", swapped=True, bn_chunk=1)
    assert str(caught.value).splitlines() == problems


def test_every_default_is_possible():
    assert network_problems(NetworkOptions()) == []
    with pytest.raises(TypeError, match="heigth"):
        AFF(heigth=128)


# ---- runs


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(domains=3),
        dict(parts="local", bn_chunk=2, pooling="gem"),
        dict(layout="table8"),
        dict(domains=2, camera_norm=True, camids=[0, 3]),
    ],
)
def test_load_model_gives_the_same_network(tmp_path, options):
    trained = small(**options)
    trained(images())
    write_run(tmp_path / "run", trained)
    loaded = load_model(tmp_path / "run")
    assert not loaded.training and loaded.options == trained.options
    torch.testing.assert_close(loaded(images()).unit, trained.eval()(images()).unit)


def test_load_model_does_not_need_the_initial_weights_again(tmp_path):
    save_file(make_backbone("resnet10").state_dict(), tmp_path / "start.safetensors")
    model = small(weights=str(tmp_path / "start.safetensors"))
    model.options.weights = "gone.pth"
    write_run(tmp_path / "run", model)
    load_model(tmp_path / "run")


def test_load_model_reads_runs_that_are_older_than_an_option(tmp_path):
    model = small()
    write_run(tmp_path / "run", model)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["fusion"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "run").options.fusion == model.options.fusion == "multiply"


def test_load_model_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in .*nowhere"):
        load_model(tmp_path / "nowhere")
    write_run(tmp_path / "run", small())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"reduction": 4}))
    with pytest.raises(ValueError, match="is not of the network in its config.json"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_model(tmp_path / "run")


def test_settings_edited_after_training_are_noticed(tmp_path):
    model = small()
    write_run(tmp_path / "run", model)
    write_tensors(tmp_path / "run" / "model.safetensors", model.state_dict(), {"network": asdict(model.options)})
    load_model(tmp_path / "run")
    for change in ({"height": 96}, {"fusion": "residual"}, {"mirror": True}):
        (tmp_path / "run" / "config.json").write_text(json.dumps(asdict(model.options) | change))
        with pytest.raises(ValueError, match=f"edited after training: {list(change)[0]} is"):
            load_model(tmp_path / "run")
