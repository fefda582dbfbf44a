"""What llama.cpp would reserve for a model, asked of the installed library; nothing is reserved and no weight is read.

llama.cpp can load a model without memory for it (`no_alloc`, what its own `--fit` uses): tensors, keys and values and
the graph of one batch are laid out as always, and the log says how large each buffer would be. So sizes come from
llama.cpp's own allocator, for every architecture that it knows, and not from a formula that has to follow it.

Notable:
- before there is a file, a hollow one is asked: its header is whole, its weights are a hole that takes no disk;
- llama.cpp's image encoder can only be asked while it is loaded: its first block alone is, since the blocks follow
  each other in the same memory;
- llama.cpp's figure for a model counts each tensor once, even one that it keeps twice; in what kinds of memory it keeps
  them is known from the log;
- what a matrix is multiplied with is rounded into a buffer which no log names (ggml's `work_size`): it is the widest
  row of a batch in the type that the kernel wants.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.errors import StageError
from stages.runtimes.llamacpp_library import CacheType, Sequences, TextModel, library, log_tail, logged, vision_library

DEFAULT_UBATCH: Final = 512  # tokens computed at once, llama.cpp's default

_SIZE: Final = re.compile(r"([\d.]+) MiB")
_MIB: Final = 2**20
_BUFFER: Final = re.compile(r"(\S+) model buffer size")


@dataclass(frozen=True)
class Reserved:
    """Bytes that a language model and one sequence of a context take."""

    weights: int  # each tensor once
    kv_cache: int
    compute: int  # the graph of one batch
    output: int  # logits


def rehearse(model: Path, context: int, *, cache_type: CacheType = "F16") -> Reserved:
    """What one conversation of `context` tokens with a GGUF would reserve.

    Raises:
        StageError: llama.cpp does not load the file, or does not say a size.
    """
    with logged() as lines:
        loaded = TextModel(model, allocate=False)
        try:
            sequences = Sequences(loaded, sequences=1, length=context, ubatch=DEFAULT_UBATCH, cache_type=cache_type)
            sequences.close()
            weights = loaded.nbytes
        finally:
            loaded.close()
    return Reserved(
        weights=weights,
        kv_cache=_said(lines, "llama_kv_cache", ": size ="),
        compute=_said(lines, "compute buffer size"),
        output=_said(lines, "output buffer size"),
    )


def rehearse_buffers(model: Path) -> frozenset[str]:
    """llama.cpp's names of the kinds of memory that it would keep a model's weights in: CPU, CPU_REPACK, ...

    Raises:
        StageError: as `rehearse`.
    """
    with logged() as lines:
        TextModel(model, allocate=False).close()
    found = frozenset(match[1] for line in lines if (match := _BUFFER.search(line)))
    if not found:
        raise _unsaid("model buffer size")
    return found


def rehearse_encoder(mmproj: Path) -> int:
    """Bytes of the graph of one pass of an image encoder, whatever number of blocks the file holds.

    No language model beside it: some encoders look for words of its vocabulary, and a hollow one has none.

    Raises:
        StageError: as `rehearse`.
    """
    lib = vision_library()
    with logged() as lines:
        params = lib.mtmd_context_params_default()
        params.use_gpu = False
        params.print_timings = False
        params.warmup = True  # lays the graph out, and computes nothing
        params.flash_attn_type = library().LLAMA_FLASH_ATTN_TYPE_DISABLED  # what it does without a warm-up
        encoder = lib.mtmd_init_from_file(os.fsencode(mmproj), None, params)
        if encoder:
            lib.mtmd_free(encoder)
    if not encoder:
        raise StageError(f"llama.cpp does not load the image encoder {mmproj.name}", where=str(mmproj), why=log_tail())
    return _said(lines, "compute buffer size")


def _said(lines: list[str], *words: str) -> int:
    """The sum of the sizes in the lines that hold all these words."""
    sizes = [float(found[1]) for line in lines if all(word in line for word in words) and (found := _SIZE.search(line))]
    if not sizes:
        raise _unsaid(*words)
    return int(sum(sizes) * _MIB)


def _unsaid(*words: str) -> StageError:
    return StageError(
        f"llama.cpp did not say {' '.join(words)!r}",
        why="another version may log other words",
        way_out="install the llama-cpp-python that requirements.lock names",
    )
