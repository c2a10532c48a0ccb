"""The table, the picture and the command `affscl-ablate`."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pretended import TINY, pretend, recipe_for

from affscl.studies import ablation
from affscl.studies.ablation import ablate_command, draw, markdown_table, parse_ablate
from affscl.studies.catalogue import STUDIES
from affscl.studies.sweeps import COLUMNS, plan, read_results, run_study, study_path
from affscl.training.config import RECIPES

SMALL = [
    "--world-ids",
    "24",
    "--world-cams",
    "3",
    "--iterations",
    "2",
    "--epochs",
    "1",
    "--k1",
    "8",
    "--p",
    "4",
    "--device",
    "cpu",
]


class TestReport:
    def test_table_has_both_columns_and_dashes(self, tmp_path):
        rows, _ = run_study("table4", TINY, [1, 2, 3], tmp_path, finish=pretend(fail={("total", s) for s in (1, 2, 3)}))
        table = markdown_table("table4", TINY, rows).splitlines()
        assert "| baseline | 55.8 | 75.3 | 52.0 ± 1.0 | 80.0 ± 0.0 | 41.6 ± 0.8 | 54.0 ± 1.0 | 3 |" in table
        assert "| total | 78.8 | 90.9 | - | - | - | - | 0 |" in table
        assert any(line.startswith("| total without L_b | - | - | 52.0") for line in table)

    @pytest.mark.parametrize("study", STUDIES)
    def test_figures_show_every_seed(self, study, tmp_path):
        config = recipe_for(study)
        rows, _ = run_study(study, config, [1, 2], tmp_path, finish=pretend())
        figure = draw(study, config, rows)
        points = np.concatenate(
            [line.get_xdata() if study != "figure4" else line.get_ydata() for line in figure.axes[0].lines]
        )
        assert {51.0, 52.0} <= set(np.round(np.asarray(points, float), 6))
        figure.savefig(tmp_path / "f.png")

    def test_methods_are_compared_by_their_seconds_too(self, tmp_path, capsys):
        rows, _ = run_study("table2", TINY, [1, 2], tmp_path, only=["HHCL", "true labels"], finish=pretend())
        rows = [run | {"seconds": 10.0 * run["seed"]} for run in rows]
        table = markdown_table("table2", TINY, rows)
        assert "| seconds | seeds |" in table and "published mAP" in table
        assert "| 15 | 2 |" in table.split("| HHCL |")[1] and "| - | 0 |" in table.split("| AFF_SCL |")[1]
        ablation.write_study("table2", TINY, rows, str(tmp_path))
        assert (tmp_path / "ablation_table2_seconds.png").exists()
        (ax,) = ablation.against_seconds(rows, STUDIES["table2"].settings(TINY), "true labels").axes
        assert {tuple(line.get_xdata()) for line in ax.lines} >= {(10.0, 20.0), (15.0,)}


class TestCommand:
    def refused(self, capsys, words, *expected):
        with pytest.raises(SystemExit) as stop:
            ablate_command([str(word) for word in words])
        said = capsys.readouterr()
        assert stop.value.code not in (0, None)
        for text in expected:
            assert text in said.err, said.err
        return said

    def test_words(self):
        arguments, config = parse_ablate(
            ["table5", "--recipe", "quick", "--seeds", "4", "5", "--balance", "off", "--weights", "none", "--out", "x"]
        )
        assert (arguments.study, arguments.seeds, arguments.out, arguments.keep) == ("table5", (4, 5), "x", False)
        assert config == replace(RECIPES["quick"], balance="off", weights=None)
        arguments, config = parse_ablate(["table4"])
        assert (arguments.seeds, config) == ((1, 2, 3), TINY)
        assert parse_ablate(["table6", "--recipe=small", "--k", "6"])[1] == replace(RECIPES["small"], k=6)

    def test_what_the_study_varies_cannot_be_given(self):
        for words in (["figure4", "--eps", "0.5"], ["table5", "--hard-weight", "0.5"], ["table4", "--balance", "off"]):
            with pytest.raises(ValueError, match=f"{words[0]} sets {words[1][2:].replace('-', '_')} itself"):
                parse_ablate(words)

    def test_mistakes(self, capsys, tmp_path):
        self.refused(capsys, ["table9"], "table4")
        self.refused(capsys, [])
        self.refused(capsys, ["table4", "--recipe", "tin"], "did you mean 'tiny'")
        self.refused(capsys, ["table4", "--seed", "3"])
        self.refused(
            capsys,
            ["table4", "--recipe", "small", "--data", tmp_path / "nowhere", "--out", tmp_path / "out"],
            "nowhere",
        )
        assert not (tmp_path / "out").exists()

    def test_several_processes_are_refused(self, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        self.refused(capsys, ["table6", *SMALL, "--out", tmp_path], "one process")

    def test_a_failed_run_is_named_at_the_end(self, capsys, monkeypatch, tmp_path):
        stand_in = pretend(fail={("4", 1)})
        monkeypatch.setattr(ablation, "run_study", lambda *a, **k: run_study(*a[:5], stand_in))
        said = self.refused(
            capsys,
            ["table6", *SMALL, "--seeds", "1", "--out", tmp_path],
            "these runs failed",
            "4, seed 1: RuntimeError: out of memory",
        )
        assert (
            "| 8 | 79.6 |" in said.out
            and (tmp_path / "ablation_table6.md").exists()
            and (tmp_path / "ablation_table6.png").exists()
        )

    def test_ctrl_c(self, capsys, monkeypatch, tmp_path):
        def stops(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(ablation, "run_study", stops)
        with pytest.raises(SystemExit) as stop:
            ablate_command(["table6", *SMALL, "--out", str(tmp_path)])
        assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().out

    def test_a_real_study_and_its_resumption(self, tmp_path, capsys):
        words = ["table6", *SMALL, "--seeds", "1", "--out", str(tmp_path)]
        ablate_command(words)
        path = study_path("table6", tmp_path)
        rows, text = read_results(path), path.read_text()
        assert text.splitlines()[0] == ",".join(COLUMNS) and [r["setting"] for r in rows] == ["2", "4", "8"]
        assert all(
            0 <= r["mAP"] <= 1 and r["clusters"] >= 2 and r["seconds"] > 0 and r["best_mAP"] >= r["mAP"] for r in rows
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            f"ablation_table6.{end}" for end in ("csv", "json", "md", "png")
        ]
        assert "epoch" not in capsys.readouterr().out.split("**table6")[0], "what a run prints is hidden"
        ablate_command([*words, "--keep"])
        assert path.read_text() == text and not (tmp_path / "runs").exists()


def test_importing_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-c", "import affscl.studies.ablation, sys; print('matplotlib.pyplot' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr


RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "README.md"
DOCUMENTED = re.findall(r"`(?:OMP_NUM_THREADS=1 )?affscl-ablate ([^`]*)`", RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", [words for words in DOCUMENTED if "STUDY" not in words and "..." not in words])
def test_the_commands_of_the_committed_results_are_accepted(words):
    arguments, config = parse_ablate(shlex.split(words))
    assert arguments.study in STUDIES and config.k1 in (30, 10, 8, "auto")


def test_what_best_sets_for_itself_its_rivals_may_be_told():
    runs = plan("cameras", parse_ablate(["cameras", "--recipe", "small", "--k1", "30"])[1], [1])
    assert {run.setting: run.config.k1 for run in runs if "best" not in run.setting} == dict.fromkeys(
        ("AFF_SCL, both", "Cluster Contrast, both", "HHCL, both"), 30
    )
    assert {run.config.k1 for run in runs if "best" in run.setting} == {10, "auto"}
    with pytest.raises(ValueError, match="cameras sets lr itself"):
        parse_ablate(["cameras", "--recipe", "small", "--lr", "0.001"])
