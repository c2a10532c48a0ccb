"""Measure the default synthetic world and the recipe `quick` on it, for several seeds of world and training.

    python tools/calibrate.py [--seeds 1 2 3] [--only quick truth random]

For each seed: retrieval by HSV histograms; `quick`; the same network trained as long with the true labels;
`quick` from random weights; all in float32. Writes nbs/results/quick_calibration.csv, a row a run; runs that are
in the file already are not repeated. About three minutes a run on two CPU cores, half an hour in all.
"""

import argparse
import csv
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from affscl.data.datasets import known
from affscl.data.store import ImageStore
from affscl.data.synthetic import hsv_histograms
from affscl.scores.evaluation import score
from affscl.training.config import RECIPES
from affscl.training.loading import load_data
from affscl.training.loop import train

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "quick_calibration.csv"
VARIANTS = {
    "histogram": None,
    "quick": {"precision": "no"},
    "truth": {"precision": "no", "labels": "truth"},
    "random": {"precision": "no", "weights": None},
}
COLUMNS = [
    "variant",
    "seed",
    "start_mAP",
    "last_mAP",
    "best_mAP",
    "start_rank1",
    "last_rank1",
    "clusters",
    "ari",
    "seconds",
    "threads",
]


def histogram_row(config):
    """mAP of the hand-made feature, by the L1 distance."""
    data = load_data(config)
    stores = [
        ImageStore(samples, config.height, config.width, progress=False) for samples in (data.query, data.gallery)
    ]
    query, gallery = (hsv_histograms(store.batch(np.arange(len(store)))) for store in stores)
    distance = torch.cdist(torch.from_numpy(query), torch.from_numpy(gallery), p=1)
    scores = score(distance, *(known(s.samples, "pid") for s in stores), *(known(s.samples, "camid") for s in stores))
    return {
        "start_mAP": scores.mAP,
        "last_mAP": scores.mAP,
        "best_mAP": scores.mAP,
        "start_rank1": scores.cmc[0],
        "last_rank1": scores.cmc[0],
    }


def training_row(config):
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as folder:
        rows = train(config, out=folder).history
    return {
        "start_mAP": rows[0]["mAP"],
        "last_mAP": rows[-1]["mAP"],
        "best_mAP": max(row["mAP"] for row in rows),
        "start_rank1": rows[0]["rank1"],
        "last_rank1": rows[-1]["rank1"],
        "clusters": rows[-1]["clusters"],
        "ari": rows[-1]["ari"],
    }


def measure(variant, seed):
    """One row of the table."""
    config, start = replace(RECIPES["quick"], seed=seed, world_seed=seed, device="cpu"), time.time()
    row = histogram_row(config) if variant == "histogram" else training_row(replace(config, **VARIANTS[variant]))
    row = {key: round(float(value), 4) for key, value in row.items()}
    return {
        "variant": variant,
        "seed": seed,
        **row,
        "seconds": round(time.time() - start),
        "threads": torch.get_num_threads(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for variant in arguments.only:
            rows = list(csv.DictReader(TARGET.open())) if TARGET.exists() else []
            if any(row["variant"] == variant and int(row["seed"]) == seed for row in rows):
                continue
            new = measure(variant, seed)
            rows = list(csv.DictReader(TARGET.open())) if TARGET.exists() else []  # another process may have added some
            rows = [row for row in rows if (row["variant"], int(row["seed"])) != (variant, seed)]
            TARGET.parent.mkdir(exist_ok=True)
            with TARGET.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(
                    sorted([*rows, new], key=lambda row: (list(VARIANTS).index(row["variant"]), int(row["seed"])))
                )
            print(new, flush=True)


if __name__ == "__main__":
    main()
