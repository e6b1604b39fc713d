"""Two processes hold the mean of their gradients, whoever computes activations again."""

import copy
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cases import CASES, Case, perturb, tiny_gpt2, tiny_llama, tokens
from tensorpeft import LotrConfig, initialize_from_gradients
from tensorpeft.networks.update import SharedFactors


def adapted(case: Case, fused: bool = False, **more: Any) -> PeftModel:
    torch.manual_seed(0)
    base = tiny_gpt2() if fused else tiny_llama(hidden_size=16, num_hidden_layers=3)
    targets = ["c_attn"] if fused else ["q_proj", "k_proj", "up_proj"]
    for dropout in (module for module in base.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    model = get_peft_model(base, case.make(target_modules=targets, **more))
    perturb(model)
    return model.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: nn.Module, rank: int) -> Tensor:
    batch = tokens(batch=1, seed=rank)
    return model(input_ids=batch, labels=batch).loss


def check_mean(case: Case, use_reentrant: bool, static: bool = False, **more: Any) -> None:
    model, plain = adapted(case, **more), adapted(case, **more)
    (0.5 * (loss(plain, 0) + loss(plain, 1))).backward()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    parallel = DistributedDataParallel(model, static_graph=static)
    for _ in range(1 + static):  # a static graph is learnt in the first pass
        model.zero_grad()
        value = loss(parallel, dist.get_rank())
        with torch.no_grad():
            loss(model, 0)  # an evaluation in between, of the model alone
        value.backward()
        for name, parameter in trained(model).items():
            torch.testing.assert_close(
                parameter.grad,
                trained(plain)[name].grad,
                rtol=1e-3,
                atol=1e-5,
                msg=lambda text, name=name: f"{case.name} {name}, {use_reentrant=}, {static=}: {text}",
            )


def check_accumulation(case: Case) -> None:
    """Nothing is averaged in a pass that does not synchronise, all of it in the next one."""
    model, plain = adapted(case), adapted(case)
    (loss(plain, 0) + loss(plain, 1)).backward()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        loss(parallel, dist.get_rank()).backward()
    loss(parallel, dist.get_rank()).backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, trained(plain)[name].grad, rtol=1e-3, atol=1e-5)


class Nested(nn.Module):
    """Checkpoints, each of two checkpointed layers and one that is not."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3 * count))

    def forward(self, x: Tensor) -> Tensor:
        for first in range(0, len(self.layers), 3):
            x = checkpoint(self.three_layers, x, first, use_reentrant=True)
        return x

    def three_layers(self, x: Tensor, first: int) -> Tensor:
        for layer in self.layers[first : first + 2]:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.layers[first + 2](x)


def check_refusal() -> None:
    for count in (1, 2):
        config = LotrConfig(r=2, target_modules=r"layers\..*")
        parallel = DistributedDataParallel(get_peft_model(Nested(count), config))
        with pytest.raises(ValueError, match="would average only the first gradient"):
            parallel(torch.randn(2, 8, requires_grad=True)).sum().backward()


def check_frames() -> None:
    """Frames of the gradients' sum, the same in both processes."""
    fields = {"r": 3, "train": "cores", "target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(0)
    base = tiny_llama(hidden_size=16, num_hidden_layers=3)
    batches = [{"input_ids": batch, "labels": batch} for batch in (tokens(batch=1, seed=rank) for rank in range(2))]
    here, alone = (get_peft_model(copy.deepcopy(base), LotrConfig(**fields)) for _ in range(2))
    initialize_from_gradients(here, [batches[dist.get_rank()]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        initialize_from_gradients(alone, batches)
    assert here.peft_config["default"].gradient_start == {"batches": 2, "rows": 2, "seed": 0}
    for (name, tensor), (_, twin) in zip(here.state_dict().items(), alone.state_dict().items()):
        if name.endswith(("_U", "_V")):
            torch.testing.assert_close(tensor @ tensor.t(), twin @ twin.t(), atol=1e-3, rtol=0, msg=name)
            both = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(both, tensor.contiguous())
            assert torch.equal(*both), name


def check_process(rank: int, port: int, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case in cases:
        for use_reentrant in (False, True):
            check_mean(case, use_reentrant)
        if any(isinstance(module, SharedFactors) for module in adapted(case).modules()):
            check_mean(case, use_reentrant=True, static=True)
            check_mean(case, use_reentrant=True, modules_to_save=["lm_head"])
            for use_reentrant in (False, True):
                check_mean(case, use_reentrant, fused=True)
            check_accumulation(case)
    check_refusal()
    check_frames()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "names", [("lorta", "fact-tt"), pytest.param(None, marks=pytest.mark.thorough)], ids=["two", "all"]
)
def test_processes_average_the_whole_gradients(names):
    cases = [case for case in CASES if names is None or case.name in names]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    # Forked: two processes that import everything anew would take longer than all that they check.
    mp.start_processes(check_process, (port, cases), nprocs=2, start_method="fork")
