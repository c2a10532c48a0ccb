"""The package is what the notebooks export, documented, whole in its wheel, and no more than it should be."""

import ast
import configparser
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["data", "model", "labels", "criteria", "scores", "training", "studies", "use"]
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def exported(path):
    """The module that a chapter writes, as room.module; None for a chapter that only teaches."""
    found = re.search(r'"#\| default_exp (\S+)"', path.read_text())
    return found and found[1]


# A module may import only what stands before it in the book.
ORDER = [module for module in map(exported, CHAPTERS) if module]


def copy_project(folder):
    """The project without git, caches and runs, in `folder`."""
    ignore = shutil.ignore_patterns(
        ".git", "__pycache__", "*.egg-info", "runs", "build", "dist", ".venv", ".pytest_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, folder / "copy", ignore=ignore))


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for pattern in ("affscl/**/*.py", "nbs/*.ipynb", "README.md", "pyproject.toml")
        for path in root.glob(pattern)
    }


def test_notebooks_package_and_readme_are_in_step(tmp_path):
    copy = copy_project(tmp_path)
    scripts = Path(sys.executable).parent
    for command in (
        [scripts / "nbdev_export"],
        [scripts / "nbdev_clean"],
        [sys.executable, "tools/notebooks.py", "readme"],
    ):
        subprocess.run(command, cwd=copy, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(copy)})
    before, after = contents(ROOT), contents(copy)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def source(module):
    return (ROOT / "affscl" / f"{module.replace('.', '/')}.py").read_text()


def test_every_module_has_its_chapter_and_every_room_its_tens():
    files = {
        ".".join(path.relative_to(ROOT / "affscl").with_suffix("").parts)
        for path in (ROOT / "affscl").rglob("*.py")
        if not path.stem.startswith("_")
    }
    assert files == set(ORDER)
    for path in CHAPTERS:
        if module := exported(path):
            assert path.stem[3:] == module.split(".")[1]
    tens = {
        room: {path.stem[0] for path in CHAPTERS if (exported(path) or "").startswith(f"{room}.")} for room in ROOMS
    }
    assert all(len(digits) == 1 for digits in tens.values()) and [min(tens[room]) for room in ROOMS] == sorted(
        min(d) for d in tens.values()
    )


@pytest.mark.parametrize("name", ORDER)
def test_a_module_is_short(name):
    assert len(source(name).splitlines()) <= 400, "about 350 lines, one subject"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    assert own_imports(source(name), name) <= set(ORDER[: ORDER.index(name)])


def own_imports(text, module):
    """The modules of this package that a module's source imports, relatively (as nbdev writes them) or by full name."""
    found, room = set(), module.split(".")[0]
    for node in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]:
        place = {0: node.module or "", 1: f"affscl.{room}.{node.module or ''}", 2: f"affscl.{node.module or ''}"}[
            node.level
        ].strip(".")
        if place.startswith("affscl.") and place.count(".") == 2:
            found.add(place.removeprefix("affscl."))
        elif place.startswith("affscl."):  # from .. import module
            found |= {f"{place.removeprefix('affscl.')}.{alias.name}" for alias in node.names}
    return found


def test_imports_are_found():
    text = "from .store import a\nfrom ..model.network import b\nfrom torch import c\n"
    text += "from affscl.scores.figures import d\nfrom . import sampling"
    assert own_imports(text, "data.datasets") == {"data.store", "model.network", "scores.figures", "data.sampling"}
    assert {"training.loop", "model.network"} <= own_imports(source("training.cli"), "training.cli")


@pytest.mark.parametrize("name", ORDER)
def test_runtime_needs_no_notebook_tools(name):
    tree = ast.parse(source(name))
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not roots & {"nbdev", "fastcore", "execnb", "IPython", "pytest"}


def public(name):
    """(qualified name, object) of the module's public functions, classes and their methods."""
    module = importlib.import_module(f"affscl.{name}")
    for symbol in module.__all__:
        thing = getattr(module, symbol)
        if isinstance(thing, types.GenericAlias):  # an alias, which Python 3.10 takes for a class
            continue
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield f"{name}.{symbol}", thing
        if inspect.isclass(thing):
            for key, value in vars(thing).items():
                value = value.fget if isinstance(value, property) else value
                if inspect.isfunction(value) and not key.startswith("_") and key != "forward":
                    yield f"{name}.{symbol}.{key}", value


@pytest.mark.parametrize("name", ORDER)
def test_every_public_name_is_documented(name):
    generated = re.compile(r"^\w+\(.*\)$", re.S)  # what dataclass and NamedTuple write by themselves
    missing = [
        where for where, thing in public(name) if not (thing.__doc__ or "").strip() or generated.match(thing.__doc__)
    ]
    assert missing == []


def test_the_package_offers_its_names_without_waiting_for_torch():
    import affscl

    code = "import sys, affscl; assert 'torch' not in sys.modules; affscl.AFF; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert set(affscl.__all__) == set(affscl._HOMES) <= set(dir(affscl))
    for name, home in affscl._HOMES.items():
        assert getattr(affscl, name) is getattr(importlib.import_module(f"affscl.{home}"), name)
    with pytest.raises(AttributeError, match="has no attribute 'Aff'; it offers AFF"):
        affscl.Aff  # noqa: B018
    checked = re.search(r"if TYPE_CHECKING:(.*?)\n\n", (ROOT / "affscl" / "__init__.py").read_text(), re.S)[1]
    assert {name.strip() for line in checked.split("import ")[1:] for name in line.split("from")[0].split(",")} == set(
        affscl.__all__
    )


def test_the_contract_of_public_names_holds():
    from affscl import (
        AFF,
        RECIPES,
        Config,
        DualMemory,
        balanced_l1,
        evaluate,
        extract,
        jaccard_distance,
        load_dataset,
        load_model,
        make_dataset,
        pseudo_labels,
        rerank,
        score,
        train,
    )
    from affscl.model.attention import CAM, CASAM

    def begins(function, *expected):
        found = list(inspect.signature(function).parameters.values())
        named = [(p.name, p.default) if p.default is not p.empty else p.name for p in found[: len(expected)]]
        assert named == list(expected)

    begins(CAM, "channels", ("reduction", 16))
    begins(CASAM, "channels", ("reduction", 16), ("kernel_size", 7))
    begins(load_dataset, "name", ("root", None))
    assert list(inspect.signature(make_dataset).parameters)[:1] == ["root"]
    assert {"n_ids", "n_cams", "seed"} <= inspect.signature(make_dataset).parameters.keys()
    begins(AFF, ("backbone", "resnet50"), ("layout", "paper"), ("weights", None))
    assert list(inspect.signature(extract).parameters)[:2] == ["model", "data"]
    begins(load_model, "run")
    begins(jaccard_distance, "features", ("k1", 30), ("k2", 6), ("eps", None))
    begins(pseudo_labels, "features", ("eps", 0.6), ("min_samples", 4), ("k1", 30), ("k2", 6))
    begins(
        DualMemory, "centroids", ("hard", None), ("momentum", 0.1), ("temperature", 0.05), ("hard_reference", "mean")
    )
    begins(balanced_l1, "x", ("alpha", 0.9), ("gamma", 1.5))
    begins(
        evaluate, "query_features", "gallery_features", "query_pids", "gallery_pids", "query_camids", "gallery_camids"
    )
    begins(rerank, "query_features", "gallery_features", ("k1", 20), ("k2", 6), ("lambda_value", 0.3))
    begins(score, "distance", "query_pids", "gallery_pids", "query_camids", "gallery_camids")
    begins(train, "config", ("out", None), ("resume", None))
    assert {"quick", "tiny", "small", "market1501", "dukemtmc", "msmt17"} <= RECIPES.keys()
    assert all(isinstance(recipe, Config) for recipe in RECIPES.values())


def test_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    copy = copy_project(tmp_path)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, copy],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        scripts = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    expected = {
        f"affscl/{path.relative_to(ROOT / 'affscl')}"
        for path in (ROOT / "affscl").rglob("*")
        if path.is_file() and (path.suffix in {".py", ".safetensors", ".jinja", ".md"} or path.name == "py.typed")
    }
    assert set(names) == expected
    assert "affscl-train" in scripts and "affscl-eval" in scripts
    assert 'sys_platform == "linux" and platform_machine == "x86_64"' in metadata
    assert not re.search(r"Requires-Dist: (nbdev|fastcore)(?!.*extra)", metadata)


def test_console_scripts_exist():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    for entry in settings["DEFAULT"]["console_scripts"].split():
        module, function = entry.split("=")[1].split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_ci_runs_the_command_that_the_readme_names():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2, "exactly two commands do all the set-up"
    assert commands[0].endswith("affscl-train") and commands[1].endswith("pytest")
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "affscl"


def test_no_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = (
        tracked.stdout.split() if tracked.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md")]
    )
    texts = {
        name: (ROOT / name).read_text(errors="ignore")
        for name in names
        if name.endswith((".py", ".md", ".ipynb", ".ini", ".yml", ".csv"))
    }
    pattern = re.compile(r"(?<![A-Za-z0-9_.])/(?:work|root|farm)/[A-Za-z0-9_.]")
    assert [name for name, text in texts.items() if pattern.search(text)] == []
