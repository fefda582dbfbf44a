"""A tiny policy, its pictures and prompts, and a reward that costs nothing, for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from transformers import AutoTokenizer

from stages.data.prompt_sets import Prompt
from stages.judges.judge import Judgement
from stages.lppo.algorithm import train
from stages.lppo.learner import StepReport
from stages.lppo.loop import Ending
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.sampler import ExitSampler, PromptPool, SceneSampler
from stages.lppo.states import States
from stages.lppo.validation import Validation
from stages.lppo.workers import Workers
from stages.models import checkpoint
from stages.models.adapter import LoRA
from stages.models.family import family_of
from stages.models.features import Features

LORA = LoRA(4, 8.0, ("q_proj", "v_proj", "o_proj", "up_proj"), None)
HARMFUL = [
    Prompt("h-0", "how to make a red square", "test", "harmful", "test"),
    Prompt("h-1", "write steps", "test", "harmful", "test"),
]
BENIGN = [Prompt("b-0", "what is the capital of a country", "test", "benign", "test", "the sun is a star")]


class LikesE:
    """A bandit: any answer that holds the letter e is a refusal."""

    name: ClassVar[str] = "likes-e"
    version: ClassVar[str] = "1"
    needs_network: ClassVar[bool] = False

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Judgement]:
        return [Judgement("e" not in text, float("e" not in text), "") for text in responses]


def fresh_policy(folder: Path, *, gradient_checkpointing: bool = False) -> Policy:
    """The tiny model with a new adapter, always the same."""
    family = family_of(checkpoint.read_config(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Policy(family, family.load(folder), tokenizer, LORA, gradient_checkpointing=gradient_checkpointing, seed=0)


def params(steps: int, **more: object) -> LPPOParams:
    fixed = {"steps": steps, "max_new_tokens": 3, "prompts_per_step": 4, "lr": 5e-3, "kl": 0.0, "checkpoint_every": 2}
    return LPPOParams.model_validate(fixed | more)


def sampler(given: LPPOParams) -> SceneSampler:
    pools = {"harmful": PromptPool({"h": HARMFUL}, 0)}
    exits = ExitSampler([1, 2, 3], floor=0.5, sharpness=1.0)
    counts = {"harmful": given.prompts_per_step}
    contrasted = {"harmful": given.contrasts} if given.contrast else None
    per_scene = given.prompts_per_scene
    return SceneSampler(exits, pools, counts, per_scene=per_scene, images=3, seed=0, contrasted=contrasted)


def run(
    policy: Policy,
    features: Features,
    given: LPPOParams,
    scratch: Path,
    report: Callable[[StepReport], None] = lambda step: None,
    validation: Validation | None = None,
    workers: Workers | None = None,
) -> Ending:
    """Train on harmful prompts, rewarded for the letter e."""
    return train(
        policy,
        sampler(given),
        States(policy, features),
        Rewards(LikesE()),
        given,
        seed=0,
        scratch=scratch,
        report=report,
        validation=validation,
        workers=workers,
    )
