"""The tables, JSON and figures of ``tensorpeft inspect MODEL``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tensorpeft import DotaConfig
from tensorpeft.loading.models import load_as_saved
from tensorpeft.reports.files import write_json, write_lines
from tensorpeft.reports.folders import sole_writer
from tensorpeft.reports.tables import Table, markdown_tables, model_title
from tensorpeft.reports.terminal import counting, print_table, say
from tensorpeft.studies.bonds import RANKS, WeightStudy, correlations, study_bonds, total_error
from tensorpeft.studies.bonds_plots import by_kind, plot_bonds, plot_errors, plot_spectra
from tensorpeft.studies.inspected_model import load_batch, short_name


def inspect_bonds(
    model: str,  # folder or Hub name
    config: DotaConfig,  # with a number for r
    output: Path,  # folder, made where it does not exist
    budget: int | None = None,  # parameters; None: those of the uniform bond
    weighted: bool = False,
    text: Path | None = None,  # with weighted: a text per line; None: docstrings of Python's standard library
) -> list[WeightStudy]:
    """The study of every weight, after printing its tables and writing bonds.json, bonds.md and three figures.

    Raises:
        BlockingIOError: another inspection writes to the output folder.
        ValueError: a text without weighted, no text, or what `study_bonds` raises.
    """
    if text is not None and not weighted:
        raise ValueError(f"--text {text}: only weights by activations need a text. Add --weighted, or leave it out.")
    with sole_writer(output):
        network = load_as_saved(model, dtype="float32")
        batch = load_batch(model, text) if weighted else None
        console = Console()
        with counting(console, "weights") as on_weight:
            studies = study_bonds(network, config, budget, batch, on_weight)
        write_json(output / "bonds.json", to_tree(studies, model, config, budget, weighted))
        write_lines(output / "bonds.md", [markdown_tables(tables(studies, config, weighted))])
        title = f"{model_title(model)}, {config.num_cores} cores"
        plot_spectra(studies, title, output / "spectra.png")
        plot_errors(studies, title, output / "errors.png")
        plot_bonds(studies, f"{title}, bond {config.r} and adaptive bonds", output / "bonds.png")
        for table in tables(studies, config, weighted):
            print_table(console, table)
            console.print()
        say(console, f"Tables, figures and raw results: {output}")
        return studies


def tables(studies: Sequence[WeightStudy], config: DotaConfig, weighted: bool) -> list[Table]:
    """All tables, in order."""
    return [_kinds(studies), _spectra(studies, config), _bonds(studies, config, weighted), _correlations(studies)]


def _kinds(studies: Sequence[WeightStudy]) -> Table:
    rows = [
        [
            kind,
            str(len(members)),
            _dotted(members[0].out_modes),
            _dotted(members[0].in_modes),
            f"{members[0].shape[0] * members[0].shape[1]:,}",
            f"{members[0].uniform.size:,}",
        ]
        for kind, members in by_kind(studies).items()
    ]
    headers = ["kind", "weights", "out modes", "in modes", "elements", "MPO"]
    return Table("Weights", headers, rows, ["MPO: parameters at the uniform bond."])


def _spectra(studies: Sequence[WeightStudy], config: DotaConfig) -> Table:
    headers = ["layer", "matrix", "unfoldings", *(f"R={rank}" for rank in RANKS), "cut", "kept", "SVD", "rank"]
    rows = [
        [
            short_name(study.name),
            f"{study.effective_ranks[0]:.0f}",
            _dotted([round(rank) for rank in study.effective_ranks[1:]]),
            *(f"{100 * study.errors[rank]:.1f}" for rank in RANKS),
            str(study.worst_cut),
            f"{100 * study.uniform.kept:.1f}",
            f"{100 * study.svd.kept:.1f}",
            str(study.svd.bonds[0]),
        ]
        for study in studies
    ]
    legend = [
        "matrix, unfoldings: effective rank, exp of the entropy of the normalised singular values (Roy & Vetterli).",
        "R=…: ‖W − MPO‖ / ‖W‖ × 100 with no bond above R. cut: the unfolding that loses most at the uniform bond "
        f"{config.r}.",
        f"kept: ‖MPO‖² / ‖W‖² × 100 at bond {config.r}. SVD, rank: the same of a matrix SVD with as many parameters.",
    ]
    return Table("Spectra and truncation errors", headers, rows, legend)


def _bonds(studies: Sequence[WeightStudy], config: DotaConfig, weighted: bool) -> Table:
    headers = ["layer", f"bond {config.r}", "size", "error", "adaptive", "size", "error", *(["weight"] * weighted)]
    rows = []
    for study in studies:
        row = [short_name(study.name)]
        for cut in (study.uniform, study.adaptive):
            row += [_dotted(cut.bonds), f"{cut.size:,}", f"{100 * cut.error:.1f}"]
        rows.append([*row, *([f"{study.factor:.3g}"] * weighted)])
    for name, is_weighted in (("total", False), ("total, weighted", True))[: 1 + weighted]:
        row = [name]
        for kind in ("uniform", "adaptive"):
            size = sum(getattr(study, kind).size for study in studies)
            row += ["", f"{size:,}", f"{100 * total_error(studies, kind, is_weighted):.1f}"]
        rows.append([*row, *([""] * weighted)])
    kept = [f"{100 * (1 - total_error(studies, kind, weighted) ** 2):.1f} %" for kind in ("uniform", "adaptive", "svd")]
    legend = [
        "size: parameters of the cores. error: ‖W − MPO‖ / ‖W‖ × 100; in total √(Σ ‖W − MPO‖² / Σ ‖W‖²) × 100.",
        f"Of the {'weighted ' * weighted}energy of all weights, uniform bonds keep {kept[0]}, adaptive ones {kept[1]}, "
        f"SVDs of the uniform size {kept[2]}.",
    ]
    if weighted:
        legend.append("weight: mean square of the layer's inputs on text, which its squared error counts times.")
    return Table("Uniform and adaptive bonds", headers, rows, legend)


def _correlations(studies: Sequence[WeightStudy]) -> Table:
    headers = ["weights", "", "effective rank", *(f"R={rank}" for rank in RANKS), "adaptive bond"]
    rows = [
        [
            found.group,
            str(found.count),
            f"of the {found.rank_of}",
            *(_signed(found.with_error[rank]) for rank in RANKS),
            _signed(found.with_bond),
        ]
        for found in correlations(studies)
    ]
    legend = [
        "Spearman's ρ over the weights between the effective rank and the truncation error at R, and between it and "
        "the adaptive bond of the middle cut, the one with the largest exact bond. –: one side is constant."
    ]
    return Table("Does the effective rank tell how much is lost?", headers, rows, legend)


def _dotted(numbers: Sequence[int]) -> str:
    return "·".join(map(str, numbers))


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def to_tree(
    studies: Sequence[WeightStudy], model: str, config: DotaConfig, budget: int | None, weighted: bool
) -> dict[str, Any]:
    """All figures; `bonds` as `DotaConfig(r="auto", bonds=…)` takes them."""
    kinds = ("uniform", "svd", "adaptive")
    return {
        "model": model,
        "r": config.r,
        "num_cores": config.num_cores,
        "budget": budget,
        "weighted": weighted,
        "size": {kind: sum(getattr(study, kind).size for study in studies) for kind in kinds},
        "error": {kind: total_error(studies, kind) for kind in kinds},
        **({"weighted_error": {kind: total_error(studies, kind, True) for kind in kinds}} if weighted else {}),
        "bonds": {study.name: list(study.adaptive.bonds) for study in studies},
        "correlations": [vars(found) for found in correlations(studies)],
        "layers": [
            {
                "name": study.name,
                "shape": study.shape,
                "out_modes": study.out_modes,
                "in_modes": study.in_modes,
                "energy": study.energy,
                "factor": study.factor,
                "effective_rank": study.effective_ranks[0],
                "unfoldings": [
                    {"exact_bond": len(energies), "effective_rank": rank}
                    for energies, rank in zip(study.energies[1:], study.effective_ranks[1:])
                ],
                "errors": study.errors,
                "worst_cut": study.worst_cut,
                **{kind: {**vars(getattr(study, kind)), "kept": getattr(study, kind).kept} for kind in kinds},
            }
            for study in studies
        ],
    }
