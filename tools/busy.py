"""Time `affscl-train tiny` without the policies of chapter 57, with sleeping threads, and with all of the policies.

    python tools/busy.py [--rounds 2]

Alone and beside a neighbour: a process that does nothing but spin. Writes nbs/results/busy.csv, a line a run. About
five minutes on two quiet CPU cores.
"""

import argparse
import os
import sys
from pathlib import Path

from tables import write_lines

from affscl.studies.measuring import machine, process_seconds

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "busy.csv"
ALL = f"import os; os.environ['OMP_NUM_THREADS'] = '{os.cpu_count()}'; "
WAYS = {
    "as torch is loaded": ALL + "from affscl.training.cli import train_command as run; run()",
    "waiting threads sleep": ALL + "from affscl.training.launch import train as run; run()",
    "as the command starts": "from affscl.training.launch import train as run; run()",
}


def one(code, neighbours):
    """Seconds of the whole process, and the mAP of its last epoch."""
    seconds, said = process_seconds([sys.executable, "-c", code, "tiny", "--device", "cpu", "--out", "run"], neighbours)
    last = next(line for line in said.splitlines() if line.startswith("last, epoch"))
    return seconds, float(last.split()[-4])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind; one more is made first and forgotten")
    rounds, lines = parser.parse_args().rounds, []
    about = machine()
    for number in range(rounds + 1):
        for neighbours in (0, 1):
            for way, code in WAYS.items():
                seconds, score = one(code, neighbours)
                print(f"{way}, {neighbours} busy: {seconds:.1f} s, mAP {score}", flush=True)
                if number:
                    line = {
                        "way": way,
                        "neighbours": neighbours,
                        "round": number,
                        "seconds": round(seconds, 2),
                        "mAP": score,
                    }
                    lines.append(line | {key: about[key] for key in ("cpu", "cores", "threads", "torch")})
    write_lines(TARGET, lines)


if __name__ == "__main__":
    main()
