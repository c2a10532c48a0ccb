"""Seeds, devices, Ctrl-C, and two processes that agree with one."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from affscl.data.synthetic import make_dataset
from affscl.training.config import RECIPES
from affscl.training.loop import train
from affscl.training.processes import device_name, from_main, make_accelerator, seed_epoch, stop_when_asked
from affscl.training.runs import read_history

TINY = replace(RECIPES["tiny"], device="cpu")


def launch(script, port):
    """Run a script in two processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(script),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
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
import os
from affscl import Config
from affscl.training.processes import from_main, make_accelerator
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
    done = launch(script, 29512)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / name).read_text() for name in "01"] == ["nobody waits"] * 2


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


def test_two_processes_agree_with_one(tmp_path):
    # BatchNorm sees half a batch in each of two processes, which one process imitates with bn_chunk.
    world = make_dataset(tmp_path / "market", n_ids=24, n_cams=3, seed=5)
    config = replace(TINY, dataset="market1501", data=str(world), iterations=2, epochs=1, p=4, k=4, k1=10, eps=0.7)
    one = train(replace(config, bn_chunk=config.p * config.k // 2), tmp_path / "one").history[1]
    script = tmp_path / "main.py"
    script.write_text(
        f"from affscl import Config, train\ntrain(Config(**{asdict(config)!r}), {str(tmp_path / 'two')!r})\n"
    )
    done = launch(script, 29511)
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_history(tmp_path / "two")[1]
    assert two["clusters"] == one["clusters"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
