"""LLaVA: an image encoder, a two-layer projector, a decoder-only language model (`LlavaForConditionalGeneration`).

Notable: exits are read off one pass of the tower; a cut tower keeps `vision_feature_layer = -1`, so that stock
transformers takes the last block's output, before `post_layernorm`; another tower is a subclass of `Llava` that says
its `model_type`, its defaults and whether it has a CLS token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, cast

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.card import Card
from stages.models.family import Family, Geometry
from stages.models.processing import processed
from stages.models.shapes import exit_of, number, section, text_spec
from stages.models.spec import ModelSpec, VisionSpec
from stages.models.truncation import DiskCut

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

_DEFAULT_EXIT: Final = -2  # transformers' LlavaConfig
# A block of the tower, or SigLIP's pooling head, which reads the last block only.
_TOWER_PART: Final = re.compile(r"vision_tower\.(?:vision_model\.)?(?:encoder\.layers\.(?P<block>\d+)|head)\.")


class Llava(Family):
    """What LLaVA models share, whatever their tower."""

    model_types = ("llava",)
    realigns = True
    gptq = True
    tower_type: ClassVar[str]  # vision_config.model_type
    tower_defaults: ClassVar[Mapping[str, int]]  # transformers' defaults for what vision_config leaves out
    has_cls: ClassVar[bool]
    cut_tower_fields: ClassVar[Mapping[str, object]] = {}  # of vision_config, when the last block is gone

    def matches(self, config: Mapping[str, object]) -> bool:
        vision = section(config, "vision_config")
        return config.get("model_type") in self.model_types and vision.get("model_type") == self.tower_type

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        vision = section(config, "vision_config")
        text = text_spec(section(config, "text_config"), tied=config.get("tie_word_embeddings"))
        layers = number(vision, "num_hidden_layers", self.tower_defaults)
        return ModelSpec(
            family=self.name,
            text=text,
            vision=VisionSpec(
                layers=layers,
                hidden_size=number(vision, "hidden_size", self.tower_defaults),
                intermediate_size=number(vision, "intermediate_size", self.tower_defaults),
                heads=number(vision, "num_attention_heads", self.tower_defaults),
                image_size=number(vision, "image_size", self.tower_defaults),
                patch_size=number(vision, "patch_size", self.tower_defaults),
                default_exit=exit_of(config.get("vision_feature_layer", _DEFAULT_EXIT), layers),
                has_cls=self.has_cls,
                projector_hidden=text.hidden_size,
            ),
            dtype=checkpoint.dtype_of(config),
        )

    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        return checkpoint.load_model(folder, dtype, device)

    def image_inputs(self, folder: Path, image: Image) -> Mapping[str, torch.Tensor]:
        return processed(folder, image)

    def hidden_states(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        llava = llava_of(model)
        tower = llava.model.vision_tower
        tiles = inputs["pixel_values"].flatten(0, -4)  # (tiles, 3, height, width); LLaVA-1.5's image is one tile
        out = tower(tiles.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        states = torch.stack(tuple(out.hidden_states))
        if llava.config.vision_feature_select_strategy == "default":
            states = states[:, :, 1:]
        return states.flatten(1, 2)

    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        projector = llava_of(model).model.multi_modal_projector
        weight = projector.linear_1.weight
        return cast("torch.Tensor", projector(features.to(device=weight.device, dtype=weight.dtype)))

    def projector_input(self, model: PreTrainedModel) -> torch.nn.Linear:
        return cast("torch.nn.Linear", llava_of(model).model.multi_modal_projector.linear_1)

    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", llava_of(model).model.language_model)

    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", llava_of(model).lm_head)

    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        llava = llava_of(model)
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

    def disk_cut(self, config: Mapping[str, object], layer: int) -> DiskCut:
        vision = section(config, "vision_config")
        depth = number(vision, "num_hidden_layers", self.tower_defaults)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")
        tower = {**vision, **self.cut_tower_fields, "num_hidden_layers": layer}

        def keeps(name: str) -> bool:
            found = _TOWER_PART.search(name)
            if found is None:
                return True
            return found["block"] is not None and int(found["block"]) < layer

        return DiskCut({**config, "vision_config": tower, "vision_feature_layer": -1}, keeps)

    def _cut_tower(self, tower: torch.nn.Module, config: PreTrainedConfig, layer: int) -> None:
        """Drop the blocks after `layer`, and what only reads the last one's output; may be called twice."""
        raise NotImplementedError


class SiglipLlava(Llava):
    """LLaVA with a SigLIP tower: no CLS token, every patch is a token."""

    name = "llava-siglip"
    card = Card(
        models=("demo:smol-llava",),
        tower="SigLIP, without CLS",
        projector="two linear layers",
        language="any decoder that stock LlavaForConditionalGeneration takes",
        default_exit="vision_feature_layer; -2, the last but one, where config.json says nothing",
        features="every patch, before the last layer norm",
        prompt="at <image>, one token a patch",
    )
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
    cut_tower_fields: ClassVar[Mapping[str, object]] = {"vision_use_head": False}

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


def llava_of(model: PreTrainedModel) -> LlavaForConditionalGeneration:
    """The LLaVA itself, of any kind; a PEFT wrapper around it is looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast("LlavaForConditionalGeneration", inner)
