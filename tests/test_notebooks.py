"""The notebooks run, each in a process of its own, and keep to the skeleton of a chapter."""

import json
import multiprocessing
import os
import re
import statistics
from pathlib import Path

import matplotlib
import pytest
from forked import FORK
from nbdev.test import nbdev_test

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]
CAP = 40  # lines in a code cell
APPENDICES = {"98_decisions", "99_glossary"}
# Chapters about files, words and processes, of which there is nothing to see.
PLAIN = APPENDICES | {
    "02_domains",
    "12_weights",
    "24_labellers",
    "39_factory",
    "42_benchmark",
    "50_config",
    "51_loading",
    "52_runs",
    "53_processes",
    "54_progress",
    "56_options",
    "57_launch",
    "58_cli",
    "71_catalogue",
    "72_sweeps",
    "74_naive",
    "75_measuring",
}


def run_notebook(path, flags, said):
    """Execute a notebook in this process, and leave what it prints in a file."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # as in a process that was started, not forked
    matplotlib.use("agg")
    nbdev_test(path=path, flags=flags, n_workers=0)


# tests/test_full_training.py executes chapter 90, with its cells for CUDA.
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != "90_full_training"], ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    process = FORK.Process(target=run_notebook, args=(path, os.environ.get("NB_FLAGS", ""), tmp_path / "said"))
    process.start()
    process.join(900)
    if process.is_alive():
        process.kill()
        process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and "Success." in said, f"exit code {process.exitcode}\n{said}"


def cells(path, kind):
    """Sources of all cells of a kind."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def code_lines(source):
    return [line for line in source.splitlines() if line.strip()]


def test_no_two_chapters_have_one_number():
    numbers = [path.stem[:2] for path in CHAPTERS]
    assert len(set(numbers)) == len(numbers) and all(number.isdigit() for number in numbers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_references_to_chapters_exist(path):
    prose = "\n".join(cells(path, "markdown"))
    linked = set(re.findall(r"\]\((\w+\.ipynb)", prose))
    numbers = {
        number
        for group in re.findall(r"[Cc]hapters? ((?:\d\d(?:, | and | to )?)+)", prose)
        for number in re.findall(r"\d\d", group)
    }
    assert linked <= {other.name for other in NOTEBOOKS}
    assert numbers <= {other.stem[:2] for other in CHAPTERS}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
class TestSkeleton:
    def test_title_and_subtitle(self, path):
        assert re.match(r"# \S.*\n\n> \S", cells(path, "markdown")[0])

    def test_has_every_part(self, path):
        headings = re.findall(r"^## (.+)$", "\n".join(cells(path, "markdown")), re.M)
        assert headings[0] == "What you will learn"
        assert headings[-2:] == ["Summary", "Exercises"]
        last = "\n".join(cells(path, "markdown")).rsplit("## Exercises", 1)[1]
        assert re.search(r"hint|answer", last, re.I), "exercises have hints or short answers"
        assert "TODO" not in last
        assert any(heading.startswith("What the paper leaves open") for heading in headings)

    def test_cells_are_short(self, path):
        lengths = [len(code_lines(source)) for source in cells(path, "code")]
        assert max(lengths) <= CAP
        assert statistics.median(lengths) <= 8

    def test_what_is_printed_is_stored(self, path):
        # execnb drops what a cell prints if the cell ends with a semicolon: write `_ = ...` instead.
        assert not [source for source in cells(path, "code") if source.rstrip().endswith(";") and "print(" in source]

    def test_imports_stand_alone(self, path):
        # The documentation build runs every cell that holds an import, whatever its flags.
        for source in cells(path, "code"):
            tops = [line for line in code_lines(source) if not line.startswith((" ", "#", ")", "%"))]
            imports = [line for line in tops if line.startswith(("import ", "from "))]
            exporting = "nbdev_export()" in source
            assert not imports or len(imports) == len(tops) or exporting, source

    def test_more_prose_than_code(self, path):
        words = sum(len(text.split()) for text in cells(path, "markdown"))
        assert words >= 1.2 * sum(len(code_lines(source)) for source in cells(path, "code"))

    def test_outputs_are_stored(self, path):
        stored = [
            cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code" and cell["outputs"]
        ]
        text = json.dumps([cell["outputs"] for cell in stored])
        assert len(stored) >= (1 if path.stem in APPENDICES else 3)
        assert '"output_type": "error"' not in text
        assert "\\r" not in text, "progress bars leave junk in stored outputs"
        assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text, (
            "a path of one machine in an output"
        )

    def test_has_pictures(self, path):
        assert path.stem in PLAIN or '"image/png"' in path.read_text()


def test_sidebar_lists_every_notebook_in_order():
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs" / "_quarto.yml").read_text())
    assert listed == ["index.ipynb"] + [path.name for path in CHAPTERS]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_decision_is_a_link_to_the_table(path):
    prose = "\n".join(cells(path, "markdown"))
    linked = set(re.findall(r"98_decisions\.ipynb#d(\d+)", prose))
    assert linked <= {str(n) for n in range(1, 33)}
    plain = re.findall(r"(?<![\[\w])[Dd]ecisions? \d+", prose)
    assert path.stem in APPENDICES or plain == [], "write [decision 14](98_decisions.ipynb#d14)"


def test_every_decision_has_its_line_and_its_chapter():
    table = "\n".join(cells(ROOT / "nbs" / "98_decisions.ipynb", "markdown"))
    for number in range(1, 33):
        (line,) = [line for line in table.splitlines() if f'<a id="d{number}"></a>' in line]
        for name in re.findall(r"\]\((\w+\.ipynb)\)", line):
            prose = "\n".join(cells(ROOT / "nbs" / name, "markdown") + cells(ROOT / "nbs" / name, "code"))
            assert re.search(rf"98_decisions\.ipynb#d{number}\b|[Dd]ecision {number}\b", prose), (
                f"decision {number} is not explained in {name}"
            )
