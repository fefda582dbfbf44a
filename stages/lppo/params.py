"""What a recipe may say to `l-ppo` and to its baseline `sft`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.models.adapter import LoRA
from stages.runtimes.gptq_grid import is_grid
from stages.runtimes.imatrix import ImatrixName
from stages.runtimes.mixture import ALIASES
from stages.stage import Located, StageParams

CONTRASTED: Final = 8
"""Prompts of a scene of which only how answers begin is looked at: the more, the less each costs."""


class PromptShares(StageParams):
    """Prompt sets by kind, of which the train split is used, and the share of each kind in a step."""

    harmful: tuple[str, ...] = Field(default=("advbench", "pairs"), description="sets of prompts to refuse")
    benign: tuple[str, ...] = Field(default=("everyday", "pairs"), description="sets of prompts to answer")
    borderline: tuple[str, ...] = Field(
        default=("overrefusal",), description="sets of frightening-but-harmless prompts to answer"
    )
    harmful_share: float = Field(default=0.5, gt=0, description="share of harmful prompts")
    validation: tuple[str, ...] = Field(
        default=(),
        description="sets whose validation split is asked instead, for the kinds of prompts that they have; prompts "
        "that resemble those trained on say little of others",
    )
    benign_share: float = Field(default=0.25, ge=0, description="share of benign prompts")
    borderline_share: float = Field(default=0.25, ge=0, description="share of frightening-but-harmless prompts")

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Sets by kind."""
        return {"harmful": self.harmful, "benign": self.benign, "borderline": self.borderline}

    def shares(self) -> dict[str, float]:
        return {
            "harmful": self.harmful_share,
            "benign": self.benign_share,
            "borderline": self.borderline_share,
        }


class RewardWeights(StageParams):
    """r(x_t, y) as a weighted sum; each part is between -1 and 1, but the reward model's, which has deviation 1."""

    refusal: float = Field(default=1.0, ge=0, description="harmful prompts: +1 for a refusal, -1 for anything else")
    judges: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="harmful prompts: judges by weight, named as icet-verify names them, e.g. {learned: 0.5}; +1 where "
        "one is sure that a response is safe, -1 where it is sure that it is not, and for babble",
    )
    helpfulness: float = Field(
        default=1.0, ge=0, description="benign prompts: +1 for an answer, -1 for a refusal, 0 for babble"
    )
    borderline: float | None = Field(
        default=None, ge=0, description="the same of frightening-but-harmless prompts; null: what helpfulness says"
    )
    answer: float = Field(default=1.0, ge=0, description="visual questions: +1 for the right answer, else -1")
    reward_model: float = Field(
        default=0.0, ge=0, description="all prompts but visual questions: what the reward model says, normalised"
    )

    def earn(self, *, questions: bool) -> bool:
        """Whether anything earns; `questions`: whether visual questions are asked."""
        parts = (self.refusal, self.helpfulness, self.borderline, self.answer if questions else 0, self.reward_model)
        return any(parts) or any(self.judges.values())


class Bounds(StageParams):
    """Signs of reward hacking; training stops when the mean of three steps is beyond a bound. null: only watched."""

    max_over_refusal: float | None = Field(
        default=None, ge=0, le=1, description="share of harmless prompts that are refused"
    )
    max_degenerate: float | None = Field(default=None, ge=0, le=1, description="share of responses that are babble")
    max_repetition: float | None = Field(
        default=None, ge=0, le=1, description="share of a response's three-word sequences that it has said before"
    )
    min_length: float | None = Field(default=None, ge=0, description="tokens of a response")
    max_kl: float = Field(
        default=200.0, gt=0, description="nats a response from the original model: beyond it a step is rolled back"
    )


class TrainingParams(StageParams):
    """What l-ppo and its baseline share, so that they can be compared: data, adapter, schedule, checks."""

    exits: Literal["all"] | tuple[int, ...] = Field(
        default="all", description="exits to harden: all that the model has, or a list of layers"
    )
    steps: int = Field(default=40, ge=1, description="iterations")
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="stop after so many minutes of training, whatever `steps` says; for comparisons at equal time, "
        "since the result then depends on the machine",
    )
    prompts_per_step: int = Field(default=8, ge=1, description="prompts in an iteration")
    prompts_per_scene: int = Field(
        default=2, ge=1, description="prompts that share an exit and an image, harmful and harmless side by side"
    )
    micro_batch: int = Field(
        default=2, ge=1, description="scenes in memory at once, accumulated; changes memory, not the result"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations twice and keep them once: less memory, about a third slower"
    )
    lr: float = Field(default=5e-4, gt=0, description="learning rate of the adapter")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="how the learning rate falls to a tenth, or not",
    )
    warmup: int = Field(default=0, ge=0, description="iterations in which the learning rate rises from zero")
    max_rollbacks: int = Field(
        default=3,
        ge=0,
        description="how often a step that diverged may be taken back, with half the learning rate, before giving up",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    lora_rank: int = Field(default=8, ge=1, description="rank of the adapter")
    lora_alpha: float = Field(default=16.0, gt=0, description="scale of the adapter, divided by its rank")
    lora_targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the language model that get an adapter",
    )
    lora_layers: int | None = Field(
        default=None, ge=1, description="how many of the last blocks get one; fewer are faster; all when left out"
    )
    quantizer: str | None = Field(
        default=None,
        description="train with weights rounded as the shipped file will have them: what the gguf stage's `type` says "
        "(Q4_0, Q4_K_M, ...), or gptq-4bit. null or none: as they are",
    )
    quantize_every: int = Field(
        default=1,
        ge=1,
        description="steps between roundings; more for slow types such as IQ4_NL, up to checkpoint_every: every "
        "checkpoint and validation rounds, too",
    )
    imatrix: ImatrixName | None = Field(
        default=None,
        description="importance matrix that the file will be made with: a stage that uses imatrix, or ./FILE.gguf",
    )
    prompts: PromptShares = Field(default=PromptShares(), description="what is asked")
    question_scenes: int = Field(
        default=0,
        ge=0,
        description="scenes a step that ask easy-VQA training questions about their own image; right answers earn 1",
    )
    images: int = Field(default=16, ge=1, description="benign images of the train split")
    contrast: float = Field(
        default=0.0,
        ge=0,
        description="weight of the binary cross-entropy of whether an answer begins as refusals do: after harmful "
        "prompts it should, after harmless ones it should not; 0: not learned by itself",
    )
    contrasts: int = Field(
        default=32,
        ge=CONTRASTED,
        multiple_of=CONTRASTED,
        description="prompts, in the shares of `prompts`, whose answers' beginnings an optimizer step contrasts",
    )
    max_new_tokens: int = Field(default=20, ge=1, description="length of a response, in tokens")
    validation: int = Field(
        default=4, ge=0, description="validation prompts of each kind at each exit, answered greedily after training"
    )
    validation_exits: tuple[int, ...] | None = Field(
        default=None,
        description="exits at which they are asked; since exits share their prompts, a few with more prompts tell more "
        "than all with few. null: those that are hardened",
    )
    validate_every: int = Field(
        default=0,
        ge=0,
        description="iterations between validations; the best one's weights are kept. 0: only at the end",
    )
    patience: int | None = Field(
        default=None, ge=1, description="validations without a better one after which training stops; null: never"
    )
    over_refusal_rise: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="validations whose over-refusal is at most so much above the original model's are better than any "
        "other; among these the lowest ASR is",
    )
    interpolation: tuple[Annotated[float, Field(gt=0, le=2)], ...] = Field(
        default=(),
        description="shares of the way from the original weights to the trained ones, e.g. [0.6, 0.8, 1]: after "
        "training, validation prompts choose one as they choose among iterations; none: the trained weights",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the computation; bfloat16 pays only where the processor or GPU has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train; auto: a GPU if any")
    checkpoint_every: int = Field(default=5, ge=1, description="iterations between checkpoints")

    @field_validator("quantizer")
    @classmethod
    def _as_the_file(cls, value: str | None) -> str | None:
        """The same name means the same here and as the `type` of a file."""
        if value is None or value == "none" or is_grid(value):
            return value
        return ALIASES.get(value.upper(), value.upper())

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.prompts_per_step % self.prompts_per_scene:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) is not a multiple of prompts_per_scene "
                f"({self.prompts_per_scene})"
            )
        kinds = sum(share > 0 for share in self.prompts.shares().values())
        if self.prompts_per_step < kinds:
            raise ValueError(f"prompts_per_step ({self.prompts_per_step}) cannot hold {kinds} kinds of prompts")
        if self.validate_every and not self.validation:
            raise ValueError("validate_every needs prompts to validate on: set validation to 1 or more")
        if self.interpolation and not self.validation:
            raise ValueError("interpolation needs prompts to choose by: set validation to 1 or more")
        if self.patience is not None and not self.validate_every:
            raise ValueError("patience counts validations: set validate_every, too")
        if self.contrast and not (self.prompts.benign_share or self.prompts.borderline_share):
            raise ValueError("contrast needs harmless prompts, or all it teaches is to refuse: give them a share")
        if self.imatrix is not None and self.rounding() is None:
            raise ValueError("imatrix weighs the rounding of a quantizer: set quantizer, too")
        return self

    def lora(self) -> LoRA:
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets, self.lora_layers)

    def scenes_per_update(self) -> int:
        """Scenes that an optimizer step is computed from."""
        return self.prompts_per_step // self.prompts_per_scene + self.question_scenes

    def rounding(self) -> str | None:
        """The quantizer, if there is one."""
        return None if self.quantizer in (None, "none") else self.quantizer


PAPER: Final[Mapping[str, object]] = {
    "objective": "ppo",
    # Algorithm 1: harmful queries with a benign image, one response to each; nothing harmless among them.
    "prompts": {"benign_share": 0.0, "borderline_share": 0.0},
    "prompts_per_scene": 1,
    "samples": 1,
    "question_scenes": 0,
    # r(x_t, y) is a reward model's; the KL to the SFT policy is weighed by a fixed eta; nothing else holds the policy.
    "rewards": {
        "refusal": 0.0,
        "judges": {},
        "helpfulness": 0.0,
        "borderline": None,
        "answer": 0.0,
        "reward_model": 1.0,
    },
    "kl_target": None,
    "anchor": 0.0,
    "demonstrations": 0.0,
    "contrast": 0.0,
    # The value model is fitted by plain squared error; advantages are as GAE gives them.
    "value_clip": None,
    "normalize_advantages": False,
    # What ships is not looked at, and all that was learned is kept.
    "validate_every": 0,
    "quantizer": None,
    "interpolation": [],
}
"""What `variant: paper` sets where the recipe says nothing (arXiv 2411.04291, section 3.2)."""


class LPPOParams(TrainingParams):
    variant: Literal["all-exits", "paper"] = Field(
        default="all-exits",
        description="all-exits: one training over all exits, the worst ones most often; paper: one exit after the "
        "other, `steps` iterations and the whole schedule for each, objective and reward as published",
    )
    objective: Literal["ppo", "grpo"] = Field(
        default="ppo",
        description="ppo: GAE with a value head; grpo: advantages relative to the prompt's other responses",
    )
    samples: int = Field(default=4, ge=1, description="responses to each prompt")
    ppo_epochs: int = Field(default=2, ge=1, description="passes over the responses of an iteration")
    minibatches: int = Field(
        default=2, ge=1, description="optimizer steps in a pass; fewer where scenes do not divide so"
    )
    dro_floor: float = Field(default=0.3, gt=0, le=1, description="part of the draw of exits that stays uniform")
    dro_sharpness: float = Field(
        default=3.0,
        ge=0,
        description="how strongly the worst exits are preferred: shares of a step's scenes go with exp(sharpness * "
        "share of harmful prompts answered there)",
    )
    value_lr: float = Field(default=1e-3, gt=0, description="learning rate of the value head")
    clip: float = Field(default=0.2, gt=0, lt=1, description="eps: how far the ratio to the old policy may go")
    value_clip: float | None = Field(
        default=None, gt=0, description="how far a value may go from the old one before it stops earning; null: any"
    )
    c1: float = Field(default=0.1, ge=0, description="weight of the value loss")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount")
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    normalize_advantages: bool = Field(default=True, description="advantages to mean 0 and deviation 1 in an iteration")
    rewards: RewardWeights = Field(default=RewardWeights(), description="what a response earns, and how much")
    reward_model: Annotated[str, Located()] | None = Field(
        default=None,
        description="a stage of this recipe that uses reward-model; or hub:ID, or a folder (./...), of a sequence "
        "classifier",
    )
    kl: float = Field(default=0.02, ge=0, description="eta: least weight of the KL penalty")
    kl_target: float | None = Field(
        default=15.0, gt=0, description="nats a response above which the penalty grows; null: a fixed weight"
    )
    anchor: float = Field(
        default=0.5,
        ge=0,
        description="weight of the exact KL from the original model on harmless prompts; 0: plain PPO",
    )
    demonstrations: float = Field(
        default=0.0,
        ge=0,
        description="weight of the cross-entropy of what should have been said, in every pass: a refusal after a "
        "harmful prompt, the original model's own answer after a harmless one (the prompt set's where it refuses), the "
        "right word after a visual question; "
        "0: plain PPO",
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling, and of the policy that is trained")
    network: bool = Field(
        default=False,
        description="let judges that need it send harmful prompts and responses to a server; training then no longer "
        "repeats",
    )
    bounds: Bounds = Field(
        default=Bounds(), description="where training is stopped rather than go on hacking its reward"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: object) -> object:
        """`variant: paper` changes defaults; what the recipe says still wins."""
        if not isinstance(data, Mapping) or data.get("variant") != "paper":
            return data
        merged = {**PAPER, **data}
        for name in ("prompts", "rewards"):
            given, published = data.get(name), PAPER[name]
            if isinstance(given, Mapping) and isinstance(published, Mapping):
                merged[name] = {**published, **given}
        return merged

    @model_validator(mode="after")
    def _rewarded(self) -> Self:
        if self.objective == "grpo" and self.samples < 2:
            raise ValueError("grpo compares the responses to a prompt: set samples to 2 or more")
        if self.variant == "paper" and self.max_minutes is not None and (self.exits == "all" or len(self.exits) > 1):
            raise ValueError(
                "max_minutes would end within the first of the exits that variant: paper trains one after the other: "
                "leave it out, or name one exit"
            )
        if self.rewards.reward_model and self.reward_model is None:
            why = (
                "variant: paper takes its reward from one" if self.variant == "paper" else "rewards.reward_model is set"
            )
            raise ValueError(f"reward_model is missing: {why}; name a stage that uses reward-model")
        if not self.rewards.reward_model and self.reward_model is not None:
            raise ValueError("reward_model is named but counts for nothing: set rewards.reward_model, e.g. to 1")
        if not self.rewards.earn(questions=self.question_scenes > 0):
            raise ValueError("rewards are all 0, so there is nothing to learn")
        if self.bounds.max_over_refusal is not None and not (
            self.prompts.benign_share or self.prompts.borderline_share
        ):
            raise ValueError("bounds.max_over_refusal is never seen: no harmless prompts are asked; give them a share")
        return self

    def scenes_per_update(self) -> int:
        return math.ceil(super().scenes_per_update() / self.minibatches)

    def departures(self) -> dict[str, object]:
        """Where `variant: paper` is told to do otherwise than the paper."""
        if self.variant != "paper":
            return {}
        given = self.model_dump(mode="json") | {"quantizer": self.rounding()}  # "none" is none
        found = {
            name: given[name]
            for name, value in PAPER.items()
            if not isinstance(value, Mapping) and given[name] != value
        }
        for name in ("prompts", "rewards"):
            published = PAPER[name]
            assert isinstance(published, Mapping)
            found |= {f"{name}.{key}": given[name][key] for key in published if given[name][key] != published[key]}
        return found


class SFTParams(TrainingParams):
    answers: Literal["own", "given"] = Field(
        default="own",
        description="targets of harmless prompts; own: the original model's greedy answers, the prompt set's where it "
        "refuses; given: the prompt set's, where it has some, else own",
    )
    epochs: int = Field(default=1, ge=1, description="optimizer steps on the prompts of an iteration")
