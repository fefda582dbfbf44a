"""How useful each exit of a checkpoint is: easy-VQA accuracy on validation pictures, in the transformers runtime.

The questions are `easy_vqa.validation_questions`: nothing trains on them and no gate measures on them, so an exit may
be chosen by them. Every exit is asked the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from artifacts.disk import write_atomically
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json
from stages.data import easy_vqa
from stages.runtimes.runtime import Request
from stages.runtimes.transformers import TransformersRuntime

_ANSWER_TOKENS: Final = 8  # "It is a blue triangle." fits
_KEPT: Final = "utility.json"

Told = Callable[[int, int], None]
"""Exits done, exits in all."""


@dataclass(frozen=True)
class Utility:
    """`right` of `asked` questions were answered right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


def validation_utility(
    folder: Path,
    exits: Sequence[int],
    n: int,
    *,
    size: int,
    seed: int,
    scratch: Path,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    told: Told = lambda done, total: None,
) -> dict[int, Utility]:
    """Ask `n` questions at each of these exits of the checkpoint in `folder`.

    Args:
        size: of the pictures, in pixels: what the encoder takes.
        scratch: where finished exits are noted, so that a run that is killed goes on after them.

    Raises:
        SourceError: the wheel or the checkpoint cannot be read.
    """
    found = _noted(scratch)
    if set(exits) - found.keys():
        questions = easy_vqa.validation_questions(n, seed)
        place = cache_dir() / "images" / "easy-vqa-1.0" / "train"
        paths = easy_vqa.export_images(place, "train", [question.image for question in questions], size)
        with TransformersRuntime(folder, dtype=dtype) as runtime:
            for done, exit in enumerate(exits):
                told(done, len(exits))
                if exit in found:
                    continue
                answers = runtime.generate(
                    [
                        Request(question.question, path, exit, _ANSWER_TOKENS)
                        for question, path in zip(questions, paths, strict=True)
                    ]
                )
                right = sum(
                    easy_vqa.is_correct(answer.text, question.answer)
                    for answer, question in zip(answers, questions, strict=True)
                )
                found[exit] = Utility(right, len(questions))
                _note(scratch, found)
    return {exit: found[exit] for exit in exits}


def earliest_within(utility: Mapping[int, Utility], default: int, tolerance: float) -> int:
    """The earliest exit whose share of right answers is at most `tolerance` below that of the default exit."""
    least = utility[default].share - tolerance - 1e-9
    return min(exit for exit, measured in utility.items() if measured.share >= least)


def _noted(scratch: Path) -> dict[int, Utility]:
    try:
        noted = json.loads((scratch / _KEPT).read_bytes())
        return {int(exit): Utility(int(right), int(asked)) for exit, (right, asked) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _note(scratch: Path, found: Mapping[int, Utility]) -> None:
    noted = {str(exit): [measured.right, measured.asked] for exit, measured in found.items()}
    write_atomically(scratch / _KEPT, canonical_json(noted), scratch)
