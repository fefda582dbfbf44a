"""L-PPO on a tiny real model: what is computed, that it learns, and that it survives being killed."""

from __future__ import annotations

from pathlib import Path

import lppo_setting as setting
import pytest
import torch

from artifacts.errors import StageError
from stages.lppo import checkpoint as training
from stages.lppo.batches import generator
from stages.lppo.learner import StepReport
from stages.lppo.objective import chosen
from stages.lppo.policy import Policy, merged
from stages.lppo.rollout import Prefixes, Responses, Scene, generate, greedy, sample_with
from stages.lppo.states import States
from stages.models import checkpoint
from stages.models.adapter import LoRA, with_adapter
from stages.models.family import family_of
from stages.models.features import ExitFeatures, Features

PROMPTS = [setting.HARMFUL[0], setting.BENIGN[0], setting.HARMFUL[1]]


@pytest.fixture(scope="module")
def features(tiny_llava: Path, images: list[Path]) -> Features:
    return ExitFeatures(tiny_llava).get(images)


@pytest.fixture
def policy(tiny_llava: Path) -> Policy:
    return setting.fresh_policy(tiny_llava)


def _disturb(policy: Policy, seed: int = 1) -> None:
    """Give the adapter and the value head something to say."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)


def _scenes() -> list[Scene]:
    return [Scene(1, 0, tuple(PROMPTS[:2])), Scene(3, 2, tuple(PROMPTS[1:]))]


def _rollout(policy: Policy, states: States, samples: int = 3, tokens: int = 6) -> Responses:
    return generate(
        policy, states(_scenes(), samples), tokens, sample_with([generator(0, 0, scene) for scene in range(2)])
    )


def _drawn(policy: Policy, prefixes: Prefixes, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, values = policy.evaluate(prefixes, responses)
    return chosen(logprobs, responses.tokens[responses.mask]), values


def test_packed_scenes_give_the_numbers_of_one_sequence_for_each_response(policy: Policy, features: Features) -> None:
    _disturb(policy)
    states = States(policy, features)
    responses = _rollout(policy, states)
    found, values = _drawn(policy, states(_scenes(), 3), responses)
    naive, naive_values = [], []
    for s, scene in enumerate(_scenes()):
        image = policy.image(torch.from_numpy(features[scene.image, scene.exit].copy()), ()).embeddings
        for row in range(6):
            tokens = responses.tokens[s, row][responses.mask[s, row]]
            prompt = policy.after_image(scene.prompts[row // 3].text)
            sequence = torch.cat([policy.before_image(), image, prompt, policy.embedded(tokens.tolist())])[None]
            with torch.no_grad():
                hidden = policy.trunk(inputs_embeds=sequence).last_hidden_state[0, -len(tokens) - 1 : -1]
            naive.append(policy.logprobs(hidden).gather(-1, tokens[:, None])[:, 0])
            naive_values.append(policy.values(hidden))
    assert torch.allclose(found, torch.cat(naive), atol=1e-4)
    assert torch.allclose(values, torch.cat(naive_values), atol=1e-4)
    assert values.abs().max() > 0


def test_log_probabilities_and_values_of_generation_are_those_of_training(policy: Policy, features: Features) -> None:
    _disturb(policy)
    policy.temperature = 0.7
    states = States(policy, features)
    responses = _rollout(policy, states)
    logprobs, values = _drawn(policy, states(_scenes(), 3), responses)
    assert torch.allclose(logprobs, responses.logprobs[responses.mask], atol=1e-4)
    assert torch.allclose(values, responses.values[responses.mask], atol=1e-4)


def test_greedy_answers_are_those_of_the_runtime(
    policy: Policy, features: Features, tiny_llava: Path, images: list[Path]
) -> None:
    from stages.runtimes.runtime import Request
    from stages.runtimes.transformers import TransformersRuntime

    responses = generate(policy, States(policy, features)(_scenes(), 1), 6, greedy)
    asked = [
        Request(prompt.text, images[scene.image], scene.exit, 6) for scene in _scenes() for prompt in scene.prompts
    ]
    with TransformersRuntime(tiny_llava) as runtime:
        expected = [response.text for response in runtime.generate(asked)]
    assert [text for row in responses.texts for text in row] == expected


def test_a_response_ends_with_the_end_of_turn_and_what_follows_does_not_count(
    policy: Policy, features: Features
) -> None:
    end = int(policy.end_tokens[0])
    stop_at = iter(range(100))

    def pick(logprobs: torch.Tensor) -> torch.Tensor:
        token = torch.full(logprobs.shape[:-1], 40)
        if next(stop_at) == 2:
            token[0, 0] = end
        return token

    responses = generate(policy, States(policy, features)(_scenes(), 1), 5, pick)
    assert responses.mask[0, 0].tolist() == [True, True, True, False, False]
    assert bool(responses.mask[0, 1].all())
    assert responses.finished.tolist() == [[True, False], [False, False]]


def test_the_reference_is_the_untouched_model(policy: Policy, features: Features, tiny_llava: Path) -> None:
    states = States(policy, features)
    responses = _rollout(policy, states)
    before, _ = policy.evaluate(states(_scenes(), 3), responses)
    _disturb(policy)
    after, _ = policy.evaluate(states(_scenes(), 3), responses)
    with policy.as_reference():
        reference, _ = policy.evaluate(states(_scenes(), 3), responses)
    assert torch.equal(before, reference)
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_merged_checkpoint_answers_like_the_policy_and_stock_transformers_loads_it(
    policy: Policy, features: Features, tiny_llava: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    _disturb(policy)
    family = family_of(checkpoint.read_config(tiny_llava))
    model = merged(family, tiny_llava, "float32", policy.adapter(), setting.LORA)
    checkpoint.save_model(model, tmp_path, companions_from=tiny_llava)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    original = family.load(tiny_llava)
    image = policy.image(torch.from_numpy(features[0, 2].copy()), ()).embeddings[None]
    with torch.no_grad():
        expected = policy.trunk(inputs_embeds=image).last_hidden_state
        found = family.trunk(stock)(inputs_embeds=image).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)
    names = dict(original.named_parameters())
    assert dict(stock.named_parameters()).keys() == names.keys()
    changed = [name for name, p in stock.named_parameters() if not torch.equal(p, names[name])]
    assert changed and all("language_model" in name and name.split(".")[-2] in setting.LORA.targets for name in changed)


def test_an_adapter_may_be_confined_to_the_last_blocks(tiny_llava: Path) -> None:
    family = family_of(checkpoint.read_config(tiny_llava))
    trunk = with_adapter(family.trunk(family.load(tiny_llava)), LoRA(2, 4.0, ("q_proj", "down_proj"), 1))
    adapted = {name.rpartition(".lora_")[0] for name, p in trunk.named_parameters() if p.requires_grad}
    assert {name.partition("layers.")[2] for name in adapted} == {"1.self_attn.q_proj", "1.mlp.down_proj"}
    with pytest.raises(StageError, match="no layer of the language model"):
        with_adapter(family.trunk(family.load(tiny_llava)), LoRA(2, 4.0, ("c_attn",), None))


def test_what_is_rewarded_becomes_more_frequent(policy: Policy, features: Features, tmp_path: Path) -> None:
    scores: list[float] = []
    setting.run(policy, features, setting.params(14), tmp_path, lambda step: scores.append(step.metrics["reward"]))
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5


def test_a_strong_kl_penalty_keeps_the_policy_at_the_reference(
    policy: Policy, features: Features, tmp_path: Path
) -> None:
    kls: list[float] = []
    setting.run(policy, features, setting.params(10, kl=5.0), tmp_path, lambda step: kls.append(step.metrics["kl"]))
    assert sum(kls[-3:]) / 3 < 1.0


def test_micro_batches_change_memory_and_not_the_gradient(tiny_llava: Path, features: Features, tmp_path: Path) -> None:
    results = []
    for micro in (1, 4):
        policy = setting.fresh_policy(tiny_llava)
        params = setting.params(1, micro_batch=micro, minibatches=1)
        setting.run(policy, features, params, tmp_path / str(micro), lambda step: None)
        results.append(torch.cat([p.detach().flatten() for p in policy.trained().values()]))
    assert torch.allclose(results[0], results[1], atol=1e-4)


@pytest.mark.parametrize(("interrupted_after", "contrast"), [(1, 0.0), (2, 0.0), (3, 0.0), (3, 0.5)])
def test_training_interrupted_and_continued_ends_with_the_same_bits(
    tiny_llava: Path, features: Features, tmp_path: Path, interrupted_after: int, contrast: float
) -> None:
    params = setting.params(4, contrast=contrast)

    def stop(step: StepReport) -> None:
        if step.step == interrupted_after:
            raise KeyboardInterrupt

    whole, resumed = setting.fresh_policy(tiny_llava), setting.fresh_policy(tiny_llava)
    setting.run(whole, features, params, tmp_path / "whole", lambda step: None)
    broken = setting.fresh_policy(tiny_llava)
    with pytest.raises(KeyboardInterrupt):
        setting.run(broken, features, params, tmp_path / "cut", stop)
    steps: list[int] = []
    setting.run(resumed, features, params, tmp_path / "cut", lambda step: steps.append(step.step))
    # A checkpoint counts once the step that starts from it has gone well: that of step 2 after step 3.
    assert steps == list(range(3 if interrupted_after == 3 else 1, 5))
    for name, parameter in whole.trained().items():
        assert torch.equal(parameter, resumed.trained()[name]), name


def test_a_damaged_training_checkpoint_means_beginning_anew(tmp_path: Path) -> None:
    weights = {"adapter.x": torch.ones(3)}
    course = training.Course(0.5, 1, 1 / 3, 0.1, training.Standing(2, 0.3, 0.2, 0.0), 4)
    moments, seen = {"adapter.x": {"exp_avg": torch.ones(3)}}, {"degenerate": [1 / 3, 0.0]}
    state = training.TrainingState(2, weights, moments, {1: 0.1 + 0.2}, 0.1, course, seen, {1: 0, 3: 1})
    training.save(tmp_path, state)
    found = training.load(tmp_path)
    assert found is not None and found.step == 2 and found.failure == {1: 0.1 + 0.2} and found.kl_coefficient == 0.1
    assert found.course == course and found.seen == seen
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert training.load(tmp_path) is None
