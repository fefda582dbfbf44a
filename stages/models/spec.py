"""ModelSpec: the shapes of a model, known from its config alone, from which sizes and memory follow.

No torch here: `pipeline plan` must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class VisionSpec:
    """An image encoder and its projector."""

    layers: int  # blocks in the tower; exits are 0..layers
    hidden_size: int
    intermediate_size: int
    heads: int
    image_size: int  # pixels, square
    patch_size: int  # pixels
    default_exit: int  # counts as in hidden_states; never negative
    has_cls: bool = False
    projector_hidden: int = 0  # width between the projector's two linear layers
    tiles: int = 1  # passes of the tower for one image, at most
    shuffle: int = 1  # patches a side that become one token (pixel shuffle); with it the projector is one linear layer
    at_most: bool = False  # `layers` is an upper bound: the exit is chosen while the recipe runs
    most_tokens: int = 0  # of one image, where that is not a token for each `shuffle` x `shuffle` patches
    quantization: str = "F16"  # of its matrices in an mmproj file
    parameters: int = 0  # all that is there for images, where it is not built as LLaVA's; 0: it is

    @property
    def patches(self) -> int:
        """What one pass of the tower sees, CLS not counted."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Tokens that one image takes in the language model's context, at most."""
        return self.most_tokens or self.tiles * self.patches // self.shuffle**2


@dataclass(frozen=True)
class TextSpec:
    """A decoder-only language model."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool


@dataclass(frozen=True)
class ModelSpec:
    """The whole model. `quantization` is None (as saved by transformers) or a type such as "Q4_0"."""

    family: str  # Family.name
    text: TextSpec
    vision: VisionSpec | None = None
    dtype: str = "float32"
    quantization: str | None = None
    imatrix: bool = False  # quantized with an importance matrix
    tensor_types: tuple[tuple[str, str], ...] = ()  # tensor, type: over what the file type gives
    file_bytes: int | None = None  # what the weights may come to where types are yet to be chosen; None: what fits

    def with_exit(self, layer: int, *, at_most: bool = False) -> Self:
        """The same model whose tower is cut after `layer` blocks, or earlier, and whose default exit is there."""
        assert self.vision is not None
        at_most = at_most or (self.vision.at_most and layer == self.vision.layers)
        return replace(self, vision=replace(self.vision, layers=layer, default_exit=layer, at_most=at_most))
