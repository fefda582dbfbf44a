"""The stage `imatrix`: what it counts is what flows, stock tools read what it writes, and quantizers use it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from stage_setting import Told, context_of
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import Manifest, sha256_file
from pipeline.graph import Graph, build_graph
from pipeline.recipe import load_recipe
from stages.data.calibration import Batch
from stages.data.calibration_mix import CalibrationMix
from stages.lppo.params import LPPOParams
from stages.lppo.stage import LPPOStage
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.importance import ImatrixParams, ImatrixStage
from stages.runtimes.activations import collect
from stages.runtimes.gguf_header import read_header
from stages.runtimes.imatrix import Collected, read_imatrix, write_imatrix
from stages.stage import Context, Planned

MIX = CalibrationMix(samples=8, length=16, questions=0.25, prompts=0.5, pictures=2)
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def made(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tiny_llava, tmp_path_factory.mktemp("imatrix"))


@pytest.fixture(scope="module")
def wide(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose rows every type divides."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (*tiny_llava.glob("token*"), tiny_llava / "chat_template.jinja"):
        shutil.copy(path, folder)
    return folder


def run(checkpoint: Path, folder: Path, mix: CalibrationMix = MIX) -> Artifact:
    context = context_of("imatrix", folder, checkpoint, Told())
    metadata = ImatrixStage(ImatrixParams(calibration=mix, device="cpu")).run(context)
    Manifest.of_folder(context.output, "imatrix", metadata).write(context.output)
    return Artifact.open(context.output)


def random_batch(model: LlamaForCausalLM, lengths: list[int]) -> Batch:
    """Sequences of token 3, 4, ..., padded with what must not be counted."""
    embed, longest = model.get_input_embeddings(), max(lengths)
    rows = torch.full((len(lengths), longest, embed.weight.shape[1]), 9.0)
    for row, length in enumerate(lengths):
        rows[row, :length] = embed(torch.arange(3, 3 + length)).detach()
    return Batch(rows, torch.tensor(lengths), torch.ones(len(lengths), longest, dtype=torch.bool))


def test_a_sum_is_that_of_squared_inputs_and_padding_is_not_counted(wide: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(wide)
    together = collect(model.model, [random_batch(model, [5, 9])])
    apart = collect(model.model, [random_batch(model, [5]), random_batch(model, [9])])
    inputs = [model.model.embed_tokens(torch.arange(3, 3 + length)).detach() for length in (5, 9)]
    normed = model.model.layers[0].input_layernorm(torch.cat(inputs)).detach()
    first = together["layers.0.self_attn.q_proj"]
    np.testing.assert_allclose(first.sums[0], normed.square().sum(0), rtol=1e-5)
    assert first.counts.tolist() == [14.0]
    assert together.keys() == apart.keys() and len(together) == 2 * len(MATRICES)
    for name, entry in together.items():
        np.testing.assert_allclose(entry.sums, apart[name].sums, rtol=1e-4)


def test_every_matrix_of_the_blocks_has_an_entry_made_of_text_images_and_prompts(
    tiny_llava: Path, made: Artifact
) -> None:
    header = read_header(made.file("imatrix.gguf"))
    assert header.fields["general.type"] == "imatrix"
    assert header.fields["imatrix.datasets"] == ["text: 2 sequences", "question: 2 sequences", "prompt: 4 sequences"]
    assert header.fields["imatrix.chunk_count"] == 8 and header.fields["imatrix.chunk_size"] == 16
    found = read_imatrix(made.file("imatrix.gguf"))
    assert sorted(found) == sorted(f"blk.{block}.{name}.weight" for block in range(2) for name in MATRICES)
    assert found["blk.0.ffn_down.weight"].shape == (128,) and found["blk.0.ffn_up.weight"].shape == (64,)
    assert all((values > 0).all() for values in found.values())
    tokens = made.metadata["calibration_tokens"]
    assert isinstance(tokens, int) and tokens > 8 * 16  # questions and prompts hold 16 image tokens each
    # As the reader of the package gguf finds it: for each matrix the sums of squares, and what they are sums over.
    reader = gguf.GGUFReader(made.file("imatrix.gguf"))
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert stored.keys() == {f"{name}.{part}" for name in found for part in ("in_sum2", "counts")}
    assert reader.fields["general.type"].contents() == "imatrix"
    for name, values in found.items():
        (count,) = stored[f"{name}.counts"].ravel()
        assert count == tokens
        np.testing.assert_allclose(stored[f"{name}.in_sum2"].ravel() / count, values, rtol=1e-6)


def test_the_same_checkpoint_and_seed_give_the_same_bytes(tiny_llava: Path, made: Artifact, tmp_path: Path) -> None:
    assert sha256_file(run(tiny_llava, tmp_path).file("imatrix.gguf")) == sha256_file(made.file("imatrix.gguf"))


def quantize(checkpoint: Path, folder: Path, matrix: Artifact | None, **params: object) -> Artifact:
    context = context_of("gguf", folder, checkpoint, Told())
    inputs = dict(context.inputs) | ({"matrix": matrix} if matrix is not None else {})
    context = Context("gguf", inputs, context.output, context.scratch, 0, Told())
    stage = GGUFStage(GGUFParams.model_validate(params))
    stage.plan({"source": Planned("checkpoint"), "matrix": Planned("imatrix")})
    Manifest.of_folder(context.output, "gguf", stage.run(context)).write(context.output)
    return Artifact.open(context.output)


def test_with_it_llama_cpp_writes_types_that_it_refuses_without_and_says_where_it_is_from(
    wide: Path, tmp_path: Path
) -> None:
    matrix = run(wide, tmp_path / "matrix", CalibrationMix(samples=4, length=16))
    small = quantize(wide, tmp_path / "small", matrix, type="IQ2_XXS", imatrix="matrix")
    header = read_header(small.file("model.gguf"))
    assert header.tensors["blk.1.ffn_gate.weight"].type == "IQ2_XXS"
    assert header.fields["quantize.imatrix.entries_count"] == 14
    assert header.fields["quantize.imatrix.chunks_count"] == 4
    assert header.fields["quantize.imatrix.file"] == "imatrix.gguf"
    # A file works as a stage does, and columns are weighed.
    file = str(matrix.file("imatrix.gguf"))
    weighed = quantize(wide, tmp_path / "weighed", None, type="Q4_K_S", imatrix=file)
    plain = quantize(wide, tmp_path / "plain", None, type="Q4_K_S")
    tensor = read_header(plain.file("model.gguf")).tensors["blk.0.attn_q.weight"]
    other = read_header(weighed.file("model.gguf")).tensors["blk.0.attn_q.weight"]
    assert tensor.type == other.type == "Q4_K"
    raw, changed = plain.file("model.gguf").read_bytes(), weighed.file("model.gguf").read_bytes()
    assert raw[tensor.offset :][: tensor.nbytes] != changed[other.offset :][: other.nbytes]


@pytest.mark.parametrize("type", ["IQ1_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS"])
def test_a_type_that_needs_one_is_refused_without_and_planned_with_one(type: str) -> None:
    with pytest.raises(RecipeError, match="importance matrix") as caught:
        GGUFStage(GGUFParams(type=type)).plan({})
    assert "uses: imatrix" in str(caught.value.way_out)
    GGUFStage(GGUFParams(type=type, imatrix="matrix")).plan({"matrix": Planned("imatrix")})


def test_l_ppo_trains_with_the_rounding_that_a_matrix_weighs(tiny_llava: Path, made: Artifact, tmp_path: Path) -> None:
    small = {"steps": 1, "images": 2, "max_new_tokens": 4, "samples": 2, "validation": 0, "quantizer": "Q4_0"}
    weights = []
    for place, more in enumerate(({}, {"imatrix": "matrix"}, {"imatrix": str(made.file("imatrix.gguf"))})):
        context = context_of("harden", tmp_path / str(place), tiny_llava, Told())
        context = replace(context, inputs={**context.inputs, "matrix": made})
        LPPOStage(LPPOParams.model_validate(small | more)).run(context)
        weights.append(sha256_file(context.output / "model.safetensors"))
    assert weights[0] != weights[1] == weights[2]


def test_gguf_and_l_ppo_name_the_same_one_and_refuse_what_is_none(tmp_path: Path) -> None:
    stages = (
        (GGUFStage(GGUFParams(imatrix="matrix")), GGUFStage(GGUFParams())),
        (LPPOStage(LPPOParams(quantizer="IQ2_XXS", imatrix="matrix")), LPPOStage(LPPOParams())),
    )
    assert stages[0][1].fingerprint() == ""
    for stage, without in stages:
        assert stage.references() == {"imatrix": "matrix"} and stage.fingerprint() == without.fingerprint()
        stage.plan({"matrix": Planned("imatrix")})
        with pytest.raises(RecipeError, match="makes an artifact of type 'gguf'"):
            stage.plan({"matrix": Planned("gguf")})
    absent = GGUFStage(GGUFParams(imatrix=str(tmp_path / "absent.gguf")))
    assert absent.references() == {}
    with pytest.raises(RecipeError, match="there is no file"):
        absent.fingerprint()


PRUNED = """\
recipe: 1
name: pruned
source: {{model: demo:tiny-llava}}
stages:
  small: {{uses: prune, with: {{layers: [0]}}}}
  matrix: {{uses: imatrix, needs: {made_of}}}
  last: {{uses: {uses}, needs: small, with: {{{params}, imatrix: {matrix}}}}}
"""


@pytest.mark.parametrize(("uses", "params"), [("gguf", "type: Q4_0"), ("l-ppo", "quantizer: Q4_0")])
def test_one_of_the_unpruned_model_and_a_file_of_another_are_refused_before_any_work(
    made: Artifact, tmp_path: Path, uses: str, params: str
) -> None:
    def built(made_of: str, matrix: str) -> Graph:
        text = PRUNED.format(made_of=made_of, uses=uses, params=params, matrix=matrix)
        (tmp_path / "r.yaml").write_text(text)
        return build_graph(load_recipe(tmp_path / "r.yaml"))

    def refused(made_of: str, matrix: str) -> str:
        with pytest.raises(RecipeError) as caught:
            built(made_of, matrix)
        assert str(caught.value.where).endswith("r.yaml:7")
        return str(caught.value)

    spec = built("small", "matrix").node("last").planned.spec
    assert spec is not None and spec.text.layers == 1
    assert "'matrix' is of 2 blocks, this model has 1" in refused("source", "matrix")
    (tmp_path / "unpruned.gguf").write_bytes(made.file("imatrix.gguf").read_bytes())
    assert "unpruned.gguf is of 2 blocks, this model has 1" in refused("small", "./unpruned.gguf")
    other = {"blk.0.ffn_down.weight": Collected(np.ones((1, 512), np.float32), np.ones(1, np.float32))}
    write_imatrix(tmp_path / "other.gguf", other, datasets=["noise"], chunks=1, chunk_size=1)
    wrong = "other.gguf has 512 columns for blk.0.ffn_down.weight, this model has 128"
    assert wrong in refused("small", "./other.gguf")
    (tmp_path / "old.dat").write_bytes(bytes(100))
    assert "old.dat is not a GGUF file" in refused("small", "./old.dat")


def test_one_of_another_model_is_refused_where_shapes_are_known_only_at_run(tiny_llava: Path, tmp_path: Path) -> None:
    entry = Collected(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    write_imatrix(tmp_path / "other.gguf", {"blk.2.attn_q.weight": entry}, datasets=["n"], chunks=1, chunk_size=1)
    context = context_of("gguf", tmp_path, tiny_llava, Told())
    with pytest.raises(SourceError, match="is of 3 blocks, this model has 2"):
        GGUFStage(GGUFParams(type="Q4_0", imatrix=str(tmp_path / "other.gguf"))).run(context)


@pytest.mark.skipif(not shutil.which("llama-quantize"), reason="llama-quantize (llama.cpp) is not on PATH")
def test_stock_llama_quantize_reads_it_and_makes_the_same_tensors(wide: Path, tmp_path: Path) -> None:
    from stages.quantize.convert import convert_language_model

    matrix = run(wide, tmp_path / "matrix", CalibrationMix(samples=4, length=16))
    ours = quantize(wide, tmp_path / "ours", matrix, type="IQ3_XXS", imatrix="matrix").file("model.gguf")
    floats, theirs = tmp_path / "f16.gguf", tmp_path / "theirs.gguf"
    convert_language_model(wide, floats, tmp_path / "links", name="wide", metadata={})
    done = subprocess.run(
        ["llama-quantize", "--imatrix", matrix.file("imatrix.gguf"), floats, theirs, "IQ3_XXS"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "14 importance matrix entries" in done.stdout + done.stderr
    one, other = read_header(ours), read_header(theirs)
    raw, stock = ours.read_bytes(), theirs.read_bytes()
    for name, tensor in one.tensors.items():
        same = other.tensors[name]
        assert tensor.type == same.type
        assert raw[tensor.offset :][: tensor.nbytes] == stock[same.offset :][: same.nbytes]
