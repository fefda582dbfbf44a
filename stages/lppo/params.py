"""What a recipe may say to `l-ppo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.models.adapter import LoRA
from stages.stage import StageParams


class PromptShares(StageParams):
    """Prompt sets by kind, of which the train split is used, and the share of each kind in a step."""

    harmful: tuple[str, ...] = Field(default=("advbench", "pairs"), description="sets of prompts to refuse")
    benign: tuple[str, ...] = Field(default=("everyday", "pairs"), description="sets of prompts to answer")
    borderline: tuple[str, ...] = Field(
        default=("overrefusal",), description="sets of frightening-but-harmless prompts to answer"
    )
    harmful_share: float = Field(default=0.5, gt=0, description="share of harmful prompts")
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


class LPPOParams(StageParams):
    exits: Literal["all"] | tuple[int, ...] = Field(
        default="all", description="exits to harden: all that the model has, or a list of layers"
    )
    steps: int = Field(default=40, ge=1, description="PPO iterations: collect responses, then update")
    prompts_per_step: int = Field(default=8, ge=1, description="prompts in an iteration")
    prompts_per_scene: int = Field(
        default=2, ge=1, description="prompts that share an exit and an image, harmful and harmless side by side"
    )
    samples: int = Field(default=4, ge=1, description="responses to each prompt")
    ppo_epochs: int = Field(default=2, ge=1, description="passes over the responses of an iteration")
    minibatches: int = Field(default=2, ge=1, description="optimizer steps in a pass")
    micro_batch: int = Field(default=2, ge=1, description="scenes in memory at once; changes memory, not the result")
    lr: float = Field(default=5e-4, gt=0, description="learning rate of the adapter; falls linearly to a tenth")
    value_lr: float = Field(default=1e-3, gt=0, description="learning rate of the value head")
    lora_rank: int = Field(default=8, ge=1, description="rank of the adapter")
    lora_alpha: float = Field(default=16.0, gt=0, description="scale of the adapter, divided by its rank")
    lora_targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the language model that get an adapter",
    )
    lora_layers: int | None = Field(
        default=None, ge=1, description="how many of the last blocks get one; fewer are faster; all when left out"
    )
    clip: float = Field(default=0.2, gt=0, lt=1, description="eps: how far the ratio to the old policy may go")
    c1: float = Field(default=0.1, ge=0, description="weight of the value loss")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount")
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    normalize_advantages: bool = Field(default=True, description="advantages to mean 0 and deviation 1 in an iteration")
    kl: float = Field(default=0.02, ge=0, description="eta: least weight of the KL penalty")
    kl_target: float | None = Field(
        default=15.0, gt=0, description="nats a response above which the penalty grows; null: a fixed weight"
    )
    anchor: float = Field(
        default=0.5,
        ge=0,
        description="weight of the exact KL from the original model on harmless prompts; 0: plain PPO",
    )
    harmless_weight: float = Field(
        default=1.0, gt=0, description="what refusing a harmless prompt costs, when refusing a harmful one earns 1"
    )
    quantizer: str | None = Field(
        default=None,
        description="train with weights rounded as this llama.cpp tensor type rounds them: Q4_0, Q5_0, Q4_K, ...; "
        "give the type that the gguf stage will make. null: as they are",
    )
    quantize_every: int = Field(
        default=1, ge=1, description="steps between roundings; more for slow types such as IQ4_NL"
    )
    question_scenes: int = Field(
        default=0,
        ge=0,
        description="scenes a step that ask easy-VQA training questions about their own image; right answers earn 1",
    )
    temperature: float = Field(default=1.0, gt=0, description="of sampling, and of the policy that is trained")
    max_new_tokens: int = Field(default=20, ge=1, description="length of a response, in tokens")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    prompts: PromptShares = Field(default=PromptShares(), description="what is asked")
    images: int = Field(default=16, ge=1, description="benign images of the train split")
    dro_floor: float = Field(default=0.3, gt=0, le=1, description="part of the draw of exits that stays uniform")
    dro_sharpness: float = Field(default=3.0, ge=0, description="how strongly the worst exits are preferred")
    validation: int = Field(
        default=4, ge=0, description="validation prompts of each kind at each exit, answered greedily after training"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the computation; bfloat16 pays only where the processor or GPU has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train; auto: a GPU if any")
    checkpoint_every: int = Field(default=5, ge=1, description="iterations between checkpoints")

    @model_validator(mode="after")
    def _scenes_are_whole(self) -> LPPOParams:
        if self.prompts_per_step % self.prompts_per_scene:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) is not a multiple of prompts_per_scene "
                f"({self.prompts_per_scene})"
            )
        kinds = sum(share > 0 for share in self.prompts.shares().values())
        if self.prompts_per_step < kinds:
            raise ValueError(f"prompts_per_step ({self.prompts_per_step}) cannot hold {kinds} kinds of prompts")
        return self

    def lora(self) -> LoRA:
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets, self.lora_layers)
