"""The loop: what it may read, what it writes, how it goes on, and its learning rate."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from long_forms import LONG
from PIL import Image

from affscl.criteria.factory import FIELD
from affscl.data.datasets import market_samples
from affscl.data.synthetic import make_dataset
from affscl.labels.kept import kept_epochs, labels_file, read_labels
from affscl.labels.labellers import own_classes
from affscl.labels.signs import stability
from affscl.model.network import load_model
from affscl.scores.benchmark import evaluate_model
from affscl.scores.best import best_epoch
from affscl.training import config as config_module
from affscl.training import loop as training
from affscl.training.cli import eval_command
from affscl.training.config import RECIPES
from affscl.training.loop import learning_rate, prepare, train
from affscl.training.runs import load_config, new_run, read_history

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


class TestRun:
    def test_folder_holds_what_it_should(self, done):
        assert {p.name for p in done.run.iterdir()} == {
            "config.json",
            "metrics.jsonl",
            "model.safetensors",
            "best.safetensors",
            *(["best.previous.safetensors"] if best_epoch(done.history).epoch == 2 else []),
            "resume.safetensors",
            "resume.previous.safetensors",
            "labels",
        }
        assert kept_epochs(done.run) == [1, 2]
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
        scores = evaluate_model(load_model(done.run), job.query, job.gallery)["as extracted"]
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

    @pytest.mark.parametrize("outliers", [False, True])
    def test_a_criterion_knows_which_crops_it_judges(self, outliers, short, tmp_path, monkeypatch):
        seen, labels, make = [], [], training.make_criterion

        def watched(config, features, given, *rest):
            criterion = make(config, features, given, *rest)
            criterion.outliers = outliers
            for name in ("forward", "update"):
                method = getattr(criterion, name)

                def replaced(output, targets, indices, method=method):
                    seen.append((targets, indices))
                    return method(output, targets % (given.max() + 1), indices)  # no row for a class of one crop

                setattr(criterion, name, replaced)
            labels.append(own_classes(given) if outliers else given)
            return criterion

        monkeypatch.setattr(training, "make_criterion", watched)
        train(replace(short, epochs=1, eps=0.4), tmp_path / "run")
        assert len(seen) == 2 * short.iterations
        for targets, indices in seen:
            assert np.array_equal(labels[0][indices.numpy()], targets.numpy())
        kept = read_labels(tmp_path / "run")[1].values()
        drawn = {int(label) for targets, _ in seen for label in targets}
        assert -1 in kept and bool(drawn - set(kept)) == outliers

    @pytest.mark.parametrize("changes", [{"criterion": "cap"}, {"criterion": "o2cap"}, {"negatives": "camera"}])
    def test_what_needs_cameras_is_refused_before_any_crop_is_read(self, changes, tmp_path, monkeypatch):
        for i in range(4):
            folder = tmp_path / "crops" / "train"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 64), (i, i, i)).save(folder / f"{i}.jpg")
        monkeypatch.setattr(training, "ImageStore", None)  # whoever calls it fails otherwise
        config = replace(SHORT, dataset="folder", data=str(tmp_path / "crops"), **changes)
        with pytest.raises(ValueError, match=f"{next(iter(changes.values()))}.*4 of 4 have none.*--pattern"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_run_that_goes_on_gives_its_labeller_back_what_it_remembered(self, short, tmp_path, monkeypatch):
        began, make = [], training.run_labeller

        def counting(*arguments):
            labeller, words = make(*arguments)

            def counted(features, epoch):
                counted.kept.setdefault("first", epoch)
                began.append(counted.kept["first"])
                return labeller(features, epoch)

            counted.kept = {}
            return counted, words

        monkeypatch.setattr(training, "run_labeller", counting)
        run = train(replace(short, epochs=1, iterations=1), tmp_path / "run").run
        train(replace(short, epochs=2, iterations=1), resume=run)
        assert began == [1, 1]

    @pytest.mark.parametrize("criterion", ["mean", "hard", "cluster_contrast", "hhcl", "cross_entropy_triplet", *FIELD])
    def test_every_criterion_runs_in_the_one_loop(self, short, tmp_path, criterion):
        with_pieces = dict(network="ssg", fusion="multiply") if criterion == "ssg" else {}
        config = replace(short, criterion=criterion, iterations=1, eval_every=9, **with_pieces)
        history = train(config, tmp_path / "run").history
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

        def breaks(store, labels, batches, options, seed, **rest):
            for number, batch in enumerate(loader(store, labels, batches, options, seed, **rest)):
                if seed[1] == 2 and number == 1:
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

    def test_damaged_or_missing_state(self, done, short, tmp_path):
        with pytest.raises(ValueError, match="resume.safetensors"):
            train(short, resume=tmp_path)
        (tmp_path / "resume.safetensors").write_bytes((done.run / "resume.safetensors").read_bytes()[:1000])
        with pytest.raises(ValueError, match="damaged"):
            train(short, resume=tmp_path)

    @pytest.mark.parametrize(
        "damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[: len(data) // 2], lambda _: b""]
    )
    def test_a_damaged_state_costs_an_epoch(self, damage, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        state = run / "resume.safetensors"
        state.write_bytes(damage(state.read_bytes()))
        with pytest.warns(UserWarning, match="damaged.*going on from the state before it, of epoch 1"):
            again = train(short, resume=run)
        assert same(again.model.state_dict(), done.model.state_dict())
        assert labels_file(run, 2).read_bytes() == labels_file(done.run, 2).read_bytes()
        assert [row["epoch"] for row in read_history(run)] == [0, 1, 2]
        with pytest.raises(ValueError, match="damaged"):
            (run / "model.safetensors").write_bytes(damage((run / "model.safetensors").read_bytes()))
            load_model(run)

    def test_a_state_between_two_renames(self, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        (run / "resume.safetensors").unlink()
        assert same(train(short, resume=run).model.state_dict(), done.model.state_dict())

    def test_both_states_damaged_or_lost(self, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        for name in ("resume.safetensors", "resume.previous.safetensors"):
            (run / name).write_bytes(b"")
        with pytest.raises(ValueError, match="no other state is left"):
            train(short, resume=run)
        for name in ("resume.safetensors", "resume.previous.safetensors"):
            (run / name).unlink()
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match="2 finished epochs, but resume.safetensors"):
            train(short, resume=run)
        assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before

    @pytest.mark.parametrize(
        "edit",
        [
            lambda lines: lines[:1] + lines[2:],
            lambda lines: lines + lines[1:],
            lambda lines: lines[::-1],
            lambda lines: [*lines, "", "", " "],
            lambda lines: [line.replace('"loss": ', '"loss": 1') for line in lines],
            lambda lines: ["not JSON"],
            lambda lines: ["[1, 2]", "null"],
            lambda lines: [*lines, json.dumps({"epoch": 3, "loss": 0.0})],
            lambda lines: [],
        ],
    )
    def test_the_state_knows_the_metrics(self, edit, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("".join(line + "\n" for line in edit(lines)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*mended from the state")
            result = train(short, resume=run)
        assert (run / "metrics.jsonl").read_text().splitlines() == lines
        assert same(result.model.state_dict(), done.model.state_dict())

    @pytest.mark.parametrize("change", [{"height": 128}, {"fusion": "residual"}, {"lr": 1e-3}, {"k1": 12}])
    def test_edited_settings_are_noticed(self, change, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        with pytest.raises(ValueError, match=f"keeps its settings: {list(change)[0]} is"):
            train(replace(short, epochs=3, **change), resume=run)

    def test_crops_removed_or_changed_are_noticed(self, done, short, world, tmp_path):
        other, run = Path(shutil.copytree(world, tmp_path / "other")), tmp_path / "run"
        shutil.copytree(done.run, run)
        names = sorted((other / "bounding_box_train").iterdir())
        kept = names[0].read_bytes()
        names[0].write_bytes(names[1].read_bytes())
        moved = replace(short, epochs=3, data=str(other))
        with pytest.raises(ValueError, match="other pixels in the train crops"):
            train(moved, resume=run)
        names[0].write_bytes(kept)
        for path in names[:30]:
            path.unlink()
        with pytest.raises(ValueError, match="42 train crops now, and 72 then"):
            train(moved, resume=run)
        assert [row["epoch"] for row in read_history(run)] == [0, 1, 2]

    def test_other_queries_are_said_and_a_moved_dataset_is_the_same(self, done, short, world, tmp_path):
        other, run = Path(shutil.copytree(world, tmp_path / "other")), tmp_path / "run"
        shutil.copytree(done.run, run)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(replace(short, data=str(other)), resume=run)
        next((other / "query").glob("0*.jpg")).unlink()
        with pytest.warns(UserWarning, match="do not compare: 16 query crops now, and 17 then"):
            train(replace(short, data=str(other)), resume=run)

    def test_other_threads_are_said(self, done, short, tmp_path):
        run = Path(shutil.copytree(done.run, tmp_path / "run"))
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            with pytest.warns(UserWarning, match=f"began with {threads} threads and goes on with {threads + 1}"):
                train(short, resume=run)
        finally:
            torch.set_num_threads(threads)

    def test_an_existing_folder_is_refused(self, short, done, tmp_path):
        with pytest.raises(FileExistsError, match="--resume"):
            train(short, done.run)
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="is a file, not a folder"):
            new_run(short, tmp_path / "file")


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
        with pytest.raises(ValueError, match=r"epoch 1, step 1 of 3: the loss is nan.*run.*after epoch 0.*lower lr"):
            train(short, tmp_path / "run")
        state = load_model(tmp_path / "run").state_dict()
        assert all(torch.isfinite(value.float()).all() for value in state.values()), "the last good state stays"

    @pytest.mark.parametrize("change", [{"lr": 1e38}, {"lr": 1e30, "criterion": "cross_entropy_triplet"}])
    def test_a_rate_that_makes_no_numbers_stops_at_once(self, change, short, tmp_path, monkeypatch):
        monkeypatch.setattr(config_module, "LARGEST_LR", float("inf"))
        with pytest.raises(ValueError, match=r"last good state, after epoch 0.*lower lr"):
            train(replace(short, **change), tmp_path / "run")
        assert [row["epoch"] for row in read_history(tmp_path / "run")] == [0]

    def test_features_that_are_no_numbers(self, short, tmp_path, monkeypatch):
        extract = training.extract_shared
        monkeypatch.setattr(training, "extract_shared", lambda *a: extract(*a) * float("inf"))
        with pytest.raises(ValueError, match="features"):
            train(replace(short, eval_every=9), tmp_path / "run")

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
        assert "Evaluation is left out" in said and "No evaluation" in said and "silhouette" in said
        before, now = (list(read_labels(result.run, epoch)[1].values()) for epoch in (1, 2))
        assert result.history[2]["stability"] == stability(before, now) and "stability" not in result.history[1]
        assert f"epoch before: ARI {stability(before, now):.2f}" in said
        assert 0 < result.history[-1]["largest_share"] <= 1 and -1 <= result.history[-1]["silhouette"] <= 1
        assert "mAP" not in result.history[-1] and result.history[-1]["ari"] is None
        assert np.isfinite(result.history[-1]["loss"])

    def test_unreadable_crops_are_all_listed_before_training(self, world, tmp_path):
        broken = Path(shutil.copytree(world, tmp_path / "broken"))
        names = sorted((broken / "bounding_box_train").iterdir())[3:5]
        for path in names:
            path.write_bytes(b"no picture")
        with pytest.raises(ValueError) as error:
            train(replace(SHORT, dataset="market1501", data=str(broken)), tmp_path / "run")
        assert all(path.name in str(error.value) for path in names)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("height, width", [(64, 32), pytest.param(256, 128, marks=LONG)])
def test_the_full_recipe_takes_its_steps(world, tmp_path, height, width):
    config = replace(
        RECIPES["market1501"],
        height=height,
        width=width,
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


# Learning rate


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 60), st.floats(1e-6, 1))
def test_without_options_the_rate_is_that_of_the_unsupervised_recipes(epoch, lr_step, lr):
    assert learning_rate(epoch, lr, lr_step) == lr * 0.1 ** ((epoch - 1) // lr_step)


def test_published_course_by_hand():
    shares = {1: 0.01, 2: 0.109, 6: 0.505, 10: 0.901, 11: 1, 40: 1, 41: 0.1, 70: 0.1, 71: 0.01, 120: 0.01}
    for epoch, share in shares.items():
        assert learning_rate(epoch, 3.5e-4, 20, warmup=10, milestones=(40, 70)) == pytest.approx(3.5e-4 * share), epoch


def test_warmup_grows_evenly_and_ends_at_the_full_rate():
    rates = [learning_rate(epoch, 1.0, 100, warmup=7) for epoch in range(1, 12)]
    steps = np.diff(rates[:8])
    np.testing.assert_allclose(steps, 0.99 / 7)
    assert rates[7:] == [1.0] * 4


def test_warmup_and_drops_multiply():
    both = [learning_rate(e, 2.0, 3, warmup=8) for e in range(1, 20)]
    alone = [learning_rate(e, 1.0, 99, warmup=8) * learning_rate(e, 2.0, 3) for e in range(1, 20)]
    np.testing.assert_allclose(both, alone)
    assert learning_rate(7, 1.0, 3, milestones=[4, 6]) == pytest.approx(0.01)  # lr_step is not read


class TestChosenSettings:
    def test_auto_is_chosen_each_epoch_printed_and_stored(self, short, tmp_path, capsys):
        run, _, history = train(replace(short, k1="auto", epochs=1), tmp_path / "run")
        row = history[-1]
        assert row == read_history(run)[-1] and {"k1", "k2", "min_samples"} <= row.keys()
        assert f"(k1 {row['k1']}, k2 {row['k2']}, min_samples {row['min_samples']})" in capsys.readouterr().out
        assert load_config(run).k1 == "auto" and "k1" not in history[0]


class TestCamerasByName:
    def test_one_more_train_crop_of_another_camera_changes_no_score(self, short, world, tmp_path, capsys):
        names, mine = {1: "gate", 2: "lobby", 3: "stairs"}, tmp_path / "mine"
        for split, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
            (mine / split).mkdir(parents=True)
            for sample in market_samples("market1501", world / folder):
                shutil.copy(sample.path, mine / split / f"{names[sample.camid]}_{sample.pid}_{Path(sample.path).name}")
        pattern = r"^(?P<camid>[a-z]+)_(?P<pid>\d+)_"
        config = replace(short, dataset="folder", data=str(mine), pattern=pattern, camera_norm=True, epochs=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = train(config, tmp_path / "run").run
        eval_command([str(run)])
        before = capsys.readouterr().out.splitlines()[-1]
        first = next((mine / "train").iterdir())
        shutil.copy(first, mine / "train" / ("attic_999_" + first.name))
        eval_command([str(run)])
        assert capsys.readouterr().out.splitlines()[-1] == before and before.startswith("as extracted: mAP")
        first = next((mine / "gallery").iterdir())
        shutil.copy(first, mine / "gallery" / ("attic_998_" + first.name))
        eval_command([str(run)])
        assert "1 of" in (said := capsys.readouterr().err) and "folder:attic" in said and said.count("not seen") == 1
