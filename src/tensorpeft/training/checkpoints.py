"""The checkpoints of an interrupted run: which one is whole, and what to do with one that is the last."""

import json
import shutil
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from tensorpeft.reports.files import write_lines
from tensorpeft.training.sharding import is_sharded, shard

_STATE = "trainer_state.json"  # what Trainer writes last


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; what a killed run left half-written is removed.

    Its state is made to name the best checkpoint in this folder, which may have been moved; None where there is none.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        file = Path(last) / _STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(last)
            continue
        # Not by `best_global_step`, the best evaluation, at which no checkpoint need have been written.
        best = None if (named := state["best_model_checkpoint"]) is None else folder / Path(named).name
        here = str(best) if best is not None and best.is_dir() else None
        if named != here:
            state["best_model_checkpoint"] = here
            write_lines(file, [json.dumps(state, indent=2)])
        return Path(last)
    return None


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from a checkpoint to the end; the model is then the one to keep.

    A checkpoint of the last step is taken up as it is: Trainer would do one more step in the middle of an epoch.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / _STATE))
        if state.global_step >= state.max_steps:
            state.is_world_process_zero = trainer.is_world_process_zero()
            state.is_local_process_zero = trainer.is_local_process_zero()
            trainer.state = state
            if is_sharded(trainer):
                shard(trainer)  # as training would have: no other model takes the checkpoint
            if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
                trainer._load_best_model()
            else:
                trainer._load_from_checkpoint(str(checkpoint))
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def kept_step(trainer: Trainer) -> int | None:
    """The step of the checkpoint that a trained model was loaded from; None: it is the model of the last step."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return None if best is None else int(Path(best).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
