"""A model's licence: read from its card where it comes in, and told on by every stage that changes the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from artifacts.artifact import Artifact

_LINE: Final = re.compile(r"^license: *['\"]?([\w.+-]+)['\"]? *$", re.MULTILINE)


def licence_of(folder: Path) -> dict[str, str]:
    """`{"license": SPDX identifier}` from the metadata on top of README.md; nothing where nobody says."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    top = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = _LINE.search(top)
    return {"license": found[1].lower()} if found else {}


def inherited(source: Artifact) -> dict[str, str]:
    """What the checkpoint's manifest says, for that of what is made of it."""
    licence = source.metadata.get("license")
    return {"license": licence} if isinstance(licence, str) else {}
