"""The transformers runtime against stock transformers, and against itself in other batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from artifacts.errors import SourceError, StageError
from stages.data.chat import IMAGE_SLOT, render
from stages.models.decoding import Decoder
from stages.models.tiny import CHAT_TEMPLATE
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime


@pytest.fixture(scope="module")
def runtime(tiny_llava: Path) -> Iterator[TransformersRuntime]:
    with TransformersRuntime(tiny_llava) as opened:
        yield opened


@pytest.fixture(scope="module")
def stock(tiny_llava: Path) -> tuple[torch.nn.Module, object]:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    return model, AutoProcessor.from_pretrained(tiny_llava)


def _stock_inputs(processor, request: Request):  # type: ignore[no-untyped-def]
    turn = render(CHAT_TEMPLATE, request.prompt, image=request.image is not None)
    if request.image is None:
        return processor(text=turn.after, return_tensors="pt")
    text = turn.before + IMAGE_SLOT + turn.after
    return processor(text=text, images=Image.open(request.image).convert("RGB"), return_tensors="pt")


def _requests(images: list[Path]) -> list[Request]:
    prompts = ["What is the colour?", "Tell me about this picture, please", "no", "Are there any triangles in here?"]
    with_image = [
        Request(prompt, images[(i + exit) % 3], exit, max_new_tokens=12 if i % 2 else 9)
        for exit in (1, 2, 3)
        for i, prompt in enumerate(prompts)
    ]
    return [*with_image, *(Request(prompt, max_new_tokens=10) for prompt in prompts)]


def test_exits_are_those_of_the_checkpoint(runtime: TransformersRuntime) -> None:
    assert runtime.exits == (1, 2, 3) and runtime.default_exit == 2


def test_answers_are_those_of_stock_transformers(runtime, stock, images) -> None:  # type: ignore[no-untyped-def]
    model, processor = stock
    requests = _requests(images)
    for request, response in zip(requests, runtime.generate(requests), strict=True):
        inputs = _stock_inputs(processor, request)
        more = {} if request.image is None else {"vision_feature_layer": request.exit}
        out = model.generate(**inputs, max_new_tokens=request.max_new_tokens, do_sample=False, **more)
        tokens = out[0, inputs.input_ids.shape[1] :].tolist()
        stopped = tokens[-1] == 2
        assert list(response.tokens) == (tokens[:-1] if stopped else tokens)
        assert response.finish == ("stop" if stopped else "length")


def test_the_answer_does_not_depend_on_the_batch(tiny_llava: Path, images: list[Path]) -> None:
    requests = _requests(images)
    with TransformersRuntime(tiny_llava) as runtime:
        together = runtime.generate(requests)
        assert [runtime.generate([request])[0] for request in requests] == together
        order = list(range(len(requests)))
        random.Random(0).shuffle(order)
        reordered = runtime.generate([requests[i] for i in order])
        assert [together[i] for i in order] == reordered
    with TransformersRuntime(tiny_llava, batch=3) as runtime:
        assert runtime.generate(requests) == together


def test_logits_of_a_row_are_the_same_in_any_batch(runtime, images) -> None:  # type: ignore[no-untyped-def]
    decoder: Decoder = runtime._decoder
    prompts = [runtime._prompting.embedded(list(range(5, 5 + n))) for n in (3, 19, 8, 30, 17, 2, 40)]
    seen: dict[int, list[torch.Tensor]] = {}

    def pick(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        for row, prompt in enumerate(rows):
            seen.setdefault(prompt, []).append(logits[row].clone())
        return logits.argmax(-1)

    decoder.generate(prompts, [6] * len(prompts), pick=pick)
    together = seen
    for prompt, embeddings in enumerate(prompts):
        seen = {}
        decoder.generate([embeddings], [6], pick=pick)
        for alone, batched in zip(seen[0], together[prompt], strict=False):
            # To the bit on some processors; on others the matrix library takes another kernel for other shapes.
            torch.testing.assert_close(alone, batched, rtol=1e-5, atol=1e-5)


def test_image_embeddings_are_what_stock_transformers_projects(runtime, stock, images) -> None:  # type: ignore[no-untyped-def]
    model, processor = stock
    pixels = processor.image_processor(images=[Image.open(images[0])], return_tensors="pt").pixel_values
    for exit in runtime.exits:
        with torch.no_grad():
            reference = model.get_image_features(pixels, vision_feature_layer=exit).pooler_output[0].numpy()
        np.testing.assert_allclose(runtime.image_embeddings(exit, images[0]), reference, atol=1e-5)


def test_logits_are_those_of_stock_transformers(runtime, stock, images) -> None:  # type: ignore[no-untyped-def]
    model, processor = stock
    for request in (Request("What is this?", images[1], 1), Request("What is this?", images[1]), Request("Who?")):
        continuation = "Sorry, I cannot help with that"
        inputs = _stock_inputs(processor, request)
        forced = processor.tokenizer(continuation, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([inputs.input_ids, forced], dim=1)
        more = {} if request.image is None else {"pixel_values": inputs.pixel_values}
        if request.exit is not None:
            more["vision_feature_layer"] = request.exit
        with torch.no_grad():
            reference = model(input_ids=ids, **more).logits[0, inputs.input_ids.shape[1] - 1 : -1].numpy()
        found = runtime.logits(request, continuation)
        assert found.shape == (forced.shape[1], 512)
        np.testing.assert_allclose(found, reference, atol=2e-4)


def test_an_exit_that_is_not_there_is_refused(runtime: TransformersRuntime, images: list[Path]) -> None:
    with pytest.raises(StageError, match="no exit 4"):
        runtime.generate([Request("x", images[0], 4)])
    with pytest.raises(StageError, match="no exit 0"):
        runtime.image_embeddings(0, images[0])


def test_a_missing_image_is_refused(runtime: TransformersRuntime, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="image cannot be read"):
        runtime.generate([Request("x", tmp_path / "none.png")])


def test_no_request_is_no_work(runtime: TransformersRuntime) -> None:
    assert runtime.generate([]) == []


def test_a_prompt_that_the_model_has_no_positions_for_is_named(
    runtime: TransformersRuntime, images: list[Path]
) -> None:
    room = runtime._model.config.get_text_config().max_position_embeddings
    for image in (None, images[0]):
        requests = [Request("Hi", image, max_new_tokens=2), Request("Tell me all " * room, image, max_new_tokens=2)]
        with pytest.raises(StageError, match=f"there is room for {room}") as caught:
            runtime.generate(requests)
        assert "Tell me all" in str(caught.value.why)
