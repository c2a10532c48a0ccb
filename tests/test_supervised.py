"""True labels (to be taken to test_labellers.py)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.datasets import Sample
from affscl.labels.labellers import true_labels

cases = settings(max_examples=40, deadline=None)


def samples(pids):
    return [Sample(f"{i}.jpg", pid, 1) for i, pid in enumerate(pids)]


# True labels


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
