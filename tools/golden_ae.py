"""Write tests/golden/ae.npz: what AE's code says of random features and a memory of crops.

python tools/golden_ae.py AE, a clone of
github.com/dyh127/Adaptive-Exploration-for-Unsupervised-Person-Re-Identification (read at commit a22657a). Its memory is
an autograd function of an old style, which torch no longer calls; the backward pass that moves the rows runs by itself.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

TAU, MOMENTUM, CASES = 0.05, 0.4, {"published": (0.55, 3.5), "others": (0.3, 2.0)}


def main(ae):
    torch.manual_seed(5)
    theirs: dict = {}
    exec(compile(Path(f"{ae}/reid/nonparametric_classifier.py").read_text(), "AE", "exec"), theirs)  # noqa: S102
    n, d, b = 90, 24, 16
    people = F.normalize(torch.randn(12, d))[torch.arange(n) % 12]
    found = {"bank": F.normalize(people + 0.18 * torch.randn(n, d))}
    for name, (threshold, delta) in CASES.items():
        judge = theirs["nonparametric_classifier"](d, n, TAU, threshold, delta)
        em, steps = found["bank"].clone(), []
        for _ in range(4):
            indices = torch.randint(0, n, (b,))  # some twice
            q = F.normalize(em[indices] + 0.15 * torch.randn(b, d))
            outputs = (q @ em.T).requires_grad_()
            loss, counts = judge.target_loss(outputs / TAU, indices)
            (slope,) = torch.autograd.grad(loss, outputs)
            memory = SimpleNamespace(saved_tensors=(q, indices), needs_input_grad=[True], em=em, mu=MOMENTUM)
            grad, _ = theirs["ExemplarMemory"].backward(memory, slope)
            values = dict(queries=q, indices=indices, loss=loss.detach(), counts=counts, grad=grad, rows=em)
            steps.append({key: value.clone() for key, value in values.items()})
        found |= {f"{name}_{key}": torch.stack([step[key] for step in steps]) for key in steps[0]}
    target = Path(__file__).resolve().parent.parent / "tests" / "golden" / "ae.npz"
    arrays: dict[str, Any] = {name: value.numpy() for name, value in found.items()}
    np.savez_compressed(target, **arrays)
    print({name: value.shape for name, value in found.items()})
    print({name: (found[f"{name}_counts"].min(), found[f"{name}_counts"].max()) for name in CASES})


if __name__ == "__main__":
    main(*sys.argv[1:])
