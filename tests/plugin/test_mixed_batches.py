"""Many adapters in one batch: factors gathered per row give what each adapter gives alone."""

import pytest
import torch
from peft import get_peft_model

from cases import CASES, MODELS, Case, Model, logits, over_models, perturb, tokens
from tensorpeft.networks.update import AbstractLowRankUpdate, stacked_factors

LOW_RANK = [case for case in CASES if case.name.startswith(("lorta", "lotr", "fact"))]
NAMES = ["default", "b", "c", "d", "e"]


def with_five_adapters(model: Model, case: Case):
    config = case.make(target_modules=model.targets, task_type=model.task_type)
    peft_model = get_peft_model(model.fresh(), config).eval()
    for name in NAMES[1:]:
        peft_model.add_adapter(name, case.make(target_modules=model.targets, task_type=model.task_type))
    for seed, name in enumerate(NAMES):
        peft_model.set_adapter(name)
        perturb(peft_model, seed)
    return peft_model


@over_models
@pytest.mark.parametrize("case", LOW_RANK, ids=lambda case: case.name)
def test_rows_of_five_adapters_and_the_base(model: Model, case: Case):
    peft_model = with_five_adapters(model, case)
    layer = next(module for module in peft_model.modules() if hasattr(module, "base_layer"))
    assert stacked_factors([layer.updates[name] for name in NAMES]) is not None
    rows = ["c", "__base__", "default", "e", "b", "c", "d"]
    inputs = tokens(batch=len(rows))
    mixed = logits(peft_model, inputs, adapter_names=rows)
    for k, name in enumerate(rows):
        if name == "__base__":
            with peft_model.disable_adapter():
                expected = logits(peft_model, inputs[k : k + 1])
        else:
            peft_model.set_adapter(name)
            expected = logits(peft_model, inputs[k : k + 1])
        torch.testing.assert_close(mixed[k : k + 1], expected, atol=1e-5, rtol=1e-5)


def test_a_changed_factor_is_seen():
    peft_model = with_five_adapters(MODELS[0], LOW_RANK[0])
    inputs = tokens(batch=5)
    before = logits(peft_model, inputs, adapter_names=NAMES)
    peft_model.set_adapter("c")
    perturb(peft_model, seed=11)
    after = logits(peft_model, inputs, adapter_names=NAMES)
    changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert changed == [False, False, True, False, False]


def test_adapters_of_different_ranks_are_not_stacked():
    model, case = MODELS[0], LOW_RANK[0]
    peft_model = with_five_adapters(model, case)
    peft_model.add_adapter("f", case.make(target_modules=model.targets, r=2))
    layer = next(module for module in peft_model.modules() if hasattr(module, "base_layer"))
    updates = [layer.updates[name] for name in ("default", "f")]
    assert all(isinstance(update, AbstractLowRankUpdate) for update in updates)
    assert stacked_factors(updates) is None
    assert logits(peft_model, tokens(batch=6), adapter_names=[*NAMES, "f"]).isfinite().all()
