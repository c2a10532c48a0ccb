"""The command affscl-search: its gallery follows a folder, its index is kept, its answers are a table and a picture."""

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from affscl import AFF, Config
from affscl.data.synthetic import make_dataset
from affscl.training.runs import write_config
from affscl.use import gallery as gallery_module
from affscl.use.search import search_command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run's folder with an untrained network, and crops in folders named as cameras."""
    root = tmp_path_factory.mktemp("search")
    make_dataset(root / "world", n_ids=18, n_cams=2, seed=4)
    for path in (root / "world" / "bounding_box_test").iterdir():
        camera = "gate" if "_c1" in path.name else "lobby"
        (root / "crops" / camera).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "crops" / camera / path.name)
    settings = dict(backbone="resnet10", height=32, width=16)
    torch.manual_seed(0)
    for run in ("run", "other"):
        write_config(root / run, Config(dataset="folder", data=str(root / "crops"), pad=2, **settings))
        save_file(AFF(**settings).state_dict(), root / run / "model.safetensors")
    return root


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


PATTERN = ["--pattern", "^(?P<camid>[^/]+)/"]


def lines(path="search.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_from_a_photo_to_a_table_and_a_picture(place, capsys):
    photo = sorted(Path("crops/gate").iterdir())[0]
    search_command(["run", str(photo), "--gallery", "crops", "--k", "4", *PATTERN])
    found = lines()
    assert [line["rank"] for line in found] == ["1", "2", "3", "4"] and {line["camera"] for line in found} <= {
        "gate",
        "lobby",
    }
    assert os.path.samefile(found[0]["path"], photo) and found[0]["similarity"].startswith("1.0")
    with Image.open("search.png") as picture:
        assert picture.width > 200
    said = capsys.readouterr().out
    assert "crops in the gallery" in said and "search.csv" in said
    search_command(
        [
            "run",
            str(photo),
            str(photo),
            "--gallery",
            "crops",
            "--k",
            "3",
            "--without",
            "gate",
            "--out",
            "new/x",
            *PATTERN,
        ]
    )
    assert {line["camera"] for line in lines("new/x.csv")} == {"lobby"} and len(lines("new/x.csv")) == 6


def test_only_new_files_are_extracted(place, monkeypatch, capsys):
    extracted, real = [], gallery_module.extract

    def counting(model, data, *rest):
        extracted.append([item if isinstance(item, str) else item.path for item in data])
        return real(model, data, *rest)

    monkeypatch.setattr(gallery_module, "extract", counting)
    photo = str(sorted(Path("crops/lobby").iterdir())[0])
    command = ["run", photo, "--gallery", "crops"]
    search_command(command)
    n = len(lines()) and sum(len(part) for part in extracted) - 1
    assert n == len(list(Path("crops").rglob("*.jpg")))
    extracted.clear()
    search_command(command)
    assert extracted == [[photo]] and "0 new, 0 changed, 0 gone" in capsys.readouterr().out
    extracted.clear()
    gone = sorted(Path("crops/gate").iterdir())
    shutil.copy(gone[0], "crops/new.jpg")
    shutil.copy(gone[1], gone[2])
    gone[3].unlink()
    search_command(command)
    assert sorted(Path(path).name for path in extracted[0]) == sorted(["new.jpg", gone[2].name])
    assert "1 new, 1 changed, 1 gone" in capsys.readouterr().out


def test_an_index_of_another_run_is_refused_and_its_own_place_is_not(place, capsys):
    photo = str(sorted(Path("crops/lobby").iterdir())[0])
    search_command(["run", photo, "--gallery", "crops", "--index", "kept"])
    with pytest.raises(SystemExit):
        search_command(["other", photo, "--gallery", "crops", "--index", "kept"])
    assert "made by another network" in capsys.readouterr().err
    shutil.copy("other/model.safetensors", "run/model.safetensors")  # trained further
    search_command(["run", photo, "--gallery", "crops"])
    assert len(lines()) == 10


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "nobody.jpg", "--gallery", "crops"], "no photo nobody.jpg"),
        (["run", "run/config.json", "--gallery", "crops"], "cannot be read as an image"),
        (["run", "PHOTO", "--gallery", "empty"], "no images for a gallery"),
        (["run", "PHOTO", "--gallery", "crops", "--pattern", "x(?P<camid>9)"], "does not match"),
        (
            ["run", "PHOTO", "--gallery", "crops", "--cameras", "roof", *PATTERN],
            "no crop of camera roof; the cameras here are gate, lobby",
        ),
        (["run", "PHOTO", "--gallery", "crops", "--k", "0"], "k=0"),
        (["nowhere", "PHOTO", "--gallery", "crops"], "no run's folder"),
    ],
)
def test_mistakes_are_told(place, capsys, words, said):
    photo = str(sorted(Path("crops/lobby").iterdir())[0])
    with pytest.raises(SystemExit) as stopped:
        search_command([photo if word == "PHOTO" else word for word in words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
