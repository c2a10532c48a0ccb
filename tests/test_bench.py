"""The benchmark's own arithmetic, every row at toy size, and what the step may never do: ask for a number, loop over samples.

No speed is asserted here: `affscl-bench` measures it.
"""

import ast
import contextlib
import csv
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from affscl.criteria import memory
from affscl.criteria.factory import CRITERIA, LossOptions, make_criterion
from affscl.labels.clustering import pseudo_labels
from affscl.labels.neighbours import SEARCHES, nearest
from affscl.model.network import AFF
from affscl.scores.evaluation import score
from affscl.studies import bench
from affscl.studies.bench import ROWS, Row, bench_command, figure_line, run_row, scaling, table, write_report
from affscl.studies.costs import crops_per_second, make_step, ranking, recorded, timed_labels, waiting
from affscl.studies.measuring import Peak, alternate, crowd
from affscl.studies.naive import naive_labels, naive_precision

ROOT = Path(__file__).resolve().parent.parent


class TestFigures:
    def test_ratio_of_a_ceiling_and_of_a_floor(self):
        assert Figure("a", 3, limit=4).ratio == 0.75 and Figure("a", 5, limit=4).ratio == 1.25
        assert Figure("a", 8, limit=4, floor=True).ratio == 0.5 and Figure("a", 2, limit=4, floor=True).ratio == 2
        assert Figure("a", 0, limit=4, floor=True).ratio == math.inf and Figure("a", 3).ratio is None

    def test_lines(self):
        def line(*values, **named):
            figure = Figure("speed", *values, **named)
            return figure_line("row", figure._asdict() | {"ratio": figure.ratio})

        assert line(5, "s").split() == ["row", "speed", "5", "s"]
        assert line(5, "s", 4).split() == ["row", "speed", "5", "s", "<=", "4", "1.25", "NOT", "KEPT"]
        assert line(2500.4, "x", 2000, True).split() == ["row", "speed", "2,500", "x", ">=", "2,000", "0.80", "kept"]
        assert "nan" in line(math.nan, "MB", 400) and "NOT KEPT" in line(math.nan, "MB", 400)

    def test_functions_take_turns(self):
        calls = []
        laps = alternate([lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.002))], 3)
        assert calls == ["a", "b"] * 4 and laps.shape == (3, 2) and (laps[:, 1] >= 0.002).all()

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
    def test_peak_counts_what_was_given_back(self):
        with Peak() as peak:
            held = np.ones(200_000_000, np.uint8)
            time.sleep(0.1)
            del held
        assert 190 < peak.mb < 230

    def test_waiting(self):
        def loader():
            for _ in range(4):
                time.sleep(0.02)
                yield None

        assert waiting(loader(), lambda: None) > 0.9
        assert 0.2 < waiting(loader(), lambda: time.sleep(0.02)) < 0.8
        assert waiting(range(4), lambda: time.sleep(0.02)) < 0.1


class TestNaive:
    @pytest.mark.parametrize(
        "n, d, noise, k1, k2", [(300, 64, 1.0, 30, 6), (400, 32, 0.7, 12, 3), (200, 16, 1.0, 25, 1)]
    )
    def test_labels(self, n, d, noise, k1, k2):
        x, _ = crowd(n, d, noise)
        ours = pseudo_labels(x, k1=k1, k2=k2)
        np.testing.assert_array_equal(ours, naive_labels(x, k1=k1, k2=k2))
        assert ours.max() > 3

    def test_precision(self):
        distance, ids = ranking(50, 1500)
        for some in distance, distance.round(1), np.zeros_like(distance):
            np.testing.assert_allclose(naive_precision(some, *ids), score(some, *ids).ap, equal_nan=True)

    def test_crowd(self):
        x, people = crowd(3600, 512, noise=1.5)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3600))
        same = (people[:, None] == people) & ~np.eye(3600, dtype=bool)
        assert abs((x @ x.T).numpy()[same].mean() - 1 / 3.25) < 0.01
        assert torch.equal(x, crowd(3600, 512, noise=1.5)[0])


class TestRecorded:
    def test_labels_and_seconds(self):
        x, _ = crowd(500, 32)
        found, search, rest, lists = timed_labels(x)
        np.testing.assert_array_equal(found, pseudo_labels(x))
        np.testing.assert_array_equal(lists, nearest(x, 30)[0])
        assert search > 0 and rest > 0

    def test_another_search_is_used_and_the_old_one_comes_back(self):
        x, _ = crowd(500, 32)
        with pytest.raises(ZeroDivisionError), recorded("faiss") as record:
            pseudo_labels(x)
            assert record["lists"].shape == (500, 30)
            1 / 0
        assert SEARCHES["exact"] is nearest


class TestRows:
    @pytest.mark.parametrize("name", ROWS)
    def test_every_row_runs(self, name):
        result = run_row(name, small=True)
        assert "error" not in result, result
        assert all(isinstance(f["value"], float | int) or np.isscalar(f["value"]) for f in result["figures"])
        assert any(f["limit"] is not None for f in result["figures"])

    def test_limits_are_those_promised(self):
        """The figures of issue 5; a limit may be tightened, not loosened in passing."""
        promised = {
            "labels": {1.35, 400, 100},
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
            equal = [f for f in run_row(name, small=True)["figures"] if f["unit"] == "%" and f["limit"] == 100]
            assert equal and all(f["value"] == 100 for f in equal)

    def test_a_row_that_fails_costs_no_other(self, monkeypatch, capsys):
        def failing():
            torch.set_flush_denormal(True)
            raise MemoryError("no room")

        monkeypatch.setitem(ROWS, "broken", Row(failing, 1, {}))
        report = bench.bench(("broken", "evaluation"), small=True)
        assert report["rows"]["broken"]["error"] == "MemoryError: no room"
        assert report["rows"]["evaluation"]["figures"]
        assert torch.tensor(1e-39).mul(1).item() != 0, "the switch for denormals is put back"
        text = table(report)
        assert "MemoryError: no room" in text and "scoring / one full argsort" in text and "toy sizes" in text

    def test_says_beforehand_how_long_and_whether_the_machine_is_busy(self, monkeypatch, capsys):
        monkeypatch.setitem(ROWS, "long", Row(lambda: [Figure("a", 1)], 300, {}))
        monkeypatch.setattr(bench, "machine", lambda: {"cpu": "x", "cores": 2, "threads": 2, "torch": "2", "load": 3.5})
        bench.bench(("long",))
        said = capsys.readouterr().out.splitlines()
        assert "about 5 minutes" in said[0] and "busy (load 3.5)" in said[1]

    def test_machine(self):
        about = bench.machine()
        assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads() and about["cpu"]


class TestCommand:
    def test_table_and_json(self, tmp_path, capsys):
        bench_command(["evaluation", "--small", "--out", str(tmp_path / "bench.json")])
        out = capsys.readouterr().out
        assert "scoring / one full argsort" in out and "<= 0.4" in out and torch.__version__ in out
        written = json.loads((tmp_path / "bench.json").read_text())
        assert written["small"] and list(written["rows"]) == ["evaluation"]
        for figure in written["rows"]["evaluation"]["figures"]:
            assert figure.keys() == {"name", "value", "unit", "limit", "floor", "ratio"}

    def test_unknown_rows(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            bench_command(["labels", "sped"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "'sped'" in error and all(name in error for name in ROWS)

    def test_help_names_the_rows(self, capsys):
        with pytest.raises(SystemExit):
            bench_command(["--help"])
        out = capsys.readouterr().out
        assert all(name in out for name in ROWS)

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


# --- the step never waits ------------------------------------------------------------------------------------------
# On the meta device a tensor has a shape and no numbers: whoever asks for a number, as `.item()`, `if tensor`,
# `int(tensor)` and `.tolist()` do, gets an error, where a GPU would have to finish all its work first.


class Counting(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def without_numbers(module):
    """The module with all its tensors on the meta device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(value.shape, device="meta"), requires_grad=value.requires_grad
                )
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return module


def operations(criterion="symmetric", batch=8, clusters=10, network=None, **options):
    """Operations of forward, criterion, backward and update, by name."""
    model = without_numbers(AFF("resnet10", height=64, width=32, **(network or {})))
    rows = nn.functional.normalize(torch.randn(clusters, model.dim))
    judge = without_numbers(
        make_criterion(LossOptions(criterion=criterion, **options), rows, torch.arange(clusters), [0] * clusters)
    )
    if getattr(judge, "cameras", None) is not None:
        judge.cameras = judge.cameras.to("meta")
    images, targets = torch.empty(batch, 3, 64, 32, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta")
    with Counting() as counting:
        output = model(images)
        sum(judge(output, targets).values()).backward()
        judge.update(output, targets)
    return counting.counts


@pytest.fixture
def meta(monkeypatch):
    """Autocast knows no meta device."""
    monkeypatch.setattr(memory, "_float32", lambda device: contextlib.nullcontext())


VARIANTS = [dict(criterion=name) for name in CRITERIA if name != "cluster_contrast"]
VARIANTS += [dict(balance=kind) for kind in ("both", "features", "memory", "off")] + [
    dict(hard_reference="hard"),
    dict(normalise_mean=True),
    dict(negatives="camera"),
]
VARIANTS += [
    dict(network=dict(layout="table8")),
    dict(network=dict(pooling="gem", fusion="residual")),
    dict(network=dict(swapped=True)),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_step_asks_for_no_number_and_loops_over_nothing(meta, variant):
    few = operations(batch=8, clusters=10, **variant)
    assert operations(batch=64, clusters=10, **variant) == few, "as many operations for 64 crops as for 8"
    assert operations(batch=8, clusters=300, **variant) == few, "and for 300 clusters as for 10"
    assert sum(few.values()) > 200


def test_cluster_contrasts_own_rule_is_the_exception(meta):
    """It takes the instances of a cluster in turn, and so these checks are seen to be able to fail."""
    with pytest.raises(RuntimeError, match="item"):
        operations("cluster_contrast")


@pytest.mark.parametrize(
    "bad, why",
    [
        (lambda x: x * x.sum().item(), "item"),
        (lambda x: x if x.sum() > 0 else -x, None),
        (lambda x: torch.stack([row * 2 for row in x.sum(1).tolist()]), None),
    ],
)
def test_questions_for_numbers_are_noticed(bad, why):
    with pytest.raises((RuntimeError, NotImplementedError), match=why):
        bad(torch.empty(3, 4, device="meta"))


def test_loops_over_samples_are_noticed():
    def count(n):
        with Counting() as counting:
            torch.stack([row * 2 for row in torch.empty(n, 4, device="meta")])
        return counting.counts

    assert count(8) != count(9)


# What may ask for a number: checks of a start, made once an epoch; and those who are no part of the step.
ONCE = {"memory_rows", "check_targets", "blend_in_turn", "make_criterion", "cameras_of", "__init__"}


@pytest.mark.parametrize("name", ["losses", "memory", "attention"])
def test_no_word_for_it_in_the_source(name):
    tree = ast.parse((ROOT / "affscl" / f"{name}.py").read_text())
    asking = [
        (function.name, call.func.attr)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name not in ONCE
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"item", "tolist", "cpu", "numpy"}
    ]
    assert asking == []


def test_make_step_trains():
    torch.manual_seed(0)
    model, order = nn.Linear(4, 1), []
    step = make_step(
        model, lambda m: m(torch.ones(1, 4)).square().sum(), lambda: order.append(model.weight.grad.clone())
    )
    before = model.weight.detach().clone()
    step()
    assert order[0].abs().sum() > 0 and not torch.equal(model.weight, before)


def test_crops_per_second_counts_crops():
    class Store:
        def __len__(self):
            return 100

        def batch(self, indices):
            return torch.zeros(len(indices), 3, 32, 16, dtype=torch.uint8)

    start = time.perf_counter()
    rate = crops_per_second(Store(), 8, 5, 0)
    assert rate >= 40 / (time.perf_counter() - start)
