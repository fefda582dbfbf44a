"""One side of benchmarks/memory_plan.py: the conversation of stages/runtimes/memory.py, each batch stopped early.

A batch of the last 512 tokens of the context is stopped after two blocks, since the others would use the same memory.
Then one token goes through the whole model. Prints the peak resident set in bytes. It imports what that module imports.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from artifacts.errors import StageError
from stages.machine import peak_resident
from stages.runtimes.gguf_header import read_vision_header

OPERATIONS: Final = 40  # a block of Llama's has 17
UBATCH: Final = 512  # tokens


def converse(path: Path, mmproj: Path | None, context: int) -> None:
    import numpy as np

    from stages.runtimes.llamacpp_library import Sequences, TextModel, library
    from stages.runtimes.llamacpp_vision import VisionEncoder

    model = TextModel(path)
    sequences = Sequences(model, sequences=1, length=context, ubatch=UBATCH)
    left = [OPERATIONS]

    def enough(_: object) -> bool:
        left[0] -= 1
        return left[0] < 0

    lib = library()
    stop = lib.ggml_abort_callback(enough)
    lib.llama_set_abort_callback(sequences.pointer, stop, ctypes.c_void_p(0))
    if mmproj is not None:
        vision = read_vision_header(mmproj)
        encoder = VisionEncoder(model, vision)
        image = np.full((vision.image_size, vision.image_size, 3), 127, dtype=np.uint8)
        embeddings = encoder.encode(vision.default_exit, image, where=mmproj)
        with suppress(StageError):  # stopped
            sequences.look(0, 0, embeddings)
        sequences.trim(0, 0)
    rows = min(UBATCH, context - 1)
    left[0] = OPERATIONS
    with suppress(StageError):
        sequences.read(0, context - 1 - rows, [place % model.vocab_size for place in range(rows)])
    sequences.trim(0, 0)
    left[0] = sys.maxsize
    sequences.step([0], [context - 1], lambda _, row: int(row.argmax()))


if __name__ == "__main__":
    converse(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, int(sys.argv[3]))
    print(peak_resident())
