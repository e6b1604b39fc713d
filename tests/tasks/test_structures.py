import gzip
import math
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gemmi")
from tensorpeft.tasks.structures import TASKS, lddt_ca, load_structures
from tensorpeft.tasks.task import StructureTask

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data" / "protein_structures"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no structures in {DATA}; set TENSORPEFT_DATA to the folder that holds data/"
)
# Cα of the first model by chain. 2OFG has three models; its residues 1 to 5 are only in the second.
RESOLVED = {
    "1A7G:A": 82,
    "1A8O:A": 70,
    "1GBT:A": 223,
    "2OFG:A": 106,
    "3JQH:A": 23,
    "4CUP:A": 115,
    "4ZHL:A": 247,
    "4ZHL:B": 10,
}
CIF = """data_TEST
_entry.id TEST
loop_
_entity.id
_entity.type
1 polymer
2 non-polymer
_entity_poly.entity_id 1
_entity_poly.type 'polypeptide(L)'
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
1 1 GLY
1 2 MSE
1 3 SER
1 3 THR
1 4 XYZ
loop_
_struct_asym.id
_struct_asym.entity_id
K 1
L 2
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
"""
# Residue 2 has two conformations, the second more often; residue 3 is one of two amino acids, equally often; the first
# model has no residue 1.
ATOMS = """HETATM 1 N N A MSE K 1 2 1 0 0 0.4 1 101 X 1
HETATM 2 N N B MSE K 1 2 2 0 0 0.6 1 101 X 1
HETATM 3 C CA A MSE K 1 2 3 0 0 0.4 1 101 X 1
HETATM 4 C CA B MSE K 1 2 4 0 0 0.6 1 101 X 1
HETATM 5 C C . MSE K 1 2 5 0 0 1.0 1 101 X 1
ATOM 6 C CA A SER K 1 3 6 0 0 0.5 1 102 X 1
ATOM 7 C C A SER K 1 3 7 0 0 0.5 1 102 X 1
ATOM 8 C CA B THR K 1 3 8 0 0 0.5 1 102 X 1
ATOM 9 C C B THR K 1 3 9 0 0 0.5 1 102 X 1
HETATM 10 CA CA . CA L 2 . 50 0 0 1.0 1 201 X 1
ATOM 11 C CA . GLY K 1 1 60 0 0 1.0 1 100 X 2"""


def write(folder, name="test.cif"):
    path = folder / name
    path.write_text(CIF + ATOMS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def structures():
    return {structure.key: structure for structure in load_structures(DATA)}


def slow_lddt(predicted, true):
    """The published definition, pair by pair."""
    shares = num_pairs = 0
    for i in range(len(true)):
        for j in range(len(true)):
            if i == j or np.isnan(true[i]).any() or np.isnan(true[j]).any():
                continue
            distance = math.dist(true[i], true[j])
            if distance < 15:
                error = abs(math.dist(predicted[i], predicted[j]) - distance)
                num_pairs += 1
                shares += sum(error < cutoff for cutoff in (0.5, 1, 2, 4)) / 4
    return shares / num_pairs


def moved(positions, generator):
    """The positions, rotated at random and shifted."""
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    return positions @ (rotation * np.sign(np.linalg.det(rotation))) + generator.normal(size=3) * 20


@needs_data
def test_the_published_files(structures):
    assert {key: int(np.isfinite(s.positions[:, 1]).all(-1).sum()) for key, s in structures.items()} == RESOLVED
    for structure in structures.values():
        assert structure.positions.shape == (len(structure.sequence), 3, 3)
        assert structure.positions.dtype == np.float32
    # The file's own canonical sequence; residues 1, 36, 67 and 68 are selenomethionine.
    assert structures["1A8O:A"].sequence == "MDIRQGPKEPFRDYVDRFYKTLRAEQASQEVKNWMTETLLVQNANPDCKTILKALGPGATLEEMMTACQG"
    assert structures["4ZHL:B"].sequence == "CPAYSRYIGC"
    assert len(structures["3JQH:A"].sequence) == 167


@needs_data
def test_bonds_are_as_long_as_bonds_are(structures):
    for structure in structures.values():
        n, ca, c = np.moveaxis(structure.positions.astype(np.float64), 1, 0)
        for bond, length in ((n - ca, 1.46), (ca - c, 1.52), (c[:-1] - n[1:], 1.33)):
            lengths = np.linalg.norm(bond, axis=-1)
            assert np.nanmedian(lengths) == pytest.approx(length, abs=0.03)


def test_alternatives_unresolved_and_modified_residues(tmp_path):
    (structure,) = load_structures(write(tmp_path))
    assert structure.key == "TEST:K"
    assert structure.sequence == "GMSX"
    missing = np.nan
    x = [[missing] * 3, [2, 4, 5], [missing, 6, 7], [missing] * 3]
    np.testing.assert_array_equal(structure.positions[:, :, 0], x)
    assert (structure.positions[np.isfinite(structure.positions[:, :, 0]), 1:] == 0).all()


def test_a_folder_is_all_its_files_by_name(tmp_path):
    (tmp_path / "b.cif.gz").write_bytes(gzip.compress(write(tmp_path, name="a.cif").read_bytes()))
    (tmp_path / "SOURCE.md").write_text("not a structure")
    first, second = load_structures(tmp_path)
    np.testing.assert_array_equal(first.positions, second.positions)
    (task,) = TASKS
    assert isinstance(task, StructureTask)
    assert len(task.load(tmp_path)) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (CIF.split("\n")[0], "", "cannot be read as mmCIF"),
        ("_atom_site.", "_other.", "no atoms"),
        ("polypeptide(L)", "polyribonucleotide", "no protein chain"),
        ("_entity_poly_seq.", "_other.", r"TEST:K: .* residue MSE with label_seq_id 2, which the sequence of 0"),
        ("SER K 1 3", "ALA K 1 3", r"residue ALA with label_seq_id 3"),
        ("SER K 1 3 6 0", "SER K 1 3 six 0", r"TEST:K, residue 3, atom CA: no numbers"),
        (" CA ", " CB ", r"TEST:K: the first model has no Cα"),
        ("100 X 2", "100 X", "cannot be read as mmCIF"),
        ("data_TEST", "data_ONE\n_entry.id ONE\ndata_TEST", r"2 data blocks, expected one"),
    ],
)
def test_a_bad_file_is_named(tmp_path, old, new, message):
    path = write(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"test\.cif.*{message}"):
        load_structures(path)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08\x00nonsense", b"HEADER    A PDB FILE\n"])
@pytest.mark.parametrize("name", ["bad.cif", "bad.cif.gz"])
def test_what_is_no_mmcif_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_structures(tmp_path)


@pytest.mark.parametrize("name", ["", "missing.cif"])
def test_nothing_to_load_says_what_is_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"\.cif or \.cif\.gz"):
        load_structures(tmp_path / name)


@needs_data
@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_lddt_is_the_published_definition(structures, noise):
    generator = np.random.default_rng(7)
    for structure in structures.values():
        true = structure.positions[:, 1].astype(np.float64)
        if len(true) > 150 and noise != 0.3:
            continue  # the direct double loop is slow
        predicted = true + generator.normal(size=true.shape) * noise
        score = slow_lddt(predicted, true)
        assert lddt_ca(predicted, true) == pytest.approx(score, abs=1e-12)
        assert score == 1 if noise == 0 else 0.3 < score < 1
        assert lddt_ca(moved(predicted, generator), moved(true, generator)) == pytest.approx(score, abs=1e-9)


def test_three_points_by_hand():
    true = np.array([[0.0, 0, 0], [10, 0, 0], [20, 0, 0]])  # distances 10, 10, and 20: outside of the radius
    predicted = np.array([[0.0, 0, 0], [10.7, 0, 0], [23.7, 0, 0]])  # 10.7: within 1, 2 and 4; 13: within 4
    assert lddt_ca(predicted, true) == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert lddt_ca(predicted, true, inclusion_radius=21) == pytest.approx((3 / 4 + 1 / 4 + 1 / 4) / 3)
    assert lddt_ca(predicted, true, cutoffs=(1.0,)) == pytest.approx(1 / 2)
    assert lddt_ca(predicted, true, mask=np.array([True, True, False])) == pytest.approx(3 / 4)


def test_pairs_weigh_the_same_and_not_residues():
    # Four residues within reach of each other, and one within reach of the last of them only, whose pair is lost.
    true = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [17.5, 0, 0]])
    predicted = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [90, 0, 0]])
    assert lddt_ca(predicted, true) == pytest.approx(6 / 7)  # the mean over residues is 3.75 / 5


def test_what_is_unresolved_is_left_out_and_what_is_not_predicted_is_wrong():
    line = np.arange(4.0)[:, None] * [3, 0, 0]
    gap = line.copy()
    gap[1] = np.nan
    assert lddt_ca(line, gap) == 1
    assert lddt_ca(gap, line) == pytest.approx(3 / 6)  # the three pairs of residue 1 are not there
    assert lddt_ca(np.full_like(line, np.inf), line) == 0


def test_a_random_cloud_is_near_zero():
    generator = np.random.default_rng(0)
    true = generator.uniform(size=(100, 3)) * 8  # all within 14 Å of each other
    # A pair scores only if within 18 Å in the prediction: at most 4/3 π 18³ / 1000³ = 2.5e-5 of a cube of 1000 Å.
    assert lddt_ca(generator.uniform(size=(100, 3)) * 1000, true) < 1e-3


def test_a_mirror_image_scores_one():
    true = np.random.default_rng(1).normal(size=(30, 3)) * 8
    assert lddt_ca(true * [-1, 1, 1], true) == 1


@pytest.mark.parametrize(
    ("predicted", "true", "mask", "message"),
    [
        (np.zeros((3, 3)), np.zeros((4, 3)), None, r"\(3, 3\), true positions \(4, 3\)"),
        (np.zeros((4, 3, 3)), np.zeros((4, 3, 3)), None, r"one position of each residue"),
        (np.zeros((4, 2)), np.zeros((4, 2)), None, r"expected \(residues, 3\)"),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.ones(3, dtype=bool), r"a mask \(3,\)"),
        (np.zeros((4, 3)), np.zeros((4, 3)), np.array([1, 0, 0, 0]), r"1 of 4 residues count"),
        (np.zeros((2, 3)), np.array([[0, 0, 0], [np.nan] * 3]), None, r"1 of 2 residues count"),
        (np.zeros((2, 3)), np.array([[0, 0, 0], [20, 0, 0]]), None, r"within 15\.0 Å"),
    ],
)
def test_what_cannot_be_scored_is_refused(predicted, true, mask, message):
    with pytest.raises(ValueError, match=message):
        lddt_ca(predicted, true, mask)
