"""Protein chains read from mmCIF files, and LDDT-Cα, which scores a predicted structure against the true one.

Reading needs the package gemmi.

Source of the score: Mariani, Biasini, Barbato and Schwede, "lDDT: a local superposition-free score for comparing
protein structures and models using distance difference tests", Bioinformatics 29(21), 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tensorpeft.tasks.task import Structure, StructureTask

_ATOMS = ("N", "CA", "C")
_ENDINGS = (".cif", ".cif.gz")


def load_structures(
    path: str | Path,  # an mmCIF file, or a folder of .cif and .cif.gz files
) -> list[Structure]:
    """The protein chains of the first model of every file: files by name, chains in their file's order.

    A chain is an instance of a polymer of L-amino acids, named as `_atom_site.label_asym_id`; other polymers, ligands
    and water are no chains. No chain is too short. The sequence is the polymer's (`_entity_poly_seq`), so that it has
    the residues that the experiment did not resolve, with NaN as positions. A modified residue has the letter of the
    amino acid that it comes from (MSE is M) where gemmi knows it, else X. Where a residue has alternate locations,
    the one whose Cα has the highest occupancy counts, of several the first.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder has no such file.
        ImportError: gemmi is not installed.
        ValueError: a file is no mmCIF, has no atoms or no chain, or a chain has no Cα, or contradicts its sequence.
    """
    if find_spec("gemmi") is None:
        raise ImportError('protein structures are read by gemmi. Run: pip install "gemmi>=0.7"')
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.name.endswith(_ENDINGS))
    if not files:
        raise FileNotFoundError(
            f"no file {path}, nor a folder with files that end in {' or '.join(_ENDINGS)}. "
            "Pass a structure from the Protein Data Bank in the format PDBx/mmCIF, or a folder of them."
        )
    return [structure for file in files for structure in _read_file(file)]


TASKS = (
    StructureTask(
        name="folding",
        description="Protein folding: the backbone of a chain from its sequence, scored by LDDT-Cα",
        load=load_structures,
    ),
)


def _read_file(path: Path) -> list[Structure]:
    import gemmi

    try:
        blocks = gemmi.cif.read(str(path))
        entry = gemmi.make_structure_from_block(blocks[0]) if len(blocks) == 1 else None
    except (OSError, RuntimeError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as mmCIF ({error}). Fetch the file again.") from None
    if entry is None:
        raise ValueError(f"{path}: {len(blocks)} data blocks, expected one. Put each entry into its own file.")
    if len(entry) == 0:
        raise ValueError(f"{path}: no atoms in it (_atom_site). Expected a structure, not its sequence or a ligand.")
    residues: dict[str, list[Any]] = {}
    for residue in (residue for chain in entry[0] for residue in chain):
        residues.setdefault(residue.subchain, []).append(residue)
    chains = [
        _read_chain(entity.full_sequence, residues.get(name, []), f"{entry.name}:{name}", path)
        for entity in entry.entities
        if entity.polymer_type == gemmi.PolymerType.PeptideL
        for name in entity.subchains
    ]
    if not chains:
        raise ValueError(f"{path}: no protein chain, which is an entity of the type 'polypeptide(L)' in _entity_poly.")
    return chains


def _read_chain(
    names: Sequence[str],  # of the polymer's residues; "SER,THR" where it is one or the other
    residues: Sequence[Any],  # gemmi's, those with atoms; several of one number where they are alternatives
    key: str,
    path: Path,
) -> Structure:
    places: dict[int, list[Any]] = {}
    for residue in residues:
        number = residue.label_seq or 0
        if not 0 < number <= len(names) or residue.name not in names[number - 1].split(","):
            raise ValueError(
                f"{path}, {key}: the atoms have a residue {residue.name} with label_seq_id {residue.label_seq}, which "
                f"the sequence of {len(names)} residues (_entity_poly_seq) does not have. Fetch the file again."
            )
        places.setdefault(number, []).append(residue)
    positions = np.full((len(names), len(_ATOMS), 3), np.nan, dtype=np.float32)
    for number, alternatives in places.items():
        for k, atom in enumerate(_backbone(alternatives)):
            if atom is not None:
                positions[number - 1, k] = atom.pos.tolist()
                if not np.isfinite(positions[number - 1, k]).all():
                    raise ValueError(f"{path}, {key}, residue {number}, atom {atom.name}: no numbers as coordinates.")
    if np.isnan(positions[:, 1]).all():
        raise ValueError(f"{path}, {key}: the first model has no Cα of this chain. Take the file out.")
    return Structure("".join(_letter(name.split(",")[0]) for name in names), positions, key)


def _backbone(
    residues: Sequence[Any],  # the alternatives at one place of the chain
) -> list[Any]:  # gemmi's atoms N, CA and C; None: not resolved
    """The atoms of the conformation whose Cα has the highest occupancy; an atom without that one: its own highest."""
    atoms = [[atom for residue in residues for atom in residue if atom.name == name] for name in _ATOMS]
    chosen = max(atoms[1], key=lambda atom: atom.occ).altloc if atoms[1] else None
    return [max(found, key=lambda atom: (atom.altloc == chosen, atom.occ), default=None) for found in atoms]


def _letter(name: str) -> str:
    import gemmi

    letter = gemmi.find_tabulated_residue(name).one_letter_code.upper()
    return letter if letter.isalpha() else "X"


def lddt_ca(
    predicted: np.ndarray,  # (residues, 3) Å, of the Cα
    true: np.ndarray,  # (residues, 3) Å; NaN: not resolved, left out
    mask: np.ndarray | None = None,  # (residues,) bool: which residues count; None: all that are resolved
    cutoffs: Sequence[float] = (0.5, 1.0, 2.0, 4.0),  # Å
    inclusion_radius: float = 15.0,  # Å
) -> float:
    """The share of local Cα distances that the prediction preserves, from 0 to 1. No superposition is needed.

    Of all pairs of residues closer than `inclusion_radius` in the true structure, the share whose distance in the
    prediction differs by less than a cutoff; the mean of that over the cutoffs. Every *pair* weighs the same, as
    published, and as in AlphaFold's `lddt` without `per_residue`.

    A residue that the prediction lacks (NaN) preserves nothing. Mirror images score 1: distances have no handedness.

    Raises:
        ValueError: wrong shapes, fewer than 2 residues that count, or none of their pairs within the radius.

    >>> lddt_ca(np.array([[0.0, 0, 0], [3, 0, 0]]), np.array([[0.0, 0, 0], [4.5, 0, 0]]))
    0.5
    """
    # biotite.structure.lddt computes in float32 and with ≤, so that a pair at a cutoff may fall on its other side (a
    # score off by up to 1.9e-4 in 2 of 3,360 noised chains), for 137 MB installed and 0.7 s of import: not worth it.
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    counts = np.ones(len(true), dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if true.ndim != 2 or true.shape[1] != 3 or predicted.shape != true.shape or counts.shape != true.shape[:1]:
        raise ValueError(
            f"LDDT: got predicted positions {predicted.shape}, true positions {true.shape} and a mask {counts.shape}; "
            "expected (residues, 3) twice, one position of each residue's Cα, and (residues,)."
        )
    counts = counts & np.isfinite(true).all(axis=1)
    if counts.sum() < 2:
        raise ValueError(f"LDDT: {counts.sum()} of {len(true)} residues count (mask, resolved), expected at least 2.")
    if not len(cutoffs):
        raise ValueError("LDDT: no cutoffs, expected at least one in Å, such as (0.5, 1.0, 2.0, 4.0).")
    true_distances = _distances(true)
    included = counts[:, None] & counts[None, :] & (true_distances < inclusion_radius)
    np.fill_diagonal(included, False)
    if not included.any():
        raise ValueError(
            f"LDDT: no two of the residues that count are within {inclusion_radius} Å of each other in the true "
            "structure, so that there is no distance to preserve. Pass a larger inclusion_radius."
        )
    errors = np.abs(_distances(predicted)[included] - true_distances[included])
    return float(np.mean([errors < cutoff for cutoff in cutoffs]))


def _distances(
    positions: np.ndarray,  # (residues, 3)
) -> np.ndarray:  # (residues, residues)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.linalg.norm(positions[:, None] - positions[None, :], axis=-1)
