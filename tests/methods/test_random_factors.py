"""LoRTA with factors that stay as they start: what is trained, and that nothing of them is lost."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from cases import perturb, tiny_llama, tokens
from tensorpeft import LortaConfig
from tensorpeft.networks.group import tensors_of

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture
def ids():
    return tokens(2, 6)


def adapt(**more) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LortaConfig(r=4, target_modules=TARGETS, **more))


def factors_of(model) -> dict[str, torch.Tensor]:
    (shared,) = [module for module in model.modules() if type(module).__name__ == "CpFactors"]
    return {name: tensor.clone() for name, tensor in tensors_of(shared).items()}


def test_a_random_factor_stays_and_the_others_are_trained(ids):
    whole, model = adapt(), adapt(random_factors=["A", "C_M"])
    before, logits = factors_of(model), model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, logits)  # it starts at the base
    frozen = sum(tensor.numel() for name, tensor in before.items() if name.endswith(("_A", "_C_M")))
    assert model.get_nb_trainable_parameters()[0] == whole.get_nb_trainable_parameters()[0] - frozen
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    kept = {name for name, tensor in factors_of(model).items() if torch.equal(tensor, before[name])}
    assert kept == {name for name in before if name.endswith(("_A", "_C_M"))}


def test_it_is_saved_loaded_merged_and_summed_with_them(ids, tmp_path):
    model = adapt(random_factors=["A"]).eval()
    perturb(model)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(model(ids).logits, expected)
    torch.manual_seed(9)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected)


def test_b_and_what_is_no_factor_are_refused():
    for names in (["B"], ["A", "D"]):
        with pytest.raises(ValueError, match=r"random_factors=.*expected some of A, C_H, C_L, C_M"):
            LortaConfig(random_factors=names)
