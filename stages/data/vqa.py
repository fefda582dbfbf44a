"""Scoring answers to visual questions by the rules of VQA-v2; easy-VQA's own rule is `easy_vqa.is_correct`.

The normalisation is that of the official evaluation (GT-Vision-Lab/VQA, `vqaEval.py`): lower case, contractions spelled
with their apostrophe, number words to digits, articles dropped, punctuation removed unless it stands inside a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

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
