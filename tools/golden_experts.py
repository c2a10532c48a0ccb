"""MEB-Net's published training step and authorities on random numbers, kept in tests/golden/experts.npz.

    git clone https://github.com/YunpengZhai/MEB-Net && git -C MEB-Net checkout 0ef87a2
    python tools/golden_experts.py MEB-Net

Runs the authors' own code, of which nothing is kept here but the numbers: one step of their trainer, with networks that
answer with random features, and their scatter. Adapted in memory: `.cuda()`, imports from their package, and a call of
`addmm_` in an order of arguments that PyTorch no longer takes.
"""

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

OUT = Path(__file__).parent.parent / "tests" / "golden" / "experts.npz"


class Meter:
    """Keeps the last number that it was told."""

    made: list = []

    def __init__(self):
        self.val = self.avg = 0.0
        self.made.append(self)

    def update(self, value, n=1):
        self.val = self.avg = float(value)


class Network(torch.nn.Module):
    """Answers with random features and logits, as theirs in training."""

    def __init__(self, pooled, neck, rows):
        super().__init__()
        self.answer = pooled, neck @ rows.T

    def forward(self, images):
        return self.answer


def published(path, **known):
    """A module of the clone, for the CPU and PyTorch of today."""
    source = re.sub(r"from \..*", "", path.read_text()).replace(".cuda()", "")
    source = source.replace("dist.addmm_(1, -2, x, y.t())", "dist.addmm_(x, y.t(), beta=1, alpha=-2)")
    module = types.ModuleType(path.stem)
    vars(module).update(known)
    exec(compile(source, str(path), "exec"), vars(module))
    return vars(module)


def main(clone):
    code = Path(clone, "mebnet")
    losses = {k: v for name in ("crossentropy", "triplet") for k, v in published(code / "loss" / f"{name}.py").items()}
    known = {
        name: losses[name] for name in ("TripletLoss", "CrossEntropyLabelSmooth", "SoftTripletLoss", "SoftEntropy")
    }
    accuracy = {"AverageMeter": Meter, "accuracy": lambda *_: [torch.zeros(1)]}
    trainer = published(code / "trainers.py", **known, **accuracy)["MEBTrainer"]
    scatter = published(code / "utils" / "scatter.py")["J_scatter"]

    torch.manual_seed(20262)
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
    widths, count, classes = (16, 10, 12), len(targets), 5
    found: dict[str, Any] = {"targets": targets}
    for i, d in enumerate(widths):
        for name, rows in (("pooled", count), ("neck", count), ("rows", classes)):
            found[f"{name}{i}"] = torch.randn(rows, d, dtype=torch.float64).requires_grad_()
            found[f"taught_{name}{i}"] = torch.randn(rows, d, dtype=torch.float64)
        found[f"features{i}"] = torch.nn.functional.normalize(torch.randn(40, d, dtype=torch.float64) + i)
    labels = np.arange(40) % 7 - 1  # six clusters, and outliers
    scatters = np.array([scatter(found[f"features{i}"].numpy(), labels) for i in range(3)])

    def networks(kind):
        return [Network(*(found[f"{kind}{name}{i}"] for name in ("pooled", "neck", "rows"))) for i in range(3)]

    learner = trainer(networks(""), networks("taught_"), classes, scatter=scatters)
    learner.scatter = learner.scatter.double()
    learner._parse_data = lambda inputs: ([None] * 3, targets)
    stands = types.SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    data = type("Loader", (), {"next": lambda self: None, "__len__": lambda self: 1})()
    Meter.made.clear()
    learner.train(0, data, stands, ce_soft_weight=0.5, tri_soft_weight=0.8, print_freq=9, train_iters=1)
    names = ("cross_entropy", "triplet", "soft_entropy", "soft_triplet")  # in their order, after two clocks
    found |= {name: meter.val for name, meter in zip(names, Meter.made[2:6], strict=True)}
    found |= {"labels": labels, "scatters": scatters, "authority": learner.scatter * 3}
    grads = {f"{name}_grad": x.grad for name, x in found.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    kept: dict[str, Any] = {}
    for name, x in (found | grads).items():
        kept[name] = x.detach().numpy() if isinstance(x, torch.Tensor) else x
    np.savez_compressed(OUT, **kept)
    print({name: kept[name] for name in (*names, "scatters", "authority")})


if __name__ == "__main__":
    main(*sys.argv[1:])
