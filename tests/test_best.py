"""The best epoch's weights: which they are, what they say of themselves, and that no kill or damage loses them."""

import contextlib
import itertools
import json
import os
import random
import shutil
from dataclasses import replace

import pytest
import torch
from small_networks import SMALL, small, write_run

from affscl.model.network import WEIGHTS, load_model
from affscl.model.weights import read_tensors, write_tensors
from affscl.scores import best as module
from affscl.scores.best import BEFORE, BEST, Choice, best_epoch, keep_best, told_of
from affscl.training.cli import EvalArguments, next_steps, score_run
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.training.runs import load_config, read_history
from affscl.use.export import facts

SHORT = replace(RECIPES["tiny"], device="cpu", epochs=3, iterations=2, p=4, k=4, k1=10, world_ids=24, world_cams=3)


def rows(*scores, by="mAP"):
    return [
        {"epoch": epoch, "seconds": {}} | ({} if score is None else {by: score}) for epoch, score in enumerate(scores)
    ]


def held(run):
    """Epoch whose weights the file has, by what it says and by its tensors."""
    about, tensors = read_tensors(run / BEST)
    assert about["choice"][0] == tensors["w"].item() and f"epoch {about['choice'][0]}," in about["chosen"]
    return about["choice"][0]


def step(run, history, resumed=False):
    keep_best(run, history, {"w": torch.tensor(history[-1]["epoch"])}, {"network": {}}, resumed)


class TestChoice:
    def test_by_map_then_by_silhouette_the_first_of_equals_and_numbers_only(self):
        assert best_epoch(rows(0.2, 0.5, None, 0.5, float("nan"))) == Choice(1, "mAP", 0.5)
        assert best_epoch(rows(None, 0.1, 0.4, 0.3, by="silhouette")) == Choice(2, "silhouette", 0.4)
        assert best_epoch([{"epoch": 0, "silhouette": 0.9}, {"epoch": 1, "mAP": 0.1, "silhouette": 0.2}]).epoch == 1
        assert best_epoch([{"epoch": 0, "mAP": None}, {"epoch": 1}]) is None
        assert best_epoch(rows(0.9, 0.5, 0.6), since=1) == Choice(2, "mAP", 0.6)

    def test_test_data_is_named_where_it_chose_and_only_there(self):
        assert "test data" in str(Choice(3, "mAP", 0.5)) and "decision 27" in str(Choice(3, "mAP", 0.5))
        assert "test data" not in str(Choice(3, "silhouette", 0.5)) and "without labels" in str(
            Choice(3, "silhouette", 0.5)
        )


class TestKept:
    @pytest.mark.parametrize("seed", range(4))
    def test_whatever_is_interrupted_the_file_is_of_the_best_epoch(self, seed, tmp_path, monkeypatch):
        """A run that is killed within `keep_best`, before it, or goes back by one state, as a model of the real one."""
        dice, history = random.Random(seed), rows(0.5)
        step(tmp_path, history)
        replaces = os.replace
        for _ in range(60):
            before = list(history)
            history.append({"epoch": len(history), "mAP": dice.choice([0.1, 0.5, 0.6, 0.7, dice.random()])})
            fate = dice.choice(["well", "well", "killed before", "killed within", "went back"])
            if fate == "killed within":
                count = itertools.count(dice.randint(0, 1))

                def dies(*names, count=count):
                    if next(count):
                        raise KeyboardInterrupt
                    return replaces(*names)

                with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                    patch.setattr(os, "replace", dies)
                    step(tmp_path, history)
            elif fate != "killed before":
                step(tmp_path, history)
            if fate == "went back":
                history = before
            if fate != "well":
                step(tmp_path, history, resumed=True)
            assert held(tmp_path) == best_epoch(history).epoch
            assert {path.name for path in tmp_path.iterdir()} <= {BEST, BEFORE}

    def test_one_file_unless_the_best_is_new(self, tmp_path):
        history = rows(0.1, 0.2)
        step(tmp_path, history[:1])
        step(tmp_path, history)
        assert (tmp_path / BEFORE).exists()
        step(tmp_path, [*history, {"epoch": 2, "mAP": 0.1}])
        assert not (tmp_path / BEFORE).exists() and held(tmp_path) == 1

    def test_epochs_without_a_number_change_nothing(self, tmp_path):
        step(tmp_path, rows(None))
        assert not any(tmp_path.iterdir())
        step(tmp_path, rows(None, None, 0.3))
        step(tmp_path, rows(None, None, 0.3, None))
        assert held(tmp_path) == 2

    @pytest.mark.parametrize("harm", ["deleted", "cut", "flipped", "foreign", "empty"])
    def test_a_lost_file_is_told_and_the_best_chosen_anew(self, harm, tmp_path):
        history = rows(0.1, 0.9, 0.3)
        for n in (1, 2, 3):
            step(tmp_path, history[:n])
        path, data = tmp_path / BEST, (tmp_path / BEST).read_bytes()
        path.unlink()
        if harm != "deleted":
            flipped = data[:-1] + bytes([data[-1] ^ 1])
            path.write_bytes({"cut": data[:-3], "flipped": flipped, "foreign": b"x" * 99, "empty": b""}[harm])
        with pytest.warns(UserWarning, match=r"best.safetensors is not there or damaged \(epoch 1.*from epoch 2 on"):
            step(tmp_path, history, resumed=True)
        assert held(tmp_path) == 2
        for score, best in (
            (0.2, 2),
            (0.4, 4),
            (0.35, 4),
        ):  # below the lost one, and yet the best of those that are left
            history.append({"epoch": len(history), "mAP": score})
            step(tmp_path, history)
            assert held(tmp_path) == best


class TestLoading:
    def test_either_network_and_what_it_is(self, tmp_path):
        last, best, run = small(), small(), tmp_path / "run"
        write_run(run, last)
        with torch.no_grad():
            best.neck.weight.mul_(2)
        write_tensors(run / BEST, best.state_dict(), {"chosen": str(Choice(3, "mAP", 0.5)), "network": {}})
        assert load_model(run).chosen == "" and "test data" in load_model(run, "best").chosen
        assert torch.equal(load_model(run, "best").neck.weight, best.neck.weight)
        assert facts(load_model(run))["weights"] == "of the last epoch"
        assert "test data" in facts(load_model(run, "best"))["weights"]

    def test_mistakes_are_told(self, tmp_path):
        run = tmp_path / "run"
        write_run(run, small())
        with pytest.raises(FileNotFoundError, match="no best.safetensors in .*older.*--weights last"):
            load_model(run, "best")
        with pytest.raises(ValueError, match="weights='first': choose one of last, best"):
            load_model(run, "first")
        write_tensors(run / BEST, small().state_dict())
        for read in (load_model, load_config):
            with pytest.raises((FileNotFoundError, ValueError), match="is a file|a file; name"):
                read(run / BEST)
        (run / BEST).write_bytes((run / BEST).read_bytes()[:-9])
        with pytest.raises(ValueError, match="best.safetensors is damaged"):
            load_model(run, "best")
        assert load_model(run).height == SMALL["height"]


def test_a_run_keeps_scores_and_names_its_best_epoch(tmp_path, capsys, monkeypatch):
    scores = iter([0.2, 0.8, 0.3, 0.4])
    logged = module.best_epoch.__globals__  # only to be sure that the module is the one under test
    assert logged["BEST"] == WEIGHTS["best"]
    monkeypatch.setattr("affscl.training.loop.logged_scores", lambda *_: {"mAP": next(scores), "rank1": 0.5})
    states = []
    monkeypatch.setattr(
        "affscl.training.loop.keep_best",
        lambda run, history, tensors, about, resumed: (
            states.append({name: value.clone() for name, value in tensors.items()}),
            keep_best(run, history, tensors, about, resumed),
        ),
    )
    done = train(SHORT, tmp_path / "run")
    best = load_model(done.run, "best")
    assert all(torch.equal(value, states[1][name]) for name, value in best.state_dict().items())
    assert told_of(done.run / BEST)["choice"] == [1, "mAP", 0.8]
    assert "epoch 1, the best by mAP (80.0): chosen on test data" in next_steps(done.run, "cpu, 1 thread")
    assert ", made on cpu, 1 thread:" in next_steps(done.run, "cpu, 1 thread")
    capsys.readouterr()
    score_run(EvalArguments(str(done.run), weights="best", device="cpu"))
    assert "Weights of epoch 1, the best by mAP (80.0): chosen on test data" in capsys.readouterr().out


def test_without_labels_the_signs_choose(tmp_path, capsys):
    from affscl.data.synthetic import make_dataset

    data = make_dataset(tmp_path / "world", n_ids=24, n_cams=3, seed=5)
    crops = tmp_path / "crops"
    crops.mkdir()
    for number, path in enumerate(sorted((data / "bounding_box_train").glob("*.jpg"))):
        shutil.copy(path, crops / f"crop{number:03}.jpg")
    done = train(replace(SHORT, dataset="folder", data=str(crops), epochs=2), tmp_path / "run")
    signs = {row["epoch"]: row["silhouette"] for row in read_history(done.run) if "silhouette" in row}
    about = told_of(done.run / BEST)
    assert signs.keys() == {1, 2} and about["choice"] == [max(signs, key=signs.get), "silhouette", max(signs.values())]
    assert "without labels" in about["chosen"] and "test data" not in json.dumps(about)
    said = capsys.readouterr().out
    assert "What the clusters tell instead" in said and f"silhouette {signs[1]:.2f} in epoch 1" in said


def test_only_what_can_be_done_is_proposed(tmp_path):
    run = tmp_path / "my run"
    (run / "labels").mkdir(parents=True)
    said = next_steps(run, scored=False)
    assert "affscl-eval" not in said and "affscl-clusters" not in said
    assert f"affscl-search '{run}' PHOTO" in said
    (run / "labels" / "epoch_001.csv.gz").write_bytes(b"")
    assert "affscl-clusters" in next_steps(run) and "affscl-eval" in next_steps(run)
