"""A run killed at any instant ends as if nothing had been; two runs never write into one folder."""

import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from forked import FORK
from long_forms import ASKED

from affscl.data.synthetic import make_dataset
from affscl.model import weights
from affscl.scores.best import best_epoch
from affscl.training import loop, runs
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.training.runs import (
    CLAIM,
    begin_run,
    claim,
    end_run,
    living_owner,
    new_run,
    read_history,
    read_state,
    release,
)

SHORT = replace(RECIPES["tiny"], device="cpu", epochs=2, iterations=2, p=4, k=4, k1=10, weights="synthetic")
REGIMES = {
    "unsupervised": {},
    "supervised": {"labels": "truth", "criterion": "cross_entropy_triplet", "centre_weight": 0.0005},
    "joint": {"source": "synthetic", "source_seed": 3},
    "pretrain": {"source": "synthetic", "source_seed": 3, "adapt": "pretrain"},
}


def apart(function, *arguments):
    """Run a function in a process of its own; its exit status, negative: the signal that killed it."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(300)
    return process.exitcode


def mortal(config, run, resume, death, told):
    """Train; tell the instants at which a run may be killed (writes, renames, steps), and die at one of them."""
    instants = []

    def event(what):
        instants.append(what)
        if len(instants) == death:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(module, name):
        inner = getattr(module, name)

        def outer(*arguments, **options):
            event(f"before {name}")
            result = inner(*arguments, **options)
            event(f"after {name}")
            return result

        setattr(module, name, outer)

    for name in ("replace", "fsync", "link"):
        watch(os, name)
    for name in ("load_data", "extract_shared", "report", "save_state", "write_history", "write_config"):
        watch(loop, name)
    watch(runs, "write_config")
    watch(weights, "save_file")
    watch(torch.optim.Adam, "step")
    train(config, **{"resume" if resume else "out": run})
    told.write_text("\n".join(instants))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("world") / "market", n_ids=24, n_cams=3, seed=5)
    return replace(SHORT, dataset="market1501", data=str(data), world_ids=24, world_cams=3)


def tensors(run):
    return read_state(run / "resume.safetensors").tensors


def lines(run):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_history(run)]


def assert_best(run):
    """The best epoch's weights are there, and say so truly: those of the last epoch if that is the best."""
    best = best_epoch(read_history(run))
    if best is None:
        return
    about, held = weights.read_tensors(run / "best.safetensors")
    assert about["choice"] == list(best) and about["since"] == 0
    last = weights.read_tensors(run / "model.safetensors")[1]
    assert all(torch.equal(held[name], value) for name, value in last.items()) == (
        best.epoch == read_history(run)[-1]["epoch"]
    )


def survives(config, folder, whole, deaths):
    """Kill a run at each of `deaths` instants in turn, going on after each; it must end as `whole` did."""
    run, told = folder / "run", folder / "told.txt"
    for death in deaths:
        assert apart(mortal, config, run, (run / "config.json").exists(), death, told) == -signal.SIGKILL
    assert apart(mortal, config, run, (run / "config.json").exists(), 0, told) == 0
    ended = tensors(run)
    assert ended.keys() == whole[0].keys() and all(torch.equal(ended[name], value) for name, value in whole[0].items())
    assert lines(run) == whole[1]
    assert_best(run)
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.name == CLAIM]
    shutil.rmtree(run)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("regime", REGIMES if ASKED else ["unsupervised"])
def test_a_run_killed_at_any_instant_ends_with_the_same_bytes(regime, config, tmp_path):
    config, told = replace(config, **REGIMES[regime]), tmp_path / "told.txt"
    if config.source:
        config = replace(config, dataset="synthetic", data=None)
    assert apart(mortal, config, tmp_path / "whole", False, 0, told) == 0
    whole, instants = (tensors(tmp_path / "whole"), lines(tmp_path / "whole")), told.read_text().splitlines()
    n = len(instants)
    if not ASKED:
        return survives(config, tmp_path, whole, [1, n // 5, n // 4])
    assert apart(mortal, config, tmp_path / "again", False, 0, told) == 0  # without what is made once a machine
    instants = told.read_text().splitlines()
    n = len(instants)
    every = {instants.index(what) + 1 for what in instants} | set(range(1, n + 1, max(1, n // 30)))
    assert len(every) >= 30
    failed = {}
    for death in sorted(every):
        try:
            survives(config, tmp_path, whole, [death])
        except AssertionError as error:
            failed[f"{death}, {instants[death - 1]}"] = str(error).splitlines()[0]
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    print(f"{regime}: killed at {len(every)} of {n} instants, of {len(set(instants))} kinds; not the same: {failed}")
    assert not failed


def hold(run, held):
    claim(run)
    held.set()
    time.sleep(600)


def compete(runs, together, got):
    for run in runs:
        together.wait(120)
        try:
            claim(run)
            with got.get_lock():
                got.value += 1
        except FileExistsError as error:
            assert "being written by process" in str(error)
    together.wait(120)


class TestClaims:
    def test_a_second_claimant_is_refused_and_a_dead_one_taken_over(self, config, tmp_path):
        run = tmp_path / "run"
        held = FORK.Event()
        process = FORK.Process(target=hold, args=(run, held))
        process.start()
        held.wait(120)
        try:
            assert str(process.pid) in living_owner(run)
            with pytest.raises(FileExistsError, match=f"being written by process {process.pid}"):
                train(config, run)
            (run / "config.json").write_text(json.dumps(asdict(config)))
            with pytest.raises(FileExistsError, match=f"being written by process {process.pid}"):
                train(config, resume=run)
            os.kill(process.pid, signal.SIGSTOP)  # frozen is not dead
            assert living_owner(run)
        finally:
            process.kill()
            process.join()
        assert living_owner(run) is None
        assert new_run(config, run) == run
        claim(run)
        assert str(os.getpid()) in living_owner(run)

    @pytest.mark.parametrize(
        "text", ["", "null", "[]", "{}", '{"host": 1, "pid": "x", "started": 0}', '{"pid": -1', "\0" * 100]
    )
    def test_a_damaged_claim_is_taken_over(self, text, tmp_path):
        (tmp_path / CLAIM).write_text(text)
        claim(tmp_path)
        assert living_owner(tmp_path)
        release(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_another_process_of_the_same_number_is_not_the_owner(self, tmp_path):
        claim(tmp_path)
        told = json.loads((tmp_path / CLAIM).read_text())
        (tmp_path / CLAIM).write_text(json.dumps(told | {"started": told["started"] - 1000}))
        assert living_owner(tmp_path) is None
        (tmp_path / CLAIM).write_text(json.dumps(told | {"host": "elsewhere"}))
        assert "elsewhere (if that is over, delete" in living_owner(tmp_path)

    def test_of_many_at_once_one_gets_it(self, tmp_path):
        runs = [tmp_path / str(number) for number in range(40)]
        for run in runs[::2]:  # half are stale and to be taken over, half are free
            run.mkdir()
            (run / CLAIM).write_text("{}")
        together, got = FORK.Barrier(6), FORK.Value("i", 0)
        many = [FORK.Process(target=compete, args=(runs, together, got)) for _ in range(6)]
        for process in many:
            process.start()
        for process in many:
            process.join(120)
        assert [process.exitcode for process in many] == [0] * 6 and got.value == len(runs)

    def test_a_start_that_fails_leaves_nothing_and_one_that_crashed_is_started_again(self, config, tmp_path):
        with pytest.raises(FileNotFoundError):
            train(replace(config, data=str(tmp_path / "nowhere")), tmp_path / "deep" / "run")
        assert not (tmp_path / "deep" / "run").exists()
        run = begin_run(config, tmp_path / "run")  # and then it is killed:
        told = json.loads((run / CLAIM).read_text())
        (run / CLAIM).write_text(json.dumps(told | {"started": 0}))
        other = replace(config, seed=7)
        assert begin_run(other, run) == run and json.loads((run / "config.json").read_text())["seed"] == 7
        end_run(run, fresh=True)
        assert not run.exists()
        run.mkdir()
        (run / "mine.txt").write_text("precious")
        claim(run)
        (run / CLAIM).write_text(json.dumps(told | {"started": 0}))
        with pytest.raises(FileExistsError, match="not empty"):
            train(config, run)
        assert (run / "mine.txt").read_text() == "precious"

    def test_a_folder_that_cannot_be_written_is_told_before_a_crop_is_read(self, config, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setattr(loop, "load_data", lambda _: pytest.fail("crops were read"))
        with pytest.raises(OSError, match="cannot write into"):
            train(config, tmp_path / "file" / "run")
        with pytest.raises(ValueError, match="neither config.json nor resume.safetensors"):
            train(config, resume=tmp_path)

    @pytest.mark.parametrize("draft", [True, False], ids=["before its claim", "before its settings"])
    def test_a_start_killed_early_is_started_again(self, draft, config, tmp_path):
        (tmp_path / "run").mkdir()
        name = f".{CLAIM}@{platform.node()[:60]}@{2**22 + 5}@01234567" if draft else CLAIM
        (tmp_path / "run" / name).write_text("{}")
        run = begin_run(config, tmp_path / "run")
        assert {path.name for path in run.iterdir()} == {CLAIM, "config.json"}
        end_run(run, fresh=True)
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="is a file, not a folder"):
            new_run(config, tmp_path / "file")

    def test_a_read_only_run_is_not_resumed(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr(loop, "load_data", lambda _: pytest.fail("crops were read"))
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)))

        def read_only(self, *_, **__):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "write_text", read_only)
        with pytest.raises(OSError, match="cannot write into .*Permission denied"):
            runs.begin_run(config, resume=tmp_path)
