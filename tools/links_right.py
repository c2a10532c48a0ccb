"""How many links between cameras are right, by features, by colours, and by both, before any training.

    python tools/links_right.py CUHK03=cuhk03:FOLDER ... --weights mobilenet_v2_imagenet.pth --k1 10

For each dataset (its name in the table, then a reader of chapter 01 and the folder): the features that the recipe
`best` starts from, mapped by camera; their clusters; and the mutually nearest parts of each two cameras (chapter 23).
A link is right if most crops of either part show the same person. Writes nbs/results/links_right.csv. True people are
read here, to count; no run reads them.
"""

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tables import write_lines

from affscl.labels.camera_map import ColourView, fit_camera_map
from affscl.labels.labellers import make_labeller
from affscl.labels.links import camera_parts, mutual_pairs, nearness
from affscl.training.config import RECIPES
from affscl.training.loop import epoch_features, prepare

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "links_right.csv"


def counted(labels, camids, pids, views):
    """How many links there are and how many are right, by the sum of some views of the crops."""
    numbers = np.unique(camids, return_inverse=True)[1]
    parts = [camera_parts(view, labels, numbers) for view in views]
    cluster, camera, _ = parts[0]
    person = [np.bincount(pids[(labels == a) & (numbers == c)]).argmax() for a, c in zip(cluster, camera)]
    links = right = 0
    for a, b in combinations(np.unique(camera), 2):
        ours, theirs = np.flatnonzero(camera == a), np.flatnonzero(camera == b)
        first, *others = ((centres[ours], centres[theirs]) for _, _, centres in parts)
        i, j, _ = mutual_pairs(*first, more=sum(nearness(*other) for other in others))
        links += len(i)
        right += sum(person[ours[x]] == person[theirs[y]] for x, y in zip(i, j))
    return {"links": links, "right": int(right)}


def measure(name, config):
    """A line for each way to find links."""
    job = prepare(config, config.weights)
    samples, features = job.train.samples, epoch_features(job, config, 0)
    pids, camids = (np.array([getattr(sample, key) for sample in samples]) for key in ("pid", "camid"))
    labeller = make_labeller(replace(config, camera_links=0.0), samples)
    camera_map = fit_camera_map(features, labeller(features, 1), camids.tolist())
    mapped = camera_map(features, torch.from_numpy(camids))
    labels = labeller(mapped, 1)
    colours = ColourView(job.train)(labels)
    ways = {"features": [mapped], "colours": [colours], "both": [mapped, colours]}
    about = {"data": name, "crops": len(samples), "people": len(set(pids)), "clusters": int(labels.max()) + 1}
    return [about | {"by": by} | counted(labels, camids, pids, views) for by, views in ways.items()]


def main():
    """Measure each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="NAME=DATASET:FOLDER")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--k1", type=int, default=10)
    words = parser.parse_args()
    lines = []
    for word in words.data:
        name, place = word.split("=", 1)
        dataset, folder = place.split(":", 1)
        config = replace(RECIPES["best"], dataset=dataset, data=folder, weights=words.weights, k1=words.k1)
        lines += measure(name, config)
        write_lines(TARGET, lines)
        for line in lines[-3:]:
            print(f"{name}: by {line['by']}, {line['right']} of {line['links']} links are right", flush=True)


if __name__ == "__main__":
    main()
