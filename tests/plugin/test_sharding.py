"""What sharding (FSDP) asks of an adapted model, without a second process; `recipes/test_distributed.py` has two."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cases import MODELS, Case, logits, named, over_cases, over_models, perturb

LLAMA = MODELS[0]


@over_models
@over_cases
def test_every_parameter_can_be_sharded(case, model):
    adapted = get_peft_model(model.fresh(), case.make(target_modules=model.targets, task_type=model.task_type))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.ndim, name
            assert parameter.is_contiguous(), name


@over_models
@over_cases
def test_the_wrapping_policy_wraps_the_blocks_and_nothing_of_ours(case, model):
    adapted = get_peft_model(model.fresh(), case.make(target_modules=model.targets, task_type=model.task_type))
    policy = fsdp_auto_wrap_policy(adapted)
    wrapped = {
        name for name, module in adapted.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    names = dict(adapted.named_modules())
    blocks = {name for name, module in names.items() if type(module).__name__ in adapted.base_model._no_split_modules}
    assert len(blocks) >= adapted.config.num_hidden_layers
    # What has a trained `weight` of its own, such as a new head, is wrapped as well: an update is not.
    assert blocks <= wrapped
    assert not [name for name in wrapped if "_update" in name or "shared_" in name]


@over_cases
def test_the_adapter_of_checkpointed_blocks_is_saved_and_loaded(case):
    assert_survives_wrapping(case, LLAMA.targets)


def test_lora_s_adapter_of_checkpointed_blocks_too():
    assert_survives_wrapping(Case("lora", LoraConfig, {"r": 4}), ["q_proj"])


def assert_survives_wrapping(case, targets):
    adapted = get_peft_model(LLAMA.fresh(), case.make(target_modules=targets, task_type="CAUSAL_LM"))
    perturb(adapted)
    saved = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(adapted).items()}
    before = logits(adapted)
    blocks = adapted.get_base_model().model.layers
    for k in range(len(blocks)):
        blocks[k] = checkpoint_wrapper(blocks[k])
    wrapped = get_peft_model_state_dict(adapted)
    assert wrapped.keys() == saved.keys()
    perturb(adapted, seed=3)
    set_peft_model_state_dict(adapted, saved)
    torch.testing.assert_close(logits(adapted), before, rtol=0, atol=0)


def test_an_adapter_of_another_base_is_refused_in_checkpointed_blocks():
    case = named("dota")[0]
    foreign = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets))
    with torch.no_grad():
        for name, tensor in foreign.named_buffers():
            if "start_" in name:
                tensor.copy_(torch.randn_like(tensor))
    saved = get_peft_model_state_dict(foreign)
    adapted = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets))
    blocks = adapted.get_base_model().model.layers
    for k in range(len(blocks)):
        blocks[k] = checkpoint_wrapper(blocks[k])
    with pytest.raises(ValueError, match="another base model"):
        set_peft_model_state_dict(adapted, saved)


def test_cores_that_are_gathered_rounded_start_at_the_base():
    """FSDP's mixed precision casts what it shards, parameters, and not the start beside them."""
    case = named("dota")[0]
    model = LLAMA.fresh()
    expected = logits(model)
    adapted = get_peft_model(model, case.make(target_modules=LLAMA.targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)
