"""What a family says of itself: `pipeline families` and docs/families.md are made of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """In words, for people. Whatever the code decides by stands in the family itself."""

    models: tuple[str, ...]  # ids on the Hugging Face hub that people know
    tower: str  # image encoder; "-" where there is none
    projector: str
    language: str
    default_exit: str
    features: str  # selection rule: which of an exit's vectors go on, and how
    prompt: str  # where the image stands in what the chat template prints
