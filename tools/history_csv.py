"""Write the numbers of a run's metrics.jsonl as a CSV file, a row an epoch.

python tools/history_csv.py RUN FILE.csv
"""

import csv
import sys

from affscl.training.runs import read_history


def flat(row):
    """A row without nested seconds; numbers rounded to four digits."""
    seconds = {f"seconds_{stage}": value for stage, value in row["seconds"].items()}
    row = {key: value for key, value in row.items() if key != "seconds"} | seconds
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(run, target):
    rows = [flat(row) for row in read_history(run)]
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows[::-1] for key in row)))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
