"""All that can be known of a GPU only on a GPU: one command of at most eight minutes, one JSON file.

    python tools/gpu_check.py                          # on the GPU, at full size -> nbs/results/gpu_check.json
    python tools/gpu_check.py --device cpu --small     # toy sizes on any machine: does the check itself work?

Checks, in this order: labels, scores and an epoch on the CPU and on the device compared; a step of `market1501` in
float32, TF32, bf16, fp16 and compiled, with its memory; `market1501` itself, two short epochs on a generated tree of
its size, with the share of waiting. A check that fails is noted, and the next one runs; a check that begins after seven
minutes is left out and named. Exit status 1 if any check failed or a limit was not kept. Everything is synthetic;
nothing is downloaded.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from affscl.criteria.factory import make_criterion
from affscl.data.sampling import BatchPlan, pk_batches
from affscl.data.store import ImageStore
from affscl.labels.clustering import pseudo_labels
from affscl.labels.neighbours import nearest
from affscl.model.network import AFF
from affscl.scores.evaluation import score
from affscl.studies.bench import table, write_report
from affscl.studies.measuring import Measurement, machine, waiting
from affscl.studies.naive import crowd, ranking
from affscl.training.config import RECIPES
from affscl.training.loading import load_data, train_loader
from affscl.training.loop import train
from affscl.training.processes import device_name

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "gpu_check.json"
LATEST = 420  # seconds after which no further check begins
MARKET = RECIPES["market1501"]


def finish(device):
    """Wait until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device, function, *values):
    """What the function gives, and the seconds until the device is done with it; the second of two calls."""
    function(*values)
    finish(device)
    start = time.perf_counter()
    result = function(*values)
    finish(device)
    return result, time.perf_counter() - start


def memory(device):
    """The most MB that the device held since the last reset; nan on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else float("nan")


def check_labels(device, small):
    """The exact search and the labels, on the CPU and on the device."""
    x, people = crowd(600, 64, noise=1.5) if small else crowd(12_936, 2048, noise=1.5)
    there = x.to(device)
    (own, _), cpu_search = timed(torch.device("cpu"), nearest, x, 30)
    (lists, _), search = timed(device, nearest, there, 30)
    labels, cpu_whole = timed(torch.device("cpu"), pseudo_labels, x)
    found, whole = timed(device, pseudo_labels, there)
    return [
        Measurement("places of the lists that are equal", 100 * float((lists == own).mean()), "%", 99.5, floor=True),
        Measurement("ARI of both labels", adjusted_rand_score(labels, found), "", 0.99, floor=True),
        Measurement("ARI with the truth", adjusted_rand_score(people, found)),
        Measurement("search on the CPU", cpu_search, "s"),
        Measurement("search on the device", search, "s"),
        Measurement("labels from features on the CPU", cpu_whole, "s"),
        Measurement("labels from features on the device", whole, "s"),
    ]


def check_scores(device, small):
    """One ranking, scored from distances on the CPU and on the device."""
    distance, ids = ranking(50, 400) if small else ranking(3368, 15_913)
    distance = torch.as_tensor(distance)
    own, cpu = timed(torch.device("cpu"), score, distance, *ids)
    found, there = timed(device, score, distance.to(device), *ids)
    apart = float(np.nanmax(np.abs(own.ap - found.ap)))
    return [
        Measurement("average precisions, farthest apart", apart, "", 1e-6),
        Measurement("CMC, farthest apart", float(np.abs(own.cmc - found.cmc).max()), "", 1e-6),
        Measurement("scoring on the CPU", cpu, "s"),
        Measurement("scoring on the device", there, "s"),
    ]


def check_epoch(device, small):
    """One epoch of `tiny` on both, from the same weights, in float32."""
    tiny = replace(RECIPES["tiny"], epochs=1, **dict(iterations=2, world_ids=24, world_cams=3, p=4) if small else {})
    with tempfile.TemporaryDirectory() as folder:
        own, found = (
            train(replace(tiny, device=kind), out=f"{folder}/{n}").history
            for n, kind in enumerate(("cpu", device.type))
        )
    return [
        Measurement("start, mAP apart", 100 * abs(own[0]["mAP"] - found[0]["mAP"]), "points", 0.1),
        Measurement("loss of the epoch apart, of it", 100 * abs(found[1]["loss"] / own[1]["loss"] - 1), "%", 2),
        Measurement("after the epoch, mAP apart", 100 * abs(own[1]["mAP"] - found[1]["mAP"]), "points", 3),
        Measurement("clusters of the epoch apart", abs(own[1]["clusters"] - found[1]["clusters"])),
    ]


def make_learner(device, small, precision, compiled=False):
    """A step of `market1501` on made-up crops: network, criterion, scaler, optimizer as the loop has them."""
    torch.manual_seed(0)
    config = replace(MARKET, backbone="resnet10", height=64, width=32, p=2, k=4, bn_chunk=4) if small else MARKET
    size = config.p * config.k
    model = AFF(config.backbone, height=config.height, width=config.width, bn_chunk=config.bn_chunk).to(device)
    model = model.to(memory_format=torch.channels_last)
    rows = torch.nn.functional.normalize(torch.randn(700, model.dim)).to(device)
    criterion = make_criterion(config, rows, np.arange(700))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randn(size, 3, config.height, config.width).to(device)
    targets = (torch.arange(size) // config.k).to(device)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            output = forward(images)
        loss = torch.stack(list(criterion(output, targets).values())).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        criterion.update(output, targets)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step, size


def check_step(device, small):
    """A step of `market1501` in every precision: crops a second, memory, and the first loss against float32's."""
    figures, first = [], None
    ways = {"float32": ("no", False), "TF32": ("no", False), "bf16": ("bf16", False), "fp16": ("fp16", False)}
    ways["compiled bf16"] = ("bf16", True)
    if device.type == "cpu":  # there is no TF32 and no fp16, and compiling is measured by the bench
        ways = {name: way for name, way in ways.items() if name in ("float32", "bf16")}
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for name, (precision, compiled) in ways.items():
            torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
            torch.backends.cudnn.allow_tf32 = name == "TF32"
            start = time.perf_counter()
            step, size = make_learner(device, small, precision, compiled)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            loss = float(step())
            if compiled:
                figures.append(Measurement("compiling, with the first step", time.perf_counter() - start, "s"))
            for _ in range(0 if small else 4):
                step()
            finish(device)
            rounds, start = 2 if small else 20, time.perf_counter()
            for _ in range(rounds):
                step()
            finish(device)
            figures.append(
                Measurement(f"{name}: crops trained", rounds * size / (time.perf_counter() - start), "a second")
            )
            if device.type == "cuda":
                figures.append(Measurement(f"{name}: memory of a step", memory(device), "MB"))
            first = loss if first is None else first
            figures.append(Measurement(f"{name}: first loss apart from float32", 100 * abs(loss / first - 1), "%", 5))
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    return figures


def market_tree(root, people, crops, queries, gallery):
    """A tree of Market-1501's names and sizes whose crops are smooth noise, a colour of its own for each person."""
    rng = np.random.default_rng(0)
    parts = {"bounding_box_train": (0, crops), "query": (people, queries), "bounding_box_test": (people, gallery)}
    for folder, (first, count) in parts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pid, camera = first + i % people, (i // people + (folder == "query")) % 6 + 1
            colour = np.random.default_rng(pid).integers(0, 256, (1, 1, 3))
            pixels = (0.6 * colour + 0.4 * rng.integers(0, 256, (8, 4, 3))).astype(np.uint8)
            name = f"{pid + 1:04d}_c{camera}s1_{i:06d}_00.jpg"
            Image.fromarray(pixels).resize((64, 128), Image.Resampling.BICUBIC).save(root / folder / name)


def check_market(device, small):
    """Two short epochs of `market1501` on a tree of its size, and how long the loop waits for batches."""
    sizes = (12, 96, 24, 60) if small else (751, 12_936, 3368, 15_913)
    less = (
        dict(backbone="resnet10", height=64, width=32, p=2, k=4, bn_chunk=4, iterations=2, workers=0) if small else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        market_tree(Path(folder, "Market-1501-v15.09.15"), *sizes)
        drawn = time.perf_counter() - start
        config = replace(
            MARKET,
            **dict(data=folder, cache=f"{folder}/cache", device=device.type, labels="truth", iterations=40, epochs=2)
            | dict(precision="bf16", weights=None, eval_every=2)
            | less,
        )
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        history = train(config, out=f"{folder}/run").history
        samples = load_data(config).train
        store = ImageStore(samples, config.height, config.width, cache=config.cache)
        labels = np.array([sample.pid for sample in samples])
        plan = BatchPlan(config.p, config.k, config.iterations)
        batches = pk_batches(labels, None, plan, np.random.default_rng(0))
        learner, _ = make_learner(device, small, "bf16")
        learner()

        def step():
            learner()
            finish(device)

        waited = waiting(train_loader(store, labels, batches, config, (0, 0)), step)
    seconds = history[-1]["seconds"]
    return [
        Measurement("crops trained", config.iterations * config.p * config.k / seconds["train"], "a second"),
        Measurement("crops extracted", len(samples) / seconds["extract"], "a second"),
        Measurement("evaluation", seconds["evaluate"], "s"),
        Measurement("memory of the run", memory(device), "MB"),
        Measurement("waiting for batches, with their start", 100 * waited, "%"),
        Measurement("generating the tree", drawn, "s"),
    ]


CHECKS: dict[str, Callable] = {
    "labels": check_labels,
    "scores": check_scores,
    "epoch": check_epoch,
    "step": check_step,
    "market": check_market,
}


def gpu_check(device, small=False, checks=CHECKS, latest=LATEST, say=print):
    """Run the checks; the report has the form of the bench's."""
    begun, rows = time.perf_counter(), {}
    for name, check in checks.items():
        start = time.perf_counter()
        if start - begun > latest:
            rows[name] = {"seconds": 0.0, "error": f"left out: {start - begun:.0f} s had passed"}
            continue
        try:
            figures = [each._asdict() | {"ratio": each.ratio} for each in check(device, small)]
            rows[name] = {"figures": figures}
        except Exception as error:  # the others shall run all the same
            rows[name] = {"error": f"{type(error).__name__}: {error}"}
        rows[name]["seconds"] = round(time.perf_counter() - start, 1)
        say(f"{name}: {rows[name]['seconds']:.0f} s")
    about = machine() | {"device": device_name(device)}
    return {"machine": about, "small": small, "rows": rows, "seconds": round(time.perf_counter() - begun, 1)}


def kept(report):
    """Did every check run, and was every limit kept?"""
    rows = report["rows"].values()
    figures = [figure for row in rows for figure in row.get("figures", ())]
    return all("error" not in row for row in rows) and all(
        f["limit"] is None or (f["value"] >= f["limit"] if f["floor"] else f["value"] <= f["limit"]) for f in figures
    )


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu")
    parser.add_argument("--small", action="store_true", help="toy sizes, to see that all works")
    parser.add_argument("--out", type=Path, help=f"the JSON file; by default {TARGET.name} beside the other results")
    arguments = parser.parse_args(words)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no GPU is here for torch; --device cpu --small tries the check itself")
    report = gpu_check(device, arguments.small)
    print(f"\n{report['machine']['device']}, {report['seconds']:.0f} s in all\n{table(report)}")
    out = arguments.out or (None if arguments.small else TARGET)
    if out:
        write_report(report, out)
    sys.exit(0 if kept(report) else 1)


if __name__ == "__main__":
    main()
