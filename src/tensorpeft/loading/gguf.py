"""A GGUF file, llama.cpp's, as the folder of a plain transformers model."""

import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tensorpeft.loading.cache import cache_folder, find_or_make, require_space
from tensorpeft.loading.quiet import quiet

_FORMAT = 1  # of the folders; a change here makes all of them anew
_JOINED = "joined.gguf"  # all parts, until they are read
_PART = re.compile(r"\.gguf\.part-?(\d+)$")


def find_gguf(
    folders: Sequence[Path],
    pattern: str,  # of files in a folder, such as "*"; "**/*": of those in its folders, too
    name: str,  # for messages
) -> list[Path]:  # a whole file, or all parts of one in order; empty: there is none
    """The GGUF file that the folders hold.

    Raises:
        ValueError: there are several, or a part is missing.
    """
    found = sorted(path for folder in folders for path in folder.glob(f"{pattern}.gguf"))
    parts = {path: match for folder in folders for path in folder.glob(f"{pattern}.gguf.part*")
             if (match := _PART.search(path.name))}  # fmt: skip
    files = [*found, *sorted(parts, key=lambda path: (path.name[: parts[path].start()], int(parts[path][1])))]
    if len({_PART.sub(".gguf", file.name) for file in files}) > 1 or len(found) > 1 or (found and parts):
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{name}: several GGUF files ({names}). Pass the path of one of them.")
    numbers = [int(parts[file][1]) for file in files if file in parts]
    if numbers and numbers != list(range(min(numbers[0], 1), len(numbers) + min(numbers[0], 1))):
        raise ValueError(
            f"{name}: parts of {files[0].name.partition('.part')[0]} are missing or there twice: found those with the "
            f"numbers {', '.join(map(str, numbers))}. All of them are needed."
        )
    return files


def make_plain(
    files: Sequence[Path],  # a whole file, or all parts of one in order
) -> str:
    """The folder, in the cache, of the file's model in float32, which is exact, with its tokenizer.

    transformers reads such a file anew in every process, for many seconds, and no other library that takes a folder
    does; so it is made once. The second call reads no weight.

    Raises:
        ModuleNotFoundError: the library gguf is not installed.
        ValueError: it is no GGUF file, cut off, not a causal language model that transformers knows, or too large for
            the disk.
    """
    if find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf', which reads GGUF files", name="gguf")
    name = files[0].name.partition(".gguf")[0]
    maker = f"{_FORMAT} transformers {version('transformers')} gguf {version('gguf')}"
    return str(find_or_make(files, name, maker, lambda folder: _convert(files, folder)))


def _convert(files: Sequence[Path], folder: Path) -> None:
    """Fill the model's folder."""
    # Not a name relative to a folder: transformers would first look for that in the working directory.
    file, label = files[0].absolute(), str(files[0])
    if len(files) > 1:
        require_space(sum(part.stat().st_size for part in files), label)
        file = folder / _JOINED
        _join(files, file)
    architecture, num_elements = _inspect(file, label)
    require_space(4 * num_elements, label)
    print(
        f"{files[0].name}: written once as a plain model, {4 * num_elements / 1e6:.0f} MB in float32, to "
        f"{cache_folder()}",
        file=sys.stderr,
    )
    with quiet():
        try:
            model, tokenizer = _load(file)
        except (ValueError, LookupError, TypeError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{label}: transformers {version('transformers')} makes no causal language model of this GGUF file, "
                f"whose architecture is {architecture!r} ({str(error).strip()}). Pass the model in another form."
            ) from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / _JOINED).unlink(missing_ok=True)


def _join(files: Sequence[Path], target: Path) -> None:
    with target.open("wb") as joined:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, joined)


def _inspect(file: Path, label: str) -> tuple[str, int]:
    """The architecture, as llama.cpp calls it, and how many numbers the file holds."""
    from gguf import GGUFReader

    with file.open("rb") as opened:
        if (magic := opened.read(4)) != b"GGUF":
            raise ValueError(f"{label}: not a GGUF file: it begins with {magic!r}, expected b'GGUF'.")
    try:
        reader = GGUFReader(file)
        fields = reader.fields
        architecture = fields["general.architecture"].contents()
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"{label}: the GGUF file is cut off or damaged ({str(error).strip()}). Download it again, and all parts if "
            "it has several."
        ) from error
    if "split.count" in fields and fields["split.count"].contents() > 1:
        raise ValueError(
            f"{label}: one of {fields['split.count'].contents()} files that llama.cpp split. Merge them first: "
            "llama-gguf-split --merge FIRST OUT."
        )
    if ignored := [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]:
        print(
            f"{label}: transformers does not read {', '.join(ignored)}: far positions will not be scaled as in "
            "llama.cpp.",
            file=sys.stderr,
        )
    return architecture, sum(int(tensor.n_elements) for tensor in reader.tensors)


def _load(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    folder = file.parent
    arguments: dict[str, Any] = {"gguf_file": str(file)}
    config = AutoConfig.from_pretrained(folder, **arguments)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(config).__name__} is of another kind")
    if hasattr(transformers, "GgufConfig"):
        # Else a quantiser of transformers stays with the model, in which nothing is quantised any more, and refuses to
        # save it. Versions that have no such quantiser save it.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **arguments
    )
    model, info = loaded
    if absent := sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"]):
        raise ValueError(f"it has no weights for {', '.join(absent[:3])}")
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=str(file))
