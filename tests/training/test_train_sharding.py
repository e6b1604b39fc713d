"""What `tensorpeft train` refuses of FSDP, and what it changes; the runs are in `recipes/test_distributed.py`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("omegaconf")
from torch.distributed.fsdp import MixedPrecisionPolicy

from tensorpeft.tasks.registry import find_task
from tensorpeft.training.recipe import DataRecipe, Recipe
from tensorpeft.training.sharding import prepare_sharding

TASK = find_task("instructions")
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def trainer(dtype=torch.bfloat16, precision="bf16", is_sharded=True, **more):
    """What of a Trainer is asked: a frozen matrix of this dtype, a trained one in float32, accelerate's plugin."""
    model = nn.Module()
    model.frozen = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
    model.core = nn.Parameter(torch.zeros(2, 2))
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "mixed_precision_policy": POLICY, **more}
    plugin = SimpleNamespace(**{"state_dict_type": "StateDictType.FULL_STATE_DICT", **plugin})
    accelerator = SimpleNamespace(mixed_precision=precision, state=SimpleNamespace(fsdp_plugin=plugin))
    arguments = SimpleNamespace(fsdp=True, device=torch.device("cpu"))
    return SimpleNamespace(args=arguments, is_fsdp_enabled=is_sharded, accelerator=accelerator, model=model)


def recipe(adapter):
    return Recipe(model="x", task="instructions", data=DataRecipe(train="x.json", validation=2), adapter=adapter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_sharded": False}, "shards on GPUs alone"),
        ({"fsdp_version": 1}, "fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, "FULL_STATE_DICT"),
        ({"dtype": torch.float32}, "model_arguments.dtype=bfloat16, or trainer.bf16=false"),
    ],
)
def test_what_would_lose_the_adapter_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_sharding(trainer(**arguments), recipe({"method": "dota"}), TASK)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_an_adapter_is_gathered_as_it_is(dtype, precision):
    asked = trainer(dtype, precision)
    prepare_sharding(asked, recipe({"method": "dota"}), TASK)
    assert asked.accelerator.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy()


def test_where_all_weights_are_trained_mixed_precision_is_fsdp_s():
    asked = trainer(torch.float32)
    prepare_sharding(asked, recipe(None), TASK)
    assert asked.accelerator.state.fsdp_plugin.mixed_precision_policy is POLICY
