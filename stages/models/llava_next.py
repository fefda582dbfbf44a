"""LLaVA-NeXT, v1.6: LLaVA's tower and projector on an overview and on tiles (`LlavaNextForConditionalGeneration`).

Notable: exits are LLaVA's (23 of 24 by default), taken in every tile alike; after the projector the tiles are put
together again, the padding is cut away and `image_newline` ends every row, so the number of tokens follows from the
image's size, which is what the geometry holds; Mistral and Vicuna backbones differ in nothing that matters here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, cast

from stages.models.card import Card
from stages.models.family import Geometry
from stages.models.llava import llava_of
from stages.models.llava_clip import ClipLlava
from stages.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

# transformers' LlavaNextConfig: (height, width) of what an image is fitted into, in pixels.
_PINPOINTS: Final = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class LlavaNext(ClipLlava):
    """LLaVA-NeXT with a CLIP tower."""

    name = "llava-next"
    card = Card(
        models=("llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        tower="CLIP ViT-L/14-336, 24 blocks, on an overview and on tiles",
        projector="two linear layers",
        language="Mistral or Vicuna (Llama)",
        default_exit="23 of 24 (vision_feature_layer: -2)",
        features="every patch without CLS; padding cut away, image_newline after each row",
        prompt="at <image>, overview first, then the rows of the tiles put together",
    )
    model_types = ("llava_next",)
    describes = "llava_next with a clip_vision_model tower"

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        found = super().spec(config)
        assert found.vision is not None
        vision, side = found.vision, found.vision.image_size // found.vision.patch_size
        tiles, most = 1, 0
        pinpoints = cast("Sequence[Sequence[int]]", config.get("image_grid_pinpoints") or _PINPOINTS)
        for height, width in pinpoints:
            rows, columns = height // vision.image_size, width // vision.image_size
            tiles = max(tiles, 1 + rows * columns)
            # A newline ends each row of patches; an image that fills the grid loses nothing to unpadding.
            most = max(most, vision.patches + rows * side * (columns * side + 1))
        return replace(found, vision=replace(vision, tiles=tiles, most_tokens=most))

    def geometry(self, inputs: Mapping[str, torch.Tensor]) -> Geometry:
        """The image's height and width in pixels."""
        height, width = inputs["image_sizes"][0].tolist()
        return int(height), int(width)

    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        import torch

        next_model = cast("LlavaNextForConditionalGeneration", llava_of(model))
        vision = next_model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tiles = super().project(model, features.reshape(-1, patches, features.shape[-1]), geometry)
        packed, _ = next_model.model.pack_image_features(
            [tiles],
            torch.tensor([geometry]),
            vision_feature_select_strategy=next_model.config.vision_feature_select_strategy,
            image_newline=next_model.model.image_newline,
        )
        return cast("torch.Tensor", packed[0])
