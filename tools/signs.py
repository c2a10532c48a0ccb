"""How well what clusters tell without labels predicts mAP: `python tools/signs.py OUT.csv RECIPE [--field value ...]`.

Trains in short runs, and after each epoch appends a line: the signs of chapter 26 and the mAP of the network that
these clusters have trained. `--eps 0.4 0.5 ...` and `--seed 1 2 ...` are lists: a run for each pair.
"""

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

from affscl.labels.jaccard import jaccard_distance
from affscl.labels.signs import jaccard_silhouette, largest_share, stability
from affscl.training.config import RECIPES
from affscl.training.loop import epoch_features, epoch_scores, started, train_epoch

COLUMNS = ["data", "recipe", "eps", "k1", "seed", "epoch", "crops", "clusters", "outlier_share", "largest_share"]
COLUMNS += ["stability", "silhouette", "ari", "mAP", "rank1"]


def signs(config, name, write):
    """Train one run; `write` gets a line an epoch."""
    with tempfile.TemporaryDirectory() as folder:
        job, _ = started(config, Path(folder), config.weights)
        before = None
        for epoch in range(1, config.epochs + 1):
            features = epoch_features(job, config, epoch - 1)
            labels = job.labeller(features, epoch)
            graph = jaccard_distance(features, config.k1, config.k2)
            line = {"data": name, "crops": len(labels)}
            line |= {key: getattr(config, key) for key in ("recipe", "eps", "k1", "seed")}
            line |= {"largest_share": largest_share(labels), "silhouette": jaccard_silhouette(graph, labels)}
            line["stability"] = None if before is None else stability(before, labels)
            before = labels
            try:
                line |= train_epoch(job, config, epoch)
            except ValueError as error:
                print(error, flush=True)
                return
            write(line | epoch_scores(job, config, epoch))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("recipe")
    parser.add_argument("--name", default="synthetic")
    parser.add_argument("--dataset")
    parser.add_argument("--data")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--k1", type=int)
    parser.add_argument("--k2", type=int)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.6])
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    words = vars(parser.parse_args())
    out, recipe, name, all_eps, seeds = (words.pop(key) for key in ("out", "recipe", "name", "eps", "seed"))
    given = {key: value for key, value in words.items() if value is not None}
    new = not Path(out).exists()
    with open(out, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()

        def write(line):
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()})
            file.flush()

        for seed in seeds:
            for eps in all_eps:
                signs(replace(RECIPES[recipe], eps=eps, seed=seed, **given), name, write)


if __name__ == "__main__":
    main()
