"""Run notebooks in place and store their outputs; make README.md from index.ipynb.

    python tools/notebooks.py run [nbs/05_jaccard.ipynb ...]     all notebooks when none is named
    python tools/notebooks.py readme

`nbdev_test` runs the same cells without storing anything. Cells marked `#| eval: false`, `#| slow` or
`#| cuda` are skipped and keep the outputs they have.
"""

import base64
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from nbdev.clean import clean_nb
from nbdev.process import NBProcessor
from nbformat import NotebookNode, v4
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
SKIPPED = {"slow", "cuda"}


def is_skipped(cell):
    """Whether an nbdev cell with parsed directives is left alone."""
    directives = getattr(cell, "directives_", None) or {}
    never = (directives.get("eval:") or [""])[0].lower() == "false"
    return never or bool(SKIPPED & directives.keys()) or "nbdev_export(" in cell.source


def smaller(png):
    """A base64 PNG with at most 256 colours: far fewer bytes, and hardly a difference to see."""
    image, out = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), png, key=len)


def run(path):
    """Run the notebook at `path` in its folder and write its outputs back; an error ends the program."""
    path, start = Path(path).resolve(), time.time()
    notebook = read_nb(path)
    processed = NBProcessor(path, process=True).nb.cells
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format="png")
    for cell, parsed in zip(notebook.cells, processed, strict=True):
        if cell.cell_type == "code" and not is_skipped(parsed):
            cell.outputs = []  # a cell that prints nothing any more keeps nothing
            shell.cell(cell)
            if shell.exc:
                sys.exit(f"{path.name}: {shell.prettytb(fname=path)}")
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = smaller("".join(output["data"]["image/png"]))
    clean_nb(notebook)
    write_nb(notebook, path)
    print(f"{path.name}: {time.time() - start:.0f} s", flush=True)


def picture():
    """Keep the last picture of chapter 00 as a file, for the README and the site's first page."""
    cells = read_nb(NOTEBOOKS / "00_whole_game.ipynb").cells
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    pictures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    target = NOTEBOOKS / "images" / "whole_game.png"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(base64.b64decode("".join(pictures[-1])))


def readme():
    """Write README.md from the prose and shown code of index.ipynb, its hidden cells left out."""
    picture()
    cells = []
    for cell in NBProcessor(NOTEBOOKS / "index.ipynb", process=True).nb.cells:
        directives = getattr(cell, "directives_", None) or {}
        if cell.cell_type == "markdown":
            cells.append(v4.new_markdown_cell(cell.source))
        elif not {"hide", "default_exp"} & directives.keys():
            cells.append(v4.new_code_cell(cell.source))
    body, _ = MarkdownExporter().from_notebook_node(NotebookNode(v4.new_notebook(cells=cells)))
    body = re.sub(r"\]\((\w+\.ipynb|images/|howto/)", r"](nbs/\1", body).replace("](../", "](")  # seen from nbs/
    note = "<!-- Made from nbs/index.ipynb by `python tools/notebooks.py readme`: edit that. -->\n"
    (ROOT / "README.md").write_text(note + body.strip() + "\n", encoding="utf-8")


def main(command="", *paths):
    """Do what the command line asks."""
    if command == "readme" and not paths:
        readme()
    elif command == "run" and len(paths) == 1:
        run(paths[0])
    elif command == "run":
        # One process a notebook, as a reader's kernel would be.
        for path in paths or sorted(NOTEBOOKS.glob("*.ipynb")):
            subprocess.run([sys.executable, __file__, "run", str(path)], check=True)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
