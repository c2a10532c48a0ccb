"""Write tests/golden/ssg.npz: SSG's triplets of random pieces.

python tools/golden_ssg.py SSG, a clone of github.com/SHI-Labs/Self-Similarity-Grouping (read at 82114a6). Its loss
is the batch-hard one of its paper (`use_semi=False`); its own runs take the other branch. Each piece has labels of its
own, and the losses are added up as its `FinedTrainer2` does, but for the second feature of the whole body.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(ssg):
    torch.manual_seed(5)
    theirs: dict = {}
    text = Path(f"{ssg}/reid/loss/triplet.py").read_text()
    text = text.replace("dist.addmm_(1, -2, inputs, inputs.t())", "dist.addmm_(inputs, inputs.t(), beta=1, alpha=-2)")
    exec(compile(text, "SSG", "exec"), theirs)  # noqa: S102
    b, d, pieces = 32, 16, 3
    found: dict[str, Any] = {"features": torch.randn(b, pieces * d), "labels": torch.arange(b)[:, None] // 4 % 8}
    found["labels"] = torch.cat([found["labels"], torch.randint(0, 6, (b, 2))], 1)
    for margin in (0.3, 0.5, 4.0):
        features = found["features"].clone().requires_grad_()
        judge = theirs["TripletLoss"](margin, 4, use_semi=False)
        loss = sum(judge(p, y, 0)[0] for p, y in zip(features.chunk(pieces, 1), found["labels"].T))
        found[f"loss_{margin}"], found[f"grad_{margin}"] = loss, torch.autograd.grad(loss, features)[0]
    target = Path(__file__).resolve().parent.parent / "tests" / "golden" / "ssg.npz"
    np.savez_compressed(target, **{name: value.detach().numpy() for name, value in found.items()})
    print({name: value.shape for name, value in found.items()}, [found[f"loss_{m}"].item() for m in (0.3, 0.5, 4.0)])


if __name__ == "__main__":
    main(*sys.argv[1:])
