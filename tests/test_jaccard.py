"""The sparse Jaccard distance against golden values, a dense naive version and its own promises."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.labels import jaccard
from affscl.labels.jaccard import (
    by_rows,
    distance_rows,
    encode,
    expanded_rows,
    half_length,
    jaccard_distance,
    return_ranks,
    side_by_side,
)
from affscl.labels.neighbours import nearest

GOLDEN = np.load(Path(__file__).parent / "golden" / "jaccard.npz")
PAIRS = GOLDEN["ks"].tolist()


def unit(n, d, seed=0, people=None, noise=1.0):
    """Random unit rows; with `people`, scattered around so many centres."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if people:
        x = torch.randn(people, d, generator=g)[torch.randint(people, (n,), generator=g)] + noise * x
    return torch.nn.functional.normalize(x)


def dense(graph):
    """Dense distances; what is not stored is 1."""
    full = np.ones(graph.shape, np.float32)
    i, j = graph.tocoo().coords
    full[i, j] = graph.data
    return full


def naive(x, lists, k2):
    """Dense Jaccard distance in float64 from given neighbour lists, straight from the recipe."""
    x, n, k1 = np.asarray(x, np.float64), len(x), lists.shape[1]

    def reciprocal(i, k):
        return {j for j in lists[i, :k].tolist() if i in lists[j, :k]}

    v = np.zeros((n, n))
    for i in range(n):
        r = reciprocal(i, k1)
        star = set(r)
        for j in r:
            h = reciprocal(j, min(int(np.around(k1 / 2)) + 1, k1))
            if len(h & r) * 3 > len(h) * 2:
                star |= h
        star = sorted(star)
        weights = np.exp(2 * x[star] @ x[i] - 2)
        v[i, star] = weights / weights.sum()
    v = np.stack([v[lists[i, :k2]].mean(0) for i in range(n)])
    m = np.stack([np.minimum(row, v).sum(1) for row in v])
    return np.maximum(0, 1 - m / (2 - m))


# --- golden values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k1, k2", PAIRS)
def test_golden_distances(k1, k2):
    graph = jaccard_distance(GOLDEN["features"], k1, k2)
    assert graph.dtype == np.float32
    np.testing.assert_allclose(dense(graph), GOLDEN[f"jaccard_k{k1}_{k2}"], atol=1e-5)


@pytest.mark.parametrize("k1, k2", PAIRS)
def test_golden_pairs_within_eps(k1, k2):
    want = GOLDEN[f"jaccard_k{k1}_{k2}"]
    for eps in GOLDEN["eps"]:
        graph = jaccard_distance(GOLDEN["features"], k1, k2, eps=float(eps))
        stored = np.zeros(want.shape, bool)
        stored[graph.tocoo().coords] = True
        np.testing.assert_array_equal(stored, want <= eps)


# --- the naive version -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(n=st.integers(2, 45), d=st.integers(2, 12), people=st.integers(1, 6), data=st.data(), seed=st.integers(0, 9999))
def test_equals_naive(n, d, people, data, seed):
    k1 = data.draw(st.integers(1, n - 1))
    k2 = data.draw(st.integers(1, k1))
    copies = data.draw(st.integers(1, 4))
    x = unit(n, d, seed, people, noise=0.7)
    x = x[torch.arange(n) // copies]  # copies > 1: every image occurs several times
    lists, _ = nearest(x, k1)
    want = naive(x, lists, k2)
    graph = jaccard_distance(x, k1, k2)
    np.testing.assert_allclose(dense(graph), want, atol=2e-6)
    assert graph.data.min() >= 0 and graph.data.max() < 1
    eps = data.draw(st.floats(0.05, 0.95))
    near = jaccard_distance(x, k1, k2, eps)
    kept = graph.data <= np.float32(eps)
    np.testing.assert_array_equal(near.data, graph.data[kept])
    np.testing.assert_array_equal(near.indices, graph.indices[kept])


def test_half_list_rounds_half_to_even():
    assert all(half_length(k1) == min(int(np.around(k1 / 2)) + 1, k1) for k1 in range(1, 200))
    # around(25 / 2) + 1 = 13, not 14: the golden pair (25, 6) holds for 13 columns only.
    lists, similarities = nearest(torch.from_numpy(GOLDEN["features"]), 25)
    arrays = GOLDEN["features"], lists, similarities, return_ranks(lists)
    thirteen, fourteen = (expanded_rows(0, 380, *arrays, half) for half in (13, 14))
    assert thirteen[0].sum() != fourteen[0].sum()
    v = encode(torch.from_numpy(GOLDEN["features"]), 25, 1)
    assert v.nnz == thirteen[0].sum()


def test_exactly_two_thirds_is_not_more():
    lists = np.array([[0, 1, 4, 5], [1, 0, 2, 3], [2, 1, 3, 0], [3, 2, 1, 0], [4, 5, 0, 1], [5, 4, 0, 1]], np.int32)
    ranks, similarities = return_ranks(lists), np.ones(lists.shape, np.float32)
    sizes, members, _ = expanded_rows(0, 6, np.eye(6, dtype=np.float32), lists, similarities, ranks, 3)
    rows = [set(part.tolist()) for part in np.split(members, sizes.cumsum()[:-1])]
    # R(0) = {0, 1, 4, 5}; H(1) = {0, 1, 2}, of which exactly two thirds lie in R(0): 2 stays out.
    assert rows[0] == {0, 1, 4, 5}
    # R(1) = {0, 1, 2, 3}; H(0) = {0, 1, 4}, exactly two thirds again: 4 stays out.
    assert rows[1] == {0, 1, 2, 3}


def test_similarities_looked_up_or_computed():
    x = unit(200, 10, people=8)
    lists, similarities = nearest(x, 15)
    pairs = by_rows(expanded_rows, 200, 64, x.numpy(), lists, similarities, return_ranks(lists), 9)
    i, j = pairs.tocoo().coords
    np.testing.assert_allclose(pairs.data, (x @ x.T).numpy()[i, j], atol=1e-6)
    in_no_list = [b not in lists[a] and a not in lists[b] for a, b in zip(i, j)]
    assert 0 < np.mean(in_no_list) < 0.5
    # What a list holds is taken from there, what is in no list is not.
    looked_up = by_rows(expanded_rows, 200, 64, x.numpy(), lists, similarities + 7, return_ranks(lists), 9)
    np.testing.assert_array_equal(looked_up.data > 2, np.logical_not(in_no_list))


# --- search ------------------------------------------------------------------------------------------------------


def test_search_by_name_or_by_function():
    x, seen = unit(600, 16, people=30, noise=0.5), []

    def spying(features, k1):
        seen.append((tuple(features.shape), k1))
        return nearest(features, k1)

    exact, near = jaccard_distance(x, 20, 5), jaccard_distance(x, 20, 5, search="faiss")
    np.testing.assert_array_equal(dense(jaccard_distance(x, 20, 5, search=spying)), dense(exact))
    assert seen == [((600, 16), 20)]
    np.testing.assert_array_equal(dense(near), dense(near).T)
    assert np.mean(np.abs(dense(near) - dense(exact)) < 1e-5) > 0.95
    with pytest.raises(ValueError, match="choose one of exact, faiss"):
        jaccard_distance(x, search="fast")


def test_a_column_that_everybody_shares():
    """Room for the distances is counted by visits, and a row has at most n of them."""
    x = torch.cat([unit(1, 8).repeat(40, 1), unit(60, 8)])
    for k1, k2 in (40, 10), (100, 100):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = jaccard_distance(x, k1, k2)
        np.testing.assert_allclose(dense(graph), naive(x, nearest(x, k1)[0], k2), atol=2e-6)


# --- promises ----------------------------------------------------------------------------------------------------


def test_symmetric_with_stored_zero_diagonal():
    graph = jaccard_distance(unit(300, 16, people=20), 20, 5, eps=0.6)
    full = dense(graph)
    np.testing.assert_array_equal(full, full.T)
    on_diagonal = graph.tocoo().coords[0] == graph.tocoo().coords[1]
    assert on_diagonal.sum() == 300 and not graph.data[on_diagonal].any()
    assert graph.has_sorted_indices and graph.has_canonical_format


@pytest.mark.parametrize("eps", [None, 0.5, 0.0])
def test_35_identical_images(eps):
    x = torch.cat([unit(1, 32, seed=1).repeat(35, 1), unit(100, 32)])
    lists, _ = nearest(x, 30)
    np.testing.assert_array_equal(lists[:, 0], np.arange(135))
    graph = jaccard_distance(x, eps=eps)
    assert np.isfinite(graph.data).all()
    np.testing.assert_array_equal(dense(graph).diagonal(), 0)
    assert (np.diff(graph.indptr) >= 1).all()


def test_duplicates_are_stored_at_distance_zero():
    x = unit(10, 16).repeat_interleave(6, 0)
    graph = jaccard_distance(x, k1=6, k2=6, eps=0.3)
    assert graph.nnz == 10 * 6 * 6
    np.testing.assert_allclose(graph.data, 0, atol=1e-6)


def test_order_of_samples_does_not_matter():
    x = unit(250, 24, people=15)
    order = torch.randperm(250, generator=torch.Generator().manual_seed(1))
    want = dense(jaccard_distance(x, 18, 5))
    np.testing.assert_allclose(dense(jaccard_distance(x[order], 18, 5)), want[order][:, order], atol=1e-6)


def test_same_bits_for_any_number_of_threads_and_blocks():
    v = encode(unit(400, 16, people=20), 20, 5)
    index = v.tocsc()
    v = index.tocsr()
    both = (v.indptr, v.indices, v.data), (index.indptr, index.indices, index.data)
    threads, results = torch.get_num_threads(), []
    try:
        for count, rows in (1, 400), (2, 7), (4, 64):
            torch.set_num_threads(count)
            results.append(by_rows(distance_rows, 400, rows, *both, np.float32(0.8)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert result.data.tobytes() == results[0].data.tobytes()
        assert result.indices.tobytes() == results[0].indices.tobytes()


def test_runs_give_the_same_bits():
    x = unit(300, 16, people=20)
    first, second = jaccard_distance(x, eps=0.7), jaccard_distance(x, eps=0.7)
    assert first.data.tobytes() == second.data.tobytes()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, torch.float64, torch.bfloat16])
def test_kinds_of_features(kind):
    x = unit(60, 8, people=5)
    given_ = x.to(kind) if isinstance(kind, torch.dtype) else x.numpy().astype(kind)
    rounded = torch.as_tensor(given_).float()
    got, want = jaccard_distance(given_, 10, 3), jaccard_distance(rounded, 10, 3)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(dense(got), dense(want))


def test_gradients_and_mixed_precision_leave_it_alone():
    x = unit(80, 32, people=8)
    want = dense(jaccard_distance(x, 10, 3))
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dense(jaccard_distance(leaf, 10, 3))
    np.testing.assert_array_equal(got, want)
    with torch.inference_mode():
        np.testing.assert_array_equal(dense(jaccard_distance(x * 1, 10, 3)), want)


def test_features_are_not_changed():
    x = unit(50, 8)
    before = x.clone()
    jaccard_distance(x, 10, 3)
    assert torch.equal(x, before)


# --- small and wrong inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 20, 30])
def test_k1_is_clamped_and_says_so(n):
    x = unit(n, 8)
    with pytest.warns(UserWarning, match=f"k1=30 .* only {n} crops"):
        graph = jaccard_distance(x)
    want = naive(x, nearest(x, n)[0], min(6, n))
    np.testing.assert_allclose(dense(graph), want, atol=1e-6)


def test_enough_samples_give_no_warning(recwarn):
    jaccard_distance(unit(31, 8))
    assert not recwarn.list


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)1 <= k2 <= k1.*eps must lie in"):
        jaccard_distance(unit(50, 4), 5, 6, 1.5)


@pytest.mark.parametrize("k1, k2", [(0, 0), (5, 6), (5, 0), (-1, 1)])
def test_wrong_k(k1, k2):
    with pytest.raises(ValueError, match="1 <= k2 <= k1"):
        jaccard_distance(unit(50, 4), k1, k2)


@pytest.mark.parametrize("eps", [-0.1, 1.0, 3, float("nan")])
def test_wrong_eps(eps):
    with pytest.raises(ValueError, match="eps must lie in"):
        jaccard_distance(unit(50, 4), 5, 2, eps)


def test_wrong_features():
    x = unit(50, 4)
    with pytest.raises(ValueError, match="unit rows, but row 7 has length 3"):
        jaccard_distance(torch.cat([x[:7], 3 * x[7:8], x[8:]]))
    for bad in float("nan"), float("inf"):
        broken = x.clone()
        broken[11, 2] = bad
        with pytest.raises(ValueError, match="crop 11 hold NaN or infinity"):
            jaccard_distance(broken)


def test_without_a_writable_cache(monkeypatch):
    real = jaccard.njit

    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(jaccard, "njit", njit)
    assert jaccard.compiled(lambda a, b: a + b)(2, 3) == 5


# --- memory ------------------------------------------------------------------------------------------------------

MEMORY = """
import torch
from affscl.labels.jaccard import jaccard_distance
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
x = torch.nn.functional.normalize(torch.randn(700, 16).repeat(18, 1) + 0.5 * torch.randn(12600, 16))
jaccard_distance(x[:100])
before = peak()
jaccard_distance(x, eps=0.6)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_no_matrix_of_all_pairs():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 350  # MB; one 12,600 x 12,600 matrix of float32 has 605


# --- neighbours side by side ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 60), k1=st.integers(1, 30), seed=st.integers(0, 99), copies=st.integers(1, 5))
def test_the_order_of_crops_decides_nothing(n, k1, seed, copies):
    k1, k2 = min(k1, n - 1), min(k1, n - 1, 4)
    x = torch.nn.functional.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)))
    x = x[torch.arange(n) // copies]
    lists, similarities = nearest(x, k1)
    order = side_by_side(lists)
    assert sorted(order.tolist()) == list(range(n))
    with_order = jaccard_distance(x, k1, k2, search=lambda *_: (lists, similarities))
    plain = encode(x, k1, k2, lambda *_: (lists, similarities)).toarray()
    minima = np.minimum(plain[:, None], plain).sum(2)
    expected = np.where(minima > 0, 1 - minima / (2 - minima), 1).clip(0)
    np.fill_diagonal(expected, 0)
    full = np.ones((n, n))
    i, j = with_order.tocoo().coords
    full[i, j] = with_order.data
    np.testing.assert_allclose(full, expected, atol=2e-6)
    assert with_order.has_sorted_indices and (full == full.T).all()


def test_mutual_neighbours_stand_side_by_side():
    """Ten people of twelve crops each, far apart and scattered: each person's crops take twelve places in a row."""
    people = np.random.default_rng(0).permutation(np.arange(120) // 12)
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(
        torch.randn(10, 32, generator=g)[people] + 0.1 * torch.randn(120, 32, generator=g)
    )
    found = people[side_by_side(nearest(x, 12)[0])]
    assert (np.diff(found) != 0).sum() == 9
