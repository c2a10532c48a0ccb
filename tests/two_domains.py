"""What the tests of two domains share: a labelled source and an unlabelled target, of files that need not exist."""

from pathlib import Path

from affscl.data.datasets import Dataset, Sample


def people(folder, pids, cams, each=2):
    """`each` samples of every person in every camera, of files that need not exist."""
    return [Sample(f"{folder}/{pid}_c{cam}_{i}.jpg", pid, cam) for pid in pids for cam in cams for i in range(each)]


def source_world():
    return Dataset(
        "inside", Path("/data/a"), people("/data/a/train", [3, 7, 40], [1, 2]), people("/data/a/q", [900], [1]), []
    )


def target_world():
    return Dataset(
        "outside",
        Path("/data/b"),
        people("/data/b/train", range(1, 5), [1, 2, 3]),
        people("/data/b/q", [20], [4]),
        people("/data/b/g", [0, 20, 77], [4, 5]),
    )
