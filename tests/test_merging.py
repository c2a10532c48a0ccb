"""Merged clusters: values of BUC's and DBC's code, a naive oracle, refusals, labels after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage

from affscl.data.datasets import Sample
from affscl.data.domains import SOURCE
from affscl.data.synthetic import make_dataset
from affscl.labels.kept import read_labels
from affscl.labels.labellers import make_labeller, remembered
from affscl.labels.merging import (
    Merger,
    check_room,
    cluster_distances,
    clustering_of,
    clusters_left,
    hierarchical_labeller,
    merge_nearest,
)
from affscl.training.config import RECIPES, Config
from affscl.training.loop import train

GOLDEN = np.load(Path(__file__).parent / "golden" / "merging.npz")
X = torch.from_numpy(GOLDEN["features"])
BUC = replace(RECIPES["tiny"], clustering="bottom_up")


def same_groups(ours, theirs):
    pairs = {(a, b) for a, b in zip(ours.tolist(), theirs.tolist())}
    return len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist()))


@pytest.mark.parametrize("name, clustering", [("buc", "bottom_up"), ("dbc", "dispersion")])
@pytest.mark.parametrize("penalty", [0, 0.005, 0.05, 0.1])
def test_golden_merges(name, clustering, penalty):
    if f"{name}_{penalty:g}" not in GOLDEN:
        return
    labels = np.arange(len(X))
    for step, theirs in enumerate(GOLDEN[f"{name}_{penalty:g}"]):
        table = cluster_distances(X, labels, clustering, penalty)
        if name == "dbc" and step == 2:
            above = np.triu(np.ones_like(table, bool), 1)
            np.testing.assert_allclose(table[above], GOLDEN[f"dbc_table_{penalty:g}"][above], atol=1e-5)
        labels = merge_nearest(table, 20, clustering == "bottom_up")[labels]
        assert same_groups(labels, theirs)


def test_average_linkage_is_scipys_tree_cut_at_a_tenth():
    labels = hierarchical_labeller(replace(BUC, clustering="hierarchical"), [])(X, 1)
    groups = {i: {i} for i in range(len(X))}
    for new, (a, b, *_) in enumerate(linkage(X.numpy(), "average")[: len(X) - 12], len(X)):
        groups[new] = groups.pop(int(a)) | groups.pop(int(b))
    assert {frozenset(np.flatnonzero(labels == c).tolist()) for c in range(12)} == set(map(frozenset, groups.values()))
    assert labels.dtype == np.int64


def test_the_order_of_the_crops_does_not_matter():
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    plain, mixed = Merger(BUC, []), Merger(BUC, [])  # DBC passes pairs over by their numbers
    for epoch in (1, 2, 3):
        assert same_groups(plain(X, epoch)[order.numpy()], mixed(X[order], epoch))


def test_clusters_shrink_evenly_and_only_grow():
    assert [clusters_left(100, 0.9, e, 4) for e in (1, 2, 3, 4, 9)] == [100, 70, 40, 10, 10]
    assert (
        clusters_left(100, 0.9, 1, 1) == 10 and clusters_left(3, 0.99, 5, 5) == 2 and clusters_left(1, 0.5, 1, 1) == 1
    )
    merger = Merger(replace(BUC, epochs=4), [])
    labels = [merger(X.roll(epoch, 1), epoch) for epoch in range(1, 5)]
    assert [len(np.unique(x)) for x in labels] == [120, 84, 48, 12]
    for before, after in zip(labels, labels[1:]):
        assert all(len(np.unique(after[before == c])) == 1 for c in range(before.max() + 1))
    np.testing.assert_array_equal(merger(X.roll(4, 1), 4), labels[3])  # asked twice
    assert Merger(BUC, [])(X, 4).max() + 1 == 12  # after training: at once
    with pytest.raises(ValueError, match="epoch 3 merges the clusters of epoch 2, and nobody knows"):
        Merger(BUC, [])(X, 3)


def test_links_join_what_was_merged_and_stay():
    cameras = [i % 2 for i in range(len(X))]
    merger = Merger(replace(BUC, camera_links=1.0, links_from=2, epochs=4), cameras)
    counts = [len(np.unique(merger(X, epoch))) for epoch in (1, 2, 3, 4)]
    assert counts[0] == 120 and counts[1] < 84 and counts[3] <= 12


def test_of_two_domains_the_targets_labels_are_carried():
    config = replace(RECIPES["tiny"], clustering="bottom_up", source="msmt17", epochs=4)
    samples = [Sample(f"/t/{i}.jpg", i % 4 if i < 40 else None, 0, SOURCE if i < 40 else 0) for i in range(120)]
    one, two = (make_labeller(config, samples, clustering_of(config)) for _ in range(2))
    first, second = one(X, 1), one(X, 2)
    assert (first[:40] == second[:40]).all() and len(np.unique(second[40:])) == 56
    one(X, 1)
    remembered(two).update(json.loads(json.dumps(remembered(one))))
    np.testing.assert_array_equal(two(X, 2), second)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"clustering": "buttom_up"}, "choose one of dbscan, bottom_up, dispersion, hierarchical"),
        ({"clustering": "bottom_up", "merged": 1.0}, "merged=1.0: a share"),
        ({"clustering": "dispersion", "merge_penalty": -1.0}, "must not be negative"),
        ({"merged": 0.5}, "choose another clustering than dbscan"),
        ({"clustering": "hierarchical", "merge_penalty": 0.1}, "about bottom_up and dispersion, not hierarchical"),
        ({"clustering": "hierarchical", "labels": "truth"}, "true labels are not clustered"),
        ({"clustering": "dispersion", "camera_map": True}, "labels an epoch twice"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, told):
    with pytest.raises(ValueError, match=told):
        Config(**changes)


def test_what_works_is_not_refused():
    Config(clustering="bottom_up", merged=0.5, merge_penalty=0.1)
    Config(clustering="hierarchical", camera_map=True)
    Config(clustering="bottom_up", labels="x.csv")
    Config(clustering="bottom_up", source="msmt17", adapt="pretrain")
    with pytest.raises(ValueError, match="1,000,000 crops with all others, .* use clustering='dbscan'"):
        check_room(10**6, "bottom_up", 64e9)
    with pytest.raises(ValueError, match="clustering_of"):
        make_labeller(BUC, [])


@pytest.mark.parametrize("clustering", ["bottom_up", "hierarchical"])
def test_a_run_that_was_interrupted_has_the_same_labels(clustering, tmp_path):
    root = make_dataset(tmp_path / "market", n_ids=12, n_cams=2, seed=5)
    config = replace(RECIPES["tiny"], dataset="market1501", data=str(root), device="cpu", clustering=clustering)
    config = replace(config, epochs=3, iterations=2, p=4, k=2, merged=0.7)
    whole = train(config, tmp_path / "whole")
    counts = [row["clusters"] for row in whole.history[1:]]
    assert counts[0] > counts[1] > counts[2] if clustering == "bottom_up" else len(set(counts)) == 1

    def stops(*_):
        raise KeyboardInterrupt

    from affscl.training import loop

    real = loop.train_epoch
    try:
        loop.train_epoch = lambda job, config, epoch, check: stops() if epoch == 3 else real(job, config, epoch, check)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "broken")
    finally:
        loop.train_epoch = real
    again = train(config, resume=tmp_path / "broken")
    assert read_labels(again.run, 3) == read_labels(whole.run, 3)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
