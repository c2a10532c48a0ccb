"""Write tests/golden/iics.npz: what IICS's code says of random answers of classifiers.

python tools/golden_iics.py IICS, a clone of github.com/SY-Xuan/IICS (read at commit 46ed4cc).
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch


def functions(path, names):
    """Functions of a module, without its imports."""
    space = {"np": np, "torch": torch, "print": lambda *_: None}
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), path, "exec"), space)  # noqa: S102
    return space


def main(iics):
    torch.manual_seed(5)
    theirs = functions(f"{iics}/reid/cluster_utils/cluster.py", ("to_numpy", "jaccard_sim_cross_cam"))
    answers = torch.cat([(3 * torch.randn(60, k)).softmax(1) for k in (7, 4, 9)], 1)  # three cameras' classifiers
    found = {"answers": answers.numpy(), "agreement": theirs["jaccard_sim_cross_cam"](answers)}
    np.savez_compressed(Path(__file__).resolve().parent.parent / "tests" / "golden" / "iics.npz", **found)
    print({name: value.shape for name, value in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
