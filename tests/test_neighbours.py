"""The neighbour search, exact and approximate, against the full similarity matrix; and the check of features."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.labels import neighbours
from affscl.labels.jaccard import jaccard_distance
from affscl.labels.neighbours import (
    SEARCHES,
    Rounded,
    best_of_candidates,
    find_search,
    multiplies_bf16,
    nearest,
    nearest_faiss,
    unit_rows,
)


def unit(n, d, seed=0, people=None, noise=1.0):
    """Random unit rows; with `people`, scattered around so many centres."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if people:
        x = torch.randn(people, d, generator=g)[torch.randint(people, (n,), generator=g)] + noise * x
    return torch.nn.functional.normalize(x)


# --- exact search ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    k1=st.integers(1, 40),
    block=st.integers(1, 500),
    seed=st.integers(0, 999),
    copies=st.integers(1, 5),
    rough=st.booleans(),
)
def test_nearest_is_exact(n, k1, block, seed, copies, rough):
    k1, x = min(k1, n), unit(n, 6, seed)[torch.arange(n) // copies]
    lists, similarities = nearest(x, k1, block=block, rough=rough)
    assert lists.dtype == np.int32 and similarities.dtype == np.float32
    full = (x @ x.T).fill_diagonal_(1).numpy()
    np.testing.assert_array_equal(lists[:, 0], np.arange(n))
    np.testing.assert_allclose(similarities, np.take_along_axis(full, lists, 1), atol=1e-6)
    np.testing.assert_allclose(np.sort(similarities)[:, ::-1], np.sort(full)[:, ::-1][:, :k1], atol=1e-6)
    assert all(len(set(row)) == k1 for row in lists.tolist())


# --- candidates in 16 bits ----------------------------------------------------------------------------------------


def leaning(x, by):
    """The same rows, drawn towards one corner, as features after a ReLU are."""
    return torch.nn.functional.normalize(x + by)


CROWDS = {
    "people": unit(700, 64, people=80),
    "noise": unit(700, 64),
    "leaning": leaning(unit(700, 64, people=80), 0.2),
    "nearly one point": leaning(unit(700, 64), 3.0),
    "nearly two points": leaning(unit(700, 64), 3.0) * torch.tensor([1.0, -1.0]).repeat(350)[:, None],
    "one number": torch.ones(700, 1),
    "copies": unit(700, 64)[torch.arange(700) // 60],
    "long": unit(700, 3000, people=80, noise=2.0),
}


def unproved(x, k1):
    """How many lists of `x` are not proved by the bound."""
    room = torch.empty(len(x), len(x), dtype=torch.bfloat16)
    return int((~best_of_candidates(Rounded(x), torch.arange(len(x)), k1, room)[2]).sum())


@pytest.mark.parametrize("name", CROWDS)
def test_no_rough_product_exceeds_the_bound(name):
    x, rounded = CROWDS[name], Rounded(CROWDS[name])
    rough = (x.bfloat16() @ rounded.rows.T).float()
    highest = torch.stack([rounded.bound(x, column) for column in rough.T], 1)
    assert (x.double() @ x.double().T <= highest).all()


@pytest.mark.parametrize("k1", [1, 20, 400])
@pytest.mark.parametrize("name", CROWDS)
def test_rough_candidates_lose_nobody(name, k1):
    x = CROWDS[name]
    full = (x @ x.T).fill_diagonal_(1).numpy()
    lists, similarities = nearest(x, k1, block=100 * len(x), rough=True)
    np.testing.assert_array_equal(lists[:, 0], np.arange(700))
    np.testing.assert_allclose(similarities, np.take_along_axis(full, lists, 1), atol=2e-6)
    np.testing.assert_allclose(similarities[:, 1:], nearest(x, k1, rough=False)[1][:, 1:], atol=2e-6)
    assert all(len(set(row)) == k1 for row in lists.tolist())


def test_lists_that_are_not_proved_are_searched_for_again(monkeypatch):
    x, near = CROWDS["people"], CROWDS["nearly two points"]
    assert unproved(x, 20) < 70 and unproved(near, 20) > 600, "an easy and a hard case, or this tests nothing"
    true = nearest(near, 20, rough=False)[1]
    np.testing.assert_allclose(nearest(near, 20, rough=True)[1], true, atol=2e-6)
    monkeypatch.setattr(Rounded, "bound", lambda self, part, rough: torch.full((len(part),), -9.0))
    wrong = nearest(near, 20, rough=True)[1]
    assert (wrong[:, -1] < true[:, -1] - 1e-5).any(), "without the bound neighbours are lost here"


def test_features_that_cannot_be_proved_go_the_plain_way_soon(monkeypatch):
    tried = []
    monkeypatch.setattr(neighbours, "best_of_candidates", lambda *a: tried.append(1) or best_of_candidates(*a))
    nearest(CROWDS["nearly two points"], 20, block=100 * 700, rough=True)
    assert len(tried) == 1
    nearest(CROWDS["people"], 20, block=100 * 700, rough=True)
    assert len(tried) == 1 + 7


@pytest.mark.parametrize("n, native, rough", [(300, True, True), (299, True, False), (300, False, False)])
def test_rough_candidates_are_for_many_crops_and_fast_processors(monkeypatch, n, native, rough):
    made, begin = [], Rounded.__init__
    monkeypatch.setattr(neighbours, "ROUGH", 300)
    monkeypatch.setattr(neighbours, "multiplies_bf16", lambda device: native)
    monkeypatch.setattr(Rounded, "__init__", lambda self, x: made.append(1) or begin(self, x))
    nearest(unit(n, 8), 5)
    assert bool(made) == rough


def test_rough_candidates_are_silent_and_the_same_under_autocast(recwarn):
    x = CROWDS["people"]
    lists, similarities = nearest(x, 20, rough=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = nearest(x, 20, rough=True)
    np.testing.assert_array_equal(lists, again[0])
    np.testing.assert_array_equal(similarities, again[1])
    assert not recwarn.list


@pytest.mark.parametrize("name", ["leaning", "nearly one point"])
def test_autocast_does_not_round_the_bound(name):
    x, rough = CROWDS[name], torch.zeros(700)
    plain = Rounded(x).bound(x, rough)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Rounded(x).bound(x, rough), plain)


@pytest.mark.parametrize("names", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)])
def test_which_processors_multiply_bf16(monkeypatch, names):
    for name in "_is_amx_tile_supported", "_is_avx512_bf16_supported":
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)
    assert multiplies_bf16(torch.device("cpu")) == bool(names)
    for name in "_is_amx_tile_supported", "_is_avx512_bf16_supported":
        monkeypatch.delattr(torch.cpu, name)
    assert not multiplies_bf16(torch.device("cpu")), "an older torch does not say"


# --- approximate search ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 60), k1=st.integers(1, 60), seed=st.integers(0, 999), copies=st.integers(1, 40))
def test_faiss_with_all_cells_is_exact(n, k1, seed, copies):
    k1, x = min(k1, n), unit(n, 6, seed)[torch.arange(n) // copies]
    lists, similarities = nearest_faiss(x, k1, probes=n)
    assert lists.dtype == np.int32 and similarities.dtype == np.float32
    np.testing.assert_array_equal(lists[:, 0], np.arange(n))
    np.testing.assert_allclose(similarities, nearest(x, k1)[1], atol=1e-5)
    np.testing.assert_allclose(
        similarities, np.take_along_axis((x @ x.T).fill_diagonal_(1).numpy(), lists, 1), atol=1e-5
    )
    assert all(len(set(row)) == k1 for row in lists.tolist())


@pytest.mark.parametrize("probes", [1, 2, 8])
def test_faiss_with_few_cells(probes):
    x = unit(2000, 16, people=60, noise=0.5)
    true, (lists, similarities) = nearest(x, 20), nearest_faiss(x, 20, probes)
    np.testing.assert_array_equal(lists[:, 0], np.arange(2000))
    assert lists.min() >= 0 and all(len(set(row)) == 20 for row in lists.tolist())
    assert (np.diff(similarities[:, 1:], axis=1) <= 1e-6).all() and (similarities[:, 1:] <= true[1][:, 1:] + 1e-5).all()
    found = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(lists.tolist(), true[0].tolist())])
    assert found > {1: 0.6, 2: 0.8, 8: 0.97}[probes]
    assert found < 1 or probes == 8  # or this would test nothing


@pytest.mark.parametrize("compared", [10**6, 1500], ids=["all codes", "codes in cells"])
@pytest.mark.parametrize("d", [7, 130, 520])
def test_short_codes_find_nearly_all(monkeypatch, d, compared):
    """Odd lengths, lengths beyond what a code holds, and more crops than each is compared with."""
    monkeypatch.setattr(neighbours, "CODED", 1000)
    monkeypatch.setattr(neighbours, "COMPARED", compared)
    x = unit(3000, d, people=150, noise=0.4)
    true, (lists, similarities) = nearest(x, 20), nearest_faiss(x, 20)
    np.testing.assert_array_equal(lists[:, 0], np.arange(3000))
    assert lists.dtype == np.int32 and lists.min() >= 0 and all(len(set(row)) == 20 for row in lists.tolist())
    own = (x[:50, None] * x[lists[:50]]).sum(2).numpy()
    np.testing.assert_allclose(similarities[:50], own, atol=1e-5)  # exact, whatever the codes say
    found = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(lists.tolist(), true[0].tolist())])
    assert found > (0.95 if compared == 10**6 else 0.85)
    again = nearest_faiss(x, 20)
    assert lists.tobytes() == again[0].tobytes() and similarities.tobytes() == again[1].tobytes()


def test_few_crops_are_compared_exactly_unless_cells_are_asked_for():
    x = unit(500, 16, people=60, noise=0.5)
    for ours, exact in zip(nearest_faiss(x, 20), nearest(x, 20)):
        np.testing.assert_array_equal(ours, exact)
    assert (nearest_faiss(x, 20, probes=1)[0] != nearest(x, 20)[0]).any()


def test_identical_crops_head_their_own_lists_in_codes(monkeypatch):
    monkeypatch.setattr(neighbours, "CODED", 1000)
    lists, _ = nearest_faiss(unit(30, 16)[torch.arange(1200) // 40], 20)
    np.testing.assert_array_equal(lists[:, 0], np.arange(1200))


def test_faiss_gives_the_same_bits_twice():
    x = unit(3000, 16, people=100)
    (a, b), (c, d) = nearest_faiss(x, 20, 4), nearest_faiss(x, 20, 4)
    assert a.tobytes() == c.tobytes() and b.tobytes() == d.tobytes()


def test_faiss_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        jaccard_distance(unit(100, 8), search="faiss")
    assert jaccard_distance(unit(100, 8)).nnz  # and nobody else needs it


def test_faiss_is_not_imported_unasked():
    code = "import sys, affscl.labels.clustering; assert not any(name.split('.')[0] == 'faiss' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- which search ------------------------------------------------------------------------------------------------


def test_a_search_has_a_name_or_is_a_function():
    def own(features, k1):
        return nearest(features, k1)

    assert find_search("exact") is SEARCHES["exact"] is nearest and find_search("faiss") is nearest_faiss
    assert find_search(own) is own
    with pytest.raises(ValueError, match="search='fast': choose one of exact, faiss"):
        find_search("fast")


# --- features ----------------------------------------------------------------------------------------------------


def test_not_unit_rows():
    x = unit(50, 4)
    with pytest.raises(ValueError, match="unit rows, but row 7 has length 3"):
        unit_rows(torch.cat([x[:7], 3 * x[7:8], x[8:]]))
    for bad in float("nan"), float("inf"):
        broken = x.clone()
        broken[11, 2] = bad
        with pytest.raises(ValueError, match="crop 11 hold NaN or infinity"):
            unit_rows(broken)
    for shape in (0, 4), (4,), (2, 3, 4):
        with pytest.raises(ValueError, match="one row a crop"):
            unit_rows(torch.ones(shape))
