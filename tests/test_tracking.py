"""Trackers: refused by name before training, given each epoch once whatever happens, and never the end of a run."""

import json
import sys
from dataclasses import replace

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from affscl.training import progress
from affscl.training.config import RECIPES, Config
from affscl.training.loop import train
from affscl.training.progress import TRACKED, plain_numbers, track_problems, tracked

SHORT = replace(RECIPES["tiny"], device="cpu", epochs=2, iterations=1, p=4, k=4, k1=10, world_ids=24, world_cams=3)


def rows(count):
    return [
        {"epoch": e, "mAP": e / 10, "ari": None, "precision": "no", "seconds": {"train": 2.5}} for e in range(count)
    ]


@pytest.fixture
def heard(monkeypatch):
    """What a tracker called `ear` was told; it fails at the epochs in `fails`."""
    told, fails = [], []

    class Ear(GeneralTracker):
        name, requires_logging_directory, tracker = "ear", False, None

        def __init__(self, project, **options):
            super().__init__()
            told.append(("start", project))

        def store_init_configuration(self, values):
            assert all(isinstance(value, (bool, int, float, str)) for value in values.values())
            told.append(("settings", values["epochs"]))

        def log(self, values, step=None, **_):
            if step in fails:
                raise ConnectionError("no network")
            told.append((step, values))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "ear", Ear)

    def steps():
        return [entry[0] for entry in told if isinstance(entry[0], int)]

    return told, fails, steps


def follow(run, *counts, config=None):
    for count in counts:
        history = rows(count)
        with tracked(Accelerator(cpu=True), config or Config(track=("ear",)), run, history) as tell:
            history.append(rows(count + 1)[-1])
            tell()


class TestProblems:
    @pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet_ml", "mlflow"])
    def test_what_is_not_installed_is_refused_with_the_command(self, name, monkeypatch, tmp_path):
        monkeypatch.setattr(progress, "get_available_trackers", lambda: [])
        message = f"track='{name}' is not installed here: pip install {name.replace('_', '-')}$"
        with pytest.raises(ValueError, match=message):
            train(replace(SHORT, track=(name,)), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_unknown_names_are_guessed_all_at_once(self, heard):
        problems = track_problems(Config(track=("tensorbord", "ear", "all")))
        assert len(problems) == 2 and "did you mean tensorboard?" in problems[0] and "choose among aim" in problems[1]
        assert track_problems(Config()) == []

    def test_one_that_cannot_start_is_named(self, monkeypatch, tmp_path):
        class Locked(GeneralTracker):
            name, requires_logging_directory, tracker = "locked", True, None

            def __init__(self, project, logging_dir):
                raise PermissionError("no key")

        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "locked", Locked)
        with pytest.raises(ValueError, match="track='locked' cannot start: PermissionError: no key"):
            follow(tmp_path, 1, config=Config(track=("locked",)))


def test_only_finite_numbers_are_sent():
    row = {"epoch": 3, "a": 1, "b": None, "c": "no", "d": float("nan"), "seconds": {"train": 2.5, "x": None}}
    assert plain_numbers(row) == {"a": 1.0, "seconds/train": 2.5}


class TestFollowing:
    def test_each_epoch_once_and_the_settings_once(self, heard, tmp_path):
        told, _, steps = heard
        follow(tmp_path, 1, 2, 3)
        assert steps() == [0, 1, 2, 3] and told.count(("settings", 60)) == 1 and told.count("finish") == 3
        assert (2, {"mAP": 0.2, "seconds/train": 2.5}) in told

    def test_a_run_that_went_back_sends_again_what_is_made_again(self, heard, tmp_path):
        follow(tmp_path, 3)
        follow(tmp_path, 2)
        assert heard[2]() == [0, 1, 2, 3, 2]

    def test_one_that_comes_late_gets_all_and_one_that_left_what_it_missed(self, heard, tmp_path):
        follow(tmp_path, 2, config=Config())
        assert not (tmp_path / TRACKED).exists()
        follow(tmp_path, 3)
        assert heard[2]() == [0, 1, 2, 3]
        heard[1].append(5)
        with pytest.warns(UserWarning, match="track='ear' failed .ConnectionError: no network.*goes on without it"):
            follow(tmp_path, 5)
        heard[1].clear()
        follow(tmp_path, 6)
        assert heard[2]() == list(range(7))

    @pytest.mark.parametrize("text", ["", "[1]", '{"ear": 3}', '{"ear": {"epoch": "x"}}'])
    def test_a_damaged_note_sends_all_again(self, heard, text, tmp_path):
        (tmp_path / TRACKED).write_text(text)
        follow(tmp_path, 1)
        assert heard[2]() == [0, 1] and json.loads((tmp_path / TRACKED).read_text()) == {"ear": {"epoch": 1}}

    def test_other_processes_are_silent(self, heard, tmp_path, monkeypatch):
        monkeypatch.setattr(progress, "from_main", lambda accelerator, make: None)  # as in all but the main process
        follow(tmp_path, 2)
        assert heard[0] == [] and not (tmp_path / TRACKED).exists()


def test_a_run_and_its_resumption_are_followed_and_not_changed(heard, tmp_path):
    followed = replace(SHORT, track=("ear",))
    train(replace(followed, epochs=1), tmp_path / "run")
    done = train(followed, resume=tmp_path / "run")
    assert heard[2]() == [0, 1, 2] and heard[0].count(("settings", 1)) == 1
    sent = {entry[0]: entry[1] for entry in heard[0] if isinstance(entry[0], int)}
    assert {step: values["mAP"] for step, values in sent.items()} == {row["epoch"]: row["mAP"] for row in done.history}
    assert sent[2]["loss"] == done.history[2]["loss"] and sent[2]["seconds/train"] > 0


@pytest.mark.skipif("tensorboard" not in map(str, progress.get_available_trackers()), reason="not installed")
def test_tensorboard_goes_on_in_one_log(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(tmp_path, 2, 3, 1, config=Config(track=("tensorboard",)))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("mAP")] == [0, 1] and "seconds/train" in read.Tags()["scalars"]
    assert sys.modules.get("tensorflow") is None
