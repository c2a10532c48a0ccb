"""What each stage costs: the search apart from the rest, and what the step may never do.

No speed is asserted here: `affscl-bench` measures it.
"""

import ast
import contextlib
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from affscl.criteria import memory
from affscl.criteria.factory import CRITERIA, LossOptions, make_criterion
from affscl.labels.clustering import pseudo_labels
from affscl.labels.neighbours import SEARCHES, nearest, nearest_faiss
from affscl.model.network import AFF
from affscl.studies.naive import crowd
from affscl.studies.stages import crops_per_second, make_step, pays_from, timed_labels

ROOT = Path(__file__).resolve().parent.parent


class TestTimedLabels:
    def test_labels_and_seconds(self):
        x, _ = crowd(500, 32)
        timed = timed_labels(x)
        np.testing.assert_array_equal(timed.labels, pseudo_labels(x))
        np.testing.assert_array_equal(timed.lists, nearest(x, 30)[0])
        assert timed.search > 0 and timed.rest > 0

    def test_another_search_is_used_and_nothing_global_changes(self):
        x, _ = crowd(500, 32)
        before = dict(SEARCHES)
        timed = timed_labels(x, nearest_faiss)
        np.testing.assert_array_equal(timed.lists, nearest_faiss(x, 30)[0])
        assert timed.lists.shape == (500, 30) and before == SEARCHES

        def fails(features, k1):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            timed_labels(x, fails)
        assert before == SEARCHES


def test_compiling_pays_where_the_two_lines_cross():
    crops = pays_from(3, 50, 60)
    assert crops / 50 == pytest.approx(3 + crops / 60)
    assert pays_from(3, 50, 50) == pays_from(3, 50, 40) == math.inf


# --- the step never waits ------------------------------------------------------------------------------------------
# On the meta device a tensor has a shape and no numbers: whoever asks for a number, as `.item()`, `if tensor`,
# `int(tensor)` and `.tolist()` do, gets an error, where a GPU would have to finish all its work first.


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def without_numbers(module):
    """The module with all its tensors on the meta device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(value.shape, device="meta"), requires_grad=value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return module


def operations(criterion="symmetric", batch=8, clusters=10, network=None, **options):
    """Operations of forward, criterion, backward and update, by name."""
    model = without_numbers(AFF("resnet10", height=64, width=32, **(network or {})))
    rows = nn.functional.normalize(torch.randn(clusters, model.dim))
    judge = without_numbers(
        make_criterion(LossOptions(criterion=criterion, **options), rows, torch.arange(clusters), [0] * clusters)
    )
    if getattr(judge, "cameras", None) is not None:
        judge.cameras = judge.cameras.to("meta")
    images, targets = torch.empty(batch, 3, 64, 32, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta")
    with Counting() as counting:
        output = model(images)
        sum(judge(output, targets).values()).backward()
        judge.update(output, targets)
    return counting.counts


@pytest.fixture
def meta(monkeypatch):
    """Autocast knows no meta device."""
    monkeypatch.setattr(memory, "_float32", lambda device: contextlib.nullcontext())


VARIANTS = [dict(criterion=name) for name in CRITERIA if name != "cluster_contrast"]
VARIANTS += [dict(balance=kind) for kind in ("both", "features", "memory", "off")] + [
    dict(hard_reference="hard"),
    dict(normalise_mean=True),
    dict(negatives="camera"),
]
VARIANTS += [
    dict(network=dict(layout="table8")),
    dict(network=dict(pooling="gem", fusion="residual")),
    dict(network=dict(swapped=True)),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_step_asks_for_no_number_and_loops_over_nothing(meta, variant):
    few = operations(batch=8, clusters=10, **variant)
    assert operations(batch=64, clusters=10, **variant) == few, "as many operations for 64 crops as for 8"
    assert operations(batch=8, clusters=300, **variant) == few, "and for 300 clusters as for 10"
    assert sum(few.values()) > 200


def test_cluster_contrasts_own_rule_is_the_exception(meta):
    """It takes the instances of a cluster in turn, and so these checks are seen to be able to fail."""
    with pytest.raises(RuntimeError, match="item"):
        operations("cluster_contrast")


@pytest.mark.parametrize(
    "bad, why",
    [
        (lambda x: x * x.sum().item(), "item"),
        (lambda x: x if x.sum() > 0 else -x, None),
        (lambda x: torch.stack([row * 2 for row in x.sum(1).tolist()]), None),
    ],
)
def test_questions_for_numbers_are_noticed(bad, why):
    with pytest.raises((RuntimeError, NotImplementedError), match=why):
        bad(torch.empty(3, 4, device="meta"))


def test_loops_over_samples_are_noticed():
    def count(n):
        with Counting() as counting:
            torch.stack([row * 2 for row in torch.empty(n, 4, device="meta")])
        return counting.counts

    assert count(8) != count(9)


# What may ask for a number: checks of a start, made once an epoch; and those who are no part of the step.
ONCE = {"memory_rows", "check_targets", "blend_in_turn", "cameras_of", "__init__"}
ONCE |= {"make_criterion", "crop_criterion", "piece_criterion"}


@pytest.mark.parametrize(
    "name", ["criteria/contrast", "criteria/classifier", "criteria/factory", "criteria/memory", "model/attention"]
)
def test_no_word_for_it_in_the_source(name):
    tree = ast.parse((ROOT / "affscl" / f"{name}.py").read_text())
    asking = [
        (function.name, call.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name not in ONCE
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"item", "tolist", "cpu", "numpy"}
    ]
    assert asking == []


def test_make_step_trains():
    torch.manual_seed(0)
    model, order = nn.Linear(4, 1), []
    step = make_step(
        model, lambda m: m(torch.ones(1, 4)).square().sum(), lambda: order.append(model.weight.grad.clone())
    )
    before = model.weight.detach().clone()
    step()
    assert order[0].abs().sum() > 0 and not torch.equal(model.weight, before)


def test_crops_per_second_counts_crops():
    class Store:
        def __len__(self):
            return 100

        def batch(self, indices):
            return torch.zeros(len(indices), 3, 32, 16, dtype=torch.uint8)

    start = time.perf_counter()
    rate = crops_per_second(Store(), 8, 5, 0)
    assert rate >= 40 / (time.perf_counter() - start)
