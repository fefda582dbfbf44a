"""The family LLaVA-1.5: a CLIP tower with its CLS token, at every exit, in both layouts of weight names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from artifacts.errors import SourceError, StageError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.llava_clip import ClipLlava
from stages.models.tiny import build_tiny_llava, tiny_llava_spec

FAMILY = ClipLlava()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-clip")
    build_tiny_llava(folder, tower="clip")
    return folder


def test_every_exit_is_transformers_own_without_the_cls_token(clip: Path, images: list[Path]) -> None:
    model = FAMILY.load(clip)
    for path in images:
        inputs = FAMILY.image_inputs(clip, Image.open(path))
        with torch.no_grad():
            states = FAMILY.hidden_states(model, inputs)
            assert states.shape == (4, 16, 64)
            for exit in (1, 2, 3):
                stock = model.get_image_features(inputs["pixel_values"], vision_feature_layer=exit).pooler_output[0]
                torch.testing.assert_close(FAMILY.project(model, states[exit], ()), stock, rtol=0, atol=1e-5)
            default = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
            torch.testing.assert_close(FAMILY.project(model, states[2], ()), default, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_cut_model_in_stock_transformers_equals_the_full_one_told_to_exit_there(
    clip: Path, images: list[Path], tmp_path: Path, layer: int
) -> None:
    checkpoint.save_model(FAMILY.truncate(FAMILY.load(clip), layer), tmp_path, companions_from=clip)
    full = AutoModelForImageTextToText.from_pretrained(clip).eval()
    small, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(small.model.vision_tower.encoder.layers) == layer
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text="user\n<image>\nhi", images=Image.open(images[0]), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            small.eval()(**inputs).logits, full(**inputs, vision_feature_layer=layer).logits, rtol=0, atol=1e-5
        )
    assert FAMILY.spec(checkpoint.read_config(tmp_path)) == tiny_llava_spec(tower="clip").with_exit(layer)


def test_a_cut_beyond_the_tower_is_refused(clip: Path) -> None:
    with pytest.raises(StageError, match=r"outside 1\.\.3"):
        FAMILY.truncate(FAMILY.load(clip), 4)


_LAYOUTS = {
    # llava-hf's files: the head inside the language model, a vision_model inside the tower
    "transformers 4": {"vision_tower.": "vision_tower.vision_model.", "lm_head.": "language_model.lm_head."},
    "transformers 4.52": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_older_layouts_of_weight_names_load_too(clip: Path, tmp_path: Path, layout: str) -> None:
    renamed: dict[str, torch.Tensor] = {}
    for name, value in load_file(clip / checkpoint.WEIGHTS).items():
        changed = [new + name.removeprefix(old) for old, new in _LAYOUTS[layout].items() if name.startswith(old)]
        renamed[changed[0] if changed else name] = value
    assert any("vision_tower.vision_model.encoder" in name for name in renamed)
    save_file(renamed, tmp_path / checkpoint.WEIGHTS, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((clip / "config.json").read_bytes())
    loaded, reference = FAMILY.load(tmp_path).state_dict(), FAMILY.load(clip).state_dict()
    assert loaded.keys() == reference.keys()
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)


def test_llava_1_5_s_own_config_gives_24_blocks_and_exit_23() -> None:
    config = {  # llava-hf/llava-1.5-7b-hf, what its config.json says of shapes
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "vision_feature_layer": -2,
        "torch_dtype": "float16",
    }
    assert family_of(config).name == "llava-1.5"
    for given in (config, {key: value for key, value in config.items() if key != "vision_config"}):
        spec = FAMILY.spec(given)
        assert spec.vision is not None and spec.vision.has_cls
        assert (spec.vision.layers, spec.vision.default_exit, spec.vision.image_tokens) == (24, 23, 576)
        assert (spec.vision.hidden_size, spec.vision.projector_hidden) == (1024, 4096)
        assert (spec.text.layers, spec.text.kv_heads, spec.text.vocab_size) == (32, 32, 32064)


def test_a_model_that_keeps_the_cls_token_as_an_image_token_is_refused() -> None:
    with pytest.raises(SourceError, match="CLS token as an image token"):
        FAMILY.spec({"model_type": "llava", "vision_feature_select_strategy": "full"})
