"""Two datasets as one: nobody and no camera in both, and every mistake refused with its message."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_domains import people, source_world, target_world

from affscl.data.datasets import Dataset, Sample
from affscl.data.domains import SOURCE, TARGET, beyond, check_domains, join_domains, source_pids


def test_source_first_target_untouched(joined):
    source, target = source_world(), target_world()
    n = len(source.train)
    assert [s.domain for s in joined.train] == [SOURCE] * n + [TARGET] * len(target.train)
    assert joined.train[n:] == target.train and joined.query == target.query and joined.gallery == target.gallery
    assert [s.path for s in joined.train[:n]] == [s.path for s in source.train]
    assert joined.root == target.root and joined.name == "inside → outside"


@pytest.mark.parametrize("field", ["pid", "camid"])
def test_numbers_are_moved_beyond_all_of_the_targets(joined, field):
    source, target = source_world(), target_world()
    held = {getattr(s, field) for s in [*target.train, *target.query, *target.gallery]}
    moved = [getattr(s, field) for s in joined.train[: len(source.train)]]
    assert min(moved) == max(held) + 1
    assert {m - getattr(s, field) for m, s in zip(moved, source.train)} == {
        min(moved) - min(getattr(s, field) for s in source.train)
    }


@settings(deadline=None, max_examples=60)
@given(
    mine=st.lists(st.integers(-3, 50), min_size=2, unique=True),
    theirs=st.lists(st.none() | st.integers(-3, 50), min_size=1),
    my_cams=st.lists(st.none() | st.integers(0, 9), min_size=1),
    their_cams=st.lists(st.none() | st.integers(0, 9), min_size=1),
)
def test_never_collide(mine, theirs, my_cams, their_cams):
    source = Dataset(
        "s", Path("/data/a"), [Sample(f"/data/a/{i}", p, my_cams[i % len(my_cams)]) for i, p in enumerate(mine)], [], []
    )
    target = Dataset(
        "t",
        Path("/data/b"),
        [Sample(f"/data/b/{i}", p, their_cams[i % len(their_cams)]) for i, p in enumerate(theirs)],
        [],
        [],
    )
    joined = join_domains(source, target)
    assert [s.camid is None for s in joined.train] == [s.camid is None for s in source.train + target.train]
    for field in ("pid", "camid"):
        ours, others = ({getattr(s, field) for s in joined.train if s.domain == d} - {None} for d in (SOURCE, TARGET))
        assert not ours & others


def test_same_root_is_refused():
    with pytest.raises(ValueError, match="source and target are both .*/data/a.*two datasets"):
        join_domains(source_world(), replace(target_world(), root=Path("/data/b/../a")))


@pytest.mark.parametrize("split", ["train", "query", "gallery"])
def test_a_shared_file_is_refused(split):
    target = target_world()
    setattr(target, split, [*getattr(target, split), Sample("/data/a/train/../train/7_c1_0.jpg", 1, 1)])
    with pytest.raises(
        ValueError,
        match="1 of 12 training crops of the source inside also belong to the target outside, /data/a/train/7_c1_0.jpg",
    ):
        join_domains(source_world(), target)


def test_a_link_to_the_targets_file_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").touch()
    (tmp_path / "a" / "1.jpg").symlink_to(tmp_path / "b" / "1.jpg")
    source = Dataset("s", tmp_path / "a", [Sample(str(tmp_path / "a" / "1.jpg"), 1), Sample("other", 2)], [], [])
    with pytest.raises(ValueError, match="also belong to the target"):
        join_domains(source, Dataset("t", tmp_path / "b", [Sample(str(tmp_path / "b" / "1.jpg"))], [], []))


def test_source_without_labels_is_refused():
    source = source_world()
    source.train[4:6] = [s._replace(pid=None) for s in source.train[4:6]]
    with pytest.raises(
        ValueError, match=r"inside has no pid for 2 of 12 training crops, /data/a/train/7_c1_0.jpg first.*pattern"
    ):
        join_domains(source, target_world())


@pytest.mark.parametrize("count", [0, 1])
def test_source_of_one_person_is_refused(count):
    source = replace(source_world(), train=people("/data/a", [5][:count], [1]))
    with pytest.raises(ValueError, match=f"inside shows {count} person.*at least two"):
        join_domains(source, target_world())


def test_joining_twice_is_refused(joined):
    with pytest.raises(ValueError, match="inside → outside already holds two domains"):
        join_domains(replace(source_world(), root=Path("/data/c")), joined)


def test_target_pids_may_be_unknown():
    target = replace(target_world(), train=[s._replace(pid=None) for s in target_world().train])
    assert join_domains(source_world(), target).train[12:] == target.train


@pytest.mark.parametrize("field, value", [("pid", 3), ("camid", 3)])
def test_check_domains(field, value):
    fine = [
        Sample("a", 1, 1, 0),
        Sample("b", 2, 2, 1),
        Sample("c", None, None, 0),
        Sample("d", None, None, 1),
        Sample("e", 1, 1, 0),
    ]
    check_domains(fine)
    check_domains([])
    with pytest.raises(ValueError, match=f"{field} 3 in more than one domain"):
        check_domains(
            [
                *fine,
                Sample("x", 10, 10, 0)._replace(**{field: value}),
                Sample("y", 11, 11, 1)._replace(**{field: value}),
            ]
        )


def test_check_domains_names_some_of_many():
    with pytest.raises(ValueError, match="pid 0, 1, 2, 3, 4 and 7 more in"):
        check_domains([Sample("", pid, None, domain) for pid in range(12) for domain in (0, 1)])


def test_source_pids_are_the_pids():
    pids = source_pids(source_world().train)
    assert pids.dtype == np.int64 and pids.tolist() == [s.pid for s in source_world().train]


@pytest.mark.parametrize(
    "own, taken, offset",
    [({1, 2}, {1, 5}, 5), ({3, None}, {None}, -3), (set(), {4}, 5), ({None}, set(), 0), ({-3}, {-3}, 1)],
)
def test_offsets_by_hand(own, taken, offset):
    assert beyond(own, taken) == offset
