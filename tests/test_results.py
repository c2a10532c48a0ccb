"""The committed results hold what the book says of them, and the shipped weights are what they are said to be."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from affscl.model.network import AFF
from affscl.model.weights import shipped_weights
from affscl.studies.catalogue import STUDIES
from affscl.studies.sweeps import check_record, read_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"


def rows(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def column(variant, key):
    return [float(row[key]) for row in rows("quick_calibration.csv") if row["variant"] == variant]


def test_calibration_of_the_synthetic_world():
    for variant in ("histogram", "quick", "truth", "random"):
        assert sorted(int(row["seed"]) for row in rows("quick_calibration.csv") if row["variant"] == variant) == [
            1,
            2,
            3,
        ]
    assert max(column("histogram", "last_mAP")) < 0.35, "colours alone must not solve it"
    assert max(column("quick", "start_mAP")) < 0.45, "there must be something to learn"
    assert min(column("quick", "last_mAP")) >= 0.75, "and quick must learn it without labels"
    assert min(column("truth", "last_mAP")) >= 0.90, "and labels must solve it"


def test_real_crops_are_learned():
    history = rows("cuhk03_small.csv")
    assert [int(row["epoch"]) for row in history] == list(range(len(history)))
    assert float(history[0]["mAP"]) < 0.08 and float(history[-1]["mAP"]) >= 0.25


@pytest.mark.parametrize("name", sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.csv")))
def test_every_result_names_the_command_that_made_it(name):
    assert f"`{name}`" in (RESULTS / "README.md").read_text()


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("ablation_*.csv")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_every_study_has_three_seeds_of_each_of_its_settings(path):
    study = path.stem.removeprefix("ablation_")
    found = read_results(path)
    record = json.loads(path.with_suffix(".json").read_text())
    check_record(path, record)
    names = [key.removeprefix("setting ") for key in record if key.startswith("setting ")]
    held = {(row["setting"], row["seed"]) for row in found}
    run = {name for name, _ in held}  # a study may have been asked for some of its rows only
    lines = (RESULTS / "README.md").read_text().splitlines()
    fewer = any(str(path.relative_to(RESULTS)) in line and "--seeds" in line for line in lines)  # it says so
    seeds = {name: sorted(seed for other, seed in held if other == name) for name in run}
    assert study in STUDIES and run <= set(names) and len(found) == len(held)
    assert all(some == list(range(1, len(some) + 1)) and (fewer or len(some) == 3) for some in seeds.values())
    assert run == set(names) or "--only" in (RESULTS / "README.md").read_text()


def test_shipped_weights_are_small_and_fit():
    assert shipped_weights() == ["resnet10"]
    path = ROOT / "affscl" / "model" / "initial" / "resnet10_synthetic.safetensors"
    assert path.stat().st_size < 4e6
    with safe_open(path, "pt") as file:
        assert "make_weights.py" in file.metadata()["made_by"]
    torch.manual_seed(0)
    loaded, random = AFF("resnet10", weights="synthetic").state_dict(), AFF("resnet10").state_dict()
    changed = [
        key
        for key in random
        if key.startswith("backbone.") and key.endswith("weight") and not torch.equal(loaded[key], random[key])
    ]
    assert len(changed) == sum(key.startswith("backbone.") and key.endswith("weight") for key in random)
