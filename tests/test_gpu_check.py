"""The check that waits for a GPU works: every part of it at toy size on the CPU, and its verdict."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from affscl.studies.measuring import Measurement

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tool():
    """The module `tools/gpu_check.py`."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_check_runs_and_two_cpus_agree(tool, tmp_path, capsys):
    path = tmp_path / "report.json"
    with pytest.raises(SystemExit) as end:
        tool.main(["--device", "cpu", "--small", "--out", str(path)])
    report = json.loads(path.read_text())
    assert end.value.code == 0, capsys.readouterr().out
    assert list(report["rows"]) == list(tool.CHECKS) and report["machine"]["device"].startswith("cpu")
    for row in report["rows"].values():
        assert "error" not in row and len(row["figures"]) >= 4


def test_no_gpu_is_a_message_and_not_a_traceback(tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tool.main([])
    assert "no GPU" in str(end.value.code)


def fails(device, small):
    raise RuntimeError("out of memory")


def good(device, small):
    return [Measurement("speed", 5, "", 4, floor=True)]


def bad(device, small):
    return [Measurement("ARI", 0.5, "", 0.99, floor=True)]


def test_a_check_that_fails_is_noted_and_the_next_one_runs(tool):
    report = tool.gpu_check(CPU, True, {"one": fails, "two": good}, say=lambda line: None)
    assert report["rows"]["one"]["error"] == "RuntimeError: out of memory"
    assert report["rows"]["two"]["figures"][0]["value"] == 5
    assert not tool.kept(report)


def test_a_limit_that_is_not_kept_is_a_failure(tool):
    assert tool.kept(tool.gpu_check(CPU, True, {"two": good}, say=lambda line: None))
    assert not tool.kept(tool.gpu_check(CPU, True, {"three": bad}, say=lambda line: None))


def test_what_would_begin_too_late_is_left_out_and_named(tool):
    report = tool.gpu_check(CPU, True, {"two": good, "one": fails}, latest=-1, say=lambda line: None)
    assert all("left out" in row["error"] for row in report["rows"].values()) and not tool.kept(report)
