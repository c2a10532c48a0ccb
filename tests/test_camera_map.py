"""Maps of features by camera: the equations, what must not matter, few crops, and a network that keeps its map."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_networks import SMALL, images, small, write_run

from affscl.data.datasets import Sample, load_dataset
from affscl.data.domains import SOURCE, TARGET
from affscl.data.store import ImageStore
from affscl.data.synthetic import colour_rows, make_dataset
from affscl.labels.camera_map import (
    CameraMapOptions,
    ColourView,
    MappedLabeller,
    fit_camera_map,
    make_mapped,
    root,
    shrinkage,
)
from affscl.labels.clustering import ClusterOptions
from affscl.labels.labellers import chosen_settings, cluster_labeller
from affscl.labels.links import WEIGHTS
from affscl.model.extraction import extract
from affscl.model.network import AFF, load_model
from affscl.model.norms import CameraMap
from affscl.scores.benchmark import evaluate_model, logged_scores
from affscl.training.config import RECIPES, Config
from affscl.training.loop import prepare, train


def world(cams=2, people=12, crops=6, d=10, seed=0, strength=1.0):
    """Unit rows of people seen by cameras that shift and stretch; labels with outliers; camids."""
    rng = np.random.default_rng(seed)
    pids, camids = (np.repeat(np.arange(people), crops * cams), np.tile(np.repeat(np.arange(cams), crops), people))
    x = rng.normal(size=(people, d))[pids] + 0.3 * rng.normal(size=(len(pids), d))
    for c in range(cams):
        own = camids == c
        x[own] = x[own] @ (np.eye(d) + strength * rng.normal(size=(d, d)) / d**0.5) + strength * rng.normal(size=d)
    labels = np.where(rng.random(len(pids)) < 0.1, -1, pids * cams + camids)
    return F.normalize(torch.from_numpy(x).float()), labels, camids * 3 + 2


def power(c, share, p):
    shrunk = (1 - share) * c + share * np.trace(c) / len(c) * np.eye(len(c))
    values, vectors = np.linalg.eigh(shrunk)
    return vectors @ np.diag(values**p) @ vectors.T


def by_hand(x, labels, camids, lam=shrinkage):
    """The definition, in loops, float64."""
    x, d, rest = x.double().numpy(), x.shape[1], []
    for label in set(labels[labels >= 0]):
        for camera in set(camids):
            part = x[(labels == label) & (camids == camera)]
            rest += [row - part.mean(0) for row in part]
    p = power(sum(np.outer(r, r) for r in rest) / len(rest), lam(d, len(rest)), -0.5)
    y = np.stack([(row - x[camids == c].mean(0)) @ p for row, c in zip(x, camids)])
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    c_of = {c: y[camids == c].T @ y[camids == c] / (camids == c).sum() for c in set(camids)}
    common, out = sum(c_of.values()) / len(c_of), []
    for row, c in zip(y, camids):
        share = lam(d, int((camids == c).sum()))
        out.append(row @ power(c_of[c], share, -0.5) @ power(common, share, 0.5))
    out = np.stack(out)
    return torch.from_numpy(out / np.linalg.norm(out, axis=1, keepdims=True)).float()


def crops(camids):
    return [Sample(f"{i}", None, None if c is None else int(c)) for i, c in enumerate(camids)]


def mapped(x, labels, camids, **options):
    return fit_camera_map(x, labels, camids, **options)(x, torch.from_numpy(camids))


class TestFit:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(2, 4), st.integers(2, 8), st.integers(4, 7), st.integers(2, 12), st.integers(0, 99))
    def test_equals_the_definition(self, cams, people, crops, d, seed):
        x, labels, camids = world(cams, people, crops, d, seed)
        torch.testing.assert_close(mapped(x, labels, camids), by_hand(x, labels, camids), rtol=1e-3, atol=2e-4)

    def test_rotated_features_have_the_rotated_map(self):
        x, labels, camids = world(3)
        q = torch.linalg.qr(torch.randn(10, 10))[0]
        torch.testing.assert_close(mapped(x @ q, labels, camids), mapped(x, labels, camids) @ q, rtol=1e-3, atol=1e-4)

    def test_order_of_crops_and_names_of_clusters_and_cameras_do_not_matter(self):
        x, labels, camids = world(3)
        order = np.random.default_rng(1).permutation(len(x))
        wanted = mapped(x, labels, camids)
        other_names = np.where(labels < 0, -1, 500 - labels), 90 - 7 * camids
        torch.testing.assert_close(mapped(x[order], labels[order], camids[order]), wanted[order], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mapped(x, *other_names), wanted, rtol=1e-3, atol=1e-4)

    def test_every_camera_twice_changes_nothing(self):
        x, labels, camids = world(2)
        fixed = {"shrink": lambda d, n: 0.4}
        twice = torch.cat([x, x]), np.concatenate([labels, labels]), np.concatenate([camids, camids + 50])
        torch.testing.assert_close(
            mapped(*twice, **fixed), mapped(x, labels, camids, **fixed).repeat(2, 1), rtol=1e-3, atol=1e-4
        )

    def test_between_equal_cameras_there_is_nothing_to_map(self):
        x, labels, _ = world(1, people=20)
        found = fit_camera_map(torch.cat([x, x]), np.tile(labels, 2), [4] * len(x) + [9] * len(x))
        torch.testing.assert_close(found.matrix[0], found.matrix[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean[0], found.mean[1])
        alone = fit_camera_map(x, labels, [4] * len(x), shrink=lambda d, n: shrinkage(d, 2 * n))
        torch.testing.assert_close(found.matrix[0], alone.matrix[0], rtol=1e-3, atol=1e-3)

    def test_it_undoes_what_cameras_did(self):
        x, labels, camids = world(2, people=60, d=24, strength=0.7)
        people = np.repeat(np.arange(60), 12)
        y = mapped(x, labels, camids)

        def found(z):  # share of crops whose nearest of the other camera shows the same person
            near = (z @ z.T).masked_fill(torch.from_numpy(camids[:, None] == camids), -9).argmax(1)
            return (people[near] == people).mean()

        assert found(y) > found(x) + 0.2

    def test_few_crops_are_hardly_trusted(self):
        assert [round(shrinkage(1280, n), 2) for n in (0, 7239, 3620)] == [1.0, 0.47, 0.64]
        x, labels, camids = world(2)
        flat = mapped(x, labels, camids, shrink=lambda d, n: 1.0)
        centred = torch.stack([x[i] - x[camids == c].mean(0) for i, c in enumerate(camids)])
        torch.testing.assert_close(flat, F.normalize(centred), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("spoil", ("one crop", "identical crops", "no cluster", "singletons", "equal rows"))
    def test_degenerate_worlds_keep_unit_rows(self, spoil):
        x, labels, camids = world(2)
        if spoil == "one crop":
            camids = np.where(np.arange(len(x)) == 3, 77, camids)
        elif spoil == "identical crops":
            x[camids == 2] = x[0].clone()
        elif spoil == "no cluster":
            labels = labels * 0 - 1
        elif spoil == "singletons":
            labels = np.arange(len(x))
        else:
            x = x[:1].expand(len(x), -1)
        y = mapped(x, labels, camids)
        torch.testing.assert_close(y.norm(dim=1), torch.ones(len(y)), rtol=1e-4, atol=1e-4)

    def test_refuses_unknown_cameras_and_wrong_sizes(self):
        x, labels, camids = world(2)
        with pytest.raises(ValueError, match="1 of 144 have none"):
            fit_camera_map(x, labels, [None, *camids[1:]])
        with pytest.raises(ValueError, match="144 features, 143 labels"):
            fit_camera_map(x, labels[1:], camids)

    def test_powers(self):
        c = torch.cov(torch.randn(5, 9)).double()
        half = root(c, 0.2, 0.5)
        torch.testing.assert_close(half @ half, 0.8 * c + 0.2 * c.trace() / 5 * torch.eye(5).double())
        torch.testing.assert_close(root(c, 0.2, -0.5) @ half, torch.eye(5).double())


class TestLabeller:
    def test_labels_the_mapped_features_and_fits_once(self):
        x, labels, camids = world(2)
        asked = []

        def labeller(features, epoch):
            asked.append(features)
            return labels

        mapping = make_mapped(labeller, CameraMapOptions(camera_map=True), crops(camids))
        assert isinstance(mapping, MappedLabeller)
        mapping.fit(x, 1)
        assert mapping(x, 2) is labels and asked[0] is x and len(asked) == 2
        torch.testing.assert_close(asked[1], by_hand(x, labels, camids), rtol=1e-3, atol=1e-4)
        mapping(x.clone(), 3)
        assert len(asked) == 4, "other features, another map"

    def test_settings_chosen_for_the_mapped_features_are_told(self):
        x, labels, camids = world(2)
        samples = crops(camids)
        options = ClusterOptions(k1="auto", eps=0.6)
        mapping = MappedLabeller(cluster_labeller(options, camids), samples)
        mapping(x, 1)
        alone = cluster_labeller(options, camids)
        alone(mapping.fit(x, 1)(x, torch.from_numpy(camids)), 1)
        assert chosen_settings(mapping) == chosen_settings(alone) != {}

    def test_one_camera_is_told_and_unknown_ones_refused(self):
        plain = lambda features, epoch: np.zeros(1)  # noqa: E731
        assert make_mapped(plain, CameraMapOptions(), crops([None, 1])) is plain
        with pytest.warns(UserWarning, match="one camera"):
            assert make_mapped(plain, CameraMapOptions(camera_map=True), crops([3, 3])) is plain
        for camids in ([None, None], [1, 2, None]):
            with pytest.raises(ValueError, match="camera_map needs the camera of every crop"):
                make_mapped(plain, CameraMapOptions(camera_map=True), crops(camids))


def some_map(dim, camids=(1, 2)):
    g = torch.Generator().manual_seed(3)
    c = len(camids)
    return CameraMap(
        torch.tensor(camids), 0.01 * torch.randn(c, dim, generator=g), torch.randn(c, dim, dim, generator=g)
    )


class TestNetwork:
    def test_a_run_keeps_its_map(self, tmp_path):
        model = small().eval()
        x, camids = images(), torch.tensor([1, 2, 1, 2, 1, 2])
        raw = extract(model, x)
        model.camera_map = some_map(model.dim)
        wanted = model.camera_map(raw, camids)
        torch.testing.assert_close(extract(model, x, camids=camids), wanted)
        torch.testing.assert_close(extract(model, x, camids=camids, rows=[4, 1]), wanted[[4, 1]], rtol=1e-4, atol=1e-5)
        write_run(tmp_path / "run", model)
        torch.testing.assert_close(extract(load_model(tmp_path / "run"), x, camids=camids), wanted)

    @pytest.mark.parametrize("camera_norm", (False, True))
    def test_cameras_are_known_by_name_and_unknown_ones_said_once_and_left_raw(self, tmp_path, camera_norm):
        data = load_dataset("market1501", make_dataset(tmp_path / "world", n_ids=4, n_cams=3, seed=1)).train
        model = small(**(dict(camera_norm=True, camids={1: "a", 2: "b"}) if camera_norm else {})).eval()
        renamed = [s._replace(camera={1: "b", 2: "a", 3: "c"}[s.camid]) for s in data]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = extract(model, renamed)
        model.camera_map = some_map(model.dim)
        model.camera_map.names = ["a", "b"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = [extract(model, renamed) for _ in range(2)]
            nameless = extract(model, images())
        swapped = torch.tensor([{1: 2, 2: 1, 3: -1}[s.camid] for s in data])
        torch.testing.assert_close(found[0], model.camera_map(raw, swapped), rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0][swapped < 0], raw[swapped < 0])
        said = [str(w.message) for w in told if "stay raw" in str(w.message)]
        assert len(said) == 2 and "training (c)" in said[0] and "6 of 6" in said[1] and len(nameless) == 6

    def test_states_with_and_without_a_map_replace_each_other(self):
        with_map, without = small(), small()
        with_map.camera_map = some_map(with_map.dim, (5, 6, 9))
        without.load_state_dict(with_map.state_dict())
        assert torch.equal(without.camera_map.matrix, with_map.camera_map.matrix)
        without.load_state_dict(small().state_dict())
        assert without.camera_map is None

    def test_weights_of_a_run_with_a_map_fit_without_a_word(self, tmp_path):
        model = small()
        model.camera_map = some_map(model.dim)
        write_run(tmp_path / "run", model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = AFF(**SMALL, weights=str(tmp_path / "run" / "model.safetensors"))
        assert again.camera_map is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data = make_dataset(tmp_path_factory.mktemp("world") / "market", n_ids=24, n_cams=3, seed=5)
    return replace(
        RECIPES["tiny"], dataset="market1501", data=str(data), device="cpu", epochs=2, iterations=2, p=4, k=4, k1=10
    )


class TestRun:
    def test_scores_are_those_of_the_saved_network_and_resumed_runs_are_the_same(self, tiny, tmp_path):
        config = replace(tiny, camera_map=True, crossing=True)
        done = train(config, tmp_path / "done")
        job = prepare(config)
        saved = load_model(done.run)
        found = evaluate_model(saved, job.query, job.gallery, mixed=True)
        last = done.history[-1]
        assert last["mAP"] == pytest.approx(found["as extracted"].mAP, abs=1e-6)
        assert last["mixed_mAP"] == pytest.approx(found["mixed gallery"].mAP, abs=1e-6)
        saved.camera_map = None
        assert last["unmapped_mAP"] == pytest.approx(
            evaluate_model(saved, job.query, job.gallery)["as extracted"].mAP, abs=1e-6
        )
        train(replace(config, epochs=1), tmp_path / "parts")
        values = json.loads((tmp_path / "parts" / "config.json").read_text()) | {"epochs": 2}
        resumed = train(Config(**values), resume=tmp_path / "parts")
        a, b = (load_file(run / "model.safetensors") for run in (done.run, resumed.run))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        again = train(Config(**values), resume=tmp_path / "parts")  # nothing left to do
        assert torch.equal(again.model.camera_map.matrix, saved_matrix(resumed.run))

    def test_supervised_runs_have_a_map_for_searching(self, tiny, tmp_path):
        config = replace(
            tiny, labels="truth", criterion="cross_entropy_triplet", camera_map=True, crossing=True, epochs=1
        )
        done = train(config, tmp_path / "run")
        assert done.history[-1]["ari"] == 1 and "unmapped_mAP" in done.history[-1]
        assert done.model.camera_map.camids.tolist() == [1, 2, 3]

    def test_a_source_alone_is_refused_and_pretraining_maps_the_target(self):
        with pytest.raises(ValueError, match="camera_map=True and adapt='source'"):
            replace(RECIPES["tiny"], source="synthetic", adapt="source", camera_map=True)
        for adapt in ("joint", "pretrain"):
            assert replace(RECIPES["tiny"], source="synthetic", adapt=adapt, camera_map=True).camera_map


def saved_matrix(run):
    return load_file(run / "model.safetensors")["camera_map.matrix"]


def test_logged_scores_keep_both():
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(20, 8, generator=g))
    samples = [[Sample(f"{c}_{i}", i % 5, 1 + c) for i in range(10)] for c in (0, 1)]
    camera_map = some_map(8)
    both = logged_scores((x[:10], x[10:]), samples, camera_map)
    raw = logged_scores((x[:10], x[10:]), samples)
    assert both["unmapped_mAP"] == raw["mAP"] and both["unmapped_mixed_mAP"] == raw["mixed_mAP"]
    moved = camera_map(x[:10], torch.tensor([1] * 10)), camera_map(x[10:], torch.tensor([2] * 10))
    assert both["mAP"] == logged_scores(moved, samples)["mAP"] and not any(k.startswith("unmapped") for k in raw)


# --- colours -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dressed(tmp_path_factory):
    """Crops of a source and a target in one store; the target's under four cameras."""
    folder = tmp_path_factory.mktemp("colours")
    people = load_dataset("market1501", make_dataset(folder / "world", n_ids=120, n_cams=4, seed=2)).train
    samples = [sample._replace(domain=SOURCE if i < 10 else TARGET) for i, sample in enumerate(people)]
    return ImageStore(samples, 64, 32, cache=folder, progress=False)


def test_colours_are_those_of_the_targets_crops_and_mapped_by_camera(dressed, monkeypatch):
    looked, batch = [], ImageStore.batch
    monkeypatch.setattr(ImageStore, "batch", lambda self, rows: looked.append(len(rows)) or batch(self, rows))
    view, target = ColourView(dressed), dressed.samples[10:]
    assert not looked, "nobody has asked yet"
    camids = [sample.camid for sample in target]
    labels = np.unique([sample.pid * 10 + sample.camid for sample in target], return_inverse=True)[1]
    labels[::9] = -1
    seen = view(labels)
    rows = torch.from_numpy(colour_rows(batch(dressed, np.arange(10, len(dressed)))))
    wanted = fit_camera_map(rows, labels, camids)(rows, torch.tensor(camids))
    assert torch.equal(seen, wanted) and torch.allclose(seen.norm(dim=1), torch.ones(len(target)), atol=1e-5)
    assert sum(looked) == len(target) and max(looked) <= 256
    view(np.zeros_like(labels))
    assert sum(looked) == len(target), "pixels are read once"


def test_colours_need_every_camera(dressed):
    crops = ImageStore([s._replace(camid=None) for s in dressed.samples[10:14]], 64, 32, cache=dressed.path.parent)
    with pytest.raises(ValueError, match="4 of 4 have none"):
        ColourView(crops)(np.zeros(4, int))


COLOURED = dict(camera_links=1.0, link_colours="auto", epochs=2, iterations=2, world_ids=24, world_cams=3, p=4, k=2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"camera_map": True}, {"clustering": "apart"}, {"clustering": "hierarchical"}, {"source": "synthetic"}],
)
def test_a_run_with_colours_goes_on_where_it_stopped(tmp_path, changes):
    config = replace(RECIPES["tiny"], device="cpu", **COLOURED | changes)
    whole = train(config, tmp_path / "whole")
    train(replace(config, epochs=1), tmp_path / "parted")
    again = train(config, resume=tmp_path / "parted")
    for name in "clusters", "loss", "mAP", "link_colours":
        assert again.history[-1][name] == whole.history[-1][name], name
    assert all(row["link_colours"] in WEIGHTS for row in whole.history[1:])


def test_colours_have_a_say(tmp_path):
    config = replace(RECIPES["tiny"], device="cpu", camera_links=1.0, clustering="apart", epochs=1, iterations=1)
    rows = [train(replace(config, link_colours=w), tmp_path / f"{w}").history[1] for w in (0.0, 5.0)]
    assert rows[0]["ari"] != rows[1]["ari"]
