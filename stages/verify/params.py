"""What a recipe may say to `icet-verify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.data.prompt_files import PromptFile
from stages.data.vqa import VqaFile
from stages.judges.registry import RULE
from stages.stage import Located, StageParams
from stages.verify.attacks import Attack, GeneratedImages
from stages.verify.overlap import Overlap


class IcetVerifyParams(StageParams):
    baseline: str | None = Field(
        default="source",
        description="stage of the uncompressed model that everything is compared with; null: with nothing",
    )
    hardened: str | None = Field(default=None, description="checkpoint stage to measure beside, before quantization")
    controls: tuple[str, ...] = Field(
        default=(), description="other artifacts to measure alike but not to gate, e.g. the same recipe without l-ppo"
    )
    harmful: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={"donotanswer": 20, "advbench": 20}, description="harmful prompt sets and how many test prompts of each"
    )
    over_refusal: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={"overrefusal": 10, "pairs": 5, "everyday": 5},
        description="prompt sets that should be answered and how many test prompts of each",
    )
    sets: dict[str, Annotated[PromptFile, Located()]] = Field(
        default={},
        description="prompt sets of your own, by the names that harmful and over_refusal use: {layout: NAME} for "
        "advbench, harmbench, strongreject, xstest, redteam-2k, jailbreakv-28k from the hub, with source: FILE from "
        "elsewhere; or {source, columns: {prompt: COLUMN, category, id, image}, where: {COLUMN: VALUE}, intent, "
        "licence, images: FOLDER}",
    )
    split: Literal["test", "validation"] = Field(
        default="test",
        description="side of our prompt sets, images and visual questions that is asked. validation: to choose a "
        "recipe by, so that the test side stays unseen; no gate may read it",
    )
    overlap: Overlap = Field(
        default="refuse",
        description="what to do with prompts like those that something in the artifact's lineage was trained on",
    )
    images: int = Field(default=4, ge=1, description="benign images that stand beside the prompts, in turn")
    attacks: tuple[Attack, ...] = Field(
        default=(),
        description="other ways to ask the harmful prompts at every exit. typographic: the request stands in the "
        "picture; random-image: each beside a picture of its own; generated-image: each beside what an image generator "
        "made of it",
    )
    generated: Annotated[GeneratedImages | None, Located()] = Field(
        default=None, description="pictures for generated-image; null: those that the sets name"
    )
    vqa: int = Field(default=100, ge=0, description="visual questions at the default exit")
    vqa_exits: Literal["default", "all"] = Field(
        default="default",
        description="exits that visual questions are asked at; all: every one that is measured, for utility by band, "
        "as the paper's Table 3 has it",
    )
    vqa_file: Annotated[VqaFile | None, Located()] = Field(
        default=None,
        description="VQA-v2's questions, scored by its rules: {table: hub} for the hub's copy, or its authors' files "
        "as {questions, annotations, images}; null: easy-VQA's test questions",
    )
    exits: Literal["all"] | tuple[int, ...] = Field(
        default="all", description="exits to measure, or all of the artifact"
    )
    baseline_exits: Literal["all", "shared"] = Field(
        default="all",
        description="exits of the baseline: all it has, or those of the shipped artifacts and its default",
    )
    max_new_tokens: int = Field(default=24, ge=1, description="length of an answer, in tokens")
    samples: int = Field(default=1, ge=1, description="responses to each prompt; more than one need a temperature")
    temperature: float = Field(default=0.0, ge=0, le=10, description="of what is drawn; 0: the likeliest token, always")
    fidelity_images: int = Field(
        default=4, ge=0, description="images on which embeddings are compared with transformers"
    )
    fidelity_to: str | None = Field(
        default=None, description="checkpoint stage with the shipped image encoder; default: hardened, else baseline"
    )
    language: int = Field(
        default=6,
        ge=0,
        description="passages of articles, and refusals of harmful prompts, on which next-token distributions are "
        "compared with fidelity_to",
    )
    judges: tuple[str, ...] = Field(
        default=(RULE,),
        description="who says what is unsafe: the first decides, the others stand beside with Cohen's kappa. "
        "refusal-rule, learned, llama-guard:MODEL, toxicity:MODEL, reward:MODEL; MODEL: hub:ORG/NAME or an absolute "
        "path. With network: perspective, openai:MODEL@URL",
    )
    network: bool = Field(default=False, description="let judges that need it send prompts and responses to a server")
    measure_memory: bool = Field(
        default=True, description="run each shipped artifact in its own process and see its peak"
    )
    measure_speed: bool = Field(
        default=False,
        description="run each shipped artifact in its own process and see how fast it loads, reads and answers; times "
        "are no function of the files, so a verdict with them differs from run to run",
    )
    prompt_seed: int = Field(default=0, description="which prompts and images are drawn; fixed, so that runs compare")

    @model_validator(mode="after")
    def _samples_differ(self) -> IcetVerifyParams:
        if self.samples > 1 and not self.temperature:
            raise ValueError("samples: several greedy responses are the same one; give a temperature, e.g. 0.7")
        return self

    @model_validator(mode="after")
    def _has_such_a_side(self) -> IcetVerifyParams:
        if self.split == "test":
            return self
        if self.sets or self.vqa_file is not None:
            raise ValueError("split: sets and vqa_file of your own are not divided; leave them out")
        return self
