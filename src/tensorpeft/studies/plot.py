"""The figure of a study."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from tensorpeft.studies.results import Study

# One marker per method: curves that lie on each other, or print in grey, can still be told apart.
_MARKERS = "osD^vPX*"


def plot_curves(study: Study, path: Path) -> None:
    """Write a PNG of the validation loss along training: a line at the seeds' mean, a band from least to greatest."""
    # A Figure of its own, without pyplot: no global state and no choice of a window system.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, result in enumerate(study.results):
        steps = [step for step, _ in result.final[0].curve]
        losses = list(zip(*([loss for _, loss in run.curve] for run in result.final), strict=True))
        (line,) = axes.plot(
            steps,
            [statistics.fmean(at_step) for at_step in losses],
            marker=_MARKERS[index % len(_MARKERS)],
            label=f"{result.method.name}, learning rate {result.rate:g}",
        )
        lowest, highest = [min(at_step) for at_step in losses], [max(at_step) for at_step in losses]
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    seeds = "1 seed" if study.num_seeds == 1 else f"mean and range of {study.num_seeds} seeds"
    axes.set_title(f"{study.task.name}: validation loss while fine-tuning MiniLM-L6 ({seeds})")
    axes.set_xlabel(f"training step (each of {study.recipe.batch_size} rows)")
    axes.set_ylabel("validation loss (nats per row)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
