"""How many links between cameras are right, by features, by colours, and by both: of networks that runs have trained.

    python tools/links_right.py RUN [RUN ...] --data CUHK03 --out nbs/results/cuhk03/links_right.csv

For each run (its config.json and model.safetensors): features of the training crops, mapped by camera; their clusters;
and the mutually nearest parts of each two cameras (chapter 23). A link is right if most crops of both parts show one
person. True people are read here, to count; no run reads them. Lines of the same run and seed are replaced.
"""

import argparse
import csv
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tables import write_lines

from affscl.data.store import ImageStore
from affscl.labels.camera_map import ColourView, fit_camera_map
from affscl.labels.labellers import make_labeller
from affscl.labels.links import camera_parts, mutual_pairs, nearness
from affscl.labels.merging import clustering_of
from affscl.model.extraction import extract
from affscl.model.network import load_model
from affscl.training.config import read_config
from affscl.training.loading import load_data


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


def measure(run, data):
    """Lines for one run."""
    config = replace(read_config(run / "config.json"), data=data)
    samples = load_data(config).train
    pids, camids = (np.array([getattr(sample, name) for sample in samples]) for name in ("pid", "camid"))
    crops, network = ImageStore(samples, config.height, config.width, cache=config.cache), load_model(run)
    network.camera_map = None
    features = extract(network, crops)
    labeller = make_labeller(replace(config, camera_links=0.0, link_colours=0.0), samples, clustering_of(config))
    first = labeller(features, 1)
    mapped = fit_camera_map(features, first, camids.tolist())(features, torch.from_numpy(camids))
    labels = labeller(mapped, 1)
    colours = ColourView(crops)(labels)
    people = len(set.intersection(*(set(pids[camids == camera]) for camera in set(camids))))
    ways = {"features": [mapped], "colours": [colours], "both": [mapped, colours]}
    about = {"run": run.name, "seed": config.seed, "people_in_all_cameras": people, "clusters": int(labels.max()) + 1}
    return [about | {"by": name} | counted(labels, camids, pids, views) for name, views in ways.items()]


def main():
    """Measure each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", required=True, help="the crops that the runs were trained on")
    parser.add_argument("--out", required=True, type=Path)
    words = parser.parse_args()
    lines = list(csv.DictReader(words.out.open())) if words.out.exists() else []
    for run in words.runs:
        new = measure(run, words.data)
        same = {(line["run"], str(line["seed"])) for line in new}
        lines = [line for line in lines if (line["run"], str(line["seed"])) not in same] + new
        write_lines(words.out, lines)
        for line in new:
            print(f"{run.name}: by {line['by']}: {line['right']} of {line['links']} links are right", flush=True)


if __name__ == "__main__":
    main()
