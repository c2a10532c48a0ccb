"""Half precision is for the network: it ends where float32 ends; features, clusters, memories, losses are float32."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from affscl.labels import labellers
from affscl.studies.stages import final_row
from affscl.training import loop as training
from affscl.training.config import RECIPES
from affscl.training.loop import train

SETTLED = dict(epochs=6, lr_step=4)  # the last two epochs at a tenth of the learning rate, where runs settle


@pytest.mark.skipif(
    not (torch.ops.mkldnn._is_mkldnn_bf16_supported() or os.environ.get("AFFSCL_LONG")),
    reason="this processor only imitates bf16, some fifteen times as slowly; AFFSCL_LONG=1 runs it all the same",
)
def test_bf16_ends_where_float32_ends():
    rows = {kind: [final_row(kind, seed=seed, **SETTLED) for seed in (1, 2)] for kind in ("no", "bf16")}
    exact, half = (100 * np.mean([row["mAP"] for row in rows[kind]]) for kind in ("no", "bf16"))
    assert abs(exact - half) <= 3, (exact, half)
    assert min(exact, half) > 70, "and both learned: the start is at about 55"
    assert rows["no"][0]["loss"] != rows["bf16"][0]["loss"], "two precisions, not the same run twice"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Types of what passes through one short epoch in bf16."""
    types, patch = {}, pytest.MonkeyPatch()
    labels, judge = labellers.pseudo_labels, training.make_criterion

    def spying_labels(features, *arguments, **named):
        types["clustered features"] = features.dtype
        return labels(features, *arguments, **named)

    def spying_criterion(config, features, *arguments, **named):
        criterion = judge(config, features, *arguments, **named)
        forward, update = criterion.forward, criterion.update

        def spying_forward(*given):
            parts = forward(*given)
            types.update({f"output.{key}": value.dtype for key, value in given[0]._asdict().items()})
            types.update({f"loss {key}": value.dtype for key, value in parts.items()})
            return parts

        def spying_update(*given):
            update(*given)
            types.update({f"memory {key}": value.dtype for key, value in criterion.named_buffers()})

        criterion.forward, criterion.update = spying_forward, spying_update
        return criterion

    patch.setattr(labellers, "pseudo_labels", spying_labels)
    patch.setattr(training, "make_criterion", spying_criterion)
    patch.setattr(torch.nn.Conv2d, "forward", convolution(types, torch.nn.Conv2d.forward))
    config = replace(
        RECIPES["tiny"], precision="bf16", device="cpu", epochs=1, iterations=2, world_ids=24, world_cams=3, p=4
    )
    result = train(config, tmp_path_factory.mktemp("bf16") / "run")
    patch.undo()
    types.update({f"weight {key}": value.dtype for key, value in result.model.named_parameters()})
    return types


def convolution(types, forward):
    """A convolution that notes the type of what it gives while training."""

    def spying(self, x):
        y = forward(self, x)
        if self.training:
            types["convolution"] = y.dtype
        return y

    return spying


def test_the_network_runs_in_bf16(seen):
    assert seen["convolution"] == torch.bfloat16


@pytest.mark.parametrize(
    "what",
    [
        "clustered features",
        "output.unit",
        "output.neck",
        "loss hard",
        "loss mean",
        "loss balance",
        "memory memory.mean",
        "memory memory.hard",
    ],
)
def test_all_that_decides_is_float32(seen, what):
    assert seen[what] == torch.float32


def test_weights_are_float32(seen):
    assert {dtype for key, dtype in seen.items() if key.startswith("weight ")} == {torch.float32}
