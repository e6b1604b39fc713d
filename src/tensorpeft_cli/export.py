"""``tensorpeft export``: its forms and their options."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tensorpeft_cli.options import DTYPES, add_cache, existing, model_name, whole
from tensorpeft_cli.package import import_package, one_line

if TYPE_CHECKING:
    from tensorpeft.export import ExportedLayer

HELP = "write an adapter in a form that other libraries read"
OUTTYPES = ("f32", "f16", "bf16", "q8_0")


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
    gguf = forms.add_parser(
        "gguf",
        help="a GGUF LoRA, or with --merged a GGUF model, for llama.cpp and what is built on it",
        description="Write a saved adapter as a GGUF LoRA, exactly if its updates are of low rank, or cut to --rank, "
        "or merge it into its base model (--merged) and write that with its tokenizer.",
    )
    gguf.add_argument("adapter", type=existing, metavar="ADAPTER", help="folder of the saved adapter")
    gguf.add_argument("out", type=Path, metavar="OUT", help="file to write, such as adapter.gguf")
    gguf.add_argument("--merged", action="store_true", help="the whole model, the adapter merged into it")
    gguf.add_argument("--rank", type=whole(1), metavar="R", help="for an update of high rank: what it is cut to")
    gguf.add_argument("--base", type=model_name, metavar="MODEL", help="with --merged: see `tensorpeft export dense`")
    gguf.add_argument(
        "--outtype", choices=OUTTYPES, help="of the numbers (default: f32 for an adapter, f16 for a merged model)"
    )
    add_cache(gguf)
    gguf.set_defaults(run=_gguf, extra="gguf")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=existing, metavar="ADAPTER", help="folder of the saved adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _lora(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    from tensorpeft.export import to_lora

    layers = to_lora(arguments.adapter, arguments.out, arguments.rank, progress=True)
    _tell_layers(layers, arguments.out)


def _tell_layers(layers: "list[ExportedLayer]", out: Path) -> None:
    if any(layer.error > 0 for layer in layers):
        width = max(len(layer.name) for layer in layers)
        print(f"{'layer':{width}s}  |ΔW - BA| / |ΔW|")
        for layer in layers:
            print(f"{layer.name:{width}s}  {layer.error:.1%}")
    print(f"{len(layers)} layers written to {one_line(out)}")


def _dense(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    import torch

    from tensorpeft.export import to_dense

    to_dense(arguments.adapter, arguments.out, getattr(torch, arguments.dtype), arguments.base)
    print(f"Merged model in {arguments.dtype} written to {one_line(arguments.out)}")


def _gguf(arguments: argparse.Namespace, command: str) -> None:
    if arguments.merged and arguments.rank is not None:
        raise ValueError("--rank: a merged model has the whole update. Leave --rank out, or --merged.")
    if arguments.base is not None and not arguments.merged:
        raise ValueError("--base: an adapter's file needs no base. Leave --base out, or pass --merged.")
    import_package()
    from tensorpeft.export import to_gguf_lora, to_gguf_model

    if arguments.merged:
        to_gguf_model(arguments.adapter, arguments.out, arguments.outtype or "f16", arguments.base)
        print(f"Merged model written to {one_line(arguments.out)}")
    else:
        outtype = arguments.outtype or "f32"
        layers = to_gguf_lora(arguments.adapter, arguments.out, arguments.rank, outtype=outtype, progress=True)
        _tell_layers(layers, arguments.out)
