"""`tensorpeft inspect MODEL`: its figures against plain formulas, and what a person gets to see."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from cases import MODELS, minilm, tiny_llama, tokens
from tensorpeft import DotaConfig
from tensorpeft.networks.mpo import contract, decompose
from tensorpeft.studies.bonds import RANKS, WeightStudy, correlations, mean_squares, study_bonds, total_error
from tensorpeft.studies.bonds_report import tables
from tensorpeft_cli import main
from tensorpeft_cli.inspect import with_view

TARGETS = ["q_proj", "up_proj"]


def config(**more) -> DotaConfig:
    return DotaConfig(**{"r": 4, "num_cores": 3, "target_modules": TARGETS, **more})


def uneven() -> nn.Module:
    """The tiny Llama with weights from nearly one singular value to nearly equal ones."""
    model = MODELS[0].fresh()
    for index, weight in enumerate(p for p in model.parameters() if p.ndim == 2):
        left, values, right = torch.linalg.svd(weight.data, full_matrices=False)
        weight.data = left * values / torch.arange(1, len(values) + 1) ** (index % 3) @ right
    return model


def relative(error: torch.Tensor, weight: torch.Tensor) -> float:
    return (error.norm() / weight.norm()).item()


def test_each_figure_is_its_formula():
    model = uneven()
    studies = study_bonds(model, config())
    assert [study.name for study in studies] == [
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    for study in studies:
        weight = model.get_submodule(study.name).weight.detach().double()
        modes = study.out_modes, study.in_modes
        assert study.shape == weight.shape
        for rank in RANKS:
            expected = relative(weight - contract(decompose(weight, *modes, rank)), weight)
            assert study.errors[rank] == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert study.uniform.error == study.errors[4]
        values = np.linalg.svd(weight.numpy(), compute_uv=False)
        shares = values / values.sum()
        assert study.effective_ranks[0] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert len(study.effective_ranks) == 3
        left, s, right = torch.linalg.svd(weight)
        rank = study.svd.bonds[0]
        assert abs(rank * sum(study.shape) - study.uniform.size) <= sum(study.shape) / 2
        low = left[:, :rank] * s[:rank] @ right[:rank]
        assert study.svd.error == pytest.approx(relative(weight - low, weight), rel=1e-6)
        assert study.svd.kept == pytest.approx((low.norm() / weight.norm()).item() ** 2, rel=1e-6)
        adaptive = contract(decompose(weight, *modes, study.adaptive.bonds))
        assert study.adaptive.error == pytest.approx(relative(weight - adaptive, weight), rel=1e-6, abs=1e-5)
        # By hand: unfolding 1 has (i1 j1) rows, unfolding 2 has (i3 j3) columns.
        (o1, _, o3), (i1, _, i3) = modes
        first = weight.view(o1, -1, i1, weight.shape[1] // i1).transpose(1, 2).reshape(o1 * i1, -1)
        last = weight.view(-1, o3, weight.shape[1] // i3, i3).transpose(1, 2).reshape(-1, o3 * i3)
        lost = [torch.linalg.svdvals(part)[4:].square().sum().item() for part in (first, last)]
        assert study.worst_cut == 1 + lost.index(max(lost))


def test_the_total_is_lowered_at_equal_size():
    model = uneven()
    studies = study_bonds(model, config())
    sizes = {kind: sum(getattr(study, kind).size for study in studies) for kind in ("uniform", "adaptive")}
    assert 0.95 * sizes["uniform"] <= sizes["adaptive"] <= sizes["uniform"]
    assert total_error(studies, "adaptive") < 0.95 * total_error(studies, "uniform")
    errors = [study.energy * study.adaptive.error**2 for study in studies]
    assert total_error(studies, "adaptive") ** 2 == pytest.approx(sum(errors) / sum(s.energy for s in studies))
    smaller = study_bonds(model, config(), budget=500)
    assert 400 < sum(study.adaptive.size for study in smaller) <= 500


def test_the_model_stays_and_progress_is_told():
    model = uneven()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    counts = []
    study_bonds(model, config(), batch={"input_ids": tokens()}, on_weight=lambda *count: counts.append(count))
    assert counts == [(done, 8) for done in range(1, 9)]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_are_averaged_without_padding():
    model, mask = MODELS[0].fresh(), torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    seen = []
    up = model.model.layers[1].mlp.up_proj
    handle = up.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    batch = {"input_ids": tokens(), "attention_mask": mask}
    found = mean_squares(model, ["model.layers.1.mlp.up_proj"], batch)
    handle.remove()
    rows = torch.cat([seen[0][0], seen[0][1, :4], seen[0][2]])
    assert found == {"model.layers.1.mlp.up_proj": pytest.approx(rows.square().mean().item(), rel=1e-5)}
    loose = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    loose.forward = lambda input_ids: loose["used"](input_ids)
    with pytest.raises(ValueError, match="unused: the text does not reach this layer"):
        mean_squares(loose, ["used", "unused"], {"input_ids": torch.ones(1, 2)})


def test_weights_move_the_budget():
    model = MODELS[0].fresh()
    equal = {study.name: study.adaptive.size for study in study_bonds(model, config())}
    name = "model.layers.0.self_attn.q_proj"
    norm = model.model.layers[0].input_layernorm.weight.data
    norm *= 10  # what q_proj of the first layer reads
    weighted = study_bonds(model, config(), batch={"input_ids": tokens()})
    assert {study.name: study.adaptive.size for study in weighted}[name] > equal[name]
    assert max(weighted, key=lambda study: study.factor).name == name


def test_correlations_are_spearman_s():
    def weight(rank: float, error: float, bond: int, shape=(8, 8)) -> WeightStudy:
        return SimpleNamespace(
            shape=shape,
            effective_ranks=[rank, -rank],
            middle_cut=1,
            errors=dict.fromkeys(RANKS, error),
            adaptive=SimpleNamespace(bonds=(bond,)),
        )

    squares = [weight(rank, rank**3, 7) for rank in (3, 1, 2, 4)]
    others = [weight(rank, -rank, int(rank), (4, 8)) for rank in (30, 10, 20)]
    found = {(c.group, c.rank_of): c for c in correlations(squares + others)}
    assert set(found) == {(group, of) for group in ("all", "8 x 8") for of in ("matrix", "middle cut")}
    square = found["8 x 8", "matrix"]
    assert (square.count, square.with_error[16], square.with_bond) == (4, pytest.approx(1), None)
    assert found["8 x 8", "middle cut"].with_error[4] == pytest.approx(-1)
    # ranks 3 1 2 4 7 5 6 against 6 4 5 7 1 3 2
    assert found["all", "matrix"].with_error[8] == pytest.approx(1 - 6 * 92 / (7 * 48))
    assert {c.group for c in correlations(squares)} == {"8 x 8"}


def test_inspect_model_is_inspect_bonds_model():
    assert with_view(["inspect", "folder", "--r", "4"]) == ["inspect", "bonds", "folder", "--r", "4"]
    assert with_view(["inspect", "--r", "4", "folder"]) == ["inspect", "bonds", "--r", "4", "folder"]
    for argv in (["inspect"], ["inspect", "--help"], ["inspect", "quantization", "x"], ["inspect", "bonds", "x"]):
        assert with_view(argv) == argv
    assert with_view(["plan", "folder"]) == ["plan", "folder"]


def test_the_command_writes_what_a_configuration_takes(tmp_path, capsys):
    model = uneven()
    model.save_pretrained(tmp_path / "model")
    arguments = ["--r", "4", "--num-cores", "3", "--target-modules", *TARGETS, "--output", str(tmp_path / "out")]
    assert main(["inspect", str(tmp_path / "model"), *arguments, "--budget", "1k"]) == 0
    printed = capsys.readouterr().out
    table, _, path = printed.rpartition("Tables, figures and raw results: ")
    assert path.strip() == str(tmp_path / "out")
    assert max(map(len, table.splitlines())) <= 100
    assert "…" not in table.replace("R=…", "")
    found = json.loads((tmp_path / "out" / "bonds.json").read_text())
    for name in ("spectra", "errors", "bonds"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (tmp_path / "out" / "bonds.md").read_text()
    assert "| 1.mlp.up_proj |" in text
    assert f"{100 * found['error']['adaptive']:.1f}" in text
    peft_model = get_peft_model(model, config(r="auto", bonds=found["bonds"]))
    assert peft_model.get_nb_trainable_parameters()[0] == found["size"]["adaptive"] <= 1000


def test_the_tables_fit_for_a_real_model_with_weights(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A cat sat on the mat.\n\nTensor networks are graphs of tensors.\n")
    targets = r".*\.layer\.0\.(attention\.self\.(query|key|value)|intermediate\.dense|output\.dense)"
    arguments = ["--target-modules", targets, "--output", str(tmp_path / "out"), "--weighted", "--text", str(text)]
    assert main(["inspect", "bonds", str(minilm()), *arguments]) == 0
    table = capsys.readouterr().out.rpartition("Tables, figures")[0]
    assert max(map(len, table.splitlines())) <= 100
    found = json.loads((tmp_path / "out" / "bonds.json").read_text())
    assert found["weighted_error"]["adaptive"] < found["weighted_error"]["uniform"]
    assert all(layer["factor"] > 0 for layer in found["layers"])


def test_user_errors_are_one_line(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    arguments = ["--num-cores", "3", "--target-modules", *TARGETS, "--output", str(tmp_path / "out")]
    for options, message in (
        (["--text", __file__], f"--text {__file__}: only weights by activations need a text. Add --weighted"),
        (["--text", "some.txt", "--weighted"], "--text some.txt: no such file"),
        (["--budget", "10"], "budget=10: expected at least"),
        (["--budget", "ten"], "--budget ten: expected a number of parameters"),
        (["--r", "0"], "--r 0: expected a whole number"),
    ):
        assert main(["inspect", str(tmp_path / "model"), *arguments, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_has_as_many_cells_as_headers():
    studies = study_bonds(MODELS[0].fresh(), config(), batch={"input_ids": tokens()})
    for weighted in (False, True):
        for _, headers, rows, _ in tables(studies, config(), weighted):
            assert all(len(row) == len(headers) for row in rows)
