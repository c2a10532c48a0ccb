"""What the order of crops in memory costs: the seconds of labels beyond the search, in three orders of the same crops.

    OMP_NUM_THREADS=1 python tools/locality.py [--sizes 10000 30000 100000]

Crops of made-up people, 18 each, 256 numbers a feature: in a random order as they are, in a random order put side by
side (as `jaccard_distance` does), and with each person's crops in a row. Seconds of the processor. Writes
nbs/results/locality.csv, a line for each size and order. About four minutes on one quiet CPU core.
"""

import argparse
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from tables import write_lines

from affscl.labels import jaccard
from affscl.labels.clustering import pseudo_labels
from affscl.labels.neighbours import nearest
from affscl.studies.measuring import machine
from affscl.studies.naive import crowd

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "locality.csv"


def as_they_are(lists):
    """In place of `side_by_side`: no other order."""
    return np.arange(len(lists))


def spent(x, lists, similarities, order, arrange):
    """Seconds of the processor for the labels of crops whose neighbours are known, in an order; and the labels."""
    place = np.argsort(order).astype(np.int32)
    known = place[lists[order]], similarities[order]
    features = x[torch.from_numpy(order)]
    with patch.object(jaccard, "side_by_side", arrange):
        start = time.process_time()
        labels = pseudo_labels(features, search=lambda *_: known)
        return time.process_time() - start, labels[place]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    about = {key: value for key, value in machine().items() if key in ("cpu", "cores", "threads", "torch")}
    pseudo_labels(crowd(500, 64)[0])  # compiles
    lines, beside = [], jaccard.side_by_side
    for n in parser.parse_args().sizes:
        x, people = crowd(n, 256)
        lists, similarities = nearest(x, 30)
        mixed, sorted_ = np.random.default_rng(0).permutation(n), np.argsort(people, kind="stable")
        for name, order, arrange in (
            ("mixed", mixed, as_they_are),
            ("mixed, put side by side", mixed, beside),
            ("by person", sorted_, as_they_are),
        ):
            rounds = [spent(x, lists, similarities, order, arrange) for _ in range(2)]
            seconds = min(each[0] for each in rounds)
            clusters = len(np.unique(rounds[0][1])) - 1
            line = {"n": n, "order": name, "us_a_crop": round(seconds / n * 1e6, 2), "clusters": clusters}
            lines.append(line | about)
            print(line, flush=True)
    write_lines(TARGET, lines)


if __name__ == "__main__":
    main()
