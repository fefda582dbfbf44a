"""LoRA on a language backbone: put in for training, added to the weights at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from artifacts.errors import StageError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from stages.models.family import Family


@dataclass(frozen=True)
class LoRA:
    """Shape of the adapter: what is needed to build it, and to build it again for merging."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names of linear layers
    layers: int | None  # how many of the last decoder blocks get one; None: all


def with_adapter(trunk: torch.nn.Module, lora: LoRA) -> PeftModel:
    """Put LoRA into a trunk, in place.

    Raises:
        StageError: it has no linear layer of these names.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    depth = int(cast("int", trunk.config.num_hidden_layers))  # type: ignore[union-attr]
    first = 0 if lora.layers is None else max(0, depth - lora.layers)
    # Whole names: peft's own choice of blocks does not find them in a model whose names begin with them.
    targets = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in lora.targets and _block(name) >= first
    ]
    if not targets:
        raise StageError(
            "no layer of the language model takes a LoRA adapter",
            why=f"it has no linear layers named {', '.join(lora.targets)}",
            way_out="name its linear layers in lora_targets, e.g. [q_proj, k_proj, v_proj, o_proj]",
        )
    with warnings.catch_warnings():
        # peft asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(trunk, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets))


def _block(name: str) -> int:
    """The first number in a module's name: its decoder block; 0 outside of any."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def merged(
    family: Family, folder: Path, dtype: str, adapter: Mapping[str, torch.Tensor], lora: LoRA
) -> PreTrainedModel:
    """The checkpoint in `folder`, loaded afresh in its own dtype, with a trained adapter added to its weights.

    Afresh, so that what was only a compute dtype during training leaves no trace in the weights.
    """
    import torch

    model = family.load(folder, dtype=dtype)
    trunk = with_adapter(family.trunk(model), lora)
    parameters = dict(trunk.named_parameters())
    with torch.no_grad():
        for name, value in adapter.items():
            parameters[name].copy_(value)
    trunk.merge_and_unload()
    return cast("PreTrainedModel", model.requires_grad_(False))
