"""What a recipe may say of the data that quantizers are calibrated on: one section, the same in every stage.

Written at the top of a recipe it holds for all its quantizers; what a stage writes itself wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from stages.data import articles, calibration_texts, easy_vqa, images, prompt_sets, prompts, remote_files
from stages.stage import Context, Located, StageParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.data.calibration import Calibration, Kind, Passage, Side
    from stages.models.family import Family


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
    texts: Annotated[str, Located()] | None = Field(
        default=None,
        description="plain text to take passages from instead of Wikipedia articles: ./FILE, hub:ORG/NAME!FILE or "
        "package:NAME==VERSION!FILE; passages that repeat test articles or test prompts are left out",
    )
    seed: int | None = Field(default=None, ge=0, description="which sequences; the stage's seed if left out")

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

    def check(self) -> None:
        """For `Stage.plan`; reads `texts` if it lies here, and nothing else.

        Raises:
            RecipeError: `texts` cannot be a file. SourceError: it is no text, or too short for a passage.
        """
        if self.texts is None:
            return
        remote_files.check(self.texts)
        if not remote_files.is_remote(self.texts):
            calibration_texts.check(self.texts, self.length)

    def material(
        self,
        family: Family,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        side: Side,
        seed: int,
    ) -> Calibration:
        """The sequences of one model (`Calibration`). `seed` is the stage's; one that is written here wins."""
        from stages.data.calibration import Calibration

        return Calibration(
            family,
            folder,
            model,
            tokenizer,
            side,
            length=self.length,
            pictures=self.pictures,
            seed=seed if self.seed is None else self.seed,
            texts=self.texts,
        )

    def passages(self, material: Calibration) -> list[Passage]:
        """So many of every kind as `counts` says."""
        counts = self.counts(material.kinds())
        return [material.passage(kind, number) for kind, count in counts.items() for number in range(count)]

    def tell(self, context: Context, left_out: int) -> None:
        """Say in the run's events what of `texts` was not used."""
        if left_out:
            context.log(f"{left_out} pieces of {self.texts} repeat what tests ask, and are left out")

    def downloads(self) -> Sequence[str]:
        """What the sequences are made of, for `Stage.downloads`."""
        own = (self.texts,) if self.texts is not None and remote_files.is_remote(self.texts) else ()
        return (articles.SOURCE, *own, *easy_vqa.SOURCES, *images.packages(), *prompt_sets.packages())

    def fingerprint(self) -> str:
        """What decides which they are beside these parameters, for `Stage.fingerprint`."""
        own = () if self.texts is None else (remote_files.digest(self.texts),)
        return " ".join((prompts.prompts_fingerprint(), *own))
