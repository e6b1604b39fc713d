"""Every method on a GPU: what is exact stays exact, what the CPU computes is computed, moves go through."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from cases import MODELS, Case, Model, logits, over_cases, over_identity_cases, over_merging_cases, perturb, tokens
from tensorpeft import DotaConfig
from tensorpeft.networks.kernels import dither
from tensorpeft.quantization import quantize_residual
from tensorpeft.studies.measure import peak_memory

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

LLAMA, GPT2 = MODELS[:2]
# Of float32 logits of order one: two devices sum in other orders.
TOLERANCE = {"rtol": 0, "atol": 1e-4}
over_bases = pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda model: model.name)


@pytest.fixture(autouse=True)
def float32_products():
    """TF32 off, whatever another test or library has set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def adapted(model: Model, case: Case, device: str = "cuda", **more) -> PeftModel:
    """An adapter made where the model is."""
    config = case.make(target_modules=model.targets, task_type=model.task_type)
    return get_peft_model(model.fresh().to(device=device, **more), config).eval()


def on_gpu(peft_model: nn.Module) -> torch.Tensor:
    return logits(peft_model, tokens().to("cuda"))


def gradients(peft_model: PeftModel, device: str) -> dict[str, torch.Tensor]:
    """Of the trainable parameters, on the CPU."""
    peft_model.zero_grad()
    batch = tokens().to(device)
    peft_model(input_ids=batch, labels=batch).loss.backward()
    return {name: p.grad.to("cpu", copy=True) for name, p in peft_model.named_parameters() if p.grad is not None}


@over_bases
@over_identity_cases
def test_start_and_disabling_are_the_base_model(model: Model, case: Case):
    peft_model, expected = adapted(model, case), on_gpu(model.fresh().to("cuda"))
    assert {parameter.device.type for parameter in peft_model.parameters()} == {"cuda"}
    assert torch.equal(on_gpu(peft_model), expected)
    assert torch.equal(peft_model(input_ids=tokens().to("cuda")).logits, expected)
    perturb_on_gpu(peft_model)
    assert not torch.allclose(on_gpu(peft_model), expected)
    with peft_model.disable_adapter():
        assert torch.equal(on_gpu(peft_model), expected)


def perturb_on_gpu(peft_model: PeftModel) -> None:
    """Move the adapter as `perturb` does, whose generator is the CPU's."""
    perturb(peft_model.to("cpu"))
    peft_model.to("cuda")


@over_bases
@over_cases
def test_outputs_and_gradients_are_the_cpus(model: Model, case: Case):
    peft_model = adapted(model, case, "cpu")
    perturb(peft_model)
    expected, expected_gradients = logits(peft_model), gradients(peft_model, "cpu")
    peft_model.to("cuda")
    found = gradients(peft_model, "cuda")
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)
    torch.testing.assert_close(on_gpu(peft_model.eval()).cpu(), expected, **TOLERANCE)


@over_cases
def test_a_cached_weight_moves_with_the_model(case: Case):
    peft_model = adapted(LLAMA, case, "cpu")
    perturb(peft_model)
    expected = logits(peft_model)
    torch.testing.assert_close(on_gpu(peft_model.to("cuda")).cpu(), expected, **TOLERANCE)
    assert torch.equal(logits(peft_model.to("cpu")), expected)


@over_cases
def test_a_saved_adapter_loads_on_either_device(case: Case, tmp_path):
    peft_model = adapted(LLAMA, case)
    perturb_on_gpu(peft_model)
    expected = on_gpu(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert torch.equal(on_gpu(PeftModel.from_pretrained(LLAMA.fresh().to("cuda"), tmp_path).eval()), expected)
    on_cpu = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, torch_device="cpu").eval()
    assert {tensor.device.type for tensor in on_cpu.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(logits(on_cpu), expected.cpu(), **TOLERANCE)


@over_bases
@over_merging_cases
def test_merging_keeps_the_output_and_unmerging_the_base(model: Model, case: Case):
    peft_model = adapted(model, case)
    perturb_on_gpu(peft_model)
    expected, weights = on_gpu(peft_model), {k: v.clone() for k, v in peft_model.state_dict().items()}
    peft_model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(on_gpu(peft_model), expected, rtol=0, atol=2e-6)
    peft_model.unmerge_adapter()
    assert all(torch.equal(value, weights[key]) for key, value in peft_model.state_dict().items())


@over_cases
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-base", "autocast"])
def test_training_in_bfloat16_lowers_the_loss(case: Case, autocast: bool):
    """A base in bfloat16 as it is, and one in float32 whose products run in bfloat16."""
    peft_model = adapted(LLAMA, case, dtype=torch.float32 if autocast else torch.bfloat16).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, batch, losses = torch.optim.AdamW(trained, lr=case.rate, weight_decay=0), tokens().to("cuda"), []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = peft_model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.slow
@over_cases
def test_a_compiled_step_is_the_eager_one(case: Case):
    torch.compiler.reset()
    peft_model = adapted(LLAMA, case)
    perturb_on_gpu(peft_model)
    expected = gradients(peft_model, "cuda")
    peft_model.compile()
    found = gradients(peft_model, "cuda")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_compiled_weight_is_dithered_as_the_eager_one(dtype: torch.dtype):
    """A compiler that multiplies positions in another type than int32 gives other bits, or none."""
    torch.compiler.reset()
    total = torch.randn(64, 96, device="cuda")
    arguments = total, {torch.bfloat16: 16, torch.float16: 13}[dtype], 3, 70_000
    assert torch.equal(torch.compile(dither)(*arguments), dither(*arguments))


@over_cases
def test_generation_in_a_mixed_batch(case: Case):
    peft_model = adapted(LLAMA, case)
    perturb_on_gpu(peft_model)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens()).to("cuda")}
    prompt = tokens().to("cuda")
    alone = peft_model.generate(input_ids=prompt, **options)
    with peft_model.disable_adapter():
        base = peft_model.generate(input_ids=prompt, **options)
    mixed = peft_model.generate(input_ids=prompt, adapter_names=["default", "__base__", "default"], **options)
    assert torch.equal(mixed, torch.stack([alone[0], base[1], alone[2]]))


@over_bases
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
def test_a_four_bit_residual_trains_and_reloads(model: Model, made_on: str, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = DotaConfig(r=6, num_cores=3, target_modules=model.targets, task_type=model.task_type)
    base = quantize_residual(model.fresh().to(made_on), config).to("cuda")
    base.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-2)
    batch, losses = tokens().to("cuda"), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = peft_model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    expected = on_gpu(peft_model.eval())
    peft_model.save_pretrained(tmp_path / "adapter")
    again = type(base).from_pretrained(tmp_path / "base", device_map={"": 0})
    found = on_gpu(PeftModel.from_pretrained(again, tmp_path / "adapter").eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_peak_of_memory_is_what_was_allocated_for_a_while():
    kept = torch.zeros(2**20, device="cuda")

    def allocate() -> None:
        first = torch.zeros(2**20, device="cuda")  # 4 MiB
        del first
        torch.zeros(2**21, device="cuda").add_(kept[0])  # 8 MiB

    assert peak_memory(allocate, "cuda") == 8 * 2**20
