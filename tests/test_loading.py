"""The loader: the same batches whatever the number of workers and processes."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from affscl.data.augmentation import augment, normalise
from affscl.data.datasets import Sample
from affscl.data.domains import SOURCE, TARGET
from affscl.data.sampling import BatchPlan, joint_batches, pk_batches
from affscl.data.store import ImageStore
from affscl.training.config import BatchOptions, Config
from affscl.training.loading import draw_batches, load_data, suggested_pattern, train_loader


@pytest.fixture
def samples(tmp_path):
    """Twelve crops of noise: six people, three cameras."""
    rng = np.random.default_rng(0)
    (tmp_path / "crops").mkdir()
    made = [Sample(str(tmp_path / "crops" / f"{i:04d}_c{i % 3}.png"), i // 2, i % 3) for i in range(12)]
    for sample in made:
        Image.fromarray(rng.integers(0, 256, (48, 24, 3), dtype=np.uint8)).save(sample.path)
    return made


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


class TestTrainLoader:
    @pytest.fixture
    def parts(self, samples, cache):
        labels = np.array([s.pid for s in samples])
        labels[-1] = -1
        store = ImageStore(samples, 32, 16, cache)
        batches = pk_batches(labels, [s.camid for s in samples], BatchPlan(3, 4, 5), np.random.default_rng(0))
        return store, labels, batches

    @staticmethod
    def tensors(*arguments, workers=0, **named):
        return list(train_loader(*arguments, BatchOptions(workers=workers, pad=4), **named))

    def assert_same(self, one, other):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def test_what_a_batch_holds(self, parts):
        store, labels, batches = parts
        for i, (images, targets, indices) in enumerate(self.tensors(*parts, seed=(1, 2))):
            assert torch.equal(indices, torch.from_numpy(batches[i])) and indices.dtype == torch.int64
            assert torch.equal(targets, torch.from_numpy(labels[batches[i]])) and targets.dtype == torch.int64
            expected = augment(store.batch(batches[i]), np.random.default_rng((1, 2, i)), pad=4)
            assert torch.equal(images, expected) and images.dtype == torch.float32

    def test_options_reach_the_augmentation(self, parts):
        store, labels, batches = parts
        plain = BatchOptions(flip=0, pad=0, erase=0)
        for images, _, indices in train_loader(store, labels, batches, plain, seed=(0, 0)):
            assert torch.equal(images, normalise(store.batch(indices)))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_same_tensors_whatever_the_number_of_workers(self, parts, workers):
        self.assert_same(self.tensors(*parts, seed=(3, 4)), self.tensors(*parts, seed=(3, 4), workers=workers))

    @pytest.mark.parametrize("processes", [1, 2, 3, 4, 12])
    def test_processes_share_a_batch_exactly(self, parts, processes):
        whole = self.tensors(*parts, seed=(3, 4))
        shared = [self.tensors(*parts, seed=(3, 4), rank=rank, processes=processes) for rank in range(processes)]
        self.assert_same(
            whole, [[torch.cat(pieces) for pieces in zip(*batch, strict=True)] for batch in zip(*shared, strict=True)]
        )

    def test_seed_epoch_and_iteration_all_matter(self, parts):
        store, labels, batches = parts
        same = [batches[0]] * 2
        runs = [self.tensors(store, labels, same, seed=(s, e)) for s, e in ((0, 0), (0, 1), (1, 0))]
        seen = [images for run in runs for images, _, _ in run]
        assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])

    def test_global_generators_are_left_alone(self, parts):
        torch.manual_seed(5)
        np.random.seed(5)
        expected = torch.rand(3), np.random.rand(3)
        torch.manual_seed(5)
        np.random.seed(5)
        self.tensors(*parts, seed=(0, 0))
        assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])

    def test_batches_of_two_domains_may_be_joined(self, parts):
        store, labels, batches = parts
        joined = [np.concatenate([a, b[:4]]) for a, b in zip(batches, batches[::-1], strict=True)]
        assert [len(t) for _, t, _ in self.tensors(store, labels, joined, seed=(0, 0))] == [16] * 5

    def test_batches_that_do_not_divide(self, parts):
        with pytest.raises(ValueError, match="12 crops does not divide among 5"):
            self.tensors(*parts, seed=(0, 0), processes=5)

    def test_labels_of_any_kind(self, parts):
        store, labels, batches = parts
        for kind in (labels.tolist(), torch.from_numpy(labels), labels.astype(np.int32)):
            self.assert_same(self.tensors(*parts, seed=(0, 0)), self.tensors(store, kind, batches, seed=(0, 0)))


class TestDrawBatches:
    LABELS = np.arange(24) % 6
    PLAN = BatchPlan(4, 2, 3, False)
    SIZES = dict(p=4, k=2, iterations=3, camera_sampling=False)

    def test_without_a_source(self):
        samples = [Sample("", None, i % 3) for i in range(24)]
        drawn = draw_batches(Config(**self.SIZES), samples, self.LABELS, np.random.default_rng(0))
        expected = pk_batches(self.LABELS, [s.camid for s in samples], self.PLAN, np.random.default_rng(0))
        assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))

    @pytest.mark.parametrize("processes", [1, 2])
    def test_with_a_source_each_part_is_half_source(self, processes):
        samples = [Sample("", None, i % 3, SOURCE if i % 6 < 3 else TARGET) for i in range(24)]
        config = Config(**self.SIZES, source="synthetic")
        drawn = draw_batches(config, samples, self.LABELS, np.random.default_rng(0), processes)
        domains = np.array([s.domain for s in samples])
        camids = [s.camid for s in samples]
        expected = joint_batches(self.LABELS, domains, camids, self.PLAN, np.random.default_rng(0), processes)
        assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))
        for batch in drawn:
            assert all((domains[part] == SOURCE).mean() == 0.5 for part in np.split(batch, processes))

    def test_after_pretraining_the_target_stands_alone(self):
        samples = [Sample("", None, i % 3, TARGET) for i in range(24)]
        config = Config(**self.SIZES, source="synthetic", adapt="pretrain")
        assert len(draw_batches(config, samples, self.LABELS, np.random.default_rng(0))) == 3


class TestLoadData:
    WORLD = dict(world_ids=6, world_cams=2, dataset="synthetic")

    def test_a_world_is_drawn_once_and_named_by_its_settings(self, cache):
        config = Config(**self.WORLD, cache=str(cache))
        first = load_data(config)
        assert first.name == "synthetic" and first.root.is_relative_to(cache) and len(list(cache.rglob("*.jpg")))
        made = first.root.stat().st_mtime_ns
        assert load_data(config) == first and first.root.stat().st_mtime_ns == made
        other = load_data(Config(**self.WORLD, cache=str(cache), world_seed=1))
        assert other.root != first.root

    def test_data_says_where_the_world_lies(self, tmp_path):
        assert load_data(Config(**self.WORLD, data=str(tmp_path))).root.parent == tmp_path

    @pytest.mark.parametrize("adapt, kept", [("joint", {SOURCE, TARGET}), ("pretrain", {TARGET}), ("source", {SOURCE})])
    def test_what_a_source_adds_to_train(self, cache, adapt, kept):
        alone = load_data(Config(**self.WORLD, cache=str(cache)))
        data = load_data(Config(**self.WORLD, cache=str(cache), source="synthetic", adapt=adapt))
        assert {sample.domain for sample in data.train} == kept
        assert [s.path for s in data.query] == [s.path for s in alone.query]
        if TARGET in kept:
            own = [sample.path for sample in data.train if sample.domain == TARGET]
            assert own == [sample.path for sample in alone.train]

    def test_a_pattern_is_for_the_folder_only(self, samples, cache, tmp_path):
        config = Config(
            **self.WORLD
            | dict(dataset="folder", data=str(tmp_path / "crops"), pattern=r"(?P<pid>\d+)_c(?P<camid>\d+)"),
            source="synthetic",
            source_data=str(cache),
            cache=str(cache),
        )
        assert {sample.domain for sample in load_data(config).train} == {SOURCE, TARGET}


class TestCamerasThatNobodyNamed:
    def folder(self, root, names):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16)).save(root / name)
        return Config(dataset="folder", data=str(root))

    @pytest.mark.parametrize(
        "names, cameras",
        [
            (["gate/{}.jpg", "lobby/{}.png"], ["gate", "lobby"]),
            (["a/Camera 1/{}.jpg", "a/camera 12/{}.jpg"], ["1", "12"]),
            (["{}_cam-3.jpg", "{}_cam-4.jpg"], ["3", "4"]),
            (["day1/c2/{}.jpg", "day1/c5/{}.jpg"], ["2", "5"]),
            (["channel_01_{}.jpg", "channel_02_{}.jpg"], ["01", "02"]),
        ],
    )
    def test_they_are_suggested_and_the_suggestion_reads_them(self, tmp_path, names, cameras):
        paths = [name.format(i) for name in names for i in range(3)]
        config = self.folder(tmp_path, paths)
        pattern, found = suggested_pattern(paths)
        assert found == cameras
        with pytest.warns(UserWarning, match="add --pattern"):
            assert {sample.camid for sample in load_data(config).train} == {None}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = load_data(Config(dataset="folder", data=str(tmp_path), pattern=pattern)).train
        assert len({sample.camid for sample in read}) == 2 and len(read) == len(paths)

    @pytest.mark.parametrize(
        "names",
        [
            ["{}.jpg", "x{}.jpg"],  # no form
            ["gate/{}.jpg"],  # one camera
            ["0001/{}.jpg", "0002/{}.jpg"],  # numbers: people, as likely as not
            ["gate/{}.jpg", "lobby/{}.jpg", "{}.jpg"],  # one that does not fit
            [f"place{i:03}x/{{}}.jpg" for i in range(65)],  # too many
        ],
    )
    def test_or_not(self, tmp_path, names):
        config = self.folder(tmp_path, [name.format(i) for name in names for i in range(2)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_data(config)

    def test_known_ones_are_not_talked_about(self, tmp_path):
        config = self.folder(tmp_path, [f"gate/000{i}_c{c}s1_000000_00.jpg" for i in (1, 2) for c in (1, 2)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len({sample.camid for sample in load_data(config).train}) == 2

    def test_a_camera_with_one_crop_is_a_name_by_chance(self):
        assert suggested_pattern(["gate/1.jpg", "gate/2.jpg", "lobby/1.jpg"]) is None and suggested_pattern([]) is None
