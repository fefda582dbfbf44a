"""Where a recipe or a command publishes to.

oci-layout:FOLDER[:TAG]   an OCI image layout          oci:HOST/NAME[:TAG]   a registry
folder:FOLDER             the bundle itself            hf:USER/NAME          a Hugging Face repository
ollama:[USER/]NAME[:TAG]  a model of an Ollama server
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from artifacts.errors import RecipeError
from artifacts.registry.place import LAYOUT, REGISTRY, Reference

FOLDER: Final = "folder:"
HUB: Final = "hf:"
OLLAMA: Final = "ollama:"
SCHEMES: Final = (LAYOUT, REGISTRY, FOLDER, HUB, OLLAMA)


@dataclass(frozen=True)
class Target:
    """Where to publish. `name` is a reference or model without its tag, a folder or a hub id."""

    scheme: str
    name: str
    tag: str = ""

    @classmethod
    def parse(cls, text: str) -> Target:
        """Understand a target.

        Raises:
            RecipeError: it is none, or it carries credentials.
        """
        scheme = next((known for known in SCHEMES if text.startswith(known)), "")
        name = text.removeprefix(scheme)
        if not scheme or not name:
            raise RecipeError(
                f"cannot publish to {text!r}" if "@" not in text else "cannot publish there",
                way_out="write oci-layout:FOLDER, oci:HOST/NAME:TAG, folder:FOLDER, hf:USER/NAME or ollama:NAME",
            )
        if scheme == FOLDER:
            return cls(scheme, str(Path(name).expanduser()))
        if scheme == HUB:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
                raise RecipeError(f"{name!r} is no name on the Hugging Face hub", way_out="write hf:USER/NAME")
            return cls(scheme, name)
        if scheme == OLLAMA:
            found = re.fullmatch(r"([a-z0-9][\w.-]*(?:/[a-z0-9][\w.-]*)?)(?::([\w.-]+))?", name)
            if found is None:
                raise RecipeError(
                    f"{name!r} is no name of a model in Ollama", way_out="write ollama:NAME or ollama:NAME:TAG"
                )
            return cls(scheme, found[1], found[2] or "")
        reference = Reference.parse(text)
        if reference.reference.startswith("sha256:"):
            raise RecipeError("a digest is what publishing ends with", way_out="give a tag, or nothing")
        return cls(scheme, reference.repository, reference.reference)
