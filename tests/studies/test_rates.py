import math

import pytest

from tensorpeft.studies.rates import RateWindow, rate_window, rates_beyond


def test_the_grid_goes_on_beyond_its_edge_only():
    assert rates_beyond([0.1, 0.01, 0.03], best=0.03) == []
    assert rates_beyond([0.01, 0.03, 0.1], best=0.01) == [0.003]
    assert rates_beyond([0.01, 0.03, 0.1], best=0.1) == [0.3]
    assert rates_beyond([0.0002, 0.0004, 0.0008], best=0.0008) == pytest.approx([0.0016])


def test_a_window_ends_where_the_line_between_two_rates_crosses_its_limit():
    window = rate_window([(1e-4, 1.3), (1e-3, 1.0), (1e-2, 1.01), (1e-1, 1.06)], within=0.02)
    assert window.low == pytest.approx(10 ** (-3 - 1 / 15))
    assert window.high == pytest.approx(10 ** (-2 + 1 / 5))
    assert not window.low_is_open
    assert not window.high_is_open
    assert window.factor == pytest.approx(10 ** (1 + 1 / 15 + 1 / 5))


def test_a_window_is_open_at_an_edge_and_ends_beside_a_run_that_failed():
    assert rate_window([(1e-3, 1.0), (1e-2, 1.01)]) == RateWindow(1e-3, 1e-2, True, True)
    assert rate_window([(1e-3, math.inf), (1e-2, 1.01)]) == RateWindow(1e-2, 1e-2, False, True)
    assert rate_window([(1e-3, 1.0), (1e-2, 2.0), (1e-1, 1.0)]).high < 1e-2  # what lies beyond the wall is another one
    assert rate_window([(1e-3, math.inf)]) is None
    assert rate_window([]) is None
