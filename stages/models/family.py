"""What the pipeline must know of a model family: one file a family, this interface, and the registry.

Exits count as transformers' `hidden_states`: 0 = embeddings, l = after l blocks, L = the last block (before any final
layer norm).

How an image reaches the language model, one image at a time: `image_inputs` (the checkpoint's own processor), once
`hidden_states` (the only pass of the encoder; cached with the image's `geometry`), then for any exit `exit_features`,
`project`, and `surround` for the text that stands around the tokens.
"""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from artifacts.errors import SourceError
from stages.models.card import Card
from stages.models.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from stages.models.crossing import Beside
    from stages.models.truncation import DiskCut

Geometry = tuple[int, ...]
"""What a family must know of an image beside its features: its size or its grid of tiles; () where nothing."""


class Family(ABC):
    """Where the tower, the projector and the language model are, and how to leave the encoder early."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # config.json `model_type` values
    describes: ClassVar[str]  # in the words of `describe`, for error messages
    card: ClassVar[Card]
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "llamacpp")
    gptq: ClassVar[bool] = False  # whether GPTQModel can quantize its language model
    realigns: ClassVar[bool] = False  # whether it has a `projector_input`
    image_slot: ClassVar[str] = "<image>"  # token that the chat template prints where the image goes
    tower: ClassVar[str] = "vision_tower."  # in the name of every tensor of the encoder, old layout and new

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
    def image_inputs(self, folder: Path, image: Image) -> Mapping[str, torch.Tensor]:
        """What the encoder takes for one image, by the checkpoint's own image processor; float32."""

    @abstractmethod
    def hidden_states(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One encoder pass gives every exit: (exits 0..L, patches, width), selection rule applied, tiles in a row."""

    def geometry(self, inputs: Mapping[str, torch.Tensor]) -> Geometry:
        """What `project` and `surround` need to know of the image that `inputs` are made of."""
        return ()

    def exit_features(
        self, config: Mapping[str, object], states: NDArray[np.floating], exit: int
    ) -> NDArray[np.floating]:
        """The features (patches, vision width) of one exit, out of `hidden_states`."""
        features: NDArray[np.floating] = states[exit]
        return features

    @abstractmethod
    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """Exit features (patches, vision width) to image tokens (tokens, text width)."""

    def projector_input(self, model: PreTrainedModel) -> torch.nn.Linear:
        """The projector's first layer, if that is a linear one that takes exit features and nothing else."""
        raise NotImplementedError(f"{self.name} has no such layer")

    def surround(self, geometry: Geometry) -> tuple[str, ...]:
        """The texts around an image's tokens: n + 1 texts around n equal parts of them; one: they stand `beside`."""
        return ("", "")

    def beside(self, tokens: torch.Tensor, geometry: Geometry) -> Beside | None:
        """The image tokens as cross-attention reads them, in models that have it."""
        return None

    @abstractmethod
    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        """The language backbone without its head: takes inputs_embeds, gives last_hidden_state."""

    @abstractmethod
    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        """The language model head."""

    @abstractmethod
    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        """Cut the tower to `layer` blocks in place, make that the default exit, drop what is no longer needed."""

    def disk_cut(self, config: Mapping[str, object], layer: int) -> DiskCut | None:
        """The same cut for `stages.models.truncation`, which never loads the model; None: only `truncate` can.

        Raises:
            StageError: the tower has no such exit.
        """
        return None


_BUILT_IN: tuple[str, ...] = (
    "stages.models.llava:SiglipLlava",
    "stages.models.llava_clip:ClipLlava",
    "stages.models.llava_next:LlavaNext",
    "stages.models.idefics3:Idefics3",
    "stages.models.mllama:Mllama",
    "stages.models.causal:Causal",
)


def families() -> list[Family]:
    """Every known family, built in and from the entry-point group `pipeline.families`."""
    found: list[Family] = []
    for target in _BUILT_IN:
        module, _, attribute = target.partition(":")
        found.append(getattr(importlib.import_module(module), attribute)())
    found.extend(entry.load()() for entry in entry_points(group="pipeline.families"))
    return found


def family_named(name: str) -> Family | None:
    """The family of that name, as `ModelSpec.family` has it; None if there is none."""
    return next((family for family in families() if family.name == name), None)


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
