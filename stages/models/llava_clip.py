"""LLaVA-1.5: a CLIP ViT, a two-layer projector, Vicuna or another llama (`LlavaForConditionalGeneration`).

Notable: the tower has a CLS token, which `vision_feature_select_strategy: default` drops, at every exit alike;
`hidden_states[0]` stands behind `pre_layrnorm` (transformers' own spelling), so exit 0 is what the first block reads;
the default exit is the last block but one (`vision_feature_layer: -2`: 23 of the 24 blocks of ViT-L/14-336).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, cast

from artifacts.errors import SourceError
from stages.models.card import Card
from stages.models.llava import Llava
from stages.models.spec import ModelSpec
from stages.models.truncation import DiskCut

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# What transformers' LlavaConfig makes when config.json has no vision_config at all: OpenAI's ViT-L/14-336.
_OPENAI: Final[Mapping[str, object]] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


class ClipLlava(Llava):
    """LLaVA with a CLIP tower; LLaVA-1.5 and what was trained like it."""

    name = "llava-1.5"
    card = Card(
        models=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
        tower="CLIP ViT-L/14-336, 24 blocks",
        projector="two linear layers",
        language="Vicuna (Llama)",
        default_exit="23 of 24 (vision_feature_layer: -2)",
        features="every patch without CLS, before the last layer norm",
        prompt="at <image>, 576 tokens",
    )
    describes = "llava with a clip_vision_model tower"
    tower_type = "clip_vision_model"
    # transformers' CLIPVisionConfig, for a vision_config that leaves something out.
    tower_defaults: ClassVar[Mapping[str, int]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    }
    has_cls = True

    def matches(self, config: Mapping[str, object]) -> bool:
        return super().matches(_completed(config))

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        """Shapes from config.json alone.

        Raises:
            SourceError: a shape is missing, or CLS is kept among the image tokens.
        """
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise SourceError(
                f"vision_feature_select_strategy {strategy!r} keeps the CLS token as an image token",
                why="everything that counts image tokens here takes one for every patch, as LLaVA-1.5 does",
                way_out="use a model whose strategy is 'default'",
            )
        return super().spec(_completed(config))

    def disk_cut(self, config: Mapping[str, object], layer: int) -> DiskCut:
        return super().disk_cut(_completed(config), layer)

    def _cut_tower(self, tower: torch.nn.Module, config: PreTrainedConfig, layer: int) -> None:
        """`post_layernorm` stays: only the pooled CLS goes through it, but stock transformers always builds it, and
        would warn of two missing vectors on every load."""
        clip = cast("_ClipTower", tower)
        clip.encoder.layers = clip.encoder.layers[:layer]


def _completed(config: Mapping[str, object]) -> Mapping[str, object]:
    """With the tower that transformers takes where config.json names none."""
    return config if config.get("vision_config") else {**config, "vision_config": _OPENAI}


if TYPE_CHECKING:

    class _ClipEncoder(torch.nn.Module):
        layers: torch.nn.ModuleList

    class _ClipTower(torch.nn.Module):
        encoder: _ClipEncoder
