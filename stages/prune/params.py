"""What a recipe may say to `prune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.models.adapter import LoRA
from stages.stage import StageParams

Method = Literal["block-influence", "angular", "layers"]


class CalibrationParams(StageParams):
    """What the blocks are judged on. Only calibration articles and training prompts and pictures are read."""

    texts: int = Field(default=16, ge=0, description="passages of Wikipedia articles")
    length: int = Field(default=128, ge=8, description="length of a passage, in tokens")
    questions: int = Field(default=16, ge=0, description="visual questions with their answers, each with its picture")
    prompts: int = Field(
        default=16,
        ge=0,
        description="training prompts beside a picture: harmless ones with their answers, harmful ones without any",
    )

    @model_validator(mode="after")
    def _something(self) -> CalibrationParams:
        if not self.texts + self.questions + self.prompts:
            raise ValueError("texts, questions and prompts are all 0: blocks cannot be judged on nothing")
        return self


class HealParams(StageParams):
    """A short distillation of the unpruned model into the pruned one: LoRA, merged at the end."""

    steps: int = Field(default=30, ge=1, description="optimizer steps")
    batch: int = Field(default=8, ge=1, description="sequences in a step: texts, questions and prompts in turn")
    micro_batch: int = Field(default=4, ge=1, description="sequences in memory at once")
    lr: float = Field(default=1e-3, gt=0, description="learning rate; falls linearly to a tenth")
    rank: int = Field(default=8, ge=1, description="rank of the adapter")
    alpha: float = Field(default=16.0, gt=0, description="scale of the adapter, divided by its rank")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the language model that get an adapter",
    )
    pictures: int = Field(default=32, ge=1, description="training pictures that questions and prompts stand beside")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradient clipping")
    checkpoint_every: int = Field(default=5, ge=1, description="steps between checkpoints")

    def lora(self) -> LoRA:
        return LoRA(self.rank, self.alpha, self.targets, None)


class PruneParams(StageParams):
    method: Method | None = Field(
        default=None,
        description="how blocks are chosen: block-influence (those that change their input least), angular (the span "
        "of neighbours that turns its input least), layers (as listed); left out: layers if they are listed, else "
        "block-influence",
    )
    drop: int | None = Field(default=None, ge=1, description="how many blocks of the language model to drop")
    layers: tuple[int, ...] | None = Field(
        default=None, description="which blocks to drop, counted from 0 as in the names of the tensors"
    )
    calibration: CalibrationParams = Field(
        default=CalibrationParams(), description="what the blocks are judged on, and the mix that healing uses"
    )
    heal: HealParams | None = Field(
        default=None, description="distil the unpruned model into the pruned one; left out: no healing"
    )
    validation: int = Field(
        default=16,
        ge=0,
        description="held-out sequences on which the KL to the unpruned model is measured; 0: it is not. Listed layers "
        "without healing are dropped without loading the model, and then there is no measurement",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the computation; bfloat16 pays only where the processor or GPU has it"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute; auto: a GPU if any")

    @model_validator(mode="after")
    def _one_amount(self) -> PruneParams:
        if self.drop is None and self.layers is None:
            raise ValueError("say how many blocks to drop (drop: 2) or which (layers: [20, 21])")
        if self.drop is not None and self.layers is not None:
            raise ValueError("drop and layers exclude each other: the list says how many")
        if self.method == "layers" and self.layers is None:
            raise ValueError("method: layers needs the list of them (layers: [20, 21])")
        if self.method not in (None, "layers") and self.layers is not None:
            raise ValueError(f"method: {self.method} chooses the blocks itself; give drop instead of layers")
        if self.layers is not None:
            twice = sorted({block for block in self.layers if self.layers.count(block) > 1})
            if twice:
                raise ValueError(f"layers names {', '.join(map(str, twice))} twice")
            if not self.layers:
                raise ValueError("layers is an empty list; leave the stage out to drop nothing")
            if min(self.layers) < 0:
                raise ValueError(f"layers: {min(self.layers)} is no block; they are counted from 0")
        return self

    @property
    def amount(self) -> int:
        """How many blocks go."""
        return len(self.layers) if self.layers is not None else self.drop or 0

    @property
    def chosen_by(self) -> Method:
        return self.method or ("layers" if self.layers is not None else "block-influence")
