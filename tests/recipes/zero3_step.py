"""One step of every method with ZeRO-3 against the same step in one process; started by `test_distributed.py`.

All tensors are partitioned, those that are trained too, whatever their size.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import CASES, MODELS, Case, perturb, tokens

LLAMA = MODELS[0]
RATE = 0.1
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def adapted(base: nn.Module, case: Case) -> nn.Module:
    torch.manual_seed(3)
    model = get_peft_model(base, case.make(target_modules=LLAMA.targets)).train()
    perturb(model)
    return model


def loss(model: nn.Module, rank: int) -> Tensor:
    batch = tokens(batch=1, seed=rank)
    return model(input_ids=batch, labels=batch).loss


def expected_step(case: Case) -> dict[str, Tensor]:
    model = adapted(LLAMA.fresh(), case)
    (0.5 * (loss(model, 0) + loss(model, 1))).backward()
    return {name: p.detach() - RATE * p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_step(case: Case, checkpointing: bool) -> None:
    base = LLAMA.fresh()
    deepspeed.zero.Init(module=base, config_dict_or_path=SETTINGS)
    assert not base.model.layers[0].self_attn.q_proj.weight.numel()
    model = adapted(base, case)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    engine.backward(loss(engine, dist.get_rank()))
    engine.step()
    for name, expected in expected_step(case).items():
        with deepspeed.zero.GatheredParameters([trained[name]]):
            torch.testing.assert_close(trained[name].data, expected, rtol=1e-4, atol=1e-5, msg=f"{case.name}: {name}")


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for one in CASES:
        for with_checkpoints in (False, True):
            check_step(one, with_checkpoints)
