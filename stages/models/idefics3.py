"""Idefics3 and SmolVLM: a SigLIP-like tower on tiles, pixel shuffle, one linear layer, a decoder-only language model.

Notable:
- the default exit is the last block: transformers applies `post_layernorm` to it, then shuffles and projects. An
  earlier exit goes the same way: its features are `hidden_states[l]`, and `post_layernorm` belongs to the projection,
  since that is what a tower with only l blocks does in stock transformers;
- a large image becomes rows and columns of tiles and an overview; the geometry is (rows, columns), (0, 0) without
  tiles; each pass of the tower gives equally many tokens, and the prompt names it: `<row_1_col_1>`, `<global-img>`.
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
from stages.models.shapes import number, section, text_spec
from stages.models.spec import ModelSpec, VisionSpec
from stages.models.truncation import DiskCut

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel
    from transformers.models.idefics3.modeling_idefics3 import Idefics3ForConditionalGeneration

_BLOCK: Final = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
_TILES_A_SIDE: Final = 4  # the longest side of the image processors that ship is four tiles, unless config.json says


class Idefics3(Family):
    """Idefics3, SmolVLM and SmolVLM2 (images; video is not looked at)."""

    name = "idefics3"
    card = Card(
        models=("HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceM4/Idefics3-8B-Llama3"),
        tower="SigLIP, on tiles and on the whole image",
        projector="pixel shuffle and one linear layer",
        language="Llama",
        default_exit="the last block",
        features="every patch, after the last layer norm (at every exit: it counts as part of the projection)",
        prompt="at <image>, tiles row by row between markers, then the whole image",
    )
    model_types = ("idefics3", "smolvlm")
    describes = "idefics3 with a idefics3_vision tower"
    tower = "vision_model."
    gptq = True
    # transformers' Idefics3VisionConfig and SmolVLMVisionConfig, which are alike.
    tower_defaults: ClassVar[Mapping[str, int]] = {
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 32,
    }

    def matches(self, config: Mapping[str, object]) -> bool:
        return config.get("model_type") in self.model_types

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        vision = section(config, "vision_config")
        layers = number(vision, "num_hidden_layers", self.tower_defaults)
        size = number(vision, "image_size", self.tower_defaults)
        longest = number(section(vision, "size"), "longest_edge", {"longest_edge": _TILES_A_SIDE * size})
        return ModelSpec(
            family=self.name,
            text=text_spec(section(config, "text_config"), tied=config.get("tie_word_embeddings")),
            vision=VisionSpec(
                layers=layers,
                hidden_size=number(vision, "hidden_size", self.tower_defaults),
                intermediate_size=number(vision, "intermediate_size", self.tower_defaults),
                heads=number(vision, "num_attention_heads", self.tower_defaults),
                image_size=size,
                patch_size=number(vision, "patch_size", self.tower_defaults),
                default_exit=layers,
                tiles=1 + (-(-longest // size)) ** 2,
                shuffle=number(config, "scale_factor", {"scale_factor": 2}),
            ),
            dtype=checkpoint.dtype_of(config),
        )

    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        return checkpoint.load_model(folder, dtype, device)

    def image_inputs(self, folder: Path, image: Image) -> Mapping[str, torch.Tensor]:
        return processed(folder, image, return_row_col_info=True)

    def geometry(self, inputs: Mapping[str, torch.Tensor]) -> Geometry:
        """Rows and columns of tiles."""
        return int(inputs["rows"].item()), int(inputs["cols"].item())

    def hidden_states(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        idefics = _idefics3(model)
        device = idefics.model.vision_model.device
        mask = inputs.get("pixel_attention_mask")
        out = idefics.model.get_image_features(
            inputs["pixel_values"].to(device),
            None if mask is None else mask.to(device),
            output_hidden_states=True,
        )
        states: torch.Tensor = torch.stack(tuple(out.hidden_states)).flatten(1, 2)
        return states

    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        inner = _idefics3(model).model
        weight = inner.vision_model.post_layernorm.weight
        rows, columns = geometry
        tiles = features.to(device=weight.device, dtype=weight.dtype).reshape(rows * columns + 1, -1, len(weight))
        tokens = inner.connector(inner.vision_model.post_layernorm(tiles))
        return cast("torch.Tensor", tokens.flatten(0, 1))

    def surround(self, geometry: Geometry) -> tuple[str, ...]:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        rows, columns = geometry
        # Asked for one token a tile, it shows where a tile's tokens go. Idefics3's processor writes the same text.
        text: str = get_image_prompt_string(
            rows,
            columns,
            1,
            fake_token_around_image="<fake_token_around_image>",
            image_token=self.image_slot,
            global_image_token="<global-img>",
        )
        return tuple(text.split(self.image_slot))

    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _idefics3(model).model.text_model)

    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _idefics3(model).lm_head)

    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        idefics = _idefics3(model)
        tower = idefics.model.vision_model
        depth = len(tower.encoder.layers)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")
        tower.encoder.layers = tower.encoder.layers[:layer]
        # The tower and the inner model may hold config objects of their own.
        for config in (idefics.config.vision_config, idefics.model.config.vision_config, tower.config):
            config.num_hidden_layers = layer
        return model

    def disk_cut(self, config: Mapping[str, object], layer: int) -> DiskCut:
        vision = section(config, "vision_config")
        depth = number(vision, "num_hidden_layers", self.tower_defaults)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")

        def keeps(name: str) -> bool:
            found = _BLOCK.search(name)
            return found is None or int(found[1]) < layer

        return DiskCut({**config, "vision_config": {**vision, "num_hidden_layers": layer}}, keeps)


def _idefics3(model: PreTrainedModel) -> Idefics3ForConditionalGeneration:
    """The model itself; a PEFT wrapper around it is looked through. SmolVLM's class is a copy under another name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast("Idefics3ForConditionalGeneration", inner)
