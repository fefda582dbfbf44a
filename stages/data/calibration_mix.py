"""What a recipe may say of the data that a quantizer is calibrated on: one section, the same in every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from stages.data import articles, easy_vqa, images, prompt_sets, prompts
from stages.stage import StageParams

if TYPE_CHECKING:
    from stages.data.calibration import Kind


class CalibrationMix(StageParams):
    """Sequences by kind. Only calibration articles and training prompts and pictures are read, no test side."""

    samples: int = Field(default=128, ge=1, description="sequences in all")
    length: int = Field(
        default=256, ge=8, description="of a passage of text, and the most that is kept of an answer, in tokens"
    )
    questions: float = Field(default=0.25, ge=0, le=1, description="share of visual questions, each with its picture")
    prompts: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="share of training prompts, harmful and harmless in turn, beside a picture if the model sees any; "
        "what is left are passages of Wikipedia articles",
    )
    pictures: int = Field(default=32, ge=1, description="training pictures that questions and prompts stand beside")

    @model_validator(mode="after")
    def _at_most_all(self) -> CalibrationMix:
        if self.questions + self.prompts > 1:
            raise ValueError("questions and prompts are shares of the samples: together they are at most 1")
        return self

    def counts(self, kinds: Sequence[Kind]) -> Mapping[Kind, int]:
        """How many sequences of every kind; the share of a kind that the model cannot be asked goes to the texts."""
        questions = round(self.samples * self.questions) if "question" in kinds else 0
        asked = round(self.samples * self.prompts) if "prompt" in kinds else 0
        asked = min(asked, self.samples - questions)
        return {"text": self.samples - questions - asked, "question": questions, "prompt": asked}

    def downloads(self) -> Sequence[str]:
        """What the sequences are made of, for `Stage.downloads`."""
        return (articles.SOURCE, *easy_vqa.SOURCES, *images.packages(), *prompt_sets.packages())

    def fingerprint(self) -> str:
        """What decides which they are beside these parameters, for `Stage.fingerprint`."""
        return prompts.prompts_fingerprint()
