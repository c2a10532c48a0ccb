"""Time `affscl-train tiny` with and without the policies of chapter 57, alone and beside a busy neighbour.

    python tools/busy.py [--rounds 2]

The neighbours are processes that do nothing but spin, none or one. Writes nbs/results/busy.csv, a line a run. About
five minutes on two quiet CPU cores.
"""

import argparse
import sys
from pathlib import Path

from tables import write_lines

from affscl.studies.measuring import machine, process_seconds

TARGET = Path(__file__).resolve().parent.parent / "nbs" / "results" / "busy.csv"
WAYS = {
    "as torch is loaded": "from affscl.training.cli import train_command as run; run()",
    "as the command starts": "from affscl.training.launch import train as run; run()",
}


def one(code, neighbours):
    """Seconds of the whole process, and the last line of its table."""
    seconds, said = process_seconds([sys.executable, "-c", code, "tiny", "--device", "cpu", "--out", "run"], neighbours)
    return seconds, said.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind; one more is made first and forgotten")
    rounds, lines = parser.parse_args().rounds, []
    about = machine()
    for number in range(rounds + 1):
        for neighbours in (0, 1):
            for way, code in WAYS.items():
                seconds, last = one(code, neighbours)
                print(f"{way}, {neighbours} busy: {seconds:.1f} s, {last}", flush=True)
                if number:
                    score = float(last.split()[-4])
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
