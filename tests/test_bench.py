"""The command `affscl-bench`: every stage at toy size, its table, its JSON and CSV files.

No speed is asserted here: `affscl-bench` measures it.
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from affscl.studies import bench
from affscl.studies.bench import STAGES, Stage, bench_command, run_stage, scaling, table, table_line, write_report
from affscl.studies.measuring import Measurement

ROOT = Path(__file__).resolve().parent.parent


class TestTable:
    def test_lines(self):
        def line(*values, **named):
            each = Measurement("speed", *values, **named)
            return table_line("row", each._asdict() | {"ratio": each.ratio})

        assert line(5, "s").split() == ["row", "speed", "5", "s"]
        assert line(5, "s", 4).split() == ["row", "speed", "5", "s", "<=", "4", "1.25", "NOT", "KEPT"]
        assert line(2500.4, "x", 2000, True).split() == ["row", "speed", "2,500", "x", ">=", "2,000", "0.80", "kept"]
        assert "nan" in line(math.nan, "MB", 400) and "NOT KEPT" in line(math.nan, "MB", 400)


class TestStages:
    @pytest.mark.parametrize("name", STAGES)
    def test_every_stage_runs(self, name):
        result = run_stage(STAGES[name], small=True)
        assert "error" not in result, result
        assert all(isinstance(f["value"], float | int) or np.isscalar(f["value"]) for f in result["figures"])
        assert any(f["limit"] is not None for f in result["figures"])

    def test_limits_are_those_promised(self):
        """The figures that issues promised; a limit may be tightened, not loosened in passing."""
        promised = {
            "labels": {1.35, 1.1, 99.99, 400, 100},
            "scale": {3000, 1.1},
            "evaluation": {0.4, 100},
            "step": {1.10, 2},
            "input": {2000, 1.7, 3},
            "extraction": {1.05},
            "precision": {3},
        }
        for name, limits in promised.items():
            report = json.loads((ROOT / "nbs" / "results" / "bench.json").read_text())["rows"][name]
            assert {f["limit"] for f in report["figures"]} - {None} == limits

    def test_what_must_be_equal_is_equal_even_at_toy_size(self):
        for name in "labels", "evaluation":
            equal = [
                f for f in run_stage(STAGES[name], small=True)["figures"] if f["unit"] == "%" and f["limit"] == 100
            ]
            assert equal and all(f["value"] == 100 for f in equal)

    def test_a_stage_that_fails_costs_no_other(self, monkeypatch, capsys):
        def failing():
            torch.set_flush_denormal(True)
            raise MemoryError("no room")

        monkeypatch.setitem(STAGES, "broken", Stage(failing, 1, {}))
        report = bench.bench(("broken", "evaluation"), small=True)
        assert report["rows"]["broken"]["error"] == "MemoryError: no room"
        assert report["rows"]["evaluation"]["figures"]
        assert torch.tensor(1e-39).mul(1).item() != 0, "the switch for denormals is put back"
        text = table(report)
        assert "MemoryError: no room" in text and "scoring / one full argsort" in text and "toy sizes" in text

    def test_says_beforehand_how_long_and_whether_the_machine_is_busy(self, monkeypatch, capsys):
        monkeypatch.setitem(STAGES, "long", Stage(lambda: [Measurement("a", 1)], 300, {}))
        monkeypatch.setattr(bench, "machine", lambda: {"cpu": "x", "cores": 2, "threads": 2, "torch": "2", "load": 3.5})
        bench.bench(("long",))
        said = capsys.readouterr().out.splitlines()
        assert "about 5 minutes" in said[0] and "busy (load 3.5)" in said[1]


class TestCommand:
    def test_table_and_json(self, tmp_path, capsys):
        bench_command(["evaluation", "--small", "--out", str(tmp_path / "bench.json")])
        out = capsys.readouterr().out
        assert "scoring / one full argsort" in out and "<= 0.4" in out and torch.__version__ in out
        written = json.loads((tmp_path / "bench.json").read_text())
        assert written["small"] and list(written["rows"]) == ["evaluation"]
        for figure in written["rows"]["evaluation"]["figures"]:
            assert figure.keys() == {"name", "value", "unit", "limit", "floor", "ratio"}

    def test_unknown_stages(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            bench_command(["labels", "sped"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "'sped'" in error and all(name in error for name in STAGES)

    def test_help_names_the_stages(self, capsys):
        bench_command(["--help"])
        out = capsys.readouterr().out
        assert all(name in out for name in STAGES)

    def test_json_has_no_nan(self, tmp_path):
        write_report({"a": [math.nan, {"b": math.inf}], "c": 1 / 3, "d": True}, tmp_path / "x.json")
        assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {
            "a": [None, {"b": None}],
            "c": 0.33333,
            "d": True,
        }

    def test_scaling(self, tmp_path):
        scaling(tmp_path / "x.csv", largest=500, say=lambda line: None)
        with open(tmp_path / "x.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {(row["task"], row["version"]) for row in rows} == set(bench.SIZES)
        assert all(int(row["n"]) == 500 and float(row["seconds"]) >= 0 and row["cpu"] for row in rows)
