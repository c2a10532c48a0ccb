"""Write tests/golden/merging.npz: what the authors' code of BUC and DBC says of random clusters.

python tools/golden_merging.py BUC DBC, two clones: github.com/vana77/Bottom-up-Clustering-Person-Re-identification
and github.com/gddingcs/Dispersion-based-Clustering (read at commits a99827e and 63a0c52).
"""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def methods(path, cls, names):
    """Functions of a class, without the imports of its module."""
    tree = ast.parse(Path(path).read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls).body
    space = {"np": np, "torch": torch, "F": F, "copy": __import__("copy")}
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            exec(compile(ast.Module([node], []), path, "exec"), space)  # noqa: S102
    return types.SimpleNamespace(**{name: space[name] for name in names})


def squared(x):
    return (2 - 2 * x @ x.T).clamp(min=0)


def main(buc, dbc):
    np.int = int  # their NumPy had it
    torch.manual_seed(3)
    n, d = 120, 16
    people = F.normalize(torch.randn(15, d))
    x = F.normalize(people[torch.arange(n) % 15] + 0.6 * torch.randn(n, d))
    found = {"features": x.numpy()}
    b = methods(f"{buc}/reid/bottom_up.py", "Bottom_up", ("select_merge_data", "generate_new_train_data"))
    stub = types.SimpleNamespace(u_label=np.zeros(n), u_data=[[0, 0, 0, 0] for _ in range(n)])
    for penalty in (0.0, 0.005, 0.05):
        labels, steps = list(range(n)), []
        for _ in range(5):
            held = {}
            for i, label in enumerate(labels):
                held.setdefault(label, []).append(i)
            i, j = b.select_merge_data(stub, x, labels, held, penalty, squared(x))
            labels = [int(label) for label in b.generate_new_train_data(stub, i, j, labels, 20)[1]]
            steps.append(labels)
        found[f"buc_{penalty:g}"] = np.array(steps)
    names = ("linkage_calculation", "select_merge_data_v2", "generate_new_train_data_v2", "assign_label")
    g = methods(f"{dbc}/reid/bottom_up.py", "Bottom_up", names)
    for penalty in (0.0, 0.1):
        labels, steps, tables = np.arange(n), [], []
        for _ in range(5):
            held = {}
            for i, label in enumerate(labels.tolist()):
                held.setdefault(label, []).append(i)
            order = [i for key in sorted(held) for i in held[key]]
            stub = types.SimpleNamespace(label_to_images=held, u_data=[[0, 0, 0, int(v)] for v in labels])
            stub.assign_label = types.MethodType(g.assign_label, stub)
            _, table = g.linkage_calculation(stub, squared(x[order]), labels[order], penalty)
            tables.append(table.copy())
            i, j = g.select_merge_data_v2(stub, x, labels, table)
            labels = np.array(g.generate_new_train_data_v2(stub, i, j, 20)[1]).astype(int)
            steps.append(labels)
        found[f"dbc_{penalty:g}"] = np.array(steps)
        found[f"dbc_table_{penalty:g}"] = tables[2]
    np.savez_compressed(Path(__file__).resolve().parent.parent / "tests" / "golden" / "merging.npz", **found)
    print({name: value.shape for name, value in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
