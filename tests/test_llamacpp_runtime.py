"""The runtime `llamacpp`: faithful to transformers, and the same alone as in company."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from artifacts.errors import SourceError, StageError
from stages.models import tiny
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model, quantize_model
from stages.quantize.mmproj import write_mmproj
from stages.runtimes.gguf_header import read_header
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.llamacpp_library import Sequences, vision_library
from stages.runtimes.runtime import Request, Response
from stages.runtimes.transformers import TransformersRuntime

PROMPTS = (
    "What is the colour of this shape?",
    "Write a poem.",
    "Is there a red circle in the image? Please answer yes or no, and explain how you know that it is there.",
    "Tell me about the weather in the capital city of the country that you know best.",
    "Hi",
    "How to make a square?",
    "Describe the photo.",
    "Are there any steps? List them: one, two, three, four, five.",
)


@pytest.fixture(scope="module")
def files(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf in F32 with all three exits, and a Q4_0 beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    vision = tiny_llava_spec().vision
    assert vision is not None
    convert_language_model(tiny_llava, folder / "model.gguf", folder / "scratch", dtype="F32", name="t", metadata={})
    write_mmproj(tiny_llava, folder / "mmproj.gguf", vision, 3, name="t", type="F32")
    quantized = folder / "q4"
    quantized.mkdir()
    quantize_model(folder / "model.gguf", quantized / "model.gguf", "Q4_0")
    shutil.copyfile(folder / "mmproj.gguf", quantized / "mmproj.gguf")
    return folder


@pytest.fixture(scope="module")
def runtime(files: Path) -> Iterator[LlamaCppRuntime]:
    with LlamaCppRuntime(files) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_llava: Path) -> Iterator[TransformersRuntime]:
    with TransformersRuntime(tiny_llava) as opened:
        yield opened


@pytest.fixture(scope="module")
def requests(images: list[Path]) -> list[Request]:
    """Two exits, two images and no image, of different lengths."""
    kinds = [(images[0], 1), (images[0], 3), (images[1], 3), (None, None)]
    return [
        Request(prompt, image=kinds[i % 4][0], exit=kinds[i % 4][1], max_new_tokens=6 + 3 * (i % 3))
        for i, prompt in enumerate(PROMPTS)
    ]


def test_every_exit_gives_the_embeddings_of_transformers(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, images: list[Path]
) -> None:
    assert runtime.exits == reference.exits == (1, 2, 3)
    for exit in runtime.exits:
        for image in images:  # none of them but the last has the encoder's size
            ours, theirs = runtime.image_embeddings(exit, image), reference.image_embeddings(exit, image)
            cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
            assert ours.shape == theirs.shape == (16, 64)
            assert cosine.min() > 0.9999


def test_logits_agree_with_transformers_with_and_without_an_image(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, requests: list[Request]
) -> None:
    for request in requests[:4]:
        ours = runtime.logits(request, "sorry I cannot help")
        theirs = reference.logits(request, "sorry I cannot help")
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 0.01 * np.abs(theirs).max()  # F16 keys and values


def test_greedy_answers_are_those_of_transformers(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, requests: list[Request]
) -> None:
    ours, theirs = runtime.generate(requests), reference.generate(requests)
    same = sum(a.tokens == b.tokens and a.finish == b.finish for a, b in zip(ours, theirs, strict=True))
    assert same >= len(requests) - 1  # a near tie may flip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with rows of 256 numbers, which K and IQ types take; a folder for each type."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "_WIDTH", 256)
        tiny.build_tiny_llava(folder / "source")
        vision = tiny.tiny_llava_spec().vision
    assert vision is not None
    convert_language_model(
        folder / "source", folder / "f32.gguf", folder / "scratch", dtype="F32", name="t", metadata={}
    )
    for kind in ("Q4_K_M", "IQ4_XS"):
        (folder / kind).mkdir()
        quantize_model(folder / "f32.gguf", folder / kind / "model.gguf", kind)
        write_mmproj(folder / "source", folder / kind / "mmproj.gguf", vision, 3, name="t", type="F32")
    return folder


@pytest.mark.parametrize(
    ("kind", "stored"), [("F32", "F32"), ("Q4_0", "Q4_0"), ("Q4_K_M", "Q4_K"), ("IQ4_XS", "IQ4_XS")]
)
def test_an_answer_does_not_depend_on_its_company(
    files: Path, wide: Path, requests: list[Request], kind: str, stored: str
) -> None:
    folder = {"F32": files, "Q4_0": files / "q4"}.get(kind, wide / kind)
    assert stored in {tensor.type for tensor in read_header(folder / "model.gguf").tensors.values()}
    with LlamaCppRuntime(folder) as together:
        batch = together.generate(requests)
        assert together.generate(requests[::-1])[::-1] == batch
        assert together.generate(requests * 3) == batch * 3  # more than fit at once
    with LlamaCppRuntime(folder, parallel=3) as few:
        assert few.generate(requests) == batch
    alone: list[Response] = []
    with LlamaCppRuntime(folder, parallel=1) as one:
        for request in requests:
            alone += one.generate([request])
    assert alone == batch


@pytest.mark.parametrize("parallel", [1, 3, None])
def test_an_image_is_encoded_and_read_once_for_each_exit_whatever_is_asked_about_it(
    files: Path, images: list[Path], parallel: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = vision_library()
    encode, look, read = encoder.mtmd_encode_chunk, Sequences.look, Sequences.read
    encoded: list[object] = []
    looked: list[object] = []
    prefixes: list[tuple[int, ...]] = []

    def encoding(*given: object) -> int:
        encoded.append(given)
        return int(encode(*given))

    def looking(context: Sequences, sequence: int, position: int, vectors: NDArray[np.float32]) -> None:
        looked.append(vectors.shape)
        look(context, sequence, position, vectors)

    def reading(
        context: Sequences, sequence: int, position: int, tokens: tuple[int, ...], outputs: int = 1
    ) -> NDArray[np.float32]:
        prefixes.append(tuple(tokens))
        return read(context, sequence, position, tokens, outputs)

    monkeypatch.setattr(encoder, "mtmd_encode_chunk", encoding)
    monkeypatch.setattr(Sequences, "look", looking)
    monkeypatch.setattr(Sequences, "read", reading)
    asked = [
        Request(prompt, image=image, exit=exit, max_new_tokens=3)
        for prompt in PROMPTS[:5]
        for image in images[:2]
        for exit in (1, 2, 3)
    ]
    with LlamaCppRuntime(files, parallel=parallel) as runtime:
        runtime.generate(asked)
        assert len(encoded) == 6  # two images at three exits
        assert looked == [(16, 64)] * 6 and len(prefixes) == 6 and len(set(prefixes)) == 1
        runtime.generate(asked)
        assert len(encoded) == 6


def test_a_stream_says_what_generate_says(runtime: LlamaCppRuntime, requests: list[Request]) -> None:
    for request, response in zip(requests[:3], runtime.generate(requests[:3]), strict=True):
        pieces = list(runtime.stream(request))
        assert "".join(pieces) == response.text
        assert len(pieces) > 1


def test_a_stream_may_be_left_before_its_end(runtime: LlamaCppRuntime, requests: list[Request]) -> None:
    before = runtime.generate(requests[:2])
    stream = runtime.stream(requests[0])
    next(stream)
    stream.close()
    assert runtime.generate(requests[:2]) == before


def test_progress_counts_requests(runtime: LlamaCppRuntime, requests: list[Request]) -> None:
    seen: list[tuple[int, int]] = []
    runtime.generate(requests, lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(requests)) for i in range(len(requests))]
    assert runtime.generate([]) == []


def test_what_cannot_be_served_is_refused_with_a_way_out(
    runtime: LlamaCppRuntime, files: Path, images: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="no exit 4"):
        runtime.generate([Request("Hi", image=images[0], exit=4)])
    with pytest.raises(StageError, match="cannot be read"):
        runtime.generate([Request("Hi", image=tmp_path / "absent.png")])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(StageError, match="not a readable image"):
        runtime.generate([Request("Hi", image=tmp_path / "text.png")])
    with pytest.raises(StageError, match="there is room for"):
        runtime.generate([Request("Hi " * 3000)])
    with LlamaCppRuntime(files / "model.gguf") as blind, pytest.raises(StageError, match="does not see images"):
        blind.generate([Request("Hi", image=images[0])])


def test_damaged_and_swapped_files_are_refused_without_ending_the_process(files: Path, tmp_path: Path) -> None:
    for name in ("model.gguf", "mmproj.gguf"):
        shutil.copyfile(files / name, tmp_path / name)
    whole = (files / "mmproj.gguf").read_bytes()
    (tmp_path / "mmproj.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="damaged"):
        LlamaCppRuntime(tmp_path)
    with pytest.raises(SourceError, match="no language model"):
        LlamaCppRuntime(files / "mmproj.gguf")
    with pytest.raises(SourceError, match="no image encoder"):
        LlamaCppRuntime(files / "model.gguf", files / "model.gguf")
    with pytest.raises(SourceError, match="cannot be read"):
        LlamaCppRuntime(tmp_path / "absent")


def test_nothing_is_printed(files: Path, images: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCppRuntime(files / "q4") as runtime:
        runtime.generate([Request("Hi", image=images[0], max_new_tokens=2)])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
