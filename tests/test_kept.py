"""Labels that a run keeps: read back as they were, the same bytes, whole or not there, matched by path."""

import gzip
import os

import numpy as np
import pytest

from affscl.data.datasets import Sample
from affscl.data.domains import SOURCE
from affscl.labels.kept import (
    agreement,
    below,
    kept_epochs,
    labels_file,
    labels_of,
    read_labels,
    shortened,
    write_labels,
)

ODD = ["a.jpg", "gate/b, c.jpg", 'say "no".png', "line\nbreak.jpg", "\udcff.jpg", "ümlaut.jpg", " .jpg"]


def written(tmp_path, names=ODD, labels=None, epoch=1, root="/data/mine"):
    samples = [Sample(os.path.join(root, name)) for name in names]
    labels = np.arange(len(names)) - 1 if labels is None else labels
    write_labels(labels_file(tmp_path, epoch), samples, labels, root)
    return samples, labels


def test_any_name_comes_back_also_where_the_data_moved(tmp_path):
    samples, labels = written(tmp_path)
    assert labels_of(samples, read_labels(tmp_path)[1], "/data/mine")[0] == samples
    moved = [Sample(os.path.join("/other", name)) for name in reversed(ODD)] + [Sample("/other/new.jpg")]
    found, again = labels_of(moved, read_labels(tmp_path)[1], "/other/")
    assert [below(s.path, "/other") for s in found] == ODD and (again == labels).all()
    with pytest.raises(ValueError, match=r"1 of 7 crops.*\(a.jpg first\).*--data"):
        labels_of(samples[1:], read_labels(tmp_path)[1], "/data/mine")


def test_the_same_labels_are_the_same_bytes(tmp_path, monkeypatch):
    written(tmp_path)
    before = labels_file(tmp_path, 1).read_bytes()
    monkeypatch.setattr("time.time", lambda: 1e9)
    written(tmp_path)
    assert labels_file(tmp_path, 1).read_bytes() == before


def test_of_two_domains_only_the_target_is_kept(tmp_path):
    samples = [Sample("/s/a.jpg", 1, domain=SOURCE), Sample("/t/b.jpg"), Sample("/t/c.jpg"), Sample("/t/d.jpg")]
    write_labels(labels_file(tmp_path, 4), samples, [0, 7, -1, 9], "/t")
    assert read_labels(tmp_path) == (4, {"b.jpg": 0, "c.jpg": -1, "d.jpg": 2})


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    written(tmp_path)
    before = labels_file(tmp_path, 1).read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        written(tmp_path, labels=np.zeros(len(ODD), int))
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["epoch_001.csv.gz"]
    assert labels_file(tmp_path, 1).read_bytes() == before


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        read_labels(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="looked for labels/epoch.*older version.*--resume"):
        read_labels(tmp_path)
    for epoch in (1, 2, 3, 5, 1200):
        written(tmp_path, epoch=epoch)
    (tmp_path / "labels" / "epoch_best.csv.gz").write_bytes(b"")  # somebody else's
    assert kept_epochs(tmp_path) == [1, 2, 3, 5, 1200] and read_labels(tmp_path)[0] == 1200
    with pytest.raises(FileNotFoundError, match="epoch 4.*1 to 3, 5, 1200"):
        read_labels(tmp_path, 4)
    assert shortened([]) == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-3] + b"abc",
        lambda _: b"",
        lambda _: b"path,cluster",
        lambda _: gzip.compress(b"path,cluster\na.jpg,one\n"),
        lambda _: gzip.compress(b"path,cluster\na.jpg\n"),
        lambda _: gzip.compress(b"a.jpg,1\n"),
        lambda _: gzip.compress(b"\x00\xff\n"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    written(tmp_path)
    path = labels_file(tmp_path, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"epoch_001.csv.gz is damaged"):
        read_labels(tmp_path)


class TestAgreement:
    """Labels against those that the run keeps of the epoch before."""

    def test_numbers_do_not_matter_and_outliers_are_each_alone(self, tmp_path):
        samples, labels = written(tmp_path, labels=np.array([0, 0, 1, 1, 2, 2, -1]))
        renamed = np.array([5, 5, 3, 3, 4, 4, -1])
        assert agreement(tmp_path, 2, samples, renamed, "/data/mine") == {"stability": 1.0}
        torn = agreement(tmp_path, 2, samples, np.array([0, 1, 0, 1, 2, 2, -1]), "/data/mine")["stability"]
        gone = agreement(tmp_path, 2, samples, np.full(7, -1), "/data/mine")["stability"]
        assert gone < torn < 1

    def test_the_order_of_the_crops_does_not_matter(self, tmp_path):
        samples, labels = written(tmp_path, labels=np.array([0, 0, 1, 1, 2, 2, -1]))
        moved = [Sample(os.path.join("/other", name)) for name in reversed(ODD)]
        assert agreement(tmp_path, 2, moved, labels[::-1], "/other") == {"stability": 1.0}

    @pytest.mark.parametrize("epoch", [1, 3, 9])
    def test_without_the_epoch_before_nothing_is_told(self, tmp_path, epoch):
        samples, labels = written(tmp_path)
        assert agreement(tmp_path, epoch, samples, labels, "/data/mine") == {}

    def test_a_damaged_file_or_other_crops_end_no_run(self, tmp_path):
        samples, labels = written(tmp_path)
        assert agreement(tmp_path, 2, samples[1:], labels[1:], "/data/mine") == {}
        labels_file(tmp_path, 1).write_bytes(b"no gzip")
        assert agreement(tmp_path, 2, samples, labels, "/data/mine") == {}

    def test_the_source_is_not_asked(self, tmp_path):
        samples = [Sample("/s/a.jpg", 1, domain=SOURCE), *(Sample(f"/t/{i}.jpg") for i in range(4))]
        write_labels(labels_file(tmp_path, 1), samples, [0, 1, 1, 2, 2], "/t")
        assert agreement(tmp_path, 2, samples, [0, 1, 1, 2, 2], "/t") == {"stability": 1.0}
