import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from scipy.spatial.transform import Rotation
from transformers import EsmConfig, EsmModel, EsmTokenizer, Trainer, TrainingArguments
from transformers.models.esm.openfold_utils.rigid_utils import Rigid

from tensorpeft import LortaConfig
from tensorpeft.models.folding import (
    VOCABULARY,
    FoldingModel,
    OuterProduct,
    build_folding_model,
    collate_structures,
    distogram_loss,
    folding_loss,
    frame_aligned_point_error,
)
from tensorpeft.tasks.structures import lddt_ca, load_structures
from tensorpeft.tasks.task import Structure

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[3] / "shared")) / "data" / "protein_structures"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no structures in {DATA}; set TENSORPEFT_DATA to the folder that holds data/"
)
# The 33 tokens of ESM-2 as published.
PUBLISHED = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
TRUNK = {
    "sequence_state_dim": 32,
    "pairwise_state_dim": 16,
    "sequence_head_width": 8,
    "pairwise_head_width": 8,
    "structure_module": {
        "sequence_dim": 32,
        "pairwise_dim": 16,
        "ipa_dim": 8,
        "resnet_dim": 16,
        "num_heads_ipa": 2,
        "num_blocks": 3,
        "dropout_rate": 0.0,
    },
}
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


def esm_config():
    return EsmConfig(
        vocab_size=33,
        pad_token_id=1,
        mask_token_id=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def build(num_recycles=0, awake=False):
    """A tiny model; awake: what starts at zero does not."""
    torch.manual_seed(3)
    model = build_folding_model(esm_config(), num_blocks=1, num_recycles=num_recycles, trunk=TRUNK)
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def adapt(model):
    return get_peft_model(model, LortaConfig(r=4, target_modules=["query", "key", "value"], modules_to_save=["head"]))


def helix(sequence="MKTAYIAKQRQISFVK", key="helix"):
    """An ideal alpha helix: 100 degrees and 1.5 Å per residue."""
    atoms = np.array([[1.55, math.radians(-27.5), -0.88], [2.29, 0, 0], [1.68, math.radians(26.8), 1.2]])
    radius, angle, height = np.moveaxis(atoms[None] + np.arange(len(sequence))[:, None, None] * [0, 1.745, 1.5], -1, 0)
    return Structure(sequence, np.stack([radius * np.cos(angle), radius * np.sin(angle), height], -1), key)


def random_positions(generator, num_residues):
    """Atoms N, Cα and C at places where no protein has them, of residues that are some Å apart."""
    return generator.normal(size=(num_residues, 1, 3)) * 6 + generator.normal(size=(num_residues, 3, 3))


def quaternions(rotation):
    """Real part first, as transformers has it; scipy has it last."""
    return np.roll(rotation.as_quat(), 1, axis=-1)


def published_frames(positions):
    """AlphaFold's algorithm 21 by the letter: (rotations, origins) of residues with N, Cα and C."""
    rotations = []
    for n, ca, c in positions:
        e1 = (c - ca) / np.linalg.norm(c - ca)
        u2 = (n - ca) - e1 * np.dot(e1, n - ca)
        e2 = u2 / np.linalg.norm(u2)
        rotations.append(np.stack([e1, e2, np.cross(e1, e2)], axis=1))
    return np.array(rotations), positions[:, 1]


def published_fape(predicted, true, clamp=10.0, scale=10.0, epsilon=1e-4):
    """AlphaFold's algorithm 28 by the letter, with the origins of the frames as the points."""
    (rotations, points), (true_rotations, true_points) = predicted, true
    errors = []
    for i in range(len(points)):
        for j in range(len(points)):
            x = rotations[i].T @ (points[j] - points[i])
            x_true = true_rotations[i].T @ (true_points[j] - true_points[i])
            errors.append(min(clamp, math.sqrt(((x - x_true) ** 2).sum() + epsilon)))
    return np.mean(errors) / scale


def test_a_batch_is_what_esms_tokenizer_makes(tmp_path):
    (tmp_path / "vocab.txt").write_text(PUBLISHED.replace(" ", "\n"))
    tokenizer = EsmTokenizer(str(tmp_path / "vocab.txt"))
    assert list(VOCABULARY) == PUBLISHED.split(" ")
    structures = [helix("MKXUACDEFGHIKLMNPQRSTVWY"), helix("GAV")]
    expected = tokenizer([structure.sequence for structure in structures], padding=True, return_tensors="pt")
    for token_ids in (None, tokenizer.get_vocab()):
        batch = collate_structures(structures, token_ids)
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        assert batch["attention_mask"].tolist() == expected["attention_mask"].tolist()
        assert batch["positions"].shape == (2, 24, 3, 3)
        np.testing.assert_allclose(batch["positions"][1, :3], structures[1].positions, rtol=1e-6)
        assert batch["positions"][1, 3:].isnan().all()


@pytest.mark.parametrize(
    ("structures", "message"),
    [
        ([], "no structures"),
        ([Structure("", np.zeros((0, 3, 3)), "1ABC:A")], r"'1ABC:A': got a sequence of 0 letters"),
        ([Structure("M*", np.zeros((2, 3, 3)), "1ABC:A")], r"'1ABC:A': .* without a token \['\*'\]"),
        ([Structure("MK", np.zeros((3, 3, 3)), "1ABC:A")], r"positions \(3, 3, 3\); expected .* \(2, 3, 3\)"),
    ],
)
def test_a_structure_that_fits_no_batch_is_named(structures, message):
    with pytest.raises(ValueError, match=message):
        collate_structures(structures)


def test_fape_of_two_points_by_hand():
    def apart(distance):
        frames = torch.tensor([1.0, 0, 0, 0, 0, 0, 0]).repeat(1, 2, 1)
        frames[0, 1, 4] = distance
        return Rigid.from_tensor_7(frames)

    mask = torch.ones(1, 2, dtype=torch.bool)
    # Of four pairs, the two of different residues are wrong, by 3 Å and, clamped, by 10 Å.
    for distance, expected in ((6, (0 + 3 + 3 + 0) / 4 / 10), (99, (0 + 10 + 10 + 0) / 4 / 10)):
        found = frame_aligned_point_error(apart(distance), apart(3), mask, epsilon=0.0)
        assert found.tolist() == pytest.approx([expected])


def test_the_loss_is_the_published_one():
    generator = np.random.default_rng(5)
    positions = random_positions(generator, 12)
    resolved = np.arange(12) % 4 != 1
    seen = positions.copy()
    seen[1], seen[5, 2], seen[9, 0] = np.nan, np.nan, np.nan
    steps = [
        (Rotation.random(12, rng=generator), positions[:, 1] + generator.normal(size=(12, 3)) * 4) for _ in range(3)
    ]
    frames = np.array([np.concatenate([quaternions(rotation), origins], axis=-1) for rotation, origins in steps])
    logits = generator.normal(size=(12, 12, 64))

    true = tuple(part[resolved] for part in published_frames(positions))
    fape = [published_fape((rotation.as_matrix()[resolved], origins[resolved]), true) for rotation, origins in steps]
    entropies = []
    for i in np.flatnonzero(resolved):
        for j in np.flatnonzero(resolved):
            # 64 bins: 62 of 0.3125 Å from 2.3125 Å, one below them and one above.
            bin_ = min(max(math.ceil((math.dist(positions[i, 1], positions[j, 1]) - 2.3125) / 0.3125), 0), 63)
            entropies.append(np.log(np.exp(logits[i, j]).sum()) - logits[i, j, bin_])
    expected = 0.5 * fape[-1] + 0.5 * np.mean(fape) + 0.3 * np.mean(entropies)

    arguments = [torch.tensor(a, dtype=torch.float32) for a in (frames[:, None], logits[None], seen[None])]
    assert folding_loss(*arguments).item() == pytest.approx(expected, rel=1e-5)
    # A second structure of which nothing is resolved adds a zero.
    twice = [torch.cat([a, a], dim=k) for a, k in zip(arguments, (1, 0, 0), strict=True)]
    twice[2][1] = torch.nan
    assert folding_loss(*twice).item() == pytest.approx(expected / 2, rel=1e-5)


def test_fape_sees_handedness_and_no_motion():
    generator = np.random.default_rng(6)
    positions, turn = random_positions(generator, 9), Rotation.random(rng=generator)
    mask = torch.ones(1, 9, dtype=torch.bool)

    def frames(atoms):
        rotations, origins = published_frames(atoms)
        parts = [quaternions(Rotation.from_matrix(rotations)), origins]
        return Rigid.from_tensor_7(torch.tensor(np.concatenate(parts, -1), dtype=torch.float32)[None])

    moved = turn.apply(positions.reshape(-1, 3)).reshape(positions.shape) + 30
    assert frame_aligned_point_error(frames(moved), frames(positions), mask).item() == pytest.approx(1e-3, rel=1e-2)
    assert frame_aligned_point_error(frames(positions * [-1, 1, 1]), frames(positions), mask).item() > 0.1


def test_a_certain_distogram_costs_nothing_and_a_flat_one_the_entropy():
    ca = torch.tensor([[[0.0, 0, 0], [2.3, 0, 0], [30, 0, 0]]])  # distances 0, 2.3: the first bin; 27.7, 30: the last
    right = torch.zeros(1, 3, 3, 64)
    right[0, :2, :2, 0] = right[0, 2, :2, 63] = right[0, :2, 2, 63] = right[0, 2, 2, 0] = 50
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert distogram_loss(right, ca, mask).item() == pytest.approx(0, abs=1e-6)
    assert distogram_loss(torch.zeros(1, 3, 3, 64), ca, mask).item() == pytest.approx(math.log(64))


def test_the_models_own_atoms_have_its_own_frames():
    """The frames made from atoms N, Cα and C are those that transformers places these atoms by."""
    model, found = build(awake=True), {}
    model.head.trunk.register_forward_hook(lambda module, inputs, output: found.update(output))
    with torch.no_grad():
        model(collate_structures([helix("ACDEFGHIKLMNPQRSTVWY")])["input_ids"])
    frames = found["frames"][-1:]
    assert frames[0, 0, :, 4:].std() > 0.01
    perfect = torch.zeros(1, 20, 20, 64)
    loss = folding_loss(frames, perfect, found["positions"][-1][:, :, :3]).item() - 0.3 * math.log(64)
    assert loss == pytest.approx(1e-3, rel=0.05)  # √epsilon / 10 Å


def test_outer_product_is_algorithm_10():
    torch.manual_seed(0)
    layer, state = OuterProduct(8, 4), torch.randn(1, 5, 8)
    with torch.no_grad():
        found = layer(state)
        left, right = layer.proj(layer.layernorm(state))[0].split(32, dim=-1)
        for i in range(5):
            for j in range(5):
                torch.testing.assert_close(found[0, i, j], layer.o_proj(torch.outer(left[i], right[j]).reshape(-1)))


def test_padding_changes_nothing():
    model, structures = build(awake=True), [helix(), helix("GAVLIM")]
    with torch.no_grad():
        both = model(**collate_structures(structures))
        alone = [model(**collate_structures([structure])) for structure in structures]
        batch = collate_structures(structures)
        unmasked = model(batch["input_ids"], positions=batch["positions"])
    for row, one in enumerate(alone):
        torch.testing.assert_close(both.positions_ca[row, : one.positions_ca.shape[1]], one.positions_ca[0])
    torch.testing.assert_close(both.loss, (alone[0].loss + alone[1].loss) / 2)
    torch.testing.assert_close(unmasked.loss, both.loss)


def test_recycles_are_drawn_in_training_only():
    model, batch = build(num_recycles=2, awake=True), collate_structures([helix()])
    with torch.no_grad():
        losses = [model(**batch, num_recycles=k).loss.item() for k in range(3)]
        assert len(set(losses)) == 3
        assert model(**batch).loss.item() == losses[2]
        drawn = {model.train()(**batch).loss.item() for _ in range(30)}
    assert sorted(drawn) == pytest.approx(sorted(losses))


def test_the_given_encoder_is_taken_over(tmp_path):
    esm = EsmModel(esm_config())
    model = build_folding_model(esm, num_blocks=1, num_recycles=0, trunk=TRUNK).eval()
    assert model.esm is esm
    assert model.config.hidden_size == 32
    assert not esm_config().is_folding_model
    batch = collate_structures([helix()])
    model.save_pretrained(tmp_path)
    loaded = FoldingModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).positions_ca, model(**batch).positions_ca)
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_what_starts_at_zero():
    """As in transformers' own class: a block changes nothing, and all residues stand at the origin."""
    model = build()
    block, sequence, pairs = model.head.trunk.blocks[0], torch.randn(1, 5, 32), torch.randn(1, 5, 5, 16)
    with torch.no_grad():
        found = block(sequence, pairs, mask=torch.ones(1, 5))
    assert torch.equal(found[0], sequence)
    assert torch.equal(found[1], pairs)
    assert (model.fold(helix()) == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0: expected a whole number of at least 1"),
        ({"num_recycles": -1}, "num_recycles=-1: expected"),
        ({"trunk": {"width": 3}}, "trunk: unknown field 'width'"),
        ({"trunk": {"max_recycles": 3}}, "'max_recycles', or one with an argument of its own"),
        ({"trunk": {"structure_module": {"width": 3}}}, "trunk.structure_module: unknown field 'width'"),
        ({"trunk": {"pairwise_state_dim": 48}}, "pairwise_state_dim=48 is no multiple of pairwise_head_width=32"),
        ({"esm": EsmConfig(vocab_size=40)}, "vocab_size=40: expected 33"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_folding_model(**{"esm": esm_config(), **arguments})


def test_gradients_reach_every_factor_of_an_adapter():
    adapted, batch = adapt(build()), collate_structures([helix()])
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "head" not in name}
    assert len(factors) == 5  # A, B, C_H, C_L and C_M: one tensor for all layers and projections
    assert adapted.targeted_module_names == [
        f"esm.encoder.layer.{layer}.attention.self.{name}" for layer in (0, 1) for name in ("query", "key", "value")
    ]
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        if step == 0:  # the head starts at zero
            assert all(p.grad.abs().max() == 0 for p in factors.values())
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in factors.values())
    assert all(p.grad is None for name, p in adapted.named_parameters() if name.endswith("query.base_layer.weight"))


@pytest.mark.recipes
def test_an_adapter_learns_a_structure_with_the_trainer(tmp_path):
    structure = helix()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=1e-2, eval_strategy="steps", eval_steps=10, **QUIET
    )
    adapted = adapt(build())
    trainer = Trainer(
        adapted, arguments, train_dataset=[structure], eval_dataset=[structure], data_collator=collate_structures
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 20
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert evaluated[1] < evaluated[0] < losses[0]

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    np.testing.assert_array_equal(loaded.fold(structure), adapted.fold(structure))
    assert lddt_ca(loaded.fold(structure), structure.positions[:, 1]) > 0


def test_fold_returns_the_final_frames_and_leaves_the_mode():
    model, structure = build(awake=True), helix("GAVLIMFW")
    expected = model(**collate_structures([structure])).positions_ca[0]
    unknown = Structure(structure.sequence, np.full((8, 3, 3), np.nan))
    for training in (True, False):
        found = model.train(training).fold(unknown)
        assert model.training is training
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)


@pytest.mark.recipes
@needs_data
def test_real_structures_are_learnt(tmp_path):
    pytest.importorskip("gemmi")
    short = [load_structures(DATA / f"{name}.cif")[-1] for name in ("1A8O", "1A7G", "4ZHL")]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=3, **QUIET
    )
    trainer = Trainer(adapt(build()), arguments, train_dataset=short, data_collator=collate_structures)
    trainer.train()
    assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()

    (whole,) = load_structures(DATA / "3JQH.cif")
    start, *_, end = np.flatnonzero(np.isfinite(whole.positions[:, 1, 0]))
    resolved = Structure(whole.sequence[start : end + 1], whole.positions[start : end + 1], whole.key)
    arguments = TrainingArguments(str(tmp_path), max_steps=20, learning_rate=1e-2, **QUIET)
    trainer = Trainer(adapt(build()), arguments, train_dataset=[resolved], data_collator=collate_structures)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
