"""Options read from source: the same as the classes, help in groups, and every mistyped word told at once."""

import importlib
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import affscl
from affscl.training.launch import COMMANDS
from affscl.training.options import Option, help_text, read_options, read_recipes, value_problem, word_problems

TRAIN = COMMANDS["affscl-train"]


def is_there(command):
    """Whether the command's chapter has been written."""
    path = Path(affscl.__file__).parent.joinpath(*command.module.split(".")[1:]).with_suffix(".py")
    return path.exists() and f"def {command.function}(" in path.read_text()


THERE = [name for name, command in COMMANDS.items() if is_there(command)]


@pytest.mark.parametrize("name", THERE)
def test_the_source_says_what_the_class_says(name):
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    assert callable(getattr(module, command.function))
    read = {option.name: option for option in read_options(command.module, command.arguments)}
    real = {field.name: field for field in fields(getattr(module, command.arguments))}
    hidden = real.keys() - read.keys()
    assert read.keys() <= real.keys() and hidden <= {"recipe", "seed"}
    for key, option in read.items():
        assert option.about, f"{key} has no comment"
        default = real[key].default
        if isinstance(default, (int, float, str, tuple, type(None))):
            assert option.default == default and not option.required
        elif default is MISSING:
            assert option.required
    assert help_text(name, command, []).startswith(f"usage: {name} ")


def test_recipes_are_read_with_their_values():
    from affscl.training.config import RECIPES, Config

    assert {name: Config(**changes) for name, changes in read_recipes().items()} == RECIPES


def test_help_has_the_recipes_own_defaults_and_the_common_options_first():
    text = help_text("affscl-train", TRAIN, ["best"], 100)
    assert "(default: 0.5)" in text.split("--eps")[1].split("--")[0]
    assert text.index("--dataset") < text.index("--k1") < text.index("--hard-weight")
    assert max(map(len, text.splitlines())) <= 100
    narrow = help_text("affscl-train", TRAIN, ["best"], 60)
    assert " ".join(narrow.split()).count("(default:") == " ".join(text.split()).count("(default:")


@pytest.mark.parametrize(
    "words, told",
    [
        ("--epoch 3", ["no option --epoch; did you mean --epochs?"]),
        ("tinny", ["no recipe is called 'tinny'; did you mean tiny?"]),
        ("tiny small", ["nothing here takes the word 'small'"]),
        ("--k1 ten --lr x", ["--k1 takes a whole number", "--lr takes a number"]),
        ("--epochs", ["--epochs needs a value"]),
        ("--epochs --k1 3", ["--epochs needs a value"]),
        ("--epochs 1.5", ["--epochs takes a whole number, and '1.5' is none"]),
        ("--mirror=no", ["--mirror is a switch"]),
        ("--milestones 1 x", ["--milestones takes a whole number, and 'x'"]),
        ("--no-epochs", ["there is no option --no-epochs"]),
        ("--bn-chunk few", ["--bn-chunk takes a whole number or none"]),
    ],
)
def test_each_mistype_is_told(words, told):
    problems = word_problems(TRAIN, words.split())
    assert len(problems) == len(told)
    for problem, part in zip(problems, told):
        assert part in problem


@pytest.mark.parametrize(
    "words",
    ["", "tiny", "--bn-chunk none", "--lr 1e-4", "--world_ids 30", "--seed -1", "--no-mirror --data=x", "--quiet"],
)
def test_what_is_right_passes(words):
    assert word_problems(TRAIN, words.split()) == []


def test_a_type_that_takes_words_takes_all():
    either = Option("k1", "int | str", 30, "", "", False, False)
    assert value_problem(either, "auto") is None and value_problem(either._replace(kind="int"), "auto")


@pytest.mark.parametrize("words", [["--help"], ["small", "--epoch", "3"]])
def test_help_and_mistypes_load_nothing_heavy(words):
    code = (
        "import sys\nfrom affscl.training.launch import start\n"
        f"try: start('affscl-train', {words})\n"
        "except SystemExit as stop: print(stop.code)\n"
        "print([name for name in ('torch', 'numpy', 'tyro') if name in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # measured: 0.4 s
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "name, words, told",
    [
        ("affscl-eval", "", ["RUN is missing"]),
        ("affscl-eval", "a b", ["nothing here takes the word 'b'"]),
        ("affscl-search", "a", ["PHOTOS is missing"]),
        ("affscl-search", "a b c d --k 3", []),
        ("affscl-report", "a b c", []),
        ("affscl-report", "", ["RUNS is missing"]),
        ("affscl-export", "a", ["WHAT is missing"]),
        ("affscl-export", "a pickle", ["WHAT takes onnx|torch|features, and 'pickle' is none"]),
        ("affscl-export", "a torch", []),
        ("affscl-bench", "", []),
        ("affscl-bench", "labels step", []),
    ],
)
def test_words_without_an_option(name, words, told):
    problems = word_problems(COMMANDS[name], words.split())
    assert len(problems) == len(told) and all(part in problem for problem, part in zip(problems, told))
