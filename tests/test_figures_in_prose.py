"""Figures in prose stand in an output: a number with a decimal point that a chapter says, the chapter must show.

A chapter is checked when its name is in CHECKED. A figure counts as shown if it occurs in a stored output of the
notebook (as it is, or rounded from one), in its code, in a CSV or JSON file of nbs/results that the chapter reads,
or among the published numbers of PUBLISHED. Numbers in formulas, in code and of sections are no figures.
"""

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
CHECKED = [
    "70_statistics",
    "71_catalogue",
    "72_sweeps",
    "73_ablation",
    "74_naive",
    "75_measuring",
    "76_stages",
    "77_bench",
]
PUBLISHED = {  # chapter -> numbers of the paper and of other people's papers that only its prose says
    "71_catalogue": {"71.2", "87.7", "65.1", "78.0", "94.1"},  # MMT in Table 3; the strong baseline with its neck
    "73_ablation": {"77.7", "78.8", "66.5", "68.6", "6.5", "2.5"},  # Table 3 on real datasets; Table 7 and its neck
    "75_measuring": {"4.5", "1.3"},  # made up, in quotation marks
}
FIGURE = re.compile(r"(?<![\w.\-/])[-−+]?\d[\d,]*\.\d+(?![\w.]*\d)")  # neither versions nor file names
FORMULA = re.compile(r"[Ss]ections? \d[.\d]*|```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`|\]\([^)]*\)", re.S)


def number(text):
    """The number without its sign: prose says "a fall of 5.1" where the output has -5.1."""
    return float(text.replace(",", "").lstrip("+-−"))


def shown_by(cells):
    """All text that a chapter shows: outputs, code, tables in prose, and the results that it reads."""
    texts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            texts.append(source)
            outputs = json.dumps([out for out in cell["outputs"] if "image/png" not in out.get("data", {})])
            texts.append(outputs.replace("\\n", "\n"))
        else:
            texts += [line for line in source.splitlines() if line.startswith("|")]
    read = set(re.findall(r"results/[\w/]*\w+\.(?:csv|json)", "\n".join(texts)))
    return "\n".join([*texts, *((NBS / name).read_text() for name in sorted(read) if (NBS / name).exists())])


def unsupported(name):
    """The figures of a chapter's prose that nothing beside them shows."""
    cells = json.loads((NBS / f"{name}.ipynb").read_text())["cells"]
    shown = {float(x) for x in re.findall(r"\d+\.?\d*", shown_by(cells).replace(",", ""))}
    shown |= {100 * x for x in shown if x < 1}  # files hold fractions, prose says percent
    missing = []
    for cell in cells:
        if cell["cell_type"] != "markdown":
            continue
        prose = FORMULA.sub(" ", "".join(cell["source"]))
        prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
        for text in FIGURE.findall(prose):
            digits = len(text.split(".")[1])
            known = text.lstrip("+-−") in PUBLISHED.get(name, ())
            if not known and not any(round(x, digits) == number(text) for x in shown):
                missing.append(text)
    return missing


@pytest.mark.parametrize("name", CHECKED)
def test_figures_in_prose_are_shown(name):
    assert unsupported(name) == []


def test_the_check_can_fail(monkeypatch, tmp_path):
    cells = [
        {
            "cell_type": "code",
            "source": ["x = 1"],
            "outputs": [{"output_type": "stream", "text": ["1.62 and 2,000.5\n"]}],
        },
        {
            "cell_type": "markdown",
            "source": ["It is 1.6, or 1.62, not 1.7; $3.5$ and `4.5` are no figures, nor v2.14.1. "],
        },
        {"cell_type": "markdown", "source": ["Of 2,000.5 we lost −0.4."]},
    ]
    (tmp_path / "01_made_up.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr("test_figures_in_prose.NBS", tmp_path)
    assert unsupported("01_made_up") == ["1.7", "−0.4"]


def test_what_is_allowed_is_needed():
    """The list of published numbers does not grow stale."""
    for name, figures in PUBLISHED.items():
        prose = "\n".join(
            "".join(cell["source"])
            for cell in json.loads((NBS / f"{name}.ipynb").read_text())["cells"]
            if cell["cell_type"] == "markdown"
        )
        assert [figure for figure in figures if figure not in prose] == []
