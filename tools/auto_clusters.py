"""Measure the choice of k1="auto" (chapter 22) against fixed settings, and write nbs/results/auto_clusters.csv.

python tools/auto_clusters.py [--real NAME=ROOT ... --weights FILE]: crowds of made-up features, drawn people, and real
crops (in Market-1501's folders) as a network sees them before training. Only numbers are written.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tables import write_lines

from affscl.data.datasets import load_dataset
from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.labels.clustering import LADDER, choose_clusters, cluster_report, pseudo_labels
from affscl.model.extraction import extract
from affscl.model.network import AFF

OUT = Path(__file__).resolve().parent.parent / "nbs" / "results" / "auto_clusters.csv"
EPS = (0.5, 0.6, 0.7)


def crowd(noise: float, crops: int, seed: int, shift: float) -> tuple[torch.Tensor, np.ndarray]:
    """Features of forty people under four cameras, each of which moves its crops by a vector of length `shift`."""
    g = torch.Generator().manual_seed(seed)
    pids = torch.arange(40).repeat_interleave(crops)
    x = torch.randn(40, 64, generator=g)[pids] + noise * torch.randn(len(pids), 64, generator=g)
    x = x + shift * torch.randn(4, 64, generator=g)[torch.arange(len(pids)) % 4]
    return torch.nn.functional.normalize(x), pids.numpy()


def seen(model: AFF, root: str | Path, most: int, people: int | None = None) -> tuple[torch.Tensor, np.ndarray]:
    """Features of a training split, of each person at most `most` crops a camera, and of the first people only."""
    counts: dict[tuple, int] = {}
    samples = []
    for sample in load_dataset("market1501", root).train:
        counts[sample.pid, sample.camid] = counts.get((sample.pid, sample.camid), 0) + 1
        samples += [sample] * (counts[sample.pid, sample.camid] <= most)
    kept = set(sorted({sample.pid for sample in samples})[:people])
    samples = [sample for sample in samples if sample.pid in kept]
    with tempfile.TemporaryDirectory() as cache:
        store = ImageStore(samples, model.height, model.width, cache=cache, progress=False)
        return extract(model, store), np.array([sample.pid for sample in samples])


def worlds(real: list[str], weights: str | None) -> Iterator[tuple[str, torch.Tensor, np.ndarray]]:
    """Name, features and people of everything that is measured."""
    for crops in (4, 8, 16, 24, 40):
        for noise, shift in ((0.6, 0.0), (1.2, 0.0), (1.7, 0.0), (1.0, 0.7)):
            yield f"crowd, noise {noise}, shift {shift}", *crowd(noise, crops, 1, shift)
    torch.manual_seed(0)
    model = AFF("resnet10", weights="synthetic", height=128, width=64)
    for crops in (2, 4, 6, 10):
        with tempfile.TemporaryDirectory() as root:
            options = dict(n_ids=45, n_cams=4, n_test_ids=5, distractors=0, junk=0, seed=3)
            yield (
                f"drawn, {crops} a camera",
                *seen(model, make_dataset(f"{root}/world", crops_per_camera=crops, **options), crops),
            )
    for name, root in (entry.split("=", 1) for entry in real):
        torch.manual_seed(0)
        model = AFF("mobilenet_v2", weights=weights, height=128, width=64, fusion="residual")
        for most in (2, 10):
            yield f"{name}, at most {most} a camera, first 150 people", *seen(model, root, most, 150)


def measure(name: str, features: torch.Tensor, pids: np.ndarray) -> dict:
    """One line of the table."""

    def ari(labels: np.ndarray) -> float:
        return round(cluster_report(labels, pids)["ari"], 3)

    choices = {eps: choose_clusters(features, eps) for eps in EPS}
    choice, with_eps = choices[0.6], max(choices, key=lambda eps: choices[eps].separation)
    ladder = [(m, k1, k2) for k1, k2 in LADDER for m in (2, 4)]
    return {
        "world": name,
        "people": len(np.unique(pids)),
        "crops_a_person": round(len(pids) / len(np.unique(pids)), 1),
        **choice.settings(),
        "ari_auto": ari(choice.labels),
        "ari_k1_30": ari(pseudo_labels(features)),
        "ari_best_of_ladder": max(ari(pseudo_labels(features, 0.6, *settings)) for settings in ladder),
        "eps_if_chosen": with_eps,
        "ari_auto_with_eps": ari(choices[with_eps].labels),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME=ROOT")
    parser.add_argument("--weights", help="of MobileNetV2, for the real crops")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for world in worlds(arguments.real, arguments.weights):
        rows.append(measure(*world))
        print(rows[-1], flush=True)
    write_lines(OUT, rows)


if __name__ == "__main__":
    main()
