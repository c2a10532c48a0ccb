"""What bounds the building of a store: each part of a crop's decoding alone, by one thread and by two; and `draft`.

    python tools/store_parts.py             nothing else running; about a minute on two cores

Writes nbs/results/store_parts.csv, a line for each size of file and part: milliseconds a crop with one thread, and
how many times as fast two threads are. `draft` decodes a JPEG file at a half, a quarter or an eighth of its size where
twice the training size still fits in; `apart` is the mean difference of its pixels from those of the whole file,
of 255. The crops are drawn at 128 x 64, and scaled up for the larger files; they are stored at 128 x 64.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tables import write_lines

from affscl.data.datasets import load_dataset
from affscl.data.store import as_rgb, load_crop
from affscl.data.synthetic import make_dataset
from affscl.studies.measuring import machine

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "store_parts.csv"
HEIGHT, WIDTH = 128, 64
SIZES = (128, 64), (256, 128), (1024, 512)
ROUNDS = 5


def undrafted(file):
    """A crop from a file of which every pixel is decoded."""
    resized = as_rgb(Image.open(file)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def decoded(file):
    """The pixels of a file."""
    image = Image.open(file)
    image.load()
    return image


def seconds(part, given, threads):
    """The least time that `threads` threads need for `part` of everything given."""
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(part, given))
            times.append(time.perf_counter() - start)
    return min(times)


def lines_of(size, crops, folder):
    """One line a part, for files of one size."""
    files = [f"{folder}/{size[0]}_{i}.jpg" for i in range(len(crops))]
    for crop, file in zip(crops, files):
        image = Image.fromarray(crop.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BICUBIC)
        image.save(file, quality=92)
    images = [decoded(file) for file in files]
    small = [image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for image in images]
    parts = {
        "decode": (decoded, files),
        "resize": (lambda image: image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), images),
        "to array": (lambda image: np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), small),
        "all of it": (lambda file: load_crop(file, HEIGHT, WIDTH), files),
        "the same without draft": (undrafted, files),
    }
    apart = np.mean([np.abs(load_crop(file, HEIGHT, WIDTH) - undrafted(file).astype(float)).mean() for file in files])
    for name, (part, given) in parts.items():
        one, two = (seconds(part, given, threads) for threads in (1, 2))
        line = {"file": f"{size[0]} x {size[1]}", "part": name, "ms_a_crop": round(1e3 * one / len(files), 3)}
        line |= {"two_threads": round(one / two, 2), "apart": round(float(apart), 2)}
        yield line | {key: machine()[key] for key in ("cpu", "cores", "torch")}


def main():
    with tempfile.TemporaryDirectory() as folder:
        samples = load_dataset("market1501", make_dataset(f"{folder}/world", n_ids=60, n_cams=4, seed=0)).train
        crops = [load_crop(sample.path, HEIGHT, WIDTH) for sample in samples]
        lines = [line for size in SIZES for line in lines_of(size, crops, folder)]
    for line in lines:
        print(line)
    write_lines(TARGET, lines)


if __name__ == "__main__":
    main()
