"""What a GGUF really needs: a fresh process loads it, fills its context, encodes an image and generates.

What is counted: the process's peak resident set (VmHWM). Weights are read into the process's own memory and not mapped
(`mmap` off), because pages of a mapped file are the system's cache: they may be dropped, or not yet read, and then the
figure says little. What is left of file pages is program code, a few tens of megabytes, which a user's process has
too. One sequence, llama.cpp's default of 512 tokens at once; F16 keys and values unless the device keeps others.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, cast

from artifacts.errors import StageError
from stages.machine import peak_resident
from stages.runtimes.alone import run_alone
from stages.runtimes.gguf_header import check_language_model, check_pair, read_vision_header
from stages.runtimes.gguf_parts import read_model
from stages.runtimes.llamacpp_library import CacheType
from stages.runtimes.rehearsal import DEFAULT_UBATCH

STEP: Final = 2 * 2**20  # bytes; what a gate reads is rounded up to multiples of this
_GENERATED: Final = 8  # tokens at the end of the full context


def room_for_an_image(tokens: int) -> int:
    """The shortest context, in tokens, in which an image of so many can stand and something be said of it."""
    return tokens + _GENERATED + 1


def measure_memory(model: Path, mmproj: Path | None, context: int, *, cache_type: CacheType = "F16") -> int:
    """Peak resident bytes of one conversation that fills `context` tokens, with an image if there is an mmproj.

    Args:
        cache_type: of keys and values.

    Raises:
        SourceError: a file is missing or damaged.
        StageError: the files do not belong together, the context is too small, or the process ended badly.
    """
    header = read_model(model)
    check_language_model(header)
    if mmproj is not None:
        vision = read_vision_header(mmproj)
        check_pair(header, vision)
        if context < room_for_an_image(vision.image_tokens):
            raise StageError(
                f"a context of {context} tokens has no room for an image of {vision.image_tokens}", where=str(mmproj)
            )
    return int(
        run_alone(
            "stages.runtimes.memory",
            [str(model), str(mmproj or ""), str(context), cache_type],
            measures="memory",
            where=model,
            way_out="free memory, or measure with a shorter context",
        )
    )


def _converse(model_path: Path, mmproj: Path | None, context: int, cache_type: CacheType) -> None:
    import numpy as np

    from stages.runtimes.llamacpp_library import Sequences, TextModel
    from stages.runtimes.llamacpp_vision import VisionEncoder

    model = TextModel(model_path)
    sequences = Sequences(model, sequences=1, length=context, ubatch=DEFAULT_UBATCH, cache_type=cache_type)
    at = 0
    if mmproj is not None:
        encoder = VisionEncoder(model, read_vision_header(mmproj))
        side = encoder.vision.image_size * (2 if encoder.vision.tiles else 1)  # a square gets the most tiles
        image = np.full((side, side, 3), 127, dtype=np.uint8)
        embeddings = encoder.encode(encoder.vision.default_exit, image, where=mmproj)
        sequences.look(0, 0, embeddings)
        at = len(embeddings)
    token = 0
    while at < context - _GENERATED:
        piece = [(at + step) % model.vocab_size for step in range(min(DEFAULT_UBATCH, context - _GENERATED - at))]
        token = int(sequences.read(0, at, piece)[-1].argmax())
        at += len(piece)
    while at < context:
        token = sequences.step([token], [at], lambda _, row: int(row.argmax()))[0]
        at += 1


if __name__ == "__main__":
    _converse(
        Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, int(sys.argv[3]), cast("CacheType", sys.argv[4])
    )
    sys.stdout.write(f"{peak_resident()}\n")
