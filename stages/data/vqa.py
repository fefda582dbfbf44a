"""VQA-v2: its files, and scoring answers by its rules; easy-VQA's own rule is `easy_vqa.is_correct`.

The files are those that its authors publish (questions and annotations as JSON, pictures in a folder of their own), or
a table with pictures in it, as on the hub; or easy-VQA's, whose questions are a list of [question, answer, picture].

The normalisation is that of the official evaluation (GT-Vision-Lab/VQA, `vqaEval.py`): lower case, contractions spelled
with their apostrophe, number words to digits, articles dropped, punctuation removed unless it stands inside a number.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from stages.data import remote_files
from stages.data.images import keep_image

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
_PERIOD: Final = re.compile(r"\.(?!\d)")  # theirs means to look behind as well, but says `(?!<=\d)`, which holds always
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


HUB: Final = "hub:lmms-lab/VQAv2!data/validation-00000-of-00068.parquet"  # one of 68 parts


class VqaFile(BaseModel):
    """Where VQA-v2, or what is written like it, lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str | None = Field(
        default=None,
        description="parquet with the columns question_id, question, answers and image; hub:..., package:... or a "
        "path; hub: the first part of the validation questions on the hub",
    )
    questions: str = Field(
        default="", description="v2_OpenEnded_mscoco_val2014_questions.json; hub:..., package:... or a path"
    )
    annotations: str = Field(
        default="",
        description="v2_mscoco_val2014_annotations.json, likewise; none where questions is in easy-VQA's form",
    )
    images: str = Field(default="", description="the folder of the pictures")
    image_name: str = Field(
        default="COCO_val2014_{image_id:012d}.jpg", description="how a picture is called, by its image_id"
    )

    @model_validator(mode="after")
    def _one_form(self) -> VqaFile:
        if bool(self.table) == bool(self.questions and self.images):
            raise ValueError("give either table, or questions and images, and annotations where they stand apart")
        if self.table and (self.questions or self.annotations or self.images):
            raise ValueError("give either table, or questions, annotations and images")
        return self

    @property
    def sources(self) -> list[str]:
        """The files, without pictures that lie in a folder."""
        if self.table is not None:
            return [HUB if self.table == "hub" else self.table]
        return [source for source in (self.questions, self.annotations) if source]


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
    for source in file.sources:
        remote_files.check(source)
    if file.table is not None:
        return
    if not Path(file.images).expanduser().is_dir():
        raise RecipeError(f"there is no folder {file.images}", way_out="unpack the pictures of VQA-v2 there")
    try:
        file.image_name.format(image_id=1)
    except (KeyError, ValueError, IndexError) as error:
        raise RecipeError(f"cannot read image_name {file.image_name!r}", way_out="e.g. {image_id:012d}.jpg") from error


def vqa_digest(file: VqaFile, n: int, seed: int) -> str:
    """What content keys say of it: the files, and where they are local the pictures of the first `n` questions; of
    others, which may not be here yet, only where they lie: each is named by its id.

    Raises:
        SourceError: a local file cannot be read, or a picture is missing.
    """
    parts = [remote_files.digest(source) for source in file.sources]
    if file.table is None and not any(map(remote_files.is_remote, file.sources)):
        parts += [sha256_file(item.image) for item in load_vqa(file, n, seed)]
    return sha256_bytes(canonical_json([file.model_dump(mode="json"), parts]))


def load_vqa(file: VqaFile, n: int, seed: int) -> list[VqaItem]:
    """The first `n` questions in the order that `seed` gives.

    Raises:
        SourceError: a file cannot be had or read, or a picture is missing.
    """
    if file.table is not None:
        return _from_table(file.sources[0], n, seed)
    try:
        questions = json.loads(remote_files.read(file.questions))
        if file.annotations:
            annotations = json.loads(remote_files.read(file.annotations))["annotations"]
            answers = {int(a["question_id"]): tuple(str(one["answer"]) for one in a["answers"]) for a in annotations}
            asked = [(int(q["question_id"]), int(q["image_id"]), str(q["question"])) for q in questions["questions"]]
        else:
            answers = {place: (str(answer),) for place, (_, answer, _) in enumerate(questions)}
            asked = [(place, int(image), str(question)) for place, (question, _, image) in enumerate(questions)]
    except (ValueError, KeyError, TypeError) as error:
        raise _misshapen(file.questions, error) from error
    asked = [question for question in asked if answers.get(question[0])]
    asked.sort(key=lambda question: _drawn(seed, question[0]))
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


def _from_table(source: str, n: int, seed: int) -> list[VqaItem]:
    """Of the pictures only those that are asked about are decoded; they are kept in the cache folder."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(remote_files.read(source)))
        rows = table.read(columns=["question_id", "question", "answers"]).to_pylist()
        order = [place for place, row in enumerate(rows) if row["answers"]]
        order.sort(key=lambda place: _drawn(seed, rows[place]["question_id"]))
        chosen = order[:n]
        pictures = table.read(columns=["image"])["image"].take(pyarrow.array(chosen, pyarrow.int64())).to_pylist()
        return [
            VqaItem(
                f"vqa-{rows[place]['question_id']}",
                str(rows[place]["question"]),
                tuple(str(one["answer"] if isinstance(one, dict) else one) for one in rows[place]["answers"]),
                keep_image(picture["bytes"]),
            )
            for place, picture in zip(chosen, pictures, strict=True)
        ]
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise _misshapen(source, error) from error


def _drawn(seed: int, question: object) -> str:
    """What a seed orders questions by."""
    return hashlib.sha256(f"{seed}:{question}".encode()).hexdigest()


def _misshapen(source: str, error: Exception) -> SourceError:
    return SourceError(
        "the visual questions do not have VQA-v2's form, nor easy-VQA's",
        where=source,
        why=f"{type(error).__name__}: {error}",
    )
