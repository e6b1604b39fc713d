"""A process with a llama.cpp in it, which `engines.LlamaCpp` starts and ends.

Its server waits for its threads when it is deleted, and was seen to wait for ever: so it never is. Prints the server's
address, and ends, whatever the server does, when nobody holds the other end of its standard input.
"""

from __future__ import annotations

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Serve the model of the first argument, JSON."""
    asked = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx, params.n_parallel = 256 * asked["slots"], asked["slots"]
    params.verbosity, params.n_gpu_layers = -1, 0
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if asked["adapter"] is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapter"], 1.0)]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
