"""A bundle: the folder that a user receives. It is one OCI manifest, laid out as files.

    model.gguf  mmproj.gguf  README.md ...   the layers, byte for byte, each under its title
    oci/manifest.json  oci/config.json       the manifest itself and its ModelPack config, as a registry has them
    attestations/                            what was signed about it: in a registry its referrers

So a folder and a reference are checked alike: the manifest's digest is the bundle's identity, everything that is signed
names it, and signing again changes no digest. The same files in the same order give the same manifest anywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from artifacts.disk import give_name, new_folder
from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from artifacts.registry.manifest import (
    ARTIFACT_TYPE,
    FILEPATH,
    MEDIA_CONFIG,
    RESERVED,
    TITLE,
    Descriptor,
    OciManifest,
    check_title,
    read_object,
)

MANIFEST_NAME: Final = f"{RESERVED[0]}/manifest.json"
CONFIG_NAME: Final = f"{RESERVED[0]}/config.json"
ATTESTATIONS: Final = RESERVED[1]
# Annotations of ours, beside the standard ones; no domain is claimed that is not ours.
ARTIFACT: Final = "icet-pipeline.artifact"  # digest of the artifact that ships
VERDICT: Final = "icet-pipeline.verdict"  # digests of the verdicts about it
UNVERIFIED: Final = "icet-pipeline.unverified"  # "true": published although a gate failed or was never checked
ROLE: Final = "icet-pipeline.role"  # of a layer: model, mmproj, config, card, licence, recipe, report, ...
_MEDIA: Final = {
    ".sigstore.json": "application/vnd.dev.sigstore.bundle.v0.3+json",
    ".intoto.json": "application/vnd.in-toto+json",
}
_OTHER_MEDIA: Final = "application/json"
ATTESTATION_TYPES: Final = (*_MEDIA.values(), _OTHER_MEDIA)  # artifact types under which a bundle's are published


@dataclass(frozen=True)
class BundleFile:
    """One file that becomes one layer.

    Attributes:
        title: its name in the bundle; relative, forward slashes.
        source: where its bytes are, or the bytes themselves.
        sha256: what it should hash to, if known; a source that differs is refused.
    """

    title: str
    source: Path | bytes
    media_type: str
    role: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Nothing but the manifest and its config has been read."""

    folder: Path
    manifest: OciManifest

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Open the bundle in `folder`.

        Raises:
            StoreError: there is none, or its manifest is damaged.
        """
        try:
            data = (folder / MANIFEST_NAME).read_bytes()
        except OSError as error:
            raise StoreError(
                f"there is no bundle in {folder}",
                why=f"{MANIFEST_NAME} cannot be read: {error.strerror}",
                way_out="`pipeline publish --to folder:DIR` and `pipeline pull` make bundles",
            ) from error
        return cls(folder, OciManifest.parse(data, str(folder / MANIFEST_NAME)))

    @property
    def digest(self) -> str:
        """Of its manifest, `sha256:` and 64 hex digits."""
        return self.manifest.digest

    @property
    def config_bytes(self) -> bytes:
        return (self.folder / CONFIG_NAME).read_bytes()

    @property
    def config(self) -> dict[str, object]:
        """The ModelPack config."""
        return read_object(self.config_bytes, str(self.folder / CONFIG_NAME))

    @property
    def unverified(self) -> bool:
        return self.manifest.annotations.get(UNVERIFIED) == "true"

    def named(self, role: str) -> list[str]:
        """The files of a role, in order."""
        return [name for name, layer in self.manifest.files.items() if layer.annotations.get(ROLE) == role]

    def attestations(self) -> list[Path]:
        """What was signed about this bundle, by name."""
        folder = self.folder / ATTESTATIONS
        return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.is_symlink())

    @staticmethod
    def media_type_of(attestation: Path) -> str:
        return next((media for end, media in _MEDIA.items() if attestation.name.endswith(end)), _OTHER_MEDIA)

    def damage(self) -> list[str]:
        """Every way in which the files differ from the manifest, in words; every byte is read."""
        known = {**self.manifest.files, CONFIG_NAME: self.manifest.config}
        attested = set(self.attestations())
        found = []
        for name, layer in known.items():
            path = self.folder / name
            if path.is_symlink() or not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != layer.size:
                found.append(f"{name} has {path.stat().st_size} bytes, not {layer.size}")
            elif sha256_file(path) != layer.hex:
                found.append(f"{name} does not have the digest of the manifest")
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink():
                found.append(f"{name} is a link")
            elif path.is_file() and name not in {*known, MANIFEST_NAME} and path not in attested:
                found.append(f"{name} is not in the manifest")
        return found

    def refuse_damage(self) -> None:
        """Raises:
        StoreError: a file is not what the manifest says.
        """
        damage = self.damage()
        if damage:
            raise StoreError(
                "the bundle is damaged",
                where=str(self.folder),
                why="; ".join(damage[:5]),
                way_out="pull it again, or publish its run again",
            )


def write_bundle(
    folder: Path,
    files: Sequence[BundleFile],
    config: Mapping[str, object],
    annotations: Mapping[str, str],
    *,
    link: bool = False,
    attest: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Write a bundle into `folder`, which must not exist yet or be empty. It appears when it is whole.

    Args:
        config: a ModelPack config without `modelfs`, which is filled in here.
        link: files may be hard links to their sources: for a bundle that is only passed on, never given to a user.
        attest: signs it before it appears.

    Raises:
        StoreError: a bad title, a missing or changed file, or a folder that cannot be written.
    """
    place = new_folder(folder)
    staging = place.with_name(f"{place.name}.partial")
    partial = staging / place.name  # signatures carry a folder's name
    try:
        shutil.rmtree(staging, ignore_errors=True)
        layers = tuple(_put(partial, file, link=link) for file in files)
        model_config = {**config, "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]}}
        data = canonical_json(model_config)
        manifest = OciManifest.make(ARTIFACT_TYPE, Descriptor.of_bytes(data, MEDIA_CONFIG), layers, annotations)
        for name, content in ((CONFIG_NAME, data), (MANIFEST_NAME, manifest.data)):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        if attest is not None:
            attest(Bundle(partial, manifest))
        give_name(partial, place)
    except OSError as error:
        raise StoreError(
            "the bundle cannot be written",
            where=str(error.filename or folder),
            why=error.strerror or str(error),
            way_out="free some space or name another folder; the run's artifacts are kept",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle(folder, manifest)


def _put(folder: Path, file: BundleFile, *, link: bool) -> Descriptor:
    check_title(file.title, str(folder))
    target = folder / file.title
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(file.source, bytes):
        target.write_bytes(file.source)
        digest = sha256_bytes(file.source)
    else:
        _copy(file.source, target, link=link)
        digest = sha256_file(target)
    if file.sha256 is not None and digest != file.sha256:
        raise StoreError(
            f"{file.title} is not the file that was verified",
            where=str(file.source) if isinstance(file.source, Path) else None,
            why=f"it hashes to {digest}, its manifest says {file.sha256}",
            way_out="run the recipe again: the damaged artifact is set aside and rebuilt",
        )
    names = {TITLE: file.title, FILEPATH: file.title, ROLE: file.role}
    return Descriptor(file.media_type, f"sha256:{digest}", target.stat().st_size, {**names, **file.annotations})


def _copy(source: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system
    shutil.copyfile(source, target)  # content only: what the store has is read-only
    target.chmod(0o644)
