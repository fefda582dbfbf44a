"""easy-VQA (MIT): 5,000 pictures of one coloured shape and 48,248 questions with one-word answers out of 13.

Read in place out of the pinned wheel. 4,000 pictures and 38,575 questions are for training, 1,000 and 9,673 for tests.
Of the training pictures the last hundred are kept for validation: nothing trains on them and no gate measures on them
(training reads numbers below 3,600; `stages.data.images` divides them alike).
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from stages.data import images, package

if TYPE_CHECKING:
    from PIL.Image import Image

VqaSplit = Literal["train", "test"]

_ROOT: Final = "package:easy-vqa==1.0!easy_vqa/data/"
SOURCES: Final = (_ROOT + "test/questions.json",)  # what `pipeline fetch` brings: one wheel holds everything
VALIDATION: Final = range(3900, 4000)  # numbers of training pictures
ANSWERS: Final = (
    *("circle", "green", "red", "gray", "yes", "teal", "black", "rectangle", "yellow", "triangle", "brown", "blue"),
    "no",
)
SHAPES: Final = frozenset({"circle", "rectangle", "triangle"})
TRUTH: Final = frozenset({"yes", "no"})
COLOURS: Final = frozenset(ANSWERS) - SHAPES - TRUTH
_KINDS: Final = {answer: kind for kind in (SHAPES, TRUTH, COLOURS) for answer in kind}


@dataclass(frozen=True)
class VqaQuestion:
    """One question about one picture; `answer` is one of `ANSWERS`."""

    question: str
    answer: str
    image: int  # number of the picture within its split


def load_questions(split: VqaSplit, n: int | None = None, seed: int = 0) -> list[VqaQuestion]:
    """All questions of a split in the order of the data set, or `n` of them drawn without replacement.

    Raises:
        SourceError: the wheel cannot be had.
    """
    questions = list(_questions(split))
    return questions if n is None else random.Random(seed).sample(questions, min(n, len(questions)))


def validation_questions(n: int, seed: int = 0) -> list[VqaQuestion]:
    """`n` questions about the pictures of `VALIDATION` (numbers in the train folder), as many a picture as needed.

    Open questions and yes/no ones in turn as far as there are both: always answering "no" must not pay. The first `n`
    of a longer list are the shorter list; there are 966.

    Raises:
        SourceError: the wheel cannot be had.
    """
    rng = random.Random(seed)
    by_picture: dict[int, list[VqaQuestion]] = {number: [] for number in VALIDATION}
    for question in _questions("train"):
        if question.image in by_picture:
            by_picture[question.image].append(question)
    turns: list[list[VqaQuestion]] = []
    for place, number in enumerate(rng.sample(VALIDATION, len(VALIDATION))):
        asked = rng.sample(by_picture[number], len(by_picture[number]))
        kinds = [[q for q in asked if (q.answer in TRUTH) == (closed == place % 2)] for closed in (False, True)]
        turns.append([question for pair in zip_longest(*kinds) for question in pair if question is not None])
    return [question for round in zip_longest(*turns) for question in round if question is not None][:n]


@cache
def _questions(split: VqaSplit) -> tuple[VqaQuestion, ...]:
    entries = json.loads(package.read_member(f"{_ROOT}{split}/questions.json"))
    return tuple(VqaQuestion(str(question), str(answer), int(image)) for question, answer, image in entries)


def load_images(split: VqaSplit, numbers: Sequence[int]) -> list[Image]:
    """The pictures of these numbers: 64 x 64 pixels, RGB.

    Raises:
        SourceError: the wheel cannot be had. KeyError: no such picture.
    """
    from PIL import Image

    with package.open_wheel("easy-vqa") as wheel:
        return [
            Image.open(io.BytesIO(wheel.read(f"easy_vqa/data/{split}/images/{number}.png"))).convert("RGB")
            for number in numbers
        ]


def export_images(folder: Path, split: VqaSplit, numbers: Sequence[int], size: int = 112) -> list[Path]:
    """Write pictures as PNG files of `size` x `size` pixels and return their paths, in the order of `numbers`.

    At the size that the model takes, no runtime resizes again, so runtimes can be compared pixel for pixel.

    Raises:
        SourceError: the wheel cannot be had. KeyError: no such picture. StageError: the folder cannot be written.
    """
    from PIL.Image import Resampling

    paths: list[Path] = []
    for number, image in zip(numbers, load_images(split, numbers), strict=True):
        path = folder / f"{split}-{number:04d}-{size}.png"
        buffer = io.BytesIO()
        image.resize((size, size), Resampling.BICUBIC).save(buffer, format="PNG")
        images.keep(path, buffer.getvalue())
        paths.append(path)
    return paths


def is_correct(response: str, answer: str) -> bool:
    """Whether a response gives the answer: equal after VQA-v2's normalisation, or the only answer that it names.

    The second part accepts "It is a blue triangle." for "triangle" to a shape question, but not "yes or no".
    """
    words = _normalise(response).split()
    if words == [answer]:
        return True
    named = {word for word in words if word in ANSWERS}
    same_kind = named & (_KINDS[answer])
    return same_kind == {answer}


def _normalise(text: str) -> str:
    """Lower case, punctuation and articles removed (the part of VQA-v2's rules that one-word answers need)."""
    plain = re.sub(r"[^\w\s]", " ", text.lower().replace("grey", "gray"))
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))
