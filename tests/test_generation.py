"""Text from adapted models: unmerged, merged, disabled, and batches in which every row has an adapter of its own."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import GenerationConfig

from cases import CASES, MERGING_CASES, MODELS, Model, logits, over_pairs, perturb, tokens

# base(x) + update(x) against one product with their sum, in float64 and of logits of order one: in float32 a model
# amplifies the difference to as much as 1e-4.
MIXED_TOLERANCE = {"rtol": 0, "atol": 1e-11}
ROWS = ["second", "__base__", "default"]


def tiny_bart():
    config = transformers.BartConfig(
        vocab_size=96,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        init_std=0.3,  # with less, every text is one token over and over
    )
    return transformers.BartForConditionalGeneration(config)


BART = Model("bart", tiny_bart, ["q_proj", "v_proj", "fc1"], "SEQ_2_SEQ_LM")
GENERATORS = [*(model for model in MODELS if model.task_type == "CAUSAL_LM"), BART]
over_generators = pytest.mark.parametrize("model", GENERATORS, ids=lambda model: model.name)


def adapt(model, case, task_type=None):
    """A model in evaluation mode with two trained adapters; the second one is in fewer layers."""
    common = {"task_type": task_type or model.task_type}
    adapted = get_peft_model(model.fresh(), case.make(target_modules=model.targets, **common))
    perturb(adapted, seed=2, scale=1.0)
    adapted.add_adapter("second", case.make(target_modules=model.targets[:2], **common))
    adapted.set_adapter("second")
    perturb(adapted, seed=3, scale=1.0)
    adapted.set_adapter("default")
    return adapted.eval()


@contextmanager
def only(adapted, name):
    """One adapter, or none for "__base__"."""
    if name == "__base__":
        with adapted.disable_adapter():
            yield
    else:
        adapted.set_adapter(name)
        yield
        adapted.set_adapter("default")


def generate(model, input_ids=None, **more):
    """Twelve token ids per row, chosen without chance; no row ends early."""
    input_ids = tokens() if input_ids is None else input_ids
    length = {"min_new_tokens": 12, "max_new_tokens": 12}
    return model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **length, **more
    )


def rows_alone(adapted, **more):
    """What each row becomes in a batch of its own, with the one adapter that `ROWS` gives it."""
    rows = []
    for name, row in zip(ROWS, tokens().split(1), strict=True):
        with only(adapted, name):
            rows.append(generate(adapted, row, **more))
    return torch.cat(rows)


@over_pairs(GENERATORS, MERGING_CASES)
def test_merged_and_unmerged_models_generate_the_same(case, model):
    adapted = adapt(model, case)
    unmerged = generate(adapted)
    assert not torch.equal(unmerged, generate(model.fresh()))
    adapted.merge_adapter()
    assert torch.equal(generate(adapted), unmerged)
    adapted.unmerge_adapter()
    assert torch.equal(generate(adapted), unmerged)
    assert torch.equal(generate(adapted.merge_and_unload()), unmerged)


@over_pairs(GENERATORS, CASES)
def test_a_disabled_adapter_generates_what_the_base_does(case, model):
    adapted = adapt(model, case)
    enabled, expected = generate(adapted), generate(model.fresh())
    with adapted.disable_adapter():
        assert torch.equal(generate(adapted), expected)
    assert torch.equal(generate(adapted), enabled)
    if case.merges:
        adapted.merge_adapter()
        with adapted.disable_adapter():
            assert torch.equal(generate(adapted), expected)
        assert torch.equal(generate(adapted), enabled)


@over_generators
def test_generating_with_and_without_a_cache_is_the_same(model):
    adapted = adapt(model, CASES[0])
    assert torch.equal(generate(adapted, use_cache=True), generate(adapted, use_cache=False))


def test_an_encoder_decoder_is_adapted_on_both_sides():
    adapted = adapt(BART, CASES[0])
    layers = [name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "base_layer")]
    assert {name.split(".")[1] for name in layers} == {"encoder", "decoder"}


@over_pairs(GENERATORS, CASES)
def test_each_row_of_a_mixed_forward_is_its_adapters(case, model):
    adapted = adapt(model, case).double()
    decoder = {"decoder_input_ids": tokens(seed=5)} if model is BART else {}
    outputs = {}
    for name in ROWS:
        with only(adapted, name):
            outputs[name] = logits(adapted, **decoder)
    mixed = logits(adapted, adapter_names=ROWS, **decoder)
    for k, name in enumerate(ROWS):
        for other, output in outputs.items():
            assert torch.allclose(mixed[k], output[k], **MIXED_TOLERANCE) == (other == name)


@over_pairs(GENERATORS, CASES)
def test_each_row_of_a_mixed_generation_is_its_adapters(case, model):
    adapted = adapt(model, case)
    mixed = generate(adapted, adapter_names=ROWS)
    assert torch.equal(mixed, rows_alone(adapted))
    assert not torch.equal(mixed, generate(adapted))


ONLY_IN_THE_MODEL = pytest.param(
    "the model's generation_config",
    marks=pytest.mark.xfail(strict=True, reason="PEFT tells its hooks what generate was called with, no more"),
)


@over_generators
@pytest.mark.parametrize("asked_by", ["argument", "generation_config", ONLY_IN_THE_MODEL])
def test_each_row_of_a_mixed_beam_search_is_its_adapters(model, asked_by):
    adapted = adapt(model, CASES[0])
    alone = rows_alone(adapted, num_beams=2)
    assert not torch.equal(alone, rows_alone(adapted))  # two beams find what one does not
    more = {}
    if asked_by == "argument":
        more["num_beams"] = 2
    elif asked_by == "generation_config":
        more["generation_config"] = GenerationConfig(**{**adapted.generation_config.to_dict(), "num_beams": 2})
    else:
        adapted.generation_config.num_beams = 2
    assert torch.equal(generate(adapted, adapter_names=ROWS, **more), alone)


def test_each_row_of_a_mixed_forward_has_its_adapters_own_head():
    bert = next(model for model in MODELS if model.task_type == "SEQ_CLS")
    adapted = adapt(bert, CASES[0]).double()
    heads = adapted.base_model.classifier.modules_to_save  # PEFT trains a new classifier beside every SEQ_CLS adapter
    for bias, name in enumerate(("default", "second"), 1):
        torch.nn.init.constant_(heads[name].bias, float(bias))
    mixed = logits(adapted, adapter_names=ROWS)
    for k, name in enumerate(ROWS):
        with only(adapted, name):
            torch.testing.assert_close(mixed[k], logits(adapted)[k], **MIXED_TOLERANCE)


def test_a_mixed_batch_may_have_any_order_and_number_of_rows():
    adapted = adapt(MODELS[0], CASES[0]).double()
    names = ["default", "second", "default", "__base__", "second", "default"]
    batch = tokens(len(names))
    mixed = logits(adapted, batch, adapter_names=names)
    for k, name in enumerate(names):
        with only(adapted, name):
            torch.testing.assert_close(mixed[k], logits(adapted, batch)[k], **MIXED_TOLERANCE)


@pytest.mark.parametrize("call", [logits, generate], ids=["forward", "generate"])
@pytest.mark.parametrize(
    ("names", "prepare", "message"),
    [
        (ROWS[:2], lambda adapted: None, "Length of `adapter_names` .* got 2 and 3"),
        ([*ROWS[:2], "nobody"], lambda adapted: None, "non-existing adapter.*nobody"),
        (ROWS, lambda adapted: adapted.train(), "`adapter_names` when the model is in training mode"),
        (ROWS, lambda adapted: adapted.merge_adapter(), "`adapter_names` when there are merged adapters"),
    ],
    ids=["wrong length", "unknown adapter", "training", "merged"],
)
def test_a_refused_mixed_batch_says_why_and_changes_nothing(call, names, prepare, message):
    adapted = adapt(MODELS[0], CASES[0])
    before = call(adapted)
    prepare(adapted)
    with pytest.raises(ValueError, match=message):
        call(adapted, adapter_names=names)
    adapted.eval().unmerge_adapter()
    assert torch.equal(call(adapted), before)
