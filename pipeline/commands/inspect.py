"""What an artifact is: manifest, files, where it came from, and whether its bytes are sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.device import show_bytes

if TYPE_CHECKING:
    from artifacts.artifact import Artifact


@dataclass(frozen=True)
class Ancestor:
    """One step of the lineage; `depth` 0 is the artifact itself."""

    depth: int
    name: str  # stage id in the recipe that asked for it; "" for the artifact itself
    stage: str  # `uses:` name
    digest: str
    here: bool  # whether the store has it


@dataclass(frozen=True)
class Inspection:
    """The answer of `pipeline inspect`."""

    artifact: Artifact
    lineage: tuple[Ancestor, ...]
    damage: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return {
            "digest": self.artifact.digest,
            "path": str(self.artifact.path),
            "manifest": self.artifact.manifest.model_dump(mode="json"),
            "lineage": [ancestor.__dict__ for ancestor in self.lineage],
            "damage": list(self.damage),
        }


def inspect_artifact(artifact: Artifact) -> Inspection:
    """Read every byte of the artifact and follow its inputs through the store."""
    return Inspection(artifact, tuple(_lineage(artifact)), tuple(artifact.damage()))


def _lineage(artifact: Artifact) -> list[Ancestor]:
    from artifacts.artifact import Artifact as Opened
    from artifacts.errors import StoreError
    from pipeline.commands.load import open_store

    store = open_store()
    found: list[Ancestor] = []
    seen: set[str] = set()

    def follow(one: Artifact, name: str, depth: int) -> None:
        found.append(Ancestor(depth, name, one.manifest.provenance.stage, one.digest, True))
        if one.digest in seen:
            return
        seen.add(one.digest)
        for parent, digest in one.manifest.provenance.inputs.items():
            try:
                follow(Opened.open(store.object_path(digest)), parent, depth + 1)
            except StoreError:
                found.append(Ancestor(depth + 1, parent, "", digest, False))

    follow(artifact, "", 0)
    return found


def show_inspection(inspection: Inspection) -> str:
    """The inspection as text."""
    artifact = inspection.artifact
    manifest = artifact.manifest
    lines = [f"{manifest.type}  {artifact.digest}", f"in {artifact.path}", "", "files"]
    width = max((len(entry.path) for entry in manifest.files), default=0)
    lines += [
        f"  {entry.path.ljust(width)}  {show_bytes(entry.size):>10}  sha256 {entry.sha256}" for entry in manifest.files
    ]
    lines += ["", "metadata", *_mapping(manifest.metadata)]
    made = manifest.provenance
    if made.stage:
        lines += ["", f"made by {made.stage} (code {made.code_version}, seed {made.seed})", *_mapping(made.params)]
        lines += [f"  with {', '.join(f'{name} {version}' for name, version in made.libraries.items())}"] * bool(
            made.libraries
        )
    lines += ["", "lineage"]
    for step in inspection.lineage:
        label = f"{step.name}: " if step.name else ""
        lines.append(
            f"  {'  ' * step.depth}{label}{step.stage or 'unknown'} {step.digest[:12]}"
            + ("" if step.here else "  (no longer in the store)")
        )
    lines += ["", "damage", *(f"  {problem}" for problem in inspection.damage or ("none: every byte was read",))]
    return "\n".join(lines)


def _mapping(values: dict[str, object]) -> list[str]:
    def short(value: object) -> str:
        text = str(value)
        return text if len(text) <= 100 else f"{text[:97]}..."

    return [f"  {key}: {short(value)}" for key, value in values.items()]
