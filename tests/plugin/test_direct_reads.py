"""Layers whose weight the module around them reads itself: an adapter there is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch import Tensor, nn

from cases import Case, over_cases, perturb, tiny_bert, tiny_gpt2, tiny_llama
from tensorpeft import FloraConfig, LotrConfig
from tensorpeft.plugin.direct_reads import reads_weight_itself

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(**SIZES, state_size=4, intermediate_size=32, time_step_rank=4)
    )


def mamba2() -> nn.Module:
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2)
    )


def wavlm() -> nn.Module:
    config = transformers.WavLMConfig(**SIZES, intermediate_size=32, num_attention_heads=4)
    return transformers.models.wavlm.modeling_wavlm.WavLMEncoderLayer(config)


class Reader(nn.Module):
    """A layer that is called only where nobody gets to, and one whose weight is asked for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.helped, self.either = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self._helper(x.to(self.called.weight.dtype))
        x = self.either(x) if self.training else F.linear(x, self.either.weight)
        return F.linear(self.called(x), self.read.weight, self.read.bias)

    def _helper(self, x: Tensor) -> Tensor:
        return x @ self.helped.weight.T if hasattr(self.helped, "weight") else x

    def unused(self, x: Tensor) -> Tensor:
        return self.read(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mamba-output": (mamba, "out_proj"),  # called, but not by the kernels
    "mamba-time-step": (mamba, "dt_proj"),
    "mamba2-output": (mamba2, "out_proj"),
    "wavlm-query": (wavlm, "q_proj"),
    "torch-attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj"),
    "read": (lambda: nn.Sequential(Reader()), "read"),
    "read-by-a-helper": (lambda: nn.Sequential(Reader()), "helped"),
}


@over_cases
@pytest.mark.parametrize("name", ["mamba-output", *(pytest.param(n, marks=pytest.mark.thorough) for n in REFUSED)])
def test_refused_by_name_and_nothing_is_changed(case: Case, name: str):
    build, target = REFUSED[name]
    base = build()
    children = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=rf"{target}: .* reads this layer's weight instead of calling"):
        get_peft_model(base, case.make(target_modules=["in_proj", target]))
    assert [name for name, _ in base.named_modules()] == children


@pytest.mark.parametrize("name", REFUSED)
def test_every_way_to_read_is_found(name: str):
    build, target = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{target}: .* reads this layer's weight instead of calling"):
        get_peft_model(build(), LotrConfig(target_modules=[target]))


@pytest.mark.parametrize("build", [mamba, mamba2])
def test_a_convolution_that_the_mixer_reads(build: Callable[[], nn.Module]):
    with pytest.raises(ValueError, match=r"conv1d: Mamba2?Mixer reads this layer's weight"):
        get_peft_model(build(), FloraConfig(target_modules=["in_proj", "conv1d"]))


def test_what_is_called_is_adapted():
    assert not reads_weight_itself(Reader(), "called")
    assert not reads_weight_itself(Reader(), "either")
    assert not reads_weight_itself(None, "called")


@over_cases
def test_the_other_layers_of_a_mixer_are_trained(case: Case):
    model = get_peft_model(mamba(), case.make(target_modules=["in_proj"]))
    x = torch.arange(3, 15).view(2, 6)
    model(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_no_layer_of_a_plain_transformer_is_refused(build: Callable[[], nn.Module]):
    for parent in build().modules():
        assert not any(reads_weight_itself(parent, name) for name, _ in parent.named_children())


def test_a_class_without_source_is_not_judged():
    namespace: dict[str, type[nn.Module]] = {}
    exec("from torch import nn\nclass Made(nn.Module):\n    def forward(self, x): return x @ self.a.weight", namespace)
    assert not reads_weight_itself(namespace["Made"](), "a")


@over_cases
def test_read_on_some_ways_only_is_refused_when_it_happens(case: Case):
    config = case.make(target_modules=["either"], **({"budget": 200} if case.name == "dota-auto" else {}))
    model = get_peft_model(nn.Sequential(Reader()), config)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"^0.either: the model reads this layer's"):
            model(x)
    with model.disable_adapter():
        model(x)
    if case.merges:
        model.merge_adapter()
        model(x)


@over_cases
def test_torch_s_fused_encoder_layers_call_their_layers(case: Case):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 44, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = get_peft_model(base, case.make(target_modules=["linear1", "linear2"]))
    perturb(model)
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        found = model.eval()(x)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(found, model(x), atol=1e-4)
    if case.merges:
        model.merge_adapter()
        with torch.no_grad():
            torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-4)


def test_what_does_not_depend_on_the_numbers_may_be_asked():
    model = get_peft_model(tiny_llama(), LotrConfig(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    base = layer.base_layer.weight
    assert isinstance(layer.weight, Tensor)
    assert (layer.weight.dtype, layer.weight.device, layer.weight.shape) == (base.dtype, base.device, base.shape)
    assert layer.weight.data_ptr() == base.data_ptr()
    assert torch.equal(layer.weight, base)
    for look in (layer.weight.data, layer.weight.detach(), layer.weight.clone()):
        assert type(look) is Tensor
        assert torch.equal(look, base)
    before = base.clone()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: .*zero_"):
        nn.init.zeros_(layer.weight)
    assert torch.equal(base, before)


def test_a_layer_whose_weight_the_model_asks_for_its_dtype_is_loaded_by_transformers(tmp_path):
    """T5 initialises `wo` by its weight where it is told to initialise anything."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=44, num_layers=1, num_heads=4)
        return transformers.T5ForConditionalGeneration(config).eval()

    x = torch.arange(3, 15).view(2, 6)
    model = get_peft_model(fresh(), LotrConfig(target_modules=["wo", "q"])).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = fresh()
    loaded.load_adapter(str(tmp_path))
    with torch.no_grad():
        expected = model(input_ids=x, decoder_input_ids=x).logits
        assert torch.equal(loaded(input_ids=x, decoder_input_ids=x).logits, expected)
        assert not torch.allclose(fresh()(input_ids=x, decoder_input_ids=x).logits, expected, atol=1e-3)
    torch.compile(model, backend="eager", fullgraph=True)(input_ids=x, decoder_input_ids=x)
