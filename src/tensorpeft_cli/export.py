"""``tensorpeft export``: its forms and their options."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tensorpeft_cli.options import DTYPES, add_cache, existing, model_name, positive, whole
from tensorpeft_cli.package import import_package, one_line

DISTIL_STEPS = 60
HELP = "write an adapter in a form that other libraries read"
OUTTYPES = ("f32", "f16", "bf16", "q8_0")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The forms, each with its options."""
    forms = parser.add_subparsers(title="forms", required=True, metavar="FORM")
    lora = forms.add_parser(
        "lora",
        help="a plain LoRA checkpoint, for PEFT, vLLM, SGLang and llama.cpp",
        description="Write a saved adapter as a plain LoRA: exactly if its updates are of low rank. Updates of high "
        "rank are cut, and what that costs is measured on text: an export that is worse than its base is refused "
        "(exit code 1).",
    )
    _add_folders(lora)
    _add_size(lora)
    lora.add_argument("--dtype", choices=DTYPES, help="of the factors (default: float16 for a base in 16 bits)")
    lora.add_argument(
        "--distil", type=existing, metavar="FILE", help=f"train it for {DISTIL_STEPS} steps on a text per line"
    )
    _add_check(lora)
    _add_base(lora)
    add_cache(lora)
    lora.set_defaults(run=_lora)
    delta = forms.add_parser(
        "delta",
        help="the updates alone in 8 or 4 bits, which tensorpeft.load_delta adds to the base's weights",
        description="Write the updates of a saved adapter in blocks of 32 numbers of 8 or 4 bits with a scale each. "
        "What that costs is measured on text: an export that is worse than its base is refused (exit code 1).",
    )
    _add_folders(delta)
    delta.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a number (default: %(default)s)")
    _add_check(delta)
    _add_base(delta)
    add_cache(delta)
    delta.set_defaults(run=_delta)
    dense = forms.add_parser(
        "dense",
        help="adapter and base as one plain model in 16 or 32 bits",
        description="Merge a saved adapter into its base model, 4-bit weights dequantised first, and save the model.",
    )
    _add_folders(dense)
    _add_base(dense)
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
    _add_size(gguf)
    _add_base(gguf)
    gguf.add_argument(
        "--outtype", choices=OUTTYPES, help="of the numbers (default: f32 for an adapter, f16 for a merged model)"
    )
    add_cache(gguf)
    gguf.set_defaults(run=_gguf, extra="gguf")


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=existing, metavar="ADAPTER", help="folder of the saved adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=whole(1), metavar="R", help="for an update of high rank: what it is cut to")
    size.add_argument("--energy", type=positive, metavar="E", help="the share of every update's energy to keep: 0.99")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", type=existing, metavar="FILE", help="a text per line to measure on (default: the model's own text)"
    )
    parser.add_argument("--no-check", action="store_true", help="measure nothing: base and text are not loaded")
    parser.add_argument("--force", action="store_true", help="write what is worse than its base, too")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=model_name, metavar="MODEL", help="the base model, if it is not where the adapter says"
    )


def _lora(arguments: argparse.Namespace, command: str) -> int:
    is_cut = arguments.rank is not None or arguments.energy is not None
    _check_check(arguments)
    if arguments.distil is not None and not is_cut:
        raise ValueError("--distil: only what is cut has something to learn. Pass --rank or --energy, too.")
    import_package()
    import torch
    from tqdm import tqdm

    from tensorpeft.export import distil, start_commands, to_lora

    checks = list[Any]()

    def finish(folder: Path) -> None:
        if arguments.distil is not None:
            with tqdm(desc="Distilling", total=DISTIL_STEPS) as bar:
                distil(
                    arguments.adapter,
                    folder,
                    arguments.distil,
                    arguments.base,
                    DISTIL_STEPS,
                    on_step=lambda loss: (bar.set_postfix(nats=f"{loss:.4f}"), bar.update()),
                )
        checks.extend(_check(arguments, folder, by_default=is_cut))

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    try:
        layers = to_lora(
            arguments.adapter,
            arguments.out,
            arguments.rank,
            progress=True,
            energy=arguments.energy,
            dtype=dtype,
            finish=finish,
            base=arguments.base,
        )
    except _WorseError as error:
        return _fail_worse(
            error.check, "Take a larger --rank or --energy, --distil, or merge the adapter (export dense)"
        )
    _print_layers(layers, ", before --distil" if arguments.distil else "")
    for check in checks:
        _print_check(check)
    file = arguments.out / "adapter_model.safetensors"
    print(f"{len(layers)} layers, {file.stat().st_size / 1e6:.2f} MB, written to {one_line(arguments.out)}")
    size = (arguments.rank, arguments.energy)
    for engine, line in start_commands(layers, arguments.out, arguments.base, arguments.adapter, *size):
        print(f"{engine:9s} {one_line(line)}")
    return 0


def _delta(arguments: argparse.Namespace, command: str) -> int:
    _check_check(arguments)
    import_package()
    from tensorpeft.export import to_delta

    checks = list[Any]()
    try:
        layers = to_delta(
            arguments.adapter,
            arguments.out,
            arguments.bits,
            progress=True,
            base=arguments.base,
            finish=lambda folder: checks.extend(_check(arguments, folder, by_default=True)),
        )
    except _WorseError as error:
        return _fail_worse(error.check, "Take --bits 8, or merge the adapter (export dense)")
    for check in checks:
        _print_check(check)
    error, file = max(layer.error for layer in layers), arguments.out / "delta.safetensors"
    print(f"{len(layers)} layers, |ΔW - export| at most {error:.2%} of |ΔW|")
    print(f"{file.stat().st_size / 1e6:.2f} MB written to {one_line(arguments.out)}")
    print(f"model = tensorpeft.load_delta(base, {one_line(repr(str(arguments.out.absolute())))})")
    return 0


def _check_check(arguments: argparse.Namespace) -> None:
    if arguments.no_check and (arguments.check is not None or arguments.force):
        raise ValueError("--no-check beside --check or --force: expected one of them.")


def _check(arguments: argparse.Namespace, folder: Path, by_default: bool) -> list[Any]:
    """What the export in a folder lost, if that is to be measured: no or one `ExportCheck`.

    Raises:
        _WorseError: it is worse than its base, and --force was not given.
    """
    from tensorpeft.export import check_export, is_measurable

    is_asked = not arguments.no_check and by_default and is_measurable(arguments.adapter, arguments.base)
    if arguments.check is None and not is_asked:
        return []
    check = check_export(arguments.adapter, folder, arguments.base, arguments.check)
    if check.is_worse_than_base and not arguments.force:
        raise _WorseError(check)
    return [check]


def _fail_worse(check: Any, remedy: str) -> int:
    """Tell of an export that is worse than its base; the exit code."""
    _print_check(check)
    print(
        f"tensorpeft: the export's loss is {check.export:.4f}, that of the base alone {check.base:.4f}: nothing was "
        f"written. {remedy}; --force writes it.",
        file=sys.stderr,
    )
    return 1


class _WorseError(Exception):
    """An export that nobody should serve."""

    def __init__(self, check: Any) -> None:
        super().__init__()
        self.check = check


def _print_layers(layers: Any, more: str = "") -> None:
    if any(layer.error > 0 for layer in layers):
        width = max(len(layer.name) for layer in layers)
        print(f"{'layer':{width}s}  rank  |ΔW - BA| / |ΔW|{more}")
        for layer in layers:
            print(f"{layer.name:{width}s}  {layer.rank:4d}  {layer.error:.2%}")


def _print_check(check: Any) -> None:
    print(f"{'':8s}  {'loss':>7s}  the adapter's token   ({check.tokens} tokens of text)")
    print(f"{'base':8s}  {check.base:7.4f}  {check.base_agreement:19.1%}")
    print(f"{'adapter':8s}  {check.adapter:7.4f}")
    kept = "no gain of the adapter on this text" if check.kept is None else f"{check.kept:.1%} of the adapter's gain"
    print(f"{'export':8s}  {check.export:7.4f}  {check.export_agreement:19.1%}   {kept}")


def _dense(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    import torch

    from tensorpeft.export import to_dense

    to_dense(arguments.adapter, arguments.out, getattr(torch, arguments.dtype), arguments.base)
    print(f"Merged model in {arguments.dtype} written to {one_line(arguments.out)}")


def _gguf(arguments: argparse.Namespace, command: str) -> None:
    is_cut = arguments.rank is not None or arguments.energy is not None
    if arguments.merged and is_cut:
        raise ValueError("--rank, --energy: a merged model has the whole update. Leave them out, or --merged.")
    import_package()
    from tensorpeft.export import to_gguf_lora, to_gguf_model

    if arguments.merged:
        to_gguf_model(arguments.adapter, arguments.out, arguments.outtype or "f16", arguments.base)
        print(f"Merged model written to {one_line(arguments.out)}")
        return
    outtype, size = arguments.outtype or "f32", {"rank": arguments.rank, "energy": arguments.energy}
    layers = to_gguf_lora(arguments.adapter, arguments.out, outtype=outtype, progress=True, base=arguments.base, **size)
    _print_layers(layers)
    print(f"{len(layers)} layers written to {one_line(arguments.out)}")
