"""Measure the steps whose speed the book speaks of, on this machine, each against its yardstick in the same run.

    python tools/measure.py [labels evaluation store augmentation]     all four take about two minutes
"""
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from affscl.batches import ImageStore, augment
from affscl.clustering import cluster_report, pseudo_labels
from affscl.datasets import load_dataset
from affscl.evaluation import score
from affscl.jaccard import nearest
from affscl.synthetic import make_dataset


def best(function, times=3):
    """The shortest of some runs, in seconds."""
    laps = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        laps.append(time.perf_counter() - start)
    return min(laps)


class Peak:
    """Peak resident memory in MB above that at the start, sampled every 5 ms."""

    def __enter__(self):
        self.base, self.value, self.on = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.on = False
        self.thread.join()

    def watch(self):
        while self.on:
            self.value = max(self.value, self.now() - self.base)
            time.sleep(0.005)

    @staticmethod
    def now():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def labels(n=12_936, d=2048):
    """pseudo_labels at Market-1501's size against its exact neighbour search alone."""
    generator = torch.Generator().manual_seed(0)
    pids = torch.randint(n // 18, (n,), generator=generator)
    x = torch.randn(n // 18, d, generator=generator)[pids].add_(torch.randn(n, d, generator=generator), alpha=1.5)
    x.div_(x.norm(dim=1, keepdim=True))
    pseudo_labels(x[:500])  # compiles
    with Peak() as peak:
        whole = best(lambda: pseudo_labels(x), 2)
    search = best(lambda: nearest(x, 30), 2)
    found = cluster_report(pseudo_labels(x), pids.numpy())
    print(f"labels: {n:,} x {d}: {whole:.2f} s, of which the neighbour search {search:.2f} s (ratio {whole / search:.2f});"
          f" peak memory above the features {peak.value:.0f} MB; {found['clusters']} clusters, ARI {found['ari']:.3f}")


def evaluation(q=3_368, g=15_913):
    """Scoring at Market-1501's size against one full argsort."""
    rng = np.random.default_rng(0)
    distance = rng.random((q, g), dtype=np.float32)
    ids = rng.integers(750, size=q), rng.integers(750, size=g), rng.integers(6, size=q), rng.integers(6, size=g)
    score(distance[:50], ids[0][:50], ids[1], ids[2][:50], ids[3])  # compiles
    ours, sort = best(lambda: score(distance, *ids)), best(lambda: np.argsort(distance, axis=1), 2)
    print(f"evaluation: {q:,} x {g:,}: {ours:.2f} s, one full argsort {sort:.2f} s (ratio {ours / sort:.3f})")


def store(size=(256, 128)):
    """Decoding crops into a store with one worker and with two."""
    with tempfile.TemporaryDirectory() as folder:
        samples = load_dataset("market1501", make_dataset(f"{folder}/world", n_ids=180, seed=0)).train
        laps = [best(lambda: ImageStore(samples, *size, cache=tempfile.mkdtemp(dir=folder), workers=workers, progress=False)) for workers in (1, 2)]
    one, two = (len(samples) / lap for lap in laps)
    print(f"store: {size[0]} x {size[1]}: one worker {one:.0f} crops/s, two {two:.0f} (ratio {two / one:.2f})")


def augmentation(size=(256, 128)):
    """Augmented crops a second, one thread."""
    images = torch.randint(256, (128, 3, *size), dtype=torch.uint8)
    lap = best(lambda: augment(images, np.random.default_rng(0)), 10)
    print(f"augmentation: {size[0]} x {size[1]}: {128 / lap:.0f} crops/s")


if __name__ == "__main__":
    known = {function.__name__: function for function in (labels, evaluation, store, augmentation)}
    if not set(sys.argv[1:]) <= known.keys():
        sys.exit(__doc__)
    for name in sys.argv[1:] or known:
        known[name]()
