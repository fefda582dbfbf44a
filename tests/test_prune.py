"""Stage `prune`: the right blocks go, the rest is a checkpoint like any other, and healing brings something back."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prune_setting import DEPTH, Reporter, passages, prune
from pydantic import ValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from artifacts.errors import RecipeError, StageError
from stages.data.calibration import batches
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.spec import ModelSpec, TextSpec
from stages.models.tiny import build_tiny_llava, tiny_llava_spec
from stages.prune import depth, healing
from stages.prune.params import HealParams, PruneParams
from stages.prune.scores import Scores, least_angle, least_influential, score_blocks
from stages.prune.stage import PruneStage
from stages.stage import Planned


@contextmanager
def skipped(layers: torch.nn.ModuleList, dropped: Collection[int]) -> Iterator[None]:
    """Inside, these blocks hand their input on."""
    before = {block: layers[block].forward for block in dropped}
    for block in dropped:
        layers[block].forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for block, forward in before.items():
            layers[block].forward = forward


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with six blocks in its language model."""
    folder = tmp_path_factory.mktemp("deep")
    build_tiny_llava(folder, text_layers=DEPTH)
    return folder


# --- what is left ---


@pytest.mark.parametrize("dropped", [[0], [2, 4], [5, 3, 1]])
def test_the_pruned_model_in_stock_transformers_equals_the_full_one_with_those_blocks_skipped(
    deep: Path, images: list[Path], tmp_path: Path, dropped: list[int]
) -> None:
    folder, metadata = prune(deep, tmp_path, {"layers": dropped})
    inputs = AutoProcessor.from_pretrained(folder)(
        text="<|im_start|>user\n<image>\nwhat is this<|im_end|>\n", images=Image.open(images[0]), return_tensors="pt"
    )
    full = AutoModelForImageTextToText.from_pretrained(deep).eval()
    small, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    small.eval()
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad(), skipped(full.model.language_model.layers, dropped):
        torch.testing.assert_close(small(**inputs).logits, full(**inputs).logits, rtol=0, atol=1e-5)
    gone = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in small.parameters())
    assert metadata["removed_parameters"] == gone > 0
    assert metadata["dropped_layers"] == sorted(dropped)
    assert metadata["layers_before"] == DEPTH and metadata["layers"] == DEPTH - len(dropped)
    planned = PruneStage(PruneParams.model_validate({"layers": dropped})).plan(
        {"source": Planned("checkpoint", tiny_llava_spec(text_layers=DEPTH))}
    )
    assert planned.spec == family_of(checkpoint.read_config(folder)).spec(checkpoint.read_config(folder))


def test_the_blocks_are_numbered_anew_so_that_the_kv_cache_works(deep: Path, tmp_path: Path) -> None:
    folder, _ = prune(deep, tmp_path, {"layers": [1, 4]})
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    layers = model.model.language_model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    ids = torch.tensor([[1, 40, 41, 42]])
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def _text_model(config: PreTrainedConfig, folder: Path, **save: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder, **save)
    return model


_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SHAPE),
        MistralConfig(**_SHAPE, sliding_window=4),
        # Blocks 3 to 5 see four tokens only: which ones do must survive the new numbering.
        Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=3),
    ],
    ids=lambda config: str(config.model_type),
)
def test_text_models_keep_what_belongs_to_each_block(config: PreTrainedConfig, tmp_path: Path) -> None:
    full = _text_model(config, tmp_path / "full")
    depth.cut(tmp_path / "full", tmp_path / "small", [1, 3])
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        with skipped(full.model.layers, [1, 3]):
            expected = full(ids).logits
        torch.testing.assert_close(small.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    types = getattr(config, "layer_types", None)
    if types is not None:
        assert AutoConfig.from_pretrained(tmp_path / "small").layer_types == [types[n] for n in (0, 2, 4, 5)]


def test_cross_attention_blocks_stay_and_keep_their_places(tmp_path: Path) -> None:
    from transformers import MllamaForCausalLM
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(**_SHAPE, cross_attention_layers=[1, 4], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    full = MllamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in full.named_parameters():
            if "gate" in name and weight.ndim == 1:
                weight.fill_(0.7)  # they begin at 0, which lets nothing of the image through
    full.save_pretrained(tmp_path / "full")
    described = checkpoint.read_config(tmp_path / "full")
    assert depth.cross_attention_blocks(described) == {1, 4}
    with pytest.raises(RecipeError, match="4 cannot be dropped"):
        depth.check_cross_attention([3, 4], described)
    depth.cut(tmp_path / "full", tmp_path / "small", [0, 3])
    small, info = MllamaForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert small.config.cross_attention_layers == [0, 2]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    image = {"cross_attention_states": torch.randn(1, 5, 32), "cross_attention_mask": torch.zeros(1, 1, 12, 5)}
    rows = torch.ones(1, 1, 12, 1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = small.eval()(ids, **image, full_text_row_masked_out_mask=rows, use_cache=False).logits
        with skipped(full.model.layers, [0, 3]):
            expected = full(ids, **image, full_text_row_masked_out_mask=rows, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_sharded_checkpoint_is_cut_file_by_file_to_the_same_tensors(tmp_path: Path) -> None:
    config = LlamaConfig(**_SHAPE, dtype="bfloat16")
    model = _text_model(config, tmp_path / "whole").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(checkpoint.weight_files(tmp_path / "shards")) > 3
    one = depth.cut(tmp_path / "whole", tmp_path / "a", [0, 5])
    other = depth.cut(tmp_path / "shards", tmp_path / "b", [0, 5])
    assert one == other
    assert one.parameters == sum(p.numel() for layer in (0, 5) for p in model.model.layers[layer].parameters())
    index = json.loads((tmp_path / "b" / checkpoint.INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in checkpoint.weight_files(tmp_path / "b")}
    states = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab"]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, states[1][name])


def test_the_gguf_of_a_pruned_model_says_in_llama_cpp_what_the_checkpoint_says(
    deep: Path, images: list[Path], tmp_path: Path
) -> None:
    from stages.quantize.convert import convert_language_model
    from stages.quantize.mmproj import write_mmproj
    from stages.runtimes.llamacpp import LlamaCppRuntime
    from stages.runtimes.runtime import Request
    from stages.runtimes.transformers import TransformersRuntime

    folder, _ = prune(deep, tmp_path, {"layers": [2, 3]})
    files = tmp_path / "gguf"
    files.mkdir()
    vision = tiny_llava_spec().vision
    assert vision is not None
    convert_language_model(folder, files / "model.gguf", tmp_path / "links", dtype="F32", name="p", metadata={})
    write_mmproj(folder, files / "mmproj.gguf", vision, 2, name="p", type="F32")
    with LlamaCppRuntime(files) as deployed, TransformersRuntime(folder) as reference:
        for request in (Request("What is this?"), Request("What is this?", images[2], exit=2)):
            ours, theirs = (
                torch.from_numpy(np.array(runtime.logits(request, "sorry I cannot help"))).log_softmax(-1)
                for runtime in (deployed, reference)
            )
            assert float(healing.divergences(theirs, ours).mean()) < 1e-4


# --- which blocks ---


def test_block_influence_and_angle_equal_a_direct_computation(deep: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(deep).eval()
    trunk = model.model.language_model
    read = passages(model)
    scores = score_blocks(
        trunk.layers,
        lambda batch: batch.through(trunk),
        batches(read, 2),
        span=2,
    )
    trunk.norm = torch.nn.Identity()  # the last of transformers' hidden states is normed
    cosines: list[list[float]] = [[] for _ in range(DEPTH)]
    angles: list[list[float]] = [[] for _ in range(DEPTH - 1)]
    with torch.no_grad():
        for passage in read:
            states = trunk(inputs_embeds=passage.embeddings[None], output_hidden_states=True).hidden_states
            for block in range(DEPTH):
                cosines[block] += torch.cosine_similarity(states[block][0], states[block + 1][0], dim=-1).tolist()
            for first in range(DEPTH - 1):
                cosine = torch.cosine_similarity(states[first][0, -1], states[first + 2][0, -1], dim=0)
                angles[first].append(math.acos(float(cosine)) / math.pi)
    assert scores.tokens == 26
    assert scores.influence == pytest.approx({n: 1 - sum(c) / len(c) for n, c in enumerate(cosines)}, abs=1e-6)
    assert scores.distance == pytest.approx({n: sum(a) / len(a) for n, a in enumerate(angles)}, abs=1e-6)


def test_the_least_blocks_go_and_those_that_must_stay_do() -> None:
    scores = Scores({0: 0.9, 1: 0.2, 2: 0.1, 3: 0.3, 4: 0.2, 5: 0.8}, {0: 0.5, 1: 0.2, 2: 0.1, 3: 0.3, 4: 0.4}, 2, 10)
    assert least_influential(scores, 3) == (1, 2, 4)
    assert least_influential(scores, 2, fixed={2}) == (1, 4)
    assert least_angle(scores) == (2, 3)
    assert least_angle(scores, fixed={2}) == (3, 4)
    with pytest.raises(StageError, match="only 1 can be judged"):
        least_influential(scores, 2, fixed={0, 1, 2, 3, 4})


@pytest.mark.parametrize("method", ["block-influence", "angular"])
def test_a_block_that_does_nothing_is_found(deep: Path, tmp_path: Path, method: str) -> None:
    model = family_of(checkpoint.read_config(deep)).load(deep)
    with torch.no_grad():
        for block in (3, 4):
            layer = model.get_decoder().layers[block]
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    checkpoint.save_model(model, tmp_path / "idle", companions_from=deep)
    calibration = {"texts": 2, "length": 24, "questions": 2, "prompts": 2}
    reporter = Reporter()
    params = {"method": method, "drop": 2, "calibration": calibration, "validation": 3}
    _, metadata = prune(tmp_path / "idle", tmp_path, params, reporter)
    assert metadata["dropped_layers"] == [3, 4] and metadata["method"] == method
    json.dumps(metadata)
    assert [step for name, _, step in reporter.metrics if name == "block_influence"] == list(range(DEPTH))
    told = {name: value for name, value, _ in reporter.metrics}
    assert 0 < told["kl_to_unpruned"] < 1e-3  # they did next to nothing
    assert reporter.done == sorted(reporter.done)


# --- refusals ---


def _plan(params: Mapping[str, object], layers: int = 12) -> Planned:
    spec = ModelSpec("llama", TextSpec(layers, 64, 128, 2, 1, 32, 512, True))
    return PruneStage(PruneParams.model_validate(params)).plan({"source": Planned("checkpoint", spec)})


def test_the_plan_knows_the_smaller_model() -> None:
    spec = _plan({"drop": 2}).spec
    assert spec is not None and spec.text.layers == 10
    assert PruneStage(PruneParams(drop=2)).plan({"source": Planned("checkpoint", None)}).spec is None


def test_listed_blocks_alone_need_no_data_and_no_model_in_memory() -> None:
    assert PruneStage(PruneParams(layers=(1,))).downloads() == ()
    assert any("exllamav2" in source for source in PruneStage(PruneParams(drop=1)).downloads())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "how many blocks to drop"),
        ({"method": "angular"}, "how many blocks to drop"),
        ({"drop": 2, "layers": [1]}, "exclude each other"),
        ({"method": "layers", "drop": 2}, "needs the list"),
        ({"method": "angular", "layers": [1, 2]}, "chooses the blocks itself"),
        ({"layers": [3, 1, 3]}, "names 3 twice"),
        ({"layers": []}, "empty list"),
        ({"layers": [-1]}, "counted from 0"),
        ({"drop": 0}, "greater than or equal to 1"),
        ({"drop": 1, "calibration": {"texts": 0, "questions": 0, "prompts": 0}}, "judged on nothing"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused_in_words(params: Mapping[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PruneParams.model_validate(params)


def test_blocks_outside_the_model_and_too_many_of_them_are_refused_with_the_valid_choice() -> None:
    with pytest.raises(RecipeError, match="12 is not in this language model") as refused:
        _plan({"layers": [3, 12]})
    assert refused.value.way_out == "choose layers from 0 to 11"
    with pytest.raises(RecipeError, match="at least 6 must stay") as refused:
        _plan({"drop": 7})
    assert "drop at most 6" in str(refused.value.way_out) and "chance" in str(refused.value.why)
    with pytest.raises(RecipeError, match="at least 6 must stay"):
        _plan({"layers": list(range(7))})
    with pytest.raises(RecipeError, match="leave the stage out"):
        _plan({"drop": 1}, layers=1)
    assert _plan({"drop": 6}).spec is not None


def test_every_parameter_is_described() -> None:
    for params in (PruneParams, HealParams):
        assert all(found.description for found in params.model_fields.values())
