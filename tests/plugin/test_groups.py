"""What is made for many weights at once gives each weight what it would make alone: outputs, and gradients however they
are asked for.
"""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from cases import CASES, MODELS, Case, logits, perturb, tokens
from tensorpeft.networks.group import Group
from tensorpeft.networks.update import AbstractUpdate

LLAMA = MODELS[0]
GROUPED = [
    case
    for case in CASES
    if case.name in ("dota", "dota-random", "lorta", "lotr", "fact-tk", "metatt-5d", "tenslora", "loretta")
]
OWN = [case for case in GROUPED if case.name in ("dota", "dota-random", "loretta")]
over_own = pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
over_grouped = pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.name)


def adapted(case: Case) -> nn.Module:
    model = get_peft_model(LLAMA.fresh().double(), case.make(target_modules=LLAMA.targets, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    perturb(model)
    return model.train()


def updates(model: nn.Module) -> list[AbstractUpdate]:
    return [module for module in model.modules() if isinstance(module, AbstractUpdate)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: nn.Module, seed: int = 1) -> Tensor:
    batch = tokens(seed=seed)
    return model(input_ids=batch, labels=batch).loss


def expected_gradients(case: Case, *seeds: int) -> dict[str, Tensor]:
    """Those of a model whose updates make what they need alone."""
    model = adapted(case)
    for update in updates(model):
        update.place = None
    for seed in seeds or (1,):
        loss(model, seed).backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def count_makes(monkeypatch) -> list[Group]:
    made: list[Group] = []
    make = Group._make

    def counted(group: Group, *arguments):
        made.append(group)
        return make(group, *arguments)

    monkeypatch.setattr(Group, "_make", counted)
    return made


@over_grouped
def test_weights_of_equal_form_are_in_one_group_and_it_makes_its_parts_once_a_pass(case, monkeypatch):
    model = adapted(case)
    groups = {id(update.place.group) for update in updates(model)}
    assert len(groups) < len(updates(model)) / 2
    made = count_makes(monkeypatch)
    loss(model).backward()
    assert len(made) == len(groups)


@over_grouped
def test_a_backward_pass(case):
    model = adapted(case)
    loss(model).backward()
    assert_gradients(model, expected_gradients(case))


@over_grouped
def test_gradients_add_up_over_several_passes(case):
    model = adapted(case)
    for seed in (1, 2, 3):
        loss(model, seed).backward()
    assert_gradients(model, expected_gradients(case, 1, 2, 3))


@over_grouped
def test_one_backward_pass_of_two_forward_passes(case):
    model = adapted(case)
    (loss(model, 1) + loss(model, 2)).backward()
    assert_gradients(model, expected_gradients(case, 1, 2))


@over_grouped
def test_two_backward_passes_of_one_graph(case):
    model = adapted(case)
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()
    assert_gradients(model, expected_gradients(case, 1, 1))


@over_grouped
def test_two_losses_on_different_layers_are_walked_back_one_after_the_other(case):
    """As LoRA can: none of its layers is in both graphs."""
    model, plain = adapted(case), adapted(case)
    for update in updates(plain):
        update.place = None
    x = torch.randn(2, 24, dtype=torch.float64)
    for one in (model, plain):
        layers = [block.self_attn.q_proj for block in one.get_base_model().model.layers]
        values = [layer(x).square().sum() for layer in layers]
        for value in values:
            value.backward()
    expected = {name: parameter.grad for name, parameter in trained(plain).items()}
    for name, parameter in trained(model).items():
        if expected[name] is None:  # its layer took no part
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


@over_grouped
def test_autograd_grad_of_some_parameters(case):
    model, expected = adapted(case), expected_gradients(case)
    some = dict(list(trained(model).items())[::3])
    found = torch.autograd.grad(loss(model), list(some.values()))
    for name, gradient in zip(some, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in trained(model).values())


@over_grouped
def test_hooks_on_parameters_run_once_with_the_whole_gradient(case):
    model, expected = adapted(case), expected_gradients(case)
    seen: dict[str, list[Tensor]] = {name: [] for name in trained(model)}
    done: list[str] = []
    for name, parameter in trained(model).items():
        parameter.register_hook(lambda gradient, name=name: seen[name].append(gradient.clone()))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: done.append(name))
    loss(model).backward()
    assert sorted(done) == sorted(seen)
    for name, gradients in seen.items():
        assert len(gradients) == 1
        torch.testing.assert_close(gradients[0], expected[name], rtol=1e-9, atol=1e-12)


@over_grouped
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_gradient_checkpointing(case, use_reentrant, passes):
    model, seeds = adapted(case), range(1, passes + 1)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.get_base_model().enable_input_require_grads()
    for seed in seeds:
        loss(model, seed).backward()
    assert_gradients(model, expected_gradients(case, *seeds))


@over_grouped
def test_what_is_written_to_a_tensor_s_data_is_seen_by_the_next_pass(case):
    """By older optimisers, and by averages that are swapped in: such writes leave a tensor's version as it is."""
    model = adapted(case)
    loss(model).backward()
    for parameter in trained(model).values():
        parameter.data.mul_(1.5)
        parameter.grad = None
    loss(model).backward()
    plain = adapted(case)
    for update in updates(plain):
        update.place = None
    for parameter in trained(plain).values():
        parameter.data.mul_(1.5)
    loss(plain).backward()
    assert_gradients(model, {name: parameter.grad for name, parameter in trained(plain).items()})


@over_grouped
def test_an_optimiser_that_steps_within_the_backward_pass(case):
    model, expected = adapted(case), expected_gradients(case)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}

    def step(parameter: nn.Parameter) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in trained(model).values():
        parameter.register_post_accumulate_grad_hook(step)
    loss(model).backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * expected[name], rtol=1e-9, atol=1e-12)


@over_own
def test_a_frozen_layer_gets_no_gradient(case):
    model = adapted(case)
    frozen = updates(model)[::2]
    for update in frozen:
        update.requires_grad_(False)
    loss(model).backward()
    assert all(parameter.grad is None for update in frozen for parameter in update.parameters())
    assert all(parameter.grad is not None for parameter in trained(model).values())


@over_own
def test_a_layer_that_is_trained_from_the_middle_of_a_pass_on_gets_its_gradient(case):
    model = adapted(case)
    first, *others = updates(model)
    last = next(update for update in others if update.place.group is first.place.group)
    last.requires_grad_(False)
    first.pair() if hasattr(first, "pair") else first.cut()
    last.requires_grad_(True)
    parts = last.pair() if hasattr(last, "pair") else last.cut().ready[0]
    sum(part.sum() for part in parts).backward()
    assert all(parameter.grad is not None for parameter in last.parameters())


@over_grouped
def test_two_active_adapters(case):
    model, plain = adapted(case), adapted(case)
    for one in (model, plain):
        torch.manual_seed(1)
        one.add_adapter("second", case.make(target_modules=LLAMA.targets, task_type="CAUSAL_LM"))
        one.double().base_model.set_adapter(["default", "second"])
        perturb(one, seed=5)
    for update in updates(plain):
        update.place = None
    for one in (model, plain):
        loss(one).backward()
    assert any("second" in name for name in trained(model))
    assert_gradients(model, {name: parameter.grad for name, parameter in trained(plain).items()})


@over_grouped
def test_a_functional_call_reads_the_parameters_that_it_is_given(case):
    model, other = adapted(case), adapted(case)
    perturb(other, seed=7)
    logits(model)
    given = {name: parameter.detach() for name, parameter in other.named_parameters()}
    found = torch.func.functional_call(model, given, (), {"input_ids": tokens()}).logits
    torch.testing.assert_close(found, other(input_ids=tokens()).logits, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found, model(input_ids=tokens()).logits)


@over_grouped
def test_a_copied_model_has_groups_of_its_own(case, monkeypatch):
    model = adapted(case)
    loss(model).backward()
    copied = copy.deepcopy(model)
    perturb(copied, seed=11)
    assert {id(update.place.group) for update in updates(model)}.isdisjoint(
        id(update.place.group) for update in updates(copied)
    )
    outputs = [logits(one) for one in (model, copied)]
    assert not torch.equal(*outputs)
    loss(copied)  # from here on its groups know their members
    made = count_makes(monkeypatch)
    loss(copied)
    assert len(made) == len({id(update.place.group) for update in updates(copied)})


@over_own
def test_a_replica_that_stands_in_for_an_update_is_made_from_its_own_tensors(case):
    """As nn.DataParallel makes one for every device; of a module the copies are no parameters."""
    update = updates(adapted(case))[0]
    x = torch.randn(3, 24, dtype=torch.float64)
    update(x)
    replica = update._replicate_for_data_parallel()
    for name, parameter in update._parameters.items():
        setattr(replica, name, 2 * parameter)
    doubled = copy.deepcopy(update)
    for parameter in doubled.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(replica(x), doubled(x), rtol=1e-9, atol=1e-12)


@over_own
def test_a_member_in_another_place_is_made_apart(case, monkeypatch):
    """FSDP leaves the tensors of other blocks sharded, offloading leaves them without data."""
    model, expected = adapted(case), expected_gradients(case)
    away = updates(model)[0]
    kept = {name: parameter.data for name, parameter in away.named_parameters()}
    loss(model)
    blocks = model.get_base_model().model.layers
    handles = [
        blocks[0].register_forward_pre_hook(lambda *_: _bring(away, kept)),
        blocks[0].register_forward_hook(lambda *_: _bring(away, {name: t.new_empty(0) for name, t in kept.items()})),
    ]
    _bring(away, {name: tensor.new_empty(0) for name, tensor in kept.items()})
    assert torch.isfinite(loss(model))
    for handle in handles:
        handle.remove()
    _bring(away, kept)
    loss(model).backward()
    assert_gradients(model, expected)


def _bring(update: AbstractUpdate, tensors: dict[str, Tensor]) -> None:
    for name, parameter in update.named_parameters():
        parameter.data = tensors[name]


def test_nothing_is_kept_in_evaluation_that_training_made():
    model = adapted(CASES[0])
    loss(model)
    groups = {update.place.group for update in updates(model)}
    assert all(group._made is not None for group in groups)
    model.eval()
    assert all(group._made is None for group in groups)


@over_grouped
def test_a_model_that_is_dropped_in_training_mode_leaves_no_memory(case):
    model = adapted(case)
    loss(model).backward()
    parameters = [weakref.ref(parameter) for parameter in trained(model).values()]
    del model
    gc.collect()
    assert not [parameter for parameter in parameters if parameter() is not None]


@over_grouped
def test_an_adapter_that_is_deleted_in_training_mode_leaves_no_memory(case):
    model = adapted(case)
    model.add_adapter("second", case.make(target_modules=LLAMA.targets, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    loss(model.train()).backward()
    parameters = [weakref.ref(parameter) for parameter in trained(model).values()]
    model.set_adapter("default")
    model.delete_adapter("second")
    gc.collect()
    assert parameters
    assert not [parameter for parameter in parameters if parameter() is not None]


@over_own
def test_a_second_derivative_of_a_model_that_is_gone_is_an_error(case):
    model = adapted(case)
    value, parameters = loss(model), list(trained(model).values())
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="an adapter that is gone: keep the model"):
        torch.autograd.grad(value, parameters, create_graph=True)
