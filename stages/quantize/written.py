"""Whether a quantized file is whole: every tensor is there, the numbers are finite, a prompt is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from artifacts.errors import StageError
from stages.runtimes.gguf_header import Header, read_header
from stages.runtimes.gguf_parts import model_file, read_model
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.runtime import Request

_PROMPT: Final = "What do you see?"


def check_tensors(floats: Path, model: Path) -> Header:
    """Every tensor of the float file is in the quantized one, with its shape.

    Raises:
        StageError: not so.
    """
    before, after = read_header(floats), read_model(model)
    if missing := sorted(set(before.tensors) ^ set(after.tensors)):
        raise StageError(
            f"{model.name} holds {len(after.tensors)} tensors, the conversion had {len(before.tensors)}",
            where=str(model),
            why=f"{missing[0]} is in one of them only",
            way_out="this is a fault of the quantizer: choose another type",
        )
    for name, tensor in after.tensors.items():
        if tensor.shape != before.tensors[name].shape:
            raise StageError(
                f"tensor {name} changed its shape from {before.tensors[name].shape} to {tensor.shape}", where=str(model)
            )
    return after


def check_answers(folder: Path, *, sees_images: bool) -> None:
    """The files load, give finite numbers, and answer one prompt.

    Raises:
        StageError: not so.
    """
    image = None
    try:
        if sees_images:
            from PIL import Image

            image = folder / "check.png"
            Image.new("RGB", (64, 64), (120, 130, 140)).save(image)
        with LlamaCppRuntime(folder, parallel=1, chat_template=_template(folder)) as runtime:
            request = Request(_PROMPT, image=image, max_new_tokens=4)
            if not np.isfinite(runtime.logits(request, "I see")).all():
                raise StageError(
                    "the quantized model gives numbers that are not finite",
                    where=str(folder),
                    way_out="choose a larger type",
                )
            runtime.generate([request])
    finally:
        if image is not None:
            image.unlink(missing_ok=True)


def _template(folder: Path) -> str | None:
    """A plain one for a model that was never tuned to chat; None: its own."""
    known = read_model(model_file(folder)).fields.get("tokenizer.chat_template")
    return None if known else "{{ messages[0]['content'] }}"
