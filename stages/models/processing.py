"""One image through a checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def processed(folder: Path, image: Image, **options: bool) -> Mapping[str, torch.Tensor]:
    """Everything that the image processor gives for one image, as tensors with a leading dimension of 1."""
    import torch

    found = _image_processor(folder)(images=[image.convert("RGB")], return_tensors="pt", **options)
    return {name: value if isinstance(value, torch.Tensor) else torch.as_tensor(value) for name, value in found.items()}


@lru_cache(maxsize=8)
def _image_processor(folder: Path) -> Callable[..., Mapping[str, object]]:
    from transformers import AutoImageProcessor

    # PIL, wherever torchvision is installed too: both resize, and not to the same pixels.
    return cast(
        "Callable[..., Mapping[str, object]]",
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil"),
    )
