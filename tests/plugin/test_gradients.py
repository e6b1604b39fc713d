"""Frames from the gradient: where its energy is, and a start that is the base model bit for bit."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from tensorly import tt_to_tensor, tucker_to_tensor
from tensorly.decomposition import tensor_train, tucker
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cases import MODELS, Model, logits, perturb, tiny_llama, tokens
from tensorpeft import (
    DotaConfig,
    FactConfig,
    FloraConfig,
    LorettaConfig,
    LortaConfig,
    LotrConfig,
    MetaTtConfig,
    NolaConfig,
    TensLoraConfig,
    initialize_from_gradients,
)
from tensorpeft.networks.sketch import Sketch, exact
from tensorpeft.plugin.gradients import start_bytes
from tensorpeft.plugin.layer import TensorLayer

TARGETS = ["q_proj", "v_proj", "up_proj"]
FRAMED: list[tuple[type[PeftConfig], dict[str, Any]]] = [
    (LotrConfig, {"r": 4}),
    (LotrConfig, {"r": 4, "train": "cores"}),
    (FactConfig, {"r": 4}),
    (FactConfig, {"r": 4, "train": "cores"}),
    (FactConfig, {"r": 4, "core": "tk"}),
    (FactConfig, {"r": 4, "core": "tk", "train": "cores"}),
    (FloraConfig, {"r": 4}),
    (FloraConfig, {"r": 4, "train": "cores"}),
    (LortaConfig, {"r": 4}),
    (LorettaConfig, {"r": 4}),
    (MetaTtConfig, {"r": 4}),
    (MetaTtConfig, {"r": 4, "variant": "5d"}),
    (MetaTtConfig, {"r": 30}),  # more than inputs, layers and projections have
    (TensLoraConfig, {"r": 30, "arrangement": "QKV"}),
    (TensLoraConfig, {"r": 4}),
    (TensLoraConfig, {"r": 4, "arrangement": "Att_QKV_Depth"}),
    (TensLoraConfig, {"r": 4, "arrangement": "Depth", "decomposition": "cp"}),
    (LoraConfig, {"r": 4}),
]
over_framed = pytest.mark.parametrize(
    ("kind", "fields"),
    FRAMED,
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(map(str, value.values())),
)


def batches(seeds: Sequence[int] = (1, 2)) -> list[dict[str, Tensor]]:
    rows = [tokens(seed=seed) for seed in seeds]
    return [{"input_ids": row, "labels": row} for row in rows]


def gradients(base: nn.Module, names: Sequence[str], seeds: Sequence[int] = (1, 2)) -> dict[str, Tensor]:
    """The sum over batches of the gradients of whole weights, float64."""
    model = base.double()
    for batch in batches(seeds):
        model(**batch).loss.backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


def fresh(kind: type[PeftConfig], fields: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The base, and another like it with an adapter."""
    base = MODELS[0].fresh()
    torch.manual_seed(5)
    return base, get_peft_model(MODELS[0].fresh(), kind(target_modules=TARGETS, **fields))


def held(gradient: Tensor, left: Tensor, right: Tensor) -> float:
    """The share of a gradient's energy between two frames."""
    left, right = (torch.linalg.qr(frame.detach().double())[0] for frame in (left, right))
    return ((left.t() @ gradient @ right).norm() / gradient.norm()).item() ** 2


@over_framed
def test_the_start_is_the_base_bit_for_bit_and_learns(kind: type[PeftConfig], fields: dict[str, Any]):
    base, model = fresh(kind, fields)
    initialize_from_gradients(model, batches())
    assert torch.equal(logits(model), logits(base))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        losses.append(model(**batches()[0]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_frames_of_one_weight_are_its_gradients_leading_singular_vectors():
    base, model = fresh(FloraConfig, {"r": 4})
    initialize_from_gradients(model, batches())
    layers = [name for name, module in base.named_modules() if name.endswith(tuple(TARGETS))]
    for name, gradient in gradients(base, layers).items():
        update = model.get_submodule(f"base_model.model.{name}").updates["default"]
        left, values, right = torch.linalg.svd(gradient)
        best = (values[:4].square().sum() / values.square().sum()).item()
        assert held(gradient, update.U, update.V) > 0.95 * best  # sketched
        assert held(gradient, left[:, :4], right[:4].t()) == pytest.approx(best)


@pytest.mark.parametrize("kind", [LotrConfig, FactConfig])
def test_shared_frames_hold_as_much_as_any_that_alternation_finds(kind: type[PeftConfig]):
    base, model = fresh(kind, {"r": 4})
    initialize_from_gradients(model, batches())
    names = [name for name, module in base.named_modules() if name.endswith("q_proj")]
    found = gradients(base, names)
    shared = model.get_submodule(f"base_model.model.{names[0]}").updates["default"].shared
    stack = torch.stack(list(found.values()))

    def energy(left: Tensor, right: Tensor) -> float:
        left, right = (torch.linalg.qr(frame.detach().double())[0] for frame in (left, right))
        return (left.t() @ stack @ right).square().sum().item()

    # Tucker2 of the exact gradients, from many starts.
    best = 0.0
    for seed in range(5):
        right = torch.linalg.qr(torch.randn(24, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
            0
        ]
        for _ in range(50):
            left = torch.linalg.svd(torch.cat(list(stack @ right), dim=1))[0][:, :4]
            right = torch.linalg.svd(torch.cat(list(stack.mT @ left), dim=1))[0][:, :4]
        best = max(best, energy(left, right))
    name = next(name for name, size in shared.sizes.items() if size[1:] == (24, 24))
    assert energy(getattr(shared, f"{name}_U"), getattr(shared, f"{name}_V")) > 0.95 * best


def reached(model: nn.Module, name: str, found: dict[str, Tensor]) -> float:
    """The share of the gradients' energy that the tensors of this name, which start at zero, reach by themselves."""
    layers = [model.get_submodule(f"base_model.model.{layer}") for layer in found]
    shared = layers[0].updates["default"].shared
    (core,) = [p for key, p in shared.named_parameters() if key.endswith(name)]
    rows = []
    with torch.no_grad():
        for unit in torch.eye(core.numel()):
            core.copy_(unit.view_as(core))
            rows.append(torch.cat([layer.get_delta_weight("default").double().flatten() for layer in layers]))
        core.zero_()
    whole = torch.cat([gradient.flatten() for gradient in found.values()])
    return ((torch.linalg.qr(torch.stack(rows).t())[0].t() @ whole).norm() / whole.norm()).item() ** 2


@pytest.mark.parametrize("with_heads", [False, True])
@pytest.mark.parametrize("kind", [MetaTtConfig, TensLoraConfig])
def test_factors_of_layers_and_heads_hold_as_much_as_tensorlys(kind: type[PeftConfig], with_heads: bool):
    names = [f"model.layers.{layer}.self_attn.{which}_proj" for which in "qo" for layer in range(2)]
    found = gradients(MODELS[0].fresh(), names)
    if kind is MetaTtConfig:
        fields: dict[str, Any] = {"r": 3, "variant": "5d" if with_heads else "4d"}
    elif with_heads:
        fields = {"r": [3, 3, 2, 1, 1], "arrangement": "Att_QKV_Depth"}
    else:
        fields = {"r": [3, 3, 1, 1]}
    model = get_peft_model(MODELS[0].fresh(), kind(target_modules=["q_proj", "o_proj"], **fields))
    initialize_from_gradients(model, batches())
    # (model dimension, layers, projections, heads, features); without heads the outputs, of which o has others.
    parts = [g if with_heads and "o_proj" in name else g.t() for name, g in found.items()]
    whole = torch.stack(parts).view(2, 2, 24, 4 if with_heads else 1, -1).permute(2, 1, 0, 3, 4)
    if kind is MetaTtConfig:
        train = tensor_train(whole.squeeze(3).numpy(), [1, *[3] * (4 if with_heads else 3), 1])
        best, name = tt_to_tensor(train), f"_G{5 if with_heads else 4}"
    else:
        best, name = tucker_to_tensor(tucker(whole.numpy(), [3, 1, 1, 2 if with_heads else 1, 3])), "_G"
    share = (torch.as_tensor(best).norm() / whole.norm()).item() ** 2
    assert reached(model, name, found) > 0.9 * share  # sketched
    assert share > 0.3


def test_a_loras_rows_are_as_long_as_its_own_start_makes_them():
    base, model = fresh(LoraConfig, {"r": 4})
    name = next(name for name, module in base.named_modules() if name.endswith("v_proj"))
    initialize_from_gradients(model, batches())
    down = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    _, _, right = torch.linalg.svd(gradients(base, [name])[name])
    torch.testing.assert_close((right[:4].float() @ down.detach().t()).abs(), torch.eye(4) / 3**0.5, atol=1e-4, rtol=0)


def test_the_rows_may_come_in_any_batches_and_dropout_changes_no_random_numbers():
    _, one = fresh(FloraConfig, {"r": 4})
    _, other = fresh(FloraConfig, {"r": 4})
    state = torch.get_rng_state()
    initialize_from_gradients(one.train(), batches((1, 2)))
    assert torch.equal(torch.get_rng_state(), state)
    initialize_from_gradients(other, batches((2, 1)))
    for (name, tensor), (_, twin) in zip(one.state_dict().items(), other.state_dict().items()):
        if "_update" in name:
            signs = (tensor * twin).sum(0).sign() if tensor.any() else 1.0
            torch.testing.assert_close(tensor, twin * signs, atol=1e-4, rtol=0)


@over_framed
def test_the_memory_of_the_sketches_is_told_beforehand(
    kind: type[PeftConfig], fields: dict[str, Any], monkeypatch: Any
):
    made = list[Sketch]()

    class Watched(Sketch):
        def __init__(self, *given: Any):
            super().__init__(*given)
            made.append(self)

    _, model = fresh(kind, fields)
    told = start_bytes(model)
    monkeypatch.setattr("tensorpeft.plugin.gradients.Sketch", Watched)
    initialize_from_gradients(model, batches())
    assert told == sum(sketch.left.nbytes + sketch.right.nbytes for sketch in made)


@over_framed
def test_frames_and_what_they_are_from_are_saved(kind: type[PeftConfig], fields: dict[str, Any], tmp_path: Any):
    base, model = fresh(kind, fields)
    initialize_from_gradients(model, batches(), seed=7)
    perturb(model)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    if kind is not LoraConfig:
        assert loaded.peft_config["default"].gradient_start == {"batches": 2, "rows": 6, "seed": 7}


def test_rows_are_counted_by_what_has_rows():
    _, model = fresh(LotrConfig, {"r": 2})
    row = tokens()
    initialize_from_gradients(
        model, [{"use_cache": False, "num_items_in_batch": torch.tensor(6), "input_ids": row, "labels": row}]
    )
    assert model.peft_config["default"].gradient_start["rows"] == len(row)


def test_gradient_checkpointing_gives_the_same_frames():
    _, plain = fresh(FloraConfig, {"r": 4})
    _, saving = fresh(FloraConfig, {"r": 4})
    saving.train().gradient_checkpointing_enable()
    saving.enable_input_require_grads()
    for model in (plain.train(), saving):
        initialize_from_gradients(model, batches())
    for (name, tensor), (_, twin) in zip(plain.state_dict().items(), saving.state_dict().items()):
        torch.testing.assert_close(tensor, twin, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_keeps_no_inputs_for_the_sketches(use_reentrant: bool):
    _, model = fresh(FloraConfig, {"r": 4})
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    seen = list[StorageWeakRef]()
    for layer in (module for module in model.modules() if isinstance(module, TensorLayer)):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(StorageWeakRef(args[0].untyped_storage())))

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        seen.clear()
        loss = model(**batch).loss
        assert seen
        assert all(reference.expired() for reference in seen)
        return loss

    initialize_from_gradients(model, batches(), loss_of=loss_of)


def test_it_may_be_called_under_autocast():
    _, model = fresh(FloraConfig, {"r": 4})
    with torch.autocast("cpu", torch.bfloat16):
        initialize_from_gradients(model, batches())
    assert all(tensor.dtype == torch.float32 for name, tensor in model.state_dict().items() if "_update" in name)


def test_frames_learn_at_the_pace_of_a_random_start():
    """What one step of Adam makes of trains, whose cores before the last stay as large as they were."""
    sizes = list[Tensor]()
    for has_frames in (False, True):
        _, model = fresh(LorettaConfig, {"r": 4})
        if has_frames:
            initialize_from_gradients(model, batches())
        model.train()(**batches()[0]).loss.backward()
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
        layers = [module for module in model.modules() if isinstance(module, TensorLayer)]
        sizes.append(torch.stack([layer.get_delta_weight("default").norm() for layer in layers]).mean())
    assert 1 / 3 < sizes[1] / sizes[0] < 3


def test_cores_alone_have_that_many_parameters():
    for kind, fields, expected in [
        (LotrConfig, {}, 6 * 16),  # 2 layers of 3 weights
        (FactConfig, {}, 6 * 16),
        (FactConfig, {"core": "tk"}, 6 * 4 + 3 * 64),  # q, v and up have three shapes
        (FloraConfig, {}, 6 * 16),
    ]:
        _, model = fresh(kind, {"r": 4, "train": "cores", **fields})
        assert model.get_nb_trainable_parameters()[0] == expected


def test_a_loras_frames_from_the_weight_are_its_singular_vectors():
    base, model = fresh(FloraConfig, {"r": 4, "train": "cores", "init_weights": "svd"})
    assert torch.equal(logits(model), logits(base))
    name = next(name for name, module in base.named_modules() if name.endswith("up_proj"))
    update = model.get_submodule(f"base_model.model.{name}").updates["default"]
    weight = base.get_submodule(name).weight.detach().double()
    values = torch.linalg.svdvals(weight)
    best = (values[:4].square().sum() / values.square().sum()).item()
    assert held(weight, update.U, update.V) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no batch", "batches: there is none"),
        (
            "no frames",
            "a NOLA adapter has no frames .* fact, .* lotr, metatt, tenslora, and PEFT's LoRA",
        ),
        ("no start", "is not zero"),
        ("trained", "is not zero"),
        ("unknown", "adapter_name='other'"),
        ("inactive", "only an active adapter"),
        ("nan", "not finite"),
        ("unreached", "no gradient has reached"),
    ],
)
def test_what_cannot_be_a_start_is_refused_and_changes_nothing(what: str, message: str):
    kind, fields = (NolaConfig, {"r": 4}) if what == "no frames" else (LotrConfig, {"r": 4})
    _, model = fresh(kind, fields | ({"init_weights": False} if what == "no start" else {}))
    if what == "trained":
        perturb(model)
    if what == "inactive":
        model.add_adapter("second", kind(target_modules=TARGETS, r=2))
    given: Any = [] if what == "no batch" else batches()
    if what == "nan":
        model.get_submodule("base_model.model.lm_head").weight.data.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = {"unknown": "other", "inactive": "second"}.get(what, "default")
    loss_of = (
        (lambda model, batch: model.get_input_embeddings()(batch["input_ids"]).sum().requires_grad_())
        if what == "unreached"
        else None
    )
    with pytest.raises(ValueError, match=message):
        initialize_from_gradients(model, given, name, loss_of=loss_of)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) or what == "nan", key
    assert getattr(model.peft_config["default"], "gradient_start", None) is None


def test_batches_without_labels_are_refused():
    _, model = fresh(LotrConfig, {"r": 2})
    with pytest.raises(ValueError, match=r"the model gave no loss\. Pass batches with labels"):
        initialize_from_gradients(model, [{"input_ids": tokens()}])


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(TypeError, match="expected the result of get_peft_model"):
        initialize_from_gradients(tiny_llama(), batches())


# With as many heads of keys as of queries: the tensor of others has entries that no weight has.
ALL_HEADS = Model("llama", partial(tiny_llama, num_key_value_heads=4), MODELS[0].targets, "CAUSAL_LM")


@pytest.mark.parametrize("model", [ALL_HEADS, *MODELS[1:]], ids=lambda model: model.name)
def test_a_cp_tensor_of_gradients_that_are_one_is_found(model: Any):
    """Gradients made of a CP tensor: of one term, so that it is unique. Also of fused projections and MLPs."""
    torch.manual_seed(0)
    adapted = get_peft_model(model.fresh(), LortaConfig(r=1, init_weights=False, target_modules=model.targets))
    holders = {n: m for n, m in adapted.named_modules() if isinstance(m, TensorLayer)}
    updates = {name: layer.updates["default"] for name, layer in holders.items()}
    gradients = {name: exact(update.matrix()) for name, update in updates.items()}
    wanted = {name: update.matrix().detach() for name, update in updates.items()}
    shared = next(iter(updates.values())).shared
    before = {name: tensor.detach().clone() for name, tensor in shared.named_parameters()}
    adapted.peft_config["default"].set_frames(updates, gradients)
    for name, tensor in shared.named_parameters():
        if name.endswith("_B"):
            assert not tensor.any()
            tensor.data.copy_(before[name])
        else:
            cosine = torch.nn.functional.cosine_similarity(tensor, before[name], dim=0)
            torch.testing.assert_close(cosine.abs(), torch.ones(1), atol=1e-4, rtol=0)
    for name, update in updates.items():
        cosine = torch.nn.functional.cosine_similarity(update.matrix().flatten(), wanted[name].flatten(), dim=0)
        assert abs(cosine) > 0.9999


def test_methods_without_frames_say_which_have():
    _, model = fresh(DotaConfig, {"r": 2})
    with pytest.raises(ValueError, match="has no frames that a gradient could set"):
        initialize_from_gradients(model, batches())


def test_a_base_in_four_bits_has_frames_of_its_own_gradient():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    model = get_peft_model(base, FloraConfig(r=3, train="cores", target_modules=["0"]))
    x = torch.randn(2, 5, 128)
    before = model(x)
    initialize_from_gradients(model, [{"x": x}], loss_of=lambda model, batch: model(batch["x"]).square().sum())
    assert torch.equal(model(x), before)
    gradient = (2 * before.detach()).flatten(0, 1).t() @ x.flatten(0, 1)
    values = torch.linalg.svdvals(gradient.double()).square()
    update = model.base_model.model[0].updates["default"]
    assert held(gradient.double(), update.U, update.V) > 0.95 * values[:3].sum() / values.sum()


@over_framed
def test_a_base_that_is_put_away_between_calls(kind: type[PeftConfig], fields: dict[str, Any]):
    """Its layers are on no device while nothing runs; ours compute where they do."""
    if kind is LoraConfig:
        pytest.skip("PEFT's own adapter is on no device, too")
    found = []
    for base in (MODELS[0].fresh(), cpu_offload(MODELS[0].fresh(), execution_device=torch.device("cpu"))):
        torch.manual_seed(0)
        model = get_peft_model(base, kind(target_modules=TARGETS, **fields))
        initialize_from_gradients(model, batches())
        found.append(get_peft_model_state_dict(model))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor)
