"""What a run says: the line of an epoch, lengths of time, the table at the end, the clock."""

import time

import pytest

from affscl.training.progress import Clock, duration, epoch_line, percent, results_table

ROW = {
    "epoch": 2,
    "loss": 1.5,
    "clusters": 38,
    "outlier_share": 0.125,
    "multi_camera_share": 0.9,
    "ari": 0.7,
    "mAP": 0.4567,
    "rank1": 0.5,
    "seconds": {"train": 60.0, "evaluate": 5.0},
}


def test_the_line_of_an_epoch():
    line = epoch_line([{}, {}, ROW], 10)
    for word in ("epoch  2/10", "loss 1.500", "38 clusters (90.0 % with several cameras)", "outliers 12.5 %"):
        assert word in line
    for word in ("ARI 0.70", "mAP 45.7", "Rank-1 50.0", "65 s, about 9 min left"):
        assert word in line


def test_what_is_unknown_is_left_out_or_a_dash():
    line = epoch_line([ROW | {"multi_camera_share": None, "ari": None, "mAP": None, "rank1": None}], 10)
    assert "cameras" not in line and "ARI" not in line and "mAP -  Rank-1 -" in line
    assert percent({}, "mAP") == "-"


@pytest.mark.parametrize(
    "seconds, said", [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24.0 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_results_table_names_the_flattering_row():
    rows = [
        {"epoch": n, "mAP": mAP, "rank1": mAP, "rank5": mAP, "rank10": mAP} for n, mAP in enumerate((0.1, 0.5, 0.4))
    ]
    table = results_table(rows).splitlines()
    assert table[1].split() == ["start"] + ["10.0"] * 4
    assert table[2].startswith("best, epoch 1") and table[2].split()[-4:] == ["50.0"] * 4
    assert table[3].startswith("last, epoch 2") and table[3].split()[-4:] == ["40.0"] * 4


def test_results_table_without_scores():
    assert "No evaluation" in results_table([{"epoch": 0}])


def test_laps_of_the_clock_add_up():
    start = time.perf_counter()
    clock = Clock()
    time.sleep(0.01)
    clock.lap("first")
    time.sleep(0.03)
    clock.lap("second")
    assert sum(clock.laps.values()) == pytest.approx(time.perf_counter() - start, abs=0.005)
    assert list(clock.laps) == ["first", "second"] and clock.laps["second"] >= 0.029
