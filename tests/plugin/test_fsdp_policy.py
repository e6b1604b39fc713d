"""PEFT's policy of what FSDP wraps on its own can look at every module of an adapted model."""

from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy

from cases import over_cases, over_models


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
