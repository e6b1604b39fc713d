"""DoTA's r="auto": bonds chosen under a budget, saved with the adapter, given by hand, refused at the door."""

import json
from copy import deepcopy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from cases import MODELS, Model, logits, over_models, perturb, tiny_llama
from tensorpeft import DotaConfig, print_tensor_map
from tensorpeft.networks.mpo import MpoUpdate
from tensorpeft.plugin.tensor_map import tensor_map

LLAMA = MODELS[0]
NUM_TARGETS = 10  # of the tiny Llama


def auto(model: Model = LLAMA, **more) -> DotaConfig:
    return DotaConfig(**{"r": "auto", "budget": 3000, "num_cores": 3, "target_modules": model.targets, **more})


def bonds_in(peft_model: PeftModel) -> dict[str, list[int]]:
    found = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, MpoUpdate):
            layer = name.removeprefix("base_model.model.").partition(".dota_update")[0]
            found[layer] = [core.shape[3] for core in module.cores()[:-1]]
    return found


@over_models
def test_the_budget_is_met_from_below(model: Model):
    for budget in (2000, 3000, 4500):
        trained = get_peft_model(model.fresh(), auto(model, budget=budget)).get_nb_trainable_parameters()[0]
        assert 0.95 * budget <= trained <= budget  # a step costs up to some dozens of parameters


def test_bonds_differ_and_are_kept_in_the_configuration(tmp_path):
    config = auto()
    peft_model = get_peft_model(LLAMA.fresh(), config)
    found = bonds_in(peft_model)
    assert config.bonds == found
    assert len(found) == NUM_TARGETS
    assert len({tuple(bonds) for bonds in found.values()}) > 1
    peft_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["budget"], saved["bonds"]) == ("auto", 3000, found)


def test_loading_reads_no_weight(tmp_path, monkeypatch):
    peft_model = get_peft_model(LLAMA.fresh(), auto())
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path)

    def never(*arguments):
        raise AssertionError("bonds were chosen anew")

    monkeypatch.setattr("tensorpeft.methods.common.adaptive_bonds.choose_bonds", never)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded.eval()), logits(peft_model.eval()))
    with torch.device("meta"):
        empty = tiny_llama()
    assert bonds_in(PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)) == bonds_in(peft_model)


def test_they_keep_more_than_uniform_bonds_of_the_same_size():
    torch.manual_seed(0)
    model = LLAMA.fresh()
    for index, weight in enumerate(model.parameters()):
        if weight.ndim == 2:  # from nearly one singular value to nearly equal ones
            left, values, right = torch.linalg.svd(weight.data, full_matrices=False)
            weight.data = left * values / torch.arange(1, len(values) + 1) ** (index % 4) @ right

    def energy_of(config: DotaConfig) -> tuple[int, float]:
        adapted = get_peft_model(deepcopy(model), config)
        updates = [module for module in adapted.modules() if isinstance(module, MpoUpdate)]
        return adapted.get_nb_trainable_parameters()[0], sum(u.start()[-1].square().sum().item() for u in updates)

    size, uniform = energy_of(auto(r=3, budget=None))
    adaptive_size, adaptive = energy_of(auto(budget=size))
    assert adaptive_size <= size
    assert adaptive > 1.02 * uniform


@pytest.mark.parametrize("init_weights", ["random", False])
def test_random_starts_have_the_weights_bonds_too(init_weights):
    config = auto(init_weights=init_weights)
    get_peft_model(LLAMA.fresh(), config)
    pretrained = auto()
    get_peft_model(LLAMA.fresh(), pretrained)
    assert config.bonds == pretrained.bonds


def test_given_bonds_need_no_budget_and_are_cut_to_what_fits():
    chosen = auto()
    get_peft_model(LLAMA.fresh(), chosen)
    given = {**chosen.bonds, "model.layers.1.self_attn.q_proj": [9, 1], "another.layer": [1, 1]}
    peft_model = get_peft_model(LLAMA.fresh(), auto(budget=None, bonds=given))
    assert bonds_in(peft_model) == {name: given[name] for name in chosen.bonds} | {
        "model.layers.1.self_attn.q_proj": [9, 1]
    }
    too_large = {name: [99, 99] for name in chosen.bonds}
    exact = get_peft_model(LLAMA.fresh(), auto(budget=None, r=99))
    assert bonds_in(get_peft_model(LLAMA.fresh(), auto(budget=None, bonds=too_large))) == bonds_in(exact)


def test_the_tensor_map_shows_the_bonds_and_leaves_the_configuration(capsys):
    config = auto()
    print_tensor_map(LLAMA.fresh(), config)
    printed = capsys.readouterr().out
    assert config.bonds is None
    peft_model = get_peft_model(LLAMA.fresh(), config)
    for name, bonds in config.bonds.items():
        assert "bonds 1·" + "·".join(map(str, bonds)) + "·1" in printed, name
    assert f"{peft_model.get_nb_trainable_parameters()[0]:,} trainable parameters" in printed


def test_a_second_adapter_with_its_own_configuration():
    peft_model = get_peft_model(LLAMA.fresh(), auto())
    second = auto(budget=1500, target_modules=["q_proj", "v_proj"])
    peft_model.add_adapter("second", second)
    assert len(second.bonds) == 4
    assert torch.equal(logits(peft_model.eval()), logits(LLAMA.fresh()))


# --- refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": "auto"}, r'r="auto" chooses the bonds under a budget, but budget=None: pass budget=N'),
        ({"r": "automatic"}, r"r='automatic': expected a whole number of at least 1, such as 16, or \"auto\""),
        ({"r": 8, "budget": 100}, r"budget=100 goes with r=\"auto\", but r=8"),
        ({"bonds": {"q": [1, 1, 1, 1]}}, r"bonds=.* goes with r=\"auto\", but r=16"),
        ({"r": "auto", "budget": 0}, r"budget=0: expected a whole number of at least 1"),
        ({"r": "auto", "budget": 1e6}, r"budget=1000000.0: expected a whole number"),
        ({"r": "auto", "budget": 9999, "rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{'q_proj': 4\} .*leave one"),
        ({"r": "auto", "bonds": [4, 4]}, r"bonds=\[4, 4\]: expected dict"),
        ({"r": "auto", "num_cores": 3, "bonds": {"q": [4]}}, r"bonds\['q'\]=\[4\]: expected 2 whole numbers"),
        ({"r": "auto", "num_cores": 3, "bonds": {"q": [4, 0]}}, r"bonds\['q'\]=\[4, 0\]: expected 2 .* num_cores=3"),
        ({"r": "auto", "num_cores": 3, "bonds": {"q": [4, 2.0]}}, r"bonds\['q'\]=\[4, 2.0\]"),
    ],
)
def test_impossible_request(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DotaConfig(**arguments)


def test_bonds_of_another_model():
    config = auto()
    get_peft_model(LLAMA.fresh(), config)
    longer = tiny_llama(num_hidden_layers=3)
    before = logits(longer.eval())
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj: bonds has no entry .*15 adapted .*bonds=None"):
        get_peft_model(longer, config)
    assert torch.equal(logits(longer), before)
    assert not hasattr(longer, "peft_config")


def test_a_budget_that_is_too_small():
    for budget in (1, 100):
        with pytest.raises(ValueError, match=rf"budget={budget}: expected at least \d+, .* 10 weights .*Raise"):
            get_peft_model(LLAMA.fresh(), auto(budget=budget))
    chosen = auto()
    get_peft_model(LLAMA.fresh(), chosen)
    with pytest.raises(ValueError, match=r"budget=500: the given bonds make \d,\d+ parameters"):
        get_peft_model(LLAMA.fresh(), auto(budget=500, bonds=chosen.bonds))


def test_weights_that_are_not_there():
    with torch.device("meta"):
        empty = tiny_llama()
    for attempt in (get_peft_model, tensor_map):
        with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: r=\"auto\" .*meta device.*bonds="):
            attempt(empty, auto())
    given = {name: [4, 2] for name in bonds_in(get_peft_model(LLAMA.fresh(), auto()))}
    assert tensor_map(empty, auto(bonds=given, budget=None)).num_tensors == NUM_TARGETS


def test_a_weight_that_is_not_finite_is_named():
    model = LLAMA.fresh()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("inf")
    config = auto()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: .*finite"):
        get_peft_model(model, config)
    assert config.bonds is None


# --- residual bases


def test_a_residual_base_and_its_adapter_have_the_same_bonds():
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import quantize_residual

    config = auto()
    base = quantize_residual(LLAMA.fresh(), config)
    assert len(config.bonds) == NUM_TARGETS
    expected = logits(base.eval())
    peft_model = get_peft_model(base, config).eval()
    assert torch.equal(logits(peft_model), expected)
    assert bonds_in(peft_model) == config.bonds
    # A configuration that knows nothing of them takes the bonds of the base's own start.
    again = auto()
    get_peft_model(quantize_residual(LLAMA.fresh(), config), again)
    assert again.bonds == config.bonds
    with pytest.raises(ValueError, match=r"budget=700: the residual base was quantised with cores of \d,\d+"):
        get_peft_model(quantize_residual(LLAMA.fresh(), config), auto(budget=700))
    wider = auto(target_modules=[*LLAMA.targets, "gate_proj"], budget=3200)
    get_peft_model(quantize_residual(LLAMA.fresh(), config), wider)
    assert {name: wider.bonds[name] for name in config.bonds} == config.bonds
    assert len(wider.bonds) == NUM_TARGETS + 2


def test_a_checkpoint_is_quantised_with_the_bonds_of_the_model_in_memory(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tensorpeft.quantization import quantize_checkpoint, quantize_residual

    in_memory, streamed = auto(), auto()
    quantize_residual(LLAMA.fresh(), in_memory)
    LLAMA.fresh().save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "base", streamed)
    assert streamed.bonds == in_memory.bonds
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(get_peft_model(base, streamed).eval()), logits(quantize_residual(LLAMA.fresh(), auto())))
