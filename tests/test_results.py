"""The committed results hold what the book says of them, and the shipped weights are what they are said to be."""
import csv
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from affscl.network import AFF, shipped_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"


def rows(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def column(variant, key):
    return [float(row[key]) for row in rows("quick_calibration.csv") if row["variant"] == variant]


def test_calibration_of_the_synthetic_world():
    for variant in ("histogram", "quick", "truth", "random"):
        assert sorted(int(row["seed"]) for row in rows("quick_calibration.csv") if row["variant"] == variant) == [1, 2, 3]
    assert max(column("histogram", "last_mAP")) < 0.35, "colours alone must not solve it"
    assert max(column("quick", "start_mAP")) < 0.45, "there must be something to learn"
    assert min(column("quick", "last_mAP")) >= 0.75, "and quick must learn it without labels"
    assert min(column("truth", "last_mAP")) >= 0.90, "and labels must solve it"


def test_real_crops_are_learned():
    history = rows("cuhk03_small.csv")
    assert [int(row["epoch"]) for row in history] == list(range(len(history)))
    assert float(history[0]["mAP"]) < 0.08 and float(history[-1]["mAP"]) >= 0.25


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_every_result_names_the_command_that_made_it(path):
    assert f"`{path.name}`" in (RESULTS / "README.md").read_text()


def test_shipped_weights_are_small_and_fit():
    assert shipped_weights() == ["resnet10"]
    path = ROOT / "affscl" / "weights" / "resnet10_synthetic.safetensors"
    assert path.stat().st_size < 4e6
    with safe_open(path, "pt") as file:
        assert "make_weights.py" in file.metadata()["made_by"]
    torch.manual_seed(0)
    loaded, random = AFF("resnet10", weights="synthetic").state_dict(), AFF("resnet10").state_dict()
    changed = [key for key in random if key.startswith("backbone.") and key.endswith("weight") and not torch.equal(loaded[key], random[key])]
    assert len(changed) == sum(key.startswith("backbone.") and key.endswith("weight") for key in random)
