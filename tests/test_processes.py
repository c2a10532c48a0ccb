"""Seeds, devices, Ctrl-C, and two processes that agree with one."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import numpy as np
import psutil
import pytest
import torch
from long_forms import LONG

from affscl.data.synthetic import make_dataset
from affscl.model.network import load_model
from affscl.training import processes
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.training.processes import (
    choose_precision,
    device_name,
    from_main,
    make_accelerator,
    seed_epoch,
    step_seconds,
    stop_when_asked,
)
from affscl.training.runs import load_config, read_history

TINY = replace(RECIPES["tiny"], device="cpu")


def in_two_processes(script):
    """The command that runs a script in two processes, on a port that is free."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]


def launch(script):
    """Run a script in two processes."""
    return subprocess.run(
        in_two_processes(script),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


class TestSeedEpoch:
    def numbers(self, *which):
        rng = seed_epoch(*which)
        return [rng.random(), np.random.random(), torch.rand(1).item()]

    def test_depends_on_seed_and_epoch_alone(self):
        first = self.numbers(1, 1)
        torch.rand(7)
        assert self.numbers(1, 1) == first
        assert all(a != b for a, b in zip(first, self.numbers(1, 2)))
        assert all(a != b for a, b in zip(first, self.numbers(2, 1)))


class TestMakeAccelerator:
    def test_a_device_that_is_not_there(self):
        missing = "mps" if not torch.backends.mps.is_available() else "cuda"
        with pytest.raises(ValueError, match="--device auto"):
            make_accelerator(replace(TINY, device=missing))

    def test_fp16_needs_a_gpu(self):
        with pytest.raises(ValueError, match="use bf16 or no"):
            make_accelerator(replace(TINY, precision="fp16"))

    def test_one_precision_after_another(self):
        for precision in ("bf16", "no", "bf16"):
            assert make_accelerator(replace(TINY, precision=precision)).mixed_precision == precision

    def test_leaves_denormals_as_they_were(self):
        make_accelerator(TINY)
        assert (torch.tensor([1e-39]) * 1).item() != 0


def test_device_is_named():
    threads = torch.get_num_threads()
    assert device_name(torch.device("cpu")) == f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    assert device_name(torch.device("meta")) == "meta"


def test_from_main_in_one_process():
    accelerator = make_accelerator(TINY)
    assert from_main(accelerator, lambda: [1, 2]) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        from_main(accelerator, lambda: 1 / 0)


def test_from_main_in_two_processes(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        f"""
import atexit, os
import torch.distributed as dist
from affscl import Config
from affscl.training.processes import from_main, make_accelerator
left = {str(tmp_path)!r} + "/left" + os.environ["RANK"]
atexit.register(lambda: open(left, "w").write(str(not dist.is_initialized())))  # the last thing that is done
accelerator = make_accelerator(Config(**{asdict(TINY)!r}))
rank = accelerator.process_index
assert from_main(accelerator, lambda: os.getpid()) != os.getpid() or rank == 0
def fails():
    assert rank == 0
    raise ValueError("nobody waits")
try:
    from_main(accelerator, fails)
except ValueError as error:
    open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(error))
"""
    )
    done = launch(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / name).read_text() for name in "01"] == ["nobody waits"] * 2
    assert [(tmp_path / f"left{rank}").read_text() for rank in "01"] == ["True"] * 2


class TestStopWhenAsked:
    def test_once_waits_for_the_next_look(self):
        before = signal.getsignal(signal.SIGINT)
        with stop_when_asked() as check:
            check()
            signal.raise_signal(signal.SIGINT)  # nothing happens here
            with pytest.raises(KeyboardInterrupt):
                check()
        assert signal.getsignal(signal.SIGINT) is before

    def test_twice_interrupts_at_once(self):
        with pytest.raises(KeyboardInterrupt), stop_when_asked():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def test_in_another_thread_it_leaves_signals_alone(self):
        before, seen = signal.getsignal(signal.SIGINT), []

        def work():
            with stop_when_asked() as check:
                check()
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [before]


MEMORIES = dict(p=4, k=4, iterations=3, epochs=3, k1=10, eps=0.7, lr=1e-4)
SOURCE = dict(source="synthetic", world_ids=24, world_cams=3)
EXPERTS = dict(experts=("resnet18",), expert_weights=("none",))
LAYOUTS = {  # what changes, and how many crops BatchNorm sees together in each of two processes
    "best": (dict(camera_norm=True, mirror=True, camera_links=1.0, links_from=2, negatives="camera"), 8),
    "across cameras": (
        dict(camera_norm=True, camera_map=True, crossing=True, camera_links=1.0, link_colours="auto"),
        8,
    ),
    "clusters": ({}, 8),
    "hhcl": (dict(criterion="hhcl", hard_reference="hard"), 8),
    "cluster contrast": (dict(criterion="cluster_contrast"), 8),
    "supervised": (dict(labels="truth", criterion="cross_entropy_triplet", label_smoothing=0.1), 8),
    "joint": (
        SOURCE | dict(adapt="joint", criterion="spcl"),
        4,
    ),  # without domain_norm no chunk of one process holds both domains
    "pretrain": (dict(source="market1501", adapt="pretrain"), 8),
    **{name: (dict(criterion=name), 8) for name in ("dcc", "spcl", "dsce", "cap", "o2cap", "triplet")},
    **{name: (dict(criterion=name, clustering="single"), 8) for name in ("mmcl", "ssl", "ae")},
    "iics": (dict(criterion="iics", clustering="alternating"), 8),
    "ssg": (dict(criterion="ssg", network="ssg", fusion="multiply"), 8),
    "bottom up": (dict(criterion="cluster_contrast", clustering="bottom_up", merged=0.8), 8),
    "mean teacher": (dict(teacher="mean", teacher_momentum=0.5), 8),
    "mutual": (dict(criterion="cross_entropy_triplet", teacher="mutual", label_smoothing=0.1), 8),
    "brainstorming": (dict(criterion="cross_entropy_triplet", teacher="brainstorming") | EXPERTS, 8),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("across cameras", "joint") else LONG) for name in LAYOUTS]
)
def test_two_processes_agree_with_one(name, tmp_path):
    # BatchNorm sees half a batch in each of two processes, which one process imitates with bn_chunk.
    world = make_dataset(tmp_path / "market", n_ids=24, n_cams=3, seed=5)
    changes, chunk = LAYOUTS[name]
    source = str(make_dataset(tmp_path / "source", n_ids=20, n_cams=3, seed=6)) if name == "pretrain" else None
    config = replace(TINY, dataset="market1501", data=str(world), source_data=source, **MEMORIES, **changes)
    one = train(replace(config, bn_chunk=chunk), tmp_path / "one")
    script = tmp_path / "main.py"
    script.write_text(
        f"from affscl import Config, train\ntrain(Config(**{asdict(config)!r}), {str(tmp_path / 'two')!r})\n"
    )
    done = launch(script)
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_history(tmp_path / "two")
    for mine, theirs in zip(one.history[1:], two[1:], strict=True):
        assert mine["clusters"] == theirs["clusters"]
        later = 1e-3 if name == "iics" else 1e-4  # a classifier begins anew in each epoch: rounding grows faster
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if mine["epoch"] == 1 else later)
    states = one.model.state_dict(), load_model(tmp_path / "two").state_dict()
    for key, value in states[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, states[1][key], rtol=0, atol=5e-3 * float(value.abs().max()) + 1e-7)


def test_a_frozen_process_is_not_waited_for(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        f"""
import os, signal
import torch.distributed as dist
from affscl import Config
from affscl.training.processes import make_accelerator, watching_others
accelerator = make_accelerator(Config(**{asdict(TINY)!r}))
with watching_others(accelerator, patience=1.0):
    if accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
"""
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(in_two_processes(script), stderr=subprocess.PIPE, text=True, env=environment)
    said = ""
    try:
        for line in process.stderr:
            said += line
            if "has been stopped" in line:
                break
        assert "Process 1 of this run (pid " in said and "--resume" in said, said[-2000:]
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait(60)


class TestPrecision:
    """`auto`: bf16 where the hardware multiplies it itself and this network's step is faster; otherwise float32."""

    LITTLE = dict(epochs=1, iterations=1, world_ids=24, world_cams=3, p=3, k=2, height=32, width=16, pad=1)
    AUTO = replace(TINY, precision="auto", **LITTLE)

    @pytest.fixture
    def hardware(self, monkeypatch):
        """Pretend hardware: whether it is made for bf16, and the seconds of a step in float32 and in bf16."""

        def pretend(native, single=1.0, half=0.5):
            probed = []
            monkeypatch.setattr(processes, "multiplies_bf16", lambda device: native)
            monkeypatch.setattr(processes, "step_seconds", lambda *a: probed.append(a) or (single, half))
            return probed

        return pretend

    @pytest.mark.parametrize(
        "native, single, half, chosen, probes",
        [(True, 1, 0.5, "bf16", 1), (True, 1, 1.2, "no", 1), (True, 1, 0.99, "no", 1), (False, 1, 0.1, "no", 0)],
    )
    def test_both_questions_decide(self, hardware, native, single, half, chosen, probes):
        probed = hardware(native, single, half)
        precision, why = choose_precision(self.AUTO, torch.device("cpu"))
        assert precision == chosen and len(probed) == probes
        assert ("bf16," if chosen == "bf16" else "float32,") in why

    @pytest.mark.parametrize("set_by_user", ["no", "bf16", "fp16"])
    def test_a_choice_of_the_user_stays(self, hardware, set_by_user):
        probed = hardware(True)
        assert choose_precision(replace(self.AUTO, precision=set_by_user), torch.device("cpu")) == (set_by_user, "")
        assert not probed

    def test_the_probe_times_both_and_draws_nothing_from_the_run(self):
        before = torch.random.get_rng_state()
        seconds = step_seconds(self.AUTO, torch.device("cpu"), budget=0)
        assert min(seconds) > 0 and torch.equal(before, torch.random.get_rng_state())

    def test_a_run_says_keeps_and_goes_on_with_its_choice(self, hardware, tmp_path, capsys, monkeypatch):
        hardware(True, 1, 0.5)
        types = []
        monkeypatch.setattr(torch.nn.Conv2d, "forward", spying(types, torch.nn.Conv2d.forward))
        train(self.AUTO, tmp_path / "run")
        assert "precision auto: bf16" in capsys.readouterr().out
        assert read_history(tmp_path / "run")[0]["precision"] == "bf16" and set(types) == {torch.bfloat16}
        assert load_config(tmp_path / "run").precision == "auto"  # what was asked for
        probed = hardware(False)  # the run was moved to another machine
        types.clear()
        train(replace(self.AUTO, epochs=2), resume=tmp_path / "run")
        assert not probed and set(types) == {torch.bfloat16}

    def test_where_bf16_is_imitated_auto_is_float32_to_the_bit(self, hardware, tmp_path):
        hardware(False)
        runs = [
            train(replace(self.AUTO, precision=kind), tmp_path / kind).model.state_dict() for kind in ("auto", "no")
        ]
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def spying(types, forward):
    """A convolution that notes the type of what it gives while training."""

    def convolution(self, x):
        y = forward(self, x)
        if self.training:
            types.append(y.dtype)
        return y

    return convolution
