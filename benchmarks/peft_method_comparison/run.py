"""Our methods in PEFT's MetaMathQA comparison: Llama-3.2-3B, 5,000 steps of 4 rows, tested on GSM8K.

    python benchmarks/peft_method_comparison/run.py --peft PEFT [EXPERIMENT ...]
    python benchmarks/peft_method_comparison/run.py --smoke MODEL --data GSM8K.jsonl [EXPERIMENT ...]

PEFT is a checkout of github.com/huggingface/peft; its own run.py trains, tests, and writes the result beside others.
An experiment is a folder in experiments/, such as lorta/llama-3.2-3B-rank8; none given: all that have no result yet,
each in a process of its own. README.md says what is needed, and what the small version (--smoke) covers.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
EXPERIMENTS = FOLDER / "experiments"
# PEFT's, where an experiment says nothing else.
OPTIMIZER = {"lr": 1e-4, "weight_decay": 0.1}
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
SMOKE_STEPS, SMOKE_ROWS, SMOKE_LENGTH, SMOKE_NEW_TOKENS = 4, 2, 96, 8


def list_experiments() -> list[str]:
    """All of them, such as lorta/llama-3.2-3B-rank8."""
    return sorted(file.parent.relative_to(EXPERIMENTS).as_posix() for file in EXPERIMENTS.rglob("adapter_config.json"))


def read_training(experiment: str) -> dict[str, Any]:
    """What an experiment trains with otherwise than PEFT's default."""
    file = EXPERIMENTS / experiment / "training_params.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def comparison_of(checkout: Path) -> Path:
    """The folder of the comparison in a checkout of PEFT."""
    folder = checkout.resolve() / "method_comparison" / "MetaMathQA"
    if not (folder / "run.py").is_file():
        raise SystemExit(f"no {folder / 'run.py'}. Give a checkout: git clone https://github.com/huggingface/peft")
    return folder


def has_result(comparison: Path, experiment: str) -> bool:
    """Whether PEFT's script has written one: on its branch main without, else with the time in its name."""
    name = experiment.replace("/", "--")
    folders = (comparison / "results", comparison / "temporary_results")
    return any([*folder.glob(f"{name}.json"), *folder.glob(f"{name}--*.json")] for folder in folders)


def run_in_peft(checkout: Path, experiment: str) -> None:
    """Run PEFT's own script in this process, with the checkout's PEFT, which knows our methods."""
    comparison = comparison_of(checkout)
    # Its script asks git which PEFT it is: the installed one would not do.
    sys.path[:0] = [str(comparison), str(checkout.resolve() / "src")]
    import tensorpeft  # noqa: F401  # registers our methods, before any configuration is read

    os.chdir(FOLDER)  # the script wants ./experiments/METHOD/NAME
    sys.argv = ["run.py", "-v", f"experiments/{experiment}"]
    runpy.run_path(str(comparison / "run.py"), run_name="__main__")


def run_all(checkout: Path, experiments: Sequence[str]) -> int:
    """Run each without a result in a process of its own; how many have none in the end."""
    comparison, failed = comparison_of(checkout), 0
    for experiment in experiments:
        if has_result(comparison, experiment):
            print(f"{experiment}: has a result")
            continue
        command = [sys.executable, str(Path(__file__).resolve()), "--peft", str(checkout.resolve()), experiment]
        failed += subprocess.run(command).returncode != 0
    return failed


def smoke(experiment: str, model_name: str, data: Path, output: Path) -> dict[str, Any]:
    """The result of a few steps of an experiment's own adapter and optimiser on another model, as JSON in a folder.

    What PEFT's script does with a model is done here, too, in its order: an adapter in float32 on a base in bfloat16,
    steps, answers drawn in inference mode, steps again, the adapter saved; then it is loaded, and must answer alike.
    """
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    from tensorpeft.loading.models import load_pretrained, load_tokenizer
    from tensorpeft.tasks.arithmetic import score_number

    config = PeftConfig.from_pretrained(str(EXPERIMENTS / experiment))
    optimizer_arguments = OPTIMIZER | read_training(experiment).get("optimizer_kwargs", {})
    torch.manual_seed(0)
    tokenizer = load_tokenizer(model_name)
    tokenizer.pad_token = tokenizer.eos_token

    def load_base() -> Any:
        return load_pretrained(AutoModelForCausalLM, model_name, dtype=torch.bfloat16)

    def encode(texts: Sequence[str], side: str) -> Any:
        return tokenizer(
            list(texts), padding=True, truncation=True, max_length=SMOKE_LENGTH, return_tensors="pt", padding_side=side
        )

    questions = list(islice(_read_gsm8k(data), SMOKE_STEPS * SMOKE_ROWS))
    prompts = encode([TEMPLATE.format(query=row["question"]) for row in questions[:SMOKE_ROWS]], "left")

    @torch.inference_mode()
    def answer(model: Any) -> list[str]:
        model.eval()
        written = model.generate(**prompts, max_new_tokens=SMOKE_NEW_TOKENS, do_sample=False)
        model.train()
        return tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)

    model = get_peft_model(load_base(), config, autocast_adapter_dtype=True)
    optimizer = torch.optim.AdamW(model.parameters(), **optimizer_arguments)
    schedule = get_cosine_schedule_with_warmup(optimizer, SMOKE_STEPS // 10, SMOKE_STEPS)
    metrics: list[dict[str, float]] = []
    for step in range(1, SMOKE_STEPS + 1):
        rows = questions[(step - 1) * SMOKE_ROWS : step * SMOKE_ROWS]
        batch = encode([TEMPLATE.format(query=row["question"]) + row["answer"] for row in rows], "right")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        metrics.append({"step": step, "train loss": loss.item()})
        answers = answer(model)
    right = [score_number(text, _question(row)).metrics["accuracy"] for text, row in zip(answers, questions)]
    metrics.append({"step": SMOKE_STEPS, "test accuracy": sum(right) / len(right), "train loss": loss.item()})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file_size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        loaded = PeftModel.from_pretrained(load_base(), folder)
        if answer(loaded) != answers:
            raise RuntimeError(f"{experiment}: the saved adapter answers otherwise than the trained one.")
    result = {
        "run_info": {"experiment_name": experiment, "train_config": {"model_id": model_name, "max_steps": SMOKE_STEPS}},
        "train_info": {
            "num_trainable_params": model.get_nb_trainable_parameters()[0],
            "file_size": file_size,
            "status": "success",
            "metrics": metrics,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{experiment.replace('/', '--')}.json"
    file.write_text(json.dumps(result, indent=2), encoding="utf-8")
    return result


def _read_gsm8k(file: Path) -> Iterator[dict[str, str]]:
    """Its rows, again and again."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return cycle(json.loads(line) for line in lines)


def _question(row: dict[str, str]) -> Any:
    from tensorpeft.tasks.arithmetic import parse_gsm8k
    from tensorpeft.tasks.records import Record

    return parse_gsm8k(Record(row, "GSM8K"))[0]


def main() -> int:
    """Run experiments; the exit code says whether all have a result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--peft", type=Path, help="a checkout of PEFT")
    way.add_argument("--smoke", metavar="MODEL", help="a small model: a few steps of every experiment, on a CPU")
    way.add_argument("--list", action="store_true", help="print the experiments")
    parser.add_argument("--data", type=Path, help="of --smoke: GSM8K's JSON lines")
    parser.add_argument("--output", type=Path, default=Path("runs/smoke/peft_method_comparison"), help="of --smoke")
    arguments = parser.parse_args()
    known = list_experiments()
    if unknown := [name for name in arguments.experiments if name not in known]:
        parser.error(f"no experiment {unknown[0]!r}. There are {', '.join(known)}.")
    chosen = arguments.experiments or known
    if arguments.list:
        print("\n".join(chosen))
        return 0
    if arguments.smoke is not None:
        if arguments.data is None:
            parser.error("--smoke needs --data, GSM8K's JSON lines.")
        for experiment in chosen:
            found = smoke(experiment, arguments.smoke, arguments.data, arguments.output)["train_info"]
            print(f"{experiment}: {found['num_trainable_params']:,} parameters, {found['file_size']:,} bytes")
        return 0
    if len(arguments.experiments) == 1:
        run_in_peft(arguments.peft, arguments.experiments[0])
        return 0
    return int(run_all(arguments.peft, chosen) > 0)


if __name__ == "__main__":
    sys.exit(main())
