"""Values of tests/golden/field.npz, from their authors' code: `python tools/golden_field.py FOLDER`.

FOLDER holds clones of github.com/yxgeee/SpCL (01a486e), Terminator8758/CAP-master (4a04fef), Terminator8758/O2CAP
(a893b7a), htyao89/Dual-Cluster-Contrastive (d3b3642) and FlyingRoastDuck/MetaCam_DSCE (922bcb1). Their loss modules
run here on random inputs, on the CPU; the clustering's choice of SpCL and the loss of DCC are lines of a script, and
are run out of it. Only numbers are kept.
"""

import collections
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from affscl.labels.clustering import labels_within

N, D, B, STEPS, CAMERAS = 60, 24, 16, 5, 4
OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "field.npz"
# Their code wants a GPU, and an older torch.
REWRITE = {
    ".cuda()": "",
    "device('cuda')": "device('cpu')",
    "device='cuda'": "device='cpu'",
    "torch.autograd.set_detect_anomaly(True)": "",
    "loss_ccc+loss_icc+*loss_con": "loss_ccc+loss_icc+self.weight*loss_con",
}


def rewritten(path):
    """The source of a file, to be run here."""
    text = path.read_text()
    for old, new in REWRITE.items():
        text = text.replace(old, new)
    return text


def names_of(text):
    """What a module's source defines."""
    space = {"__name__": "theirs", "collections": collections, "torch": torch, "F": F, "nn": torch.nn}
    exec(compile(text, "theirs", "exec"), space)
    return space


def between(text, first, last):
    """The lines from the one that contains `first` up to the one that contains `last`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i in range(start, len(lines)) if last in lines[i])
    return textwrap.dedent("\n".join(lines[start:end]))


def inputs():
    """Features, labels with outliers, cameras, and batches of queries near their crops."""
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(48) % 8, torch.full((12,), -1)])[torch.randperm(N, generator=g)]
    cameras = torch.randint(0, CAMERAS, (N,), generator=g)
    features = F.normalize(torch.randn(N, D, generator=g), dim=1)
    indices = torch.randint(0, N, (STEPS, B), generator=g)
    indices[:, 1] = indices[:, 0]  # a crop twice
    queries = F.normalize(features[indices] + 0.15 * torch.randn(STEPS, B, D, generator=g), dim=2)
    inside = (labels >= 0).nonzero().squeeze(1)
    clustered = inside[torch.randint(0, len(inside), (STEPS, B), generator=g)]
    clustered[:, 1] = clustered[:, 0]
    near = F.normalize(features[clustered] + 0.15 * torch.randn(STEPS, B, D, generator=g), dim=2)
    found = dict(features=features, labels=labels, cameras=cameras, indices=indices, queries=queries)
    return found | dict(clustered=clustered, clustered_queries=near)


def trace(loss_of, table, queries, indices):
    """Losses, gradients and the table after each step; `loss_of(q, i)` moves the table in its backward pass."""
    losses, grads, tables = [], [], []
    for q, i in zip(queries, indices):
        q = q.clone().requires_grad_()
        loss = loss_of(q, i)
        loss.sum().backward()
        losses.append(loss.detach().reshape(()))
        grads.append(q.grad)
        tables.append(table().clone())
    return {"loss": torch.stack(losses), "grad": torch.stack(grads), "rows": torch.stack(tables)}


def hybrid(folder, data):
    """SpCL's memory, with each outlier a class of its own, and DSCE's, without outliers."""
    own = data["labels"].clone()
    own[own < 0] = int(own.max()) + 1 + torch.arange(int((own < 0).sum()))
    theirs = names_of(rewritten(folder / "SpCL/spcl/models/hm.py"))["HybridMemory"](D, N, temp=0.05, momentum=0.2)
    theirs.features, theirs.labels = data["features"].clone(), own
    steps = trace(theirs, lambda: theirs.features, data["queries"], data["indices"])
    found = {f"spcl_{key}": value for key, value in steps.items()}
    theirs = names_of(rewritten(folder / "MetaCam_DSCE/reid/models/em.py"))["Memory"](D, N, temp=0.05, momentum=0.2)
    theirs.features, theirs.labels = data["features"].clone(), data["labels"]
    for name, symmetric in ("plain", False), ("dsce", True):
        theirs.features = data["features"].clone()

        def loss_of(q, i, symmetric=symmetric):
            return theirs(q, i, symmetric=symmetric)

        rows = []
        for q, i in zip(data["clustered_queries"], data["clustered"]):
            rows.append(trace(loss_of, lambda: theirs.features, q[None], i[None]))
            theirs.updateEM(q, i)  # apart from the backward pass
            rows[-1]["rows"] = theirs.features.clone()[None]
        found |= {f"{name}_{key}": torch.cat([row[key] for row in rows]) for key in rows[0]}
    return found


def self_paced(folder):
    """What SpCL keeps of some clusters in two epochs, the second with the first one's threshold."""
    text = rewritten(folder / "SpCL/examples/spcl_train_usl.py")
    text = between(text, "# generate new dataset and calculate", "# statistics of clusters")
    g, found, space = torch.Generator().manual_seed(1), {}, {"collections": collections, "np": np, "torch": torch}
    for epoch in range(2):
        pids = torch.arange(30).repeat_interleave(8)
        x = F.normalize(torch.randn(30, 32, generator=g)[pids] + 1.05 * torch.randn(240, 32, generator=g), dim=1)
        loose, labels, tight = labels_within((0.58, 0.5, 0.42), x, 4, 12, 4)
        given = {"pseudo_labels": labels, "pseudo_labels_tight": tight, "pseudo_labels_loose": loose}
        counts = {f"num_ids{key[13:]}": int(value.max()) + 1 for key, value in given.items()}
        train = [(f"{i:05}.jpg", 0, 0) for i in range(240)]
        space |= given | counts | {"dataset": type("Data", (), {"train": train}), "epoch": epoch}
        exec(compile(text, "theirs", "exec"), space)
        kept = space["pseudo_labels"].numpy()
        sizes = np.bincount(kept)
        found |= {f"paced_labels_{epoch}": labels, f"paced_loose_{epoch}": loose, f"paced_tight_{epoch}": tight}
        found[f"paced_kept_{epoch}"] = np.where(sizes[kept] > 1, kept, -1)
        found[f"paced_threshold_{epoch}"] = 1 - space["indep_thres"]
    return found


def proxies(folder, data):
    """CAP's memory of proxies, within and across cameras, and O2CAP's, offline and online."""
    labels, cams, found = data["labels"], data["cameras"], {}
    online = names_of(rewritten(folder / "O2CAP/reid/models/o2cap.py"))
    space = names_of(rewritten(folder / "CAP-master/reid/loss/CamAwareMemory.py"))
    # CAP's autograd function is written for an older torch; O2CAP's does the same.
    space["ExemplarMemory"] = lambda table, alpha: (
        lambda x, y: online["ExemplarMemory"].apply(x, y, table, torch.tensor(alpha))
    )
    pairs = sorted({(int(c), int(y)) for c, y in zip(cams, labels) if y >= 0})  # by camera, as CAP has them
    starts = F.normalize(torch.stack([data["features"][(cams == c) & (labels == y)].mean(0) for c, y in pairs]), dim=1)
    found["proxy_camera"], found["proxy_cluster"] = torch.tensor(pairs).T
    for name, first in ("cap", 0), ("cap_within", 9):
        theirs = space["CAPMemory"](beta=0.07, alpha=0.2, all_img_cams=cams.tolist(), crosscam_epoch=first, bg_knn=5)
        tables = [starts[[c == camera for c, _ in pairs]].clone() for camera in range(CAMERAS)]
        turn = iter(range(STEPS))

        def loss_of(q, i, theirs=theirs, tables=tables, turn=turn):
            return theirs(q, i, cams[i], 5, labels, next(turn), tables)

        steps = trace(
            loss_of, lambda m=theirs: torch.cat(m.percam_memory), data["clustered_queries"], data["clustered"]
        )
        found |= {f"{name}_{key}": value for key, value in steps.items()}
    proxy = torch.tensor([pairs.index((int(c), int(y))) if y >= 0 else -1 for c, y in zip(cams, labels)])
    for name, parts in ("offline", (True, False)), ("online", (False, True)), ("o2cap", (True, True)):
        theirs = online["CameraAwareMemory"](0.07, 0.2, cams, False, *parts, bg_knn=5)
        theirs.all_pseudo_label, theirs.all_proxy_label, theirs.global_memory = labels, proxy, starts.clone()
        theirs.proxy_label_dict = {y: proxy[labels == y].unique() for y in range(int(labels.max()) + 1)}
        theirs.proxy_cam_dict = {c: proxy[(cams == c) & (labels >= 0)].unique() for c in range(CAMERAS)}

        def loss_of(q, i, theirs=theirs):
            return theirs(q, i, cams[i], 0)

        steps = trace(loss_of, lambda m=theirs: m.global_memory, data["clustered_queries"], data["clustered"])
        found |= {f"{name}_{key}": value for key, value in steps.items()}
    return found


def dual(folder, data):
    """DCC's two memories, from the lines of its script."""
    text = rewritten(folder / "Dual-Cluster-Contrastive/examples/main_unsupervised.py")
    space = names_of(
        between(text, "class DCC(autograd.Function)", "def main():").replace("autograd.", "torch.autograd.")
    )
    labels = data["labels"]
    starts = F.normalize(
        torch.stack([data["features"][labels == y].mean(0) for y in range(int(labels.max()) + 1)]), dim=1
    )
    theirs = space["DCCLoss"](D, len(starts), weight=0.5, momentum=0.1, init_feat=starts)
    steps = trace(
        lambda q, i: theirs(q, labels[i]),
        lambda: torch.stack([theirs.lut_ccc, theirs.lut_icc]),
        data["clustered_queries"],
        data["clustered"],
    )
    return {f"dcc_{key}": value for key, value in steps.items()}


if __name__ == "__main__":
    folder, data = Path(sys.argv[1]), inputs()
    values = data | hybrid(folder, data) | self_paced(folder) | proxies(folder, data) | dual(folder, data)
    np.savez_compressed(OUT, **{name: np.asarray(value) for name, value in values.items()})
    print(f"{OUT}: {', '.join(values)}")
