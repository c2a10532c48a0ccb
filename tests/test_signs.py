"""What clusters tell of themselves: against scikit-learn's dense silhouette, and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_samples

from affscl.labels.clustering import pseudo_labels
from affscl.labels.jaccard import jaccard_distance
from affscl.labels.signs import jaccard_silhouette, largest_share, stability


def made(noise, seed=0, people=12, crops=6):
    rng = np.random.default_rng(seed)
    rows = np.repeat(rng.normal(size=(people, 16)), crops, 0) + noise * rng.normal(size=(people * crops, 16))
    return torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)


def naive(graph, labels):
    dense = np.ones(graph.shape)
    dense[np.repeat(np.arange(len(labels)), np.diff(graph.indptr)), graph.indices] = graph.data
    np.fill_diagonal(dense, 0)
    inside = labels >= 0
    scores = silhouette_samples(dense[np.ix_(inside, inside)], labels[inside], metric="precomputed")
    return scores.sum() / len(labels)


@pytest.mark.parametrize("noise", [0.3, 0.8, 1.5])
@pytest.mark.parametrize("limit", [None, 0.6])
def test_the_silhouette_is_the_dense_one(noise, limit):
    graph, labels = jaccard_distance(made(noise), 8, 3, limit), np.repeat(np.arange(12), 6)
    assert jaccard_silhouette(graph, labels) == pytest.approx(naive(graph, labels), abs=1e-5)
    holes = np.where(np.arange(72) % 5 == 0, -1, 3 * labels + 7)  # outliers, and numbers with gaps
    holes[1:6] = -1
    holes[1] = 99  # alone
    assert jaccard_silhouette(graph, holes) == pytest.approx(naive(graph, holes), abs=1e-5)


def test_no_clusters_have_no_silhouette():
    graph = jaccard_distance(made(0.5), 8, 3)
    assert jaccard_silhouette(graph, np.full(72, -1)) == 0 == jaccard_silhouette(graph, np.zeros(72, int))
    with pytest.raises(ValueError, match="one for each crop"):
        jaccard_silhouette(graph, np.zeros(71, int))


def test_share_and_stability():
    assert largest_share([0, 0, 0, 1, -1, -1, -1, -1]) == 3 / 8 and largest_share([-1, -1]) == 0
    labels = pseudo_labels(made(0.5), k1=8, k2=3)
    assert stability(labels, labels) == 1 == stability(labels, np.where(labels >= 0, labels.max() - labels, -1))
    assert stability([0, 0, 1, 1], [-1, -1, -1, -1]) == 0
