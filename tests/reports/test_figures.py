"""Figures are written whole, in one style, with labels as they are."""

import statistics

import pytest

pytest.importorskip("matplotlib")
from tensorpeft.reports.figures import legend_above, make_figure, name_layers, plot_band, save_figure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("label", [r"$\frac{", "[/bold] a|b \x1b[31m", "100 $ and 200 $"])
def test_a_label_is_no_formula(label, tmp_path):
    figure, (axes,) = make_figure(3, 2)
    axes.plot([0, 1], label=label)
    axes.set_title(label)
    axes.legend()
    legend_above(figure, label)
    save_figure(figure, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[:8] == PNG
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_band_goes_from_the_least_to_the_greatest_around_the_centre():
    _, (axes,) = make_figure(3, 2)
    plot_band(axes, [10, 20], [[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], label="a")
    plot_band(axes, [10, 20], [[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], statistics.median, marker="s")
    mean, median = axes.lines
    assert list(mean.get_ydata()) == [3.0, 5.0]
    assert list(median.get_ydata()) == [2.0, 5.0]
    assert median.get_marker() == "s"
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(10.0, 1.0), (10.0, 6.0), (20.0, 5.0)}


def test_axes_stand_in_rows_and_the_lowest_names_the_layers():
    figure, axes = make_figure(6, 4, count=5, columns=3)
    assert figure.axes == axes
    assert [(ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start) for ax in axes] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1),
    ]  # fmt: skip
    name_layers(axes, ["a", "b"])
    for ax in axes:
        texts = [label.get_text() for label in ax.get_xticklabels()]
        assert texts == (["a", "b"] if ax is axes[-1] else ["", ""])
