"""Links between clusters of different cameras, against the equation and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.labels.clustering import centroids, cluster_report
from affscl.labels.links import (
    WEIGHTS,
    camera_parts,
    halved,
    halves_agree,
    joined,
    link_cameras,
    mutual_pairs,
    nearness,
)


def filmed(people, cams, shift, seed=0, crops=4, d=32):
    """Unit rows of people seen by cameras that each add a vector; true pids, camids, and clusters of one camera."""
    g = torch.Generator().manual_seed(seed)
    pids, camids = (
        np.array(x) for x in zip(*[(p, c) for p in range(people) for c in range(cams) for _ in range(crops)])
    )
    x = torch.randn(people, d, generator=g)[pids] + shift * torch.randn(cams, d, generator=g)[camids]
    x = torch.nn.functional.normalize(x + 0.2 * torch.randn(x.shape, generator=g))
    return x, pids, camids, pids * cams + camids


def csls_by_hand(x, y, k):
    """Equation 1 a number at a time, and the pairs that choose each other."""
    cosine = (x @ y.T).numpy().astype(float)
    k = min(k, *cosine.shape)
    s = np.array(
        [
            [
                2 * cosine[i, j] - np.sort(cosine[i])[-k:].mean() - np.sort(cosine[:, j])[-k:].mean()
                for j in range(len(y))
            ]
            for i in range(len(x))
        ]
    )
    return {(i, s[i].argmax()): s[i].max() for i in range(len(x)) if s[:, s[i].argmax()].argmax() == i}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_mutual_pairs_equal_the_equation(m, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(rows, 6, generator=g)) for rows in (m, n))
    i, j, s = mutual_pairs(x, y, k)
    wanted = csls_by_hand(x, y, k)
    assert set(zip(i.tolist(), j.tolist())) == wanted.keys()
    assert s == pytest.approx([wanted[pair] for pair in zip(i.tolist(), j.tolist())], abs=1e-5)


def test_links_mend_what_a_camera_tore():
    x, pids, camids, labels = filmed(30, 2, shift=3)
    linked = link_cameras(x, labels, camids, 1.0)
    assert cluster_report(labels, pids, camids)["multi_camera_share"] == 0
    report = cluster_report(linked, pids, camids)
    assert report["multi_camera_share"] > 0.9 and report["ari"] > 0.9
    assert sorted(set(linked)) == list(range(report["clusters"])), "numbered without gaps"


@pytest.mark.parametrize("cams", (2, 3, 5))
def test_no_camera_is_joined_with_itself(cams):
    x, _, camids, labels = filmed(25, cams, shift=1)
    linked = link_cameras(x, labels, camids, 1.0)
    for group in np.unique(linked):
        held = np.unique(labels[linked == group])
        assert len(np.unique(camids[linked == group])) == len(held), "one cluster of each camera at most"


def test_share_takes_the_best_first_and_none_is_none():
    x, pids, camids, labels = filmed(40, 2, shift=2, seed=3)
    found = [link_cameras(x, labels, camids, share) for share in (0, 0.25, 0.5, 1)]
    assert (found[0] == labels).all()
    pairs = [
        {frozenset(np.unique(labels[linked == g])) for g in linked if len(np.unique(labels[linked == g])) > 1}
        for linked in found
    ]
    assert pairs[1] < pairs[2] < pairs[3], "a larger share only adds"


def test_outliers_stay_and_pids_play_no_part():
    x, _, camids, labels = filmed(20, 2, shift=2)
    labels = labels.copy()
    labels[::7] = -1
    linked = link_cameras(x, labels, camids, 1.0)
    assert ((linked == -1) == (labels == -1)).all()
    assert (link_cameras(x, np.full(len(x), -1), camids, 1.0) == -1).all()


def test_clusters_that_share_a_camera_are_left_alone():
    x, pids, camids, _ = filmed(15, 2, shift=2)
    assert (link_cameras(x, pids, camids, 1.0) == pids).all(), "each cluster holds both cameras already"


def test_a_chain_does_not_tie_a_camera_to_itself():
    cluster, camera = np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0])
    assert joined([(0.9, 0, 1), (0.8, 1, 2), (0.7, 2, 3)], cluster, camera).tolist() == [0, 0, 0, 3]


def test_parts_are_centred_for_each_camera():
    x, _, camids, labels = filmed(12, 3, shift=5)
    cluster, camera, centres = camera_parts(x, labels, camids)
    assert len(cluster) == 36 and torch.allclose(centres.norm(dim=1), torch.ones(36))
    raw = centroids(x, labels)
    for c in range(3):
        own = raw[camids[::4] == c]
        assert torch.allclose(centres[camera == c], torch.nn.functional.normalize(own - own.mean(0)), atol=1e-5)


@pytest.mark.parametrize("camids, share, message", [([1, None], 0.5, "have none"), ([1, 2], 1.5, "between 0 and 1")])
def test_impossible_links(camids, share, message):
    with pytest.raises(ValueError, match=message):
        link_cameras(torch.eye(2), np.array([0, 1]), camids, share)


# --- a second opinion --------------------------------------------------------------------------------------------


def two_opinions(seed=0):
    """Two views of the same crops that each camera changes person by person, in ways of their own; pids, camids."""
    g = torch.Generator().manual_seed(seed)
    pids, camids = np.repeat(np.arange(40), 6), np.tile([3, 3, 3, 8, 8, 8], 40)
    part = torch.from_numpy(2 * pids + (camids == 8))
    views = [
        torch.nn.functional.normalize(torch.randn(40, 24, generator=g)[pids] + torch.randn(80, 24, generator=g)[part])
        for _ in range(2)
    ]
    return views, pids, camids, 2 * pids + (camids == 8)


def right(pids, labels, linked):
    """How many people have both of their clusters in one."""
    return sum(len(set(linked[pids == pid])) == 1 and len(set(labels[pids == pid])) == 2 for pid in set(pids))


@pytest.mark.parametrize("seed", range(3))
def test_two_opinions_know_more_than_one(seed):
    (x, y), pids, camids, labels = two_opinions(seed)
    found = [right(pids, labels, link_cameras(z, labels, camids, 1.0)) for z in (x, y)]
    assert right(pids, labels, link_cameras(x, labels, camids, 1.0, y)) > max(found)


def test_opinions_are_added_by_their_weight():
    (x, y), _, camids, labels = two_opinions()
    linked = link_cameras(x, labels, camids, 1.0, y, 0.7)
    codes = (camids == 8).astype(int)
    sides = [[camera_parts(z, labels, codes)[2][c::2] for c in (0, 1)] for z in (x, y)]
    s = nearness(*sides[0]) + 0.7 * nearness(*sides[1])
    wanted = {(i, int(s[i].argmax())) for i in range(40) if s[:, s[i].argmax()].argmax() == i}
    groups = [np.unique(labels[linked == g]) for g in np.unique(linked)]
    assert {(a // 2, b // 2) for a, b in (sorted(g, key=lambda c: c % 2) for g in groups if len(g) == 2)} == wanted


def test_an_opinion_without_weight_changes_nothing():
    (x, y), _, camids, labels = two_opinions()
    plain = link_cameras(x, labels, camids, 1.0)
    assert (link_cameras(x, labels, camids, 1.0, y, 0.0) == plain).all()
    assert (link_cameras(x, labels, camids, 1.0, y, 1.0) != plain).any()


# --- the weight of a second opinion ---------------------------------------------------------------------------------


def test_halves_are_the_first_and_the_last_crops_of_a_part():
    labels, camids = np.array([0, 0, 2, 0, 2, 0, -1, 2, 2, 1]), np.array([1, 1, 0, 1, 0, 0, 0, 1, 0, 1])
    # cluster 0 has crops 0, 1, 3 in camera 1; cluster 2 has 2, 4, 8 in camera 0; all other parts have one crop
    assert halved(labels, camids).tolist() == [0, 1, 4, 1, 5, -1, -1, -1, 5, -1]


def by_hand(x, y, labels, camids, weight):
    """The share of parts, over all ordered pairs of cameras, whose halves choose the same part of the other camera."""
    halves, cameras = halved(labels, np.unique(camids, return_inverse=True)[1]), np.unique(camids)
    kinds = [camera_parts(z, halves, camids) for z in (x, y)]
    agree = parts = 0
    for a in cameras:
        for b in cameras[cameras != a]:
            chosen = []
            for half in (0, 1):
                rows = [np.flatnonzero((kinds[0][1] == c) & (kinds[0][0] % 2 == half)) for c in (a, b)]
                s = sum(w * nearness(k[2][rows[0]], k[2][rows[1]]) for w, k in zip((1, weight), kinds))
                chosen.append(
                    [(kinds[0][0][i] // 2, kinds[0][0][rows[1][j]] // 2) for i, j in zip(rows[0], s.argmax(1))]
                )
            agree += sum(one == two for one, two in zip(*chosen))
            parts += len(chosen[0])
    return agree / parts


@pytest.mark.parametrize("cameras", [2, 3])
def test_halves_that_agree_are_counted_from_both_sides(cameras):
    (x, y), pids, camids, _ = two_opinions()
    camids = camids + np.where(pids >= 20, 0, (cameras == 3) * np.tile([0, 0, 0, 5, 5, 5], 40))
    labels = np.where(pids % 7 == 3, -1, np.unique(100 * pids + camids, return_inverse=True)[1])
    found = halves_agree(x, y, labels, camids.tolist())
    assert found == pytest.approx([by_hand(x, y, labels, camids, w) for w in WEIGHTS])


def noisy(clean, spread, seed=0):
    """Unit rows that differ from crop to crop."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(clean + spread * noise)


@pytest.mark.parametrize("seed", range(3))
def test_a_view_counts_as_much_as_it_knows(seed):
    (x, y), _, camids, labels = two_opinions(seed)
    halves = [halves_agree(noisy(x, 0.2), noisy(y, spread, 1), labels, camids) for spread in (0, 0.2, 5)]
    sure, alike, useless = (WEIGHTS[agree.argmax()] for agree in halves)
    assert sure == 2 and 0.5 <= alike <= 1.4 and useless <= 0.25


def test_the_order_of_cameras_and_a_turn_of_a_view_do_not_matter():
    (x, y), _, camids, labels = two_opinions()
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(5)))[0]
    plain = halves_agree(x, y, labels, camids)
    assert halves_agree(x, y @ turn, labels, 10 - camids) == pytest.approx(plain, abs=0.03)


def test_without_halves_nothing_agrees():
    x = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    for labels in (np.arange(8), np.full(8, -1), np.arange(8) // 2):
        assert (halves_agree(x, x, labels, [0, 1] * 4) == 0).all(), "single crops, outliers, parts of one crop"
    assert (halves_agree(x, x, np.arange(8) // 4, [0] * 8) == 0).all(), "one camera"


def test_halves_need_every_camera():
    with pytest.raises(ValueError, match="needs the camera of every crop, and 1 of 2 have none: give the weight"):
        halves_agree(torch.eye(2), torch.eye(2), np.array([0, 1]), [0, None])
