"""A CLIP tower in llama.cpp: where the installed library puts CLS, and what that leaves of the image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from artifacts.artifact import Artifact
from artifacts.errors import StageError
from artifacts.manifest import Manifest
from stages.models.llava_clip import ClipLlava
from stages.models.tiny import build_tiny_llava, tiny_llava_spec
from stages.quantize.convert import convert_language_model
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.mmproj import write_mmproj
from stages.runtimes import llamacpp_cls
from stages.runtimes.gguf_header import CLS_KEY, ClsOrder, read_vision_header
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.llamacpp_cls import cls_order, image_slots, position_table
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime
from stages.stage import Context, Planned
from stages.verify.asking import Subject
from stages.verify.fidelity import embeddings, fidelity_rows
from stages.verify.scores import Answers

EXITS = (1, 2, 3)
OTHER: dict[ClsOrder, ClsOrder] = {"first": "last", "last": "first"}
PROMPT = "What is the colour of this shape?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-clip")
    build_tiny_llava(folder, tower="clip")
    return folder


class Quiet:
    """A reporter that says nothing."""

    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


def write(clip: Path, target: Path, cls: ClsOrder) -> None:
    vision = tiny_llava_spec(tower="clip").vision
    assert vision is not None
    write_mmproj(clip, target, vision, 3, name="t", type="F32", cls=cls)


@pytest.fixture(scope="module")
def files(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf in F32 and the whole tower, in the order of the installed runtime."""
    folder = tmp_path_factory.mktemp("gguf")
    convert_language_model(clip, folder / "model.gguf", folder / "scratch", dtype="F32", name="t", metadata={})
    write(clip, folder / "mmproj.gguf", cls_order())
    return folder


@pytest.fixture(scope="module")
def runtime(files: Path) -> Iterator[LlamaCppRuntime]:
    with LlamaCppRuntime(files) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(clip: Path) -> Iterator[TransformersRuntime]:
    with TransformersRuntime(clip) as opened:
        yield opened


def cosines(here: NDArray[np.float32], there: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row."""
    found = (here * there).sum(1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    return cast("NDArray[np.float32]", found)


def test_the_probe_asks_a_library_once_and_a_damaged_answer_again(pipeline_home: Path) -> None:
    order = cls_order()
    assert order in ("first", "last")
    (kept,) = (pipeline_home / "probes").glob("cls-*.json")
    assert json.loads(kept.read_text()) == {"cls": order, "llama_cpp": version("llama-cpp-python")}
    kept.write_text('{"cls":')
    cls_order.cache_clear()
    assert cls_order() == order and json.loads(kept.read_text())["cls"] == order
    kept.write_text(json.dumps({"cls": OTHER[order]}))  # believed: the file is asked, not the library
    cls_order.cache_clear()
    assert cls_order() == OTHER[order]
    kept.unlink()
    cls_order.cache_clear()
    assert cls_order() == order


def test_the_position_table_is_turned_so_that_every_token_finds_its_own_row() -> None:
    table = np.arange(5, dtype=np.float32)[:, None]  # CLS, then four patches
    assert position_table(table, "first")[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert position_table(table, "last")[:, 0].tolist() == [1, 2, 3, 4, 0]
    assert image_slots("last", 4) == (1, 2, 3, -1)
    assert image_slots("first", 4) == image_slots(None, 4) == (0, 1, 2, 3)


def test_every_exit_gives_the_embeddings_of_transformers_on_the_tokens_that_are_kept(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, images: list[Path]
) -> None:
    assert runtime.exits == reference.exits == EXITS
    slots = runtime.image_slots(images[0])
    assert slots is not None
    kept = [row for row, slot in enumerate(slots) if slot >= 0]
    assert len(slots) - len(kept) == (1 if cls_order() == "last" else 0)
    for exit in EXITS:
        for image in images:
            ours, theirs = runtime.image_embeddings(exit, image), reference.image_embeddings(exit, image)
            assert ours.shape == theirs.shape == (16, 64)
            assert cosines(ours[kept], theirs[[slots[row] for row in kept]]).min() > 0.999


def test_the_table_in_the_other_order_would_be_seen(clip: Path, files: Path, images: list[Path]) -> None:
    """Otherwise the parity above would prove nothing about positions. The runtime itself refuses such a file."""
    from stages.runtimes.llamacpp_library import TextModel
    from stages.runtimes.llamacpp_vision import VisionEncoder

    wrong = files / "wrong.gguf"
    write(clip, wrong, OTHER[cls_order()])
    model = TextModel(files / "model.gguf")
    encoders = [VisionEncoder(model, read_vision_header(path)) for path in (files / "mmproj.gguf", wrong)]
    right, other = (encoder.embeddings(3, images[0]) for encoder in encoders)
    assert cosines(right, other).min() < 0.95
    for encoder in encoders:
        encoder.close()
    model.close()


@pytest.mark.parametrize("exit", EXITS)
def test_next_tokens_follow_from_the_image_tokens_that_arrive(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, clip: Path, images: list[Path], exit: int
) -> None:
    """transformers' tower and language model, given the tokens in the runtime's order with CLS where it puts it."""
    family = ClipLlava()
    model = family.load(clip)
    model.config.vision_feature_select_strategy = "full"
    from PIL import Image

    with torch.no_grad():
        states = family.hidden_states(model, family.image_inputs(clip, Image.open(images[0])))
        rows = [slot + 1 for slot in image_slots(cls_order(), 16)]  # the tower's row 0 is CLS, which slot -1 is
        tokens = family.project(model, states[exit][rows], ()).numpy()
    assert cosines(runtime.image_embeddings(exit, images[0]), tokens).min() > 0.999
    request, forced = Request(PROMPT, image=images[0], exit=exit), "a red circle"
    ours = runtime.logits(request, forced)
    arrived = TransformersRuntime(clip)
    arrived._image_tokens = lambda *_: (torch.from_numpy(tokens), ())  # type: ignore[method-assign]
    assert kl(arrived.logits(request, forced), ours).max() < 1e-3
    assert kl(reference.logits(request, forced), ours).max() > 1e-3 or cls_order() == "first"  # the loss is real


def kl(there: NDArray[np.float32], here: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(there || here) of every row, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (there, here))
    found: NDArray[np.float64] = (p.exp() * (p - q)).sum(-1).numpy()
    return found


def test_fidelity_compares_the_kept_tokens_and_counts_the_lost_one(
    runtime: LlamaCppRuntime, reference: TransformersRuntime, clip: Path, images: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("x")
    artifact = Artifact(tmp_path, Manifest.of_folder(tmp_path, "gguf", {}))
    one = Answers(Subject("gguf", artifact, "quantized", gated=True), {1: [], 3: []}, [], {}, 3)
    deployed, asked = embeddings(runtime, (1, 3), images), embeddings(reference, EXITS, images)
    rows = fidelity_rows(one, deployed, asked, "source")
    worst = [row for row in rows if row.measure == "fidelity_cosine"]
    assert [row.exit for row in worst] == [1, 3]
    assert all(row.value is not None and row.value > 0.999 for row in worst)
    lost = [(row.exit, row.value, row.note) for row in rows if row.measure == "fidelity_lost_tokens"]
    if cls_order() == "last":
        assert lost == [(1, 1.0, "of 16 that transformers gives"), (3, 1.0, "of 16 that transformers gives")]
        assert all("without 1 that the runtime loses" in row.note for row in worst)
    else:
        assert lost == []


def test_a_file_made_for_the_other_order_is_refused_with_the_reason(clip: Path, files: Path, tmp_path: Path) -> None:
    write(clip, tmp_path / "mmproj.gguf", OTHER[cls_order()])
    with pytest.raises(StageError) as refused:
        LlamaCppRuntime(files / "model.gguf", tmp_path / "mmproj.gguf")
    text = str(refused.value)
    assert f"puts CLS {OTHER[cls_order()]}" in text and f"this one puts CLS {cls_order()}" in text
    assert "25814" in text and "run the stage 'gguf' again" in text


def test_a_file_that_does_not_say_its_order_has_that_of_checkpoints(
    clip: Path,
    files: Path,
    reference: TransformersRuntime,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stages.quantize.mmproj.CLS_KEY", "other.key")
    write(clip, tmp_path / "mmproj.gguf", "first")
    assert CLS_KEY not in read_vision_header(tmp_path / "mmproj.gguf").header.fields
    if cls_order() == "first":
        LlamaCppRuntime(files / "model.gguf", tmp_path / "mmproj.gguf").close()
        return
    with pytest.raises(StageError, match="do not fit together"):
        LlamaCppRuntime(files / "model.gguf", tmp_path / "mmproj.gguf")
    # What others have published is measured for what it gives its users.
    with LlamaCppRuntime(files / "model.gguf", tmp_path / "mmproj.gguf", as_shipped=True) as runtime:
        kept = [slot for slot in runtime.image_slots(images[0]) or () if slot >= 0]
        ours, theirs = runtime.image_embeddings(3, images[0]), reference.image_embeddings(3, images[0])
    assert cosines(ours[: len(kept)], theirs[kept]).min() < 0.99


def test_an_arrangement_that_nobody_knows_stops_the_work(pipeline_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kept in (pipeline_home / "probes").glob("cls-*.json"):
        kept.unlink()
    cls_order.cache_clear()
    monkeypatch.setattr(llamacpp_cls, "_EXPECTED", {})
    with pytest.raises(StageError, match="a way that is not known here") as refused:
        cls_order()
    assert "the patches [" in str(refused.value)


def test_the_artifact_says_where_cls_is_and_what_that_costs(clip: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(clip, source)
    Manifest.of_folder(source, "checkpoint", {}).write(source)
    output.mkdir()
    context = Context("gguf", {"source": Artifact.open(source)}, output, tmp_path / "scratch", 0, Quiet())
    metadata = GGUFStage(GGUFParams(type="Q8_0")).run(context)
    vision = read_vision_header(output / "mmproj.gguf")
    assert metadata["cls_order"] == vision.cls_order == cls_order()
    assert metadata["lost_image_tokens"] == (1 if cls_order() == "last" else 0)
    assert (metadata["image_tokens"], metadata["default_exit"], metadata["family"]) == (16, 2, "llava-1.5")
    tensors, fields = vision.header.tensors, vision.header.fields
    assert {"v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias"} <= tensors.keys()
    assert not any(name.startswith("v.post_ln") or name == "v.patch_embd.bias" for name in tensors)
    assert fields["clip.use_gelu"] is False  # quick_gelu
    assert fields["clip.vision.feature_layer"] == [2] and fields["clip.vision.block_count"] == 2
    assert fields["icet.image.resize"] == "crop"


def test_the_plan_lets_a_cls_tower_pass_and_ends_it_at_the_exit() -> None:
    planned = GGUFStage(GGUFParams(type="Q4_0")).plan({"exit": Planned("checkpoint", tiny_llava_spec(tower="clip"))})
    assert planned.spec is not None and planned.spec.vision is not None and planned.spec.vision.layers == 2
