"""Which tensor of a GGUF holds the weight of a layer that transformers has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from artifacts.errors import StageError

if TYPE_CHECKING:
    import torch

    from stages.runtimes.mixture import Outline


def stored_names(names: Sequence[str], trunk: torch.nn.Module, outline: Outline | None) -> dict[str, str]:
    """The GGUF name of every layer's weight, by the layer's name in the trunk.

    Args:
        outline: says the architecture; without one it is taken from the trunk's configuration.

    Raises:
        StageError: llama.cpp has none for a layer.
    """
    import gguf

    config = cast("object", trunk.config)
    architecture = outline.architecture if outline is not None else str(getattr(config, "model_type", ""))
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    # Nearly all of them call their layers as llama does.
    table = gguf.get_tensor_name_map(
        by_name.get(architecture, gguf.MODEL_ARCH.LLAMA), int(getattr(config, "num_hidden_layers", 0))
    )
    found = {name: table.get_name(f"model.{name}") or table.get_name(name) for name in names}
    if unknown := [name for name, stored in found.items() if stored is None]:
        raise StageError(
            f"llama.cpp has no name for the layer {unknown[0]}",
            why=f"it is none of the layers of the architecture {architecture!r}",
            way_out="give one tensor type and no importance matrix",
        )
    return {name: f"{stored}.weight" for name, stored in found.items()}
