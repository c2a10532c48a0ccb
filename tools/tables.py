"""The CSV file that a measurement leaves, as the other tools here write it."""

import csv


def write_lines(path, lines):
    """Write dictionaries with the keys of the first as a CSV file."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
