"""Model families against transformers' own results, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from artifacts.errors import SourceError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.features import ExitFeatures, encoder_digest
from stages.models.llava import SiglipLlava
from stages.models.tiny import build_tiny_llava, tiny_llava_spec


def _config(folder: Path) -> dict[str, object]:
    return checkpoint.read_config(folder)


def test_the_tiny_model_is_the_same_bytes_every_time(tiny_llava: Path, tmp_path: Path) -> None:
    build_tiny_llava(tmp_path)
    names = sorted(path.name for path in tiny_llava.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny_llava / name).read_bytes(), name


def test_a_spec_from_config_json_equals_the_shapes_of_the_model(tiny_llava: Path) -> None:
    spec = family_of(_config(tiny_llava)).spec(_config(tiny_llava))
    assert spec == tiny_llava_spec()
    model = SiglipLlava().load(tiny_llava)
    assert spec.vision is not None and spec.vision.default_exit == 2
    assert len(model.model.vision_tower.encoder.layers) == spec.vision.layers
    assert len(model.model.language_model.layers) == spec.text.layers
    assert tuple(model.lm_head.weight.shape) == (spec.text.vocab_size, spec.text.hidden_size)


def test_a_spec_fills_in_what_config_json_leaves_to_transformers_defaults() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 24},
    }
    spec = family_of(config).spec(config)
    assert (spec.text.layers, spec.text.head_dim, spec.text.kv_heads) == (32, 128, 32)
    assert spec.vision is not None and spec.vision.default_exit == 23 and spec.vision.hidden_size == 768


def test_every_exit_equals_the_hidden_state_of_transformers(tiny_llava: Path, images: list[Path]) -> None:
    family = SiglipLlava()
    model = family.load(tiny_llava)
    inputs = [family.image_inputs(tiny_llava, Image.open(path)) for path in images]
    pixels = torch.cat([each["pixel_values"] for each in inputs])
    states = torch.stack([family.hidden_states(model, each) for each in inputs])
    reference = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert states.shape == (3, 4, 16, 64) and len(reference) == 4
    for exit, state in enumerate(reference):
        torch.testing.assert_close(states[:, exit], state, rtol=0, atol=1e-5)
        if exit == 0:
            continue  # stock get_image_features takes 0 for "no hidden states"
        tokens = family.project(model, states[:, exit], ())
        stock = torch.stack(model.get_image_features(pixels, vision_feature_layer=exit).pooler_output)
        torch.testing.assert_close(tokens, stock, rtol=0, atol=1e-5)
    default = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(family.project(model, states[:, 2], ()), default, rtol=0, atol=1e-5)


def test_trunk_and_head_together_give_the_logits_of_the_model(tiny_llava: Path) -> None:
    family = SiglipLlava()
    model = family.load(tiny_llava)
    ids = torch.tensor([[1, 361, 15, 92]])
    out = family.trunk(model)(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(family.head(model)(out.last_hidden_state), model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("config", "words", "nearest"),
    [
        ({"model_type": "llava", "vision_config": {"model_type": "siglip2_vision_model"}}, "siglip2", "siglip"),
        ({"model_type": "idefics2", "vision_config": {"model_type": "idefics2"}}, "idefics2", "idefics3"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe", "llama, mistral, qwen2"),
        ({}, "without model_type", ""),
    ],
)
def test_an_unknown_family_is_refused_with_the_nearest_known_one(
    config: dict[str, object], words: str, nearest: str
) -> None:
    with pytest.raises(SourceError) as refused:
        family_of(config, where="here")
    assert words in refused.value.what
    assert f"the nearest family that works is {nearest}" in (refused.value.way_out or "").replace("llava with a ", "")


def _damaged(tiny_llava: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llava, folder)
    return folder


def test_a_truncated_weight_file_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model\.safetensors is truncated"):
        checkpoint.weight_files(folder)


def test_a_missing_weight_file_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors is missing"):
        checkpoint.weight_files(folder)


def test_pickles_are_refused_even_when_nothing_else_is_there(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickles are never read"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_that_comes_with_a_model_is_refused(tiny_llava: Path, tmp_path: Path, name: str) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(SourceError, match="auto_map"):
        checkpoint.load_model(folder)


def test_an_index_may_not_name_files_outside_its_folder(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(SourceError, match="outside"):
        checkpoint.weight_files(folder)


def test_tensors_that_config_json_promises_must_be_there(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _damaged(tiny_llava, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="tensors are missing"):
        checkpoint.load_model(folder)


def test_features_are_computed_once_and_then_read_from_disk(
    tiny_llava: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ExitFeatures(tiny_llava, cache=tmp_path).get(images)
    assert len(first) == 3 and first[0].shape == (4, 16, 64)
    # A second one must not need the encoder at all.
    monkeypatch.setattr(SiglipLlava, "load", lambda *args, **kwargs: pytest.fail("the encoder ran again"))
    second = ExitFeatures(tiny_llava, cache=tmp_path).get([images[2], images[0], images[2]])
    assert (second[0] == first[2]).all() and (second[1, 3] == first[0, 3]).all() and len(second) == 3


def test_features_equal_transformers_hidden_states(tiny_llava: Path, images: list[Path], tmp_path: Path) -> None:
    family = SiglipLlava()
    model = family.load(tiny_llava)
    features = ExitFeatures(tiny_llava, model, cache=tmp_path).get(images)
    for index, path in enumerate(images):
        states = family.hidden_states(model, family.image_inputs(tiny_llava, Image.open(path)))
        torch.testing.assert_close(torch.tensor(features[index]), states, rtol=0, atol=1e-5)


def test_a_damaged_feature_file_is_computed_again(tiny_llava: Path, images: list[Path], tmp_path: Path) -> None:
    whole = ExitFeatures(tiny_llava, cache=tmp_path).get(images[:1])[0].copy()
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-10])
    assert (ExitFeatures(tiny_llava, cache=tmp_path).get(images[:1])[0] == whole).all()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_encoder_digest_is_of_the_encoder_alone(tiny_llava: Path, tmp_path: Path) -> None:
    family = SiglipLlava()
    model = family.load(tiny_llava)
    model.lm_head.weight.mul_(2)
    checkpoint.save_model(model, tmp_path / "language", companions_from=tiny_llava)
    assert encoder_digest(tmp_path / "language") == encoder_digest(tiny_llava)
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    checkpoint.save_model(model, tmp_path / "tower", companions_from=tiny_llava)
    assert encoder_digest(tmp_path / "tower") != encoder_digest(tiny_llava)


def test_an_image_that_is_none_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    with pytest.raises(SourceError, match="image cannot be read"):
        ExitFeatures(tiny_llava, cache=tmp_path).get([bad])
