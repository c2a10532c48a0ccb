"""Write tests/golden/several.npz: what MMCL's code says of random features, `python tools/golden_several.py FOLDER`.

FOLDER holds mplp.py and mmcl.py, the labels (MPLP) and the loss (MMCL), as they stand in stored copies of MMCL's code
(published as github.com/kennethwdk/MMCL, which could not be fetched, so that its last commit is not checked). They
run here on the CPU, on random inputs; only numbers are kept.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def defined(path):
    """What a file defines, on the CPU."""
    space = {}
    exec(compile(Path(path).read_text().replace(".cuda()", ""), path, "exec"), space)
    return space


def main(folder):
    torch.manual_seed(5)
    torch.cuda.is_available = lambda: False
    n, d, b = 150, 24, 20
    people = F.normalize(torch.randn(12, d))[torch.arange(n) % 12]
    bank = F.normalize(people + 0.16 * torch.randn(n, d))
    indices = torch.randperm(n)[:b]
    queries = F.normalize(bank[indices] + 0.1 * torch.randn(b, d)).requires_grad_()
    found = {"bank": bank.numpy(), "indices": indices.numpy(), "queries": queries.detach().numpy()}
    for threshold in (0.2, 0.6, 0.75, 0.95):
        found[f"labels_{threshold}"] = defined(f"{folder}/mplp.py")["MPLP"](threshold).predict(bank, indices).numpy()
    labels = torch.from_numpy(found["labels_0.6"])
    for r in (0.01, 0.1):
        loss = defined(f"{folder}/mmcl.py")["MMCL"](5.0, r)(queries @ bank.T, labels, is_vec=True)
        found[f"loss_{r}"] = loss.detach().numpy()
        found[f"grad_{r}"] = torch.autograd.grad(loss, queries)[0].numpy()
    np.savez_compressed(Path(__file__).resolve().parent.parent / "tests" / "golden" / "several.npz", **found)
    print({name: value.shape for name, value in found.items()}, [labels.sum(1).min(), labels.sum(1).max()])


if __name__ == "__main__":
    main(sys.argv[1])
