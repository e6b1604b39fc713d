import pytest

from tensorpeft.evaluation import EvaluationOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "greedy"),
        ("mode", ""),
        ("batch_size", 0),
        ("batch_size", None),
        ("batch_size", True),
        ("batch_size", 2.0),
        ("max_new_tokens", 0),
        ("num_beams", -1),
        ("max_length", "512"),
        ("beta", 0),
        ("beta", float("nan")),
        ("beta", None),
        ("chat", 1),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected"):
        EvaluationOptions(**{name: value})


def test_good_values():
    options = EvaluationOptions("likelihood", batch_size=1, max_new_tokens=1, num_beams=4, max_length=1, beta=1)
    assert options.mode == "likelihood"
    assert EvaluationOptions().max_length is None
