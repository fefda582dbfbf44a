"""One file of the user's own, wherever it lies: `hub:ORG/NAME!PATH`, `package:NAME==VERSION!PATH`, or a path."""

from __future__ import annotations

from pathlib import Path

from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import sha256_file
from stages.data import hub, package


def check(source: str) -> None:
    """Refuse what cannot be a file; reads nothing.

    Raises:
        RecipeError: no such form, or no such local file.
    """
    kind = source.partition(":")[0]
    try:
        if kind == "hub":
            hub.DataFile.parse(source)
        elif kind == "package":
            package.parse(source)
        elif not Path(source).expanduser().is_file():
            raise RecipeError(f"there is no file {source}", way_out="write ./FILE, hub:... or package:...")
    except ValueError as error:
        raise RecipeError(str(error), way_out="for example hub:ORG/NAME!prompts.csv") from error


def read(source: str) -> bytes:
    """Its content; downloaded if need be.

    Raises:
        SourceError: it cannot be had or read.
    """
    kind = source.partition(":")[0]
    if kind == "package":
        return package.read_member(source)
    path = hub.DataFile.parse(source).fetch() if kind == "hub" else Path(source).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read", where=str(path), why=error.strerror) from error


def digest(source: str) -> str:
    """What content keys say of it beside its name: a hub's commit, a local file's digest; of a pinned wheel nothing."""
    kind = source.partition(":")[0]
    if kind == "hub":
        return hub.DataFile.parse(source).commit()
    path = Path(source).expanduser()
    return sha256_file(path) if kind != "package" and path.is_file() else ""


def is_remote(source: str) -> bool:
    """Whether `pipeline fetch` has to bring it."""
    return source.startswith(("hub:", "package:"))
