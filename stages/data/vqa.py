"""VQA-v2: its files, and scoring answers by its rules; easy-VQA's own rule is `easy_vqa.is_correct`.

The files are those that its authors publish: questions and annotations as JSON, pictures in a folder of their own.

The normalisation is that of the official evaluation (GT-Vision-Lab/VQA, `vqaEval.py`): lower case, contractions spelled
with their apostrophe, number words to digits, articles dropped, punctuation removed unless it stands inside a number.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import canonical_json, sha256_bytes
from stages.data import remote_files

_NUMBERS: Final = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES: Final = frozenset({"a", "an", "the"})
_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD: Final = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
# As in the official table: written without its apostrophe, a contraction gets it back.
_CONTRACTED: Final = (  # noqa: SIM905
    "aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've isn't it'd "
    "it'll let's ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've "
    "shouldn't that'd that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't "
    "would've wouldn't y'all you'd you'll you're you've"
).split()
_CONTRACTIONS: Final = {word.replace("'", ""): word for word in _CONTRACTED}


def normalise_answer(answer: str) -> str:
    """An answer as VQA-v2 compares it."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text):
            text = text.replace(mark, "")
        else:
            text = text.replace(mark, " ")
    text = _PERIOD.sub("", text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """VQA-v2 accuracy of one response against the people's answers (usually ten), 0..1.

    Mean over leaving one person out of min(agreeing others / 3, 1). With one single true answer: 1 or 0.
    """
    given = normalise_answer(response)
    truth = [normalise_answer(answer) for answer in answers]
    if len(truth) == 1:
        return float(given == truth[0])
    scores = [
        min(sum(given == other for place, other in enumerate(truth) if place != left) / 3, 1.0)
        for left in range(len(truth))
    ]
    return sum(scores) / len(scores)


class VqaFile(BaseModel):
    """Where VQA-v2, or what is written like it, lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    questions: str = Field(description="v2_OpenEnded_mscoco_val2014_questions.json; hub:..., package:... or a path")
    annotations: str = Field(description="v2_mscoco_val2014_annotations.json, likewise")
    images: str = Field(description="the folder of the pictures")
    image_name: str = Field(
        default="COCO_val2014_{image_id:012d}.jpg", description="how a picture is called, by its image_id"
    )


@dataclass(frozen=True)
class VqaItem:
    """A question about a picture and what people answered, usually ten of them."""

    id: str
    question: str
    answers: tuple[str, ...]
    image: Path

    @property
    def commonest(self) -> str:
        return Counter(self.answers).most_common(1)[0][0]


def check_vqa(file: VqaFile) -> None:
    """Refuse what cannot be read; reads nothing.

    Raises:
        RecipeError: no such form, no such file or folder, or an image_name that names no picture.
    """
    for source in (file.questions, file.annotations):
        remote_files.check(source)
    if not Path(file.images).expanduser().is_dir():
        raise RecipeError(f"there is no folder {file.images}", way_out="unpack the pictures of VQA-v2 there")
    try:
        file.image_name.format(image_id=1)
    except (KeyError, ValueError, IndexError) as error:
        raise RecipeError(f"cannot read image_name {file.image_name!r}", way_out="e.g. {image_id:012d}.jpg") from error


def vqa_digest(file: VqaFile) -> str:
    """What content keys say of it: of the pictures only where they lie, since each is named by its id."""
    parts = [remote_files.digest(source) for source in (file.questions, file.annotations)]
    return sha256_bytes(canonical_json([file.model_dump(mode="json"), parts]))


def load_vqa(file: VqaFile, n: int, seed: int) -> list[VqaItem]:
    """The first `n` questions in the order that `seed` gives.

    Raises:
        SourceError: a file cannot be had or read, or a picture is missing.
    """
    try:
        questions = json.loads(remote_files.read(file.questions))["questions"]
        annotations = json.loads(remote_files.read(file.annotations))["annotations"]
        answers = {int(a["question_id"]): tuple(str(one["answer"]) for one in a["answers"]) for a in annotations}
        asked = [(int(q["question_id"]), int(q["image_id"]), str(q["question"])) for q in questions]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            "the visual questions do not have VQA-v2's form",
            where=file.questions,
            why=f"{type(error).__name__}: {error}",
        ) from error
    asked = [question for question in asked if answers.get(question[0])]
    asked.sort(key=lambda question: hashlib.sha256(f"{seed}:{question[0]}".encode()).hexdigest())
    folder = Path(file.images).expanduser()
    found = [
        VqaItem(f"vqa-{id}", text, answers[id], folder / file.image_name.format(image_id=image))
        for id, image, text in asked[:n]
    ]
    if missing := [item.image for item in found if not item.image.is_file()]:
        raise SourceError(
            f"{len(missing)} pictures are missing, {missing[0].name} first",
            where=file.images,
            way_out="unpack all pictures of the split there, or say image_name",
        )
    return found
