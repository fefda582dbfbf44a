"""`type: auto`: what is measured is the whole model's KL, the choice is the best that fits, and the file holds it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_setting import Told, context_of
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, StageError
from artifacts.manifest import Manifest
from pipeline.graph import Graph, build_graph
from pipeline.keys import content_key
from pipeline.recipe import load_recipe
from stages.data.calibration import Batch, Calibration
from stages.data.refusals import REFUSALS
from stages.models.checkpoint import read_config
from stages.models.family import family_of
from stages.models.spec import ModelSpec, TextSpec
from stages.models.tiny import tiny_llava_spec
from stages.quantize.choice import Weighing, solve
from stages.quantize.convert import convert_language_model
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.options import Option, candidates, groups_of, least_bytes
from stages.quantize.sensitivity import Divergence, Probe, rounded
from stages.quantize.types import EMBEDDING
from stages.quantize.workbench import AutoParams, ProbeMix
from stages.runtimes.gguf_header import read_header
from stages.runtimes.hollow import Tensor
from stages.runtimes.memory import STEP
from stages.runtimes.mixture import outline_of, outline_of_text
from stages.runtimes.prediction import (
    largest_copy,
    least_memory,
    most_memory,
    predict_memory,
    predict_outline,
    room_in,
    second_copy,
)
from stages.runtimes.rounding import round_weights
from stages.stage import Context, Planned

AUTO = AutoParams(calibration=ProbeMix(samples=4, length=12, pictures=2), refusals=2)


@pytest.fixture(scope="module")
def uneven(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 and of 256 numbers: the types that they allow are not the same."""
    folder = tmp_path_factory.mktemp("uneven")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=3,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in (*tiny_llava.glob("token*"), tiny_llava / "chat_template.jinja"):
        shutil.copy(path, folder)
    return folder


def batch_of(model: LlamaForCausalLM, lengths: list[int]) -> Batch:
    longest = max(lengths)
    ids = torch.arange(3, 3 + len(lengths) * longest).reshape(len(lengths), longest)
    rows = model.get_input_embeddings()(ids).detach()
    rows[0, 2] = 0.25  # as an image's embedding: no row of the matrix
    kept = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return Batch(rows, torch.tensor(lengths), kept)


def direct(before: LlamaForCausalLM, after: LlamaForCausalLM, one: Batch, other: Batch) -> float:
    """KL of two whole models on a batch, each with its own embeddings."""
    with torch.no_grad():
        p = before.lm_head(one.through(before.model))[one.counted].log_softmax(-1)
        q = after.lm_head(other.through(after.model))[other.counted].log_softmax(-1)
        return float((p.exp() * (p - q)).sum() / len(p))


@pytest.mark.parametrize("changed", ["layers.0.mlp.up_proj", "layers.2.self_attn.v_proj", "embed_tokens"])
def test_what_is_measured_from_the_changed_block_on_is_the_kl_of_the_whole_model(uneven: Path, changed: str) -> None:
    model, other = LlamaForCausalLM.from_pretrained(uneven), LlamaForCausalLM.from_pretrained(uneven)
    text, refusal = batch_of(model, [7, 9]), batch_of(model, [5])
    probe = Probe(model.model, model.lm_head, model.get_input_embeddings(), [text], [[refusal]])
    weight = model.model.get_submodule(changed).weight
    noisy = weight.detach() + 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    block = int(changed.split(".")[1]) if "layers" in changed else None
    with rounded([weight], [noisy]):
        found = probe.divergence(block)
    with torch.no_grad():
        other.model.get_submodule(changed).weight.copy_(noisy)
    for value, before, lengths in ((found.text, text, [7, 9]), (found.refusal, refusal, [5])):
        after = before if block is not None else batch_of(other, lengths)
        assert value == pytest.approx(direct(model, other, before, after), rel=1e-3)
        assert value > 1e-4
    assert probe.divergence(0).text < 1e-6  # the weights are back


def test_of_a_refusal_behind_a_prompt_the_predictions_of_its_own_tokens_count(tiny_llava: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava)
    family = family_of(read_config(tiny_llava))
    material = Calibration(family, tiny_llava, model, tokenizer, "train", length=64, pictures=2, seed=0)
    for number in range(2):
        passage = material.refusal(number)
        spoken = tokenizer(REFUSALS[number], add_special_tokens=False).input_ids
        expected = model.get_input_embeddings()(torch.tensor(spoken))
        assert len(passage.embeddings) - passage.first == len(spoken) + 1  # and what comes behind
        torch.testing.assert_close(passage.embeddings[passage.first + 1 :], expected)


@pytest.mark.parametrize("changed", ["layers.1.mlp.up_proj", "embed_tokens"])
def test_how_log_odds_of_refusals_move_is_foretold_by_gradient_times_change(uneven: Path, changed: str) -> None:
    model = LlamaForCausalLM.from_pretrained(uneven)
    alone, beside = batch_of(model, [5, 8]), batch_of(model, [6])
    for batch in (alone, beside):
        batch.counted[:, :2] = False
    probe = Probe(model.model, model.lm_head, model.get_input_embeddings(), [], [[alone], [beside]])
    weight = model.model.get_submodule(changed).weight
    before = probe.log_odds()
    with torch.no_grad():  # by the definition: row 2 expects the token at 3
        logits = model.lm_head(alone.through(model.model))[:, 2]
    spoken = torch.arange(3, 3 + 16).reshape(2, 8)[:, 3]
    expected = [
        float(row[token] - row[torch.arange(len(row)) != token].logsumexp(0))
        for row, token in zip(logits, spoken, strict=True)
    ]
    assert before[0] == pytest.approx(np.mean(expected), abs=1e-4)
    change = 1e-4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    change[3] = 0  # the padding's row is zero: of that a norm makes a jump
    gradients = probe.gradients([weight])
    with rounded([weight], [weight.detach() + change]):
        after = probe.log_odds()
    assert len(before) == len(gradients) == 4  # two kinds, first tokens and those behind
    for kind in range(4):
        foretold = float((gradients[kind][0] * change).sum())
        assert after[kind] - before[kind] == pytest.approx(foretold, rel=0.05, abs=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_moves_of_refusals_are_made_to_cancel_where_that_is_cheap() -> None:
    def group(*moves: float) -> list[Option]:
        return [Option("Q4_0", 32, Divergence(0.1 + 0.01 * place, 0), (move,)) for place, move in enumerate(moves)]

    options = [group(3.0, 1.0), group(2.0, -1.0), group(0.5, 0.0)]
    weighing = Weighing(moved=(1.0,), already=(0.0,))
    picked = [few[place] for few, place in zip(options, solve(options, 320, weighing), strict=True)]
    assert sum(option.moves[0] for option in picked) == 0.0
    # What all of them together do beside is reckoned with.
    weighing = Weighing(moved=(1.0,), already=(-3.5,))
    picked = [few[place] for few, place in zip(options, solve(options, 320, weighing), strict=True)]
    assert sum(option.moves[0] for option in picked) == 3.5


costs = st.floats(0, 1, allow_nan=False)
few = st.lists(st.tuples(st.integers(1, 40), costs, costs), min_size=1, max_size=4)


@given(st.lists(few, min_size=1, max_size=5), st.integers(20, 200))
@settings(max_examples=25, deadline=None)
def test_the_choice_is_as_good_as_the_best_of_all_that_fit(
    groups: list[list[tuple[int, float, float]]], room: int
) -> None:
    options = [[Option("Q4_0", 32 * size, Divergence(*cost)) for size, *cost in group] for group in groups]
    fitting = [
        sum(option.cost.text + 2 * option.cost.refusal for option in picked)
        for picked in itertools.product(*options)
        if sum(option.nbytes for option in picked) <= 32 * room
    ]
    if not fitting:
        with pytest.raises(StageError, match="no choice of types fits"):
            solve(options, 32 * room, Weighing(2.0))
        return
    picked = [group[place] for group, place in zip(options, solve(options, 32 * room, Weighing(2.0)), strict=True)]
    assert sum(option.nbytes for option in picked) <= 32 * room
    cost = sum(option.cost.text + 2 * option.cost.refusal for option in picked)
    assert cost == pytest.approx(min(fitting), abs=1e-6)


def ship(context: Context, **params: object) -> Artifact:
    stage = GGUFStage(GGUFParams.model_validate({"type": "auto", "auto": AUTO, **params}))
    stage.plan({})
    Manifest.of_folder(context.output, "gguf", stage.run(context)).write(context.output)
    return Artifact.open(context.output)


def test_the_file_holds_the_types_that_were_chosen_to_the_bit_and_is_as_small_as_asked(
    uneven: Path, tmp_path: Path
) -> None:
    floats = tmp_path / "f16.gguf"
    convert_language_model(uneven, floats, tmp_path / "links", name="u", metadata={})
    target = floats.stat().st_size - sum(t.nbytes for t in read_header(floats).tensors.values()) // 2
    made = ship(context_of("gguf", tmp_path, uneven, Told()), target=target)
    path = made.file("model.gguf")
    assert target - 24 * 1024 < path.stat().st_size <= target
    header = read_header(path)
    choice = made.metadata["choice"]
    assert isinstance(choice, dict)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items() if len(tensor.shape) > 1}
    groups = groups_of(shapes, 1)
    assert choice["groups"].keys() == {group.name for group in groups} and len(groups) == 3 * 5 + 1
    stored, original = (
        {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
        for file in (path, floats)
    )
    for group in groups:
        for name in group.tensors:
            assert header.tensors[name].type in choice["groups"][group.name].split("/")
            np.testing.assert_array_equal(stored[name], round_weights(original[name], header.tensors[name].type))
    assert len({tensor.type for tensor in header.tensors.values()}) > 2
    assert choice["measured_kl_text"] > 0 and choice["measured_kl_refusal"] > 0
    assert choice["measured_kl_text"] <= choice["stock_kl_text"]
    assert choice["measured_kl_refusal"] <= choice["stock_kl_refusal"]


def test_what_was_measured_before_a_crash_is_not_measured_again(uneven: Path, tmp_path: Path) -> None:
    context = context_of("gguf", tmp_path, uneven, Told())
    one = ship(context, target=160_000)
    noted = json.loads((context.scratch / "sensitivity.json").read_text())
    assert len(noted) == 16
    # Values that no measurement gives: only what is read can lead to another choice.
    changed = {
        name: {**note, "kl": [1.0, 1.0], "errors": dict.fromkeys(note["errors"], 1.0)} for name, note in noted.items()
    }
    (context.scratch / "sensitivity.json").write_text(json.dumps(changed))
    other = ship(context, target=160_000)
    assert other.metadata["choice"] != one.metadata["choice"]


def test_without_a_target_the_device_s_memory_decides_pictures_counted(tiny_llava: Path, tmp_path: Path) -> None:
    context = context_of("gguf", tmp_path, tiny_llava, Told())
    with pytest.raises(StageError, match="how large the file may be"):
        ship(context)
    outline, vision = outline_of(tiny_llava), tiny_llava_spec().vision
    full = predict_outline(outline, dict.fromkeys(outline.shapes, "Q8_0"), 256, vision=vision).total
    memory = (full - 20_000 + STEP) * 100 // 99  # of about 80 kB of weights
    room = room_in(memory)
    device = {"memory": memory, "context": 256}
    made = ship(Context("gguf", context.inputs, context.output, context.scratch, 0, Told(), device=device))
    tensors = read_header(made.file("model.gguf")).tensors
    types = {name: tensors[name].type for name in outline.shapes}
    assert room - 8_000 < predict_outline(outline, types, 256, vision=vision).total <= room
    choice = made.metadata["choice"]
    assert isinstance(choice, dict) and choice["left_free"] == memory - room


def test_where_the_device_decides_a_table_that_llama_cpp_keeps_twice_counts_twice(uneven: Path, tmp_path: Path) -> None:
    outline = outline_of(uneven)
    table = outline.shapes[EMBEDDING]
    kept = {
        type: Tensor(table, type).nbytes + second_copy(Tensor(table, type)) for type in candidates(64, imatrix=False)
    }
    full = predict_outline(outline, dict.fromkeys(outline.shapes, "Q4_0"), 256).total
    device = {"memory": (full + STEP) * 100 // 99, "context": 256}
    context = replace(context_of("gguf", tmp_path, uneven, Told()), device=device)
    ship(context)
    noted = json.loads((context.scratch / "sensitivity.json").read_text())
    note = noted[EMBEDDING]
    # As if the table lost nothing, whatever its type: what counts is then what it takes.
    noted[EMBEDDING] = {
        **note,
        "kl": [0.0, 0.0],
        "moves": {type: [0.0] * len(few) for type, few in note["moves"].items()},
    }
    (context.scratch / "sensitivity.json").write_text(json.dumps(noted))
    made = ship(context)
    tensors = read_header(made.file("model.gguf")).tensors
    types = {name: tensors[name].type for name in outline.shapes}
    assert full - 8_000 < predict_outline(outline, types, 256).total <= room_in(device["memory"])
    assert all(kept[type] >= kept[types[EMBEDDING]] for type in kept if _bits(type) > _bits(types[EMBEDDING]))


def _bits(type: str) -> float:
    return Tensor((256, 1), type).nbytes / 32


@given(st.integers(64 << 20, 64 << 30))
def test_a_prediction_that_fills_the_room_still_holds_the_gate_on_that_budget(memory: int) -> None:
    measured = int(room_in(memory) / 0.993)  # 0.7% over the prediction, the most there was
    assert -(-measured // STEP) * STEP <= memory


def test_before_types_are_chosen_it_is_known_what_they_may_come_to() -> None:
    text = TextSpec(
        layers=2, hidden_size=576, intermediate_size=1536, heads=9, kv_heads=3, head_dim=64, vocab_size=49152,
        tied_embeddings=True,
    )  # fmt: skip
    spec = ModelSpec(family="llama", text=text)
    floats = predict_memory(replace(spec, quantization="F16"), 256)
    least = least_memory(spec, 256)
    assert most_memory(spec, 256) is None
    assert most_memory(spec, 256, 2 * floats.total) == replace(least, weights=floats.weights, by_type={})
    tight = most_memory(spec, 256, floats.total)
    assert tight is not None and tight.total == room_in(floats.total) and least.weights < tight.weights < floats.weights
    targeted = most_memory(replace(spec, file_bytes=30_000_000), 256, floats.total)
    assert targeted is not None and targeted.weights == 30_000_000 + largest_copy(text)
    assert targeted.total == least.total - least.weights + targeted.weights
    # A file within the target may be one whose table llama.cpp keeps twice.
    types = dict.fromkeys(outline_of_text(text).shapes, "Q4_0")
    small = predict_outline(outline_of_text(text), types, 256)
    assert sum(small.by_type.values()) < 30_000_000 and small.total <= targeted.total


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    planned = {"source": Planned("checkpoint", tiny_llava_spec())}
    with pytest.raises(RecipeError, match="no GGUF of this model has as few as 20000 bytes") as caught:
        GGUFStage(GGUFParams.model_validate({"type": "auto", "target": "20kB"})).plan(planned)
    least = re.match(r"set target to (\d+) or more", str(caught.value.way_out))
    assert least is not None
    shapes = outline_of_text(tiny_llava_spec().text).shapes
    matrices = least_bytes(shapes, groups_of(shapes, 1), imatrix=False)
    for target, fits in ((matrices + 5000, False), (int(least[1]), True)):  # norms and vocabulary take more than that
        stage = GGUFStage(GGUFParams.model_validate({"type": "auto", "target": target}))
        with nullcontext() if fits else pytest.raises(RecipeError, match="the rest for norms and vocabulary"):
            stage.plan(planned)
    for wrong in ({"type": "Q4_0", "target": 5}, {"type": "auto", "tensor_types": {"ffn": "Q4_0"}}):
        with pytest.raises(ValueError, match="type: auto"):
            GGUFParams.model_validate(wrong)


def test_a_recipe_that_gives_neither_device_nor_target_is_refused_with_its_line(tmp_path: Path) -> None:
    def built(more: str, device: str = "") -> Graph:
        stages = f"stages:\n  gguf: {{uses: gguf, with: {{type: auto{more}}}}}\n"
        (tmp_path / "r.yaml").write_text("recipe: 1\nname: r\nsource: {model: demo:tiny-llava}\n" + stages + device)
        return build_graph(load_recipe(tmp_path / "r.yaml"))

    with pytest.raises(RecipeError, match="stage 'gguf' needs a device") as caught:
        built("")
    assert caught.value.where == f"{tmp_path / 'r.yaml'}:5" and "`target`" in str(caught.value.why)
    assert built(", target: 200kB").shipped == built("", "device: laptop-4gb\n").shipped == ("gguf",)


def test_only_where_the_device_decides_is_it_part_of_the_key() -> None:
    keys = {
        (str(params), memory): content_key(
            GGUFStage(GGUFParams.model_validate(params)), {}, seed=0, device={"memory": memory, "context": 1}
        )
        for params in ({"type": "auto"}, {"type": "auto", "target": 9}, {"type": "Q4_0"})
        for memory in (1, 2)
    }
    same = {params: keys[params, 1] == keys[params, 2] for params, _ in keys}
    assert list(same.values()) == [False, True, True]
