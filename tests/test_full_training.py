"""The final notebook runs from start to end on a CPU, cells marked for CUDA too, and says what is missing for a full run."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from affscl.training import RECIPES, load_config, read_history

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "18_full_training.ipynb"
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], flags='cuda', n_workers=0)"


def execute(**settings):
    """All cells in a process of their own, those marked `cuda` included."""
    return subprocess.run([sys.executable, "-c", RUN, str(NOTEBOOK)], cwd=ROOT, env=os.environ | {"MPLBACKEND": "agg"} | settings,
                          capture_output=True, text=True, timeout=600)


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
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name == "model.safetensors"}
    assert execute(AFFSCL_RECIPE="tiny --device cpu --seed 3", AFFSCL_RUN=str(run)).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name == "model.safetensors"} == before


def test_an_unknown_recipe_is_named(tmp_path):
    done = execute(AFFSCL_RECIPE="markt1501", AFFSCL_RUN=str(tmp_path / "run"))
    assert done.returncode != 0 and "did you mean 'market1501'" in done.stderr + done.stdout


def test_all_that_a_full_run_lacks_is_told_together(tmp_path):
    done = execute(AFFSCL_RECIPE=f"market1501 --data {tmp_path} --weights {tmp_path / 'no.pth'}", AFFSCL_RUN=str(tmp_path / "run"))
    said = done.stderr + done.stdout
    assert done.returncode != 0 and "not ready to train" in said
    assert "market1501 was not found" in said and "bounding_box_train" in said and "no weights at" in said
    assert not (tmp_path / "run").exists(), "nothing is written before all is well"
