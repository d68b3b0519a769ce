"""No input from outside makes the work grow with its square: eight times the length, far from 64 times the time."""

import pytest

from tests.benchmarks.long_inputs import CASES, seconds


@pytest.mark.parametrize("name", CASES)
def test_eight_times_the_length_takes_about_eight_times_the_time(name):
    case = CASES[name]
    short = max(0.001, seconds(case, case.start, 3))
    # 8 is expected, 64 would be the square; the room between is for caches and a busy machine.
    assert seconds(case, 8 * case.start, 2) < 24 * short
