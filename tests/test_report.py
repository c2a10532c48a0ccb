"""A report stands alone, says what differs, and comes whatever is missing, with the reason in its place."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from affscl.data.datasets import Sample
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.use.report import read_run, reason, report_command, unlike_queries, write_report

SMALL = dict(world_ids=12, world_cams=3, k1=8, iterations=1, p=4, epochs=1, device="cpu", eps=0.7)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("report")
    return train(replace(RECIPES["tiny"], cache=str(folder / "cache"), **SMALL), folder / "first").run


@pytest.fixture
def run(first, tmp_path):
    """A copy to damage."""
    return shutil.copytree(first, tmp_path / "run")


class Page(HTMLParser):
    """Tags with their attributes, and whether each is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def sources(self):
        return [v for _, attrs in self.tags for k, v in attrs.items() if k in ("src", "href")]


def missing(text):
    return re.findall(r'<p class="missing">(.*?)</p>', text, re.S)


def test_a_page_stands_alone_and_lacks_nothing(run, tmp_path):
    text = write_report([run], tmp_path / "page.html").read_text()
    page = Page(text)
    assert not page.open and not missing(text)
    assert all(source.startswith("data:") for source in page.sources())
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(attrs["alt"] for attrs in pictures)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{100 * last['mAP']:.1f}" in text and "Best queries" in text and "Worst queries" in text


def test_several_runs_show_what_differs(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 77}))
    text = write_report([run, other], tmp_path / "page.html", pictures=False).read_text()
    assert re.search(r"<td>seed</td>\s*<td>1</td>\s*<td>77</td>", text.replace("\n", ""))
    assert "run: start" in text and "other: start" in text


def test_published_scores_stand_beside_runs_on_their_dataset_only(run, tmp_path):
    assert "HHCL" not in write_report([run], tmp_path / "page.html", pictures=False).read_text()
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset": "market1501", "data": "data"}))
    text = write_report([run], tmp_path / "page.html", pictures=False).read_text()
    assert "HHCL" in text and "84.2" in text and "73.3" not in text


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", b"half", "model.safetensors"),
        ("config.json", b"[1, 2", "settings"),
        ("config.json", None, "settings"),
        ("metrics.jsonl", b'{"epoch": ', "metrics"),
        ("metrics.jsonl", None, "metrics"),
    ],
)
def test_damage_is_named_in_its_place(run, tmp_path, name, content, told):
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    pictures = name != "metrics.jsonl"  # metrics are no part of them
    text = write_report([run], tmp_path / "page.html", pictures).read_text()
    assert any(told in note for note in missing(text)) and not Page(text).open


def test_data_that_is_gone(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"dataset": "market1501", "data": str(tmp_path / "gone")}))
    text = write_report([run], tmp_path / "page.html").read_text()
    assert any("gone" in note for note in missing(text)) and "mAP" in text


def test_names_are_text_not_html(run, tmp_path):
    odd = shutil.copytree(run, tmp_path / "a<b>&c")
    assert "a&lt;b&gt;&amp;c" in write_report([odd], tmp_path / "page.html", pictures=False).read_text()


def test_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="looked for config.json and metrics.jsonl"):
        read_run(tmp_path)
    with pytest.raises(SystemExit) as stop:
        report_command([str(tmp_path)])
    assert stop.value.code == 2 and "is no run" in capsys.readouterr().err


def test_the_command_says_where_the_page_is(run, capsys):
    report_command([str(run), "--no-pictures"])
    assert str(run / "report.html") in capsys.readouterr().out and (run / "report.html").is_file()


@pytest.mark.parametrize(
    "found, told",
    [
        ([Sample("a", 1, 2)], "all of the first 1 are right"),
        ([Sample("a", 1, 2), Sample("b", 4, 1)], "same camera: place 2"),
        ([Sample("b", 4, 3)], "look-alike: place 1.*camera 3"),
        ([Sample("b", 4, None)], "place 1 .*cameras are unknown"),
    ],
)
def test_reasons(found, told):
    assert re.match(told, reason(Sample("q", 1, 1), found))
    if "place" in told:
        assert reason(Sample("q", 1, 1), found, unlike=True).startswith("hard to see")


def test_unlike_queries_against_a_loop():
    rng = torch.Generator().manual_seed(3)
    pids, camids = (torch.randint(high, (60,), generator=rng).tolist() for high in (9, 3))
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=rng), dim=1)
    crops = [Sample(str(i), pid, camid) for i, (pid, camid) in enumerate(zip(pids, camids))]
    query, gallery = crops[:30], crops[30:] + [Sample("distractor", None, 2)]
    features = rows[:30], torch.cat([rows[30:], rows[:1]])
    nearest = {
        i: max(float(features[0][i] @ features[1][j]) for j in right)
        for i, q in enumerate(query)
        if (right := [j for j, g in enumerate(gallery) if g.pid == q.pid and g.camid != q.camid])
    }
    limit = sorted(nearest.values())[round(0.2 * (len(nearest) - 1))]
    told = unlike_queries(features, (query, gallery), 0.2)
    assert all(bool(told[i]) == (i in nearest and nearest[i] < limit) for i in range(30) if nearest.get(i) != limit)
    assert 0 < told.sum() < 9 and not unlike_queries(features, (query, [gallery[-1]])).any()


def test_a_run_without_labels_tells_what_its_clusters_say(run, tmp_path):
    signs = {"silhouette": 0.31, "clusters": 9, "outlier_share": 0.1, "largest_share": 0.2}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if "mAP" not in k and "rank" not in k} | signs for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report([run], tmp_path / "page.html", pictures=False).read_text()
    assert "has no scores" in text and "silhouette 0.31" in text and "flatters" not in text
    assert "percent</th>" not in text  # no table without a line
