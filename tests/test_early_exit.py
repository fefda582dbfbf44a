"""Stage `early-exit`: a checkpoint that stock transformers loads, equal to the full model told to exit there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError
from artifacts.manifest import Manifest
from stages.early_exit import EarlyExitParams, EarlyExitStage
from stages.models import checkpoint
from stages.models.llava import SiglipLlava
from stages.models.spec import ModelSpec, TextSpec
from stages.models.tiny import tiny_llava_spec
from stages.stage import Context, Planned


class _Silent:
    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


def cut(source: Path, tmp_path: Path, layer: int) -> tuple[Path, Mapping[str, object]]:
    output = tmp_path / f"exit-{layer}"
    output.mkdir()
    artifact = Artifact(source, Manifest.of_folder(source, "checkpoint", {}))
    context = Context("exit", {"source": artifact}, output, tmp_path / "scratch", 0, _Silent())
    return output, EarlyExitStage(EarlyExitParams(layer=layer)).run(context)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_cut_model_in_stock_transformers_equals_the_full_one_told_to_exit_there(
    tiny_llava: Path, images: list[Path], tmp_path: Path, layer: int
) -> None:
    folder, metadata = cut(tiny_llava, tmp_path, layer)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text="<|im_start|>user\n<image>\nhi<|im_end|>\n", images=Image.open(images[0]), return_tensors="pt"
    )
    full = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    small, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            small.eval()(**inputs).logits, full(**inputs, vision_feature_layer=layer).logits, rtol=0, atol=1e-5
        )
    assert metadata["exits"] == list(range(1, layer + 1)) and metadata["default_exit"] == layer
    assert len(small.model.vision_tower.encoder.layers) == layer
    gone = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in small.parameters())
    assert metadata["removed_parameters"] == gone
    assert SiglipLlava().spec(checkpoint.read_config(folder)) == tiny_llava_spec().with_exit(layer)


def test_the_pooling_head_goes_with_the_blocks(tiny_llava: Path, tmp_path: Path) -> None:
    model = SiglipLlava().load(tiny_llava)
    config = SiglipVisionConfig(**(model.config.vision_config.to_dict() | {"vision_use_head": True}))
    model.model.vision_tower = type(model.model.vision_tower)(config)
    model.config.vision_config = config
    checkpoint.save_model(model, tmp_path / "headed", companions_from=tiny_llava)
    folder, metadata = cut(tmp_path / "headed", tmp_path, 2)
    names = checkpoint.tensor_digests(folder / "model.safetensors", containing="vision_tower.")
    assert not [name for name in names if ".head." in name or ".layers.2." in name]
    assert metadata["removed_tensors"] > 16  # a block has 16 tensors
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_same_cut_gives_the_same_bytes(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, one = cut(tiny_llava, tmp_path / "a", 2)
    second, other = cut(tiny_llava, tmp_path / "b", 2)
    assert one == other
    assert Manifest.of_folder(first, "checkpoint", one).digest == Manifest.of_folder(second, "checkpoint", one).digest


def test_a_cut_model_can_be_cut_again(tiny_llava: Path, tmp_path: Path) -> None:
    folder, _ = cut(tiny_llava, tmp_path, 2)
    again, metadata = cut(folder, tmp_path, 1)
    assert metadata["default_exit"] == 1
    (tmp_path / "b").mkdir()
    straight, _ = cut(tiny_llava, tmp_path / "b", 1)
    assert (again / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def _plan(layer: int, spec: ModelSpec | None) -> Planned:
    return EarlyExitStage(EarlyExitParams(layer=layer)).plan({"source": Planned("checkpoint", spec)})


def test_the_plan_knows_the_smaller_shapes() -> None:
    assert _plan(2, tiny_llava_spec()).spec == tiny_llava_spec().with_exit(2)
    assert _plan(2, None).spec is None


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_layer_outside_the_tower_is_refused_with_the_valid_range(layer: int) -> None:
    with pytest.raises(RecipeError) as refused:
        _plan(layer, tiny_llava_spec())
    assert refused.value.way_out == "choose a layer from 1 to 3"


def test_a_layer_below_one_is_refused_even_when_the_model_is_not_known_yet() -> None:
    with pytest.raises(RecipeError):
        _plan(0, None)


def test_a_model_without_an_image_encoder_is_refused() -> None:
    text = TextSpec(2, 64, 128, 2, 1, 32, 512, True)
    with pytest.raises(RecipeError, match="image encoder"):
        _plan(1, ModelSpec("llama", text))
