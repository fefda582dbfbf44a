"""Models that cut images into tiles, in llama.cpp: LLaVA-NeXT and SmolVLM against transformers, at every exit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from artifacts.artifact import Artifact
from artifacts.manifest import Manifest
from stages.models import checkpoint
from stages.models.family import family_of
from stages.quantize.convert import convert_image_encoder, convert_language_model
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.mmproj import write_mmproj
from stages.runtimes.gguf_header import read_vision_header
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.llamacpp_cls import cls_order
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime
from stages.stage import Context, Planned
from stages.verify.asking import Subject
from stages.verify.fidelity import embeddings, fidelity_rows
from stages.verify.scores import Answers
from tests import tiny_families

EXITS = (1, 2, 3)
PROMPT, FORCED = "What is the colour of the circle?", "a red circle"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wide, tall, square and large, and one that fits into a single tile.

    The tall one has the size that it is fitted into: Pillow 12 resizes tall pictures column by column first, llama.cpp
    row by row, and what is rounded between shows on noise (cosine 0.996).
    """
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (height, width) in enumerate(((70, 150), (112, 56), (200, 200), (40, 44))):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


class Quiet:
    """A reporter that says nothing."""

    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


class Both:
    """One checkpoint in both runtimes; the GGUF in F32 with all exits."""

    def __init__(self, kind: str, tiny_llava: Path, folder: Path) -> None:
        self.folder = folder / "checkpoint"
        with pytest.MonkeyPatch.context() as patch:
            # SmolVLM's own vocabulary has it, and llama.cpp looks it up.
            tokens = [*tiny_families._IDEFICS_TOKENS, "\n\n"]
            patch.setattr(tiny_families, "_IDEFICS_TOKENS", tokens)
            tiny_families.build(kind, self.folder, tiny_llava)
        # llama.cpp's converter reads SentencePiece's own file, and what was added to it from here.
        added = json.loads((self.folder / "tokenizer.json").read_text())["added_tokens"]
        later = {token["content"]: token["id"] for token in added if token["id"] >= 512}
        (self.folder / "added_tokens.json").write_text(json.dumps(later))
        files = folder / "gguf"
        files.mkdir()
        convert_language_model(
            self.folder, files / "model.gguf", folder / "scratch", dtype="F32", name="t", metadata={}
        )
        config = checkpoint.read_config(self.folder)
        self.spec = family_of(config).spec(config)
        vision = self.spec.vision
        assert vision is not None
        if kind == "smolvlm":
            convert_image_encoder(self.folder, files / "mmproj.gguf", folder / "scratch", type="F32", name="t")
        else:
            write_mmproj(self.folder, files / "mmproj.gguf", vision, 3, name="t", type="F32", cls=cls_order())
        self.header = read_vision_header(files / "mmproj.gguf")
        self.llamacpp = LlamaCppRuntime(files)
        self.transformers = TransformersRuntime(self.folder)

    def close(self) -> None:
        self.llamacpp.close()
        self.transformers.close()


@pytest.fixture(scope="module")
def following(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    both = Both("llava-next", tiny_llava, tmp_path_factory.mktemp("next"))
    yield both
    both.close()


@pytest.fixture(scope="module")
def smol(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    both = Both("smolvlm", tiny_llava, tmp_path_factory.mktemp("smol"))
    yield both
    both.close()


def cosines(here: NDArray[np.float32], there: NDArray[np.float32]) -> NDArray[np.float32]:
    found = (here * there).sum(1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    return cast("NDArray[np.float32]", found)


def kl(there: NDArray[np.float32], here: NDArray[np.float32]) -> float:
    """Largest KL(there || here) of a row, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (there, here))
    return float((p.exp() * (p - q)).sum(-1).max())


def rows_of(slots: Sequence[int]) -> list[int]:
    return [row for row, slot in enumerate(slots) if slot >= 0]


@pytest.mark.parametrize("exit", EXITS)
def test_smolvlm_s_tiles_and_overview_are_those_of_transformers(smol: Both, pictures: list[Path], exit: int) -> None:
    assert smol.llamacpp.exits == smol.transformers.exits == EXITS and smol.llamacpp.default_exit == 3
    for picture in pictures:
        assert smol.llamacpp.image_slots(picture) is None
        ours, theirs = (runtime.image_embeddings(exit, picture) for runtime in (smol.llamacpp, smol.transformers))
        assert ours.shape == theirs.shape and len(ours) > 4
        assert cosines(ours, theirs).min() > 0.9999


@pytest.mark.parametrize("exit", EXITS)
def test_smolvlm_s_next_tokens_are_those_of_transformers(smol: Both, pictures: list[Path], exit: int) -> None:
    for picture in pictures[:2]:
        request = Request(PROMPT, image=picture, exit=exit)
        ours, theirs = (runtime.logits(request, FORCED) for runtime in (smol.llamacpp, smol.transformers))
        assert kl(theirs, ours) < 1e-3


def test_answers_about_tiles_are_the_same_alone_and_in_company(smol: Both, pictures: list[Path]) -> None:
    requests = [Request(PROMPT, image=picture, exit=exit, max_new_tokens=5) for picture in pictures for exit in (1, 3)]
    together = smol.llamacpp.generate(requests)
    assert [smol.llamacpp.generate([request])[0] for request in requests] == together
    assert [one.tokens for one in together] == [one.tokens for one in smol.transformers.generate(requests)]


@pytest.mark.parametrize("exit", EXITS)
def test_llava_next_s_patches_are_those_of_transformers_in_llama_cpp_s_order(
    following: Both, pictures: list[Path], exit: int
) -> None:
    assert following.llamacpp.exits == EXITS and following.llamacpp.default_exit == 3
    for picture in pictures:
        slots = following.llamacpp.image_slots(picture)
        assert slots is not None
        ours = following.llamacpp.image_embeddings(exit, picture)
        theirs = following.transformers.image_embeddings(exit, picture)
        assert len(slots) == len(ours)
        kept = rows_of(slots)
        assert len({slots[row] for row in kept}) == len(kept)
        assert cosines(ours[kept], theirs[[slots[row] for row in kept]]).min() > 0.999


def test_what_llava_next_loses_in_llama_cpp_is_counted(following: Both, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    subject = Subject("gguf", Artifact(tmp_path, Manifest.of_folder(tmp_path, "gguf", {})), "quantized", gated=True)
    square = pictures[2:3]
    deployed, reference = (
        embeddings(runtime, (2,), square) for runtime in (following.llamacpp, following.transformers)
    )
    rows = fidelity_rows(Answers(subject, {2: []}, [], {}, 2), deployed, reference, "source")
    (worst,) = (row for row in rows if row.measure == "fidelity_cosine")
    (lost,) = (row for row in rows if row.measure == "fidelity_lost_tokens")
    assert worst.value is not None and worst.value > 0.999 and "in another order" in worst.note
    # 5 passes of 16 patches; a newline ends each of 8 rows; the first patch of each pass where CLS comes last
    assert lost.value == 8 + (5 if cls_order() == "last" else 0)
    assert lost.note == "of 88 that transformers gives"


@pytest.mark.parametrize("exit", EXITS)
def test_llava_next_s_next_tokens_follow_from_what_arrives(following: Both, pictures: list[Path], exit: int) -> None:
    """transformers' language model, given transformers' tokens in llama.cpp's order; CLS's are llama.cpp's own."""
    slots = following.llamacpp.image_slots(pictures[0])
    assert slots is not None
    kept = rows_of(slots)
    arrived = following.llamacpp.image_embeddings(exit, pictures[0]).copy()
    arrived[kept] = following.transformers.image_embeddings(exit, pictures[0])[[slots[row] for row in kept]]
    request = Request(PROMPT, image=pictures[0], exit=exit)
    reference = TransformersRuntime(following.folder)
    reference._image_tokens = lambda *_: (torch.from_numpy(arrived), ())  # type: ignore[method-assign]
    assert kl(reference.logits(request, FORCED), following.llamacpp.logits(request, FORCED)) < 1e-3


def test_the_files_say_what_is_tiled(following: Both, smol: Both) -> None:
    fields = following.header.header.fields
    assert fields["clip.vision.image_grid_pinpoints"] == [112, 56, 56, 112, 112, 112]  # width, height
    assert fields["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert following.header.header.tensors["v.image_newline"].shape == (64,)
    assert following.header.grids == ((1, 2), (2, 1), (2, 2)) and following.header.image_tokens == 80
    assert "clip.vision.feature_layer" not in smol.header.header.fields
    assert "v.post_ln.weight" in smol.header.header.tensors  # it belongs to every exit's projection
    assert smol.header.pass_tokens == 4
    assert smol.spec.vision is not None and smol.header.image_tokens == 20


@pytest.mark.parametrize("kind", ["smolvlm", "llava-next"])
def test_a_model_cut_at_an_exit_becomes_a_gguf_with_the_exits_that_are_left(
    request: pytest.FixtureRequest, kind: str, pictures: list[Path], tmp_path: Path
) -> None:
    both: Both = request.getfixturevalue("smol" if kind == "smolvlm" else "following")
    source, output = tmp_path / "cut", tmp_path / "output"
    family = family_of(checkpoint.read_config(both.folder))
    checkpoint.save_model(family.truncate(family.load(both.folder), 2), source, companions_from=both.folder)
    Manifest.of_folder(source, "checkpoint", {}).write(source)
    output.mkdir()
    planned = Planned("checkpoint", family.spec(checkpoint.read_config(source)))
    stage = GGUFStage(GGUFParams(type="Q8_0"))
    assert stage.plan({"cut": planned}).spec is not None
    context = Context("gguf", {"cut": Artifact.open(source)}, output, tmp_path / "scratch", 0, Quiet())
    metadata = stage.run(context)
    assert (metadata["exits"], metadata["default_exit"]) == ([1, 2], 2)
    with LlamaCppRuntime(output) as runtime:
        assert (runtime.exits, runtime.default_exit) == ((1, 2), 2)
        for exit in runtime.exits:
            ours = runtime.image_embeddings(exit, pictures[0])
            theirs = both.llamacpp.image_embeddings(exit, pictures[0])  # of the whole tower, in F32
            assert cosines(ours, theirs).min() > 0.9999
