"""Where a training step of `quick` spends its time: forward, criterion, backward, memories, optimizer; three ways.

    OMP_NUM_THREADS=1 python tools/step_parts.py

The loop's way, Adam in one fused operation, and the network compiled, in turn. Writes nbs/results/step_parts.csv, a
line a way: milliseconds of the processor, medians. About a minute on one quiet core, most of it to compile.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tables import write_lines

from affscl.criteria.factory import make_criterion
from affscl.model.extraction import flushed_denormals
from affscl.model.network import AFF
from affscl.studies.measuring import machine
from affscl.training.config import RECIPES

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "step_parts.csv"
PARTS = "forward", "criterion", "backward", "memories", "optimizer"
ROUNDS = 7  # that count; one more is made first


def learner(config, fused=False, compiled=False):
    """A step, and the list in which it leaves the seconds of its parts."""
    clock = time.process_time
    model = AFF(config.backbone, height=config.height, width=config.width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)
    criterion = make_criterion(config, F.normalize(torch.randn(120, model.dim)), np.arange(120))
    forward = torch.compile(model) if compiled else model
    images = torch.randn(config.p * config.k, 3, config.height, config.width)
    images, targets = images.contiguous(memory_format=torch.channels_last), torch.arange(len(images)) // config.k
    laps = []

    def step():
        times = [clock()]
        output = forward(images)
        times.append(clock())
        loss = torch.stack(list(criterion(output, targets).values())).sum()
        times.append(clock())
        optimizer.zero_grad()
        loss.backward()
        times.append(clock())
        criterion.update(output, targets)
        times.append(clock())
        optimizer.step()
        times.append(clock())
        laps.append(np.diff(times))

    return step, laps


def main():
    torch.manual_seed(0)
    config = RECIPES["quick"]
    ways = {"as the loop does": {}, "fused Adam": dict(fused=True), "compiled": dict(compiled=True)}
    about = {key: value for key, value in machine().items() if key in ("cpu", "cores", "threads", "torch")}
    with flushed_denormals():
        learners, started = {}, {}
        for way, changes in ways.items():
            learners[way] = learner(config, **changes)
            start = time.process_time()
            learners[way][0]()
            started[way] = time.process_time() - start
        for _ in range(ROUNDS):
            for step, _ in learners.values():
                step()
    lines = []
    for way, (_, laps) in learners.items():
        parts = zip(PARTS, 1000 * np.median(laps[1:], 0), strict=True)
        lines.append(
            {"way": way}
            | {f"{part}_ms": round(float(ms), 1) for part, ms in parts}
            | {"first_step_seconds": round(started[way], 1)}
            | about
        )
        print(lines[-1], flush=True)
    write_lines(TARGET, lines)


if __name__ == "__main__":
    main()
