"""What surrounds a command: errors become messages, output ends no run, --debug and --quiet work everywhere."""

import io
import logging
import os
import subprocess
import sys
import time
import types
import warnings
from collections import namedtuple

import numpy as np
import psutil
import pytest

from affscl.training import launch
from affscl.training.launch import Lasting, guarded


def code(command, words=(), capsys=None):
    with pytest.raises(SystemExit) as stop:
        guarded(command, list(words))
    return stop.value.code


def raising(error):
    def command(words):
        raise error

    return command


@pytest.mark.parametrize(
    "error, status, told",
    [
        (ValueError("no such thing"), 2, "error: no such thing\n"),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "x.csv"),
        (ModuleNotFoundError("No module named 'faiss'", name="faiss"), 2, "pip install faiss"),
        (KeyError("fc"), 1, "KeyError in test_launch.py"),
        (RuntimeError("shapes\n  differ"), 1, "shapes differ"),
        (RecursionError(), 1, "no reason given"),
        (MemoryError(), 1, "out of memory"),
        (ValueError(), 1, "ValueError in"),
        (OSError(), 1, "OSError in"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "0xff"),
    ],
)
def test_every_error_is_one_message(error, status, told, capsys):
    assert code(raising(error)) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and "Traceback" not in said


def test_ctrl_c_is_130(capsys):
    assert code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(KeyError):
        guarded(raising(KeyError("x")), ["--debug"])
    monkeypatch.setenv("AFFSCL_DEBUG", "1")
    with pytest.raises(ValueError):
        guarded(raising(ValueError("x")), [])


def test_a_guard_within_a_guard_leaves_the_error_to_the_outer_one():
    with pytest.raises(KeyError):
        guarded(lambda words: guarded(raising(KeyError("x")), words), ["--debug"])


def test_the_words_of_all_commands_are_taken_out():
    seen = []
    guarded(seen.append, ["--quiet", "a", "--debug"])
    assert seen == [["a"]]


def test_quiet_lets_warnings_through(capsys):
    levels = []

    def command(words):
        levels.append(logging.getLogger("affscl").level)
        warnings.warn("careful", stacklevel=1)

    before = logging.getLogger("affscl").level
    guarded(command, ["--quiet"])
    guarded(command, [])
    assert levels[0] > logging.INFO >= levels[1] and logging.getLogger("affscl").level == before
    assert capsys.readouterr().err.count("warning: careful") == 2


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8", "latin-1"])
def test_no_console_is_too_old(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    guarded(lambda words: print("a → b ± λ \ud800"), [])
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding).startswith("a ")


def test_a_stream_that_fails_is_dropped():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    stream = Lasting(Full())
    assert stream.write("four") == 4 and stream.lost.errno == 28


def program(text, **more):
    return subprocess.run([sys.executable, "-c", text], text=True, capture_output=True, timeout=60, **more)


WORK = (
    "from affscl.training.launch import guarded\n"
    "def work(words):\n"
    "    for i in range(30_000): print('line', i)\n"
    "    open({!r}, 'w').write('done')\n"
    "guarded(work, [])\n"
)


@pytest.mark.skipif(os.name == "nt", reason="a shell with pipes")
def test_a_closed_pipe_does_not_stop_the_work(tmp_path):
    done = subprocess.run(
        [
            "bash",
            "-c",
            'set -o pipefail; "$0" -c "$1" 2>&1 | head -1',
            sys.executable,
            WORK.format(str(tmp_path / "f")),
        ],
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert (tmp_path / "f").read_text() == "done"
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_under_the_output_is_told_after_the_work(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", WORK.format(str(tmp_path / "f"))], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (tmp_path / "f").read_text() == "done"
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_no_output_at_all_is_fine():
    text = "import sys\nsys.stdout = sys.stderr = None\nfrom affscl.training.launch import guarded\n"
    assert program(text + "guarded(lambda words: print('x'), [])").returncode == 0


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logical, physical, busy, threads",
    [
        (2, 2, 1, 1),
        (2, 2, 2, 1),  # one thread at least
        (2, 2, 0, None),  # a quiet machine
        (8, 8, 3, 5),
        (16, 8, 1, 7),  # two processors share a core
        (16, None, 1, 15),  # nobody knows how many cores there are
        (1, 1, 1, None),
    ],
)
def test_busy_processors_are_left_alone(monkeypatch, logical, physical, busy, threads):
    monkeypatch.setattr(launch, "own_processors", lambda: list(range(logical)))
    monkeypatch.setattr(launch, "busy_processors", lambda processors: busy)
    monkeypatch.setattr(launch.psutil, "cpu_count", lambda logical: physical)
    environ = {"MALLOC_ARENA_MAX": "2"}  # the memory of these tests stays as it is
    told = launch.set_policies(environ)
    assert environ.get("OMP_NUM_THREADS") == (str(threads) if threads else None)
    most = min(logical, physical or logical)
    assert (told == "") if threads is None else f"with {threads} of {most} threads (OMP_NUM_THREADS={most}" in told


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_that_is_set_stays(monkeypatch, name):
    monkeypatch.setattr(launch, "busy_processors", lambda processors: 1 / 0)
    environ = {name: "2", "MALLOC_ARENA_MAX": "2"}
    assert launch.set_policies(environ) == "" and environ[name] == "2"


def test_who_spins_is_seen():
    own = launch.own_processors()
    before = launch.spent_by_programs(own)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in own]
    try:
        time.sleep(0.5)
        theirs = sum(psutil.Process(process.pid).cpu_times().user for process in spinning)
        spent = launch.spent_by_programs(own) - before
        assert theirs > 0.1 and spent > theirs - 0.02 * len(own)  # clocks tick a hundred times a second
        assert sum(launch.spent_by_programs([i]) for i in own) == pytest.approx(launch.spent_by_programs(own), abs=1)
    finally:
        for process in spinning:
            process.kill()
            process.wait()


Times = namedtuple("Times", "user nice system idle")


@pytest.mark.parametrize(
    "shares, taken, looks",
    [
        ([[(0, 0, 0.03), (0.09, 0, 0.02)]], 0, 1),
        ([[(0, 0, 0.99), (0.02, 0, 0.9)]], 0, 1),  # the system writes what was installed
        ([[(0.99, 0, 0.01), (0.05, 0, 0)], [(0.08, 0, 0.01), (0, 0, 0.02)]], 0, 2),  # it passed
        ([[(0.99, 0, 0.01), (0.05, 0, 0)], [(0.6, 0, 0.01), (0.37, 0, 0.02)]], 1, 2),  # it moves about
        ([[(0.01, 0.98, 0.01), (0.97, 0, 0.03)], [(0, 0.99, 0.01), (0.95, 0, 0.05)]], 2, 2),
    ],
)
def test_only_programs_that_stay_are_neighbours(monkeypatch, shares, taken, looks):
    spent, slept, coming = np.full((2, 4), 100.0), [], iter(shares)

    def sleep(seconds):
        slept.append(seconds)
        for clock, share in zip(spent, next(coming)):
            clock += seconds * np.array([*share, 1 - sum(share)])

    monkeypatch.setattr(launch.time, "sleep", sleep)
    monkeypatch.setattr(launch.psutil, "cpu_times", lambda percpu: [Times(*clock) for clock in spent])
    assert launch.busy_processors([0, 1]) == taken and slept == list(launch.LOOKS[:looks])


def test_a_command_says_that_it_takes_fewer_threads(monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "own_processors", lambda: [0, 1])
    monkeypatch.setattr(launch, "busy_processors", lambda processors: 1)
    monkeypatch.setattr(launch.psutil, "cpu_count", lambda logical: 2)
    stand_in = types.ModuleType("affscl.training.cli")
    stand_in.train_command = lambda words: seen.append(os.environ["OMP_NUM_THREADS"])
    monkeypatch.setitem(sys.modules, "affscl.training.cli", stand_in)
    launch.start("affscl-train", ["tiny"])
    said = capsys.readouterr()
    assert seen == ["1"] and said.out == "" and said.err.startswith("note: others keep 1 of 2 processors busy")
    monkeypatch.setattr(launch, "busy_processors", lambda processors: 0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    stand_in.train_command = lambda words: seen.append(os.environ.get("OMP_NUM_THREADS"))
    launch.start("affscl-train", ["tiny"])
    assert seen[1] is None and capsys.readouterr().err == ""
