"""The loop: what it may read, what it writes, how it stops and goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from affscl.data.synthetic import make_dataset
from affscl.model.network import load_model
from affscl.scores.benchmark import evaluate_model
from affscl.training import loop as training
from affscl.training.config import RECIPES, Config, differences
from affscl.training.loop import prepare, train
from affscl.training.progress import results_table
from affscl.training.runs import load_config, load_state, new_run, read_history, save_state

ROOT = Path(__file__).resolve().parent.parent
SHORT = replace(RECIPES["tiny"], device="cpu", epochs=2, iterations=3, p=4, k=4, k1=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small Market-1501 tree of synthetic people."""
    return make_dataset(tmp_path_factory.mktemp("world") / "market", n_ids=24, n_cams=3, seed=5)


@pytest.fixture(scope="module")
def short(world):
    return replace(SHORT, dataset="market1501", data=str(world))


@pytest.fixture(scope="module")
def done(short, tmp_path_factory):
    """A finished run."""
    return train(short, tmp_path_factory.mktemp("runs") / "done")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestConfig:
    def test_full_recipes_carry_the_papers_settings(self):
        paper = dict(
            backbone="resnet50",
            layout="paper",
            height=256,
            width=128,
            p=16,
            k=8,
            epochs=60,
            lr=3.5e-4,
            lr_step=20,
            weight_decay=5e-4,
            k1=30,
            k2=6,
            min_samples=4,
            iterations=400,
            momentum=0.1,
            temperature=0.05,
            hard_weight=0.75,
            mean_weight=0.25,
            criterion="symmetric",
            balance="auto",
            flip=0.5,
            pad=10,
            erase=0.5,
            bn_chunk=64,
            last_stride=1,
        )
        for name, eps in (("market1501", 0.65), ("dukemtmc", 0.7), ("msmt17", 0.6)):
            recipe = RECIPES[name]
            assert {key: getattr(recipe, key) for key in paper} == paper
            assert recipe.dataset == name and recipe.eps == eps

    def test_names_its_recipe(self):
        assert all(recipe.recipe == name for name, recipe in RECIPES.items())

    def test_all_mistakes_are_told_together(self):
        with pytest.raises(ValueError) as error:
            Config(epochs=0, labels="guess", lr=-1.0, backbone="vgg", balance="maybe")
        for word in ("epochs", "labels", "clusters", "lr", "resnet50", "stop_gradient"):
            assert word in str(error.value)

    def test_differences_are_those_from_the_defaults(self):
        assert differences(Config(eps=0.5)) == {"eps": 0.5}

    def test_every_field_has_a_comment(self):
        import inspect

        lines = {}
        for base in Config.__mro__[:-1]:
            for line in inspect.getsource(base).splitlines():
                name = line.strip().split(":")[0]
                if line.startswith("    ") and ":" in line and name.isidentifier():
                    lines[name] = line
        assert [f.name for f in fields(Config) if "#" not in lines[f.name]] == []


class TestRun:
    def test_folder_holds_what_it_should(self, done):
        assert {"config.json", "metrics.jsonl", "model.safetensors", "resume.safetensors"} == {
            p.name for p in done.run.iterdir()
        }
        assert load_config(done.run).eps == SHORT.eps

    def test_metrics_have_a_row_before_training_and_one_an_epoch(self, done):
        rows = read_history(done.run)
        assert [row["epoch"] for row in rows] == [0, 1, 2] and rows == done.history
        assert {
            "epoch",
            "loss",
            "loss_hard",
            "loss_mean",
            "loss_balance",
            "clusters",
            "outlier_share",
            "multi_camera_share",
            "ari",
            "nmi",
            "mAP",
            "rank1",
            "rank5",
            "rank10",
            "seconds",
        } <= rows[1].keys()
        assert rows[1]["seconds"].keys() == {"extract", "label", "train", "evaluate"}
        assert rows[1]["loss"] == pytest.approx(sum(rows[1][f"loss_{part}"] for part in ("hard", "mean", "balance")))

    def test_saved_model_scores_what_the_run_says(self, done, short):
        job = prepare(short)
        scores = evaluate_model(load_model(done.run), job.query, job.gallery)
        assert scores.mAP == pytest.approx(done.history[-1]["mAP"], abs=1e-6)
        assert scores.cmc[0] == pytest.approx(done.history[-1]["rank1"], abs=1e-6)

    def test_training_moves_the_network(self, done, short):
        torch.manual_seed(0)
        start = prepare(short).network.state_dict()
        assert not torch.equal(start["backbone.conv1.weight"], done.model.state_dict()["backbone.conv1.weight"])

    def test_same_seed_same_bytes_other_seed_other_bytes(self, done, short, tmp_path):
        assert same(train(short, tmp_path / "again").model.state_dict(), done.model.state_dict())
        assert not same(train(replace(short, seed=9), tmp_path / "other").model.state_dict(), done.model.state_dict())

    def test_pids_of_training_crops_never_reach_training(self, done, short, tmp_path, monkeypatch):
        load = training.load_data

        def shuffled(config):
            data = load(config)
            pids = np.random.default_rng(0).permutation([sample.pid for sample in data.train])
            return replace(data, train=[sample._replace(pid=int(pid)) for sample, pid in zip(data.train, pids)])

        monkeypatch.setattr(training, "load_data", shuffled)
        blind = train(short, tmp_path / "blind")
        assert same(blind.model.state_dict(), done.model.state_dict())
        assert blind.history[1]["ari"] != done.history[1]["ari"], "the report, unlike training, does read them"

    def test_learning_rate_falls(self, short):
        job = prepare(short)
        rates = []
        for epoch in (1, 20, 21, 41):
            training.set_parameters(
                job.optimizer, type("None", (), {"parameters": lambda self: []})(), replace(short, lr_step=20), epoch
            )
            rates.append(job.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([3.5e-4, 3.5e-4, 3.5e-5, 3.5e-6])

    def test_memory_is_updated_once_a_step_after_the_loss_read_it(self, short, tmp_path, monkeypatch):
        order = []
        make = training.make_criterion

        def watched(*arguments):
            criterion = make(*arguments)
            forward, update = criterion.forward, criterion.update
            criterion.forward = lambda *a: (order.append("loss"), forward(*a))[1]
            criterion.update = lambda *a: (order.append("update"), update(*a))[1]
            return criterion

        monkeypatch.setattr(training, "make_criterion", watched)
        train(replace(short, epochs=1), tmp_path / "run")
        assert order == ["loss", "update"] * short.iterations

    @pytest.mark.parametrize("criterion", ["mean", "hard", "cluster_contrast", "hhcl", "cross_entropy_triplet"])
    def test_every_criterion_runs_in_the_one_loop(self, short, tmp_path, criterion):
        history = train(replace(short, criterion=criterion, iterations=1, eval_every=9), tmp_path / "run").history
        assert [np.isfinite(row["loss"]) for row in history[1:]] == [True, True]

    def test_true_labels_are_an_upper_bound_that_must_be_known(self, short, tmp_path, monkeypatch):
        history = train(replace(short, labels="truth", epochs=1), tmp_path / "run").history
        assert history[1]["ari"] == 1 and history[1]["clusters"] == 16
        load = training.load_data
        monkeypatch.setattr(
            training,
            "load_data",
            lambda config: replace(load(config), train=[sample._replace(pid=None) for sample in load(config).train]),
        )
        with pytest.raises(ValueError, match="needs a pid"):
            train(replace(short, labels="truth"), tmp_path / "none")

    def test_bf16_on_a_cpu(self, short, tmp_path):
        history = train(replace(short, precision="bf16", epochs=1), tmp_path / "run").history
        assert np.isfinite(history[1]["loss"])

    def test_eval_every(self, short, tmp_path):
        rows = train(replace(short, epochs=3, iterations=1, eval_every=2), tmp_path / "run").history
        assert ["mAP" in row for row in rows] == [True, False, True, True]


class TestResume:
    def test_continues_to_the_same_bytes(self, done, short, tmp_path):
        run = train(replace(short, epochs=1), tmp_path / "run").run
        resumed = train(short, resume=run)
        assert same(resumed.model.state_dict(), done.model.state_dict())
        keys = ("loss", "clusters", "ari", "mAP", "rank1")
        assert [[row.get(key) for key in keys] for row in resumed.history] == [
            [row.get(key) for key in keys] for row in done.history
        ]

    def test_an_error_in_mid_epoch_loses_only_that_epoch(self, done, short, tmp_path, monkeypatch):
        loader = training.train_loader

        def breaks(store, labels, batches, options, seed, epoch, **rest):
            for number, batch in enumerate(loader(store, labels, batches, options, seed, epoch, **rest)):
                if epoch == 2 and number == 1:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(training, "train_loader", breaks)
        with pytest.raises(KeyboardInterrupt):
            train(short, tmp_path / "run")
        monkeypatch.undo()
        assert [row["epoch"] for row in read_history(tmp_path / "run")] == [0, 1]
        assert same(train(short, resume=tmp_path / "run").model.state_dict(), done.model.state_dict())

    def test_metrics_beyond_the_state_are_dropped(self, short, tmp_path):
        run = train(replace(short, epochs=1, iterations=1), tmp_path / "run").run
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": 2, "loss": 0.0, "seconds": {}}) + "\n")
        rows = train(replace(short, epochs=2, iterations=1), resume=run).history
        assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[2]["loss"] > 0

    def test_adams_moments_come_back(self, short, tmp_path):
        job = prepare(short)
        network, optimizer = job.network, torch.optim.Adam(job.network.parameters(), lr=1e-3)
        network(torch.randn(4, 3, 64, 32)).unit.sum().backward()
        optimizer.step()
        save_state(tmp_path / "state", 7, network, optimizer)
        other = prepare(replace(short, seed=3)).network
        fresh = torch.optim.Adam(other.parameters(), lr=1e-3)
        assert load_state(tmp_path / "state", other, fresh) == 7
        assert same(other.state_dict(), network.state_dict())
        old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
        assert old.keys() == new.keys() and all(same(old[i], new[i]) for i in old)

    def test_damaged_or_missing_state(self, done, short, tmp_path):
        with pytest.raises(ValueError, match="resume.safetensors"):
            train(short, resume=tmp_path)
        (tmp_path / "resume.safetensors").write_bytes((done.run / "resume.safetensors").read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged"):
            train(short, resume=tmp_path)

    def test_an_existing_folder_is_refused(self, short, done, tmp_path):
        with pytest.raises(FileExistsError, match="--resume"):
            train(short, done.run)
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="not empty"):
            new_run(short, tmp_path / "file")

    def test_config_of_something_else(self, tmp_path):
        with pytest.raises(ValueError, match="no run's folder"):
            load_config(tmp_path)
        (tmp_path / "config.json").write_text('{"colour": 1}')
        with pytest.raises(ValueError, match="colour"):
            load_config(tmp_path)


class TestStopWhenAsked:
    def test_once_waits_for_the_next_look(self):
        before = signal.getsignal(signal.SIGINT)
        with training.stop_when_asked() as check:
            check()
            signal.raise_signal(signal.SIGINT)  # nothing happens here
            with pytest.raises(KeyboardInterrupt):
                check()
        assert signal.getsignal(signal.SIGINT) is before

    def test_twice_interrupts_at_once(self):
        with pytest.raises(KeyboardInterrupt), training.stop_when_asked():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def test_in_another_thread_it_leaves_signals_alone(self):
        before, seen = signal.getsignal(signal.SIGINT), []

        def work():
            with training.stop_when_asked() as check:
                check()
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [before]


class TestWhenItCannotGoOn:
    def test_no_clusters_gives_advice_and_leaves_the_run(self, short, tmp_path):
        with pytest.raises(ValueError, match="eps") as error:
            train(replace(short, eps=0.001), tmp_path / "run")
        assert "min_samples" in str(error.value)
        assert [row["epoch"] for row in read_history(tmp_path / "run")] == [0]

    def test_a_loss_that_is_no_number(self, short, tmp_path, monkeypatch):
        make = training.make_criterion

        def broken(*arguments):
            criterion = make(*arguments)
            forward = criterion.forward
            criterion.forward = lambda *a: {name: part * float("nan") for name, part in forward(*a).items()}
            return criterion

        monkeypatch.setattr(training, "make_criterion", broken)
        with pytest.raises(ValueError, match="lower lr"):
            train(short, tmp_path / "run")
        state = load_model(tmp_path / "run").state_dict()
        assert all(torch.isfinite(value.float()).all() for value in state.values()), "the last good state stays"

    def test_a_device_that_is_not_there(self, short):
        missing = "mps" if not torch.backends.mps.is_available() else "cuda"
        with pytest.raises(ValueError, match="--device auto"):
            prepare(replace(short, device=missing))

    def test_full_scale_without_weights_warns_loudly(self):
        with pytest.warns(UserWarning, match="--weights imagenet"):
            training.warn_without_weights(RECIPES["market1501"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training.warn_without_weights(RECIPES["quick"])


class TestFoldersOfCrops:
    def test_without_pids_and_camids(self, world, tmp_path, capsys):
        folder = tmp_path / "crops"
        folder.mkdir()
        for number, path in enumerate(sorted((world / "bounding_box_train").iterdir())):
            Image.open(path).save(folder / f"crop{chr(97 + number % 26)}{number}.png")
        config = replace(SHORT, dataset="folder", data=str(folder), iterations=2)
        result = train(config, tmp_path / "run")
        said = capsys.readouterr().out
        assert "Evaluation is left out" in said and "No evaluation" in said
        assert "mAP" not in result.history[-1] and result.history[-1]["ari"] is None
        assert np.isfinite(result.history[-1]["loss"])

    def test_unreadable_crops_are_all_listed_before_training(self, world, tmp_path):
        import shutil

        broken = Path(shutil.copytree(world, tmp_path / "broken"))
        names = sorted((broken / "bounding_box_train").iterdir())[3:5]
        for path in names:
            path.write_bytes(b"no picture")
        with pytest.raises(ValueError) as error:
            train(replace(SHORT, dataset="market1501", data=str(broken)), tmp_path / "run")
        assert all(path.name in str(error.value) for path in names)
        assert not (tmp_path / "run").exists()


def test_full_size_path(world, tmp_path):
    config = replace(
        RECIPES["market1501"],
        data=str(world),
        device="cpu",
        workers=0,
        epochs=1,
        iterations=2,
        p=4,
        k=2,
        k1=10,
        eps=0.3,
        bn_chunk=4,
    )
    with pytest.warns(UserWarning, match="RANDOM"):
        history = train(config, tmp_path / "run").history
    assert np.isfinite(history[1]["loss"]) and history[1]["mAP"] > 0


def test_two_processes_agree_with_one(short, tmp_path):
    # BatchNorm sees half a batch in each of two processes, which one process imitates with bn_chunk.
    config = replace(short, iterations=2, epochs=1, eps=0.7)
    one = train(replace(config, bn_chunk=config.p * config.k // 2), tmp_path / "one").history[1]
    script = tmp_path / "main.py"
    script.write_text(
        f"from affscl import Config, train\ntrain(Config(**{asdict(config)!r}), {str(tmp_path / 'two')!r})\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29511", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_history(tmp_path / "two")[1]
    assert two["clusters"] == one["clusters"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_results_table_names_the_flattering_row():
    rows = [
        {"epoch": n, "mAP": mAP, "rank1": mAP, "rank5": mAP, "rank10": mAP} for n, mAP in enumerate((0.1, 0.5, 0.4))
    ]
    table = results_table(rows).splitlines()
    assert table[1].split() == ["start"] + ["10.0"] * 4
    assert table[2].startswith("best, epoch 1") and table[2].split()[-4:] == ["50.0"] * 4
    assert table[3].startswith("last, epoch 2") and table[3].split()[-4:] == ["40.0"] * 4
