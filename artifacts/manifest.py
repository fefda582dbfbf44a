"""`manifest.json`: what an artifact is, what is in it, and where it came from.

The digest of an artifact is the SHA-256 of its *identity*: type, files (path, size, SHA-256) and metadata, as canonical
JSON. Provenance (stage, key, inputs) stands beside it and is not part of the identity, so two ways of making the same
bytes give the same artifact. Times and host facts live in the run's events, never here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

MANIFEST_NAME: Final = "manifest.json"

# A recursive JSON alias trips pydantic's schema builder under mypy strict; values are checked by canonical_json.
type_json = str | int | float | bool | None
JSON = type_json | Sequence["JSON"] | Mapping[str, "JSON"]


def canonical_json(value: object) -> bytes:
    """`value` as the one JSON text that stands for it: sorted keys, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: NaN or infinity. TypeError: not JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Full lower-case hexadecimal SHA-256, never shortened."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Full lower-case hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class FileEntry(BaseModel):
    """One file of an artifact; `path` is relative, with forward slashes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Training(BaseModel):
    """What a model was trained on by this program."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: tuple[str, ...] = ()  # that trained it on our training prompts, the first one first
    complete: bool = False  # whether that is all: False where a model came from elsewhere

    def then(self, stage: str) -> Training:
        """After one more stage that trains."""
        return Training(stages=tuple(dict.fromkeys((*self.stages, stage))), complete=self.complete)


class Provenance(BaseModel):
    """How the artifact was made the first time; not part of its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str = ""  # the `uses:` name
    code_version: str = ""
    key: str = ""  # content key, 64 hex digits
    params: dict[str, object] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)  # stage id -> artifact digest
    seed: int = 0
    libraries: dict[str, str] = Field(default_factory=dict)  # distribution -> version
    training: Training | None = None  # up to and including this stage; None: written before this was recorded


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    type: str  # "checkpoint", "gguf", "verdict", ...
    files: tuple[FileEntry, ...]
    metadata: dict[str, object] = Field(default_factory=dict)
    provenance: Provenance = Provenance()

    @property
    def digest(self) -> str:
        """SHA-256 over type, files and metadata (64 hex digits)."""
        identity = {
            "schema_version": self.schema_version,
            "type": self.type,
            "files": [entry.model_dump() for entry in sorted(self.files, key=lambda entry: entry.path)],
            "metadata": self.metadata,
        }
        return sha256_bytes(canonical_json(identity))

    @classmethod
    def of_folder(
        cls, folder: Path, type: str, metadata: Mapping[str, object], provenance: Provenance | None = None
    ) -> Manifest:
        """Describe every file below `folder` (a manifest already there is not counted)."""
        entries = [
            FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST_NAME
        ]
        return cls(type=type, files=tuple(entries), metadata=dict(metadata), provenance=provenance or Provenance())

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`.

        Raises:
            OSError: it cannot be read. pydantic.ValidationError: it is not a manifest.
        """
        return cls.model_validate_json((folder / MANIFEST_NAME).read_bytes())
