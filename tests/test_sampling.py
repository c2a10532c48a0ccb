"""P x K batches and joint batches: their promises, against naive versions."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.domains import SOURCE, TARGET
from affscl.data.sampling import BatchPlan, camera_codes, cluster_turns, instances, joint_batches, pk_batches

configurations = st.integers(1, 12).flatmap(
    lambda clusters: st.tuples(
        st.lists(st.integers(-1, clusters - 1), min_size=1, max_size=60).filter(lambda labels: max(labels) >= 0),
        st.integers(1, 6),
        st.integers(1, 6),
        st.integers(0, 2**32),
        st.integers(1, 4),
        st.booleans(),
        st.booleans(),
    )
)


class TestPkBatches:
    @given(configurations)
    @settings(deadline=None, max_examples=150)
    def test_the_promises(self, configuration):
        labels, p, k, seed, n_cams, with_cameras, some_unknown = configuration
        rng = np.random.default_rng(seed)
        camids = (
            [int(c) if c or not some_unknown else None for c in rng.integers(0, n_cams, len(labels))]
            if with_cameras
            else None
        )
        labels = np.array(labels)
        sizes = Counter(labels[labels >= 0].tolist())
        batches = pk_batches(labels, camids, BatchPlan(p, k, 15), rng)
        assert len(batches) == 15
        visits = Counter({label: 0 for label in sizes})
        for batch in batches:
            assert batch.dtype == np.int64 and batch.shape == (p * k,)
            of_cluster = Counter(labels[batch].tolist())
            assert -1 not in of_cluster and len(of_cluster) == min(p, len(sizes))
            assert max(of_cluster.values()) - min(of_cluster.values()) <= (len(sizes) < p)  # exactly K, if there are P
            order = [labels[i] for i in batch]
            assert len([1 for a, b in zip(order, order[1:]) if a != b]) == len(of_cluster) - 1  # side by side
            for label, count in of_cluster.items():
                times = Counter(i for i in batch if labels[i] == label)
                assert len(times) == min(count, sizes[label])  # all distinct crops before any repeats
                assert max(times.values()) - min(times.values()) <= 1 or len(times) < sizes[label]
                self.check_cameras([i for i in batch if labels[i] == label], np.flatnonzero(labels == label), camids)
            visits.update(of_cluster.keys())
            assert max(visits.values()) - min(visits.values()) <= 1  # at every moment, not only in the end

    @staticmethod
    def check_cameras(drawn, members, camids):
        """While crops of other cameras than the anchor's are left, none of its own (or of an unknown one) is drawn."""
        if camids is None or camids[drawn[0]] is None:
            return
        other = {i for i in members if camids[i] is not None and camids[i] != camids[drawn[0]]}
        assert set(drawn[1 : 1 + len(other)]) <= other
        assert set(drawn[1 : 1 + len(other)]) == other or len(drawn) - 1 < len(other)

    def test_the_anchor_is_any_crop(self):
        anchors = Counter(
            int(b[0]) for b in pk_batches([0] * 5, [1, 1, 1, 1, 2], BatchPlan(1, 2, 3000), np.random.default_rng(0))
        )
        assert set(anchors) == set(range(5)) and all(500 < count < 700 for count in anchors.values())

    def test_cameras_can_be_ignored(self):
        labels, camids = [0] * 8, [1] * 7 + [2]
        partners = {
            on: [
                camids[a] != camids[b]
                for a, b in pk_batches(labels, camids, BatchPlan(1, 2, 2000, on), np.random.default_rng(0))
            ]
            for on in (True, False)
        }
        assert np.mean(partners[True]) == 1 and 0.2 < np.mean(partners[False]) < 0.3  # 2/8 by chance

    def test_unknown_cameras_are_not_other_cameras(self):
        assert camera_codes([5, None, 3, 5]).tolist() == [1, -1, 0, 1]
        for seed in range(50):
            drawn = instances(np.arange(4), camera_codes([1, None, None, 2]), 3, np.random.default_rng(seed)).tolist()
            if drawn[0] in (0, 3):
                assert drawn[1] == 3 - drawn[0]

    @pytest.mark.parametrize("single", [1, 3, 8, 30])
    def test_crops_that_are_alone_share_turns_if_they_may(self, single):
        labels = np.concatenate([np.repeat(np.arange(6), 5), 6 + np.arange(single), [-1, -1]])
        plain, shared = (
            pk_batches(labels, None, BatchPlan(4, 4, 60, True, alone), np.random.default_rng(0)) for alone in (0, 1)
        )
        seen = np.bincount(np.concatenate(shared), minlength=len(labels))
        assert (seen[:-2] > 0).all() and (seen[-2:] == 0).all() and {len(batch) for batch in shared} == {16}
        copies = [np.bincount(batch).max() for batch in shared]  # of one crop in a batch: K of a turn's crops differ
        assert max(copies) == (1 if single >= 4 else -(-4 // single))
        assert max(np.bincount(batch).max() for batch in plain) == 4
        if single >= 8:  # a lone crop is seen about as often as a crop of a cluster
            assert 0.6 < seen[30:-2].mean() / seen[:30].mean() < 1.5

    def test_without_lone_crops_sharing_changes_nothing(self):
        labels = np.arange(30) % 5
        a, b = (pk_batches(labels, None, BatchPlan(3, 4, 10, True, x), np.random.default_rng(0)) for x in (0, 1))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    def test_all_cameras_unknown_is_like_none_given(self):
        labels = np.arange(30) % 5
        a = pk_batches(labels, [None] * 30, BatchPlan(3, 4, 10), np.random.default_rng(0))
        b = pk_batches(labels, None, BatchPlan(3, 4, 10), np.random.default_rng(0))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    def test_reproducible_and_pure(self):
        labels, camids = np.arange(40) % 7 - 1, (np.arange(40) % 3).tolist()
        before = labels.copy()
        one, two = (pk_batches(labels, camids, BatchPlan(4, 3, 20), np.random.default_rng(3)) for _ in range(2))
        assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True)) and np.array_equal(labels, before)
        longer = pk_batches(labels, camids, BatchPlan(4, 3, 25), np.random.default_rng(3))
        assert all(np.array_equal(x, y) for x, y in zip(one, longer))
        tensors = pk_batches(torch.from_numpy(labels), np.array(camids), BatchPlan(4, 3, 20), np.random.default_rng(3))
        assert all(np.array_equal(x, y) for x, y in zip(one, tensors, strict=True))

    def test_order_of_clusters_is_shuffled(self):
        firsts = Counter(int(next(cluster_turns(4, 2, np.random.default_rng(seed)))[0]) for seed in range(400))
        assert set(firsts) == {0, 1, 2, 3} and min(firsts.values()) > 60

    @pytest.mark.parametrize("labels", [[], [-1], [-1, -1, -1]])
    def test_nothing_is_labelled(self, labels):
        with pytest.raises(ValueError, match=f"all {len(labels)} are outliers"):
            pk_batches(labels, None, BatchPlan(4, 2, 1), np.random.default_rng(0))

    @pytest.mark.parametrize("p, k", [(0, 4), (4, 0)])
    def test_empty_batches_are_refused(self, p, k):
        with pytest.raises(ValueError, match=f"p is {p} and k is {k}"):
            pk_batches([0, 1], None, BatchPlan(p, k, 1), np.random.default_rng(0))

    def test_camids_of_another_length(self):
        with pytest.raises(ValueError, match="2 labels but 3 camids"):
            pk_batches([0, 1], [1, 2, 3], BatchPlan(1, 1, 1), np.random.default_rng(0))

    def test_no_iterations(self):
        assert pk_batches([0], None, BatchPlan(1, 1, 0), np.random.default_rng(0)) == []


def world_of(rng, n=120, people=9, cams=4):
    domains = rng.permutation(np.repeat([SOURCE, TARGET], n // 2))
    labels = rng.integers(0, people, n) + people * (domains == TARGET)
    labels[(domains == TARGET) & (rng.random(n) < 0.2)] = -1
    return labels, domains, (rng.integers(0, cams, n) + cams * domains).tolist()


class TestJointBatches:
    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 999), half=st.integers(1, 12), k=st.integers(1, 5), camera_sampling=st.booleans())
    def test_halves(self, seed, half, k, camera_sampling):
        labels, domains, camids = world_of(np.random.default_rng(seed))
        batches = joint_batches(
            labels, domains, camids, BatchPlan(2 * half, k, 4, camera_sampling), np.random.default_rng(seed)
        )
        assert len(batches) == 4
        for batch in batches:
            assert domains[batch].tolist() == [SOURCE] * (half * k) + [TARGET] * (half * k)
            assert (labels[batch] >= 0).all()
            for part, domain in zip(np.split(batch, 2), (SOURCE, TARGET)):
                people = len(
                    set(labels[(domains == domain) & (labels >= 0)])
                )  # if fewer than p / 2, each gives more crops
                counts = Counter(labels[part].tolist())
                assert len(counts) == min(half, people) and max(counts.values()) - min(counts.values()) <= 1

    def test_equals_two_samplers_side_by_side(self):
        labels, domains, camids = world_of(np.random.default_rng(5))
        rng, naive = np.random.default_rng(3), []
        for domain in (SOURCE, TARGET):
            own = [i for i in range(len(labels)) if domains[i] == domain]
            batches = pk_batches(labels[own], [camids[i] for i in own], BatchPlan(3, 4, 6), rng)
            naive.append([[own[i] for i in batch] for batch in batches])
        batches = joint_batches(labels, torch.from_numpy(domains), camids, BatchPlan(6, 4, 6), np.random.default_rng(3))
        assert [b.tolist() for b in batches] == [s + t for s, t in zip(*naive)]

    def test_cameras_may_be_unknown(self):
        labels, domains, _ = world_of(np.random.default_rng(5))
        for camids in (None, [None] * len(labels)):
            assert len(joint_batches(labels, domains, camids, BatchPlan(4, 4, 2), np.random.default_rng(0))) == 2

    @pytest.mark.parametrize("processes", [2, 4])
    def test_each_process_gets_both_domains(self, processes):
        labels, domains, camids = world_of(np.random.default_rng(5))
        one, many = (
            joint_batches(labels, domains, camids, BatchPlan(8, 4, 3), np.random.default_rng(0), processes=n)
            for n in (1, processes)
        )
        for whole, shared in zip(one, many):
            assert sorted(whole.tolist()) == sorted(shared.tolist())
            for part in np.split(shared, processes):
                assert domains[part].tolist() == [SOURCE] * (16 // processes) + [TARGET] * (16 // processes)

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(plan=BatchPlan(5, 4, 2)), "p=5: must be even"),
            (dict(plan=BatchPlan(1, 4, 2)), "p=1: must be even"),
            (dict(plan=BatchPlan(0, 4, 2)), "p is 0"),
            (dict(processes=5), "16 crops, which do not divide among 5"),
            (dict(domains=np.full(120, SOURCE)), r"no target crop \(domain 0\) among 120"),
            (dict(domains=np.full(120, TARGET)), "no source crop"),
            (dict(labels=np.full(120, -1)), "no labelled crop"),
        ],
    )
    def test_impossible_batches(self, change, message):
        labels, domains, camids = world_of(np.random.default_rng(5))
        given = (
            dict(labels=labels, domains=domains, camids=camids, plan=BatchPlan(8, 4, 2), rng=np.random.default_rng(0))
            | change
        )
        with pytest.raises(ValueError, match=message):
            joint_batches(**given)

    def test_domains_without_clusters_are_refused(self):
        labels, domains, camids = world_of(np.random.default_rng(5))
        labels[domains == TARGET] = -1
        with pytest.raises(ValueError, match="all 60 are outliers"):
            joint_batches(labels, domains, camids, BatchPlan(8, 4, 2), np.random.default_rng(0))
