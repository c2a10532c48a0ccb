"""MMT's published losses on random numbers, kept in tests/golden/mutual.npz.

    git clone https://github.com/yxgeee/MMT && python tools/golden_mutual.py MMT

Runs the authors' own code, of which nothing is kept here but the numbers. Two things are adapted in memory: `.cuda()`,
and a call of `addmm_` in an order of arguments that PyTorch no longer takes.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch


def published(path: Path) -> types.ModuleType:
    """A module of the clone, for the CPU and PyTorch of today."""
    source = path.read_text().replace(".cuda()", "")
    source = source.replace("dist.addmm_(1, -2, x, y.t())", "dist.addmm_(x, y.t(), beta=1, alpha=-2)")
    module = types.ModuleType(path.stem)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


entropy, triplet = (published(Path(sys.argv[1], "mmt", "loss", name)) for name in ("crossentropy.py", "triplet.py"))
torch.manual_seed(20260)
targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
count, d, classes = len(targets), 16, 5
pooled, neck = (torch.randn(count, 4, d, dtype=torch.float64).requires_grad_() for _ in range(2))
rows, means = (torch.randn(2, classes, d, dtype=torch.float64).requires_grad_() for _ in range(2))
features = pooled.unbind(1)
logits = [neck[:, i] @ table.T for i, table in enumerate((*rows, *means))]
hard, soft = entropy.CrossEntropyLabelSmooth(classes), entropy.SoftEntropy()
triplets, soft_triplets = triplet.SoftTripletLoss(margin=0.0), triplet.SoftTripletLoss(margin=None)
parts = {
    "cross_entropy": hard(logits[0], targets) + hard(logits[1], targets),
    "triplet": sum(triplets(features[i], features[i], targets) for i in (0, 1)),
    "soft_entropy": soft(logits[0], logits[3]) + soft(logits[1], logits[2]),
    "soft_triplet": sum(soft_triplets(features[i], features[3 - i], targets) for i in (0, 1)),
}
loss = 0.5 * parts["cross_entropy"] + 0.2 * parts["triplet"] + 0.5 * parts["soft_entropy"] + 0.8 * parts["soft_triplet"]
loss.backward()
np.savez_compressed(
    Path(__file__).parent.parent / "tests" / "golden" / "mutual.npz",
    **{name: part.item() for name, part in parts.items()},
    **{name: value.detach() for name, value in dict(pooled=pooled, neck=neck, rows=rows, means=means).items()},
    **{f"{name}_grad": value.grad for name, value in dict(pooled=pooled, neck=neck, rows=rows).items()},
    targets=targets,
    loss=loss.item(),
)
