"""What a user installs works, and goes on working when it is installed again in another way, and removed."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from test_project import copy_project

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--epochs", "1", "--iterations", "2", "--world-ids", "24", "--world-cams", "3", "--p", "4"]


class Environment:
    """A virtual environment of its own that sees the tester's dependencies, but not the tester's affscl."""

    def __init__(self, folder):
        self.folder, self.home = folder / "env", folder / "home"
        venv.create(self.folder, with_pip=False)
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / Path(sys.executable).name
        self.site = Path(
            self.call(self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        )
        paths = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
        (self.site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")

    def call(self, *command, cwd=None):
        """Run a command; what it prints. A failure shows all of it."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            env=kept | {"XDG_CACHE_HOME": str(self.home)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *words):
        return self.call(sys.executable, "-m", "pip", "--python", self.python, *words)

    def install(self, *what):
        return self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *what)

    def train(self):
        """The README's first command in miniature; its initial weights are the ones that come with the package."""
        name = "affscl-train.exe" if os.name == "nt" else "affscl-train"
        assert "last, epoch 1" in self.call(self.bin / name, "tiny", *FAST, cwd=self.home)


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "home").mkdir()
    return Environment(tmp_path)


def test_install_train_edit_train_uninstall(environment, tmp_path):
    copy = copy_project(tmp_path)
    environment.install(copy)
    environment.train()
    environment.install("-e", copy)
    environment.train()
    environment.install(copy)
    environment.train()
    environment.pip("uninstall", "-y", "affscl")
    assert not (environment.site / "affscl").exists(), "something of the package outlives it"


def test_leftovers_of_another_version_do_no_harm(environment, tmp_path):
    # A compile cache of an earlier version stays when pip removes the package, and looks like a package itself.
    copy = copy_project(tmp_path)
    (environment.site / "affscl" / "__pycache__").mkdir(parents=True)
    (environment.site / "affscl" / "weights").mkdir()
    environment.install("-e", copy)
    environment.train()


def test_the_source_distribution_can_be_built_from(environment, tmp_path):
    copy = copy_project(tmp_path)
    environment.call(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    environment.install(archive)
    environment.train()
