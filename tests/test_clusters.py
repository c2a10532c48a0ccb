"""affscl-clusters: from a run's kept labels to tables and pictures; what is missing is told, what was edited stays."""

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from affscl.data.datasets import Sample, load_dataset
from affscl.data.synthetic import make_dataset
from affscl.labels.kept import labels_file, write_labels
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.use.clusters import centre_distances, cluster_lines, clusters_command, entropy, spread, summarised


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Crops in folders named as cameras, nobody knows who is who, and a run on them."""
    root = tmp_path_factory.mktemp("clusters")
    make_dataset(root / "world", n_ids=18, n_cams=2, seed=4)
    for number, path in enumerate(sorted((root / "world" / "bounding_box_train").iterdir())):
        camera = root / "crops" / ("gate" if "_c1" in path.name else "lobby")
        camera.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, camera / f"{number}.jpg")
    settings = dict(dataset="folder", data=str(root / "crops"), pattern="(?P<camid>gate|lobby)/", device="cpu")
    short = dict(epochs=2, iterations=1, p=4, k=2, k1=5, k2=2, eps=0.5, min_samples=2, cache=str(root / "cache"))
    train(replace(RECIPES["tiny"], **settings, **short), root / "run")
    return root


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    shutil.copytree(world / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return world


def table(path="run/clusters/clusters.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def told(capsys, *words):
    with pytest.raises(SystemExit) as left:
        clusters_command(["run", *words])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_from_a_run_to_tables_and_pictures(place, capsys):
    clusters_command(["run", "--count", "2"])
    lines, data = table(), load_dataset("folder", place / "crops", "(?P<camid>gate|lobby)/")
    assert {line["path"] for line in lines} == {str(Path(s.path).relative_to(place / "crops")) for s in data.train}
    assert all(line["camera"] == line["path"].split("/")[0] and line["name"] == line["pid"] == "" for line in lines)
    clusters = [int(line["cluster"]) for line in lines]
    inside = [cluster for cluster in clusters if cluster >= 0]
    assert inside == sorted(inside) and clusters == inside + [-1] * (len(clusters) - len(inside))
    assert all((line["distance"] == "") == (line["cluster"] == "-1") for line in lines)
    said = capsys.readouterr().out
    assert f"Epoch 2: {len(lines)} crops in {len(set(inside))} clusters" in said
    groups = table("run/clusters/summary.csv")
    assert sum(int(group["crops"]) for group in groups) == len(inside)
    for name in ("largest", "loosest", "mixed_cameras"):
        with Image.open(f"run/clusters/{name}.png") as picture:
            assert picture.width > 200
    assert Path("run/clusters/outliers.png").exists() == (-1 in clusters)
    assert not Path("run/clusters/mixed_people.png").exists()


def test_an_earlier_epoch_another_folder_and_moved_data(place, tmp_path, capsys):
    shutil.copytree(place / "crops", tmp_path / "moved")
    clusters_command(["run", "--epoch", "1", "--out", "new/x", "--data", "moved", "--count", "1"])
    assert "Epoch 1:" in capsys.readouterr().out and len(table("new/x/clusters.csv")) == len(table_of(place))


def table_of(place):
    return [path for path in (place / "crops").rglob("*.jpg")]


def test_an_edited_table_is_never_lost(place, capsys):
    clusters_command(["run", "--count", "1"])
    written = Path("run/clusters/clusters.csv")
    before = written.read_bytes()
    clusters_command(["run", "--count", "1"])
    assert not list(written.parent.glob("*-before-*"))
    for number in (1, 2):
        edited = before.replace(b",,", b",anna%d," % number, 1)
        written.write_bytes(edited)
        clusters_command(["run", "--count", "1"])
        assert written.read_bytes() == before
        assert (written.parent / f"clusters-before-{number}.csv").read_bytes() == edited
    assert "clusters-before-2.csv" in capsys.readouterr().out


def test_what_is_missing_is_told(place, tmp_path, capsys, monkeypatch):
    assert "no labels of epoch 7" in told(capsys, "--epoch", "7")
    assert "at least one cluster" in told(capsys, "--count", "0")
    assert "--data" in told(capsys, "--data", "nowhere")
    shutil.copytree(place / "crops", tmp_path / "fewer")
    sorted((tmp_path / "fewer" / "gate").iterdir())[0].unlink()
    assert "1 of" in (said := told(capsys, "--data", "fewer")) and "--data" in said
    shutil.rmtree("run/labels")
    assert "older version" in told(capsys)
    with pytest.raises(SystemExit):
        clusters_command(["none"])
    assert "looked for" in capsys.readouterr().err


def test_only_outliers_are_shown_too(place):
    data = load_dataset("folder", place / "crops", "(?P<camid>gate|lobby)/")
    write_labels(labels_file("run", 3), data.train, np.full(len(data.train), -1), data.root)
    clusters_command(["run", "--count", "1"])
    assert {line["cluster"] for line in table()} == {"-1"} and Path("run/clusters/outliers.png").exists()
    assert not Path("run/clusters/largest.png").exists()


@pytest.mark.parametrize("labels", [[3, 3, 7, 7, 7, -1], [0, 0, 0, 0, 0, 0], [-1] * 6, [5, -1, 5, -1, 5, 5]])
def test_distances_are_those_of_the_definition(labels):
    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = np.array(labels)
    centres = {k: rows[labels == k].mean(0) for k in set(labels[labels >= 0].tolist())}
    for i, (own, nearest, far) in enumerate(zip(*centre_distances(rows, labels))):
        away = {k: float(1 - rows[i] @ c / c.norm()) for k, c in centres.items()}
        assert own == pytest.approx(away.pop(labels[i], math.nan), abs=1e-6, nan_ok=True)
        assert nearest == min(away, key=away.get, default=-1)
        assert far == pytest.approx(min(away.values(), default=math.nan), abs=1e-6, nan_ok=True)


def test_lines_and_groups():
    rows = torch.eye(4)[[0, 0, 1, 1, 1, 2]]
    samples = [Sample(f"/d/{i}.jpg", pid, cam) for i, (pid, cam) in enumerate(zip([1, 1, 1, 2, 3, 9], [1, 2] * 3))]
    lines = cluster_lines(samples, np.array([1, 1, 0, 0, 0, -1]), rows, "/d", {"0.jpg": "anna"})
    assert [place for place, _ in lines] == [2, 3, 4, 0, 1, 5] and lines[3][1].name == "anna"
    zero, one = summarised([line for _, line in lines])
    assert (zero.cluster, zero.crops, zero.cameras, zero.people, zero.nearest) == (0, 3, 2, 3, 1)
    assert zero.mixed_people == pytest.approx(math.log2(3)) and one.mixed_people == 0 and one.mixed_cameras == 1
    unknown = [line._replace(pid=None, camera=None) for _, line in lines]
    assert {(g.people, g.cameras, g.mixed_cameras) for g in summarised(unknown)} == {(0, 0, 0.0)}


def test_small_helpers():
    assert spread(list(range(100)), 4) == [0, 33, 66, 99] and spread([5], 3) == [5] and spread([]) == []
    assert entropy([]) == 0 == entropy([None, None])
