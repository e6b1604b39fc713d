"""The table of what 4 bits cost: its numbers against plain formulas, and what a person gets to see."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("matplotlib")

from cases import MODELS, minilm, tokens
from tensorpeft import DotaConfig
from tensorpeft.quantization.errors import method_names, quantization_errors
from tensorpeft.quantization.residual import dequantise, quantise
from tensorpeft.reports.tables import markdown_tables
from tensorpeft.studies.quantization_report import error_table, inspect_quantization


def config() -> DotaConfig:
    return DotaConfig(r=4, num_cores=3, target_modules=["q_proj", "up_proj"])


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return dequantise(quantise(weight))


def test_each_error_is_its_formula():
    model = MODELS[0].fresh()
    seen = []
    up = model.model.layers[1].mlp.up_proj
    handle = up.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, -2)))
    model(input_ids=tokens())
    handle.remove()
    layer = quantization_errors(model, config(), rounds=2, run=lambda: model(input_ids=tokens()))[-1]
    assert layer.name == "model.layers.1.mlp.up_proj"
    weight = up.weight.detach()
    left, values, right = torch.linalg.svd(weight)
    low = left[:, : layer.svd_rank] @ torch.diag(values[: layer.svd_rank]) @ right[: layer.svd_rank]
    for name, approximation in {"QLoRA": nf4(weight), "QPiSSA 1": nf4(weight - low) + low}.items():
        error = weight - approximation
        assert layer.weight[name] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-3)
        x = seen[0].double()
        expected = (x @ error.double().T).norm() / (x @ weight.double().T).norm()
        assert layer.output[name] == pytest.approx(expected.item(), rel=1e-3)


def test_inputs_are_taken_from_all_batches_alike():
    linear = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(linear)
    batches = [torch.randn(300, 64) * 10**k for k in range(7)]  # the last ones outweigh all others

    def run():
        for batch in batches:
            model(batch)

    config = DotaConfig(r=4, num_cores=3, target_modules=["0"])
    (layer,) = quantization_errors(model, config, rounds=1, run=run)
    x = torch.cat(batches)[::8].double()  # 2100 rows: every eighth is the most that keeps within 512
    error = (linear.weight - nf4(linear.weight)).double()
    expected = (x @ error.T).norm() / (x @ linear.weight.double().T).norm()
    assert layer.output["QLoRA"] == pytest.approx(expected.item(), rel=1e-4)


def test_qpissa_has_about_the_size_of_the_cores():
    for layer in quantization_errors(MODELS[0].fresh(), config(), rounds=1):
        sizes = [abs(rank * sum(layer.shape) - layer.adapter_size) for rank in (layer.svd_rank, layer.svd_rank + 1)]
        assert sizes[0] <= sizes[1]
        assert set(layer.weight) == set(method_names(1)) == {"QLoRA", "QPiSSA 1", "QDoTA 1"}
        assert layer.output == {}


def test_rounds_never_raise_an_error_and_the_model_stays():
    model = MODELS[0].fresh()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    counts = []
    errors = quantization_errors(model, config(), rounds=4, on_layer=lambda done, total: counts.append((done, total)))
    for layer in errors:
        assert layer.weight["QDoTA 4"] <= layer.weight["QDoTA 1"]
        assert layer.weight["QPiSSA 4"] <= layer.weight["QPiSSA 1"]
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.Linear))


def test_a_layer_where_the_network_is_worse_is_marked():
    (layer, *_) = quantization_errors(MODELS[0].fresh(), config(), rounds=1)
    for weight, mark in (
        ({"QLoRA": 0.3, "QPiSSA 1": 0.2, "QDoTA 1": 0.1}, "q_proj |"),
        ({"QLoRA": 0.3, "QPiSSA 1": 0.1, "QDoTA 1": 0.2}, "q_proj · |"),
        ({"QLoRA": 0.3, "QPiSSA 1": 0.1, "QDoTA 1": 0.4}, "q_proj ! |"),
    ):
        layer.weight.update(weight)
        text = markdown_tables([error_table([layer], 1, "")])
        assert mark in text
        assert f"QDoTA 1 in {int(weight['QDoTA 1'] < 0.3)}" in text


def test_the_command_writes_table_plot_and_numbers(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A cat sat on the mat.\n\nTensor networks are graphs of tensors.\n")
    targets = r".*\.layer\.0\.attention\.self\.(query|value)"
    inspect_quantization(str(minilm()), DotaConfig(r=8, target_modules=targets), 2, tmp_path / "out", text)
    printed = capsys.readouterr().out
    table, _, path = printed.rpartition("Table, plot and raw results: ")
    assert max(map(len, table.splitlines())) <= 100
    assert path.strip() == str(tmp_path / "out")
    assert "0.self.query" in printed
    assert "…" not in printed
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == [
        f"encoder.layer.0.attention.self.{name}" for name in ("query", "value")
    ]
    for layer in found["layers"]:
        assert 0.01 < layer["weight"]["QDoTA 2"] < layer["weight"]["QLoRA"] < 0.2
    assert (tmp_path / "out" / "quantization.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text.write_text("\n")
    with pytest.raises(ValueError, match="no line of text"):
        inspect_quantization(str(minilm()), config(), 1, tmp_path / "out", text)
