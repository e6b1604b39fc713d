"""`tensorpeft quantize` on a checkpoint of some gigabytes: its peak memory, and what a `kill -9` costs.

    python benchmarks/stream_quantization.py --gigabytes 2

Writes a Llama of random weights (bfloat16), quantises it in a process of its own, again in one that is killed once and
called again, and compares all bytes of the two results. Memory is the resident set's peak (VmHWM), which counts pages
of the files that are read too.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ARGUMENTS = ["--r", "16", "--target-modules", "q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of the model (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of decomposition and quantisation (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, whole, killed = (Path(folder) / name for name in ("source", "whole", "killed"))
        largest = write_checkpoint(source, arguments.gigabytes, arguments.hidden)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"checkpoint {size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files")
        print(f"largest weight {largest / 1e6:.0f} MB")
        peak_idle, _ = run(["-c", "import torch, tensorpeft, tensorpeft.quantization.streamed"])
        command = ["-m", "tensorpeft", "quantize", str(source), "OUT", *ARGUMENTS, "--rounds", str(arguments.rounds)]
        peak, seconds = run([str(whole) if word == "OUT" else word for word in command])
        print(f"peak {peak / 1e6:.0f} MB, of which {peak_idle / 1e6:.0f} MB are the imports; {seconds:.0f} s")
        command = [str(killed) if word == "OUT" else word for word in command]
        _, before = run(command, kill_after=seconds / 2)
        done = len(list(killed.glob("model-*.safetensors")))
        _, after = run(command)
        print(f"killed after {before:.0f} s with {done} shards complete, finished in {after:.0f} s more")
        same = digests(whole) == digests(killed)
        print(f"{len(digests(whole))} files, {'the same bytes' if same else 'DIFFERENT BYTES'}")
        result = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
        print(f"result {result / 1e9:.2f} GB, {result / size:.2f} of the source")


def write_checkpoint(folder: Path, gigabytes: float, hidden: int) -> int:  # bytes of the largest weight
    """A Llama of about that size, a shard per layer, never with the model in memory."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_attention_heads=hidden // 128,
        num_hidden_layers=1,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    layer = 2 * (4 * hidden**2 + 3 * hidden * config.intermediate_size)
    config.num_hidden_layers = max(round((gigabytes * 1e9 - 4 * config.vocab_size * hidden) / layer), 1)
    with torch.device("meta"):
        tensors = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "other", []).append(name)
    weight_map = {}
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        shard = {name: (torch.randn(tensors[name], generator=generator) * 0.02).bfloat16() for name in names}
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return max(2 * torch.Size(shape).numel() for shape in tensors.values())


def run(arguments: list[str], kill_after: float | None = None) -> tuple[int, float]:  # bytes, seconds
    """Run Python, and kill it after some seconds if told to; the peak of its resident memory, and its time."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except FileNotFoundError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
        if kill_after is not None and time.perf_counter() - start > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"exit code {code}: python {' '.join(arguments)}")
    return peak, time.perf_counter() - start


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    main()
