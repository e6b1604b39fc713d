"""``tensorpeft quantize``."""

import argparse
from pathlib import Path

from tensorpeft_cli.options import (
    DTYPES,
    MODEL,
    add_cache,
    add_double_quant,
    add_network,
    model_name,
    network_of,
    whole,
)
from tensorpeft_cli.package import import_package, one_line

HELP = "write QDoTA's base: a checkpoint in 4 bits, with the start of the adapter kept apart"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Quantise a safetensors checkpoint to NF4 residuals and cores, one weight in memory at a time. Interrupted, "
        "the same command goes on where it stopped."
    )
    parser.add_argument("model", type=model_name, metavar="MODEL", help=f"{MODEL} in 16 or 32 bits")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    add_network(parser)
    add_double_quant(parser)
    parser.add_argument(
        "--rounds", type=whole(1), default=1, metavar="K", help="of decomposition and quantisation (default: 1)"
    )
    parser.add_argument("--compute-dtype", choices=DTYPES, help="what products run in (default: the input's dtype)")
    parser.add_argument(
        "--skip", nargs="+", default=(), metavar="NAME", help="further linear layers to leave as they are"
    )
    add_cache(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, command: str) -> None:
    import_package()
    import torch

    from tensorpeft.quantization.streamed import quantize_checkpoint

    dtype = None if arguments.compute_dtype is None else getattr(torch, arguments.compute_dtype)
    config = network_of(arguments)
    quantize_checkpoint(
        arguments.model,
        arguments.out,
        config,
        arguments.rounds,
        not arguments.no_double_quant,
        dtype,
        arguments.skip,
        progress=True,
    )
    print(
        f"Residual base written to {one_line(arguments.out)}. After `import tensorpeft`, from_pretrained loads it; "
        "adapt it with"
    )
    targets = sorted(config.target_modules) if isinstance(config.target_modules, set) else config.target_modules
    print(f"DotaConfig(r={config.r}, num_cores={config.num_cores}, target_modules={targets!r})")
