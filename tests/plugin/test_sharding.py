"""What sharding (FSDP) asks of an adapted model, without a second process; `recipes/test_distributed.py` has two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from test_experts import MODELS as EXPERTS
from test_experts import configured
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from cases import MODELS, Case, logits, named, over_cases, over_models, perturb, tokens
from tensorpeft.plugin.experts import ExpertsLayer
from tensorpeft.plugin.layer import TensorLayer

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


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def num_kept(model: nn.Module) -> int:
    layers = [module._cached for module in model.modules() if isinstance(module, TensorLayer)]
    stacks = [kept for module in model.modules() if isinstance(module, ExpertsLayer) for kept in module._kept.values()]
    return sum(kept._entry is not None for kept in [*layers, *stacks])


def sharded_2(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_1(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    policy = fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"), device_mesh=mesh
    )


@pytest.mark.parametrize("shard", [sharded_1, sharded_2])
@pytest.mark.parametrize("case", named("dota", "quanta", "superlora"), ids=lambda case: case.name)
def test_evaluation_keeps_no_weight_that_was_gathered(case: Case, shard, mesh: DeviceMesh):
    """Of the block that runs, a process has the whole weights; kept, they would be those of the whole model."""
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets)).eval()
    perturb(model)
    expected = logits(model)
    assert num_kept(model) > 0
    model.train().eval()
    model = shard(model, mesh)
    with torch.no_grad():
        found = model(input_ids=tokens()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if case.name == "quanta" else 0)
    assert num_kept(model) == 0


def test_evaluation_keeps_no_experts_that_were_gathered(mesh: DeviceMesh):
    model = get_peft_model(EXPERTS[0].fresh(), configured(named("dota")[0], EXPERTS[0])).eval()
    perturb(model)
    expected = logits(model)
    model.train().eval()
    assert torch.equal(logits(sharded_2(model, mesh)), expected)
    assert num_kept(model) == 0
