"""Networks small enough for tests, crops for them, and a run's folder."""

import json
from dataclasses import asdict

import torch
from safetensors.torch import save_file

from affscl.model.network import AFF

SMALL = dict(backbone="resnet10", height=64, width=32)


def small(**options):
    torch.manual_seed(0)
    return AFF(**SMALL | options)


def images(n=6, height=64, width=32, seed=0):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def write_run(run, model):
    run.mkdir()
    (run / "config.json").write_text(json.dumps(asdict(model.options) | {"epochs": 3}))
    save_file(model.state_dict(), run / "model.safetensors")
