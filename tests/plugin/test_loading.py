"""Which base a checkpoint belongs to: asked of those updates whose start is a part of the base's weight."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from cases import MODELS, Case, logits, over_cases, perturb, tiny_llama
from tensorpeft import DotaConfig
from tensorpeft.networks.cut import fold
from tensorpeft.networks.mpo import MpoUpdate, random_cores
from tensorpeft.networks.update import AbstractWeightUpdate
from tensorpeft.plugin.layer import TensorLayer
from tensorpeft.plugin.loading import check_state_dict

LLAMA = MODELS[0]


@pytest.fixture
def random_starts(monkeypatch) -> type[DotaConfig]:
    """A method that subtracts random cores, drawn anew whenever it is built: a start that is no part of the weight."""

    def build(self, sites, bases):
        updates = {}
        for site in sites:
            cores = random_cores((2, site.out // 2), (2, site.in_ // 2), 3)
            updates[site.name] = MpoUpdate(cores, start=cores)
        return updates

    monkeypatch.setattr(DotaConfig, "build", build)
    return DotaConfig


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_start_that_is_no_projection_loads_on_its_own_base(
    random_starts: type[DotaConfig], low_cpu_mem_usage: bool, tmp_path
):
    peft_model = get_peft_model(LLAMA.fresh(), random_starts(target_modules=LLAMA.targets)).eval()
    assert torch.equal(logits(peft_model), logits(LLAMA.fresh()))
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(peft_model))


def test_a_projection_is_refused_on_another_base_and_loads_on_its_own(tmp_path):
    peft_model = get_peft_model(LLAMA.fresh(), DotaConfig(r=6, num_cores=3, target_modules=LLAMA.targets)).eval()
    perturb(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(LLAMA.fresh(), tmp_path).eval()), logits(peft_model))
    torch.manual_seed(123)
    with pytest.raises(ValueError, match=r"another base model: of its start, .* expected 100%"):
        PeftModel.from_pretrained(tiny_llama().eval(), tmp_path)


@over_cases
def test_every_start_is_what_its_update_says(case: Case):
    peft_model = get_peft_model(LLAMA.fresh(), case.make(target_modules=LLAMA.targets))
    layers = [module for module in peft_model.modules() if isinstance(module, TensorLayer)]
    for layer in layers:
        update = layer.updates["default"]
        if not isinstance(update, AbstractWeightUpdate):
            continue
        cut = update.cut()
        start = fold(cut.network.halves(cut.start)) if cut.start else torch.zeros(())
        share = (layer.read_base_weight() * start).sum() / start.square().sum()  # not a number where nothing is
        assert update.starts_at_projection == (abs(share.item() - 1) < 1e-4)


def test_an_adapter_in_memory_has_its_whole_start_or_none():
    def fresh() -> PeftModel:
        return get_peft_model(LLAMA.fresh(), DotaConfig(r=6, num_cores=3, target_modules=LLAMA.targets))

    state = get_peft_model_state_dict(fresh())
    starts = [key for key in state if ".start_" in key]
    set_peft_model_state_dict(fresh(), {key: tensor for key, tensor in state.items() if key not in starts})
    for lost in (starts[0], starts[-1]):
        with pytest.raises(ValueError, match=lost.rpartition(".")[2]):
            set_peft_model_state_dict(fresh(), {key: tensor for key, tensor in state.items() if key != lost})
    own = starts[: len(starts) // len(LLAMA.targets) // 2]  # of the first layer
    with pytest.raises(ValueError, match="start"):
        set_peft_model_state_dict(fresh(), {key: tensor for key, tensor in state.items() if key not in own})


class CountedDict(dict[str, Any]):
    """A dict that counts the walks over it."""

    num_walks = 0

    def items(self) -> Any:
        self.num_walks += 1
        return super().items()


def test_loading_walks_the_model_and_the_state_once_whatever_adapters_there_are(monkeypatch):
    """And what does not fit is told of the first such adapter, in its first such layer."""
    config = DotaConfig(r=6, num_cores=3, target_modules=LLAMA.targets)
    peft_model = get_peft_model(LLAMA.fresh(), config)
    for name in ("second", "third"):
        peft_model.add_adapter(name, config)
    tuner, walks = peft_model.base_model, []
    walk = type(tuner).named_modules
    monkeypatch.setattr(tuner, "named_modules", lambda: walks.append(1) or walk(tuner))
    state_dict = CountedDict(tuner.state_dict())
    check_state_dict(tuner, state_dict, "")
    assert (len(walks), state_dict.num_walks) == (1, 1)
    layers = [name for name, module in walk(tuner) if isinstance(module, TensorLayer)]
    for layer, adapter_name in ((layers[0], "third"), (layers[2], "second"), (layers[1], "second")):
        del state_dict[f"{layer}.dota_update.{adapter_name}.core_1"]
    with pytest.raises(ValueError, match=rf"^{layers[1].removeprefix('model.')}: .* but not \['core_1'\]"):
        check_state_dict(tuner, state_dict, "")
