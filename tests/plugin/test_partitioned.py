"""Weights that ZeRO-3 has partitioned, without DeepSpeed: what its parameters look like, and what gathers them."""

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from cases import CASES, MODELS, Case, over_cases, over_merging_cases, tokens
from tensorpeft.networks.update import SharedFactors

GPT2, BERT = MODELS[1:]


@pytest.fixture
def partition(monkeypatch):
    """A function that partitions all weights of a model: a parameter then has no elements, and a `ds_shape`."""
    whole = {}

    @contextmanager
    def gathered(parameters):
        for parameter in parameters:
            parameter.data = whole[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    def take_apart(model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            whole[parameter], parameter.ds_shape = parameter.data, parameter.shape
            parameter.data = torch.empty(0)
        return model

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    return take_apart


def adapt(base: nn.Module, case: Case, model=GPT2) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(base, case.make(target_modules=model.targets))


@over_cases
@pytest.mark.parametrize("model", [GPT2, BERT], ids=lambda model: model.name)
def test_a_new_adapter_is_that_of_the_whole_weights(case: Case, model, partition):
    found = adapt(partition(model.fresh()), case, model).state_dict()
    expected = adapt(model.fresh(), case, model).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if "base_layer" in key:
            assert not found[key].numel()  # partitioned again
        elif "_update" in key:
            assert torch.equal(found[key], tensor)


def test_an_adapter_of_another_base_is_refused(partition, tmp_path):
    torch.manual_seed(9)
    adapt(GPT2.build(), CASES[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="started from another base model"):
        PeftModel.from_pretrained(partition(GPT2.fresh()), tmp_path)


@over_cases
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_of_shared_factors_that_come_more_than_once_are_refused(case: Case, use_reentrant: bool):
    model = adapt(BERT.fresh(), case, BERT).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    shared = [module for module in model.modules() if isinstance(module, SharedFactors)]
    trained = [parameter for module in shared for parameter in module.parameters()]
    for parameter in trained:
        parameter.ds_id = 0
    output = model(input_ids=tokens()).logits.sum()
    with pytest.raises(ValueError, match="use_reentrant") if use_reentrant and trained else nullcontext():
        output.backward()


@over_merging_cases
def test_nothing_is_merged(case: Case, partition):
    model = adapt(partition(GPT2.fresh()), case)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="merge it into a model that is loaded without ZeRO-3"):
            merge()
