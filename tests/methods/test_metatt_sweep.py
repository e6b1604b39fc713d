"""MetaTT's ranks while it trains: what a cut loses, what it leaves of optimiser, schedule and checkpoints."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from cases import MODELS, logits, perturb, tokens
from tensorpeft import LortaConfig, MetaTtConfig, MetaTtSweep
from tensorpeft.methods.metatt_sweep import cut_ranks
from tensorpeft.networks.train_slices import TrainFactors, round_train
from tensorpeft.plugin.layer import TensorLayer

LLAMA = MODELS[0]
over_variants = pytest.mark.parametrize("variant", ["4d", "5d"])


def dense(cores: list[Tensor]) -> np.ndarray:
    """The tensor of a train, by einsum."""
    letters = "abcdefghijk"
    terms = [f"{letters[k]}{'vwxyz'[k]}{letters[k + 1]}" for k in range(len(cores))]
    return np.einsum(f"{','.join(terms)}->{'vwxyz'[: len(cores)]}", *(core.double().numpy() for core in cores))


def unfolding_errors(tensor: np.ndarray, rank: int) -> list[float]:
    """Of the best approximation with one bond of that rank and all others free, for every bond."""
    sizes = [int(np.prod(tensor.shape[: k + 1])) for k in range(tensor.ndim - 1)]
    values = [np.linalg.svd(tensor.reshape(size, -1), compute_uv=False) for size in sizes]
    return [float(np.sqrt((found[rank:] ** 2).sum())) for found in values]


def badly_scaled_train() -> list[Tensor]:
    """Directions that a core makes large are made small by the next: what a core keeps says little of the tensor."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 9, 6), (6, 5, 6), (6, 4, 6), (6, 3, 6), (6, 8, 1)]
    cores = [torch.randn(shape, generator=generator) for shape in shapes]
    scale = torch.logspace(2, -2, 6)
    for k in range(4):
        cores[k], cores[k + 1] = cores[k] * scale, cores[k + 1] / scale[:, None, None]
    return cores


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_a_cut_loses_little_more_than_the_best_one(rank: int):
    cores = badly_scaled_train()
    tensor, cut = dense(cores), round_train(cores, rank)
    assert [core.shape[2] for core in cut[:-1]] == [rank] * 4
    error, best = np.linalg.norm(dense(cut) - tensor), unfolding_errors(tensor, rank)
    assert max(best) * (1 - 1e-9) <= error <= np.sqrt(sum(each**2 for each in best)) * (1 + 1e-9)
    norms = [core.norm().item() for core in cut]
    assert max(norms) == pytest.approx(min(norms))


def test_a_cut_to_the_rank_that_it_has_changes_nothing():
    cores = badly_scaled_train()
    padded = [torch.nn.functional.pad(core, (0, 3 * (k < 4), 0, 0, 0, 3 * (k > 0))) for k, core in enumerate(cores)]
    cut = round_train(padded, 6)
    np.testing.assert_allclose(dense(cut), dense(cores), rtol=0, atol=1e-9)


def adapted(variant: str = "4d", r: int = 4, **more: Any) -> PeftModel:
    torch.manual_seed(3)
    config = MetaTtConfig(r=r, variant=variant, target_modules=LLAMA.targets, task_type="CAUSAL_LM", **more)
    return get_peft_model(LLAMA.fresh(), config)


def factors_of(model: torch.nn.Module) -> TrainFactors:
    return next(module for module in model.modules() if isinstance(module, TrainFactors))


def deltas(model: torch.nn.Module) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, TensorLayer)]
    return torch.cat([layer.get_delta_weight("default").flatten() for layer in layers]).detach()


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@over_variants
def test_a_cut_adapter_is_a_smaller_one(variant: str, tmp_path):
    model = adapted(variant, r=6).eval()
    perturb(model)
    before, size = deltas(model), model.get_nb_trainable_parameters()[0]
    assert cut_ranks(model, 3)
    factors, bonds = factors_of(model), model.peft_config["default"].bonds
    assert set(bonds) == set(factors.sizes)
    assert all(max(factors.bonds(name)) <= 3 and bonds[name] == factors.bonds(name) for name in bonds)
    assert model.get_nb_trainable_parameters()[0] < size / 1.8
    lost = (deltas(model) - before).norm() / before.norm()
    assert 1e-3 < lost < 1
    assert not cut_ranks(model, 3)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].bonds == bonds
    model.add_adapter("second", MetaTtConfig(r=2, variant=variant, target_modules=LLAMA.targets))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.set_adapter("sum", inference_mode=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    # What has been cut stays so: no bond is padded to the largest.
    assert model.peft_config["sum"].bonds == {name: [bond + 2 for bond in found] for name, found in bonds.items()}


def test_a_zero_core_is_refused():
    model = adapted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"24x24: a core of this train is still zero.*Sweep after"):
        cut_ranks(model, 2)
    assert model.peft_config["default"].bonds is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bonds_of_another_variant_are_refused():
    with pytest.raises(ValueError, match=r"bonds\['24x24'\]=\[2, 2\]: expected 3, one between each two"):
        adapted(bonds={"24x24": [2, 2]})
    with pytest.raises(ValueError, match=r"bonds\['24x24'\]=0: expected a whole number of at least 1"):
        MetaTtConfig(bonds={"24x24": [2, 0, 1]})


# --- in a Trainer

ROWS = [{"input_ids": row, "labels": row} for row in tokens(batch=2)] * 6


def trainer_of(model: PeftModel, folder: Any, sweep: MetaTtSweep | None, **more: Any) -> Trainer:
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "warmup_steps": 1,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }
    callbacks = [] if sweep is None else [sweep]
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=ROWS, callbacks=callbacks)


def test_training_goes_on_with_the_smaller_cores(tmp_path):
    model = adapted()
    trainer = trainer_of(model, tmp_path, MetaTtSweep({1: 3, 4: 2}))
    trainer.train()
    factors = factors_of(model)
    assert {bond for name in factors.sizes for bond in factors.bonds(name)} == {2}
    optimizer = trainer.optimizer
    assert optimizer is not None
    in_groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in trained_parameters(model)}
    assert {id(p) for p in optimizer.state} == {id(p) for p in in_groups}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert state["step"] == 2  # since the last cut
    plain = trainer_of(adapted(), tmp_path / "plain", None)
    plain.train()
    rates = [[row["learning_rate"] for row in each.state.log_history if "loss" in row] for each in (trainer, plain)]
    assert rates[0] == rates[1]
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_a_cut_waits_until_no_core_is_zero(tmp_path):
    """The rate of the first step is 0 in a warm-up."""
    model = adapted()
    trainer_of(model, tmp_path, MetaTtSweep({1: 3}), max_steps=1).train()
    assert model.peft_config["default"].bonds is None
    trainer_of(model, tmp_path, MetaTtSweep({1: 3}), max_steps=2).train()
    assert set(model.peft_config["default"].bonds["24x24"]) == {3}


def test_epochs_count_too(tmp_path):
    model = adapted()
    trainer_of(model, tmp_path, MetaTtSweep({1: 2}, unit="epochs"), max_steps=6).train()  # of 6 steps
    assert set(model.peft_config["default"].bonds["24x24"]) == {2}


def test_training_is_resumed_after_a_cut(tmp_path):
    sweep = MetaTtSweep({3: 2})
    whole = adapted()
    trainer_of(whole, tmp_path, sweep).train()
    checkpoint = tmp_path / "checkpoint-4"
    resumed = PeftModel.from_pretrained(LLAMA.fresh(), checkpoint, is_trainable=True)
    trainer_of(resumed, tmp_path / "resumed", sweep).train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(logits(resumed.eval()), logits(whole.eval()), rtol=1e-5, atol=1e-6)


def test_resuming_with_the_larger_ranks_is_refused(tmp_path):
    sweep = MetaTtSweep({3: 2})
    trainer_of(adapted(), tmp_path, sweep).train()
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"G1 is \(24, 2\) in the checkpoint, expected \(24, 4\) .*bonds"):
        trainer_of(model, tmp_path / "resumed", sweep).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_could_not_go_on_is_refused_when_training_begins():
    sweep, model = MetaTtSweep({1: 2}), adapted()

    def begin(model: torch.nn.Module, **more: Any) -> None:
        args = SimpleNamespace(parallel_mode=ParallelMode.NOT_PARALLEL, load_best_model_at_end=False)
        sweep.on_train_begin(SimpleNamespace(**{**vars(args), **more}), None, None, model=model)

    begin(model)
    other = get_peft_model(LLAMA.fresh(), LortaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no MetaTT adapter of this model is trained"):
        begin(other)
    with pytest.raises(ValueError, match="no MetaTT adapter of this model is trained"):
        cut_ranks(other, 2)
    with pytest.raises(ValueError, match="several processes"):
        begin(model, parallel_mode=ParallelMode.DISTRIBUTED)
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        begin(model, load_best_model_at_end=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), r"ranks={}: expected at least one cut"),
        (({0: 2},), r"steps=0: expected a whole number of at least 1"),
        (({5: 0},), r"ranks=0: expected a whole number of at least 1"),
        (({5: 2, 9: 3},), r"ranks={5: 2, 9: 3}: expected ranks that fall"),
        (({5: 2}, "tokens"), r"unit='tokens': expected \"steps\" or \"epochs\""),
    ],
)
def test_impossible_schedule(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=message):
        MetaTtSweep(*arguments)
