"""LLaVA: an image encoder, a two-layer projector, a decoder-only language model (`LlavaForConditionalGeneration`).

Notable: exits are read off one pass of the tower; a cut tower keeps `vision_feature_layer = -1`, so that stock
transformers takes the last block's output, before `post_layernorm`; another tower is a subclass of `Llava` that says
its `model_type`, its defaults and whether it has a CLS token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, cast

from artifacts.errors import SourceError, StageError
from stages.models import checkpoint
from stages.models.family import Family
from stages.models.spec import ModelSpec, TextSpec, VisionSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

# config.json leaves out what equals transformers' defaults (LLaVA-1.5's names little more than its vocabulary).
_TEXT_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
}
_DEFAULT_EXIT: Final = -2  # transformers' LlavaConfig


class Llava(Family):
    """What LLaVA models share, whatever their tower."""

    model_types = ("llava",)
    tower_type: ClassVar[str]  # vision_config.model_type
    tower_defaults: ClassVar[Mapping[str, int]]  # transformers' defaults for what vision_config leaves out
    has_cls: ClassVar[bool]

    def matches(self, config: Mapping[str, object]) -> bool:
        vision = _section(config, "vision_config")
        return config.get("model_type") in self.model_types and vision.get("model_type") == self.tower_type

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        vision, text = _section(config, "vision_config"), _section(config, "text_config")
        text_type = str(text.get("model_type") or "llama")
        defaults = _TEXT_DEFAULTS.get(text_type, {})
        width, heads = _number(text, "hidden_size", defaults), _number(text, "num_attention_heads", defaults)
        layers = _number(vision, "num_hidden_layers", self.tower_defaults)
        return ModelSpec(
            family=self.name,
            text=TextSpec(
                layers=_number(text, "num_hidden_layers", defaults),
                hidden_size=width,
                intermediate_size=_number(text, "intermediate_size", defaults),
                heads=heads,
                kv_heads=_number(text, "num_key_value_heads", {"num_key_value_heads": heads}),
                head_dim=_number(text, "head_dim", {"head_dim": width // heads}),
                vocab_size=_number(text, "vocab_size", defaults),
                tied_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            ),
            vision=VisionSpec(
                layers=layers,
                hidden_size=_number(vision, "hidden_size", self.tower_defaults),
                intermediate_size=_number(vision, "intermediate_size", self.tower_defaults),
                heads=_number(vision, "num_attention_heads", self.tower_defaults),
                image_size=_number(vision, "image_size", self.tower_defaults),
                patch_size=_number(vision, "patch_size", self.tower_defaults),
                default_exit=_exit(config.get("vision_feature_layer", _DEFAULT_EXIT), layers),
                has_cls=self.has_cls,
                projector_hidden=width,
            ),
            dtype=checkpoint.dtype_of(config),
        )

    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        return checkpoint.load_model(folder, dtype, device)

    def pixel_values(self, folder: Path, images: Sequence[Image]) -> torch.Tensor:
        batch = _image_processor(folder)(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return cast("torch.Tensor", batch["pixel_values"])

    def hidden_states(self, model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        import torch

        llava = _llava(model)
        tower = llava.model.vision_tower
        out = tower(pixel_values.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        states = torch.stack(tuple(out.hidden_states), dim=1)
        strategy = llava.config.vision_feature_select_strategy
        return states[:, :, 1:] if strategy == "default" else states

    def project(self, model: PreTrainedModel, features: torch.Tensor) -> torch.Tensor:
        projector = _llava(model).model.multi_modal_projector
        weight = projector.linear_1.weight
        return cast("torch.Tensor", projector(features.to(device=weight.device, dtype=weight.dtype)))

    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _llava(model).model.language_model)

    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _llava(model).lm_head)

    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        llava = _llava(model)
        depth = len(llava.model.vision_tower.encoder.layers)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")
        # The tower may hold a config object of its own.
        for config in (llava.config.vision_config, llava.model.vision_tower.config):
            config.num_hidden_layers = layer
            self._cut_tower(llava.model.vision_tower, config, layer)
        # model.config and model.model.config are one object in transformers 5, but nothing promises it.
        for config in (llava.config, llava.model.config):
            config.vision_feature_layer = -1
        return model

    def _cut_tower(self, tower: torch.nn.Module, config: PreTrainedConfig, layer: int) -> None:
        """Drop the blocks after `layer`, and what only reads the last one's output; may be called twice."""
        raise NotImplementedError


class SiglipLlava(Llava):
    """LLaVA with a SigLIP tower: no CLS token, every patch is a token."""

    name = "llava-siglip"
    describes = "llava with a siglip_vision_model tower"
    tower_type = "siglip_vision_model"
    tower_defaults: ClassVar[Mapping[str, int]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    }
    has_cls = False

    def _cut_tower(self, tower: torch.nn.Module, config: PreTrainedConfig, layer: int) -> None:
        """The pooling head goes too. `post_layernorm` stays: no exit reads it, but stock transformers always builds
        it, and would warn of two missing vectors on every load."""
        siglip = cast("_SiglipTower", tower)
        siglip.encoder.layers = siglip.encoder.layers[:layer]
        config.vision_use_head = False
        if siglip.use_head:
            del siglip.head
            siglip.use_head = False


if TYPE_CHECKING:

    class _SiglipEncoder(torch.nn.Module):
        layers: torch.nn.ModuleList

    class _SiglipTower(torch.nn.Module):
        encoder: _SiglipEncoder
        head: torch.nn.Module
        use_head: bool


def _llava(model: PreTrainedModel) -> LlavaForConditionalGeneration:
    """The LLaVA itself; a PEFT wrapper around it is looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast("LlavaForConditionalGeneration", inner)


@lru_cache(maxsize=8)
def _image_processor(folder: Path) -> Callable[..., Mapping[str, object]]:
    from transformers import AutoImageProcessor

    # PIL, wherever torchvision is installed too: both resize, and not to the same pixels.
    return cast(
        "Callable[..., Mapping[str, object]]",
        AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False, backend="pil"),
    )


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = config.get(name)
    return cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}


def _number(section: Mapping[str, object], name: str, defaults: Mapping[str, int]) -> int:
    value = section.get(name)
    if value is None:
        value = defaults.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        kind = section.get("model_type", "model")
        raise SourceError(
            f"config.json gives no usable {name} for its {kind}",
            why=f"it says {section.get(name)!r}; a positive whole number is needed",
        )
    return value


def _exit(feature_layer: object, layers: int) -> int:
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise SourceError(
            "config.json takes image features from several layers at once (vision_feature_layer is a list)",
            why="an exit is one layer",
            way_out="use a model whose vision_feature_layer is one number",
        )
    # hidden_states has layers + 1 entries, so -1 is `layers`.
    found = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= found <= layers:
        raise SourceError(f"config.json has vision_feature_layer {feature_layer}, but its tower has {layers} blocks")
    return found
