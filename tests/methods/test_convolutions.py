"""FLoRA on convolutions of every geometry: its dense formula, and what any adapter must do, beside linear layers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from torch import nn

from cases import perturb
from convolution_oracle import convolve, dense_update, num_parameters
from own_factor_oracles import flora_update, trained
from tensorpeft import (
    DotaConfig,
    FactConfig,
    FloraConfig,
    LorettaAdapterConfig,
    LorettaConfig,
    LortaConfig,
    LotrConfig,
    NolaConfig,
    QuantaConfig,
)
from tensorpeft.export import to_lora

TOLERANCE = 1e-10
MERGED_TOLERANCE = 2e-6  # absolute, of float32 outputs of order one
R, ALPHA = 3, 7  # above the size of some axes of the kernels and below that of others


@dataclass(frozen=True)
class Geometry:
    """A convolution, the size of an image for it, and what keeps it from being a LoRA of PEFT's."""

    name: str
    layer: Callable[..., nn.Module]
    arguments: dict[str, Any]  # in_channels, out_channels, kernel_size, ...
    size: tuple[int, ...]
    not_lora: str = ""

    def inputs(self, batch: int = 4, seed: int = 1) -> torch.Tensor:  # float64
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, self.arguments["in_channels"], *self.size)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def geometry(name: str, layer: Callable[..., nn.Module], shape: tuple, size: tuple[int, ...], **more: Any) -> Geometry:
    arguments = dict(zip(("in_channels", "out_channels", "kernel_size"), shape))
    not_lora = more.pop("not_lora", "")
    return Geometry(name, layer, {**arguments, **more}, size, not_lora)


GEOMETRIES = [
    geometry("1d", nn.Conv1d, (6, 4, 5), (11,), padding=2),
    geometry(
        "1d-groups-stride-dilation", nn.Conv1d, (6, 9, 4), (17,), stride=2, dilation=2, groups=3, not_lora="groups"
    ),
    geometry("1d-replicate", nn.Conv1d, (4, 5, 3), (9,), padding=2, padding_mode="replicate", not_lora="padding_mode"),
    geometry("patches", nn.Conv2d, (3, 8, 4), (12, 8), stride=4),
    geometry("1x1-without-bias", nn.Conv2d, (5, 8, 1), (6, 5), bias=False),
    geometry("same-even", nn.Conv2d, (4, 6, (4, 2)), (7, 6), padding="same"),
    geometry("oblong", nn.Conv2d, (4, 6, (2, 5)), (8, 9), stride=(2, 1), padding=(0, 3)),
    geometry(
        "valid-dilation", nn.Conv2d, (4, 6, (3, 2)), (9, 8), padding="valid", dilation=(2, 3), not_lora="dilation"
    ),
    geometry("depthwise", nn.Conv2d, (6, 6, 3), (7, 6), padding=1, groups=6, not_lora="groups"),
    geometry("depthwise-doubled", nn.Conv2d, (4, 8, (1, 4)), (5, 9), stride=(1, 2), groups=4, not_lora="groups"),
    geometry(
        "reflect", nn.Conv2d, (4, 6, (3, 4)), (8, 7), padding=(2, 1), padding_mode="reflect", not_lora="padding_mode"
    ),
    geometry(
        "same-circular-dilation",
        nn.Conv2d,
        (4, 6, (4, 3)),
        (9, 8),
        padding="same",
        dilation=(1, 2),
        padding_mode="circular",
        not_lora="padding_mode",
    ),
    geometry("3d", nn.Conv3d, (4, 5, (2, 3, 1)), (5, 6, 4), stride=(1, 2, 1), padding=(1, 0, 2)),
    geometry(
        "3d-circular-groups",
        nn.Conv3d,
        (4, 6, (2, 1, 3)),
        (4, 3, 5),
        padding=(1, 0, 2),
        groups=2,
        padding_mode="circular",
        not_lora="groups",
    ),
]
over_geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: geometry.name)
over_plain = pytest.mark.parametrize(
    "geometry", [geometry for geometry in GEOMETRIES if not geometry.not_lora], ids=lambda geometry: geometry.name
)
FIRST = GEOMETRIES[6]


class Net(nn.Module):
    """A convolution, and a linear layer on the mean of its pixels."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        torch.manual_seed(0)
        self.conv = geometry.layer(**geometry.arguments)
        self.head = nn.Linear(self.conv.out_channels, 3)
        self.axes = len(self.conv.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (*batch, channels, *pixels) -> (*batch, 3)
        return self.after(self.conv(x))

    def after(self, features: torch.Tensor, **head: torch.Tensor) -> torch.Tensor:
        pixels = features.tanh().flatten(-self.axes).mean(-1)
        return torch.func.functional_call(self.head, head, pixels)


def fresh(geometry: Geometry, dtype: torch.dtype = torch.float64) -> Net:
    return Net(geometry).to(dtype).eval()


def config(**more: Any) -> FloraConfig:
    return FloraConfig(**{"r": R, "alpha": ALPHA, "target_modules": ["conv"], "init_weights": False, **more})


def adapted(geometry: Geometry, dtype: torch.dtype = torch.float64, **more: Any) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(fresh(geometry, dtype), config(**more)).eval()
    return model.double() if dtype == torch.float64 else model


def output(model: nn.Module, x: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x, **more)


def update_of(model: PeftModel, layer: str = "conv") -> np.ndarray:
    tensors = {name: tensor.detach().numpy() for name, tensor in trained(model)[layer].items()}
    return dense_update(tensors, R, ALPHA)


@over_geometries
def test_the_update_is_that_of_the_dense_formula(geometry: Geometry):
    model, base = adapted(geometry), fresh(geometry)
    expected, layer = update_of(model), model.base_model.model.conv
    assert expected.shape == tuple(base.conv.weight.shape)
    assert np.abs(expected).max() > 1e-2  # nothing is proved by zeros
    actual = layer.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
    shape = base.conv.weight.shape
    count = sum(tensor.numel() for tensor in trained(model)["conv"].values())
    assert count == num_parameters(shape[0], shape[1], tuple(shape[2:]), R)
    assert model.get_nb_trainable_parameters()[0] == count


@over_geometries
def test_outputs_and_gradients_are_those_of_the_dense_formula(geometry: Geometry):
    model, base = adapted(geometry), fresh(geometry)
    tensors = trained(model)["conv"]
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    x, y = (geometry.inputs().requires_grad_() for _ in range(2))
    features = convolve(base.conv, y, base.conv.weight.detach() + dense_update(copies, R, ALPHA, torch))
    assert (features - base.conv(y)).abs().max() > 1e-2
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for actual, expected in ((model.base_model.model.conv(x), features), (model(x), base.after(features))):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output(model, x), base.after(features), rtol=0, atol=TOLERANCE)  # what it may cache
    (model.base_model.model.conv(x) * direction).sum().backward()
    (features * direction).sum().backward()
    for name, actual, expected in [("x", x.grad, y.grad), *((k, tensors[k].grad, copies[k].grad) for k in tensors)]:
        assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max(), name  # not of zeros


def test_the_border_of_the_oracle_is_torch_s():
    for geometry in GEOMETRIES:
        conv, x = fresh(geometry).conv, geometry.inputs()
        torch.testing.assert_close(convolve(conv, x, conv.weight), conv(x), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@over_geometries
def test_starts_as_the_base(geometry: Geometry, dtype: torch.dtype):
    x, expected = geometry.inputs().to(dtype), output(fresh(geometry, dtype), geometry.inputs().to(dtype))
    model = get_peft_model(fresh(geometry, dtype), config(init_weights=True)).eval()
    assert torch.equal(output(model, x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), expected)
    layer, tensors = model.base_model.model.conv, trained(model)["conv"]
    assert not layer.get_delta_weight("default").any()
    model(x).square().sum().backward()
    assert tensors["G"].grad.abs().max() > 0
    torch.optim.SGD([tensors["G"]], lr=1.0).step()
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in tensors.values())


@over_geometries
def test_start_is_exact_under_autocast(geometry: Geometry):
    x, model = geometry.inputs().float(), adapted(geometry, torch.float32, init_weights=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = output(fresh(geometry, torch.float32), x)
        assert torch.equal(output(model, x), expected)
        assert torch.equal(model.train()(x), expected)
    perturb(model.eval())
    expected = output(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
        found.sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)
    assert all(tensor.grad.isfinite().all() for tensor in trained(model)["conv"].values())


@over_geometries
def test_half_precision_follows_the_formula(geometry: Geometry):
    """The adapter stays in float32 on a bfloat16 base: some roundings (2⁻⁹) of outputs of order one."""
    model, x = adapted(geometry, torch.bfloat16), geometry.inputs().bfloat16()
    assert {tensor.dtype for tensor in trained(model)["conv"].values()} == {torch.float32}
    expected = output(copy.deepcopy(model).double(), x.double())
    merged = copy.deepcopy(model).merge_and_unload()
    for found in (output(model, x), model(x), output(merged, x)):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.05)


@over_geometries
def test_merging_keeps_the_output_and_unmerging_the_base(geometry: Geometry):
    model, x, base = adapted(geometry), geometry.inputs(), fresh(geometry)
    before, weights = output(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    assert (before - output(base, x)).abs().max() > 1e-3
    model.merge_adapter(safe_merge=True)
    merged = model.base_model.model.conv.get_base_layer().weight.detach()
    np.testing.assert_allclose(merged, base.conv.weight.detach() + update_of(model), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output(model, x), before, rtol=0, atol=TOLERANCE)
    with model.disable_adapter():
        assert torch.equal(output(model, x), output(base, x))
    model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    unloaded = model.merge_and_unload()
    assert type(unloaded.conv) is type(base.conv)
    assert repr(unloaded) == repr(base)
    assert [name for name, _ in unloaded.named_parameters()] == [name for name, _ in base.named_parameters()]
    torch.testing.assert_close(output(unloaded, x), before, rtol=0, atol=TOLERANCE)


@over_geometries
def test_disabled_and_unloaded_it_is_the_base(geometry: Geometry):
    model, x = adapted(geometry, torch.float32), geometry.inputs().float()
    expected, before = output(fresh(geometry, torch.float32), x), output(model, x)
    assert not torch.allclose(before, expected)
    with model.disable_adapter():
        assert torch.equal(output(model, x), expected)
    assert torch.equal(output(model, x), before)
    model.merge_adapter()
    assert torch.equal(output(model.unload(), x), expected)


@pytest.mark.parametrize("broken", ["U", "V", "G", "K1", "K2"])
def test_a_broken_adapter_is_not_merged(broken: str):
    model = adapted(FIRST)
    trained(model)["conv"][broken].data.flatten()[0] = float("nan")
    base = fresh(FIRST)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
            merge(safe_merge=True)
        layer = model.base_model.model.conv
        assert torch.equal(layer.get_base_layer().weight, base.conv.weight)
        assert not layer.merged_adapters


@over_geometries
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reloaded_it_is_the_saved_one(geometry: Geometry, low_cpu_mem_usage: bool, tmp_path):
    model, x = adapted(geometry, torch.float32), geometry.inputs().float()
    model.save_pretrained(tmp_path)
    base = fresh(geometry, torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(output(loaded, x), output(model, x))
    assert not torch.equal(output(loaded, x), output(fresh(geometry, torch.float32), x))


def test_two_adapters_do_not_touch_each_other():
    model, x = adapted(FIRST), FIRST.inputs()
    first = output(model, x)
    model.add_adapter("second", config(r=2))
    model.double().eval()
    assert torch.equal(output(model, x), first)
    model.set_adapter("second")
    second = output(model, x)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(output(model, x), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(output(model, x), second)


@over_geometries
def test_rows_of_many_adapters_in_one_batch(geometry: Geometry):
    model = adapted(geometry)
    for name, r in {"v": R, "w": R, "y": 2}.items():
        model.add_adapter(name, config(r=r))
    model.double().eval()
    rows, x = ["w", "__base__", "default", "y", "v", "w"], geometry.inputs(batch=6)
    mixed, alone = output(model, x, adapter_names=rows), {"__base__": output(fresh(geometry), x)}
    for name in ("default", "v", "w", "y"):
        model.set_adapter(name)
        alone[name] = output(model, x)
    assert not torch.allclose(alone["v"], alone["w"])
    expected = torch.stack([alone[name][k] for k, name in enumerate(rows)])
    torch.testing.assert_close(mixed, expected, atol=TOLERANCE, rtol=0)


@over_geometries
def test_several_active_adapters_add_up(geometry: Geometry):
    model, base, x = adapted(geometry), fresh(geometry), geometry.inputs()
    model.add_adapter("second", config(r=2))
    model.base_model.set_adapter(["default", "second"])
    model.double().eval()
    layer = model.base_model.model.conv
    updates = [layer.get_delta_weight(name) for name in ("default", "second")]
    expected = convolve(base.conv, x, base.conv.weight + sum(updates))
    torch.testing.assert_close(layer(x), expected, atol=TOLERANCE, rtol=0)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), expected, atol=TOLERANCE, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base.conv.weight)


@over_geometries
def test_an_image_without_a_batch(geometry: Geometry):
    model, base, x = adapted(geometry), fresh(geometry), geometry.inputs()[0]
    features = convolve(base.conv, x, base.conv.weight + torch.from_numpy(update_of(model)))
    torch.testing.assert_close(output(model, x), base.after(features), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model(x), base.after(features), atol=TOLERANCE, rtol=0)
    single = torch.float32
    start = get_peft_model(fresh(geometry, single), config(init_weights=True)).eval()
    assert torch.equal(start(x.to(single)), fresh(geometry, single)(x.to(single)))


@over_geometries
def test_a_convolution_and_a_linear_layer_in_one_model(geometry: Geometry):
    model, base, x = adapted(geometry, target_modules=["conv", "head"]), fresh(geometry), geometry.inputs()
    layers = {name: {k: t.detach().numpy() for k, t in tensors.items()} for name, tensors in trained(model).items()}
    assert list(layers) == ["conv", "head"]
    head = base.head.weight + torch.from_numpy(flora_update(layers["head"], R, ALPHA))
    features = convolve(base.conv, x, base.conv.weight + torch.from_numpy(update_of(model)))
    expected = base.after(features, weight=head)
    for found in (output(model, x), model(x), output(model.merge_and_unload(), x)):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@over_plain
def test_the_exported_lora_is_the_adapter(geometry: Geometry, tmp_path):
    model, x = adapted(geometry, torch.float32, target_modules=["conv", "head"]), geometry.inputs().float()
    model.peft_config["default"].base_model_name_or_path = "a/name"
    assert [(layer.name, layer.error) for layer in to_lora(model, tmp_path)] == [("conv", 0), ("head", 0)]
    loaded = PeftModel.from_pretrained(fresh(geometry, torch.float32), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert (output(model, x) - output(fresh(geometry, torch.float32), x)).abs().max() > 1e-3
    torch.testing.assert_close(output(loaded, x), output(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry", [geometry for geometry in GEOMETRIES if geometry.not_lora], ids=lambda geometry: geometry.name
)
def test_what_peft_s_lora_cannot_be_is_not_exported(geometry: Geometry, tmp_path):
    model, x = adapted(geometry), geometry.inputs()
    model.peft_config["default"].base_model_name_or_path = "a/name"
    before = output(model, x)
    with pytest.raises(ValueError, match=rf"^conv: .*{geometry.not_lora}=.*merge_and_unload"):
        to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    assert torch.equal(output(model, x), before)


@pytest.mark.parametrize(
    "other",
    [
        DotaConfig,
        FactConfig,
        LorettaAdapterConfig,
        LorettaConfig,
        LortaConfig,
        LotrConfig,
        NolaConfig,
        QuantaConfig,
    ],
)
@pytest.mark.parametrize("targets", [["conv"], ["head", "conv"]], ids=str)
def test_other_methods_refuse_a_convolution(other: type[PeftConfig], targets: list[str]):
    base = fresh(FIRST)
    with pytest.raises(ValueError, match=r"conv: cannot adapt a Conv2d, expected a linear layer"):
        get_peft_model(base, other(target_modules=targets))
    assert repr(base) == repr(fresh(FIRST))


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Embedding(5, 4)], ids=lambda x: str(type(x))
)
def test_flora_refuses_what_is_no_convolution(layer: nn.Module):
    base = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "other": layer})
    with pytest.raises(ValueError, match=rf"other: cannot adapt a {type(layer).__name__}, expected"):
        get_peft_model(base, config(target_modules=["conv", "other"]))
    assert type(base["conv"]) is nn.Conv2d


def test_the_layer_is_read_as_the_convolution_that_it_was():
    """As Whisper's encoder does, which computes the length of its input from `conv1.stride`."""
    for geometry in GEOMETRIES:
        layer, plain = adapted(geometry).base_model.model.conv, fresh(geometry).conv
        for name in ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "out_channels"):
            assert getattr(layer, name) == getattr(plain, name), name


@pytest.mark.parametrize("order", ["lora-first", "lora-last"])
def test_beside_lora_in_one_mixed_model(order: str):
    configs = [config(), LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)]
    configs = configs[::-1] if order == "lora-first" else configs
    mixed = get_peft_model(fresh(FIRST), configs[0], adapter_name="first", mixed=True)
    mixed.add_adapter("second", configs[1])
    mixed.set_adapter(["first", "second"])
    mixed.double().eval()
    x = FIRST.inputs()
    before, expected = output(mixed, x), output(fresh(FIRST), x)
    with mixed.disable_adapter():
        assert torch.equal(output(mixed, x), expected)
    mixed.merge_adapter()
    torch.testing.assert_close(output(mixed, x), before, rtol=0, atol=TOLERANCE)
    mixed.unmerge_adapter()
    torch.testing.assert_close(output(mixed, x), before, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output(mixed.merge_and_unload(), x), before, rtol=0, atol=TOLERANCE)


def test_peft_s_conversion_which_knows_linear_layers_only_is_refused():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(GEOMETRIES[0], torch.float32), rank=3)


def test_a_saved_adapter_of_a_vision_transformer_is_exported_without_its_base_s_weights(tmp_path):
    settings = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=44, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(settings).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return transformers.ViTForImageClassification.from_pretrained(tmp_path / "base").eval()

    model = get_peft_model(base(), config(target_modules=["projection", "classifier"])).eval()
    assert list(trained(model)) == ["vit.embeddings.patch_embeddings.projection", "classifier"]
    model.save_pretrained(tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert (output(model, x).logits - output(base(), x).logits).abs().max() > 1e-3
    torch.testing.assert_close(output(loaded, x).logits, output(model, x).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [geometry for geometry in GEOMETRIES if geometry.layer is nn.Conv2d],
    ids=lambda geometry: geometry.name,
)
def test_channels_last(geometry: Geometry):
    model, expected = (
        adapted(geometry).to(memory_format=torch.channels_last),
        output(adapted(geometry), geometry.inputs()),
    )
    x = geometry.inputs().to(memory_format=torch.channels_last)
    torch.testing.assert_close(output(model, x), expected, rtol=0, atol=TOLERANCE)
    model.merge_adapter()
    torch.testing.assert_close(output(model, x), expected, rtol=0, atol=TOLERANCE)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.conv.get_base_layer().weight, fresh(geometry).conv.weight)


@over_geometries
def test_it_compiles_as_one_graph(geometry: Geometry):
    model, x = adapted(geometry), geometry.inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=TOLERANCE)


def test_training_lowers_the_loss():
    model, x = adapted(FIRST, torch.float32, init_weights=True), FIRST.inputs().float()
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(8))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model.train()(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_copies_are_independent():
    model, x = adapted(FIRST), FIRST.inputs()
    before, twin = output(model, x), copy.deepcopy(model)
    assert torch.equal(output(twin, x), before)
    perturb(twin)
    assert not torch.allclose(output(twin, x), before)
    assert torch.equal(output(model, x), before)
