"""What the pipeline must know of a model family: one file a family, this interface, and the registry.

Exits count as transformers' `hidden_states`: 0 = embeddings, l = after l blocks, L = the last block (before any final
layer norm).
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from artifacts.errors import SourceError
from stages.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel


class Family(ABC):
    """Where the tower, the projector and the language model are, and how to leave the encoder early."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # config.json `model_type` values
    describes: ClassVar[str]  # in the words of `describe`, for error messages
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "llamacpp")

    @abstractmethod
    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether a config.json describes a model of this family."""

    @abstractmethod
    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        """Shapes from config.json alone; no torch."""

    @abstractmethod
    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        """Load the checkpoint (safetensors only, no remote code), in eval mode, gradients off."""

    @abstractmethod
    def pixel_values(self, folder: Path, images: Sequence[Image]) -> torch.Tensor:
        """(batch, 3, height, width) float32, by the checkpoint's own image processor."""

    @abstractmethod
    def hidden_states(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        """One encoder pass gives every exit: (batch, exits 0..L, patches, vision width), selection rule applied."""

    @abstractmethod
    def project(self, model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
        """Exit features (..., patches, vision width) to image tokens (..., tokens, text width)."""

    @abstractmethod
    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        """The language backbone without its head: takes inputs_embeds, gives last_hidden_state."""

    @abstractmethod
    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        """The language model head."""

    @abstractmethod
    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        """Cut the tower to `layer` blocks in place, make that the default exit, drop what is no longer needed."""


_BUILT_IN: tuple[str, ...] = ("stages.models.llava:SiglipLlava",)


def families() -> list[Family]:
    """Every known family, built in and from the entry-point group `pipeline.families`."""
    found: list[Family] = []
    for target in _BUILT_IN:
        module, _, attribute = target.partition(":")
        found.append(getattr(importlib.import_module(module), attribute)())
    found.extend(entry.load()() for entry in entry_points(group="pipeline.families"))
    return found


def family_of(config: Mapping[str, object], where: str | None = None) -> Family:
    """The family that a config.json belongs to.

    Raises:
        SourceError: none, with what the model is and the nearest family that is known.
    """
    known = families()
    for family in known:
        if family.matches(config):
            return family
    described = describe(config)
    nearest = difflib.get_close_matches(described, [family.describes for family in known], n=1, cutoff=0.0)
    raise SourceError(
        f"no known model family: {described}",
        where=where,
        why="the pipeline must know where a model's tower, projector and language model are",
        way_out=f"the nearest family that works is {nearest[0]}; others can be added through the entry-point group "
        "`pipeline.families`",
    )


def describe(config: Mapping[str, object]) -> str:
    """What a config.json says it is, in a few words: "llava with a clip_vision_model tower"."""
    name = str(config.get("model_type") or "a config.json without model_type")
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return name
    return f"{name} with a {vision.get('model_type') or 'nameless'} tower"
