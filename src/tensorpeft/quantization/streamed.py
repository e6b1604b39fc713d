"""A checkpoint on disk becomes a residual base on disk, one weight in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tensorpeft.loading.architectures import build_empty, find_class
from tensorpeft.loading.errors import explained, require_config
from tensorpeft.loading.names import resolve
from tensorpeft.plugin.config import TensorConfig
from tensorpeft.plugin.tensor_map import settle
from tensorpeft.quantization.model import Shapes, check_targets, network_of, plan_layers
from tensorpeft.quantization.quantizer import ResidualConfig
from tensorpeft.reports.files import UNFINISHED, write_json, write_lines, write_whole
from tensorpeft.reports.folders import LOCK, sole_writer
from tensorpeft.sites import Site

# What a shard of the output holds, about: a part of the work that an interruption can cost, and memory that is needed.
_SHARD_BYTES = 2**26
_STATE = "quantize_state.json"
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2}  # of an element; others: 1


@dataclasses.dataclass(frozen=True)
class _Job:
    """A tensor of the checkpoint, and what becomes of it."""

    key: str
    file: Path
    num_bytes: int
    layer: str | None = None  # the model's layer whose weight it is, if that is quantised
    is_transposed: bool = False  # stored (in, out)


@torch.no_grad()
def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    config: TensorConfig | None,
    rounds: int = 1,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip_modules: Sequence[str] = (),
    progress: bool = False,
) -> Path:
    """The folder `out` with the residual base of a checkpoint: what `quantize_residual` and `save_pretrained` would
    write, but never with the model in memory.

    Each tensor is read, decomposed, quantised and freed before the next; shards of about 64 MB are written under
    another name and renamed when they are complete. Interrupted in any way, the same call goes on after the last
    complete shard, and the result is the same bytes (on one machine with one number of threads). Any
    `from_pretrained` loads it after `import tensorpeft`, without decomposing anything.

    Args:
        source: name (`tensorpeft.loading.names.resolve`) of a safetensors checkpoint in full or half precision.
        out: folder to write; new, empty, or what an interrupted call with the same arguments left.
        config: a `DotaConfig`: the layers, the modes and the bond; with r="auto" the weights are read twice, first for
            the bonds, which are written into it.
        rounds: of decomposition and quantisation.
        double_quant: whether the blocks' scales are quantised too.
        compute_dtype: what products run in; None: in the dtype of the input.
        skip_modules: names (endings) of further linear layers to leave as they are.
        progress: whether to show a progress bar.

    Raises:
        BlockingIOError: another call writes to `out`.
        FileNotFoundError: `source` has no config.json or no safetensors.
        ValueError: `out` holds something else, the model is quantised already, weights are missing or damaged, or
            `config` does not fit, or there is no such model (see `quantize_residual`).
    """
    source, out = _find_source(source), Path(out)
    with sole_writer(out):
        model_config, model = _empty_model(source)
        check_targets(config)
        if config is not None:
            settle(model, config, lambda sites: _StoredBases(source, model, sites))
        shapes, plain = plan_layers(model, config, skip_modules)
        jobs = _plan_jobs(source, model, {*shapes, *plain})
        dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
        residual_config = ResidualConfig(shapes, plain, dtype, double_quant, rounds)
        shards = list(_cut_into_shards(jobs))
        _claim(out, _fingerprint(jobs, residual_config))
        with tqdm(total=len(jobs), desc="quantising", unit="tensor", disable=not progress) as bar:
            for number, shard in enumerate(shards, 1):
                path = out / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if path.exists():
                    bar.update(len(shard))
                    continue
                tensors: dict[str, Tensor] = {}
                for job in shard:
                    tensors.update(_convert(job, shapes, residual_config))
                    bar.update()
                with write_whole(path) as unfinished:
                    save_file(tensors, unfinished, metadata={"format": "pt"})
        _finish(source, out, model_config, residual_config)
    return out


def _find_source(source: str | Path) -> Path:
    """The folder of a checkpoint; a Hub name is downloaded, or found in the cache when offline."""
    source = resolve(source)
    if Path(source).is_dir():
        return Path(source)
    with explained(source):
        # Not "*.safetensors": many repositories hold the same weights in other forms beside these.
        return Path(snapshot_download(source, allow_patterns=["model*.safetensors", *_COPIED]))


def _empty_model(source: Path) -> tuple[Any, torch.nn.Module]:
    """The model's configuration, and the model on the meta device."""
    if not (source / "config.json").exists():
        raise FileNotFoundError(f"{source}: no config.json, expected the folder of a transformers model.")
    require_config(source)
    with explained(source):
        config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source}: quantised already. Pass the checkpoint in full or half precision.")
    return config, build_empty(find_class(config, str(source)), config)


def _plan_jobs(source: Path, model: torch.nn.Module, layers: set[str]) -> list[_Job]:
    """All tensors of the checkpoint in a fixed order."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    jobs = []
    for file in _weight_files(source):
        with _open(file) as opened:
            for key in sorted(opened.keys()):
                part = opened.get_slice(key)
                shape, dtype = part.get_shape(), part.get_dtype()
                stem = key.removesuffix(".weight")
                # With another head than it was saved with, a model has or lacks the prefix of its base model.
                names = (stem, prefix + stem, stem.removeprefix(prefix)) if stem != key else ()
                layer = next((name for name in names if name in layers), None)
                if layer is not None and dtype not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{file}: {key} is {dtype}, expected F32, F16 or BF16 to quantise.")
                transposed = layer is not None and type(modules[layer]) is Conv1D
                jobs.append(_Job(key, file, prod(shape) * _BYTES.get(dtype, 1), layer, transposed))
    if missing := sorted(layers - {job.layer for job in jobs}):
        raise ValueError(
            f"{source}: no weight of {len(missing)} layers that are to be quantised, such as {missing[0]}. The "
            "checkpoint is incomplete, or keeps them under other names: then load the model and call "
            "quantize_residual(model, config)."
        )
    return jobs


def _weight_files(source: Path) -> list[Path]:
    index = source / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    if absent := [name for name in names if not (source / name).exists()]:
        raise FileNotFoundError(
            f"{source}: {absent[0]} is missing. Expected {SAFE_WEIGHTS_NAME}, or every shard that "
            f"{SAFE_WEIGHTS_INDEX_NAME} names; a pickle (.bin) is never loaded."
        )
    return [source / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error


def _cut_into_shards(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """The jobs in groups of about `_SHARD_BYTES` of output; known before the first one is done."""
    shard: list[_Job] = []
    size = 0
    for job in jobs:
        # The bytes of a 4-bit weight with its scales and cores; exact ones are not needed, the same ones are.
        size += job.num_bytes if job.layer is None else job.num_bytes // 3
        shard.append(job)
        if size >= _SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _fingerprint(jobs: Sequence[_Job], config: ResidualConfig) -> str:
    """What tells one call's result from another's: sources, their sizes and times, and all settings."""
    files = {str(job.file): os.stat(job.file) for job in jobs}
    text = json.dumps(
        [
            config.to_dict(),
            [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files.items())],
            _SHARD_BYTES,
        ],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _claim(out: Path, fingerprint: str) -> None:
    """Make the folder this call's, or take over what an interrupted call of the same kind left in it."""
    state = out / _STATE
    if state.exists():
        if json.loads(state.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise ValueError(
                f"{out}: holds part of a quantisation with other arguments, or of a checkpoint that has changed since. "
                "Repeat that call, or remove the folder."
            )
    elif any(path.suffix != UNFINISHED and path.name != LOCK for path in out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty. Name a new one, or remove what is in it.")
    else:
        write_json(state, {"fingerprint": fingerprint})


def _read(job: _Job) -> Tensor:
    """The tensor of the checkpoint; a weight as (out, in)."""
    with _open(job.file) as opened:
        tensor = opened.get_tensor(job.key).clone()  # a copy: the file's pages can go
    return tensor.t().contiguous() if job.is_transposed else tensor


class _StoredBases:
    """What a checkpoint has at the sites, for a model on the meta device."""

    def __init__(self, source: Path, model: torch.nn.Module, sites: Sequence[Site]):
        jobs = _plan_jobs(source, model, {site.name for site in sites})
        self._jobs = {job.layer: job for job in jobs if job.layer is not None}

    def read_weight(self, site: Site) -> Tensor:
        return _read(self._jobs[site.name])

    def start(self, site: Site) -> None:
        return None


def _convert(job: _Job, shapes: Mapping[str, Shapes], config: ResidualConfig) -> dict[str, Tensor]:
    """What a tensor of the checkpoint becomes, by key."""
    from tensorpeft.quantization.residual import digest, quantise, split

    weight = _read(job)
    if job.layer is None:
        return {job.key: weight}
    stem = job.key.removesuffix("weight")
    result: dict[str, Tensor] = {}
    try:
        if job.layer in shapes:
            parts = split(weight, *network_of(shapes[job.layer]), config.rounds, config.double_quant)
            stored = parts.residual
            result = {f"{stem}start.core_{k}": core.contiguous() for k, core in enumerate(parts.cores, 1)}
            result[f"{stem}start.digest"] = digest(parts.residual, parts.cores)
        else:
            stored = quantise(weight, config.double_quant)
    except ValueError as error:
        raise ValueError(f"{job.file}: {job.key}: {error}") from error
    state = stored.quant_state.as_dict(packed=True)
    return {**result, job.key: stored.data, **{f"{job.key}.{name}": value for name, value in state.items()}}


def _finish(source: Path, out: Path, model_config: Any, config: ResidualConfig) -> None:
    """Write what is small; the state file goes last."""
    weight_map, total = {}, 0
    for path in sorted(out.glob("model-*.safetensors")):
        with _open(path) as opened:
            weight_map.update(dict.fromkeys(opened.keys(), path.name))
        total += path.stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_lines(out / SAFE_WEIGHTS_INDEX_NAME, [json.dumps(index, indent=2, sort_keys=True)])
    written = {SAFE_WEIGHTS_INDEX_NAME, "config.json", _STATE}
    for path in (path for pattern in _COPIED for path in source.glob(pattern)):
        if path.name not in written and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    if hasattr(model_config, "auto_map"):
        del model_config.auto_map  # code that was not needed, and is not copied
    model_config.quantization_config = config
    model_config.save_pretrained(out)
    (out / _STATE).unlink()
