"""What a LoRA made of an adapter of high rank keeps: by rank, by energy, and distilled.

    python benchmarks/export.py ADAPTER --check FILE [--distil FILE] [--ranks 1 2 4 8 16 32 64] [--energies 0.5 0.9]

ADAPTER is the folder of a saved DoTA or QuanTA adapter. The files are those of `tensorpeft export lora`. Each line is
an export in 16 bits if the base is in 16 bits, else in 32: the largest rank of its layers, the mean error of an update,
the loss on the text of --check, the share of the adapter's gain over its base that is kept, the share of tokens where
the most probable one is the adapter's, the size of its file, and the seconds that it took to make, the distilled ones
with the sixty steps. With --distil every rank is listed twice.

`--rows` writes the rows of the demo's task, chat template and all, for --check and --distil:

    tensorpeft demo
    python benchmarks/export.py runs/demo/entries/dota/rate-0.001/seed-0/adapter --rows runs/rows
    python benchmarks/export.py runs/demo/entries/dota/rate-0.001/seed-0/adapter \
        --check runs/rows/test.jsonl --distil runs/rows/train.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from transformers import AutoTokenizer

from tensorpeft.export import ExportCheck, check_export, distil, to_lora
from tensorpeft.recipes import find_recipe
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.splits import load_splits


def write_rows(adapter: Path, folder: Path) -> None:
    """The demo's training and test rows as its model is asked them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_splits(load_recipe(find_recipe("demo")))
    ((_, tested),) = splits.test.values()
    for split, rows in (("train", splits.train), ("test", tested)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                question = [{"role": "user", "content": row.prompt}]
                prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
                file.write(json.dumps({"prompt": prompt, "response": row.answers[0] + tokenizer.eos_token}) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rows", type=Path, metavar="FOLDER")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--distil", type=Path, metavar="FILE")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--energies", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    arguments = parser.parse_args()
    if arguments.rows is not None:
        write_rows(arguments.adapter, arguments.rows)
        return
    sizes = [{"rank": rank} for rank in arguments.ranks] + [{"energy": energy} for energy in arguments.energies]
    is_told = False
    for size in sizes:
        for is_distilled in (False, True) if arguments.distil is not None and "rank" in size else (False,):
            with TemporaryDirectory() as folder:
                start = perf_counter()
                layers = to_lora(arguments.adapter, folder, **size)
                if is_distilled:
                    distil(arguments.adapter, folder, arguments.distil)
                taken = perf_counter() - start
                check: ExportCheck = check_export(arguments.adapter, folder, text=arguments.check)
                megabytes = Path(folder, "adapter_model.safetensors").stat().st_size / 1e6
            if not is_told:
                is_told = True
                print(f"base {check.base:.4f}, adapter {check.adapter:.4f}, {check.tokens} tokens")
                print(f"the base's most probable token is the adapter's in {check.base_agreement:.1%}\n")
                print("| export | rank | error | loss | gain kept | same token | MB | seconds |")
                print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
            ((kind, value),) = size.items()
            name = f"{kind} {value}{', distilled' if is_distilled else ''}"
            error = "" if is_distilled else f"{fmean(layer.error for layer in layers):.1%}"
            kept = "" if check.kept is None else f"{check.kept:.1%}"
            cells = [name, f"{max(layer.rank for layer in layers)}", error, f"{check.export:.4f}", kept]
            cells += [f"{check.export_agreement:.1%}", f"{megabytes:.2f}", f"{taken:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
