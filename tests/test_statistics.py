"""Seeds, spreads and paired differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended import results_of
from scipy.stats import ttest_rel

from affscl.studies.statistics import compare, mean_sd, seed_values


class TestComparison:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
    def test_is_the_paired_t_interval(self, pairs):
        a, b = zip(*pairs)
        if np.ptp(np.subtract(a, b)) < 1e-6:
            return
        low, high = ttest_rel(a, b).confidence_interval(0.95)
        found = compare(results_of(a=a, b=b), "a", "b")
        assert np.allclose(
            [found.mean - found.half_width, found.mean + found.half_width], [100 * low, 100 * high], atol=1e-6
        )
        assert found.verdict == ("holds" if low > 0 else "reversed" if high < 0 else "open")

    def test_by_hand(self):
        found = compare(results_of(a=[0.52, 0.53, 0.54], b=[0.50, 0.52, 0.51]), "a", "b")
        assert found.mean == pytest.approx(2) and found.wins == found.seeds == 3
        assert found.half_width == pytest.approx(4.3026527 / 3**0.5)
        assert found.verdict == "open" and "open (+2.0 ± 2.5 points, better with 3 of 3 seeds)" in str(found)

    def test_verdicts(self):
        results = results_of(a=[0.6, 0.61, 0.62], b=[0.5, 0.51, 0.521])
        assert (compare(results, "a", "b").verdict, compare(results, "b", "a").verdict) == ("holds", "reversed")

    def test_pairs_are_seeds_that_both_have(self):
        results = [
            {"setting": "a", "seed": 1, "mAP": 0.5},
            {"setting": "a", "seed": 2, "mAP": 0.9},
            {"setting": "b", "seed": 1, "mAP": 0.4},
        ]
        found = compare(results, "a", "b")
        assert (found.seeds, found.verdict) == (1, "open") and found.mean == pytest.approx(10)
        with pytest.raises(ValueError, match="share no seed"):
            compare(results[1:], "a", "b")

    def test_mean_and_deviation(self):
        assert mean_sd([0.5, 0.52, 0.54]) == "52.0 ± 2.0"
        assert (mean_sd([0.5]), mean_sd([])) == ("50.0", "-")

    def test_values_by_seed_leave_out_what_was_not_measured(self):
        results = [{"setting": "a", "seed": 2, "mAP": 0.5, "ari": None}, {"setting": "b", "seed": 1, "mAP": 0.4}]
        assert seed_values(results, "a", "mAP") == {2: 0.5} and seed_values(results, "a", "ari") == {}
