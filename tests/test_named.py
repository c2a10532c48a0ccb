"""Names that a person gives: a table edited by hand, labels against the definition, and runs that learn from them."""

import csv
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affscl.data.datasets import Sample
from affscl.labels.kept import read_labels
from affscl.labels.named import JUNK, NamedLabeller, Word, named_labels, read_names, settled_names
from affscl.training import loop
from affscl.training.config import RECIPES, Config
from affscl.training.loading import load_data
from affscl.training.loop import train
from affscl.use.clusters import ClusterArguments, clusters_run

TINY = replace(RECIPES["tiny"], epochs=1, iterations=2, world_ids=24, world_cams=3, p=4)


def lines_of(path, head, *lines):
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


def rows(n, d, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


class TestTheFile:
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_spreadsheets(self, tmp_path, separator):
        path = tmp_path / "a.csv"
        path.write_text("\ufeff" + separator.join(["path", "name", "cluster", "more"]) + "\r\n", encoding="utf-8")
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator).writerow(["odd, path; with all.jpg", " Ann  Lee ", "3", "?"])
        assert read_names(path) == {"odd, path; with all.jpg": Word(3, "Ann Lee")}

    def test_names_alone_and_clusters_alone(self, tmp_path):
        assert read_names(lines_of(tmp_path / "a.csv", "path,name", "a,Ann")) == {"a": Word(-1, "Ann")}
        alone = read_names(lines_of(tmp_path / "a.csv", "path,cluster", "a,5", "b,-1", "c,"))
        assert alone == {"a": Word(5, ""), "b": Word(-1, ""), "c": Word(-1, "")}
        assert settled_names(alone) == {"a": "cluster 5"}

    @pytest.mark.parametrize(
        "head, line, told",
        [
            ("path,cluster", "a,one", "line 2: cluster 'one'"),
            ("path,cluster", "a,1.5", "line 2: cluster '1.5'"),
            ("crop,name", "a,Ann", "looked for the columns path"),
            ("path", "a", "looked for the columns path"),
            ("", "", "found nothing"),
            ("path,name", ",Ann", "has no path"),
            ("path,name", "a,Ann,3", "more fields"),
            ("path,name", "a,Ann\na,Bo", "line 3: a is there twice"),
            ("path,name", "a,Ann\na,Ann", "there twice"),
            ("path,name", 'a,"Ann', "unexpected end"),
            ("path,name", "", "names no crop"),
        ],
    )
    def test_what_cannot_be_meant_is_told_with_its_line(self, tmp_path, head, line, told):
        path = tmp_path / "names.csv"
        path.write_text(f"{head}\n{line}" + "\n" * bool(line))
        with pytest.raises(ValueError, match=f"names.csv.*{re.escape(told)}"):
            read_names(path)

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "names.csv").write_bytes(b"PK\x03\x04\xff\xfe")  # a spreadsheet, saved as itself
        with pytest.raises(ValueError, match="names.csv is no text"):
            read_names(tmp_path / "names.csv")

    def test_one_name_speaks_for_its_cluster_two_split_it(self):
        words = {"a": Word(0, "Ann"), "b": Word(0, ""), "c": Word(1, "Bo"), "d": Word(1, "Cy"), "e": Word(1, "")}
        words |= {"f": Word(2, "Ann"), "g": Word(2, JUNK), "h": Word(2, ""), "i": Word(-1, ""), "j": Word(-1, "Di")}
        assert settled_names(words) == {
            **{"a": "Ann", "b": "Ann", "c": "Bo", "d": "Cy", "f": "Ann", "g": JUNK, "h": "Ann", "j": "Di"}
        }


def naive(given, clusters, x):
    """The definition of chapter 28, crop by crop: a name's number, ("cluster", c), or None."""
    found = []
    for i, name in enumerate(given):
        near = [j for j, c in enumerate(clusters) if c == clusters[i] >= 0 and given[j] >= 0]
        if name != -1:
            found.append(int(name) if name >= 0 else None)
        elif near:
            found.append(int(given[max(near, key=lambda j: float(x[i] @ x[j]))]))
        else:
            found.append(("cluster", int(clusters[i])) if clusters[i] >= 0 else None)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(-2, 3), min_size=n, max_size=n), st.lists(st.integers(-1, 6), min_size=n, max_size=n)
        )
    )
)
def test_labels_are_those_of_the_definition(drawn):
    names, clusters = (np.array(part, np.int64) for part in drawn)
    x = rows(len(names), 5)
    expected, found = naive(names, clusters, x), named_labels(names, clusters, x)
    assert found.dtype == np.int64 and found.shape == names.shape
    assert [e is None for e in expected] == (found < 0).tolist()
    for e, f in zip(expected, found.tolist()):
        assert e is None or not isinstance(e, int) or e == f
    others = {(e, f) for e, f in zip(expected, found.tolist()) if isinstance(e, tuple)}
    assert len(others) == len({e for e, _ in others}) == len({f for _, f in others})
    assert all(f > names.max(initial=-1) for _, f in others)


class TestTheLabeller:
    samples = [Sample(f"/data/{i}.jpg", None, 1) for i in range(6)]

    def test_all_named_needs_no_clusters(self):
        words = {f"{i}.jpg": Word(-1, "Ann" if i % 2 else JUNK) for i in range(6)}
        labeller = NamedLabeller(lambda f, e: pytest.fail("clustered"), words, self.samples, "/data")
        assert labeller(rows(6, 4), 1).tolist() == [-1, 0, -1, 0, -1, 0]
        assert (
            str(labeller)
            == "3 crops have the names of 1 people, 0 without a name follow their clusters, 3 are left out"
        )

    def test_lines_without_a_crop_are_told_and_all_of_them_refused(self):
        words = {"0.jpg": Word(1, "Ann"), "gone.jpg": Word(1, "Bo")}
        with pytest.warns(UserWarning, match="1 of 2 lines .* gone.jpg for one"):
            labeller = NamedLabeller(lambda f, e: np.zeros(6, int), words, self.samples, "/data")
        assert labeller.names == ["Ann"] and (labeller(rows(6, 4), 1) == 0).all()
        with pytest.raises(ValueError, match="2 of 2 lines .* A path there is 0.jpg"):
            NamedLabeller(lambda f, e: None, {"x": Word(0, ""), "y": Word(0, "")}, self.samples, "/data")


def test_settings():
    assert Config(labels="names.csv").labels == "names.csv"
    for changes, told in (
        (dict(labels="cluster"), "choose one of clusters, truth, or a .csv file"),
        (dict(labels="names.csv", source="market1501"), "with a source"),
    ):
        with pytest.raises(ValueError, match=told):
            Config(**changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and what `affscl-clusters` says of it."""
    folder = tmp_path_factory.mktemp("named") / "run"
    result = train(TINY, out=folder)
    return result.run, clusters_run(ClusterArguments(str(result.run)))


def test_from_clusters_to_names_and_back(run, tmp_path, capsys):
    first, lines = run
    told = list(csv.DictReader((first / "clusters" / "clusters.csv").open()))
    people = [f"person {line['pid']}" for line in told]
    for line, name in zip(told[::2], people[::2]):
        line["name"] = name  # somebody names every second crop
    path = tmp_path / "names.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, told[0])
        writer.writeheader()
        writer.writerows(told)
    config = replace(TINY, labels=str(path))
    second = train(config, out=tmp_path / "second")
    assert f"crops have the names of {len(set(people[::2]))} people" in capsys.readouterr().out
    _, kept = read_labels(second.run)
    number = {}
    for line, name in zip(told[::2], people[::2]):
        assert number.setdefault(name, kept[line["path"]]) == kept[line["path"]] >= 0
    assert len(set(number.values())) == len(number)
    assert second.history[1]["ari"] > train(TINY, out=tmp_path / "third").history[1]["ari"]
    again = {line.path: line.name for line in clusters_run(ClusterArguments(str(second.run)))}
    assert all(again[line["path"]] == name for line, name in zip(told[::2], people[::2]))
    (tmp_path / "names.csv").write_text("path,name\n" + told[0]["path"] + ",Zoe\n")
    with pytest.raises(ValueError, match="other words in the labels"):
        train(replace(config, epochs=2), resume=second.run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="names.csv"):
        train(replace(config, epochs=2), resume=second.run)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert not any(line.name for line in clusters_run(ClusterArguments(str(second.run), out=str(tmp_path / "o"))))


def test_all_true_names_are_the_truth(tmp_path):
    data = load_data(TINY)
    lines = [f"{s.path.removeprefix(str(data.root) + '/')},p{s.pid:04}" for s in data.train]
    path = lines_of(tmp_path / "names.csv", "path,name", *lines)
    named = train(replace(TINY, labels=str(path)), out=tmp_path / "named").history
    truth = train(replace(TINY, labels="truth"), out=tmp_path / "truth").history
    assert named[1]["ari"] == 1 and named[1]["loss"] == truth[1]["loss"] and named[1]["mAP"] == truth[1]["mAP"]


def test_a_table_that_is_taken_away_meanwhile_ends_no_run(tmp_path, monkeypatch):
    data = load_data(TINY)
    lines = [f"{s.path.removeprefix(str(data.root) + '/')},p{s.pid:04}" for s in data.train]
    path = lines_of(tmp_path / "names.csv", "path,name", *lines)
    finish = loop.finish_epoch

    def taken(*arguments):
        path.unlink(missing_ok=True)
        return finish(*arguments)

    monkeypatch.setattr(loop, "finish_epoch", taken)
    config = replace(TINY, labels=str(path))
    run = train(config, out=tmp_path / "run").run
    lines_of(path, "path,name", *reversed(lines))  # the same words, in another order
    assert train(replace(config, epochs=2), resume=run).history[-1]["epoch"] == 2
