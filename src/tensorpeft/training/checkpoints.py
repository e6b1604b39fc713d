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

    Its state is made to name the best checkpoint in this folder, which may have been moved.
    """
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        file = Path(last) / _STATE
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(last)
            continue
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state['best_global_step']}"
        if state["best_model_checkpoint"] is not None and state["best_model_checkpoint"] != str(best):
            state["best_model_checkpoint"] = str(best)
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
