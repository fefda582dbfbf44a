"""A user's own text to calibrate on, cut into pieces; those that repeat what a verdict asks are left out.

A piece repeats a test or validation article if they share 13 words in a row (the criterion of Brown et al. 2020,
arXiv 2005.14165, appendix C), and a prompt if that stands in it as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final, Literal

from artifacts.errors import SourceError
from artifacts.manifest import sha256_bytes
from stages.data import articles, remote_files
from stages.data.prompt_sets import SETS
from stages.data.prompts import load_prompts, normalise

_IN_A_ROW: Final = 13  # words
_WHOLE: Final = 5  # words that a prompt has at least, to be told from ordinary language
_VALIDATION: Final = 0.15  # of the pieces
_ENDS: Final = 3  # tokens that a tokenizer may put around a text


def pieces(source: str, side: Literal["train", "validation"], letters: int, seed: int = 0) -> tuple[list[str], int]:
    """Pieces of about so many letters, cut between words, in the order that `seed` gives; and how many were left out.

    Args:
        source: plain text in UTF-8, as `remote_files` names it.

    Raises:
        SourceError: it cannot be read, is no text, or nothing is left of it.
    """
    every = list(_cut(_text(source), letters))
    kept = [piece for piece in every if not _repeats(normalise(piece))]
    here = [piece for piece in kept if (_place(piece) < _VALIDATION) == (side == "validation")]
    if not here:
        raise SourceError(
            "the calibration text has no passage to calibrate on",
            where=source,
            why=f"of {len(every)} pieces {len(every) - len(kept)} repeat what tests ask",
            way_out="give a longer text, or leave `texts` out for Wikipedia articles",
        )
    here.sort(key=lambda piece: sha256_bytes(f"{seed}:{piece}".encode()))
    return here, len(every) - len(kept)


def check(source: str, length: int) -> None:
    """Refuse what holds no passage of so many tokens, however it is cut into them.

    Raises:
        SourceError: that, or as `pieces`.
    """
    size = len(_text(source).strip().encode())
    if size + _ENDS < length:
        raise SourceError(
            f"the calibration text has no passage of {length} tokens",
            where=source,
            why=f"it has {size} bytes, and a token stands for one at least",
            way_out="give a longer text, or a smaller length",
        )


def holding(source: str, prompts: Sequence[str]) -> set[int]:
    """The places of those prompts that stand in a text as a whole, by the rule that leaves out pieces with ours.

    Raises:
        SourceError: as `pieces`.
    """
    text = normalise(_text(source))
    wanted = [normalise(prompt) for prompt in prompts]
    return {place for place, prompt in enumerate(wanted) if _tells(prompt) and prompt in text}


def _text(source: str) -> str:
    try:
        return remote_files.read(source).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            "the calibration text is not plain text in UTF-8",
            where=source,
            why=f"byte {error.start} is none of its",
            way_out="give a .txt file; of other files the texts alone, one below the other",
        ) from error


def _tells(prompt: str) -> bool:
    return len(prompt.split()) >= _WHOLE


def _cut(text: str, letters: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + letters
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space if space > start else end
        if piece := text[start:end].strip():
            yield piece
        start = end


def _repeats(piece: str) -> bool:
    rows, prompts = _asked()
    return not rows.isdisjoint(_rows(piece.split())) or any(prompt in piece for prompt in prompts)


@cache
def _asked() -> tuple[frozenset[str], tuple[str, ...]]:
    """Words in a row of the articles, and the prompts, that nothing may be calibrated on."""
    sides: tuple[Literal["test", "validation"], ...] = ("test", "validation")
    texts = [article.text for side in sides for article in articles.load_articles(side)]
    rows = frozenset(row for text in texts for row in _rows(normalise(text).split()))
    prompts = [normalise(prompt.text) for name in SETS for side in sides for prompt in load_prompts(name, side)]
    return rows, tuple(dict.fromkeys(filter(_tells, prompts)))


def _rows(words: Sequence[str]) -> Iterator[str]:
    return (" ".join(words[start : start + _IN_A_ROW]) for start in range(len(words) - _IN_A_ROW + 1))


def _place(piece: str) -> float:
    return int(sha256_bytes(piece.encode())[:8], 16) / 16**8
