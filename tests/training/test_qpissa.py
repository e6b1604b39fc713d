"""A base in 4 bits that lacks the start of PEFT's own adapter: QPiSSA."""

import pytest
import torch
from torch import nn

pytest.importorskip("omegaconf")
pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit

from tensorpeft.tasks.registry import find_task
from tensorpeft.training.models import adapt, load_base, load_tokenizer
from tensorpeft.training.recipe import load_recipe


@pytest.fixture
def weights(place, tmp_path):
    """The weights of the adapted model at its start, by layer, as a recipe's overrides make it."""

    def make(*overrides) -> dict[str, torch.Tensor]:
        recipe = load_recipe(place / "sft.yaml", [f"output={tmp_path}", *overrides])
        task = find_task(recipe.task)
        model = adapt(load_base(recipe, task, load_tokenizer(recipe, task), seed=0), recipe, task)
        layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
        return {name: _weight(m.base_layer) + m.get_delta_weight("default") for name, m in layers.items()}

    return make


def _weight(layer: nn.Module) -> torch.Tensor:
    state = getattr(layer.weight, "quant_state", None)
    return layer.weight.detach() if state is None else dequantize_4bit(layer.weight.data, state)


LORA = "adapter={method: lora, r: 4, lora_alpha: 4"


def test_qpissa_is_nearer_to_the_weights_than_qlora(weights):
    exact = weights(LORA + "}")
    errors = {}
    for name, more in {"qlora": ("}", "false"), "qpissa": (", init_lora_weights: pissa}", "true")}.items():
        found = weights(LORA + more[0], f"quantize.residual={more[1]}")
        assert found.keys() == exact.keys()
        errors[name] = sum(torch.dist(found[key], exact[key]) ** 2 for key in exact)
    assert 0 < errors["qpissa"] < 0.7 * errors["qlora"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("quantize.rounds=2", r"quantize\.rounds=2: expected 1 with init_lora_weights=pissa"),
        ("task=preferences", r"preferences are measured against the model without its adapter"),
    ],
)
def test_what_the_start_of_qpissa_cannot_serve_is_refused(weights, more, message):
    with pytest.raises(ValueError, match=message):
        weights(LORA + ", init_lora_weights: pissa}", "quantize.residual=true", more)
