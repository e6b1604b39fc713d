"""A real pretrained decoder, fine-tuned on real text: stories260K on TinyStories, from `$TENSORPEFT_DATA`.

As it is, and as QDoTA's base: quantised from disk, loaded by transformers, given to the same trainer.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorpeft import DotaConfig
from tensorpeft.quantization import quantize_checkpoint

pytest.importorskip("trl")
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

DATA = Path(os.environ.get("TENSORPEFT_DATA", Path(__file__).parents[2] / "shared"))
MODEL, STORIES = DATA / "models" / "stories260K", DATA / "data" / "tinystories" / "tinystories_2MiB.txt"
MISSING = [str(path) for path in (MODEL, STORIES) if not path.exists()]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}; set TENSORPEFT_DATA")
PROMPT = "Once upon a time, there was a little"
MAX_LENGTH = 192


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def stories():
    """Two lists: 360 to train on, 40 held out. The file is not shuffled: every tenth is held out, not the last ones."""
    texts = [text.strip() for text in STORIES.read_text(encoding="utf-8").split("<|endoftext|>")[:400]]
    return [text for k, text in enumerate(texts) if k % 10], texts[::10]


def config():
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    return DotaConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")


@pytest.fixture(scope="module", params=["float32", pytest.param("4 bits", marks=pytest.mark.thorough)])
def base_model(request, tmp_path_factory):
    """A function that loads the base anew."""
    folder = MODEL
    if request.param == "4 bits":
        pytest.importorskip("bitsandbytes")
        folder = tmp_path_factory.mktemp("quantised") / "base"
        quantize_checkpoint(MODEL, folder, config(), rounds=3)
    return lambda: AutoModelForCausalLM.from_pretrained(folder).eval()


def held_out_loss(model, tokenizer, texts):
    """The mean loss of a token of `texts`, in evaluation mode and without the end-of-text that SFTTrainer adds."""
    losses = []
    for text in texts:
        input_ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_LENGTH).input_ids
        with torch.no_grad():
            logits = model(input_ids=input_ids).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], input_ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def tell(model, tokenizer, rows=1, **more):
    """The ids of the greedy stories that start with `PROMPT`."""
    inputs = tokenizer([PROMPT] * rows, return_tensors="pt")
    return model.generate(**inputs, do_sample=False, min_new_tokens=100, max_new_tokens=100, **more)


@pytest.fixture(scope="module")
def trainer(base_model, tokenizer, stories, tmp_path_factory):
    """DoTA after 40 steps of SFT. Larger rates than 1e-4 raise the loss: this model has converged on such stories."""
    arguments = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("stories")),
        max_steps=40,
        learning_rate=1e-4,
        per_device_train_batch_size=8,
        max_length=MAX_LENGTH,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    trainer = SFTTrainer(
        base_model(),
        arguments,
        train_dataset=Dataset.from_dict({"text": stories[0]}),
        processing_class=tokenizer,
        peft_config=config(),
    )
    trainer.train()
    trainer.model.eval()
    return trainer


@pytest.fixture(scope="module")
def story(trainer, tokenizer):
    """What the trained model tells."""
    return tell(trainer.model, tokenizer)


@pytest.fixture
def adapted(base_model, trainer, tmp_path):
    """The trained model, saved and loaded again."""
    trainer.model.save_pretrained(tmp_path)
    return PeftModel.from_pretrained(base_model(), tmp_path).eval()


def test_training_lowers_the_loss_on_stories_it_has_not_seen(base_model, trainer, tokenizer, stories):
    before = held_out_loss(base_model(), tokenizer, stories[1])
    assert held_out_loss(trainer.model, tokenizer, stories[1]) < before - 0.01
    with trainer.model.disable_adapter():
        assert held_out_loss(trainer.model, tokenizer, stories[1]) == before
    assert all(math.isfinite(entry.get("loss", 0.0)) for entry in trainer.state.log_history)


def test_a_reloaded_model_computes_and_tells_the_same_story(trainer, adapted, tokenizer, story):
    assert torch.equal(tell(adapted, tokenizer), story)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=story).logits, trainer.model(input_ids=story).logits)


def test_a_merged_model_tells_the_same_story(adapted, tokenizer, story):
    merged = adapted.merge_and_unload(safe_merge=True)
    assert torch.equal(tell(merged, tokenizer), story)


def test_the_saved_adapter_names_its_base(trainer, tokenizer, tmp_path, story):
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(tell(loaded, tokenizer), story)


def test_a_mixed_batch_tells_the_stories_of_the_adapter_and_of_the_base(base_model, adapted, tokenizer, story):
    names = ["default", "__base__", "default"]
    stories = tell(adapted, tokenizer, rows=3, adapter_names=names)
    expected = {"default": story[0], "__base__": tell(base_model(), tokenizer)[0]}
    assert not torch.equal(*expected.values())
    for name, told in zip(names, stories, strict=True):
        assert torch.equal(told, expected[name])
