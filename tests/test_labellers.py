"""Who labels: the clusters, which never read a pid; the truth; and both in one numbering, against a naive loop."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_domains import people, source_world, target_world

from affscl.data.datasets import Sample
from affscl.data.domains import SOURCE, TARGET, join_domains
from affscl.data.sampling import BatchPlan, joint_batches
from affscl.labels import labellers
from affscl.labels.camera_map import MappedLabeller
from affscl.labels.clustering import ClusterOptions, pseudo_labels, require_clusters
from affscl.labels.labellers import (
    chosen_settings,
    cluster_labeller,
    is_joint,
    joint_labeller,
    joint_labels,
    make_labeller,
    own_classes,
    remembered,
    true_labels,
)
from affscl.labels.links import WEIGHTS, halves_agree, link_cameras
from affscl.labels.named import NamedLabeller, Word

cases = settings(max_examples=40, deadline=None)


class Secret:
    """A target sample whose pid nobody may look at."""

    path, camid, domain = "secret.jpg", 1, TARGET

    @property
    def pid(self):
        raise AssertionError("the pid of a target sample was read")


def samples(pids):
    return [Sample(f"{i}.jpg", pid, 1) for i, pid in enumerate(pids)]


@dataclass
class Settings(ClusterOptions):
    """What a labeller reads of a run's settings."""

    labels: str = "clusters"
    source: str | None = None
    adapt: str = "joint"


def crowd(n, people, seed=0, noise=0.4, cams=2, shift=0.0):
    """Unit features around so many centres, each camera adding a vector of its own, and their samples."""
    g = torch.Generator().manual_seed(seed)
    pids, camids = torch.arange(n) % people, torch.arange(n) // people % cams
    x = torch.randn(people, 32, generator=g)[pids] + noise * torch.randn(n, 32, generator=g)
    x = torch.nn.functional.normalize(x + shift * torch.randn(cams, 32, generator=g)[camids])
    return x, [Sample("", int(p), int(c)) for p, c in zip(pids, camids)]


# --- the factory -------------------------------------------------------------------------------------------------


def test_clusters_are_pseudo_labels_with_the_settings():
    x, train = crowd(240, 12)
    config = Settings(eps=0.5, min_samples=3, k1=15, k2=4)
    np.testing.assert_array_equal(make_labeller(config, train)(x, 1), pseudo_labels(x, 0.5, 3, 15, 4))


@pytest.mark.parametrize("links", [0.0, 1.0])
def test_clusters_never_read_a_pid(links):
    x, train = crowd(240, 12, shift=1.0)
    secret = [Secret() for _ in train]
    for hidden, sample in zip(secret, train):
        hidden.camid = sample.camid
    config = Settings(camera_links=links)
    np.testing.assert_array_equal(make_labeller(config, secret)(x, 1), make_labeller(config, train)(x, 1))
    with pytest.raises(AssertionError):
        make_labeller(replace(config, labels="truth"), secret)


def test_links_from_their_first_epoch_on():
    x, train = crowd(400, 10, cams=2, shift=1.5)
    camids = [sample.camid for sample in train]
    labeller = cluster_labeller(ClusterOptions(camera_links=1.0, links_from=3), camids)
    plain = pseudo_labels(x)
    linked = link_cameras(x, plain, camids, 1.0)
    assert linked.max() < plain.max()
    np.testing.assert_array_equal(labeller(x, 2), plain)
    np.testing.assert_array_equal(labeller(x, 3), linked)


@pytest.mark.parametrize("weight", [0.6, "auto"])
def test_a_view_has_its_say_in_links(monkeypatch, weight):
    x, train = crowd(400, 10, cams=2, shift=1.5)
    camids, told, heard = [sample.camid for sample in train], [], []
    monkeypatch.setattr(labellers, "link_cameras", lambda *a: told.append(a[4:]) or link_cameras(*a))
    options = ClusterOptions(camera_links=1.0, link_colours=weight, links_from=2)
    labeller = cluster_labeller(options, camids, lambda labels: heard.append(labels) or x)
    plain = labeller(x, 1)
    assert not heard and chosen_settings(labeller) == {}, "no links yet"
    labeller(x, 2)
    assert len(heard) == 1 and (heard[0] == plain).all(), "the view hears the labels that are to be joined"
    best = WEIGHTS[halves_agree(x, x, plain, camids).argmax()]
    assert told == [(x, 0.6 if weight == 0.6 else best)]
    assert chosen_settings(labeller) == ({} if weight == 0.6 else {"link_colours": best})


def test_a_view_of_outliers_is_not_asked():
    labels = np.full(6, -1)
    options = ClusterOptions(camera_links=1.0, link_colours="auto")
    assert (labellers.linked(torch.eye(6), labels, 1, options, [0, 1] * 3, lambda labels: 1 / 0) == labels).all()


def test_cameras_may_be_unknown_without_links():
    x, train = crowd(100, 5)
    unknown = [sample._replace(camid=None) for sample in train]
    assert make_labeller(Settings(), unknown)(x, 1).max() == 4
    with pytest.raises(ValueError, match="have none"):
        make_labeller(Settings(camera_links=1.0), unknown)(x, 1)


def test_the_truth_labels_the_upper_bound_and_the_source_alone():
    _, train = crowd(40, 5)
    for config in Settings(labels="truth"), Settings(source="market1501", adapt="source"):
        assert make_labeller(config, train)(None, 1).tolist() == true_labels(train).tolist()
        with pytest.raises(ValueError, match="3 of 43 have none"):
            make_labeller(config, train + samples([None] * 3))


def test_joint_asks_the_clusters_for_the_target_only():
    x, train = crowd(240, 12)
    train = [s._replace(domain=SOURCE if i < 60 else TARGET) for i, s in enumerate(train)]
    config = Settings(source="market1501", k1=15, k2=4)
    assert is_joint(config) and not is_joint(Settings()) and not is_joint(replace(config, adapt="pretrain"))
    want = joint_labels(train, pseudo_labels(x[60:], k1=15, k2=4))
    np.testing.assert_array_equal(make_labeller(config, train)(x, 1), want)


def test_after_pretraining_the_clusters_label():
    x, train = crowd(240, 12)
    config = Settings(source="market1501", adapt="pretrain")
    np.testing.assert_array_equal(make_labeller(config, train)(x, 1), pseudo_labels(x))


# --- true labels -------------------------------------------------------------------------------------------------


def test_true_labels_number_the_pids_in_order():
    labels = true_labels(samples([30, 7, 30, 1501, 7]))
    assert labels.dtype == np.int64 and labels.tolist() == [1, 0, 1, 2, 0]


@cases
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_true_labels_say_who_is_the_same(pids):
    labels = true_labels(samples(pids))
    assert sorted(set(labels)) == list(range(len(set(pids))))
    assert all((a == b) == (x == y) and (a < b) == (x < y) for a, x in zip(pids, labels) for b, y in zip(pids, labels))


def test_true_labels_need_every_pid():
    with pytest.raises(
        ValueError, match=r"labels='truth' needs a pid for every training crop, and 2 of 3 have none.*labels='clusters'"
    ):
        true_labels(samples([None, 4, None]))


# --- joint_labels ------------------------------------------------------------------------------------------------


def naive_labels(samples, target_labels):
    names = sorted({s.pid for s in samples if s.domain == SOURCE})
    waiting, out = list(target_labels), []
    for s in samples:
        label = names.index(s.pid) if s.domain == SOURCE else waiting.pop(0)
        out.append(label + len(names) if s.domain == TARGET and label >= 0 else label)
    return out


@settings(deadline=None, max_examples=60)
@given(
    domains=st.lists(st.sampled_from([SOURCE, TARGET]), max_size=30),
    seed=st.integers(0, 999),
    kind=st.sampled_from([list, np.array, torch.tensor]),
)
def test_equals_naive_labels_in_any_order(domains, seed, kind):
    rng = np.random.default_rng(seed)
    samples = [Sample("", 10, None, SOURCE), Sample("", 4, None, SOURCE)]
    samples += [Sample("", int(rng.integers(0, 15)), None, d) for d in domains]
    target_labels = rng.integers(-1, 6, domains.count(TARGET)).tolist()
    labels = joint_labels(samples, kind(target_labels))
    assert labels.dtype == np.int64
    assert labels.tolist() == naive_labels(samples, target_labels)


def test_labels_by_hand(joined):
    labels = joint_labels(joined.train, [0] * 6 + [-1] * 6 + [1] * 12)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 6 + [-1] * 6 + [4] * 12


def test_target_pids_are_never_read():
    samples = [*people("a", [5, 3], [1])]
    samples = [s._replace(domain=SOURCE) for s in samples] + [Secret()] * 5
    labeller = joint_labeller(samples, lambda features, epoch: np.array([0, 0, 1, 1, -1]))
    assert (
        labeller(torch.zeros(9, 2), 1).tolist()
        == joint_labels(samples, [0, 0, 1, 1, -1]).tolist()
        == [1, 1, 0, 0, 2, 2, 3, 3, -1]
    )


def test_shuffled_target_pids_change_nothing():
    target = target_world()
    pids = np.random.default_rng(0).permutation([s.pid for s in target.train]).tolist()
    shuffled = replace(target, train=[s._replace(pid=p) for s, p in zip(target.train, pids)])
    results = []
    for world in (target, shuffled):
        train = join_domains(source_world(), world).train
        labels = joint_labels(train, [0] * 6 + [1] * 6 + [2] * 12)
        domains, camids = [s.domain for s in train], [s.camid for s in train]
        batches = joint_batches(labels, domains, camids, BatchPlan(4, 3, 5), np.random.default_rng(1))
        results.append((labels.tolist(), domains, camids, [b.tolist() for b in batches]))
    assert [s.pid for s in target.train] != pids
    assert results[0] == results[1]


@pytest.mark.parametrize("target_labels", [[0] * 23, [0] * 25, [], [[0] * 24]])
def test_wrong_number_of_target_labels(joined, target_labels):
    with pytest.raises(ValueError, match="24 target crops, but target labels of shape"):
        joint_labels(joined.train, target_labels)


@pytest.mark.parametrize(
    "pids, message", [([None, 3], "has no pid for 1 of 2"), ([3, 3], "shows 1 person in 2"), ([], "shows 0 persons")]
)
def test_labels_need_a_labelled_source(pids, message):
    with pytest.raises(ValueError, match=f"source {message}"):
        joint_labels([Sample("", pid, None, SOURCE) for pid in pids] + [Sample("")], [0])


# --- joint_labeller ----------------------------------------------------------------------------------------------


def test_labeller_shows_the_clusterer_the_targets_rows_only():
    domains = [SOURCE, TARGET, TARGET, SOURCE, TARGET, SOURCE]
    samples = [Sample("", i, None, d) for i, d in enumerate(domains)]
    features, seen = torch.arange(12.0).view(6, 2), []

    def label_target(features, epoch):
        seen.append((features, epoch))
        return np.array([1, -1, 0])

    assert joint_labeller(samples, label_target)(features, 7).tolist() == [0, 4, -1, 1, 3, 2]
    assert seen[0][1] == 7 and torch.equal(seen[0][0], features[[1, 2, 4]])


def test_labeller_wants_all_features(joined):
    labeller = joint_labeller(joined.train, lambda features, epoch: np.zeros(len(features)))
    with pytest.raises(ValueError, match="24 features for 36 crops of both domains"):
        labeller(torch.zeros(24, 2), 1)


def test_source_classes_hide_missing_clusters_unless_the_target_is_asked(joined):
    labels = joint_labeller(joined.train, lambda features, epoch: np.full(len(features), -1))(torch.zeros(36, 2), 1)
    target = np.array([s.domain for s in joined.train]) == TARGET
    require_clusters(labels, 0.6, 4)  # passes: three source classes
    with pytest.raises(ValueError, match="found 0 clusters in 24 crops"):
        require_clusters(labels[target], 0.6, 4)


def test_a_labeller_tells_what_it_chose():
    x, samples = crowd(120, 20)
    camids = [sample.camid for sample in samples]
    labeller = cluster_labeller(ClusterOptions(k1="auto"), camids)
    assert chosen_settings(labeller) == {}
    labels = labeller(x, 1)
    chosen = chosen_settings(labeller)
    assert chosen.keys() == {"k1", "k2", "min_samples"}
    np.testing.assert_array_equal(labels, cluster_labeller(ClusterOptions(**chosen), camids)(x, 1))
    assert chosen_settings(cluster_labeller(ClusterOptions(), camids)) == {}


class TestMemory:
    def test_each_outlier_is_a_class_of_its_own(self):
        labels = np.array([-1, 3, 0, -1, 3, -1])
        assert own_classes(labels).tolist() == [4, 3, 0, 5, 3, 6]
        assert labels.tolist() == [-1, 3, 0, -1, 3, -1]  # not in place
        assert own_classes(np.array([-1, -1])).tolist() == [0, 1]
        assert own_classes(np.array([], np.int64)).tolist() == []

    def test_what_a_labeller_remembers_is_reached_through_those_around_it(self):
        def labeller(features, epoch):
            return np.zeros(len(features), np.int64)

        assert remembered(labeller) == {}
        labeller.kept = {"threshold": 0.5}
        samples = [Sample(f"{i}.jpg", i, i % 2, TARGET) for i in range(4)]
        words = {"0.jpg": Word(0, "anna")}
        around = NamedLabeller(joint_labeller(samples, labeller), words, samples, "")
        assert remembered(MappedLabeller(around, samples)) is labeller.kept

    @pytest.mark.parametrize("k1", [12, "auto"])
    def test_self_paced_keeps_its_first_threshold(self, k1):
        g = torch.Generator().manual_seed(0)
        options = ClusterOptions(eps=0.5, k1=k1, k2=4, self_paced=0.05)
        labeller, plain = (cluster_labeller(o, []) for o in (options, replace(options, self_paced=0.0)))
        x = torch.randn(20, 32, generator=g)[torch.arange(160) % 20]
        near, far = (torch.nn.functional.normalize(x + s * torch.randn(160, 32, generator=g)) for s in (0.6, 1.0))
        first, all_of_them = labeller(near, 1), plain(near, 1)
        threshold = remembered(labeller)["independence"]
        assert ((first >= 0) <= (all_of_them >= 0)).all() and remembered(plain) == {}
        second = labeller(far, 2)
        assert remembered(labeller) == {"independence": threshold}
        resumed = cluster_labeller(options, [])
        remembered(resumed).update(independence=threshold)
        assert np.array_equal(resumed(far, 2), second)
