"""One style and consistent types, as ruff.toml and mypy.ini say; `make fix` mends most of it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("words", ["ruff check .", "ruff format --check .", "mypy"])
def test_the_code_keeps_to(words):
    done = subprocess.run([sys.executable, "-m", *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr


def test_the_checkers_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os\ndef f(x): return x\n")
    for words in ("ruff check --config ruff.toml", "ruff format --check --config ruff.toml"):
        assert (
            subprocess.run([sys.executable, "-m", *words.split(), str(bad)], cwd=ROOT, capture_output=True).returncode
            == 1
        )
    bad.write_text("def f(x: int) -> str:\n    return x\n")
    assert (
        subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file=", str(bad)], cwd=tmp_path, capture_output=True
        ).returncode
        == 1
    )


def test_make_and_the_hooks_check_the_same():
    makefile, hooks = (ROOT / "Makefile").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    for words in ("ruff check", "ruff format --check", "mypy", "nbdev_export", "nbdev_clean"):
        assert words in makefile and words in hooks
