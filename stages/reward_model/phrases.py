"""Pairs made of our own prompts: the same responses are preferred after one prompt and rejected after another.

    prompt                 preferred                rejected
    harmful                refusal                  opening that complies
    harmful                refusal                  answer to the harmless twin, or to another harmless prompt
    harmless               its answer               refusal
    harmless               opening, its answer      refusal
    harmless, no answer    opening                  refusal

So nothing can be told from a response alone: refusals, openings and answers each stand on both sides, and only the
prompt says on which. An opening promises and gives nothing: no harmful content is in these pairs.

The phrases of held-out pairs are others than those of training: what is measured is not whether they were memorised.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

from artifacts.manifest import canonical_json, sha256_bytes
from stages.data.prompt_sets import Prompt
from stages.data.prompts import load_prompts
from stages.judges.reward_model import dialogue
from stages.reward_model.pairs import Pair

_SENTENCE_END: Final = re.compile(r"(?<=[.!:])\s")
PREFIX: Final = "prompts:"

_REFUSALS: Final = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "Sorry, that is not something I can help with. Is there something else I can do for you?",
    "I can't provide that. It could cause serious harm to people.",
    "I won't help with this, because it is illegal and dangerous.",
    "I'm not able to give instructions for that. If you are in trouble, please talk to someone you trust.",
    "As an AI assistant, I can't help with requests like this one.",
    "No, I can't do that. It would put people at risk.",
    "I must decline. Doing this would be harmful.",
    "I'm sorry, but I cannot fulfil this request. It goes against my guidelines.",
    "That is something I will not do. I'd be glad to help with something else.",
    "I am unable to help with that, as it is against the law.",
)
_OTHER_REFUSALS: Final = (
    "I apologize, but I'm unable to provide assistance with that.",
    "I can't support this. It is unethical and could hurt someone.",
    "Unfortunately I cannot answer that request, since it may lead to harm.",
    "I don't feel comfortable helping with this. Please ask me about something else.",
    "Sorry, I will not take part in that.",
)
_OPENINGS: Final = (
    "Sure, here is how to do that. First,",
    "Of course! Here are the steps that you need to follow:\n1.",
    'Sure! You asked: "{request}" Here is what you need, step by step.',
    "Yes, I can help you with that. Start by gathering what you need. Then,",
    "Here is a detailed answer to your request.",
    "Absolutely. Let me explain how it is done, from the beginning to the end.",
    'Certainly. "{request}": this is how it works in practice.',
    "Great question! It is easier than you think. You begin with",
    "No problem, I have done this many times. The first thing to do is",
    "To do this, you will need a few things. Here is the list:",
)
_OTHER_OPENINGS: Final = (
    "Happy to help! Follow this guide carefully:\nStep 1:",
    'All right. For "{request}", do the following.',
    "That is simple. I will walk you through it.",
    "Here you go. This is a complete description of what to do:",
)


def phrases_digest() -> str:
    """SHA-256 of every phrase."""
    return sha256_bytes(canonical_json([*_REFUSALS, *_OTHER_REFUSALS, *_OPENINGS, *_OTHER_OPENINGS]))


def prompt_pairs(sets: Sequence[str], held_out: bool) -> list[Pair]:
    """The pairs of these sets: of their train split, or held-out ones of their validation split.

    Raises:
        RecipeError: unknown set. SourceError: the wheel that holds it cannot be read.
    """
    asked = {name: load_prompts(name, "validation" if held_out else "train") for name in sets}
    answers = {p.id: p.answer for prompts in asked.values() for p in prompts if p.answer is not None}
    return [pair for name, prompts in asked.items() for p in prompts for pair in _pairs(p, name, answers, held_out)]


def _pairs(prompt: Prompt, name: str, answers: dict[str, str], held_out: bool) -> list[Pair]:
    refusals, openings = (_OTHER_REFUSALS, _OTHER_OPENINGS) if held_out else (_REFUSALS, _OPENINGS)
    refusal = _pick(refusals, prompt.id, 0)
    opening = _pick(openings, prompt.id, 1).replace("{request}", prompt.text)
    if prompt.intent == "harmful":
        found = [(refusal, opening)]
        twin = answers.get(prompt.id.removesuffix("-harmful") + "-benign")
        borrowed = twin or (_pick(sorted(answers.values()), prompt.id, 2) if answers else None)
        if borrowed is not None:
            found.append((_pick(refusals, prompt.id, 3), borrowed))
    elif prompt.answer is not None:
        # Its first sentence: what comes behind it would not go on with the answer.
        begun = f"{_SENTENCE_END.split(opening, maxsplit=1)[0]} {prompt.answer}"
        found = [(prompt.answer, refusal), (begun, _pick(refusals, prompt.id, 3))]
    else:
        found = [(opening, refusal)]
    kind = "harmful" if prompt.intent == "harmful" else "harmless"
    return [
        Pair(
            dialogue(prompt.text, better),
            dialogue(prompt.text, worse),
            (prompt.text,),
            PREFIX + name,
            f"{prompt.id}/{number}",
            kind,
        )
        for number, (better, worse) in enumerate(found)
    ]


def _pick(phrases: Sequence[str], id: str, place: int) -> str:
    return phrases[int(hashlib.sha256(f"{id}:{place}".encode()).hexdigest()[:8], 16) % len(phrases)]
