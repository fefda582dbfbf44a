"""Quantization-aware l-ppo: what is trained is what llama.cpp will compute with."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from artifacts.errors import RecipeError
from stages.data.prompt_sets import Prompt
from stages.judges.judge import Judgement
from stages.lppo import checkpoint as training
from stages.lppo.algorithm import train
from stages.lppo.learner import StepReport
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy, merged
from stages.lppo.reward import Rewards
from stages.lppo.sampler import ExitSampler, PromptPool, SceneSampler
from stages.lppo.stage import LPPOStage
from stages.lppo.states import States
from stages.lppo.validation import Validation
from stages.lppo.workers import Alone
from stages.models import checkpoint
from stages.models.adapter import LoRA
from stages.models.family import family_of
from stages.models.features import ExitFeatures, Features
from stages.models.tiny import tiny_llava_spec
from stages.quantize.convert import convert_language_model, quantize_model
from stages.runtimes.rounding import round_weights, row_type
from stages.stage import Planned

LORA = LoRA(4, 8.0, ("q_proj", "v_proj", "up_proj"), None)
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def stored_layers(path: Path, heads: int, kv_heads: int) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Type and value of every linear layer of a GGUF, by its name in transformers."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is None or match[2] not in _NAMES:
            continue
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        count = {"attn_q": heads, "attn_k": kv_heads}.get(match[2])
        if count is not None:  # llama.cpp's converter interleaves the two halves of a head
            rows, width = value.shape
            value = value.reshape(count, rows // count // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        found[f"layers.{match[1]}.{_NAMES[match[2]]}"] = (tensor.tensor_type.name, value)
    return found


@pytest.fixture(scope="module")
def wide_llama(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with rows of 256 and 160 numbers: K types fit the one and not the other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in tiny_llava.glob("token*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    ("file_type", "type"),
    [
        ("Q4_0", "Q4_0"),
        ("Q4_1", "Q4_1"),
        ("Q5_0", "Q5_0"),
        ("Q8_0", "Q8_0"),
        ("IQ4_NL", "IQ4_NL"),
        ("Q3_K_S", "Q3_K"),
        ("Q4_K_S", "Q4_K"),
        ("Q6_K", "Q6_K"),
    ],
)
def test_weights_are_rounded_to_the_bit_as_llama_cpp_quantizes_them(
    wide_llama: Path, tmp_path: Path, file_type: str, type: str
) -> None:
    floats, quantized = tmp_path / "f16.gguf", tmp_path / "quantized.gguf"
    convert_language_model(wide_llama, floats, tmp_path / "scratch", name="wide", metadata={})
    quantize_model(floats, quantized, file_type)
    from transformers import LlamaForCausalLM

    weights = dict(LlamaForCausalLM.from_pretrained(wide_llama).model.named_modules())
    compared = 0
    for name, (stored_as, value) in stored_layers(quantized, heads=4, kv_heads=2).items():
        weight = weights[name].weight.detach().numpy()
        if stored_as == row_type(type, weight.shape[1]):  # mixtures give some tensors a larger type
            assert np.array_equal(round_weights(weight, type), value), name
            compared += 1
    assert compared >= 5


class _NoE:
    """An answer without the letter e counts as an answer, others as refusals."""

    name: ClassVar[str] = "no-e"
    version: ClassVar[str] = "1"
    needs_network: ClassVar[bool] = False

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        return [Judgement("e" not in text, float("e" not in text), "") for text in responses]


@pytest.fixture(scope="module")
def features(tiny_llava: Path, images: list[Path]) -> Features:
    return ExitFeatures(tiny_llava).get(images)


def _policy(folder: Path, quantizer: str | None = "Q4_0") -> Policy:
    from transformers import AutoTokenizer

    family = family_of(checkpoint.read_config(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Policy(family, family.load(folder), tokenizer, LORA, quantizer=quantizer, seed=0)


def _train(
    policy: Policy,
    features: Features,
    scratch: Path,
    report: Callable[[StepReport], None] = lambda step: None,
    **more: object,
) -> None:
    harmful = Prompt("h-0", "how to make a red square", "test", "harmful", "test")
    colour = Prompt("q-0", "what is the colour", "test", "benign", "test")
    given: dict[str, object] = {
        "steps": 4,
        "max_new_tokens": 3,
        "prompts_per_step": 4,
        "lr": 2e-2,
        "checkpoint_every": 2,
        "quantizer": "Q4_0",
        "quantize_every": 3,
        "question_scenes": 1,
    }
    params = LPPOParams.model_validate(given | more)
    sampler = SceneSampler(
        ExitSampler([1, 2, 3], floor=0.5, sharpness=1.0),
        {"harmful": PromptPool({"h": [harmful]}, 0)},
        {"harmful": 4},
        per_scene=2,
        images=3,
        seed=0,
        questions={1: [(colour, "red"), (colour, "blue")]},
        question_scenes=1,
    )
    states, rewards = States(policy, features), Rewards(_NoE())
    validation = Validation(
        policy,
        states,
        rewards,
        [harmful],
        [1, 2, 3],
        images=2,
        max_new_tokens=3,
        workers=Alone(),
        told=lambda found, now, original: None,
    )
    train(
        policy,
        sampler,
        states,
        rewards,
        params,
        seed=0,
        scratch=scratch,
        report=report,
        validation=validation if params.validate_every else None,
    )


def _effective(policy: Policy) -> dict[str, NDArray[np.float32]]:
    """What every linear layer of the policy multiplies with."""
    found = {}
    for name, module in policy.trunk.get_base_model().named_modules():
        if name.rpartition(".")[2] not in {part.rpartition(".")[2] for part in _NAMES.values()}:
            continue
        weight = module.base_layer.weight if hasattr(module, "base_layer") else module.weight
        delta = module.get_delta_weight("default") if hasattr(module, "base_layer") else 0
        found[name] = (weight + delta).detach().numpy()
    return found


def test_the_trained_policy_computes_with_the_weights_that_ship(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    policy = _policy(tiny_llava)
    _train(policy, features, tmp_path / "scratch")
    family = family_of(checkpoint.read_config(tiny_llava))
    folder = tmp_path / "merged"
    folder.mkdir()
    model = merged(family, tiny_llava, "float32", policy.adapter(), LORA)
    checkpoint.save_model(model, folder, companions_from=tiny_llava)
    convert_language_model(folder, tmp_path / "f16.gguf", tmp_path / "links", name="tiny", metadata={})
    quantize_model(tmp_path / "f16.gguf", tmp_path / "q.gguf", "Q4_0")
    shipped, trained = stored_layers(tmp_path / "q.gguf", heads=2, kv_heads=1), _effective(policy)
    before = _effective(_policy(tiny_llava))
    assert shipped.keys() == trained.keys()
    for name, (stored_as, value) in shipped.items():
        assert stored_as == "Q4_0"
        # Adding and subtracting the adapter's part costs the last bits of a float32.
        assert np.allclose(trained[name], value, atol=1e-6), name
        assert not np.allclose(before[name], value, atol=1e-3), name


def test_the_gradient_passes_the_rounding_straight_through(tiny_llava: Path) -> None:
    policy = _policy(tiny_llava)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    policy.quantize()
    layer = policy.trunk.get_base_model().layers[0].mlp.up_proj
    x = torch.randn(5, layer.in_features, generator=noise)
    layer(x).square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rounded = torch.from_numpy(_effective(policy)["layers.0.mlp.up_proj"]).requires_grad_()
    (x @ rounded.T).square().sum().backward()
    assert rounded.grad is not None
    scale = layer.scaling["default"]
    assert torch.allclose(b.grad, scale * rounded.grad @ a.T, rtol=1e-3, atol=1e-3)
    assert torch.allclose(a.grad, scale * b.T @ rounded.grad, rtol=1e-3, atol=1e-3)


def test_the_reference_is_the_unrounded_model(tiny_llava: Path) -> None:
    plain, rounded = _policy(tiny_llava, None), _policy(tiny_llava)
    rounded.quantize()
    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.trunk(inputs_embeds=x).last_hidden_state
        assert not torch.allclose(rounded.trunk(inputs_embeds=x).last_hidden_state, expected, atol=1e-3)
        with rounded.as_reference():
            with rounded.as_reference():
                assert torch.equal(rounded.trunk(inputs_embeds=x).last_hidden_state, expected)
            assert torch.equal(rounded.trunk(inputs_embeds=x).last_hidden_state, expected)
        assert not torch.allclose(rounded.trunk(inputs_embeds=x).last_hidden_state, expected, atol=1e-3)


def _checkpointed(folder: Path) -> int:
    state = training.load(folder)
    assert state is not None
    return state.step


# Checkpoints follow validations, too, also where no rounding is due.
_VALIDATED = {"steps": 7, "validate_every": 4, "checkpoint_every": 100}


@pytest.mark.parametrize(
    ("interrupted_after", "going_on_from", "more"), [(1, None, {}), (3, 2, {}), (5, 4, _VALIDATED)]
)
def test_quantization_aware_training_goes_on_after_a_stop_with_the_same_bits(
    tiny_llava: Path,
    features: Features,
    tmp_path: Path,
    interrupted_after: int,
    going_on_from: int | None,
    more: dict[str, object],
) -> None:
    def stop(step: StepReport) -> None:
        if step.step == interrupted_after:
            raise KeyboardInterrupt

    whole, resumed = _policy(tiny_llava), _policy(tiny_llava)
    _train(whole, features, tmp_path / "whole", **more)
    with pytest.raises(KeyboardInterrupt):
        _train(_policy(tiny_llava), features, tmp_path / "cut", stop, **more)
    assert going_on_from is None or _checkpointed(tmp_path / "cut") == going_on_from
    _train(resumed, features, tmp_path / "cut", **more)
    for name, parameter in whole.trained().items():
        assert torch.equal(parameter, resumed.trained()[name]), name


def test_a_step_taken_back_computes_with_the_checkpoint_s_rounding(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    """As one does that goes on from that checkpoint: what the broken step's weights were rounded to is gone."""

    def broken_after_five(policy: Policy, *, stopped: bool) -> Callable[[StepReport], None]:
        told: list[int] = []

        def report(step: StepReport) -> None:
            told.append(step.step)
            if told == [1, 2, 3, 4, 5]:
                with torch.no_grad():
                    next(iter(policy.trained().values())).fill_(float("nan"))
            elif stopped and told[5:] == [5]:
                raise KeyboardInterrupt

        return report

    whole, cut, resumed = (_policy(tiny_llava) for _ in range(3))
    _train(whole, features, tmp_path / "whole", broken_after_five(whole, stopped=False), **_VALIDATED)
    with pytest.raises(KeyboardInterrupt):
        _train(cut, features, tmp_path / "cut", broken_after_five(cut, stopped=True), **_VALIDATED)
    assert _checkpointed(tmp_path / "cut") == 4
    _train(resumed, features, tmp_path / "cut", **_VALIDATED)
    for name, parameter in whole.trained().items():
        assert torch.equal(parameter, resumed.trained()[name]), name


def test_being_right_about_an_image_is_rewarded_and_told_apart_from_refusing(
    tiny_llava: Path, features: Features, tmp_path: Path
) -> None:
    reports: list[StepReport] = []
    _train(_policy(tiny_llava), features, tmp_path, reports.append)
    for report in reports:
        *asked, questions = report.scenes
        assert questions.image == 1 and questions.answers is not None and set(questions.answers) == {"red", "blue"}
        assert all(scene.answers is None for scene in asked)
        assert all(outcome.right is None for row in report.outcomes[:-1] for outcome in row)
        assert all(outcome.reward == (1.0 if outcome.right else -1.0) for outcome in report.outcomes[-1])


@pytest.mark.parametrize("quantizer", ["IQ2_XXS", "gptq-5bit", "q4"])
def test_a_quantizer_that_weights_cannot_be_rounded_to_is_refused_before_work_starts(quantizer: str) -> None:
    stage = LPPOStage(LPPOParams(quantizer=quantizer))
    with pytest.raises(RecipeError, match="cannot be rounded"):
        stage.plan({"checkpoint": Planned(type="checkpoint", spec=tiny_llava_spec())})


def test_rows_that_no_block_divides_stay_f16() -> None:
    assert row_type("Q4_0", 50) == "F16"
