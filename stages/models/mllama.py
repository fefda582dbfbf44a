"""Llama 3.2 Vision: a tiled encoder of two stages, and a decoder that looks at it (`MllamaForConditionalGeneration`).

What exit l means here. The encoder is a local one of 32 blocks, then a global one of 8 gated blocks; the language
model's cross-attention reads the global output beside the outputs of five local blocks
(`intermediate_layers_indices`, [3, 7, 15, 23, 30]; index i is the output of block i + 1 of 32, which is exit i + 1).
The paper (Bachu et al., arXiv 2411.04291) leaves the encoder after l blocks, which for this model are the local ones,
and says no more; so exit l is:

- the local encoder ends after l blocks, and its output h_l goes on as h_32 would: `layernorm_post`, tile positions, the
  whole global encoder. Only the global encoder makes what the cross-attention expects, it is small, and it stays;
- an intermediate feature i is h_min(i + 1, l): where its block is gone, the last one that is left stands in, so that
  the width (7,680) and with it the projector stay as they are;
- the default exit is 32, the whole.

Stock transformers computes just this from a config with `num_hidden_layers: l` and the indices cut to l - 1, which is
how `truncate` saves it. Nothing of an image stands in the text but the token `<|image|>`. llama.cpp does not run it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, cast

import numpy as np

from artifacts.errors import SourceError, StageError
from stages.models import checkpoint
from stages.models.card import Card
from stages.models.crossing import Beside
from stages.models.family import Family, Geometry
from stages.models.processing import processed
from stages.models.shapes import number, section, text_spec
from stages.models.spec import ModelSpec, VisionSpec
from stages.models.truncation import DiskCut

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from transformers import PreTrainedModel
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

_INTERMEDIATE: Final = (3, 7, 15, 23, 30)  # transformers' MllamaVisionConfig
_MORE_TOKENS: Final = 8  # rows of its embeddings that its head has not; <|image|> is one
_BLOCK: Final = re.compile(r"vision_model\.transformer\.layers\.(\d+)\.")


class Mllama(Family):
    """Llama 3.2 Vision, 11B and 90B."""

    name = "mllama"
    card = Card(
        models=("meta-llama/Llama-3.2-11B-Vision-Instruct",),
        tower="32 local blocks, of which an exit leaves some out, and 8 global ones, which stay",
        projector="one linear layer",
        language="Llama 3.1 with cross-attention layers",
        default_exit="32, the last local block",
        features="the global blocks' output beside five intermediate outputs, all tiles",
        prompt="beside the text, through cross-attention; <|image|> marks from where on",
    )
    model_types = ("mllama",)
    describes = "mllama with a mllama_vision_model tower"
    runtimes = ("transformers",)
    gptq = True
    image_slot = "<|image|>"
    tower = "vision_model."
    # transformers' MllamaVisionConfig
    tower_defaults: ClassVar[Mapping[str, int]] = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "max_num_tiles": 4,
    }

    def matches(self, config: Mapping[str, object]) -> bool:
        return config.get("model_type") in self.model_types

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        vision = section(config, "vision_config")
        layers = number(vision, "num_hidden_layers", self.tower_defaults)
        text = section(config, "text_config")
        return ModelSpec(
            family=self.name,
            text=text_spec({"model_type": "mllama_text_model", **text}, tied=config.get("tie_word_embeddings")),
            vision=VisionSpec(
                layers=layers,
                hidden_size=number(vision, "hidden_size", self.tower_defaults),
                intermediate_size=number(vision, "intermediate_size", self.tower_defaults),
                heads=number(vision, "attention_heads", self.tower_defaults),
                image_size=number(vision, "image_size", self.tower_defaults),
                patch_size=number(vision, "patch_size", self.tower_defaults),
                default_exit=layers,
                has_cls=True,
                tiles=number(vision, "max_num_tiles", self.tower_defaults),
                most_tokens=1,
                parameters=self._parameters(vision, text),
            ),
            dtype=checkpoint.dtype_of(config),
        )

    def _parameters(self, vision: Mapping[str, object], text: Mapping[str, object]) -> int:
        """Numbers in the tower and the projector, and what the language model has for images beside matrices."""

        def of(name: str, default: int | None = None) -> int:
            return number(vision, name, self.tower_defaults if default is None else {name: default})

        def items(name: str, default: int) -> int:
            found = vision.get(name)
            return len(found) if isinstance(found, list) else default

        hidden, inner, patch, tiles = (
            of(n) for n in ("hidden_size", "intermediate_size", "patch_size", "max_num_tiles")
        )
        positions = (of("image_size") // patch) ** 2 + 1
        shapes = items("supported_aspect_ratios", 8) + 1  # 0 is padding
        block = 4 * hidden**2 + 2 * hidden * inner + inner + hidden + 4 * hidden
        embeddings = 3 * hidden * patch**2 + hidden + positions * hidden + shapes * tiles * positions * hidden + 1
        beside = 2 * (shapes * tiles * hidden + 1) + 4 * hidden  # tables before and behind, norms
        blocks = of("num_hidden_layers") * block + of("num_global_layers", 8) * (block + 2)
        out = hidden * (items("intermediate_layers_indices", 5) + 1)
        width = number(text, "hidden_size", {"hidden_size": 4096})
        head = width // number(text, "num_attention_heads", {"num_attention_heads": 32})
        crossed = text.get("cross_attention_layers")
        crossing = (len(crossed) if isinstance(crossed, list) else 8) * (2 * head + 2)  # norms and gates
        return embeddings + beside + blocks + (of("vision_output_dim", out) + 1 + _MORE_TOKENS) * width + crossing

    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        return checkpoint.load_model(folder, dtype, device)

    def image_inputs(self, folder: Path, image: Image) -> Mapping[str, torch.Tensor]:
        return processed(folder, image)

    def geometry(self, inputs: Mapping[str, torch.Tensor]) -> Geometry:
        """How many tiles there are, and how many there could be."""
        mask = inputs["aspect_ratio_mask"]
        return int(mask.sum()), mask.shape[-1]

    def hidden_states(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(exits 0..L, tiles * patches, 2 * width): the local encoder's output, then the global one's of it."""
        import torch

        tower = _mllama(model).model.vision_model
        given = {
            name: inputs[name].to(tower.device) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        }
        caught: dict[str, torch.Tensor] = {}

        def catch(
            module: torch.nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, torch.Tensor], output: _LocalOutput
        ) -> None:
            caught["mask"] = kwargs["attention_mask"]
            caught["states"] = torch.cat([args[0], *output.hidden_states])

        # Stock code makes patches, positions and masks, and runs the local encoder; its global one is run once more.
        hook = tower.transformer.register_forward_hook(catch, with_kwargs=True)
        try:
            tower(**given)
        finally:
            hook.remove()
        tiles, width = given["aspect_ratio_mask"].shape[-1], caught["states"].shape[-1]
        ratios = given["aspect_ratio_ids"].reshape(1, -1)

        def seen_globally(state: torch.Tensor) -> torch.Tensor:
            placed = tower.post_tile_positional_embedding(
                tower.layernorm_post(state).reshape(1, tiles, -1, width), ratios
            )
            out = tower.global_transformer(placed.reshape(1, -1, width), attention_mask=caught["mask"])
            return cast("torch.Tensor", out.last_hidden_state)

        both = torch.cat(
            [caught["states"], torch.cat([seen_globally(state[None]) for state in caught["states"]])], dim=-1
        )
        # A tile's patches are padded to a multiple of 8 inside the encoder.
        return both.reshape(len(both), tiles, -1, 2 * width)[:, :, : tower.num_patches].flatten(1, 2)

    def exit_features(
        self, config: Mapping[str, object], states: NDArray[np.floating], exit: int
    ) -> NDArray[np.floating]:
        """(tiles * patches, width * (1 + intermediate features)), laid out as transformers does."""
        width = states.shape[-1] // 2
        between = [states[min(index + 1, exit), :, :width] for index in _intermediate(config)]
        return np.concatenate([states[exit, :, width:], np.stack(between, axis=-1).reshape(states.shape[1], -1)], -1)

    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        projector = _mllama(model).model.multi_modal_projector
        return cast(
            "torch.Tensor", projector(features.to(device=projector.weight.device, dtype=projector.weight.dtype))
        )

    def surround(self, geometry: Geometry) -> tuple[str, ...]:
        """The image's own token, and none of the encoder's: these stand beside."""
        return (self.image_slot,)

    def beside(self, tokens: torch.Tensor, geometry: Geometry) -> Beside:
        there, tiles = geometry
        return Beside(tokens, there * tokens.shape[0] // tiles)

    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _mllama(model).model.language_model)

    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _mllama(model).lm_head)

    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        mllama = _mllama(model)
        tower = mllama.model.vision_model
        depth = len(tower.transformer.layers)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")
        tower.transformer.layers = tower.transformer.layers[:layer]
        indices = [min(index, layer - 1) for index in tower.intermediate_layers_indices]
        tower.intermediate_layers_indices = indices
        # The tower and the inner model may hold config objects of their own.
        for config in (mllama.config.vision_config, mllama.model.config.vision_config, tower.config):
            config.num_hidden_layers = layer
            config.intermediate_layers_indices = indices
        return model

    def disk_cut(self, config: Mapping[str, object], layer: int) -> DiskCut:
        vision = section(config, "vision_config")
        depth = number(vision, "num_hidden_layers", self.tower_defaults)
        if not 1 <= layer <= depth:
            raise StageError(f"exit {layer} is outside 1..{depth}")
        indices = [min(index, layer - 1) for index in _intermediate(config)]
        tower = {**vision, "num_hidden_layers": layer, "intermediate_layers_indices": indices}

        def keeps(name: str) -> bool:
            found = _BLOCK.search(name)
            return found is None or int(found[1]) < layer

        return DiskCut({**config, "vision_config": tower}, keeps)


if TYPE_CHECKING:

    class _LocalOutput:
        hidden_states: tuple[torch.Tensor, ...]


def _intermediate(config: Mapping[str, object]) -> Sequence[int]:
    found = section(config, "vision_config").get("intermediate_layers_indices", _INTERMEDIATE)
    if not isinstance(found, list | tuple) or not all(isinstance(index, int) and index >= 0 for index in found):
        raise SourceError("config.json gives no usable intermediate_layers_indices", why=f"it says {found!r}")
    return cast("Sequence[int]", found)


def _mllama(model: PreTrainedModel) -> MllamaForConditionalGeneration:
    """The model itself; a PEFT wrapper around it is looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast("MllamaForConditionalGeneration", inner)
