"""The final notebook runs from start to end on a CPU, cells marked for CUDA too, and says what a full run lacks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from affscl.data.store import ImageStore
from affscl.data.synthetic import make_dataset
from affscl.model.network import load_model
from affscl.scores.benchmark import evaluate_model
from affscl.training.cli import parse_train
from affscl.training.config import RECIPES
from affscl.training.loading import load_data
from affscl.training.loop import train
from affscl.training.runs import load_config, read_history

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "90_full_training.ipynb"
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], flags='cuda', n_workers=0)"


def execute(**settings):
    """All cells in a process of their own, those marked `cuda` included."""
    return subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "agg"} | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run that the notebook leaves, told where to leave it."""
    folder = tmp_path_factory.mktemp("full") / "run"
    done = execute(AFFSCL_RECIPE="tiny --device cpu --seed 3", AFFSCL_RUN=str(folder))
    assert done.returncode == 0 and "Success." in done.stdout, done.stderr + done.stdout
    return folder


def test_it_trains_what_the_switch_says(run):
    config = load_config(run)
    assert (config.recipe, config.seed, config.device) == ("tiny", 3, "cpu")
    assert [row["epoch"] for row in read_history(run)] == list(range(RECIPES["tiny"].epochs + 1))


def test_its_record_holds_the_scores_of_the_run(run):
    record, last = json.loads((run / "report.json").read_text()), read_history(run)[-1]
    assert record["scores"]["as extracted"]["mAP"] == pytest.approx(100 * last["mAP"], abs=0.1)
    assert record["scores"]["as extracted"]["rank1"] == pytest.approx(100 * last["rank1"], abs=0.1)
    assert record["scores"]["mixed gallery"]["mAP"] == pytest.approx(100 * last["mixed_mAP"], abs=0.1)
    assert record["scores"]["re-ranked"]["mAP"] != record["scores"]["as extracted"]["mAP"]
    assert (record["recipe"], record["seed"], record["complete"]) == ("tiny", 3, False)


@pytest.mark.parametrize("name", ("history.png", "cmc.png", "ranked.png"))
def test_its_pictures_are_pictures(run, name):
    with Image.open(run / name) as picture:
        assert min(picture.size) > 100 and len(set(picture.convert("L").resize((64, 64)).tobytes())) > 5


def test_a_second_execution_trains_nothing(run):
    # metrics.jsonl holds the seconds of each stage: they would be others if an epoch were trained again.
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")}
    assert execute(AFFSCL_RECIPE="tiny --device cpu --seed 3", AFFSCL_RUN=str(run)).returncode == 0
    assert {name: (run / name).read_bytes() for name in before} == before


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A full recipe cut down, on a tree laid out as Market-1501: interrupted after an epoch; the notebook goes on."""
    folder = tmp_path_factory.mktemp("real")
    tree = make_dataset(folder / "Market-1501-v15.09.15", n_ids=24, n_cams=3, seed=0)
    words = (
        f"market1501 --data {tree.parent} --backbone resnet10 --weights synthetic --height 64 --width 32"
        " --pad 3 --p 4 --k 4 --k1 8 --k2 3 --bn-chunk 8 --workers 0 --iterations 3 --epochs 2 --device cpu"
    )
    config, run = parse_train(words.split())[0], folder / "run"
    begun = train(replace(config, epochs=1), out=run).history
    done = execute(AFFSCL_RECIPE=words, AFFSCL_RUN=str(run))
    assert done.returncode == 0 and "Success." in done.stdout, done.stderr + done.stdout
    return config, run, begun


def test_an_interrupted_run_goes_on(real):
    _, run, begun = real
    assert [row["epoch"] for row in read_history(run)] == [0, 1, 2]
    assert read_history(run)[:2] == begun, "what was trained before is kept, its seconds too"


def test_scores_are_those_of_the_network_on_disk(real):
    config, run, _ = real
    data, model = load_data(config), load_model(run)
    stores = [ImageStore(part, config.height, config.width) for part in (data.query, data.gallery)]
    found = json.loads((run / "report.json").read_text())["scores"]
    wanted_scores = evaluate_model(model, *stores, reranked=True, mixed=True)
    assert wanted_scores.keys() == {"as extracted", "re-ranked", "mixed gallery"}
    for name, wanted in wanted_scores.items():
        assert [found[name]["mAP"], found[name]["rank1"]] == pytest.approx(
            [100 * wanted.mAP, 100 * wanted.rank(1)], abs=0.01
        )


def test_a_part_of_a_dataset_is_recorded_as_such_and_shows_nobody(real):
    config, run, _ = real
    record = json.loads((run / "report.json").read_text())
    assert (record["dataset"], record["complete"], record["labels"]) == ("market1501", False, "clusters")
    assert (
        record["changed"].keys() >= {"epochs", "iterations", "backbone", "height"} and "data" not in record["changed"]
    )
    assert (run / "history.png").exists() and not (run / "ranked.png").exists(), (
        "no pictures of a dataset that is not drawn"
    )


def test_an_unknown_recipe_is_named(tmp_path):
    done = execute(AFFSCL_RECIPE="markt1501", AFFSCL_RUN=str(tmp_path / "run"))
    assert done.returncode != 0 and "did you mean market1501" in done.stderr + done.stdout


def test_all_that_a_full_run_lacks_is_told_together(tmp_path):
    done = execute(
        AFFSCL_RECIPE=f"market1501 --data {tmp_path} --weights {tmp_path / 'no.pth'}", AFFSCL_RUN=str(tmp_path / "run")
    )
    said = done.stderr + done.stdout
    assert done.returncode != 0 and "not ready to train" in said
    assert "market1501 was not found" in said and "bounding_box_train" in said and "no weights at" in said
    assert torch.cuda.is_available() or "on this CPU and in truth several times that" in said
    assert not (tmp_path / "run").exists(), "nothing is written before all is well"
