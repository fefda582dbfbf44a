"""Every model family against stock transformers: features, cut towers, prompts around tiles, and answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.family import Family, family_of
from stages.models.features import ExitFeatures
from stages.models.truncation import cut_files
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime
from tests.tiny_families import stock_processor

VISION = ("llava-next", "idefics3", "smolvlm", "mllama")
TEXT = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
EXITS = (1, 2, 3)
PROMPT = "What is the colour of the circle?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wide, tall, and small: other grids of tiles and other paddings."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (height, width) in enumerate(((70, 150), (130, 61), (40, 44))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def _family(folder: Path) -> Family:
    return family_of(checkpoint.read_config(folder), where=str(folder))


def _stock(folder: Path, images: bool = True) -> Any:
    """Loaded without any help of ours; not a tensor may be missing or left over."""
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def _cut(folder: Path, exit: int, to: Path) -> Any:
    family = _family(folder)
    model = family.truncate(family.load(folder), exit)
    checkpoint.save_model(model, to, companions_from=folder)
    return _stock(to)


def _inputs(kind: str, folder: Path, picture: Path) -> Any:
    processor = stock_processor(kind, folder)
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    conversation = [{"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    image = Image.open(picture).convert("RGB")
    return processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("kind", VISION)
def test_image_tokens_of_every_exit_are_those_of_a_stock_model_that_ends_there(
    kind: str, tiny_family: Callable[[str], Path], pictures: list[Path], tmp_path: Path
) -> None:
    folder = tiny_family(kind)
    family, config = _family(folder), checkpoint.read_config(folder)
    model = family.load(folder)
    features = ExitFeatures(folder, model, cache=tmp_path / "cache").get(pictures)
    lengths = set()
    for exit in EXITS:
        stock = _cut(folder, exit, tmp_path / str(exit))
        for number, picture in enumerate(pictures):
            inputs = _inputs(kind, folder, picture)
            given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
            with torch.no_grad():
                expected = _image_tokens(stock, given)
                row = torch.from_numpy(np.array(features[number, exit]))
                found = family.project(model, row, features.geometry(number))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            lengths.add(len(found))
    spec = family.spec(config).vision
    assert spec is not None and spec.layers == len(EXITS)
    if kind != "mllama":  # always as many as there could be tiles for, and none of them in the context
        assert len(lengths) > 1 and max(lengths) <= spec.image_tokens


def _image_tokens(stock: Any, given: Any) -> torch.Tensor:
    """What stock transformers projects for the language model."""
    if hasattr(stock, "get_image_features"):
        tokens: torch.Tensor = stock.get_image_features(**given).pooler_output[0]
        return tokens
    given = {name: value for name, value in given.items() if name != "cross_attention_mask"}
    states = stock.model.vision_model(**given).last_hidden_state
    projected: torch.Tensor = stock.model.multi_modal_projector(states)
    return projected.flatten(0, -2)


def test_llava_next_takes_the_layers_that_transformers_takes(
    tiny_family: Callable[[str], Path], pictures: list[Path], tmp_path: Path
) -> None:
    folder = tiny_family("llava-next")
    family, stock = _family(folder), _stock(tiny_family("llava-next"))
    features = ExitFeatures(folder, cache=tmp_path).get(pictures)
    for number, picture in enumerate(pictures):
        inputs = _inputs("llava-next", folder, picture)
        given = {"pixel_values": inputs.pixel_values, "image_sizes": inputs.image_sizes}
        for layer, exit in ((1, 1), (2, 2), (3, 3), (-2, 2), (None, 2)):
            with torch.no_grad():
                expected = stock.get_image_features(**given, vision_feature_layer=layer).pooler_output[0]
                row = torch.from_numpy(np.array(features[number, exit]))
                found = family.project(stock, row, features.geometry(number))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", VISION)
def test_a_cut_model_in_stock_transformers_has_the_logits_of_the_runtime_at_that_exit(
    kind: str, tiny_family: Callable[[str], Path], pictures: list[Path], tmp_path: Path
) -> None:
    folder = tiny_family(kind)
    continuation = "Sorry, I cannot help"
    with TransformersRuntime(folder) as runtime:
        assert runtime.exits == EXITS
        seen = []
        for exit in EXITS:
            stock = _cut(folder, exit, tmp_path / str(exit))
            for picture in pictures:
                inputs = _inputs(kind, folder, picture)
                found = runtime.logits(Request(PROMPT, picture, exit), continuation)
                np.testing.assert_allclose(found, _teacher_forced(stock, inputs, folder, continuation), atol=3e-4)
                seen.append(found)
        assert all(np.abs(a - b).max() > 0.01 for i, a in enumerate(seen) for b in seen[:i])
    with TransformersRuntime(tmp_path / "1") as runtime:
        assert runtime.exits == (1,) and runtime.default_exit == 1
        np.testing.assert_allclose(runtime.logits(Request(PROMPT, pictures[0]), continuation), seen[0], atol=3e-4)


def _teacher_forced(stock: Any, inputs: Any, folder: Path, continuation: str) -> Any:
    from transformers import AutoTokenizer

    forced = AutoTokenizer.from_pretrained(folder)(continuation, add_special_tokens=False, return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    given = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], forced.input_ids], 1)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if "cross_attention_mask" in given:
        mask = given["cross_attention_mask"]
        last = mask[:, -1:].expand(-1, forced.input_ids.shape[1], -1, -1)
        given["cross_attention_mask"] = torch.cat([mask, last], 1)
    with torch.no_grad():
        return stock(**given).logits[0, prompt - 1 : -1].numpy()


@pytest.mark.parametrize("kind", VISION)
def test_answers_are_those_of_stock_transformers_alone_and_in_a_batch(
    kind: str, tiny_family: Callable[[str], Path], pictures: list[Path]
) -> None:
    folder = tiny_family(kind)
    stock = _stock(folder)
    requests = [*(Request(PROMPT, picture, max_new_tokens=6) for picture in pictures), Request("Who are you?")]
    with TransformersRuntime(folder) as runtime:
        together = runtime.generate(requests)
        assert [runtime.generate([request])[0] for request in reversed(requests)] == together[::-1]
    for request, response in zip(requests[:-1], together[:-1], strict=True):
        assert request.image is not None
        inputs = _inputs(kind, folder, request.image)
        out = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(response.tokens) == [token for token in out if token != 2]


@pytest.mark.parametrize("kind", VISION)
def test_cutting_files_gives_the_model_that_cutting_in_memory_gives(
    kind: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_family(kind)
    family = _family(folder)
    cut = family.disk_cut(checkpoint.read_config(folder), 2)
    assert cut is not None
    cut_files(folder, tmp_path / "files", cut)
    found, expected = _stock(tmp_path / "files"), _cut(folder, 2, tmp_path / "memory")
    assert found.config.vision_config.to_dict() == expected.config.vision_config.to_dict()
    tensors, wanted = found.state_dict(), expected.state_dict()
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", TEXT)
def test_a_text_only_model_answers_like_stock_transformers_and_has_no_exits(
    kind: str, tiny_family: Callable[[str], Path], pictures: list[Path]
) -> None:
    folder = tiny_family(kind)
    family, stock = _family(folder), _stock(tiny_family(kind), images=False)
    spec = family.spec(checkpoint.read_config(folder))
    assert spec.vision is None and spec.text.layers == 2 and spec.text.head_dim == 32
    with TransformersRuntime(folder) as runtime:
        assert runtime.exits == () and runtime.default_exit is None
        found = runtime.logits(Request(PROMPT), " It is red")
        ids = torch.tensor([[*runtime._prompting.text(PROMPT), *runtime._prompting.ids(" It is red")]])
        with pytest.raises(StageError, match="no image encoder"):
            runtime.generate([Request(PROMPT, pictures[0])])
    with torch.no_grad():
        expected = stock(input_ids=ids).logits[0, -len(found) - 1 : -1].numpy()
    np.testing.assert_allclose(found, expected, atol=3e-4)
    with pytest.raises(StageError, match="no image encoder"):
        family.truncate(stock, 1)
