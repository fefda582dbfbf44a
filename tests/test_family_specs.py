"""Shapes from config.json alone, for the configs that the published models have, and both layouts of weight names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from artifacts.errors import SourceError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.spec import ModelSpec

# What the published config.json say, as far as it bears on shapes; they leave out what is transformers' default.
_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAVA_1_6_MISTRAL_7B = {
    "model_type": "llava_next",
    "torch_dtype": "float16",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "text_config": {"model_type": "mistral", "vocab_size": 32064, "num_key_value_heads": 8, "intermediate_size": 14336},
    "vision_config": _CLIP_LARGE,
}
SMOLVLM_256M = {
    "model_type": "idefics3",
    "torch_dtype": "bfloat16",
    "scale_factor": 4,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "vision_config": {
        "model_type": "idefics3",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
    },
}

LLAMA_3_2_11B_VISION = {
    "model_type": "mllama",
    "torch_dtype": "bfloat16",
    "text_config": {"model_type": "mllama_text_model", "hidden_size": 4096, "num_hidden_layers": 40},
    "vision_config": {
        "model_type": "mllama_vision_model",
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "max_num_tiles": 4,
    },
}


def _spec(config: dict[str, object]) -> ModelSpec:
    return family_of(config).spec(config)


def test_llava_next_has_23_of_24_blocks_and_at_most_2928_image_tokens() -> None:
    spec = _spec(LLAVA_1_6_MISTRAL_7B)
    assert (spec.family, spec.dtype) == ("llava-next", "float16")
    assert (spec.text.layers, spec.text.hidden_size, spec.text.kv_heads, spec.text.vocab_size) == (32, 4096, 8, 32064)
    assert spec.vision is not None
    assert (spec.vision.layers, spec.vision.default_exit, spec.vision.has_cls) == (24, 23, True)
    # The overview's 576 patches, 4 tiles of as many, and a newline behind each of the 48 rows.
    assert (spec.vision.tiles, spec.vision.image_tokens) == (5, 576 + 4 * 576 + 48)


def test_smolvlm_has_its_last_block_as_default_exit_and_64_tokens_a_tile() -> None:
    spec = _spec(SMOLVLM_256M)
    assert spec.family == "idefics3" and spec.text.kv_heads == 3
    assert spec.vision is not None
    assert (spec.vision.layers, spec.vision.default_exit) == (12, 12)
    assert (spec.vision.tiles, spec.vision.image_tokens) == (17, 17 * 64)


def test_llama_3_2_vision_has_the_32_blocks_of_its_local_encoder_as_exits() -> None:
    spec = _spec(LLAMA_3_2_11B_VISION)
    assert spec.family == "mllama" and spec.dtype == "bfloat16"
    assert (spec.text.layers, spec.text.kv_heads, spec.text.vocab_size) == (40, 8, 128256)
    assert spec.vision is not None
    assert (spec.vision.layers, spec.vision.default_exit, spec.vision.tiles) == (32, 32, 4)
    assert spec.vision.image_tokens == 1  # the encoder's stand beside the text


@pytest.mark.parametrize(
    ("config", "layers", "kv_heads", "head_dim", "tied"),
    [
        ({"model_type": "llama", "num_key_value_heads": 8, "intermediate_size": 14336}, 32, 8, 128, False),
        ({"model_type": "mistral"}, 32, 8, 128, False),
        (
            {
                "model_type": "qwen2",
                "hidden_size": 896,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "num_hidden_layers": 24,
                "intermediate_size": 4864,
                "tie_word_embeddings": True,
            },
            24,
            2,
            64,
            True,
        ),
        ({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16}, 32, 32, 128, False),
        ({"model_type": "smollm3"}, 36, 4, 128, True),
    ],
)
def test_a_text_only_model_has_shapes_and_no_exits(
    config: dict[str, object], layers: int, kv_heads: int, head_dim: int, tied: bool
) -> None:
    spec = _spec(config)
    assert spec.vision is None
    assert (spec.text.layers, spec.text.kv_heads, spec.text.head_dim) == (layers, kv_heads, head_dim)
    assert spec.text.tied_embeddings is tied


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_defaults_of_text_configs_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    spec, stock = _spec({"model_type": kind}).text, AutoConfig.for_model(kind)
    assert spec.layers == stock.num_hidden_layers and spec.hidden_size == stock.hidden_size
    assert spec.intermediate_size == stock.intermediate_size and spec.vocab_size == stock.vocab_size
    assert spec.heads == stock.num_attention_heads and spec.kv_heads == stock.num_key_value_heads
    assert spec.head_dim == getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    assert spec.tied_embeddings == stock.tie_word_embeddings


def test_a_config_without_usable_shapes_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="no usable num_hidden_layers"):
        _spec({**SMOLVLM_256M, "vision_config": {"num_hidden_layers": -3}})


# What the names of the published checkpoints have where transformers 5 saves other ones.
_PUBLISHED = {"llava-next": ("vision_tower.", "vision_tower.vision_model."), "mllama": ("", "")}


@pytest.mark.parametrize("kind", _PUBLISHED)
def test_weights_load_alike_under_the_names_of_old_and_of_new_transformers(
    kind: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_family(kind), folder)
    family = family_of(checkpoint.read_config(folder))
    expected = family.load(folder).state_dict()
    saved = load_file(folder / checkpoint.WEIGHTS)
    published = {name.replace(*_PUBLISHED[kind]): tensor for name, tensor in saved.items()}
    assert len({*saved, *published, *expected}) > len(saved) + len(published) // 4
    for layout in (published, expected):
        tensors = {name: tensor.contiguous() for name, tensor in layout.items()}
        save_file(tensors, folder / checkpoint.WEIGHTS, {"format": "pt"})
        found = family.load(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
