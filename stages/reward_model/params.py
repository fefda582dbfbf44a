"""What a recipe may say to `reward-model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.stage import Located, StageParams


class RewardModelParams(StageParams):
    model: Annotated[str, Located()] = Field(
        default="input",
        description="what learns to reward: input (the language model of the checkpoint that the stage needs), a "
        "folder (./NAME or absolute), or hub:ORG/NAME; a causal model gets a new head, a sequence-classification model "
        "with one label keeps its own. The paper's: hub:openai-community/gpt2",
    )
    data: tuple[Annotated[str, Located()], ...] = Field(
        default=("prompts:pairs", "prompts:advbench", "prompts:everyday", "prompts:overrefusal", "labels:pyrit"),
        min_length=1,
        description="preference pairs: prompts:SET (made of the training prompts of a set and phrases that ship), "
        "labels:pyrit (human labels), or files of HH-RLHF's form (.jsonl, .jsonl.gz, .parquet; each row a chosen and a "
        "rejected dialogue): ./FILE, hub:ORG/NAME!PATH, package:NAME==VERSION!PATH",
    )
    held_out_data: tuple[Annotated[str, Located()], ...] = Field(
        default=(), description="files of pairs on which accuracy is measured and nothing is trained"
    )
    held_out: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of the dialogues of files and labels that is kept out of training; sets of prompts keep "
        "their validation split",
    )
    unusable: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="rows of files that cannot be used (not two different dialogues, or a prompt of our test split): "
        "refuse the file, naming the row, or drop and count them",
    )
    steps: int = Field(default=100, ge=1, description="optimizer steps")
    batch: int = Field(default=8, ge=1, description="pairs in a step")
    micro_batch: int = Field(default=8, ge=1, description="pairs in memory at once")
    lr: float = Field(default=1e-4, gt=0, description="learning rate; falls linearly to 0")
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps in which it rises")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    center: float = Field(
        default=0.01, ge=0, description="weight of the squared sum of a pair's rewards, which keeps them around 0"
    )
    max_length: int = Field(
        default=512, ge=8, description="longest dialogue, in tokens; pairs with a longer one are left out"
    )
    lora_rank: int | None = Field(
        default=None, ge=1, description="rank of an adapter on all linear layers, merged at the end; null: all weights"
    )
    lora_alpha: float = Field(default=16.0, gt=0, description="scale of the adapter, divided by its rank")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the computation; bfloat16 pays only where the processor or GPU has it"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for a fifth more time")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to train; auto: a GPU if any")
    checkpoint_every: int = Field(
        default=20, ge=1, description="steps between checkpoints, of which one is kept (three times the weights)"
    )

    @model_validator(mode="after")
    def _batches_are_whole(self) -> RewardModelParams:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"batch ({self.batch}) is not a multiple of micro_batch ({self.micro_batch})")
        named = [*self.data, *self.held_out_data]
        twice = next((source for source in named if named.count(source) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice")
        return self
