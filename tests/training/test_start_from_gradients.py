"""`data.start_rows`: frames from the gradient of a recipe's own rows, and `inspect update` on a recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("omegaconf")
pytest.importorskip("trl")
from tensorpeft.training import start
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.run import run_training
from tensorpeft.training.start import loss_on
from tensorpeft_cli import main

FIXED = ["trainer.learning_rate=1e-2", "trainer.bf16=false", "trainer.gradient_checkpointing=false"]
CORES = "adapter={method: lotr, r: 3, train: cores, target_modules: [q_proj, v_proj]}"


def train(place, output, *overrides, name="sft", resume=False):
    recipe = load_recipe(place / f"{name}.yaml", [*FIXED, f"output={output}", *overrides])
    return run_training(recipe, resume)


def frames(folder):
    tensors = load_file(folder / "seed-0" / "adapter" / "adapter_model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if key.endswith(("_U", "_V"))}


def test_frames_are_set_from_the_rows_stay_frozen_and_are_saved(place, tmp_path):
    (started,) = train(place, tmp_path / "started", CORES, "data.start_rows=8")
    (plain,) = train(place, tmp_path / "plain", CORES)
    assert started.trained_parameters == plain.trained_parameters == 2 * 2 * 9
    assert started.curve("eval_loss")[-1] < plain.curve("eval_loss")[-1]
    config = json.loads((tmp_path / "started" / "seed-0" / "adapter" / "adapter_config.json").read_text())
    assert config["gradient_start"]["rows"] == 8
    for key, frame in frames(tmp_path / "started").items():
        torch.testing.assert_close(frame.t() @ frame, torch.eye(3), atol=1e-5, rtol=0, msg=key)
    # The rows are drawn by the seed, and change nothing else.
    train(place, tmp_path / "again", CORES, "data.start_rows=8")
    for key, frame in frames(tmp_path / "again").items():
        assert torch.equal(frame, frames(tmp_path / "started")[key])


def test_the_rows_of_the_start_are_not_those_of_the_validation(place, tmp_path):
    """Of persistent workers transformers keeps the loader, whatever rows it was first made for."""
    workers = ["trainer.dataloader_num_workers=1", "trainer.dataloader_persistent_workers=true"]
    runs = [
        train(place, tmp_path / f"run-{len(more)}", CORES, "data.start_rows=8", "trainer.max_steps=1", *more)[0]
        for more in ([], workers)
    ]
    assert runs[0].validation == runs[1].validation


def test_the_rows_come_in_the_trainings_batches_with_its_checkpointing(place, tmp_path, monkeypatch):
    seen = []

    def spy(trainer, batch):
        layers = trainer.model.get_base_model().model.layers
        seen.append((len(batch["input_ids"]), all(layer.gradient_checkpointing for layer in layers)))
        return loss_on(trainer, batch)

    monkeypatch.setattr(start, "loss_on", spy)
    more = ["data.start_rows=8", "trainer.max_steps=1", "trainer.per_device_train_batch_size=2"]
    for is_on in (True, False):
        train(place, tmp_path / f"run-{is_on}", CORES, *more, f"trainer.gradient_checkpointing={str(is_on).lower()}")
        assert seen == [(2, is_on)] * 4
        seen.clear()
    kept = frames(tmp_path / "run-False")
    assert all(torch.equal(kept[key], frame) for key, frame in frames(tmp_path / "run-True").items())


@pytest.mark.recipes
def test_a_resumed_run_ends_where_the_whole_one_does(place, tmp_path):
    (whole,) = train(place, tmp_path / "whole", CORES, "data.start_rows=8")
    with pytest.MonkeyPatch.context() as patch:
        from tensorpeft.training import seed

        patch.setattr(seed, "_save", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(place, tmp_path / "parts", CORES, "data.start_rows=8")
    (resumed,) = train(place, tmp_path / "parts", CORES, "data.start_rows=8", resume=True)
    assert resumed.curve("eval_loss")[-1] == whole.curve("eval_loss")[-1]


@pytest.mark.recipes
@pytest.mark.parametrize("name", ["dpo", "labels"])
def test_other_trainers_losses_serve_as_well(name, place, tmp_path):
    targets = "[query, value]" if name == "labels" else "[q_proj, v_proj]"
    adapter = f"adapter={{method: flora, r: 3, train: cores, target_modules: {targets}}}"
    (result,) = train(place, tmp_path / "run", adapter, "data.start_rows=8", name=name)
    config = json.loads((tmp_path / "run" / "seed-0" / "adapter" / "adapter_config.json").read_text())
    assert config["gradient_start"]["rows"] == (16 if name == "dpo" else 8)  # a pair is two
    assert len(result.curve("loss")) == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.start_rows=0"], "data.start_rows=0: expected a whole number"),
        (["data.start_rows=1000"], "1000 are asked for, of 32 training rows"),
        (["data.start_rows=8", "adapter=null"], "all weights are trained"),
        (["data.start_rows=8"], "has no frames that a gradient could set"),  # DoTA
    ],
)
def test_what_cannot_start_so_is_refused(overrides, message, place, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(place, tmp_path / "run", *overrides)
    assert not list(tmp_path.glob("run/seed-0/adapter"))


def test_inspect_update_writes_a_table_for_every_kind_of_weight(place, tmp_path, capsys):
    line = ["inspect", "update", str(place / "sft.yaml"), *FIXED, "adapter.target_modules=[q_proj,up_proj]"]
    main([*line, "--rows", "4", "--steps", "2", "--layers", "2", "--bond", "3", "--output", str(tmp_path)])
    assert "gradient's frames, r=8, core alone" in capsys.readouterr().out
    found = json.loads((tmp_path / "update.json").read_text())
    assert (found["rows"], found["steps"]) == (4, 2)
    assert sorted(kind.split(",")[0] for kind in found["kinds"]) == ["mlp.up_proj", "self_attn.q_proj"]
    for rows in found["kinds"].values():
        shares = [row[key] for row in rows for key in ("other", "update") if row[key] is not None]
        assert all(-1e-6 <= share <= 1 + 1e-6 for share in shares)
        assert all(row["update"] is not None for row in rows)
    assert "| what moves |" in (tmp_path / "update.md").read_text()
    assert not list(tmp_path.glob("checkpoint-*"))
