"""What is left of an adapter of high rank: of its updates in few bits, and of a LoRA by rank, by energy, distilled.

    python benchmarks/export.py ADAPTER --check FILE [--bits 8 4] [--ranks 1 2 4 8 16 32 64] [--energies 0.5 0.9]
        [--distil FILE]

ADAPTER is the folder of a saved DoTA or QuanTA adapter. The files are those of `tensorpeft export delta` and `export
lora`. Each line is an export, of a LoRA in 16 bits if the base is in 16 bits, else in 32: the largest rank of its
layers, the mean error of an update, the loss on the text of --check, the share of the adapter's gain over its base that
is kept, the share of tokens where the most probable one is the adapter's, the size of its file, and the seconds that it
took to make, the distilled ones with the sixty steps. With --distil every rank is listed twice.

`--rows` writes the rows of a recipe, the demo's by default, chat template and all, for --check and --distil:

    tensorpeft demo
    python benchmarks/export.py runs/demo/entries/dota/rate-0.001/seed-0/adapter --rows runs/rows
    python benchmarks/export.py runs/demo/entries/dota/rate-0.001/seed-0/adapter \
        --check runs/rows/test.jsonl --distil runs/rows/train.jsonl
    python benchmarks/export.py runs/small/stories_sft/seed-0/adapter --rows runs/rows --recipe small/stories_sft
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

from tensorpeft.export import check_export, distil, to_delta, to_lora
from tensorpeft.recipes import find_recipe
from tensorpeft.training.recipe import load_recipe
from tensorpeft.training.splits import load_splits


def write_rows(adapter: Path, folder: Path, recipe: str) -> None:
    """The rows of a recipe as its model is asked them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    splits = load_splits(load_recipe(find_recipe(recipe)))
    ((_, tested),) = splits.test.values()
    for split, rows in (("train", splits.train), ("validation", splits.validation), ("test", tested)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                prompt = row.prompt
                if tokenizer.chat_template is not None:
                    question = [{"role": "user", "content": prompt}]
                    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
                response = (*row.answers, row.response)[0] + tokenizer.eos_token
                file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rows", type=Path, metavar="FOLDER")
    parser.add_argument("--recipe", default="demo", metavar="NAME")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--distil", type=Path, metavar="FILE")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--energies", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    arguments = parser.parse_args()
    if arguments.rows is not None:
        write_rows(arguments.adapter, arguments.rows, arguments.recipe)
        return
    sizes: list[dict[str, Any]] = [{"bits": bits} for bits in arguments.bits]
    sizes += [{"rank": rank} for rank in arguments.ranks] + [{"energy": energy} for energy in arguments.energies]
    is_told = False
    for size in sizes:
        for is_distilled in (False, True) if arguments.distil is not None and "rank" in size else (False,):
            with TemporaryDirectory() as folder:
                start = perf_counter()
                layers: Any = (to_delta if "bits" in size else to_lora)(arguments.adapter, folder, **size)
                if is_distilled:
                    distil(arguments.adapter, folder, arguments.distil)
                taken = perf_counter() - start
                check = check_export(arguments.adapter, folder, text=arguments.check)
                megabytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
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
            rank = "" if "bits" in size else f"{max(layer.rank for layer in layers)}"
            cells = [name, rank, error, f"{check.export:.4f}", kept]
            cells += [f"{check.export_agreement:.1%}", f"{megabytes:.2f}", f"{taken:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
