import pytest

from tensorpeft.studies.rates import rates_beyond


def test_the_grid_goes_on_beyond_its_edge_only():
    assert rates_beyond([0.1, 0.01, 0.03], best=0.03) == []
    assert rates_beyond([0.01, 0.03, 0.1], best=0.01) == [0.003]
    assert rates_beyond([0.01, 0.03, 0.1], best=0.1) == [0.3]
    assert rates_beyond([0.0002, 0.0004, 0.0008], best=0.0008) == pytest.approx([0.0016])
