"""``tensorpeft export``: its forms and their options."""

import argparse
from pathlib import Path

from tensorpeft_cli.options import DTYPES, add_cache, existing, model_name, whole
from tensorpeft_cli.package import import_package, one_line

HELP = "write an adapter in a form that other libraries read"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The forms, each with its options."""
    forms = parser.add_subparsers(title="forms", required=True, metavar="FORM")
    lora = forms.add_parser(
        "lora",
        help="a plain LoRA checkpoint, for PEFT, vLLM, SGLang and llama.cpp",
        description="Write a saved adapter as a plain LoRA: exactly if its updates are of low rank, or cut to --rank.",
    )
    _add_folders(lora)
    lora.add_argument("--rank", type=whole(1), metavar="R", help="for an update of high rank: what it is cut to")
    add_cache(lora)
    lora.set_defaults(run=_lora)
    dense = forms.add_parser(
        "dense",
        help="adapter and base as one plain model in 16 or 32 bits",
        description="Merge a saved adapter into its base model, 4-bit weights dequantised first, and save the model.",
    )
    _add_folders(dense)
    dense.add_argument(
        "--base", type=model_name, metavar="MODEL", help="the base model, if it is not where the adapter says"
    )
    dense.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: %(default)s)")
    add_cache(dense)
    dense.set_defaults(run=_dense)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=existing, metavar="ADAPTER", help="folder of the saved adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _lora(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    from tensorpeft.export import to_lora

    layers = to_lora(arguments.adapter, arguments.out, arguments.rank, progress=True)
    if any(layer.error > 0 for layer in layers):
        width = max(len(layer.name) for layer in layers)
        print(f"{'layer':{width}s}  |ΔW - BA| / |ΔW|")
        for layer in layers:
            print(f"{layer.name:{width}s}  {layer.error:.1%}")
    print(f"{len(layers)} layers written to {one_line(arguments.out)}")


def _dense(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    import torch

    from tensorpeft.export import to_dense

    to_dense(arguments.adapter, arguments.out, getattr(torch, arguments.dtype), arguments.base)
    print(f"Merged model in {arguments.dtype} written to {one_line(arguments.out)}")
