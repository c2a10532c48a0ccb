"""Many runs: planned, continued, refused with other settings, kept as lines of a CSV file."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from pretended import TINY, pretend

from affscl.studies import sweeps
from affscl.studies.sweeps import (
    COLUMNS,
    Run,
    check_record,
    finish_run,
    plan,
    read_results,
    result_of,
    run_study,
    study_path,
    study_record,
)


@pytest.mark.filterwarnings("error")
class TestRunning:
    def test_rows_hold_last_and_best_epoch(self, tmp_path):
        rows, failed = run_study("table6", TINY, [1, 2], tmp_path, finish=pretend())
        assert failed == {} and rows == read_results(study_path("table6", tmp_path))
        assert [(r["setting"], r["seed"]) for r in rows] == [(k, s) for k in ("2", "4", "8") for s in (1, 2)]
        assert (rows[0]["mAP"], rows[0]["best_mAP"], rows[0]["best_epoch"], rows[0]["clusters"], rows[0]["ari"]) == (
            0.51,
            0.53,
            1,
            7,
            None,
        )

    def test_finished_pairs_are_skipped(self, tmp_path, capsys):
        run_study("table6", TINY, [1], tmp_path, finish=pretend())
        assert "the first run will tell" in capsys.readouterr().out
        again = pretend()
        rows, _ = run_study("table6", TINY, [1, 2], tmp_path, finish=again)
        assert again.calls == [("2", 2), ("4", 2), ("8", 2)] and len(rows) == 6
        assert "6 runs, 3 of them finished; about" in capsys.readouterr().out

    def test_an_interrupted_study_goes_on(self, tmp_path):
        first = pretend()

        def stops(run, folder):
            if len(first.calls) == 2:
                raise KeyboardInterrupt
            return first(run, folder)

        with pytest.raises(KeyboardInterrupt):
            run_study("table6", TINY, [1], tmp_path, finish=stops)
        again = pretend()
        rows, _ = run_study("table6", TINY, [1], tmp_path, finish=again)
        assert again.calls == [("8", 1)] and len(rows) == 3

    def test_a_failed_run_does_not_stop_the_others(self, tmp_path, capsys):
        rows, failed = run_study("table6", TINY, [1, 2], tmp_path, finish=pretend(fail={("4", 1)}))
        assert len(rows) == 5 and failed == {"4, seed 1": "RuntimeError: out of memory"}
        again = pretend()
        run_study("table6", TINY, [1, 2], tmp_path, finish=again)
        assert again.calls == [("4", 1)]

    def test_time_is_said_from_finished_runs(self):
        assert sweeps.time_left([{"seconds": 10}, {"seconds": 30}], 3) == "about 60 s left, measured on 2 finished runs"

    def test_other_settings_are_refused(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, finish=pretend())
        run_study("table6", replace(TINY, device="cuda", seed=9, workers=3), [1], tmp_path, finish=pretend())
        with pytest.raises(
            ValueError, match=r"other settings \(epochs = 3 there, 5 here; eps = 0.6 there, 0.5 here|eps = 0.6 there"
        ):
            run_study("table6", replace(TINY, epochs=5, eps=0.5), [1], tmp_path, finish=pretend())
        study_path("table6", tmp_path).with_suffix(".json").unlink()
        with pytest.raises(ValueError, match="no ablation_table6.json beside it"):
            run_study("table6", TINY, [1], tmp_path, finish=pretend())

    def test_other_rows_are_refused(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, finish=pretend())
        record = study_path("table6", tmp_path).with_suffix(".json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"setting 8": {"k": 9}}))
        with pytest.raises(ValueError, match="setting 8"):
            check_record(study_path("table6", tmp_path), study_record("table6", TINY))

    def test_a_field_newer_than_the_file_had_its_default(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, finish=pretend())
        record = study_path("table6", tmp_path).with_suffix(".json")
        found = json.loads(record.read_text())
        found.pop("hard_start")
        record.write_text(json.dumps(found))
        check_record(study_path("table6", tmp_path), study_record("table6", TINY))
        with pytest.raises(ValueError, match="hard_start = 'mean' there, 'hardest' here"):
            check_record(study_path("table6", tmp_path), study_record("table6", replace(TINY, hard_start="hardest")))

    def test_a_line_newer_than_the_file_is_run_as_well(self, tmp_path):
        run_study("table6", TINY, [1], tmp_path, finish=pretend(), only=("2", "4"))
        record = study_path("table6", tmp_path).with_suffix(".json")
        found = json.loads(record.read_text())
        found.pop("setting 8")
        record.write_text(json.dumps(found))
        again = pretend()
        run_study("table6", TINY, [1], tmp_path, finish=again)
        assert again.calls == [("8", 1)] and "setting 8" in json.loads(record.read_text())

    def test_another_csv_is_refused(self, tmp_path):
        path = tmp_path / "x.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="found a, b"):
            read_results(path)
        assert read_results(tmp_path / "none.csv") == []

    def test_some_rows_only(self, tmp_path):
        assert [run.setting for run in plan("table4", TINY, [1, 2], ("total", "baseline"))] == ["baseline", "total"] * 2
        with pytest.raises(ValueError, match="no setting 'totl': choose among 'baseline', 'mean only'"):
            plan("table4", TINY, [1], ("totl",))
        run_study("table4", TINY, [1], tmp_path, finish=pretend(), only=("total",))
        rows, _ = run_study("table4", TINY, [1], tmp_path, finish=pretend(), only=("baseline",))
        assert [row["setting"] for row in rows] == ["baseline", "total"], (
            "in the order of the table, whatever came first"
        )


class TestFinishRun:
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
        finish_run(Run("total", 1, TINY), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        finish_run(Run("total", 1, TINY), tmp_path / "run", keep=True)
        assert (tmp_path / "run" / "config.json").exists()
        assert fake_train == ["out", "out"]

    def test_an_unfinished_run_is_continued(self, tmp_path, fake_train):
        finish_run(Run("total", 1, TINY), tmp_path / "run", keep=True)
        finish_run(Run("total", 1, TINY), tmp_path / "run")
        assert fake_train == ["out", "resume"]

    def test_but_not_another_run(self, tmp_path, fake_train):
        finish_run(Run("total", 1, TINY), tmp_path / "run", keep=True)
        with pytest.raises(ValueError, match="other settings: move it away"):
            finish_run(Run("total", 1, replace(TINY, eps=0.5)), tmp_path / "run")

    def test_a_run_without_a_state_begins_anew(self, tmp_path, fake_train):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        finish_run(Run("total", 1, TINY), tmp_path / "run")
        assert fake_train == ["out"]


class TestRows:
    def test_a_file_older_than_a_column_is_read(self, tmp_path):
        rows, _ = run_study("table5", TINY, [1], tmp_path, finish=pretend())
        path, dropped = study_path("table5", tmp_path), COLUMNS.index("mixed_mAP")
        lines = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text(
            "\n".join(",".join(cell for i, cell in enumerate(line) if i != dropped) for line in lines) + "\n"
        )
        assert read_results(path) == [row | {"mixed_mAP": None} for row in rows]

    def test_seconds_are_those_of_all_stages_also_of_a_continued_run(self):
        history = [
            {"epoch": 0, "mAP": 0.1, "rank1": 0.1, "seconds": {"evaluate": 2}},
            {"epoch": 1, "mAP": 0.2, "rank1": 0.2, "seconds": {"train": 3, "evaluate": 1.5}},
        ]
        assert result_of(Run("total", 1, TINY), history)["seconds"] == 6.5
