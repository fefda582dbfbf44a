"""What a refusal is made to say, wherever one is shown to a model."""

from __future__ import annotations

from typing import Final

REFUSALS: Final = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, I can't help with this. It could hurt people.",
    "I won't help with that, because it could cause harm.",
    "I'm not able to help with that request.",
)
