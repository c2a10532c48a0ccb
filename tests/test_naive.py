"""The naive twins agree with the fast versions."""

import numpy as np
import pytest
import torch

from affscl.labels.clustering import pseudo_labels
from affscl.scores.evaluation import score
from affscl.studies.naive import crowd, naive_labels, naive_precision, ranking


class TestNaive:
    @pytest.mark.parametrize(
        "n, d, noise, k1, k2", [(300, 64, 1.0, 30, 6), (400, 32, 0.7, 12, 3), (200, 16, 1.0, 25, 1)]
    )
    def test_labels(self, n, d, noise, k1, k2):
        x, _ = crowd(n, d, noise)
        ours = pseudo_labels(x, k1=k1, k2=k2)
        np.testing.assert_array_equal(ours, naive_labels(x, k1=k1, k2=k2))
        assert ours.max() > 3

    def test_precision(self):
        distance, ids = ranking(50, 1500)
        for some in distance, distance.round(1), np.zeros_like(distance):
            np.testing.assert_allclose(naive_precision(some, *ids), score(some, *ids).ap, equal_nan=True)

    def test_crowd(self):
        x, people = crowd(3600, 512, noise=1.5)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(3600))
        same = (people[:, None] == people) & ~np.eye(3600, dtype=bool)
        assert abs((x @ x.T).numpy()[same].mean() - 1 / 3.25) < 0.01
        assert torch.equal(x, crowd(3600, 512, noise=1.5)[0])
