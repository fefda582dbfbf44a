"""An artifact: an immutable folder plus `manifest.json`; its digest is its identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic

from artifacts.errors import StoreError
from artifacts.manifest import MANIFEST_NAME, Manifest, sha256_file


@dataclass(frozen=True)
class Artifact:
    """A folder whose content is described by its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Open the artifact at `path` without reading its files.

        Raises:
            StoreError: no manifest there, or it cannot be read.
        """
        try:
            return cls(path=path, manifest=Manifest.read(path))
        except FileNotFoundError as error:
            raise StoreError(
                f"no artifact at {path}",
                why=f"there is no {MANIFEST_NAME} in that folder",
                way_out="give the folder of an artifact, or a digest that `pipeline runs` shows",
            ) from error
        except (pydantic.ValidationError, ValueError, OSError) as error:
            raise StoreError(f"the manifest of {path} cannot be read", why=str(error)) from error

    @property
    def type(self) -> str:
        return self.manifest.type

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def metadata(self) -> dict[str, object]:
        return self.manifest.metadata

    @property
    def default_exit(self) -> int | None:
        """The exit that a model calls its own; None if it says nothing."""
        found = self.metadata.get("default_exit")
        return found if isinstance(found, int) else None

    def file(self, name: str) -> Path:
        """The path of one file of the artifact.

        Raises:
            StoreError: the manifest does not list it.
        """
        if not any(entry.path == name for entry in self.manifest.files):
            listed = ", ".join(entry.path for entry in self.manifest.files)
            raise StoreError(f"artifact {self.digest[:12]} has no file {name!r}", why=f"it holds: {listed}")
        return self.path / name

    def damage(self, *, beside: bool = False) -> list[str]:
        """Every way in which the files differ from the manifest, in words; empty when all is well.

        beside: whether other files may lie there, as in a bundle.
        """
        found: list[str] = []
        listed = {entry.path for entry in self.manifest.files}
        for entry in self.manifest.files:
            path = self.path / entry.path
            if path.is_symlink() or not path.is_file():
                found.append(f"{entry.path} is missing")
            elif path.stat().st_size != entry.size:
                found.append(f"{entry.path} has {path.stat().st_size} bytes, not {entry.size}")
            elif sha256_file(path) != entry.sha256:
                found.append(f"{entry.path} does not have the digest of its manifest")
        for path in () if beside else sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in listed and name != MANIFEST_NAME:
                found.append(f"{name} is not in the manifest")
        return found
