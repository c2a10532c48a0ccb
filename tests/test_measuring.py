"""The benchmark's own arithmetic: ratios, turns, waiting, peaks of memory."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from affscl.studies.measuring import Measurement, Peak, Timed, alternate, machine, waiting


class TestMeasuring:
    def test_ratio_of_a_ceiling_and_of_a_floor(self):
        assert Measurement("a", 3, limit=4).ratio == 0.75 and Measurement("a", 5, limit=4).ratio == 1.25
        assert (
            Measurement("a", 8, limit=4, floor=True).ratio == 0.5
            and Measurement("a", 2, limit=4, floor=True).ratio == 2
        )
        assert Measurement("a", 0, limit=4, floor=True).ratio == math.inf and Measurement("a", 3).ratio is None

    def test_functions_take_turns(self):
        calls = []
        laps = alternate([lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.002))], 3)
        assert calls == ["a", "b"] * 4 and laps.shape == (3, 2) and (laps[:, 1] >= 0.002).all()

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
    def test_peak_counts_what_was_given_back(self):
        with Peak() as peak:
            held = np.ones(200_000_000, np.uint8)
            time.sleep(0.5)
            del held
        assert 190 < peak.mb < 230

    def test_waiting(self):
        def loader():
            for _ in range(4):
                time.sleep(0.02)
                yield None

        assert waiting(loader(), lambda: None) > 0.9
        assert 0.2 < waiting(loader(), lambda: time.sleep(0.02)) < 0.8
        assert waiting(range(4), lambda: time.sleep(0.02)) < 0.1

    def test_timed_keeps_seconds_and_the_last_result(self):
        work = Timed(lambda seconds, value: time.sleep(seconds) or value)
        assert (work(0.02, "a"), work(0, "b")) == ("a", "b")
        assert len(work.seconds) == 2 and work.seconds[0] >= 0.02 and work.result == "b"

    def test_timed_keeps_no_call_that_failed(self):
        work = Timed(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            work()
        assert work.seconds == [] and work.result is None

    def test_machine(self):
        about = machine()
        assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads() and about["cpu"]
