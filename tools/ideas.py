"""Ideas for finding people across cameras, a run each: options, other criteria, and changes that exist only here.

    python tools/ideas.py --data CUHK03 --weights mobilenet_v2_imagenet.pth --out nbs/results/cuhk03

Writes `ideas.csv` to --out, a line a finished run; what is in it is not run again. Each idea changes the
setting "best, both" of the study `cameras`, seed 1. Some know the truth, to say what better labels could bring.
"""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from affscl.data.datasets import Sample
from affscl.labels import labellers, links
from affscl.labels.clustering import pseudo_labels
from affscl.labels.links import mutual_pairs, nearness
from affscl.model.network import AFF
from affscl.studies.catalogue import STUDIES, loss_fields
from affscl.studies.sweeps import Run, add_result, finish_run, read_results, result_of
from affscl.training.config import RECIPES
from affscl.training.loading import load_data

Change = Callable[[Sequence[Sample]], contextlib.AbstractContextManager]


def numbers(samples: Sequence[Sample], name: str) -> np.ndarray:
    """The pids or camids of crops, numbered from 0."""
    return np.unique([getattr(sample, name) for sample in samples], return_inverse=True)[1]


def true_links(samples):
    """Clusters are joined if most of their crops show one person."""
    pids = numbers(samples, "pid")

    def link(features, labels, camids, *_):
        labels, first = np.asarray(labels), {}
        people = [np.bincount(pids[labels == c]).argmax() for c in range(labels.max() + 1)]
        group = np.array([first.setdefault(person, c) for c, person in enumerate(people)])
        return np.where(labels < 0, -1, np.unique(group, return_inverse=True)[1][labels])

    return patch.object(labellers, "link_cameras", link)


def true_in_camera(samples):
    """The true people of each camera apart; links as they are."""
    parts = np.stack([numbers(samples, "pid"), numbers(samples, "camid")])
    truth = np.unique(parts, axis=1, return_inverse=True)[1].ravel()
    return patch.object(labellers, "pseudo_labels", lambda *_: truth.copy())


def clusters_in_camera(samples):
    """Crops of each camera are clustered apart; only links join cameras."""
    camids = numbers(samples, "camid")

    def apart(features, *settings):
        labels = np.full(len(features), -1)
        for camera in np.unique(camids):
            rows = np.flatnonzero(camids == camera)
            own = pseudo_labels(features[torch.from_numpy(rows)], *settings)
            labels[rows] = np.where(own < 0, -1, own + labels.max() + 1)
        return labels

    return patch.object(labellers, "pseudo_labels", apart)


def agreeing_links(samples):
    """A link must be found in each half of the numbers of a feature, too; the halves are drawn at random."""

    def pairs(x, y, k=10, more=0):
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        rows, cols, s = mutual_pairs(x, y, k)
        halves = [mutual_pairs(F.normalize(x[:, half]), F.normalize(y[:, half]), k) for half in order.chunk(2)]
        found = [set(zip(a, b)) for a, b, _ in halves]
        keep = [i for i, pair in enumerate(zip(rows, cols)) if all(pair in pairs for pairs in found)]
        return rows[keep], cols[keep], s[keep]

    return patch.object(links, "mutual_pairs", pairs)


def links_by_margin(share):
    """Links in the order of how far the second candidate of either side lies behind; the best `share` of them."""

    def pairs(x, y, k=10, more=0):
        s = nearness(x, y, k)
        rows, cols, best = (torch.as_tensor(part) for part in mutual_pairs(x, y, k))
        second = torch.maximum(s[rows].topk(2, 1).values[:, 1], s.T[cols].topk(2, 1).values[:, 1])
        order = (best - second).argsort(descending=True)[: int(np.ceil(share * len(best)))]
        return rows[order].numpy(), cols[order].numpy(), (best - second)[order].numpy()

    return lambda samples: patch.object(links, "mutual_pairs", pairs)


def altered_images(alter):
    """Training crops are altered before the network sees them."""
    plain = AFF.forward

    def forward(self, images, domain=0, camids=None):
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                images = alter(images, camids)
        return plain(self, images, domain, camids)

    return lambda samples: patch.object(AFF, "forward", forward)


def swapped_style(images, camids, share=0.5):
    """A share of the crops take the channel means and deviations of a crop of another camera."""
    cameras = torch.as_tensor(camids, device=images.device)
    other = cameras[:, None] != cameras
    partner = torch.multinomial(other.float() + 1e-9, 1).squeeze(1)
    taken = other.gather(1, partner[:, None]).squeeze(1) & (torch.rand(len(images), device=images.device) < share)
    mean, deviation = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True) + 1e-5
    styled = (images - mean) / deviation * deviation[partner] + mean[partner]
    return torch.where(taken[:, None, None, None], styled, images)


def jittered(images, camids, amount=0.2):
    """Brightness and contrast vary; hue and saturation stay."""
    gain, shift = (amount * (2 * torch.rand(2, len(images), 1, 1, 1, device=images.device) - 1)).unbind(0)
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (1 + gain) + mean + 2 * shift


WHOLE = next(s.changes for s in STUDIES["cameras"].settings(RECIPES["small"]) if s.name == "best, both")
OTHERS = {key: value for key, value in WHOLE.items() if key not in ("crossing", "negatives", *loss_fields())}
OWN = {key: OTHERS[key] for key in ("camera_norm", "mirror", "camera_map")}
IDEAS: dict[str, tuple[dict, Change | None]] = {
    "best, both": (WHOLE, None),
    "true labels": (WHOLE | {"labels": "truth"}, None),
    "true links": (WHOLE, true_links),
    "true people in each camera": (WHOLE, true_in_camera),
    "clusters in each camera": (WHOLE, clusters_in_camera),
    "links: none": (WHOLE | {"camera_links": 0.0, "links_from": 1}, None),
    "links: the better half": (WHOLE | {"camera_links": 0.5}, None),
    "links from the first epoch": (WHOLE | {"links_from": 1}, None),
    "links that two halves agree on": (WHOLE, agreeing_links),
    "links by margin": (WHOLE, links_by_margin(1)),
    "links by margin, the better half": (WHOLE, links_by_margin(0.5)),
    "style swap": (WHOLE, altered_images(swapped_style)),
    "brightness and contrast": (WHOLE, altered_images(jittered)),
    "both of these": (WHOLE, altered_images(lambda x, camids: jittered(swapped_style(x, camids), camids))),
    "mean teacher": (WHOLE | {"teacher": "mean"}, None),
    "mean teacher, momentum 0.98": (WHOLE | {"teacher": "mean", "teacher_momentum": 0.98}, None),
    "self-paced": (WHOLE | {"self_paced": 0.02}, None),
    "erase 0.5": (WHOLE | {"erase": 0.5}, None),
    "equal weights of the memories": (WHOLE | {"hard_weight": 0.5, "mean_weight": 0.5}, None),
    "bf16": (WHOLE | {"precision": "bf16"}, None),
    "AFF_SCL with best's other fields": (WHOLE | {"negatives": "all"}, None),
    "Cluster Contrast with best's other fields": (WHOLE | loss_fields("cluster_contrast") | {"negatives": "all"}, None),
    "HHCL with best's other fields": (WHOLE | loss_fields("hhcl") | {"negatives": "all"}, None),
    "DCC with best's other fields": (WHOLE | {"criterion": "dcc", "negatives": "all"}, None),
    "CAP": (loss_fields("cap"), None),
    "CAP, neck, mirror, map": (loss_fields("cap") | OWN, None),
    "CAP with best's other fields, map": (loss_fields("cap") | OTHERS, None),
    "O2CAP": (loss_fields("o2cap"), None),
    "O2CAP, neck, mirror, map": (loss_fields("o2cap") | OWN, None),
    "O2CAP with best's other fields, map": (loss_fields("o2cap") | OTHERS, None),
}


def main():
    """Run what is not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the crops, in Market-1501's folders")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder of results")
    parser.add_argument("--only", nargs="+", choices=IDEAS, default=list(IDEAS), metavar="IDEA")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=RECIPES["small"].iterations)
    words = parser.parse_args()
    fields = {"dataset": "cuhk03", "k1": 30, "epochs": words.epochs, "iterations": words.iterations}
    shared = replace(RECIPES["small"], data=words.data, weights=words.weights, **fields)
    samples, path = load_data(shared).train, words.out / "ideas.csv"
    words.out.mkdir(parents=True, exist_ok=True)
    done = {run["setting"] for run in read_results(path)}
    for name in (name for name in words.only if name not in done):
        changes, change = IDEAS[name]
        run = Run(name, 1, replace(shared, **changes, seed=1))
        with change(samples) if change else contextlib.nullcontext():
            history = finish_run(run, words.out / "runs" / "idea")
        add_result(path, result_of(run, history), list(IDEAS))
        print(
            f"{name}: mAP {100 * history[-1]['mAP']:.1f}, both cameras {100 * history[-1]['mixed_mAP']:.1f}", flush=True
        )


if __name__ == "__main__":
    main()
