"""Factors that all layers share: owned once, by the model, whoever holds the adapters."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from cases import MODELS, SHARING_CASES, Case, logits, perturb, tokens
from tensorpeft import FloraConfig, LortaConfig, LotrConfig
from tensorpeft.networks.update import SharedFactors

LLAMA = MODELS[0]
over_shared = pytest.mark.parametrize("case", SHARING_CASES, ids=lambda case: case.name)


def adapted(case: Case):
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets)).eval()
    perturb(model)
    return model


@over_shared
def test_they_are_registered_once_and_nothing_else_is_trained(case: Case):
    model = adapted(case)
    owners = [module for module in model.modules() if isinstance(module, SharedFactors)]
    assert len(owners) == 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in owners[0].parameters()}
    assert len(model.state_dict()) == len(LLAMA.fresh().state_dict()) + len(trained)


@over_shared
def test_a_copy_has_its_own(case: Case):
    model = adapted(case)
    before, twin = logits(model), copy.deepcopy(model)
    perturb(twin, seed=9)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before)


@over_shared
@pytest.mark.parametrize("merge", [False, True])
def test_unloading_leaves_the_plain_model(case: Case, merge: bool):
    model = adapted(case)
    expected = logits(model if merge else LLAMA.fresh())
    plain = model.merge_and_unload() if merge else model.unload()
    assert plain.state_dict().keys() == LLAMA.fresh().state_dict().keys()
    torch.testing.assert_close(logits(plain), expected, atol=2e-6, rtol=0)


@over_shared
def test_the_status_of_a_merged_model(case: Case):
    model = adapted(case)
    assert model.get_model_status().merged_adapters == []
    model.merge_adapter()
    status = model.get_model_status()
    assert (status.merged_adapters, status.available_adapters) == (["default"], ["default"])


def test_two_methods_and_lora_in_a_mixed_model():
    mixed = get_peft_model(LLAMA.fresh(), LortaConfig(target_modules=["q_proj", "v_proj"]), "lorta", mixed=True)
    assert isinstance(mixed, PeftMixedModel)
    mixed.add_adapter("lotr", LotrConfig(target_modules=["q_proj", "up_proj"]))
    mixed.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    outputs = {}
    for name in ("lorta", "lotr", "lora"):
        mixed.set_adapter(name)
        perturb(mixed, seed=3)
        outputs[name] = logits(mixed.eval())
    for name, expected in outputs.items():
        mixed.set_adapter(name)
        assert torch.equal(logits(mixed), expected)
    mixed.set_adapter(["lorta", "lotr", "lora"])
    together = logits(mixed)
    plain = mixed.merge_and_unload()
    torch.testing.assert_close(logits(plain), together, atol=1e-5, rtol=1e-5)
    assert plain.state_dict().keys() == LLAMA.fresh().state_dict().keys()


def _gradients(model: torch.nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model(input_ids=inputs, labels=inputs).loss.backward()
    return {
        name.removeprefix("module."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _train_on_a_half(rank: int, case: Case, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Unnamed, so that it goes before its group. A model that goes last ends the group: it holds the GIL and waits for
    # the group's thread, which may wait for the GIL.
    found = _gradients(DistributedDataParallel(adapted(case).train()), tokens(batch=4)[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_have_the_gradients_of_one(tmp_path):
    case = SHARING_CASES[0]
    mp.spawn(_train_on_a_half, args=(case, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    expected = _gradients(adapted(case).train(), tokens(batch=4))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def turned() -> torch.nn.Module:
    """The model, as a class would build it that registers a block's projections the other way round."""
    model = LLAMA.fresh()
    for layer in model.model.layers:
        layer.self_attn._modules = dict(reversed(layer.self_attn._modules.items()))
    return model


@over_shared
def test_another_order_of_the_weights_is_refused(case: Case, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    order = json.loads((tmp_path / "adapter_config.json").read_text())["site_order"]
    names = ["self_attn.q", "self_attn.k", "self_attn.v", "mlp.up", "mlp.down"]
    assert order == [f"model.layers.*.{name}_proj" for name in names]
    model = turned()
    with pytest.raises(ValueError, match=r"self_attn\.q_proj comes before .*self_attn\.v_proj"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {type(module) for module in model.modules()} == {type(module) for module in LLAMA.fresh().modules()}
    with pytest.raises(ValueError, match="the order in which its model registers them"):
        PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True)


@over_shared
def test_a_file_without_the_order_is_loaded_as_ever(case: Case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["site_order"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()), logits(model))


def test_what_is_counted_by_name_goes_into_any_order(tmp_path):
    model = get_peft_model(LLAMA.fresh(), FloraConfig(r=4, target_modules=LLAMA.targets)).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["site_order"] is None
    torch.testing.assert_close(logits(PeftModel.from_pretrained(turned(), tmp_path).eval()), logits(model))
