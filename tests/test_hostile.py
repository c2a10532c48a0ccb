"""What nobody should type, and files that nobody should write: each try is refused by name, or handled."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from affscl import AFF
from affscl.data.datasets import Sample
from affscl.model.weights import read_text
from affscl.studies.sweeps import COLUMNS, check_record, read_results
from affscl.training.cli import parse_train
from affscl.training.config import Config, read_config, value_types
from affscl.training.loading import size_problems
from affscl.training.runs import read_history
from affscl.use.gallery import Gallery

LONG = bool(os.environ.get("AFFSCL_LONG"))
COMMAND = "import sys; from affscl.training.launch import start; start(sys.argv[1], sys.argv[2:])"

# Words after affscl-train, and what the message must name.
WORDS = """
marketing | marketing
quick small | small
--nonsense 3 | --nonsense
--epoch 3 | --epochs
--epochs | --epochs
--epochs x | --epochs
--epochs 1.5 | --epochs
--epochs 0 | epochs
--epochs -3 | epochs
--epochs= | --epochs
--epochs 99999999999999999999999 | epochs
--lr 0 | lr
--lr -1 | lr
--lr nan | lr
--lr inf | lr
--lr 1e38 | lr
--lr 1e400 | lr
--lr many | --lr
--k 0 | k=0
--p 0 | p=0
--p 1 --k 1 | BatchNorm
--k 100000000 | k=100000000
--p 100000000 | p=100000000
--p 1000000 --k 1000000 | p=1000000
--iterations 100000000000 | iterations
--height 20000 | height
--width 1000000 | width
--height 0 | height
--height -5 | height
--height 5 --width 5 | pad
--world-cams 1000000 | world_cams
--world-ids 100000000 | world_ids
--world-ids 0 | world_ids
--world-ids -1 | world_ids
--world-cams 1 | world_cams
--world-seed -1 | world_seed
--world-look -1 | world_look
--workers -1 | workers
--workers 1000000 | workers
--k1 0 | k1
--k1 outo | --k1
--k1 5 --k2 6 | k2
--k2 0 | k2
--eps 0 | eps
--eps 1 | eps
--eps nan | eps
--min-samples 0 | min_samples
--search magic | search
--camera-links 2 | camera_links
--links-from 0 | links_from
--flip 2 | flip
--erase nan | erase
--pad -1 | pad
--device gpu | device
--precision int8 | precision
--labels guess | labels
--criterion guess | criterion
--balance maybe | balance
--momentum 2 | momentum
--temperature 0 | temperature
--temperature nan | temperature
--hard-weight -1 | hard_weight
--hard-reference soft | hard_reference
--hard-start late | hard_start
--negatives none | negatives
--margin nan | margin
--centre-weight 1 | centre_weight
--centre-rate 9 | centre_rate
--warmup -1 | warmup
--milestones 4 2 | milestones
--milestones 0 | milestones
--milestones 1 x | --milestones
--backbone vgg | backbone
--layout new | layout
--pooling max | pooling
--reduction 0 | reduction
--fusion add | fusion
--parts all | parts
--last-stride 3 | stride
--bn-chunk 0 | bn_chunk
--mirror=yes | --mirror
--mirror yes | --mirror
--no-epochs | --no-epochs
--dataset market | market
--dataset synthetic --pattern x | pattern
--source market | source
--source-data x | source_data
--source-look 3 | source_look
--adapt both --source synthetic | adapt
--source synthetic --labels truth | truth
--source synthetic --p 5 | p=5
--seed -1 | seed
--weight-decay -1 | weight_decay
--weight-decay nan | weight_decay
--extract-batch 0 | extract_batch
--eval-every 0 | eval_every
--lr-step 0 | lr_step
--resume | --resume
--resume= | --resume
--resume /no/such/run | /no/such/run
--config= | --config
--config /no/such/file | /no/such/file
--config a --resume b | --resume
tiny --resume b | tiny
tiny --config b | tiny
--out | --out
--out= | --out
"""
TRIES = [[part.strip() for part in line.split("|")] for line in WORDS.strip().splitlines()]


@pytest.mark.parametrize("words, named", TRIES, ids=[words for words, _ in TRIES])
def test_words(words, named):
    with pytest.raises((ValueError, OSError)) as error:
        config, _, _ = parse_train(words.split())
        if problems := size_problems(config, memory=16e9, disk=50e9):
            raise ValueError("\n".join(problems))
    assert named in str(error.value)


@pytest.mark.skipif(not LONG, reason="a process for each try; AFFSCL_LONG=1 pytest tests/test_hostile.py")
@pytest.mark.parametrize("words, named", TRIES, ids=[words for words, _ in TRIES])
def test_words_in_processes(words, named, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "affscl-train", *words.split()],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# Values of every setting that only some other type could have.
VALUES = [None, True, "no", "3", 3, 2.5, [], [1, "2"], {}, {"a": 1}, float("nan"), 10**30, -(10**400), "a\0b", b"x"]


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_values_of_any_type(name):
    refused = 0
    for value in VALUES:
        try:
            Config(**{name: value})
        except ValueError as error:
            assert name in str(error)
            refused += 1
    assert refused >= 8, value_types()[name]


# Texts of config.json.
FILES = [
    *("", " ", "null", "[]", "[1]", "3", '"text"', "true", "{", "}", "{]", '{"eps"}', '{"eps":}', "{'eps': 0.5}"),
    *('{"eps": 0.5,}', '{"eps": 0.5} x', '{"eps": NaN}', '{"eps": Infinity}', '{"eps": 1e999}', '{"eps": "0.5"}'),
    *('{"eps": null}', '{"eps": [0.5]}', '{"eps": {}}', '{"mirror": "no"}', '{"mirror": 0}', '{"epochs": 2.5}'),
    *('{"epochs": true}', '{"epochs": 1e3}', f'{{"seed": {10**30}}}', f'{{"seed": {"9" * 5000}}}', '{"nothing": 1}'),
    *('{"epz": 0.5}', '{"": 1}', '{"eps": 0.5, "eps": 0.6}', '{"milestones": "40"}', '{"milestones": [[1]]}'),
    *('{"dataset": 5}', '{"dataset": ""}', '{"data": 7}', '{"cache": ["x"]}', '{"recipe": null}', '{"k2": 50}'),
    *("[" * 100_000, '{"a":' * 100_000, '{"eps": ' + "[" * 50_000, b"\xff\xfe{}", b"\x00" * 100, b"{\xe9}"),
    *(json.dumps({"eps": 0.5}).encode("utf-16"), '{"pattern": "x"}', '{"lr": -1}'),
]


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_files_of_settings(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config.json") as error:
        read_config(path)
    assert len(str(error.value)) < 2000


def test_files_that_are_fine(tmp_path):
    path = tmp_path / "config.json"
    for text in ('{"eps": 0.5}', '\ufeff{"eps": 0.5}', ' {"eps":\n0.5}\n'):
        path.write_text(text, encoding="utf-8")
        assert read_config(path) == Config(eps=0.5)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
often = settings(
    max_examples=1000 if LONG else 60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@often
@given(values=st.dictionaries(st.sampled_from(sorted(value_types())) | st.text(max_size=6), anything, max_size=4))
def test_any_table_is_read_or_refused(values, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    try:
        config = read_config(path)
    except ValueError as error:
        assert "config.json" in str(error)
    else:
        assert all(getattr(config, name) == (tuple(v) if isinstance(v, list) else v) for name, v in values.items())


@often
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    try:
        assert read_config(path) == Config()
    except ValueError as error:
        assert "config.json" in str(error)


HEAD = ",".join(COLUMNS)
LINE = {"setting": "a", "seed": 1, "mAP": 0.5, "rank1": 0.5, "best_mAP": 0.5, "best_epoch": 2, "clusters": 9}
LINE |= {"seconds": 3.0}


def line(**changes):
    return ",".join(str((LINE | changes).get(name, "")) for name in COLUMNS)


STUDIES = [
    *("", "\n", "a,b\n1,2\n", "setting,seed\na,1\n", HEAD + ",more\n", HEAD + "\nx\n", f"{HEAD}\n{line()},9\n"),
    *(f"{HEAD}\n{line(seed='one')}\n", f"{HEAD}\n{line(seed='')}\n", f"{HEAD}\n{line(mAP='')}\n"),
    *(f"{HEAD}\n{line(mAP=50)}\n", f"{HEAD}\n{line(mAP='nan')}\n", f"{HEAD}\n{line(mAP='inf')}\n"),
    *(f"{HEAD}\n{line(rank1=-1)}\n", f"{HEAD}\n{line(seconds='long')}\n", f"{HEAD}\n{line(seconds=-1)}\n"),
    *(f"{HEAD}\n{line()}\n{line()}\n", f"{HEAD}\n{line(setting='')}\n", f"{HEAD}\n{line(clusters=1.5)}\n"),
    *(f'{HEAD}\n"{line()}\n', b"\xff\xfe", HEAD.encode() + b"\n\xe9\n", f"{HEAD}\n{line(seconds='')}\n"),
]


@pytest.mark.parametrize("text", STUDIES, ids=range(len(STUDIES)))
def test_edited_results_of_a_study(text, tmp_path):
    path = tmp_path / "ablation_x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="ablation_x.csv"):
        read_results(path)


def test_whole_results_of_a_study(tmp_path):
    path = tmp_path / "ablation_x.csv"
    path.write_text(f"{HEAD}\n{line()}\n{line(seed=2)}\n")
    assert [run["seed"] for run in read_results(path)] == [1, 2]


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", '{"a": NaN}', "[" * 100_000, '{"eps": "low"}', b"\xff"])
def test_edited_settings_of_a_study(text, tmp_path):
    path = tmp_path / "ablation_x.csv"
    path.write_text("x")
    (tmp_path / "ablation_x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="ablation_x"):
        check_record(path, {"eps": 0.5})


# Texts of metrics.jsonl, the second line broken.
HISTORIES = [
    *("{", "[]", "3", "null", '"x"', "{}", '{"epoch": "1"}', '{"epoch": 1.5}', '{"epoch": true}', '{"epoch": NaN}'),
    *('{"epoch": 1, "loss": Infinity}', '{"epoch": 1, "epoch": 2}', "[" * 50_000, '{"epoch": 1} {"epoch": 2}'),
    *(b"\xff\xfe", b"\xe9", "\x00", '{"epoch": 1,'),
]


@pytest.mark.parametrize("text", HISTORIES, ids=range(len(HISTORIES)))
def test_edited_histories(text, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"epoch": 0}\n' + (text if isinstance(text, bytes) else text.encode()) + b'\n{"epoch": 2}\n'
    )
    with pytest.raises(ValueError, match="metrics.jsonl") as error:
        read_history(tmp_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [read_history, read_text], ids=["history", "text"])
def test_what_is_no_file(read, tmp_path):
    path = tmp_path / "metrics.jsonl"
    for make in (lambda: None, path.mkdir, lambda: (path.rmdir(), os.mkfifo(path))):
        make()
        with pytest.raises(FileNotFoundError, match="metrics.jsonl"):  # a named pipe would be waited for
            read(tmp_path if read is read_history else path)


# What a gallery's files may have become: name of the file -> its new content from the old.
GALLERIES = {
    "a list": ("gallery.json", lambda old: "[]"),
    "cut": ("gallery.json", lambda old: old[: len(old) // 2]),
    "no index": ("gallery.json", lambda old: json.dumps(json.loads(old) | {"index": None})),
    "a number": ("gallery.json", lambda old: json.dumps(json.loads(old) | {"fingerprint": 3})),
    "sizes": ("gallery.json", lambda old: json.dumps(json.loads(old) | {"bytes": [1, 2]})),
    "another folder": ("gallery.json", lambda old: json.dumps(json.loads(old) | {"table": "../table.csv"})),
    "the root": ("gallery.json", lambda old: json.dumps(json.loads(old) | {"table": "/etc/hostname"})),
    "columns": ("table", lambda old: old.replace("path", "PATH")),
    "a size": ("table", lambda old: re.sub(r"[0-9]\n", "x\n", old, count=1)),
    "a field less": ("table", lambda old: re.sub(r",0\n", "#0\n", old, count=1)),
    "a quote": ("table", lambda old: old[:-2] + '"\n'),
    "the index": ("index", lambda old: "x" * len(old)),
}


@pytest.mark.parametrize("how", GALLERIES)
def test_edited_galleries(how, tmp_path):
    torch.manual_seed(0)
    model = AFF(backbone="resnet10", height=32, width=16)
    made = Gallery(model)
    made.add(
        [Sample(f"/crops/{i}.jpg", None, 1) for i in range(9)],
        features=torch.nn.functional.normalize(torch.randn(9, model.dim)),
    )
    made.save(tmp_path)
    name, change = GALLERIES[how]
    (path,) = [path for path in tmp_path.iterdir() if path.name.startswith(name)]
    path.write_text(change(path.read_text(encoding="latin-1")), encoding="latin-1")
    if name != "gallery.json":  # by somebody who keeps its size in step
        told = json.loads((tmp_path / "gallery.json").read_text())
        told["bytes"][path.name] = path.stat().st_size
        (tmp_path / "gallery.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=str(tmp_path)):
        Gallery.load(tmp_path, model)


def test_there_are_enough_tries():
    single = len(fields(Config)) * len(VALUES)
    assert len(TRIES) + len(FILES) + len(STUDIES) + len(HISTORIES) + len(GALLERIES) >= 200 and single >= 500
