"""The commands, end to end and where a user slips."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from affscl.training.cli import eval_command, named_recipe, parse_train, train_command
from affscl.training.config import RECIPES
from affscl.training.runs import read_history

BIN = Path(sys.executable).parent
SHORT = [
    "tiny",
    "--world-ids",
    "24",
    "--world-cams",
    "3",
    "--k1",
    "10",
    "--iterations",
    "3",
    "--p",
    "4",
    "--device",
    "cpu",
]


def call(*words, **more):
    return subprocess.run([BIN / words[0], *map(str, words[1:])], capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    done = call("affscl-train", *SHORT, "--epochs", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_train_prints_its_table(run):
    out, done = run
    table, _, after = done.stdout.partition("\nThe run is in ")
    lines = table.strip().splitlines()
    assert lines[-4].split() == ["mAP", "Rank-1", "Rank-5", "Rank-10"]
    assert [line.split()[0].strip(",") for line in lines[-3:]] == ["start", "best", "last"]
    assert f"{100 * read_history(out)[-1]['mAP']:.1f}" == lines[-1].split()[-4]
    assert sum(line.startswith("epoch") for line in lines) == 2
    assert all(command in after for command in ("affscl-eval", "affscl-search", "affscl-report", "affscl-export"))
    assert "%|" not in done.stdout + done.stderr, "no progress bars where nobody watches"


def test_eval_repeats_the_runs_score(run):
    out, _ = run
    done = call("affscl-eval", out, "--rerank")
    assert done.returncode == 0, done.stderr
    assert f"{100 * read_history(out)[-1]['mAP']:.1f}" in done.stdout
    assert "re-ranked" in done.stdout


def test_eval_on_another_world(run, capsys):
    eval_command([str(run[0]), "--world-look", "1"])
    assert re.search(r"as extracted: .*mAP", capsys.readouterr().out)


def test_resume_goes_on(run):
    out, _ = run
    done = call("affscl-train", "--resume", out, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in read_history(out)] == [0, 1, 2, 3]
    assert "Continuing" in done.stdout


def test_ctrl_c_leaves_a_run_to_resume(tmp_path):
    process = subprocess.Popen(
        [BIN / "affscl-train", *SHORT, "--epochs", "50", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch  2"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in output + errors and "Traceback" not in errors
    rows = len(read_history(tmp_path / "run"))
    done = call("affscl-train", "--resume", tmp_path / "run", "--epochs", rows)
    assert done.returncode == 0, done.stderr
    assert [row["epoch"] for row in read_history(tmp_path / "run")] == list(range(rows + 1))


def test_help_lists_fields_with_their_comments():
    text = re.sub(r"[\s│]+", " ", call("affscl-train", "small", "--help", env=os.environ | {"COLUMNS": "150"}).stdout)
    for word in (
        *RECIPES,
        "--eps",
        "--weights",
        "--resume",
        "--out",
        "mobilenet_v2",
        "rounds of: extract, label, train",
    ):
        assert word in text
    assert "--rerank" in call("affscl-eval", "--help").stdout


def test_no_recipe_means_quick():
    config, out, resume = parse_train([])
    assert asdict(config) == asdict(RECIPES["quick"]) and out is None and resume is None


def test_fields_override_the_recipe():
    config, out, _ = parse_train(
        ["market1501", "--eps", "0.5", "--data", "somewhere", "--weights", "none", "--out", "here"]
    )
    assert (config.eps, config.data, config.weights, config.epochs, out) == (0.5, "somewhere", None, 60, "here")


class TestMistakes:
    def refused(self, capsys, words, *expected, command=train_command):
        with pytest.raises(SystemExit) as stop:
            command([str(word) for word in words])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in said
        for text in expected:
            assert text in said, said

    def test_unknown_recipe(self, capsys):
        with pytest.raises(ValueError, match="did you mean 'market1501'"):
            named_recipe(["market"])
        self.refused(capsys, ["marketing"], "error: no recipe is called 'marketing'", "dukemtmc")

    def test_unknown_field(self, capsys):
        self.refused(capsys, ["tiny", "--epsilon", "0.5"], "epsilon")

    def test_bad_values_all_at_once(self, capsys):
        self.refused(capsys, ["tiny", "--epochs", "0", "--labels", "guess"], "epochs", "choose one of clusters, truth")

    def test_wrong_root(self, capsys, tmp_path):
        (tmp_path / "holiday.jpg").write_text("")
        self.refused(
            capsys, ["market1501", "--data", tmp_path, "--weights", "none"], "bounding_box_train", "holiday.jpg"
        )

    def test_missing_weights(self, capsys, tmp_path):
        self.refused(capsys, [*SHORT, "--weights", tmp_path / "none.pth", "--out", tmp_path / "run"], "none.pth")
        assert not (tmp_path / "run").exists()

    def test_existing_folder(self, capsys, run):
        self.refused(capsys, [*SHORT, "--out", run[0]], "--resume")

    def test_resume_with_a_recipe_or_other_settings(self, capsys, run):
        self.refused(capsys, ["tiny", "--resume", run[0]], "leave out the recipe")
        self.refused(capsys, ["--resume", run[0], "--eps", "0.1"], "eps", "start a new run")

    def test_resume_of_nothing(self, capsys, tmp_path):
        self.refused(capsys, ["--resume", tmp_path / "nowhere"], "nowhere", "no such folder")

    def test_eval_of_nothing(self, capsys, tmp_path):
        self.refused(capsys, [tmp_path], "config.json", command=eval_command)

    def test_eval_elsewhere_needs_a_root(self, capsys, run):
        self.refused(capsys, [run[0], "--dataset", "dukemtmc"], "AFFSCL_DATA", command=eval_command)


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("AFFSCL_DEBUG", "1")
    with pytest.raises(ValueError):
        train_command(["marketing"])


def test_config_on_disk_is_the_config_that_ran(run):
    values = json.loads((run[0] / "config.json").read_text())
    assert values["world_ids"] == 24 and values["recipe"] == "tiny"


def test_a_strangers_run_does_not_choose_where_files_go(tmp_path):
    from affscl.training.cli import EvalArguments, eval_config
    from affscl.training.runs import write_config

    there = str(tmp_path / "there")
    write_config(tmp_path / "run", replace(RECIPES["tiny"], cache=there, data=there))
    config = eval_config(EvalArguments(str(tmp_path / "run")))
    assert config.cache is None and config.data is None
    config = eval_config(EvalArguments(str(tmp_path / "run"), cache=str(tmp_path), data=str(tmp_path)))
    assert config.cache == config.data == str(tmp_path)
