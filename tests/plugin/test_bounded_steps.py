"""Steps that are bounded by what they do to the predictions: whatever the rate, on every trainer, saved with a run."""

import math
import os
import socket
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput as Output

from cases import MODELS, Case, over_cases, tokens
from tensorpeft import BoundedSteps, DotaConfig
from tensorpeft.plugin.layer import TensorLayer

LLAMA, CLASSIFIER = MODELS[0], next(model for model in MODELS if model.task_type == "SEQ_CLS")
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "seed": 5, "data_seed": 5}


def adapted(model: Any = LLAMA, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=model.targets, task_type=model.task_type, lora_dropout=dropout)
    return get_peft_model(model.fresh(), config)


def rows(model: Any = LLAMA) -> list[dict[str, Tensor]]:
    inputs = tokens(24, 8)
    # The first three tokens are a prompt; of a classifier, three classes.
    labels = inputs.masked_fill(torch.arange(8) < 3, -100) if model is LLAMA else inputs[:, 0] % 3
    return [{"input_ids": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]


class Watch(TrainerCallback):
    """What every step did, measured anew: the mean divergence over what the loss of the batch is taken on."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.divergences, self.scheduled = trainer, [], []
        step = trainer.training_step

        def remembering(model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
            self.inputs = inputs
            self.before = self.predictions()
            return step(model, inputs, *more)

        trainer.training_step = remembering

    @torch.no_grad()
    def predictions(self) -> Tensor:
        model = self.trainer.model
        was_training = model.training
        logits = model.eval()(input_ids=self.inputs["input_ids"]).logits.double()
        model.train(was_training)
        labels = self.inputs["labels"]
        if logits.dim() == 3:
            logits = torch.stack([logits[r, t] for r, t in zip(*torch.where(labels[:, 1:] != -100), strict=True)])
        return F.log_softmax(logits, dim=-1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = self.predictions()
        self.divergences.append(F.kl_div(after, self.before, reduction="batchmean", log_target=True).item())
        self.scheduled.append(kwargs["optimizer"].param_groups[0]["lr"])


def train(
    model: nn.Module,
    folder: Any,
    *callbacks: TrainerCallback,
    data: Any = LLAMA,
    resume: str | None = None,
    **more: Any,
) -> tuple[Trainer, Watch]:
    values = {"max_steps": 30, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**QUIET, **values, **more})
    trainer = Trainer(model, arguments, train_dataset=rows(data))
    watch = Watch(trainer)
    for callback in (*callbacks, watch):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("data", [LLAMA, CLASSIFIER], ids=["llama", "classifier"])
@pytest.mark.parametrize("rate", [0.1, 1.0, 30.0])
def test_no_step_is_far_above_the_bound_whatever_the_rate(rate: float, data: Any, tmp_path):
    bound = BoundedSteps(max_kl=1e-4, first_steps=30)
    _, free = train(adapted(data), tmp_path, data=data, learning_rate=rate)
    trainer, bounded = train(adapted(data), tmp_path, bound, data=data, learning_rate=rate)
    assert max(free.divergences) > 1e-3
    assert max(bounded.divergences) <= 4e-4 * 1.001
    assert median(bounded.divergences[10:]) <= 1.5e-4  # it looks back
    assert 0 < bound.scale < 1
    assert trainer.state.log_history[-2]["rate_scale"] == bound.scale


def test_what_is_measured_is_the_divergence_of_the_step(tmp_path):
    bound = BoundedSteps(max_kl=1e6, first_steps=30)
    _, watch = train(adapted(), tmp_path, bound, learning_rate=0.01, lr_scheduler_type="constant")
    last = watch.divergences[-5:]
    assert bound.scale == 1
    assert bound.curvatures == pytest.approx([each / 0.01**2 for each in last], rel=1e-2)


def test_a_rate_that_is_low_enough_trains_as_without_a_bound(tmp_path):
    """To the last bit, dropout included."""
    plain, bounded = adapted(dropout=0.1), adapted(dropout=0.1)
    train(plain, tmp_path, learning_rate=1e-4)
    train(bounded, tmp_path, BoundedSteps(max_kl=10), learning_rate=1e-4)
    assert_same(trained(bounded), trained(plain))


def test_the_schedule_and_the_model_are_left_as_they_are(tmp_path):
    model = adapted()
    frozen = model.base_model.model.model.embed_tokens
    frozen.eval()
    plain = train(adapted(), tmp_path, learning_rate=1.0, warmup_steps=5)[1]
    trainer, watch = train(model, tmp_path, BoundedSteps(1e-4), learning_rate=1.0, warmup_steps=5)
    assert watch.scheduled == plain.scheduled
    assert not model._forward_pre_hooks
    assert trainer.state.global_step == 30


def test_another_run_starts_anew(tmp_path):
    bound, models = BoundedSteps(1e-3), (adapted(), adapted())
    for model in models:
        train(model, tmp_path, bound, learning_rate=1.0)
    assert_same(trained(models[1]), trained(models[0]))


def test_a_run_that_is_gone_on_with_is_the_whole_one(tmp_path):
    more = {"learning_rate": 1.0, "save_strategy": "steps", "save_steps": 13, "max_steps": 30}
    whole, part = adapted(), adapted()
    train(whole, tmp_path / "whole", BoundedSteps(1e-3), **more)
    bound = BoundedSteps(1e-3)
    train(part, tmp_path / "part", bound, resume=str(tmp_path / "whole/checkpoint-13"), **more)
    assert_same(trained(part), trained(whole))
    assert bound.scale < 1


def test_batches_without_a_prediction_say_nothing(tmp_path):
    """Their steps are taken, and what others said holds."""

    class Emptied(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                known.extend(bound.curvatures)
            if state.global_step >= 6:
                bound._inputs["labels"] = torch.full_like(bound._inputs["labels"], -100)

    bound, known = BoundedSteps(1e-4, first_steps=30), list[float]()
    _, watch = train(adapted(), tmp_path, Emptied(), bound, learning_rate=1.0, max_steps=12)
    assert len(known) == 5
    assert bound.curvatures == known
    assert 0 < bound.scale < 1
    assert min(watch.divergences) > 0


def test_a_step_to_what_is_no_number_is_not_taken(tmp_path):
    """A parameter that a step makes infinite: nothing of it stays, and the rate falls."""

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                group = kwargs["optimizer"].param_groups[0]
                group["lr"] = math.inf

    model = adapted()
    before = trained(model)
    # Before the bound, which gives back the rate that it finds.
    _, watch = train(model, tmp_path, BoundedSteps(0.01), Overflow(), learning_rate=1e-2, max_steps=8)
    after = trained(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert watch.divergences[3] == 0
    assert any(not torch.equal(after[name], before[name]) for name in before)


class Padded(nn.Module):
    """A model whose vocabulary has entries that no text has: their logits are minus infinity."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> Any:
        found = self.model(input_ids=input_ids, labels=labels, **more)
        absent = torch.arange(found.logits.shape[-1]) >= 90
        found.logits = found.logits.masked_fill(absent, -math.inf)
        return found


def test_what_is_impossible_before_and_after_a_step_adds_nothing(tmp_path):
    model = adapted()
    before = trained(model)
    bound = BoundedSteps(0.01)
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**QUIET, "max_steps": 12, "save_strategy": "no"})
    Trainer(Padded(model), arguments, train_dataset=rows(), callbacks=[bound]).train()
    assert all(math.isfinite(value) for value in bound.curvatures)
    assert bound.scale == 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained(model).items())


class Broken(TrainerCallback):
    """At a step the gradients, or before it the parameters, are no numbers."""

    def __init__(self, of: str) -> None:
        self.of = of

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        *_, parameter = (p for p in kwargs["model"].parameters() if p.requires_grad)  # behind all attention
        (parameter.data if self.of == "predictions" else parameter.grad).fill_(math.nan)


@pytest.mark.parametrize("of", ["predictions", "gradients"])
def test_a_step_from_which_none_leads_out_is_refused(of: str, tmp_path):
    with pytest.raises(ValueError, match=f"the {of} of this step are no finite numbers"):
        train(adapted(), tmp_path, Broken(of), BoundedSteps(0.01))


def test_no_weight_is_kept_when_a_step_is_looked_at(tmp_path, monkeypatch):
    model = get_peft_model(LLAMA.fresh(), DotaConfig(target_modules=LLAMA.targets, task_type=LLAMA.task_type, r=4))
    layers = [module for module in model.modules() if isinstance(module, TensorLayer)]
    kept, look = [], BoundedSteps._predictions

    def watched(bound: BoundedSteps, model: nn.Module) -> Tensor:
        handle = model.register_forward_hook(lambda *_: kept.extend(layer._cached._entry for layer in layers))
        try:
            return look(bound, model)
        finally:
            handle.remove()

    monkeypatch.setattr(BoundedSteps, "_predictions", watched)
    train(model, tmp_path, BoundedSteps(0.01), max_steps=2)
    assert len(kept) >= 4 * len(layers)
    assert set(kept) == {None}


@over_cases
def test_every_method_is_bounded(case: Case, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets, task_type="CAUSAL_LM"))
    bound = BoundedSteps(max_kl=1e-6, first_steps=6)
    _, watch = train(model, tmp_path, bound, learning_rate=1.0, max_steps=6)
    assert max(watch.divergences) <= 4e-6 * 1.01
    assert 0 < bound.scale < 1


def _train_in_one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    model, bound = adapted(), BoundedSteps(max_kl=1e-4)
    train(model, f"{folder}/{rank}", bound, learning_rate=1.0, per_device_train_batch_size=2)
    torch.save({"scale": torch.tensor(bound.scale), **trained(model)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.thorough
def test_two_processes_shorten_alike(tmp_path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    mp.spawn(_train_in_one_of_two, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(second, first)
    assert 0 < first["scale"] < 1


class Shifted(nn.Module):
    """Its logits are these, and a number more for the label, or class, 1."""

    def __init__(self, logits: Tensor, problem_type: str | None) -> None:
        super().__init__()
        self.logits, self.config = logits, SimpleNamespace(problem_type=problem_type)
        self.number = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = self.logits.clone()
        logits[:, 1] += self.number
        return Output(loss=-30 * self.number, logits=logits)


@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_labels_that_exclude_nothing_and_classes_of_pixels(problem: str | None, tmp_path):
    """Of a softmax over labels, or over an image's width, a shift of all of them is nothing."""
    torch.manual_seed(0)
    logits = torch.randn(2, 2) if problem else torch.randn(2, 3, 4, 4)
    model, bound = Shifted(logits, problem), BoundedSteps(max_kl=1e-3, first_steps=30)
    labels = torch.ones(2) if problem else torch.zeros(4, 4, dtype=torch.long)
    data = [{"input_ids": torch.ones(3), "labels": labels} for _ in range(2)]
    values = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 3.0}
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**QUIET, **values})
    Trainer(model, arguments, train_dataset=data, callbacks=[bound]).train()
    after = model().logits.detach()
    if problem:
        before, after = (torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1) for z in (logits, after))
    else:
        before, after = (z.movedim(1, -1).log_softmax(-1) for z in (logits, after))
    divergence = F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean().item()
    assert 1e-4 < divergence <= 4e-3 * 1.001


def test_an_encoder_decoder_may_get_labels_alone(tmp_path):
    sizes = {"vocab_size": 96, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"]))
    data = [{"input_ids": torch.arange(2, 9), "labels": torch.arange(3, 8)} for _ in range(4)]
    bound = BoundedSteps(max_kl=1e-6)
    values = {"max_steps": 3, "save_strategy": "no", "learning_rate": 0.1}
    Trainer(
        model, TrainingArguments(output_dir=str(tmp_path), **{**QUIET, **values}), train_dataset=data, callbacks=[bound]
    ).train()
    assert 0 < bound.scale < 1


class Mute(nn.Module):
    """A model that tells a loss, and what it is made with."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.weight, self.outputs = nn.Parameter(torch.ones(1)), outputs

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return Output(loss=(self.weight * input_ids.float().mean()).sum(), **self.outputs)


class ByPosition(Trainer):
    """A Trainer whose user calls the model in another way."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *more: Any, **options: Any) -> Any:
        return model(inputs["input_ids"]).loss


class Regression(Trainer):
    """Of several numbers."""

    def __init__(self, model: Any, *more: Any, **options: Any) -> None:
        model.config = SimpleNamespace(problem_type="regression")
        super().__init__(model, *more, **options)


@pytest.mark.parametrize(
    ("trainer", "outputs", "message"),
    [
        (Trainer, {}, r"output has no logits\. Train it without the bound"),
        (Trainer, {"logits": torch.ones(4, 1)}, r"output has one logit, no probabilities\. Train it without the bound"),
        (
            Regression,
            {"logits": torch.ones(4, 3)},
            r"output has numbers \(problem_type='regression'\), no probabilities",
        ),
        (ByPosition, {"logits": torch.ones(4, 2)}, "no batch was seen: expected the model to be called with arguments"),
    ],
)
def test_what_cannot_be_measured(trainer: type[Trainer], outputs: dict[str, Tensor], message: str, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**QUIET, "max_steps": 2, "save_strategy": "no"})
    with pytest.raises(ValueError, match=message):
        trainer(Mute(**outputs), arguments, train_dataset=rows(), callbacks=[BoundedSteps()]).train()


def test_shards_are_refused(tmp_path):
    state = SimpleNamespace(global_step=0, stateful_callbacks=None)
    with pytest.raises(ValueError, match=r"the model is in shards \(FSDP, DeepSpeed\)"):
        BoundedSteps().on_train_begin(SimpleNamespace(deepspeed_plugin=object()), state, None, model=adapted())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(adapted(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="or without the bound"):
            BoundedSteps().on_train_begin(SimpleNamespace(deepspeed_plugin=None), state, None, model=model)
    finally:
        dist.destroy_process_group()


def test_wrong_arguments():
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match=r"max_kl=\S+: expected nats above 0"):
            BoundedSteps(wrong)
    with pytest.raises(ValueError, match=r"first_steps=-1, every=10: expected at least 0 and at least 1"):
        BoundedSteps(first_steps=-1)
    with pytest.raises(ValueError, match="every=0"):
        BoundedSteps(every=0)
