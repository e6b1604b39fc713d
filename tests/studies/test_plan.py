"""What `tensorpeft plan` says, against the papers' counts, and against measured steps."""

import argparse
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig

pytest.importorskip("rich")

from tensorpeft.studies.budget import parse_count
from tensorpeft.studies.catalogue import DEFAULT_PLANNED, choose_methods
from tensorpeft.studies.measure import peak_memory
from tensorpeft.studies.plan import enable_checkpointing, plan_model
from tensorpeft.studies.plan_report import legend, plan_table, to_tree
from tensorpeft_cli import main
from tensorpeft_cli.plan import parse_size

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama of six layers: its plan is extrapolated from two and three."""
    folder = tmp_path_factory.mktemp("small")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=128,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def test_dota_has_the_paper_s_number_of_parameters_and_its_start(tmp_path):
    LlamaConfig(intermediate_size=11008, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (plan,) = plan_model(str(tmp_path), choose_methods("dota"), rank=16, targets=TARGETS, length=8).methods
    assert plan.trained == 10_043_392
    assert plan.saved == 8 * plan.trained
    assert plan.frozen == 4 * plan.trained
    assert plan.flops_ratio > 1


def test_lorta_has_the_paper_s_number_of_parameters(tmp_path):
    LlamaConfig(intermediate_size=11008, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    plan = plan_model(str(tmp_path), choose_methods("lora,lorta"), rank=4, length=8)
    assert [method.trained for method in plan.methods] == [2_097_152, 17_160]  # the defaults: query and value
    assert plan.num_parameters == 6_738_415_616
    assert plan.base_bytes["bf16"] == 2 * 6_738_415_616


@pytest.mark.parametrize(
    ("checkpointing", "length", "tolerance"),
    [(False, 24, 0.02), pytest.param(True, 64, 0.04, marks=pytest.mark.thorough)],
)
def test_the_memory_of_a_step_is_the_measured_one(small, checkpointing: bool, length: int, tolerance: float):
    plan = plan_model(str(small), rank=4, batch=2, length=length, gradient_checkpointing=checkpointing)
    assert len(plan_table(plan).rows) == len(DEFAULT_PLANNED)
    base = LlamaForCausalLM(LlamaConfig.from_pretrained(small)).to(torch.bfloat16)
    tokens = torch.ones(2, length, dtype=torch.long)
    for method in plan.methods:
        assert not method.problem
        model = get_peft_model(deepcopy(base), method.config(None)).train()
        if checkpointing:
            enable_checkpointing(model)
        assert method.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)

        def step(model=model):
            model.get_base_model()(input_ids=tokens, labels=tokens).loss.backward()

        step()
        model.to("cpu")  # lets go of what an update keeps of its start, which the plan counts
        for parameter in model.parameters():
            parameter.grad = None
        with torch.backends.mkldnn.flags(enabled=False):  # whose workspace for bfloat16 differs between processors
            measured = peak_memory(step, "cpu")
        assert method.step.peak_bytes == pytest.approx(measured, rel=tolerance), method.method.key


def test_an_encoder_without_a_head_can_be_planned(tmp_path):
    config = BertConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, architectures=["BertModel"]
    )
    AutoModel.from_config(config).config.save_pretrained(tmp_path)
    plan = plan_model(str(tmp_path), choose_methods("lora,quanta,loretta-adapter"), length=16)
    assert all(method.trained and method.step.flops and not method.problem for method in plan.methods)


def test_layers_that_differ_are_counted_one_by_one(tmp_path):
    config = Qwen2MoeConfig(
        hidden_size=48,
        intermediate_size=96,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        decoder_sparse_step=3,  # every third layer has experts, and with them other linear layers
        vocab_size=64,
        architectures=["Qwen2MoeForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    plan = plan_model(str(tmp_path), choose_methods("lora,dota"), targets="all-linear", length=8)
    for method in plan.methods:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            adapted = get_peft_model(model, method.config("all-linear"), low_cpu_mem_usage=True)
        assert method.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan.methods[0].trained > 0


def test_a_budget_is_come_closest_to(small):
    plan = plan_model(str(small), choose_methods("lora,nola"), budget=3000, length=8)
    for method in plan.methods:
        counts = []
        for value in (max(method.value - 1, 1), method.value, method.value + 1):
            base = LlamaForCausalLM(LlamaConfig.from_pretrained(small))
            model = get_peft_model(base, replace(method, value=value).config(None))
            counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert counts[1] == method.trained
        assert min(counts, key=lambda count: abs(count - 3000)) == method.trained


def test_a_method_that_cannot_serve_the_model_says_why_and_the_others_are_planned(small):
    plan = plan_model(str(small), choose_methods("lora,lorta"), targets=["q_proj", "lm_head"], length=8)
    lora, lorta = plan.methods
    assert lora.trained
    assert not lora.problem
    assert "lm_head" in lorta.problem
    assert any("LoRTA: not on this model" in line for line in legend(plan))


def test_a_ratio_to_lora_is_to_lora_at_the_budget_though_it_is_not_planned(small):
    (lotr,) = plan_model(str(small), choose_methods("lotr"), budget=3000, length=8).methods
    _, beside = plan_model(str(small), choose_methods("lora,lotr"), budget=3000, length=8).methods
    assert lotr == beside


def test_a_budget_sets_the_rank_of_lorettas_trains(small):
    (loretta,) = plan_model(str(small), choose_methods("loretta"), budget=10_000, length=8).methods
    (smaller,) = plan_model(str(small), choose_methods("loretta"), budget=5_000, length=8).methods
    assert loretta.knob == "tt_rank"
    assert loretta.trained == pytest.approx(10_000, rel=0.15)
    assert smaller.value < loretta.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "budget": 9}, "rank=4, budget=9"),
        ({"rank": 0}, "rank=0"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_impossible_plans(small, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        plan_model(str(small), **arguments)


def test_sizes_and_counts_are_read_as_people_write_them():
    assert parse_size("24GB") == parse_size("24 GiB") == parse_size("24g") == 24 * 2**30
    assert [parse_count(text) for text in ("1M", "50k", "120000", "1.5m")] == [10**6, 50_000, 120_000, 1_500_000]
    for parse, text in ((parse_size, "24"), (parse_size, "0GB"), (parse_count, "many"), (parse_count, "0")):
        with pytest.raises((ValueError, argparse.ArgumentTypeError), match=text):
            parse(text)


def test_a_start_from_gradients_has_its_sketches_where_training_has_its_moments(small):
    plan = plan_model(str(small), choose_methods("lora,flora-cores"), rank=4, targets=["q_proj"], length=8)
    lora, cores = plan.methods
    assert lora.start == 0
    # 2 r + 16 and half as many again columns, of each of the six queries.
    assert cores.start == 6 * 4 * (64 * 24 + 64 * 36)
    assert cores.start > 8 * cores.trained
    assert cores.total(1000) == 1000 + cores.frozen + 4 * cores.trained + cores.start + cores.step.peak_bytes
    assert lora.total(1000) == 1000 + 12 * lora.trained + lora.step.peak_bytes
    assert any("FLoRA, cores 0 MiB" in line for line in legend(plan))


def test_a_method_that_quantises_its_base_has_no_other_form_of_it(small):
    """QDoTA's start lies in its base: the file holds the trained cores alone."""
    plan = plan_model(str(small), choose_methods("dota,qlora,qdota"), length=8)
    dota, qlora, qdota = plan.methods
    assert (dota.saved, qdota.saved) == (8 * dota.trained, 4 * qdota.trained)
    assert qlora.saved == 4 * qlora.trained
    assert qdota.frozen == dota.frozen
    on_bf16 = {method: row[6] for method, row in zip(("dota", "qlora", "qdota"), plan_table(plan).rows)}
    assert [cell == "–" for cell in on_bf16.values()] == [False, True, True]
    assert list(to_tree(plan)["methods"]["qdota"]["training_bytes"]) == ["NF4"]


def test_the_command_prints_a_table_that_fits_and_writes_its_figures(small, tmp_path, capsys):
    command = ["plan", str(small), "--gpu", "24GB", "--rank", "4", "--length", "16", "--maps"]
    assert main([*command, "--methods", "lora,dota,lorta", "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[1:])) <= 80  # the title has the folder's path
    assert "…" not in out.split("step:")[0]
    assert out.count(" both") == 3
    assert "LORTA: 1 tensor, 12 weights" in out
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert list(figures["methods"]) == ["lora", "dota", "lorta"]
    assert figures["methods"]["lora"]["flops_to_lora"] == 1
    assert main(["plan", str(small), "--methods", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["lora", "vera", "ia3", "dota", "lotr", "nola", "tcurlora"])
def test_the_file_has_what_is_saved(key, small, tmp_path):
    """Of PEFT's methods, too, whose tensors have other names; the header apart."""
    (plan,) = plan_model(str(small), choose_methods(key), rank=2, targets=TARGETS, length=8).methods
    config = LlamaConfig.from_pretrained(small)
    get_peft_model(LlamaForCausalLM(config), plan.config(TARGETS)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert plan.saved == sum(tensor.nbytes for tensor in tensors)
