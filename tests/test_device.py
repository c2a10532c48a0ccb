"""Every step on a device that is not there: torch's fake tensors call themselves `cuda` and refuse mixtures.

A fake tensor has a shape, a type and a device, and no numbers. So a whole step runs without a GPU, and two devices in
one operation are an error as they would be on a GPU. What torch itself does is left out: `backward` needs
the driver, so each parameter gets a gradient of its own shape, and the one backward that is ours is called by hand.
"""

from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from affscl.criteria import factory, memory
from affscl.criteria.contrast import BALANCES, _BalancedL1
from affscl.criteria.factory import CRITERIA, make_criterion
from affscl.data.datasets import Sample
from affscl.model import network as networks
from affscl.model import team as teams
from affscl.model.backbones import BACKBONES as DIMS
from affscl.model.extraction import extract
from affscl.model.network import AFF, NetworkOptions
from affscl.model.norms import Groups
from affscl.model.team import kept_network, make_team, trained_parameters, views_wanted
from affscl.training import loop as training
from affscl.training.config import RECIPES
from affscl.training.loop import lasting_criterion

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = replace(RECIPES["tiny"], weights=None, p=4, k=2)
CROPS, CLUSTERS = 24, 6
LABELS = np.arange(CROPS) % CLUSTERS
CAMERAS = [i % 3 for i in range(CROPS)]
SAMPLES = [Sample(f"{i}.jpg", pid=int(pid), camid=camid) for i, (pid, camid) in enumerate(zip(LABELS, CAMERAS))]
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Kept(TorchDispatchMode):
    """Keeps the answers to questions whose answer, or its shape, depends on numbers."""

    def __init__(self):
        super().__init__()
        self.answers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if asks(func, args):
            self.answers.append((func, result))
        return result


class Told(TorchDispatchMode):
    """Answers the same questions, asked of tensors without numbers, with what was kept."""

    def __init__(self, answers):
        super().__init__()
        self.answers = list(answers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not asks(func, args):
            return func(*args, **(kwargs or {}))
        kept, answer = self.answers.pop(0)
        assert kept == func, f"the real run asked {kept}, this one {func}"
        if not isinstance(answer, torch.Tensor):
            return answer
        own, *others = devices(args)
        assert set(others) <= {own}, f"{func} of tensors on {own} and {others}"
        return torch.empty(answer.shape, dtype=answer.dtype, device=own)


def asks(func, args):
    """Does the answer, or its shape, depend on numbers?"""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def devices(args):
    """Devices of all tensors among the arguments, those in lists too."""
    flat = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return [item.device for item in flat if isinstance(item, torch.Tensor)]


def divided(groups, domain, count):
    """The answer of `Groups.divide`, which reads numbers of a tensor that is on the CPU in each run."""
    if isinstance(domain, int):
        return [(domain, count)]
    assert domain.device.type == "cpu" and domain.shape == (count,)
    return [(number, count // groups.domains) for number in range(groups.domains)]


@contextmanager
def pretended_cuda(patch):
    """Inside, tensors may be on a device `cuda` without numbers, and autocast believes in it."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **named: True)
    patch.setattr(Groups, "divide", divided)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        yield fake


def moved(module, fake):
    """What `module.to("cuda")` does: parameters and buffers move, and any other tensor stays where it is."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                new = fake.from_tensor(value.detach()).to(CUDA)
                part._parameters[name] = nn.Parameter(new, requires_grad=value.requires_grad)
        part._buffers.update({n: fake.from_tensor(v).to(CUDA) for n, v in part._buffers.items() if v is not None})
    return module


def network(config, domains=1, **own):
    """A network of a run, as it is made on the CPU; all but the backbone is its own."""
    options = {field.name: getattr(config, field.name) for field in fields(NetworkOptions)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "make_backbone", little_backbone)
        return AFF(domains=domains, camids=sorted(set(CAMERAS)), **options | own)


def little_backbone(name, last_stride):
    """One convolution and a BatchNorm instead of ten layers: the fake step is made of Python, and slow."""
    return nn.Sequential(nn.Conv2d(3, DIMS[name], 3, 16), nn.BatchNorm2d(DIMS[name]))


class Pretended:
    """What an epoch needs of an accelerator: one process, a device, and gradients for all who want some."""

    num_processes, device, is_main_process = 1, CUDA, True

    def __init__(self, *modules):
        self.modules = modules

    def backward(self, loss):
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        for parameter in (parameter for module in self.modules for parameter in module.parameters()):
            parameter.grad = torch.empty_like(parameter)


def epoch(config, patch, between=lambda criterion: None):
    """`train_epoch` with one batch on the pretended device; gives the network, the criterion and the optimizer."""
    domains = 2 if config.source else 1
    torch.manual_seed(0)
    model, made = make_team(config, partial(network, config, domains), weights=[]), []
    experts = [student.dim for student in model.students] if config.experts else [DIMS[config.backbone]]
    features = F.normalize(torch.randn(CROPS, sum(experts)))
    with Kept() as kept:
        make_criterion(config, features, LABELS, CAMERAS)

    def criterion_on_cuda(*arguments):
        with Told(kept.answers):
            made.append(make_criterion(*arguments))
        return made[-1]

    def batches(job, config, epoch, labels, rng, outliers=False):
        between(job.criterion or made[-1])
        targets, indices = torch.empty(8, dtype=torch.int64, device=CUDA), torch.arange(8, device=CUDA)
        views = [views_wanted(config)] * (views_wanted(config) > 1)
        images = torch.empty(8, *views, 3, config.height, config.width, device=CUDA)
        yield (images, torch.arange(8) // (8 // domains), torch.tensor(CAMERAS[:8])), (targets, indices)

    patch.setattr(training, "epoch_features", lambda job, config, last: torch.empty_like(features))
    patch.setattr(training.Watch, "check", lambda self: None)  # these two read numbers, on purpose: test_loop.py
    patch.setattr(training, "require_numbers", lambda what, tensors: None)
    patch.setattr(training, "make_criterion", criterion_on_cuda)
    patch.setattr(training, "epoch_batches", batches)
    patch.setattr(
        training, "mean_losses", lambda job, config, sums: {"devices": {s.device.type for s in sums.values()}}
    )
    lasting = lasting_criterion(config, SAMPLES, features.shape[1], CPU)
    with pretended_cuda(patch) as fake:
        model, lasting = moved(model, fake), lasting and moved(lasting, fake)
        modules = [module for module in (model, lasting) if module is not None]
        optimizer = torch.optim.Adam(trained_parameters(model), lr=config.lr, weight_decay=config.weight_decay)
        if lasting:
            optimizer.add_param_group({"params": list(lasting.parameters())})
        half = TYPES[config.precision]
        cast = torch.autocast("cuda", dtype=half, enabled=half is not None)
        job = SimpleNamespace(
            accelerator=Pretended(*modules),
            model=Wrapped(model, cast),
            network=kept_network(model),
            trained=model,
            optimizer=optimizer,
            criterion=lasting,
            train=SimpleNamespace(samples=SAMPLES),
            query=SAMPLES,
            labeller=lambda features, epoch: LABELS,
            labels={},
        )
        assert training.train_epoch(job, config, 1)["devices"] == {"cuda"}
    return model, lasting or made[-1], optimizer


class Wrapped(nn.Module):
    """The network as accelerate wraps it: under autocast."""

    def __init__(self, network, cast):
        super().__init__()
        self.network, self.cast = network, cast

    def forward(self, *inputs):
        with self.cast:
            return self.network(*inputs)


VARIANTS = [dict(criterion=name) for name in CRITERIA if name != "cluster_contrast"]
VARIANTS += [dict(balance=kind) for kind in BALANCES]
VARIANTS += [dict(hard_reference="hard"), dict(hard_start="hardest"), dict(normalise_mean=True)]
VARIANTS += [dict(negatives="camera"), dict(criterion="cluster_contrast_hard", negatives="camera")]
VARIANTS += [dict(camera_norm=True), dict(bn_chunk=4), dict(layout="table8"), dict(pooling="gem"), dict(parts="none")]
VARIANTS += [dict(swapped=True, fusion="residual")]
REGIMES = {
    "without labels": {},
    "with a source": dict(source="synthetic"),
    "with labels": dict(labels="truth", criterion="cross_entropy_triplet", centre_weight=0.01, warmup=2),
    "cameras known": dict(negatives="camera", camera_norm=True),
}


def all_on_cuda(model, criterion, optimizer):
    """Every tensor that lives as long as the epoch; Adam counts its steps on the CPU unless told otherwise."""
    for module in (*model.modules(), *criterion.modules()):
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cuda", f"{type(module).__name__}.{name} is on {value.device}"
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert moments and {value.device.type for value in moments} == {"cuda"}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_epoch_of_every_kind_mixes_no_devices(monkeypatch, variant):
    all_on_cuda(*epoch(replace(TINY, **variant), monkeypatch))


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_an_epoch_of_every_regime_in_every_precision(monkeypatch, regime, precision):
    all_on_cuda(*epoch(replace(TINY, precision=precision, **REGIMES[regime]), monkeypatch))


@pytest.mark.parametrize("criterion", ["cluster_contrast", "spcl", "dsce", "ae"])
def test_an_update_in_turn_asks_its_one_question_and_mixes_nothing(monkeypatch, criterion):
    """How often the busiest row comes is a question to the device (chapter 30); here the answer is 3."""
    monkeypatch.setattr(memory, "int", lambda busiest: 3, raising=False)
    all_on_cuda(*epoch(replace(TINY, criterion=criterion), monkeypatch))


@pytest.mark.parametrize("kind", ["mean", "mutual", "brainstorming"])
def test_an_epoch_of_every_team_asks_one_number_and_mixes_nothing(monkeypatch, kind):
    """How many steps the teachers have followed (chapter 18) is a number of the device; here the answer is 1."""
    monkeypatch.setattr(teams, "int", lambda steps: 1, raising=False)
    experts = ("resnet18", "resnet10") if kind == "brainstorming" else ()
    criterion = "symmetric" if kind == "mean" else "cross_entropy_triplet"
    all_on_cuda(*epoch(replace(TINY, teacher=kind, criterion=criterion, experts=experts), monkeypatch))


def lose(what):
    """A fault: when the batch comes, a part of the criterion is on the CPU."""

    def fault(criterion):
        owner, name = criterion, what
        while "." in name:
            first, name = name.split(".", 1)
            owner = getattr(owner, first)
        setattr(owner, name, torch.empty_like(getattr(owner, name), device="cpu"))

    return fault


@pytest.mark.parametrize(
    "what, variant",
    [
        ("memory.mean", {}),
        ("memory.hard", {}),
        ("memory.bank", dict(criterion="cluster_contrast_hard")),
        ("cameras", dict(negatives="camera")),
        ("centre.centres", REGIMES["with labels"]),
    ],
)
def test_a_part_on_the_cpu_is_refused(monkeypatch, what, variant):
    with pytest.raises((RuntimeError, AssertionError), match="device|cpu"):
        epoch(replace(TINY, **variant), monkeypatch, lose(what))


def test_a_table_made_on_the_cpu_is_refused(monkeypatch):
    """The fault that a forgotten `device` would be: the criterion's cameras stay where they were read."""
    made = factory.cameras_of
    monkeypatch.setattr(factory, "cameras_of", lambda labels, camids, device: made(labels, camids, None))
    with pytest.raises((RuntimeError, AssertionError), match="device|cpu"):
        all_on_cuda(*epoch(replace(TINY, negatives="camera"), monkeypatch))


def test_the_backward_pass_that_is_ours_stays_on_the_device(monkeypatch):
    with pretended_cuda(monkeypatch):
        x = torch.empty(5, 3, device=CUDA)
        context = SimpleNamespace(saved_tensors=(x,), alpha=0.9, gamma=1.5, b=4.3)
        grad, *none = _BalancedL1.backward(context, torch.empty_like(x))
        assert grad.device.type == "cuda" and none == [None, None]


@pytest.mark.parametrize("options", [{}, dict(mirror=True, camera_norm=True), dict(bn_chunk=4)], ids=str)
@pytest.mark.parametrize("domains", [1, 2])
def test_features_come_back_to_the_cpu(monkeypatch, options, domains):
    config = replace(TINY, **options)
    model = network(config, domains)
    with pretended_cuda(monkeypatch) as fake:
        images = torch.empty(10, 3, config.height, config.width, dtype=torch.uint8)
        cameras = torch.tensor(CAMERAS[:10]) if config.camera_norm else None
        rows = extract(moved(model, fake), images, batch_size=4, camids=cameras)
        assert rows.device.type == "cpu" and rows.shape == (10, 256) and rows.dtype == torch.float32
