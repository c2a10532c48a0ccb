"""What a network finds on photographs before it is trained on any, from several starts; writes nbs/results/starts.csv.

    python tools/starts.py --real NAME=DATASET:FOLDER ... --start NAME=BACKBONE:FILE ...

FILE is what `--weights` of affscl-train takes: a file, synthetic, imagenet, none. The network has the fields of the
recipe `small`; a line is what epoch 0 of such a run would say. Only numbers are written; lines that are there stay.
"""

import argparse
import csv
from dataclasses import fields
from pathlib import Path

import torch
from tables import write_lines

from affscl.data.datasets import load_dataset
from affscl.data.store import ImageStore
from affscl.model.network import AFF, NetworkOptions
from affscl.scores.benchmark import evaluate_model
from affscl.studies.measuring import machine
from affscl.training.config import RECIPES

NAMES = {"as extracted": "", "mixed gallery": "mixed_"}
OUT = Path(__file__).resolve().parent.parent / "nbs" / "results" / "starts.csv"


def network(backbone: str, weights: str) -> AFF:
    """A network of the recipe `small` on another backbone, as it starts."""
    torch.manual_seed(0)
    options = {field.name: getattr(RECIPES["small"], field.name) for field in fields(NetworkOptions)}
    return AFF(**options | {"backbone": backbone, "weights": None if weights == "none" else weights})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs="+", required=True, metavar="NAME=DATASET:FOLDER")
    parser.add_argument("--start", nargs="+", required=True, metavar="NAME=BACKBONE:FILE")
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    lines = list(csv.DictReader(words.out.open(encoding="utf-8"))) if words.out.exists() else []
    about = {key: str(machine()[key]) for key in ("cpu", "torch")}
    for name, where in (word.split("=", 1) for word in words.real):
        data = load_dataset(*where.split(":", 1))
        query, gallery = (ImageStore(part, 128, 64) for part in (data.query, data.gallery))
        for start, what in (word.split("=", 1) for word in words.start):
            if any((line["data"], line["start"]) == (name, start) for line in lines):
                continue
            scores = evaluate_model(network(*what.split(":", 1)), query, gallery, mixed=True)
            found = {f"{NAMES[key]}mAP": f"{value.mAP:.4f}" for key, value in scores.items()}
            found |= {f"{NAMES[key]}rank1": f"{value.rank(1):.4f}" for key, value in scores.items()}
            lines.append({"data": name, "start": start, "backbone": what.split(":")[0], **found, **about})
            print(lines[-1], flush=True)
            write_lines(words.out, lines)


if __name__ == "__main__":
    main()
