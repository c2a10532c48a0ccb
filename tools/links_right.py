"""How many links between cameras are right, and how often halves agree, with each weight of the crops' colours.

    python tools/links_right.py CUHK03=cuhk03:FOLDER CUHK01=cuhk03:FOLDER:RUN ... --weights mobilenet_v2_imagenet.pth

For each dataset (its name in the table, a reader of chapter 01, the folder, and perhaps a run that was trained on it):
the features that the recipe `best` starts from, or those of the run, mapped by camera; their clusters; and the mutually
nearest parts of each two cameras (chapter 23). A link is right if most crops of either part show the same person.
Writes nbs/results/links_right.csv. True people are read here, to count; no run reads them.
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
from affscl.labels.links import WEIGHTS, camera_parts, halves_agree, mutual_pairs, nearness
from affscl.model.network import load_model
from affscl.training.config import RECIPES
from affscl.training.loop import epoch_features, prepare

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "links_right.csv"


def counted(person, camera, ours, theirs, weight):
    """How many links of parts there are and how many are right, if colours count with this weight; None: they alone."""
    links = right = 0
    for a, b in combinations(np.unique(camera), 2):
        x, y = np.flatnonzero(camera == a), np.flatnonzero(camera == b)
        if weight is None:
            i, j, _ = mutual_pairs(theirs[x], theirs[y])
        else:
            i, j, _ = mutual_pairs(ours[x], ours[y], more=weight * nearness(theirs[x], theirs[y]))
        links += len(i)
        right += sum(person[x[m]] == person[y[n]] for m, n in zip(i, j))
    return {"links": links, "right": int(right)}


def measure(name, config, run):
    """A line for each weight of colours, and one for colours alone."""
    job = prepare(config, config.weights)
    if run:
        job.model.load_state_dict(load_model(run).state_dict())
    samples, features = job.train.samples, epoch_features(job, config, 0)
    pids, camids = (np.array([getattr(sample, key) for sample in samples]) for key in ("pid", "camid"))
    labeller = make_labeller(replace(config, camera_links=0.0, link_colours=0.0), samples)
    camera_map = fit_camera_map(features, labeller(features, 1), camids.tolist())
    mapped = camera_map(features, torch.from_numpy(camids))
    labels = labeller(mapped, 1)
    colours = ColourView(job.train)(labels)
    numbers = np.unique(camids, return_inverse=True)[1]
    cluster, camera, ours = camera_parts(mapped, labels, numbers)
    theirs = camera_parts(colours, labels, numbers)[2]
    person = [np.bincount(pids[(labels == a) & (numbers == c)]).argmax() for a, c in zip(cluster, camera)]
    agree = [round(share, 4) for share in halves_agree(mapped, colours, labels, camids.tolist())]
    about = {"data": name, "trained": "yes" if run else "no", "clusters": int(labels.max()) + 1}
    return [
        about
        | {"weight": "colours alone" if weight is None else weight, "agree": share}
        | counted(person, camera, ours, theirs, weight)
        for weight, share in zip([*WEIGHTS, None], [*agree, ""])
    ]


def main():
    """Measure each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="NAME=DATASET:FOLDER[:RUN]")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--k1", type=int, default=10)
    words = parser.parse_args()
    lines = []
    for word in words.data:
        name, place = word.split("=", 1)
        dataset, folder, *run = place.split(":")
        config = replace(RECIPES["best"], dataset=dataset, data=folder, weights=words.weights, k1=words.k1)
        lines += measure(name, config, run[0] if run else None)
        write_lines(TARGET, lines)
        best = max((line for line in lines if line["agree"] != "" and line["data"] == name), key=lambda x: x["agree"])
        print(f"{name}: halves agree most with weight {best['weight']}, {best['right']} of {best['links']} links right")


if __name__ == "__main__":
    main()
