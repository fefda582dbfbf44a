"""Cutting a tower file to file gives the model that loading, truncating and saving gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, SiglipVisionConfig

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.llava import SiglipLlava
from stages.models.tiny import build_tiny_llava
from stages.models.truncation import cut_files


@pytest.fixture(scope="module", params=["siglip", "siglip with a pooling head", "clip", "clip in bfloat16 shards"])
def folder(request: pytest.FixtureRequest, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole")
    if request.param == "siglip":
        return tiny_llava
    if request.param == "siglip with a pooling head":
        model = SiglipLlava().load(tiny_llava)
        config = SiglipVisionConfig(**(model.config.vision_config.to_dict() | {"vision_use_head": True}))
        model.model.vision_tower = type(model.model.vision_tower)(config)
        model.config.vision_config = config
        checkpoint.save_model(model, target, companions_from=tiny_llava)
        return target
    build_tiny_llava(target, tower="clip")
    if request.param == "clip in bfloat16 shards":
        model = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.bfloat16)
        (target / checkpoint.WEIGHTS).unlink()
        model.save_pretrained(target, max_shard_size="40KB")
    return target


@pytest.mark.parametrize("layer", [1, 3])
def test_a_cut_on_disk_equals_a_cut_in_memory(folder: Path, tmp_path: Path, layer: int) -> None:
    config = checkpoint.read_config(folder)
    family = family_of(config)
    cut = family.disk_cut(config, layer)
    assert cut is not None
    left_out = cut_files(folder, tmp_path, cut)
    full = family.load(folder, dtype=checkpoint.dtype_of(config))
    before = sum(weight.numel() for weight in full.parameters())
    expected = family.truncate(full, layer)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert loaded.dtype == expected.dtype
    assert loaded.config.to_diff_dict() == expected.config.to_diff_dict()
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert left_out.parameters == before - sum(weight.numel() for weight in expected.parameters())
    assert family.spec(checkpoint.read_config(tmp_path)) == family.spec(config).with_exit(layer)
    assert (tmp_path / "tokenizer_config.json").exists() and (tmp_path / "preprocessor_config.json").exists()


def test_what_is_kept_is_kept_bit_for_bit(tiny_llava: Path, tmp_path: Path) -> None:
    cut_files(tiny_llava, tmp_path, SiglipLlava().disk_cut(checkpoint.read_config(tiny_llava), 2))
    before, after = load_file(tiny_llava / checkpoint.WEIGHTS), load_file(tmp_path / checkpoint.WEIGHTS)
    assert {name for name in before if name not in after} == {name for name in before if "encoder.layers.2." in name}
    assert all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("layer", [0, 4])
def test_a_cut_outside_the_tower_is_refused(tiny_llava: Path, layer: int) -> None:
    with pytest.raises(StageError, match=r"outside 1\.\.3"):
        SiglipLlava().disk_cut(checkpoint.read_config(tiny_llava), layer)
