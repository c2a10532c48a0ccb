"""Build the documentation site, `_docs`: chapters as they are stored, how-to pages and the API; no page asks a network.

    python tools/docs.py [FOLDER]     build into FOLDER (_docs when none is named), then check every page

`pip install -e ".[docs]"` brings what it needs. smalldocs reads `nbs/_quarto.yml`, as Quarto would; equations are made
MathML here, because smalldocs leaves them to scripts of a CDN, and themes lose the fonts that they would fetch.
"""

import configparser
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "nbs"
FONT = "site_libs/math.woff"  # STIX Two Math, the characters that the equations use
STYLE = f"""
@font-face {{ font-family: "STIX Two Math"; src: url("{Path(FONT).name}"); font-display: swap; }}
math {{ font-family: "STIX Two Math", math; font-size: 1.08em; }}
h1, h2, h3 {{ overflow-wrap: anywhere; }}
.quarto-dark .sidebar-title a {{ color: inherit; }}
.quarto-dark .smalldocs-search input {{ background: #333; color: inherit; border-color: #555; }}
.math.display {{ display: block; overflow-x: auto; overflow-y: hidden; padding: 0.3em 0; }}
"""


def settings():
    """settings.ini, where nbdev and setup.py read too."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def shown_cell(cell):
    """A cell as the site shows it, None where nbdev hides it; the code of `#| export` cells is folded away."""
    if cell["cell_type"] != "code":
        return cell
    lines = "".join(cell["source"]).splitlines(keepends=True)
    directives = {line[2:].split()[0].rstrip(":") for line in lines if line.startswith("#|") and line[2:].split()}
    if directives & {"hide", "default_exp"}:
        return None
    options = ["#| echo: false\n"] if "hide_input" in directives else []
    options += ["#| code-fold: true\n", "#| code-summary: code of the package\n"] if "export" in directives else []
    return cell | {"source": options + [line for line in lines if not line.startswith("#|")]}


def stage(folder, names=("*",)):
    """Copy nbs into `folder`, its hidden cells left out and links to files beside nbs made links to the repository."""
    shutil.copytree(NOTEBOOKS, folder, ignore=shutil.ignore_patterns("*.ipynb", "_docs", ".*"), dirs_exist_ok=True)
    blob = f"{settings()['git_url']}/blob/{settings()['branch']}/"
    for path in sorted({path for name in names for path in NOTEBOOKS.glob(f"{name}.ipynb")}):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [cell for cell in map(shown_cell, notebook["cells"]) if cell]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = re.sub(r"\]\(\.\./", f"]({blob}", "".join(cell["source"]))
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    for path in folder.glob("howto/*.md"):
        path.write_text(path.read_text(encoding="utf-8").replace("](../../", f"]({blob}"), encoding="utf-8")


def chapters():
    """The chapter of each module, in the order of the book: {"labels.jaccard": "21_jaccard.ipynb"}."""
    found = (
        (re.search(r"#\| default_exp (\S+?)\"", path.read_text("utf-8")), path) for path in NOTEBOOKS.glob("*.ipynb")
    )
    return {match[1]: path.name for match, path in sorted(found, key=lambda pair: pair[1]) if match}


def add_reference(folder):
    """Write the API's pages and the commands' page into `folder`; their part of the sidebar."""
    from smalldocs import api

    package, source = settings()["lib_name"], f"{settings()['git_url']}/blob/{settings()['branch']}"
    api.build(api.Settings(folder, [package], "api", ROOT, source))
    rooms, listed = {}, ["---", "title: The package, module by module", "---", ""]
    for module, chapter in chapters().items():
        room, name = module.split(".")
        path = folder / "api" / f"{name}.qmd"
        page = path.read_text(encoding="utf-8")
        about = json.loads(re.search(r"description: (.+)", page)[1])
        chapter = f"[Chapter {chapter[:2]}](../{chapter}) builds this module, and says why it is as it is.\n\n"
        page = page.replace("\n---\n\n", f"\ncode-overflow: wrap\n---\n\n{chapter}", 1)
        path.write_text(page, encoding="utf-8")
        if room not in rooms:
            listed += ["", f"## {package}.{room}", ""]
        rooms.setdefault(room, []).append({"text": name, "href": f"api/{path.name}"})
        listed.append(f"- [{name}]({path.name}): {about}")
    (folder / "api" / "index.qmd").write_text("\n".join(listed), encoding="utf-8")
    (folder / "api" / "commands.qmd").write_text(commands(), encoding="utf-8")
    parts = [{"section": room, "contents": pages} for room, pages in rooms.items()]
    return {"section": "API", "contents": ["api/index.qmd", "api/commands.qmd", *parts]}


def sidebar(folder, reference):
    """Number the chapters in the sidebar, as the text names them, and add the API's part to it."""
    path = folder / "_quarto.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    contents = config["website"]["sidebar"]["contents"]
    for section in contents[1:]:
        section["contents"] = [entry(folder, name) for name in section["contents"] if (folder / name).exists()]
    config["website"]["sidebar"]["contents"] = contents + [reference] * bool(reference)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def entry(folder, name):
    """A chapter in the sidebar with its number before its title; other pages as they are."""
    if not name.endswith(".ipynb"):
        return name
    cells = json.loads((folder / name).read_text(encoding="utf-8"))["cells"]
    first = "".join(next(cell for cell in cells if cell["cell_type"] == "markdown")["source"])
    return {"text": f"{name[:2]} {first.splitlines()[0].lstrip('# ')}", "href": name}


def commands():
    """A page with what each command answers to `--help`."""
    page = ["---", "title: The commands and their options", "---", ""]
    for script in settings()["console_scripts"].split():
        name, place = script.split("=")
        module, function = place.split(":")
        call = f"import sys, {module} as m; sys.argv = ['{name}', '--help']; sys.exit(m.{function}())"
        done = subprocess.run(
            [sys.executable, "-c", call],
            env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"},
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            raise SystemExit(f"{name} --help: {done.stderr}")
        page += [f"## {name}", "", "```text", done.stdout.rstrip(), "```", ""]
    return "\n".join(page)


def mathml(tex, display):
    """An equation as MathML; ValueError where the converter does not know a command."""
    from math_core import LatexError, LatexToMathML

    source = f"\\begin{{equation}}{tex}\\end{{equation}}" if "\\tag" in tex else tex
    try:
        return LatexToMathML(fancy_error=False).convert_with_local_state(source, displaystyle=display)
    except LatexError as error:
        raise ValueError(f"equation {tex!r}: {error}") from None


def with_mathml(page):
    """A page whose equations need no script."""

    def converted(found):
        return f"{found[1]}{mathml(html.unescape(found[3]), found[2] == 'display')}</span>"

    page = re.sub(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]]</span>', converted, page, flags=re.S)
    return re.sub(r"<(script|link) [^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(</script>)?\s*", "", page)


def math_font(target, characters):
    """Write STIX Two Math (SIL Open Font License) with no more than these characters."""
    from fontTools import subset

    options = subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True)
    font = subset.load_font(
        str(Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"), options
    )
    cut = subset.Subsetter(options)
    cut.populate(text="".join(sorted(characters)))
    cut.subset(font)
    subset.save_font(font, str(target), options)


def unplugged(folder):
    """Let what smalldocs wrote ask no network: MathML with a font beside it, themes without web fonts."""
    characters = set()
    for path in folder.rglob("*.html"):
        page = with_mathml(path.read_text(encoding="utf-8"))
        characters |= set("".join(html.unescape(found) for found in re.findall(r"<math.*?</math>", page, re.S)))
        path.write_text(page, encoding="utf-8")
    for path in folder.rglob("*.css"):
        sheet = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"@import url\(https?:[^)]*\);", "", sheet), encoding="utf-8")
    math_font(folder / FONT, characters)
    with (folder / "site_libs" / "smalldocs.css").open("a", encoding="utf-8") as sheet:
        sheet.write(STYLE)


class Found(HTMLParser):
    """What a page links to, loads and offers as a target, and whether TeX is left in it."""

    LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("source", "src"), ("iframe", "src")}

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.tex = [], [], set(), []
        self.code = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.code += tag in ("code", "pre", "script", "style")
        for name, value in attrs:
            if name in ("id", "name"):
                self.ids.add(value)
            elif (tag, name) in self.LOADED:
                self.loads.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        self.code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data):
        if not self.code:
            self.tex += re.findall(r"\\[(\[][^\n]{1,40}|\\(?:frac|sum|cdot|mathrm)\b|\$\$", data)


def problems(folder):
    """What is wrong with a built site, a sentence each: dead links, what only a network could bring, raw TeX."""
    pages = {path: Found(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(folder).as_posix()
        wrong += [f"{where}: TeX is left in the text: {tex}" for tex in page.tex]
        for address in page.loads + page.links:
            parts = urlsplit(address or "")
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                wrong += [f"{where}: loads {address}"] if address in page.loads else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{where}: dead link {address}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{where}: {address} names no place in {target.name}")
    for path in sorted(folder.rglob("*.css")):
        remote = re.findall(r"(?:@import|url\()\s*[\"']?(https?:[^\"')]+)", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(folder).as_posix()}: loads {address}" for address in remote]
    return wrong


def build(target, names=("*",), reference=True):
    """Build the site into `target`; `names` of notebooks and `reference` leave parts out, for a quick look."""
    from smalldocs.config import load
    from smalldocs.site import Site

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "nbs"
        stage(folder, names)
        sidebar(folder, add_reference(folder) if reference else None)
        site = Site(load(folder), quiet=True)
        site.out = Path(temporary) / "site"
        site.build()
        unplugged(site.out)
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(site.out, target)
    return len(site.pages)


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / settings()["doc_path"]).resolve()
    print(f"{build(place)} pages in {place}; open {place / 'index.html'}")
    sys.exit("\n".join(problems(place)))
