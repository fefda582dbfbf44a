"""What a GGUF really needs: a fresh process loads it, fills its context, encodes an image and generates.

What is counted: the process's peak resident set (VmHWM). Weights are read into the process's own memory and not mapped
(`mmap` off), because pages of a mapped file are the system's cache: they may be dropped, or not yet read, and then the
figure says little. What is left of file pages is program code, a few tens of megabytes, which a user's process has
too. One sequence, llama.cpp's default of 512 tokens at once, F16 keys and values.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from artifacts.errors import StageError
from stages.runtimes.exits import derive_exit
from stages.runtimes.gguf_header import check_language_model, check_pair, read_vision_header
from stages.runtimes.gguf_parts import read_model
from stages.runtimes.rehearsal import UBATCH

_GENERATED: Final = 8  # tokens at the end of the full context
_SECONDS: Final = 900


def measure_memory(model: Path, mmproj: Path | None, context: int, exit: int | None = None) -> int:
    """Peak resident bytes of one conversation that fills `context` tokens, with an image if there is an mmproj.

    Args:
        exit: of the image encoder; default: the mmproj's own.

    Raises:
        SourceError: a file is missing or damaged.
        StageError: the files do not belong together, the context is too small, or the process ended badly.
    """
    header = read_model(model)
    check_language_model(header)
    with tempfile.TemporaryDirectory(prefix="icet-memory-") as folder:
        if mmproj is not None:
            vision = read_vision_header(mmproj)
            check_pair(header, vision)
            if context < vision.image_tokens + _GENERATED + 1:
                raise StageError(
                    f"a context of {context} tokens has no room for an image of {vision.image_tokens}",
                    where=str(mmproj),
                )
            if exit is not None and exit != vision.default_exit:
                derived = Path(folder) / "mmproj.gguf"
                derive_exit(mmproj, exit, derived)
                mmproj = derived
        command = [sys.executable, "-m", "stages.runtimes.memory", str(model), str(mmproj or ""), str(context)]
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        try:
            # Its own working folder: nothing there may shadow a module.
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"measuring memory took longer than {_SECONDS} s", where=str(model)) from error
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        raise StageError(
            "the process that measures memory ended badly",
            where=str(model),
            why=reason[-1] if reason else f"exit code {done.returncode}; the system may have run out of memory",
            way_out="free memory, or measure with a shorter context",
        )
    return int(done.stdout.split()[-1])


def peak_resident() -> int:
    """Peak resident set of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _converse(model_path: Path, mmproj: Path | None, context: int) -> None:
    import numpy as np

    from stages.runtimes.llamacpp_library import Sequences, TextModel
    from stages.runtimes.llamacpp_vision import VisionEncoder

    model = TextModel(model_path)
    sequences = Sequences(model, sequences=1, length=context, ubatch=UBATCH)
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
        piece = [(at + step) % model.vocab_size for step in range(min(UBATCH, context - _GENERATED - at))]
        token = int(sequences.read(0, at, piece)[-1].argmax())
        at += len(piece)
    while at < context:
        token = sequences.step([token], [at], lambda _, row: int(row.argmax()))[0]
        at += 1


if __name__ == "__main__":
    _converse(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, int(sys.argv[3]))
    sys.stdout.write(f"{peak_resident()}\n")
