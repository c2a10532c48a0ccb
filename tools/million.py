"""Label very many made-up features once, for real, with search="faiss": time, peak memory, quality.

    OMP_NUM_THREADS=1 nice python tools/million.py [--n 1000000] [--d 256] [--out FILE]

Writes nbs/results/million.csv, one line; seconds are those of the processor (user and system, all threads), so that
other jobs on the machine count little. The exact search is tried on 1,000 rows only; its seconds for all are these
times n / 1000. Half an hour and more on one core.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from tables import write_lines

from affscl.labels.clustering import pseudo_labels
from affscl.labels.neighbours import nearest_faiss
from affscl.studies.measuring import Peak, machine
from affscl.studies.naive import crowd

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "million.csv"


def measure(n, d, say=print):
    """One line of the file: a labelling of n features, and how good its lists and labels are."""
    x, people = crowd(n, d)
    spent, found = {}, {}

    def search(features, k1):
        start = time.process_time()
        found["lists"], similarities = nearest_faiss(features, k1)
        spent["search"] = time.process_time() - start
        say(f"searched: {spent['search']:.0f} s")
        return found["lists"], similarities

    begun, start = time.perf_counter(), time.process_time()
    with Peak() as peak:
        labels = pseudo_labels(x, search=search)
    rest = time.process_time() - start - spent["search"]
    minutes = (time.perf_counter() - begun) / 60
    some = np.random.default_rng(0).choice(n, min(n, 1000), replace=False)
    start = time.process_time()
    true = np.concatenate([(x[rows] @ x.T).topk(30).indices.numpy() for rows in np.array_split(some, 10)])
    exact = (time.process_time() - start) * n / len(some)
    recall = np.mean([np.isin(row, found["lists"][i]).mean() for row, i in zip(true, some)])
    return {
        "n": n,
        "d": d,
        "search_seconds": round(spent["search"], 1),
        "exact_search_seconds": round(exact, 1),
        "rest_seconds": round(rest, 1),
        "wall_minutes": round(minutes, 1),
        "peak_mb_above_features": round(peak.mb),
        "features_mb": round(n * d * 4 / 1e6),
        "recall": round(float(recall), 4),
        "ari_truth": round(float(adjusted_rand_score(people, labels)), 4),
        "clusters": int(labels.max()) + 1,
        "people": len(np.unique(people)),
        **{key: machine()[key] for key in ("cpu", "threads", "torch")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    line = measure(arguments.n, arguments.d)
    write_lines(arguments.out, [line])
    print(line)


if __name__ == "__main__":
    main()
