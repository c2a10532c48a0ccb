"""Studies: what varies, what is refused, what is compared, and that they go on where they stopped."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from affscl.model.network import USELESS_WITHOUT_PARTS
from affscl.studies import ablation, sweeps
from affscl.studies.ablation import ablate_command, draw, markdown_table, parse_ablate
from affscl.studies.statistics import compare, mean_sd
from affscl.studies.sweeps import (
    COLUMNS,
    Run,
    check_settings,
    identity,
    measure,
    plan,
    read_rows,
    result_row,
    run_study,
    study_path,
)
from affscl.studies.tables import STEPS, STUDIES
from affscl.training.config import BEST, RECIPES, AdaptationOptions

TINY = RECIPES["tiny"]
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


def pretend(score=lambda run: 0.5 + run.seed / 100, fail=()):
    """A stand-in for `measure` that remembers its runs."""
    calls = []

    def call(run, folder, keep):
        calls.append((run.setting, run.seed))
        if (run.setting, run.seed) in fail:
            raise RuntimeError("out of memory")
        best = {"epoch": 1, "mAP": score(run) + 0.02, "rank1": 0.9}
        return [
            {"epoch": 0, "mAP": 0.1, "rank1": 0.2},
            best,
            {
                "epoch": 2,
                "mAP": score(run),
                "rank1": 0.8,
                "mixed_mAP": 0.8 * score(run),
                "clusters": 7,
                "outlier_share": 0.25,
            },
        ]

    call.calls = calls
    return call


def rows_of(**scores):
    return [
        {"setting": name, "seed": seed, "mAP": x, "rank1": x}
        for name, xs in scores.items()
        for seed, x in enumerate(xs)
    ]


def recipe_for(study, recipe="tiny"):
    """A recipe, with a source where the study needs one."""
    if study in ("table4", "table7"):  # a baseline without a memory has no rivals to choose
        return replace(RECIPES[recipe], negatives="all")
    if study != "table3":
        return RECIPES[recipe]
    return replace(RECIPES[recipe], labels="clusters", source="msmt17" if recipe != "msmt17" else "market1501")


class TestStudies:
    @pytest.mark.parametrize("study", STUDIES)
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_only_what_is_studied_changes(self, study, recipe):
        source = {f.name for f in fields(AdaptationOptions)}
        supervised = {"labels", "criterion", "hard_weight", "mean_weight", "balance", "parts", *USELESS_WITHOUT_PARTS}
        allowed = {
            "table3": source,
            "table7": supervised,
            "field": {"criterion", "hard_weight", "mean_weight", "balance", *BEST},
            "path": {"criterion", "hard_weight", "mean_weight", "balance", *BEST},
            "table4": {"criterion", "hard_weight", "mean_weight", "balance"},
            "table5": {"criterion", "hard_weight", "mean_weight"},
            "table6": {"k"},
            "figure4": {"eps"},
        }[study]
        config = recipe_for(study, recipe)
        base = asdict(config)
        for run in plan(study, config, [3]):
            assert {key for key, value in asdict(run.config).items() if value != base[key]} <= allowed | {"seed"}
            assert run.config.seed == 3

    def test_rows_of_a_study_differ_from_each_other(self):
        for study in STUDIES:
            configs = [json.dumps(asdict(run.config)) for run in plan(study, recipe_for(study), [1])]
            assert len(set(configs)) == len(configs)

    def test_table4_is_run_both_ways(self):
        changes = {s.name: s.changes for s in STUDIES["table4"].settings(TINY)}
        assert changes["baseline"]["criterion"] == "cross_entropy_triplet"
        assert (changes["mean only"]["criterion"], changes["hard only"]["criterion"]) == ("mean", "hard")
        for name, weights in (
            ("mean only, L_b", (0, 1)),
            ("hard only, L_b", (1, 0)),
            ("total", (0.75, 0.25)),
            ("total without L_b", (0.75, 0.25)),
        ):
            assert changes[name]["criterion"] == "symmetric"
            assert (changes[name]["hard_weight"], changes[name]["mean_weight"]) == weights
            assert (changes[name]["balance"] == "off") == (name == "total without L_b")

    def test_the_papers_numbers_agree_where_the_tables_meet(self):
        paper = {
            study: {s.name: (s.mAP, s.rank1) for s in STUDIES[study].settings(recipe_for(study, "market1501"))}
            for study in STUDIES
        }
        assert (
            paper["table4"]["total"]
            == paper["table5"]["0.75"]
            == paper["table6"]["8"]
            == paper["figure4"]["0.65"]
            == (78.8, 90.9)
        )
        assert (
            paper["table4"]["mean only, L_b"] == paper["table5"]["0"]
            and paper["table4"]["hard only, L_b"] == paper["table5"]["1"]
        )
        assert [paper["table4"][name][0] for name in ("baseline", "mean only", "hard only")] == [55.8, 70.6, 76.3]
        assert paper["table4"]["total without L_b"] == (None, None)

    def test_table3_and_table7_carry_the_papers_numbers(self):
        def paper(source, target):
            return {s.name: s.mAP for s in STUDIES["table3"].settings(replace(RECIPES[target], source=source))}

        assert (
            paper("dukemtmc", "market1501")["joint"] == 77.7 and paper("dukemtmc", "market1501")["target only"] == 78.8
        )
        assert (
            paper("market1501", "dukemtmc")["joint"] == 66.5 and paper("market1501", "dukemtmc")["target only"] == 68.6
        )
        assert paper("msmt17", "market1501")["joint"] is None
        assert [(s.name, s.mAP) for s in STUDIES["table7"].settings(TINY)] == [
            ("baseline", 81.7),
            ("+ L", 86.8),
            ("+ G", 87.4),
            ("+ AFF", 88.2),
        ]

    def test_a_recipe_that_contradicts_a_row_is_refused_before_anything_is_trained(self):
        with pytest.raises(ValueError, match="leave negatives at 'all'"):
            plan("table4", RECIPES["best"], [1])

    def test_the_path_adds_one_step_a_row_and_ends_at_best(self):
        rows = [asdict(run.config) for run in plan("path", RECIPES["small"], [1])]
        for before, after, names in zip(rows, rows[1:], STEPS.values()):
            assert {key for key in after if after[key] != before[key]} <= set(names)
        last = plan("field", RECIPES["small"], [1])[-1]
        assert last.setting == "best" and rows[-1] == asdict(last.config)
        assert replace(last.config, recipe="best", epochs=6) == RECIPES["best"]

    def test_table3_wants_a_source(self):
        with pytest.raises(ValueError, match="name one with --source"):
            plan("table3", TINY, [1])
        arguments, config = parse_ablate(["table3", "--source", "synthetic"])
        assert config.source == "synthetic"
        with pytest.raises(ValueError, match="table3 sets adapt itself"):
            parse_ablate(["table3", "--source", "synthetic", "--adapt", "pretrain"])

    def test_some_rows_only(self, tmp_path):
        assert [run.setting for run in plan("table4", TINY, [1, 2], ("total", "baseline"))] == ["baseline", "total"] * 2
        with pytest.raises(ValueError, match="no setting 'totl': choose among 'baseline', 'mean only'"):
            plan("table4", TINY, [1], ("totl",))
        run_study("table4", TINY, [1], tmp_path, measure=pretend(), only=("total",))
        rows, _ = run_study("table4", TINY, [1], tmp_path, measure=pretend(), only=("baseline",))
        assert [row["setting"] for row in rows] == ["baseline", "total"], (
            "in the order of the table, whatever came first"
        )

    def test_weights_sum_to_one(self):
        assert all(s.changes["hard_weight"] + s.changes["mean_weight"] == 1 for s in STUDIES["table5"].settings(TINY))

    def test_table6_is_relative_to_the_recipe(self):
        assert [s.changes["k"] for s in STUDIES["table6"].settings(RECIPES["market1501"])] == [4, 8, 16]
        assert [s.changes["k"] for s in STUDIES["table6"].settings(replace(TINY, k=6))] == [3, 6, 12]
        with pytest.raises(ValueError, match="even, found 5"):
            plan("table6", replace(TINY, k=5), [1])

    def test_plan_goes_seed_by_seed_and_repeats_none(self):
        runs = plan("table6", TINY, [2, 1, 2])
        assert [(r.setting, r.seed) for r in runs] == [(k, seed) for seed in (2, 1) for k in ("2", "4", "8")]

    def test_a_setting_that_cannot_work_is_told_at_once(self):
        with pytest.raises(ValueError, match="hard_start"):
            plan("table4", replace(TINY, hard_start="hardest"), [1])


class TestComparison:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
    def test_is_the_paired_t_interval(self, pairs):
        a, b = zip(*pairs)
        if np.ptp(np.subtract(a, b)) < 1e-6:
            return
        low, high = ttest_rel(a, b).confidence_interval(0.95)
        found = compare(rows_of(a=a, b=b), "a", "b")
        assert np.allclose(
            [found.mean - found.half_width, found.mean + found.half_width], [100 * low, 100 * high], atol=1e-6
        )
        assert found.verdict == ("holds" if low > 0 else "reversed" if high < 0 else "open")

    def test_by_hand(self):
        found = compare(rows_of(a=[0.52, 0.53, 0.54], b=[0.50, 0.52, 0.51]), "a", "b")
        assert found.mean == pytest.approx(2) and found.wins == found.seeds == 3
        assert found.half_width == pytest.approx(4.3026527 / 3**0.5)
        assert found.verdict == "open" and "open (+2.0 ± 2.5 points, better with 3 of 3 seeds)" in str(found)

    def test_verdicts(self):
        rows = rows_of(a=[0.6, 0.61, 0.62], b=[0.5, 0.51, 0.521])
        assert (compare(rows, "a", "b").verdict, compare(rows, "b", "a").verdict) == ("holds", "reversed")

    def test_pairs_are_seeds_that_both_have(self):
        rows = [
            {"setting": "a", "seed": 1, "mAP": 0.5},
            {"setting": "a", "seed": 2, "mAP": 0.9},
            {"setting": "b", "seed": 1, "mAP": 0.4},
        ]
        found = compare(rows, "a", "b")
        assert (found.seeds, found.verdict) == (1, "open") and found.mean == pytest.approx(10)
        with pytest.raises(ValueError, match="share no seed"):
            compare(rows[1:], "a", "b")

    def test_mean_and_deviation(self):
        assert mean_sd([0.5, 0.52, 0.54]) == "52.0 ± 2.0"
        assert (mean_sd([0.5]), mean_sd([])) == ("50.0", "-")


@pytest.mark.filterwarnings("error")
class TestRunning:
    def test_rows_hold_last_and_best_epoch(self, tmp_path):
        rows, failed = run_study("table6", TINY, [1, 2], tmp_path, measure=pretend())
        assert failed == {} and rows == read_rows(study_path("table6", tmp_path))
        assert [(r["setting"], r["seed"]) for r in rows] == [(k, s) for k in ("2", "4", "8") for s in (1, 2)]
        assert (rows[0]["mAP"], rows[0]["best_mAP"], rows[0]["best_epoch"], rows[0]["clusters"], rows[0]["ari"]) == (
            0.51,
            0.53,
            1,
            7,
            None,
        )

    def test_finished_pairs_are_skipped(self, tmp_path, capsys):
        run_study("table6", TINY, [1], tmp_path, measure=pretend())
        assert "the first run will tell" in capsys.readouterr().out
        again = pretend()
        rows, _ = run_study("table6", TINY, [1, 2], tmp_path, measure=again)
        assert again.calls == [("2", 2), ("4", 2), ("8", 2)] and len(rows) == 6
        assert "6 runs, 3 of them finished; about" in capsys.readouterr().out

    def test_an_interrupted_study_goes_on(self, tmp_path):
        first = pretend()

        def stops(run, folder, keep):
            if len(first.calls) == 2:
                raise KeyboardInterrupt
            return first(run, folder, keep)

        with pytest.raises(KeyboardInterrupt):
            run_study("table6", TINY, [1], tmp_path, measure=stops)
        again = pretend()
        rows, _ = run_study("table6", TINY, [1], tmp_path, measure=again)
        assert again.calls == [("8", 1)] and len(rows) == 3

    def test_a_failed_run_does_not_stop_the_others(self, tmp_path, capsys):
        rows, failed = run_study("table6", TINY, [1, 2], tmp_path, measure=pretend(fail={("4", 1)}))
        assert len(rows) == 5 and failed == {"4, seed 1": "RuntimeError: out of memory"}
        again = pretend()
        run_study("table6", TINY, [1, 2], tmp_path, measure=again)
        assert again.calls == [("4", 1)]

    def test_time_is_said_from_finished_runs(self):
        assert sweeps.time_left([{"seconds": 10}, {"seconds": 30}], 3) == "about 60 s left, measured on 2 finished runs"

    def test_other_settings_are_refused(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, measure=pretend())
        run_study("table6", replace(TINY, device="cuda", seed=9, workers=3), [1], tmp_path, measure=pretend())
        with pytest.raises(
            ValueError, match=r"other settings \(epochs = 3 there, 5 here; eps = 0.6 there, 0.5 here|eps = 0.6 there"
        ):
            run_study("table6", replace(TINY, epochs=5, eps=0.5), [1], tmp_path, measure=pretend())
        study_path("table6", tmp_path).with_suffix(".json").unlink()
        with pytest.raises(ValueError, match="no ablation_table6.json beside it"):
            run_study("table6", TINY, [1], tmp_path, measure=pretend())

    def test_other_rows_are_refused(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, measure=pretend())
        record = study_path("table6", tmp_path).with_suffix(".json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"setting 8": {"k": 9}}))
        with pytest.raises(ValueError, match="setting 8"):
            check_settings(study_path("table6", tmp_path), identity("table6", TINY))

    def test_a_field_newer_than_the_file_had_its_default(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, measure=pretend())
        record = study_path("table6", tmp_path).with_suffix(".json")
        found = json.loads(record.read_text())
        found.pop("hard_start")
        record.write_text(json.dumps(found))
        check_settings(study_path("table6", tmp_path), identity("table6", TINY))
        with pytest.raises(ValueError, match="hard_start = 'mean' there, 'hardest' here"):
            check_settings(study_path("table6", tmp_path), identity("table6", replace(TINY, hard_start="hardest")))

    def test_another_csv_is_refused(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="found a, b"):
            read_rows(path)
        assert read_rows(tmp_path / "none.csv") == []


class TestMeasure:
    @pytest.fixture
    def fake_train(self, monkeypatch):
        """A `train` that leaves a folder, or continues one."""
        calls = []

        def train(config, out=None, resume=None):
            calls.append("resume" if resume else "out")
            folder = resume or out
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(asdict(config)))
            (folder / "resume.safetensors").write_text("")
            return SimpleNamespace(history=[{"epoch": 0}])

        monkeypatch.setattr(sweeps, "train", train)
        return calls

    def test_the_folder_goes_unless_kept(self, tmp_path, fake_train):
        measure(Run("total", 1, TINY), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        measure(Run("total", 1, TINY), tmp_path / "run", keep=True)
        assert (tmp_path / "run" / "config.json").exists()
        assert fake_train == ["out", "out"]

    def test_an_unfinished_run_is_continued(self, tmp_path, fake_train):
        measure(Run("total", 1, TINY), tmp_path / "run", keep=True)
        measure(Run("total", 1, TINY), tmp_path / "run")
        assert fake_train == ["out", "resume"]

    def test_but_not_another_run(self, tmp_path, fake_train):
        measure(Run("total", 1, TINY), tmp_path / "run", keep=True)
        with pytest.raises(ValueError, match="other settings: move it away"):
            measure(Run("total", 1, replace(TINY, eps=0.5)), tmp_path / "run")

    def test_a_run_without_a_state_begins_anew(self, tmp_path, fake_train):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        measure(Run("total", 1, TINY), tmp_path / "run")
        assert fake_train == ["out"]


class TestRows:
    def test_a_file_older_than_a_column_is_read(self, tmp_path):
        rows, _ = run_study("table5", TINY, [1], tmp_path, measure=pretend())
        path, dropped = study_path("table5", tmp_path), COLUMNS.index("mixed_mAP")
        lines = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text(
            "\n".join(",".join(cell for i, cell in enumerate(line) if i != dropped) for line in lines) + "\n"
        )
        assert read_rows(path) == [row | {"mixed_mAP": None} for row in rows]

    def test_seconds_are_those_of_all_stages_also_of_a_continued_run(self):
        history = [
            {"epoch": 0, "mAP": 0.1, "rank1": 0.1, "seconds": {"evaluate": 2}},
            {"epoch": 1, "mAP": 0.2, "rank1": 0.2, "seconds": {"train": 3, "evaluate": 1.5}},
        ]
        assert result_row(Run("total", 1, TINY), history)["seconds"] == 6.5


class TestReport:
    def test_table_has_both_columns_and_dashes(self, tmp_path):
        rows, _ = run_study(
            "table4", TINY, [1, 2, 3], tmp_path, measure=pretend(fail={("total", s) for s in (1, 2, 3)})
        )
        table = markdown_table("table4", TINY, rows).splitlines()
        assert "| baseline | 55.8 | 75.3 | 52.0 ± 1.0 | 80.0 ± 0.0 | 41.6 ± 0.8 | 54.0 ± 1.0 | 3 |" in table
        assert "| total | 78.8 | 90.9 | - | - | - | - | 0 |" in table
        assert any(line.startswith("| total without L_b | - | - | 52.0") for line in table)

    @pytest.mark.parametrize("study", STUDIES)
    def test_figures_show_every_seed(self, study, tmp_path):
        config = recipe_for(study)
        rows, _ = run_study(study, config, [1, 2], tmp_path, measure=pretend())
        figure = draw(study, config, rows)
        points = np.concatenate(
            [line.get_xdata() if study != "figure4" else line.get_ydata() for line in figure.axes[0].lines]
        )
        assert {51.0, 52.0} <= set(np.round(np.asarray(points, float), 6))
        figure.savefig(tmp_path / "f.png")


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
        monkeypatch.setattr(ablation, "run_study", lambda *a, **k: run_study(*a, measure=stand_in, **k))
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
        rows, text = read_rows(path), path.read_text()
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
