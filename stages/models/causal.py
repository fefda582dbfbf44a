"""Causal language models without an image encoder: Llama, Mistral, Qwen2, Qwen3, SmolLM3 (`...ForCausalLM`).

Notable: there is no encoder to leave, so `spec` has no vision part, and what only concerns images is refused; pruning,
quantization and verification (text only) work as for every other family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.card import Card
from stages.models.family import Family, Geometry
from stages.models.shapes import text_spec
from stages.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import LlamaForCausalLM, PreTrainedModel


class Causal(Family):
    """A decoder with `model`, its backbone, and `lm_head`."""

    name = "causal-lm"
    card = Card(
        models=("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        tower="-",
        projector="-",
        language="Llama, Mistral, Qwen2, Qwen3, SmolLM3",
        default_exit="-",
        features="-",
        prompt="no image",
    )
    gptq = True
    model_types = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
    describes = "llama, mistral, qwen2, qwen3 or smollm3"

    def matches(self, config: Mapping[str, object]) -> bool:
        return config.get("model_type") in self.model_types and "vision_config" not in config

    def spec(self, config: Mapping[str, object]) -> ModelSpec:
        return ModelSpec(family=self.name, text=text_spec(config), dtype=checkpoint.dtype_of(config))

    def load(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
        return checkpoint.load_model(folder, dtype, device, images=False)

    def image_inputs(self, folder: Path, image: Image) -> Mapping[str, torch.Tensor]:
        _no_encoder()

    def hidden_states(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        _no_encoder()

    def project(self, model: PreTrainedModel, features: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        _no_encoder()

    def trunk(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _causal(model).model)

    def head(self, model: PreTrainedModel) -> torch.nn.Module:
        return cast("torch.nn.Module", _causal(model).lm_head)

    def truncate(self, model: PreTrainedModel, layer: int) -> PreTrainedModel:
        _no_encoder()


def _no_encoder() -> NoReturn:
    raise StageError(
        "the model has no image encoder, so there is none to leave early",
        way_out="leave out early-exit and l-ppo; prune, gguf and icet-verify work on text alone",
    )


def _causal(model: PreTrainedModel) -> LlamaForCausalLM:
    """The model itself; a PEFT wrapper around it is looked through. Every one of the kinds is built alike."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast("LlamaForCausalLM", inner)
