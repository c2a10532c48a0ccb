"""The site asks no network, has no dead link and shows every equation; what its how-to pages say can be done."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from long_forms import LONG

from affscl import load_dataset, make_dataset
from affscl.training.launch import COMMANDS
from affscl.training.options import word_problems

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
docs = pytest.importorskip("docs", reason='pip install -e ".[docs]"')
HOWTO = [ROOT / "nbs" / name for name in re.findall(r"- (howto/\S+)", (ROOT / "nbs" / "_quarto.yml").read_text())]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
TINY = "--weights none --epochs 1 --iterations 2 --p 4 --backbone resnet10 --height 64 --width 32 --pad 3 --device cpu"
STUDY = "--epochs 1 --iterations 2 --seeds 1 --world-ids 24 --world-cams 3 --k1 8 --p 4 --device cpu"
WRITTEN = """search.csv search.png answer.csv answer.png people features.npz compared.html runs/named/model.safetensors
runs/mine/report.html runs/mine/model.onnx runs/mine/clusters/largest.png results/ablation_table4.md"""


def prose(path):
    """The Markdown of a notebook or a page."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(text, kind=r"\w+"):
    """(language, code) of each fenced block."""
    return re.findall(rf"^```({kind})\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """Each line of a shell block that begins with one of our commands, as words."""
    lines = "\n".join(code for _, code in blocks(text, "sh|bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split()[:1] and line.split()[0] in COMMANDS]


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
PAGES += [ROOT / "nbs" / "results" / "README.md", *HOWTO, *NOTEBOOKS]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_links_to_exists(path):
    links = re.findall(r"\]\(([^)#:\s]+)[)#]", prose(path))
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert path.name != "README.md" or path.parent != ROOT or len(links) > 50


def needs_smalldocs():
    pytest.importorskip("smalldocs", reason="smalldocs wants Python 3.11")
    pytest.importorskip("math_core")


@pytest.mark.parametrize("path", [ROOT / "README.md", *HOWTO, *NOTEBOOKS], ids=lambda path: path.stem)
def test_documented_commands_have_words_that_the_commands_know(path):
    for name, *words in commands(prose(path)):
        assert not word_problems(COMMANDS[name], words), (name, words)


def test_every_howto_page_is_listed_and_begins_as_chapters_do():
    assert set(HOWTO) == set((ROOT / "nbs" / "howto").glob("*.md"))
    for path in HOWTO:
        assert re.match(r"# \S.*\n\n> \S", prose(path)) and blocks(prose(path)), path


def test_every_equation_becomes_mathml():
    needs_smalldocs()
    found = 0
    for path in NOTEBOOKS:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", prose(path), flags=re.S)
        for tex in re.findall(r"\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$(?!\d)", text, re.S):
            page = docs.mathml(tex.strip("$"), tex.startswith("$$"))
            assert page.startswith("<math") and "\\" not in page.replace("\\</mo>", ""), (path.stem, tex)
            found += 1
    assert found > 300
    with pytest.raises(ValueError, match="nosuchcommand"):
        docs.mathml(r"a \nosuchcommand b", False)


def test_a_few_pages_ask_no_network(tmp_path):
    needs_smalldocs()
    docs.build(tmp_path / "site", ("index", "21_jaccard"), reference=False)
    page = (tmp_path / "site" / "21_jaccard.html").read_text()
    assert page.count("<math") > 50 and "katex" not in page and "default_exp" not in page and "nbdev_export" not in page
    assert (tmp_path / "site" / docs.FONT).stat().st_size > 10_000
    assert "code of the package" in page and "data:image/png" in page
    wrong = [told for told in docs.problems(tmp_path / "site") if not re.search(r"dead link (\.\./)?\d\d_", told)]
    assert wrong == [], wrong  # the other chapters were not built


FAULTS = {
    '<script src="https://cdn.example/x.js"></script>': "loads https://cdn.example/x.js",
    '<link rel="stylesheet" href="//cdn.example/x.css">': "loads //cdn.example/x.css",
    '<img src="https://example.org/x.png">': "loads https",
    '<img src="missing.png">': "dead link missing.png",
    '<a href="other.html">': "dead link other.html",
    '<a href="page.html#nowhere">': "names no place",
    '<a href="#nowhere">': "names no place",
    r"so \(x^2\) is": "TeX is left",
    "all $$ of it": "TeX is left in the text: $$",
}


@pytest.mark.parametrize("fault", FAULTS, ids=FAULTS.values())
def test_faults_of_a_page_are_told(tmp_path, fault):
    (tmp_path / "page.html").write_text(f'<p id="here">{fault}</p>')
    (told,) = docs.problems(tmp_path)
    assert told.startswith("page.html: ") and FAULTS[fault] in told


def test_what_is_right_is_not_told(tmp_path):
    (tmp_path / "page.html").write_text(
        '<h2 id="here">x</h2><a href="https://example.org"></a><a href="page.html#here"></a><a href="sub/"></a>'
        r'<img src="data:image/png;base64,AA"><code>\(x\) $$</code>'
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<a href="../page.html">')
    (tmp_path / "own.css").write_text('@font-face { src: url("math.woff") }')
    assert docs.problems(tmp_path) == []
    (tmp_path / "own.css").write_text("@import url(https://fonts.example/css);")
    assert docs.problems(tmp_path) == ["own.css: loads https://fonts.example/css"]


@LONG
def test_the_whole_site_has_no_dead_link_and_asks_no_network(tmp_path):
    needs_smalldocs()
    pages = docs.build(tmp_path / "site")
    assert (
        pages
        == len(NOTEBOOKS)
        + len(HOWTO)
        + len(docs.chapters())
        + 2
        + len(list((ROOT / "nbs").glob("results/**/*.md")))
        - 1
    )
    assert docs.problems(tmp_path / "site") == []
    api = (tmp_path / "site" / "api" / "clustering.html").read_text()
    assert "neighbours whose encodings are averaged" in api and "22_clustering.html" in api


def small(words):
    """A documented command with a small network, few steps and no download."""
    name, *words = words
    if name == "affscl-train" and "--resume" not in words:
        words = [word for i, word in enumerate(words) if "--weights" not in words[max(i - 1, 0) : i + 1]] + TINY.split()
    if name == "affscl-ablate":
        words += STUDY.split()
    function = name.removeprefix("affscl-").replace("eval", "evaluate")
    start = f"import sys; sys.argv[0] = {name!r}; from affscl.training.launch import {function} as run; run()"
    return [sys.executable, "-c", start, *words]


@LONG
def test_what_the_howto_pages_say_can_be_done(tmp_path):
    world = load_dataset("market1501", make_dataset(tmp_path / "world", n_ids=40, n_cams=3, seed=5))
    for i, sample in enumerate(world.train):
        path = tmp_path / "my_crops" / ("gate", "lobby", "roof")[sample.camid - 1] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample.path, path)
    for name, sample in zip(("photo.jpg", "photo2.jpg"), world.query):
        shutil.copy(sample.path, tmp_path / name)
    for page in HOWTO:
        for kind, code in blocks(prose(page)):
            todo = [[sys.executable, "-c", code]] if kind == "python" else map(small, commands(f"```sh\n{code}```"))
            for words in todo:
                if "market1501" in words:
                    continue  # a dataset that nobody can carry here
                done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, (page.name, words, done.stdout, done.stderr)
    written = (
        "search.csv search.png answer.csv answer.png people features.npz compared.html runs/named/model.safetensors"
    )
    written += " runs/mine/report.html runs/mine/model.onnx runs/mine/clusters/largest.png results/ablation_table4.md"
    assert [name for name in written.split() if not (tmp_path / name).exists()] == []
