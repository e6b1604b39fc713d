"""`tensorpeft plan` counts what the papers count, on the papers' models, from their config.json alone."""

import pytest
from transformers import LlamaConfig, RobertaConfig

pytest.importorskip("rich")

import tensorpeft.studies.plan
from tensorpeft.studies.catalogue import choose_methods
from tensorpeft.studies.fake_step import StepCosts
from tensorpeft.studies.plan import plan_model

LLAMA = {"architectures": ["LlamaForCausalLM"]}
ROBERTA = {"architectures": ["RobertaModel"], "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
CONFIGS = {
    "LLaMA-2-7B": LlamaConfig(intermediate_size=11008, **LLAMA),
    "LLaMA-3-8B": LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, **LLAMA),
    "one layer of LLaMA-2-7B": LlamaConfig(intermediate_size=11008, num_hidden_layers=1, **LLAMA),
    "RoBERTa-base": RobertaConfig(**ROBERTA),
    "RoBERTa-large": RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, **ROBERTA
    ),
}
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
FOUR = ["q_proj", "k_proj", "v_proj", "o_proj"]
TWO = ["q_proj", "v_proj"]
BERT_TWO = ["query", "value"]
# Model, targets, rank, trained parameters by method.
CHECK_VALUES = [
    ("LLaMA-2-7B", FIVE, 8, {"dota": 2_531_328}),
    ("LLaMA-2-7B", FIVE, 16, {"dota": 10_043_392}),
    ("LLaMA-2-7B", FIVE, 32, {"dota": 34_422_784}),
    ("LLaMA-3-8B", FIVE, 8, {"dota": 1_325_056}),
    ("LLaMA-3-8B", FIVE, 16, {"dota": 5_206_016}),
    ("LLaMA-3-8B", FIVE, 32, {"dota": 16_106_496}),
    ("one layer of LLaMA-2-7B", ["q_proj"], 16, {"dota": 37_376}),
    (
        "LLaMA-2-7B",
        TWO,
        4,
        {"lora": 2_097_152, "lorta": 17_160, "lotr": 33_792, "fact-tt": 33_792, "fact-tk": 33_088},
    ),
    (
        "LLaMA-2-7B",
        TWO,
        64,
        {"lora": 16 * 2_097_152, "lorta": 274_560, "lotr": 786_432, "fact-tt": 786_432, "fact-tk": 790_528},
    ),
    ("LLaMA-2-7B", TWO, 64, {"metatt": 663_552}),
    ("LLaMA-2-7B", TWO, 8, {"metatt": 67_712, "metatt-5d": 38_016}),
    ("RoBERTa-base", ["query", "key", "value"], 8, {"tenslora": 16_504}),
    ("LLaMA-2-7B", FOUR, 1, {"lorta": 4_292}),
    ("LLaMA-2-7B", FOUR, 48, {"lorta": 48 * 4_292}),
    # Axes 16·8·8·4, and a square tensor for each of their six pairs.
    ("LLaMA-2-7B", TWO, None, {"quanta": 64 * (2 * 32**2 + 2 * 64**2 + 2 * 128**2)}),
    ("LLaMA-2-7B", TWO, 4, {"quantum-peft": 64 * (2 * 34 + 4)}),
    ("RoBERTa-base", BERT_TWO, 8, {"superlora": 728 * 8 + 8**3}),  # as many entries as ViT-base has
    # Two trains over 8·8·12·8 with bonds of 5.
    ("RoBERTa-base", BERT_TWO, 8, {"loretta": 24 * 2 * (8 * 5 + 5 * 8 * 5 + 5 * 12 * 5 + 5 * 8)}),
    ("RoBERTa-base", BERT_TWO, 4, {"lorta": 3_432}),
    ("RoBERTa-large", BERT_TWO, 8, {"lorta": 9_040}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the config.json of each model."""
    written = {name: tmp_path_factory.mktemp("model") for name in CONFIGS}
    for name, folder in written.items():
        CONFIGS[name].save_pretrained(folder)
    return written


@pytest.fixture(autouse=True)
def _no_step(monkeypatch):
    """No step is run: DoTA's takes ten thousand operations on fake tensors, and no parameter is counted in it."""
    monkeypatch.setattr(tensorpeft.studies.plan, "count_step", lambda *_: StepCosts(1, 1))


@pytest.mark.parametrize(("model", "targets", "rank", "expected"), CHECK_VALUES)
def test_the_plan_has_the_papers_numbers_of_parameters(folders, model, targets, rank, expected):
    plan = plan_model(str(folders[model]), choose_methods(",".join(expected)), rank=rank, targets=targets, length=1)
    assert {method.method.key: method.trained for method in plan.methods} == expected
    assert not any(method.problem for method in plan.methods)


@pytest.mark.parametrize(("model", "percent"), [("LLaMA-2-7B", 0.149), ("LLaMA-3-8B", 0.065)])
def test_dota_has_the_paper_s_share_of_the_parameters(folders, model, percent):
    plan = plan_model(str(folders[model]), choose_methods("dota"), rank=16, targets=FIVE, length=1)
    assert round(100 * plan.methods[0].trained / plan.num_parameters, 3) == percent
