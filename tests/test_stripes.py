"""MGN, HPM and MHN: against naive computation, refusals, weights, statistics, Table 8, and a run with each."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_networks import images, small
from torch import nn

from affscl.criteria.classifier import PiecesBaseline, StrongBaseline, batch_hard_triplet
from affscl.model.cost import network_cost
from affscl.model.extraction import extract
from affscl.model.network import AFF, NetworkOptions, Output, load_model, network_problems
from affscl.model.stripes import REDUCED, HighOrder, Stripes, pieces
from affscl.scores.gradcam import grad_cam

OTHERS = ("mgn", "hpm", "mhn", "ssg")
options = {name: dict(network=name) for name in OTHERS} | {"mhn": dict(network="mhn", orders=3)}


def network(name, **more):
    return small(**options[name] | more)


@pytest.mark.parametrize("name", OTHERS)
def test_features_have_a_piece_for_each_stripe(name):
    model, x = network(name).eval(), images(4, 96, 48)
    output = model(x)
    count, whole = pieces(model.options)
    assert model.dim == output.pooled.shape[1] == count * (256 if name == "ssg" else REDUCED)  # resnet10 has 256
    assert (count, whole) == {"mgn": (8, 3), "hpm": (15, 1), "mhn": (9, 0), "ssg": (3, 1)}[name]
    torch.testing.assert_close(output.unit.norm(dim=1), torch.ones(4))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]).unit, output.unit[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["max", "mean", "both"])
@pytest.mark.parametrize("h, count", [(12, 1), (12, 3), (10, 3), (7, 4), (4, 8), (1, 2)])
def test_stripes_are_those_of_adaptive_pooling(pool, h, count):
    maps = torch.randn(2, 3, h, 5)
    largest, mean = F.adaptive_max_pool2d(maps, (count, 1)), F.adaptive_avg_pool2d(maps, (count, 1))
    expected = {"max": largest, "mean": mean, "both": largest + mean}[pool]
    torch.testing.assert_close(Stripes(count, pool)(maps), expected)


def test_a_stripe_reads_its_lines_alone():
    model = network("hpm").eval()
    maps = torch.rand(1, 256, 8, 4)
    below = maps.clone()
    below[:, :, 4:] += 1
    before, after = (model.pool(m).unflatten(1, (15, REDUCED))[0] for m in (maps, below))
    same = [i for i in range(15) if torch.equal(before[i], after[i])]
    assert same == [1, 3, 4, 7, 8, 9, 10]  # the upper half; the upper two quarters; the upper four eighths


def test_the_pieces_of_ssg_are_a_whole_and_its_halves():
    model, x = network("ssg").eval(), images(3, 96, 48)
    maps, (whole, upper, lower) = model.feature_maps(x), model(x).pooled.chunk(3, 1)
    assert maps.shape[2] % 2 == 0
    torch.testing.assert_close((upper + lower) / 2, whole)
    torch.testing.assert_close(upper, maps[:, :, : maps.shape[2] // 2].mean((2, 3)))


@pytest.mark.parametrize("height, width", [(64, 32), (70, 40), (96, 48)])
def test_mgn_branch_by_branch(height, width):
    model, x = network("mgn").eval(), images(2, height, width).contiguous(memory_format=torch.channels_last)
    shared = x
    for part in list(model.backbone.children())[:-1]:
        shared = part(shared)
    coarse, halves, thirds = (branch(shared) for branch in model.backbone.branches.children())
    assert coarse.shape[2] == -(-halves.shape[2] // 2) and halves.shape == thirds.shape
    parts = [m.amax((2, 3), keepdim=True) for m in (coarse, halves, thirds)]
    parts += [*F.adaptive_max_pool2d(halves, (2, 1)).split(1, 2), *F.adaptive_max_pool2d(thirds, (3, 1)).split(1, 2)]
    layers = [layer for view in model.pool.views for layer in view.reduce]
    expected = torch.cat([layer(part).flatten(1) for layer, part in zip(layers, parts, strict=True)], 1)
    torch.testing.assert_close(model(x).pooled, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_high_order_place_by_place():
    torch.manual_seed(0)
    attention, x = HighOrder(12, 4).double(), torch.randn(2, 12, 3, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for n, i, j in np.ndindex(2, 3, 2):
        column = x[n, :, i, j]
        for r in range(4):
            product = torch.ones(3, dtype=torch.float64)
            for factor in attention.factors[r]:
                product = product * (factor.weight[:, :, 0, 0] @ column)
            up = attention.weights[r][0].weight[:, :, 0, 0]
            expected[n, :, i, j] += torch.sigmoid(up @ product.clamp(min=0)) * column / 4
    torch.testing.assert_close(attention(x), expected)


def test_orders_of_mhn_one_by_one():
    model, x = network("mhn").eval(), images(2).contiguous(memory_format=torch.channels_last)
    stages = dict(model.backbone.named_children())
    shared = x
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
        shared = stages[name](shared)
    features = []
    for attention in stages["orders"].children():
        maps = stages["layer4"](stages["layer3"](attention(shared)))
        parts = F.adaptive_avg_pool2d(maps, (3, 1)).split(1, 2)
        features += [layer(p).flatten(1) for layer, p in zip(model.pool.reduced.reduce, parts, strict=True)]
    torch.testing.assert_close(model(x).pooled, torch.cat(features, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_reach_every_parameter(name):
    model = network(name)
    (model(images(4)).unit * torch.randn(4, model.dim)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


@pytest.mark.parametrize("name", OTHERS)
def test_chunks_and_domains_are_batches_of_their_own(name):
    """MHN's inner layers see several rows a crop; chunks and domains are still divided between crops."""
    plain, chunked, joint = network(name), network(name, bn_chunk=4), network(name, domains=2)
    for model in (chunked, joint):
        model.load_state_dict(plain.state_dict(), strict=False)
        for key, value in model.state_dict().items():
            if ".others.0." in key:
                value.copy_(plain.state_dict()[key.replace("others.0.", "")])
    x = images(7)
    apart = torch.cat([plain(x[:4]).pooled, plain(x[4:]).pooled])
    torch.testing.assert_close(chunked(x).pooled, apart, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(joint(x, torch.tensor([0] * 4 + [1] * 3)).pooled, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(network="pcb"), "unknown network 'pcb': choose one of aff, mgn, hpm, mhn, ssg"),
        (dict(network="mgn", backbone="mobilenet_v2"), "backbone='mobilenet_v2' is none: choose one of resnet10"),
        (dict(network="mhn", backbone="mobilenet_v2"), "network='mhn' is built inside a ResNet"),
        (dict(network="mgn", last_stride=2), "last_stride=2 contradicts network='mgn'"),
        (dict(network="hpm", layout="table8"), "layout='table8' contradicts network='hpm'"),
        (dict(network="hpm", pooling="gem"), "pooling='gem' contradicts network='hpm'"),
        (dict(network="mhn", swapped=True), "swapped=True contradicts network='mhn'"),
        (dict(network="mhn", parts="none"), "parts='none' contradicts network='mhn'"),
        (dict(network="mhn", orders=0), "orders=0 must be at least 1"),
        (dict(network="mgn", orders=4), "orders=4 contradicts network='mgn'"),
        (dict(orders=4), "orders=4 is about network='mhn'"),
    ],
)
def test_what_contradicts_is_refused_by_name(wrong, told):
    (problem,) = network_problems(NetworkOptions(**wrong))
    assert told in problem
    with pytest.raises(ValueError, match=told[:20]):
        AFF(**wrong)


@pytest.mark.parametrize(
    "fine",
    [dict(network=n, **more) for n in ("hpm", "ssg") for more in (dict(backbone="mobilenet_v2"), dict(last_stride=2))],
)
def test_what_goes_together(fine):
    assert network_problems(NetworkOptions(**fine)) == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_backbones_file_fills_them_without_a_warning(name, recwarn):
    model = network(name, weights="synthetic", domains=2)
    assert not recwarn.list and not model.loaded.missing and not model.loaded.unexpected
    if name == "mgn":
        first, *others = (branch.layer4.state_dict() for branch in model.backbone.branches.children())
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", OTHERS)
def test_a_runs_folder_gives_the_same_network_back(name, tmp_path):
    model = network(name, domains=2).eval()
    (tmp_path / "config.json").write_text(json.dumps(vars(model.options)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    x = images(3)
    torch.testing.assert_close(again(x).unit, model(x).unit)
    torch.testing.assert_close(extract(again, x), model(x).unit, rtol=1e-4, atol=1e-5)
    heat = grad_cam(model, x)
    assert heat.shape == (3, 64, 32) and float(heat.max()) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_export_keeps_the_rows(name, tmp_path):
    traced = torch.export.export(network(name).eval(), (images(2),))
    x = images(2, seed=1)
    torch.testing.assert_close(traced.module()(x).unit, network(name).eval()(x).unit, rtol=1e-4, atol=1e-5)


class InTraining(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.height, self.width = model, model.height, model.width
        self.heads = nn.ModuleList(nn.Linear(REDUCED, 751) for _ in range(model.dim // REDUCED))

    def forward(self, x):
        return [head(piece) for head, piece in zip(self.heads, self.model(x).neck.split(REDUCED, 1))]


def test_table8s_other_rows():
    """MGN with three classifiers over 2048 channels; FLOPs and memory of MHN-6 (PCB) are those of four orders."""
    with torch.device("meta"):
        mgn = network_cost(InTraining(AFF(network="mgn", height=384)))
        mhn = network_cost(InTraining(AFF(network="mhn", orders=4, height=336, width=168)))
    wider = 3 * (2048 - REDUCED) * 751
    assert mgn.params + wider == pytest.approx(74.38e6, rel=5e-4)
    assert mgn.flops + wider == pytest.approx(11.94e9, rel=5e-4) and mgn.memory == pytest.approx(179.55, rel=5e-4)
    assert mhn.flops == pytest.approx(24.55e9, rel=5e-4) and mhn.memory == pytest.approx(186.18, rel=5e-4)
    assert mhn.params == pytest.approx(29.37e6, rel=5e-4)  # and not the printed 30.36: chapter 17


def outputs(b=8, d=12, seed=0):
    pooled = torch.randn(b, d, generator=torch.Generator().manual_seed(seed))
    return Output(pooled, F.batch_norm(pooled, None, None, training=True), F.normalize(pooled))


@pytest.mark.parametrize("count, whole", [(1, 1), (4, 2), (3, 0), (12, 12)])
def test_pieces_are_judged_one_by_one(count, whole):
    torch.manual_seed(0)
    criterion = PiecesBaseline(5, 12, (count, whole), label_smoothing=0.2, margin=0.5, centre_weight=0.01)
    output, targets = outputs(), torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])
    parts, size = criterion(output, targets), 12 // count
    cross = []
    for p in range(count):
        rows = criterion.classifier.weight[5 * p : 5 * p + 5, :, 0]
        logits = output.neck[:, size * p : size * (p + 1)] @ rows.T
        wanted = torch.full((8, 5), 0.2 / 5).scatter_add_(1, targets[:, None], torch.full((8, 1), 0.8))
        cross.append(-(wanted * logits.log_softmax(1)).sum(1).mean())
    bodies = [output.pooled[:, size * p : size * (p + 1)] for p in range(whole)] or [output.pooled]
    torch.testing.assert_close(parts["cross_entropy"], sum(cross) / count)
    torch.testing.assert_close(parts["triplet"], sum(batch_hard_triplet(b, targets, 0.5) for b in bodies) / len(bodies))
    plain = StrongBaseline(5, 12, 0.2, 0.5, 0.01)
    plain.centre = criterion.centre
    torch.testing.assert_close(parts["centre"], plain(output, targets)["centre"])


@pytest.mark.parametrize("pieces", [(5, 1), (0, 0), (4, 5), (4, -1)])
def test_pieces_that_make_no_feature_are_refused(pieces):
    with pytest.raises(ValueError, match="cannot consist of"):
        PiecesBaseline(5, 12, pieces)


def test_pieces_refuse_what_the_strong_baseline_refuses():
    with pytest.raises(ValueError, match="two people or more"):
        PiecesBaseline(1, 12, (4, 2))
    with pytest.raises(ValueError, match="centre_rate"):
        PiecesBaseline(3, 12, (4, 2), centre_rate=2)
