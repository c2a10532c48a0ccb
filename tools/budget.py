"""Where the processor's seconds of `affscl-train` go: one run of a recipe, from the first import to the last line.

    OMP_NUM_THREADS=1 python tools/budget.py [quick] [--name "as it is"] [--eval-every 1] [--precision no]

Appends a line for each stage to nbs/results/budget.csv, and replaces lines of the same name. Seconds are user and
system time of the process (time.process_time), so that another job on the machine counts little. The world is drawn
anew, in an empty cache. About four minutes for `quick` on one core.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

from tables import write_lines

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "budget.csv"


def measure(recipe, changes):
    """Seconds of each stage, in order, and the run's history."""
    laps, last = {}, [0.0]

    def lap(name):
        now = time.process_time()
        laps[name], last[0] = laps.get(name, 0) + now - last[0], now

    import affscl.training.cli  # noqa: F401  the command's own import
    from affscl.training import loop
    from affscl.training.config import RECIPES

    lap("import")

    class StageClock(loop.Clock):
        def lap(self, name):
            super().lap(name)
            lap(name)

    def timed(name, function):
        def call(*arguments, **named):
            lap("other")
            result = function(*arguments, **named)
            lap(name)
            return result

        return call

    loop.Clock = StageClock
    loop.load_data = timed("draw the world", loop.load_data)
    loop.ImageStore = timed("store", loop.ImageStore)
    loop.save_state = timed("save", loop.save_state)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        config = RECIPES[recipe].__class__(**vars(RECIPES[recipe]) | changes | {"device": "cpu"})
        history = loop.train(config, f"{folder}/run").history
        lap("other")
    return laps, history


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quick")
    parser.add_argument("--name", default="as it is")
    parser.add_argument("--eval-every", type=int, default=1)
    parser.add_argument("--precision", help="no, bf16 or auto; by default as the recipe says")
    arguments = parser.parse_args()
    changes = {"eval_every": arguments.eval_every}
    changes |= {"precision": arguments.precision} if arguments.precision else {}
    laps, history = measure(arguments.recipe, changes)
    from affscl.studies.measuring import machine

    about = {key: value for key, value in machine().items() if key in ("cpu", "cores", "threads", "torch")}
    scores = {"start_mAP": round(history[0]["mAP"], 4), "last_mAP": round(history[-1]["mAP"], 4)}
    lines = [
        {"name": arguments.name, "recipe": arguments.recipe, "stage": stage, "seconds": round(seconds, 2)}
        | scores
        | about
        for stage, seconds in laps.items()
    ]
    kept = list(csv.DictReader(TARGET.open())) if TARGET.exists() else []
    kept = [line for line in kept if (line["name"], line["recipe"]) != (arguments.name, arguments.recipe)]
    write_lines(TARGET, [*kept, *lines])
    for line in lines:
        print(f"{line['stage']:16}{line['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
