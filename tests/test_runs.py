"""A run's folder: states come back, files are whole or not there, folders are nobody else's."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open

from affscl.model.network import AFF
from affscl.training.config import RECIPES, Config
from affscl.training.runs import (
    begin_run,
    load_config,
    new_run,
    read_history,
    read_state,
    save_state,
    write_config,
    write_history,
    write_safely,
)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestWriteSafely:
    def test_half_a_file_is_never_seen(self, tmp_path):
        def dies(part):
            part.write_text("hal")
            raise OSError("disk full")

        write_safely(tmp_path / "file", lambda part: part.write_text("whole"))
        with pytest.raises(OSError, match="disk full"):
            write_safely(tmp_path / "file", dies)
        assert (tmp_path / "file").read_text() == "whole"


def test_adams_moments_come_back(tmp_path):
    network = AFF("resnet10", height=64, width=32)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network(torch.randn(4, 3, 64, 32)).unit.sum().backward()
    optimizer.step()
    save_state(tmp_path / "state", 7, network, optimizer)
    other = AFF("resnet10", height=64, width=32)
    fresh = torch.optim.Adam(other.parameters(), lr=1e-3)
    assert read_state(tmp_path / "state").fill(other, fresh) == 7
    assert same(other.state_dict(), network.state_dict())
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() and all(same(old[i], new[i]) for i in old)


def test_parameters_of_a_criterion_that_ends_with_its_epoch_are_not_stored(tmp_path):
    network, classifier = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.add_param_group({"params": list(classifier.parameters())})
    classifier(network(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    for criterion, indices in ((None, {"0", "1"}), (classifier, {"0", "1", "2", "3"})):
        save_state(tmp_path / "state", 1, network, optimizer, criterion=criterion)
        with safe_open(tmp_path / "state", "pt") as file:
            keys = sorted(file.keys())
        assert {key.split(".")[1] for key in keys if key.startswith("optimizer.")} == indices
        assert any(key.startswith("criterion.") for key in keys) == (criterion is not None)


def test_states_that_cannot_be_read(tmp_path):
    network = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(network.parameters())
    with pytest.raises(ValueError, match="missing or damaged"):
        read_state(tmp_path / "state").fill(network, optimizer)
    save_state(tmp_path / "state", 1, network, optimizer)
    with pytest.raises(ValueError, match="another network"):
        read_state(tmp_path / "state").fill(torch.nn.Linear(2, 4), optimizer)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:50])
    with pytest.raises(ValueError, match="missing or damaged"):
        read_state(tmp_path / "state").fill(network, optimizer)


@pytest.mark.parametrize("name", RECIPES)
def test_settings_come_back(name, tmp_path):
    write_config(tmp_path / "run", RECIPES[name])
    assert load_config(tmp_path / "run") == RECIPES[name]


def test_history_comes_back(tmp_path):
    rows = [{"epoch": 0, "mAP": 0.1}, {"epoch": 1, "mAP": 1 / 3, "ari": None}]
    write_history(tmp_path, rows)
    assert read_history(tmp_path) == rows


def test_config_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="no run's folder"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"colour": 1}')
    with pytest.raises(ValueError, match="colour"):
        load_config(tmp_path)


class TestNewRun:
    def test_a_name_of_its_own_in_the_same_second(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
        with ThreadPoolExecutor(8) as pool:
            names = sorted(str(run) for run in pool.map(new_run, [Config(recipe="tiny")] * 8))
        first = os.path.join("runs", "tiny-20260101-120000")
        assert names == sorted([first, *(f"{first}-{n}" for n in range(2, 9))])

    def test_a_named_folder_may_be_new_or_empty(self, tmp_path):
        assert new_run(Config(), tmp_path / "new") == tmp_path / "new" and not (tmp_path / "new").exists()
        assert new_run(Config(), tmp_path) == tmp_path
        (tmp_path / "file").write_text("")
        for taken, why in (tmp_path, "--resume"), (tmp_path / "file", "is a file, not a folder"):
            with pytest.raises(FileExistsError, match=why):
                new_run(Config(), taken)


@pytest.mark.parametrize("name", ["resume.safetensors", "metrics.jsonl", "best.safetensors"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_written(name, tmp_path):
    config = RECIPES["tiny"]
    write_config(tmp_path, config)
    (tmp_path / name).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{name} must be files, and are folders: move them away"):
        begin_run(config, resume=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
