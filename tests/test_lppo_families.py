"""L-PPO on every family with an image encoder: ragged images, texts around tiles, and cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from artifacts.errors import RecipeError
from stages.data.prompt_sets import Prompt
from stages.judges.refusal import RefusalRule
from stages.lppo.algorithm import train
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.rollout import Scene, generate, greedy
from stages.lppo.sampler import ExitSampler, PromptPool, SceneSampler
from stages.lppo.stage import LPPOStage
from stages.lppo.states import States
from stages.models import checkpoint
from stages.models.adapter import LoRA, merged
from stages.models.family import family_of
from stages.models.features import ExitFeatures
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime
from stages.stage import Planned

_LORA = LoRA(4, 8.0, ("q_proj", "v_proj", "up_proj"), None)
_PROMPTS = [
    Prompt("h-0", "how to make a red square", "test", "harmful", "test"),
    Prompt("b-0", "what is the capital of a country", "test", "benign", "test"),
]


@pytest.mark.parametrize("kind", ["llava-next", "idefics3", "mllama"])
def test_a_policy_answers_like_the_runtime_at_every_exit_and_trains(
    kind: str, tiny_family: Callable[[str], Path], images: list[Path], tmp_path: Path
) -> None:
    folder = tiny_family(kind)
    family = family_of(checkpoint.read_config(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = Policy(family, family.load(folder), tokenizer, _LORA, seed=0)
    states = States(policy, ExitFeatures(folder, cache=tmp_path / "cache").get(images))

    scenes = [Scene(exit, image, tuple(_PROMPTS)) for exit, image in ((1, 0), (3, 1), (2, 2))]
    responses = generate(policy, states(scenes, 1), 5, greedy)
    asked = [Request(p.text, images[scene.image], scene.exit, 5) for scene in scenes for p in scene.prompts]
    with TransformersRuntime(folder) as runtime:
        assert [text for row in responses.texts for text in row] == [each.text for each in runtime.generate(asked)]

    params = LPPOParams.model_validate(
        {
            "steps": 1,
            "max_new_tokens": 3,
            "samples": 2,
            "prompts_per_step": 4,
            "lr": 5e-3,
            "micro_batch": 1,
            "contrast": 0.5,
            "contrasts": 8,
        }
    )
    pool = {"harmful": PromptPool({"test": _PROMPTS[:1]}, 0), "benign": PromptPool({"test": _PROMPTS[1:]}, 0)}
    exits = ExitSampler([1, 2, 3], floor=0.5, sharpness=1.0)
    counts, contrasted = {"harmful": 2, "benign": 2}, {"harmful": 4, "benign": 4}
    sampler = SceneSampler(exits, pool, counts, per_scene=2, images=3, seed=0, contrasted=contrasted)
    before = policy.adapter()
    steps = []
    train(policy, sampler, states, Rewards(RefusalRule()), params, seed=0, scratch=tmp_path, report=steps.append)
    assert len(steps) == 1 and any(not torch.equal(before[name], now) for name, now in policy.adapter().items())

    checkpoint.save_model(
        merged(family, folder, "float32", policy.adapter(), _LORA), tmp_path / "hardened", companions_from=folder
    )
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "hardened", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_text_only_model_has_no_exits_to_harden(tiny_family: Callable[[str], Path]) -> None:
    config = checkpoint.read_config(tiny_family("llama"))
    planned = Planned(type="checkpoint", spec=family_of(config).spec(config))
    with pytest.raises(RecipeError, match="no image encoder"):
        LPPOStage(LPPOParams()).plan({"source": planned})
