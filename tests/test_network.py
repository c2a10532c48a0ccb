"""The network against step-by-step computation, grouped BatchNorm, weights, extraction, sizes, refusals."""

import copy
import json
import warnings
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from affscl.data.augmentation import normalise
from affscl.data.datasets import Sample
from affscl.data.store import ImageStore
from affscl.model.attention import CAM, CASAM
from affscl.model.backbones import BACKBONES, make_backbone
from affscl.model.cost import layer_flops, network_cost
from affscl.model.extraction import extract
from affscl.model.network import AFF, GeMPool, NetworkOptions, Output, load_model, network_problems
from affscl.model.norms import CameraNorm, GroupedNorm, Groups
from affscl.model.weights import load_weights, read_weights

SMALL = dict(backbone="resnet10", height=64, width=32)


def small(**options):
    torch.manual_seed(0)
    return AFF(**SMALL | options)


def images(n=6, height=64, width=32, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def on_meta(**options):
    with torch.device("meta"):
        return AFF(**options)


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


def test_a_network_with_camera_necks_uses_the_samples_cameras(crops, tmp_path):
    torch.manual_seed(0)
    model = small(camera_norm=True, camids=[1, 2], bn_chunk=2)
    assert isinstance(model.neck, CameraNorm), "chunks leave it alone"
    model.neck.camera_mean.normal_()
    samples = [Sample(path, camid=camid) for (path, *_), camid in zip(crops, (1, 2, None) * len(crops))]
    store = ImageStore(samples, 64, 32, cache=tmp_path)
    found = extract(model, store)
    camids = torch.tensor([-1 if sample.camid is None else sample.camid for sample in samples])
    assert torch.equal(found, extract(model, store.batch(range(len(store))), camids=camids))
    assert not torch.allclose(found, extract(model, store.batch(range(len(store)))))
    write_run(tmp_path / "run", model)
    assert torch.equal(extract(load_model(tmp_path / "run"), store), found)


def test_rows_extract_some_images_only(crops, tmp_path):
    model = small()
    store = ImageStore([Sample(path) for path, *_ in crops], 64, 32, cache=tmp_path)
    assert torch.allclose(extract(model, store, rows=[2, 0]), extract(model, store)[[2, 0]], atol=1e-6)


def test_mirror_gives_a_crop_and_its_mirror_image_the_same_feature():
    model, pictures = small(mirror=True), images(5)
    assert torch.allclose(extract(model, pictures), extract(model, pictures.flip(3)), atol=1e-6)
    plain = small()
    plain.load_state_dict(model.state_dict())
    plain.eval()
    with torch.no_grad():
        assert torch.allclose(
            extract(model, pictures), F.normalize(plain(pictures).neck + plain(pictures.flip(3)).neck), atol=1e-6
        )


# ---- the parts and the whole


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


# ---- BatchNorm by groups


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


# ---- sizes (Table 8)


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


# ---- weights


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


# ---- runs


def write_run(run, model):
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(model.options) | {"epochs": 3}))
    save_file(model.state_dict(), run / "model.safetensors")


@pytest.mark.parametrize(
    "options", [dict(), dict(domains=3), dict(parts="local", bn_chunk=2, pooling="gem"), dict(layout="table8")]
)
def test_load_model_gives_the_same_network(tmp_path, options):
    trained = small(**options)
    trained(images())
    write_run(tmp_path / "run", trained)
    loaded = load_model(tmp_path / "run")
    assert not loaded.training and loaded.options == trained.options
    torch.testing.assert_close(loaded(images()).unit, trained.eval()(images()).unit)


def test_load_model_does_not_need_the_initial_weights_again(tmp_path, mobilenet):
    model = AFF("mobilenet_v2", weights=str(mobilenet), height=64, width=32)
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


def test_every_default_is_possible():
    assert network_problems(NetworkOptions()) == []
    with pytest.raises(TypeError, match="heigth"):
        AFF(heigth=128)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 64, 32, dtype=torch.uint8), torch.zeros(3, 64, 32), torch.zeros(2, 1, 64, 32)]
)
def test_wrong_images_are_refused(wrong):
    with pytest.raises(ValueError, match="expected float images"):
        small()(wrong)


# ---- extraction


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Ten little pictures on disk."""
    folder = tmp_path_factory.mktemp("crops")
    pixels = torch.randint(
        0, 256, (10, 64, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ).numpy()
    samples = []
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
        samples.append(Sample(str(folder / f"{i}.png"), pid=i, camid=0))
    return samples


def test_extract_is_the_same_for_all_kinds_of_data_and_batch_sizes(crops, tmp_path):
    model = small()
    store = ImageStore(crops, 64, 32, cache=tmp_path, progress=False)
    pixels = store.batch(range(10))
    features = extract(model, store)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(normalise(pixels)).unit
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32 and features.device.type == "cpu" and not features.requires_grad
    for data in (crops, [s.path for s in crops], pixels, normalise(pixels)):
        for batch_size in (3, 10):
            torch.testing.assert_close(extract(model, data, batch_size=batch_size), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(10))


def test_extract_leaves_the_model_as_it_was():
    model = small().train()
    model.backbone.layer1.eval()  # a part that someone froze
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    extract(model, images())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="expected float images"):
        extract(model, torch.zeros(2, 5, 64, 32))
    assert modes == [m.training for m in model.modules()]


def test_extract_knows_domains_and_empty_data():
    model = small(domains=2)
    model(torch.cat([images(4), 5 * images(4) + 2]), [0] * 4 + [1] * 4)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images(), 1).unit
    torch.testing.assert_close(extract(model, images(), domain=1), expected)
    assert not torch.allclose(extract(model, images()), expected, atol=1e-2)
    assert extract(model, images(0)).shape == (0, 256)


def test_feature_maps_are_what_is_pooled():
    model = small().eval()
    maps = model.feature_maps(images())
    assert maps.shape == (6, 256, 4, 2) and maps.requires_grad
    torch.testing.assert_close(F.normalize(model.neck(maps.mean((2, 3)))), model(images()).unit)
