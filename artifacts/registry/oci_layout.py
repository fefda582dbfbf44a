"""Writing an OCI image layout: a plain folder that every registry tool can read, copy and push.

Format: OCI image specification v1.1 (image-layout.md, manifest.md, image-index.md). The manifest is a CNCF ModelPack
artifact (modelpack/model-spec, docs/spec.md and docs/config.md). Why ModelPack and not Docker's
`application/vnd.docker.ai.*` types: it is vendor neutral; each file is one uncompressed layer whose digest is the
file's own SHA-256; modctl, KitOps and Kubernetes image volumes read it, and so does Docker Model Runner (it takes the
first `weight.v1.raw` layer of a config with format "gguf"), while Docker's types are read by Docker's runner alone.

- Blobs are named by their digest and written before anything names them; `index.json` is replaced last, in one rename.
  A write killed at any moment leaves the old layout valid.
- The same input gives the same manifest digest: canonical JSON, no dates, no host facts.
- Blobs are copied, never linked: who edits a published file must not damage the store it came from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file

MEDIA_INDEX: Final = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
MEDIA_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
MEDIA_WEIGHTS: Final = "application/vnd.cncf.model.weight.v1.raw"  # GGUF, mmproj
MEDIA_WEIGHT_CONFIG: Final = "application/vnd.cncf.model.weight.config.v1.raw"  # what describes the weights
MEDIA_DOC: Final = "application/vnd.cncf.model.doc.v1.raw"  # recipe, report

REF_NAME: Final = "org.opencontainers.image.ref.name"
TITLE: Final = "org.opencontainers.image.title"
FILEPATH: Final = "org.cncf.model.filepath"  # ModelPack's name for the same thing; both kinds of tools find it

LAYOUT_NAME: Final = "oci-layout"
INDEX_NAME: Final = "index.json"
_LAYOUT_VERSION: Final = "1.0.0"  # imageLayoutVersion; v1.1 of the specification keeps 1.0.0
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # distribution-spec, <reference> as a tag
_INCOMING: Final = ".incoming-"
_CHUNK: Final = 4 << 20  # bytes read at once


@dataclass(frozen=True)
class LayoutFile:
    """One file that becomes one layer.

    Attributes:
        title: the name under which a tool unpacks it; relative, forward slashes.
        sha256: what the file should hash to, if known; a source that differs is refused.
    """

    path: Path
    media_type: str
    title: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None


def write_layout(
    target: Path,
    files: Sequence[LayoutFile],
    config: Mapping[str, object],
    annotations: Mapping[str, str],
    tag: str,
) -> str:
    """Write one manifest with its blobs into the layout at `target` and point `tag` at it.

    A layout that is already there is added to; its other tags stay. `config` is a ModelPack config without `modelfs`,
    which is filled in here.

    Returns:
        The manifest's digest, `sha256:` and 64 hex digits.

    Raises:
        StoreError: a bad tag or title, a missing or changed file, a folder that cannot be written or that holds
            something which is not a layout.
    """
    if not _TAG.fullmatch(tag):
        raise StoreError(
            f"{tag!r} is no OCI tag",
            why="a tag has up to 128 letters, digits, '.', '_' and '-', and starts with a letter, a digit or '_'",
            way_out="give another name after the path, as in oci-layout:dist:NAME",
        )
    for file in files:
        if file.title.startswith("/") or ".." in file.title.split("/"):
            raise StoreError(f"{file.title!r} would be unpacked outside its folder", where=str(file.path))
    with _writing(target), _locked(target):
        index = _read_index(target)
        _remove_leftovers(target)
        layers = [_put_file(target, file) for file in files]
        model_config = {**config, "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": MEDIA_CONFIG, **_put_bytes(target, canonical_json(model_config))},
            "layers": layers,
            "annotations": dict(annotations),
        }
        stored = _put_bytes(target, canonical_json(manifest))
        entry: dict[str, object] = {
            "mediaType": MEDIA_MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            **stored,
            "annotations": {REF_NAME: tag},
        }
        others = [known for known in index if _ref_name(known) != tag]
        manifests = sorted([*others, entry], key=lambda known: (_ref_name(known) or "", str(known.get("digest"))))
        _replace(target, LAYOUT_NAME, canonical_json({"imageLayoutVersion": _LAYOUT_VERSION}))
        _replace(
            target,
            INDEX_NAME,
            canonical_json({"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": manifests}),
        )
    return str(stored["digest"])


def read_tags(target: Path) -> dict[str, str]:
    """Tag -> manifest digest of the layout at `target`.

    Raises:
        StoreError: there is no layout, or it cannot be read.
    """
    if not (target / LAYOUT_NAME).is_file():
        raise StoreError(f"{target} is no OCI layout", why=f"it has no file {LAYOUT_NAME}")
    found = {}
    for entry in _read_index(target):
        name = _ref_name(entry)
        if name is not None:
            found[name] = str(entry["digest"])
    return found


def layout_damage(target: Path) -> list[str]:
    """Every way in which a layout breaks the specification or its own digests, in words; empty when all is well."""
    found: list[str] = []
    try:
        layout = json.loads((target / LAYOUT_NAME).read_bytes())
        if layout.get("imageLayoutVersion") != _LAYOUT_VERSION:
            found.append(f"{LAYOUT_NAME} is of version {layout.get('imageLayoutVersion')!r}")
        index = _read_index(target)
    except (OSError, ValueError, AttributeError, StoreError) as error:
        return [f"the layout cannot be read: {error}"]
    for entry in index:
        found.extend(_descriptor_damage(target, entry, "index.json"))
        try:
            manifest = json.loads(_blob(target, str(entry["digest"])).read_bytes())
        except (OSError, ValueError, KeyError) as error:
            found.append(f"the manifest {entry.get('digest')} cannot be read: {error}")
            continue
        where = str(_ref_name(entry) or entry["digest"])
        if manifest.get("schemaVersion") != 2 or manifest.get("mediaType") != MEDIA_MANIFEST:
            found.append(f"{where}: no image manifest of schema version 2")
        for descriptor in [manifest.get("config", {}), *manifest.get("layers", [])]:
            found.extend(_descriptor_damage(target, descriptor, where))
    return found


def _descriptor_damage(target: Path, descriptor: Mapping[str, object], where: str) -> list[str]:
    digest, size, media = descriptor.get("digest"), descriptor.get("size"), descriptor.get("mediaType")
    if not isinstance(media, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)) or not isinstance(size, int):
        return [f"{where}: {dict(descriptor)!r} is no descriptor"]
    path = _blob(target, str(digest))
    if not path.is_file():
        return [f"{where}: blob {digest} is missing"]
    if path.stat().st_size != size:
        return [f"{where}: blob {digest} has {path.stat().st_size} bytes, not {size}"]
    if f"sha256:{sha256_file(path)}" != digest:
        return [f"{where}: blob {digest} does not hash to its name"]
    return []


def _blob(target: Path, digest: str) -> Path:
    return target / "blobs" / "sha256" / digest.removeprefix("sha256:")


def _ref_name(entry: Mapping[str, object]) -> str | None:
    annotations = entry.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, Mapping) else None
    return name if isinstance(name, str) else None


def _read_index(target: Path) -> list[dict[str, object]]:
    """The manifests that `index.json` names; none when there is no layout yet."""
    path = target / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
        manifests = index["manifests"]
        if not isinstance(manifests, list) or not all(isinstance(entry, dict) for entry in manifests):
            raise ValueError("'manifests' is no list of objects")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            "the index of this OCI layout cannot be read",
            where=str(path),
            why=str(error),
            way_out="publish to another folder, or move this one away; nothing in it was touched",
        ) from error
    return manifests


def _put_file(target: Path, file: LayoutFile) -> dict[str, object]:
    """Copy one file in, hashing as it streams; a good blob that is already there is kept."""
    if file.sha256 is not None and file.path.is_file():
        known = _blob(target, file.sha256)
        if known.is_file() and known.stat().st_size == file.path.stat().st_size and sha256_file(known) == file.sha256:
            return _layer(file, file.sha256, known.stat().st_size)
    hasher = hashlib.sha256()
    size = 0
    try:
        source = file.path.open("rb")
    except OSError as error:
        raise StoreError(f"{file.title} cannot be read", where=str(file.path), why=error.strerror) from error
    with source, _incoming(target) as (handle, temporary):
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
            _write_all(handle, chunk)
        digest = hasher.hexdigest()
        if file.sha256 is not None and digest != file.sha256:
            raise StoreError(
                f"{file.title} is not the file that was verified",
                where=str(file.path),
                why=f"it hashes to {digest}, its manifest says {file.sha256}",
                way_out="run the recipe again: the damaged artifact is set aside and rebuilt",
            )
        _keep(target, handle, temporary, digest)
    return _layer(file, digest, size)


def _layer(file: LayoutFile, digest: str, size: int) -> dict[str, object]:
    return {
        "mediaType": file.media_type,
        "digest": f"sha256:{digest}",
        "size": size,
        "annotations": {TITLE: file.title, FILEPATH: file.title, **file.annotations},
    }


def _put_bytes(target: Path, data: bytes) -> dict[str, object]:
    digest = sha256_bytes(data)
    with _incoming(target) as (handle, temporary):
        _write_all(handle, data)
        _keep(target, handle, temporary, digest)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _keep(target: Path, handle: int, temporary: Path, digest: str) -> None:
    """Give a finished blob its name; what stood there under that name was the same bytes, or damaged."""
    os.fsync(handle)
    os.fchmod(handle, 0o644)
    folder = target / "blobs" / "sha256"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.replace(folder / digest)
    _sync_folder(folder)


def _replace(target: Path, name: str, data: bytes) -> None:
    with _incoming(target) as (handle, temporary):
        _write_all(handle, data)
        os.fsync(handle)
        os.fchmod(handle, 0o644)
        temporary.replace(target / name)
        _sync_folder(target)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _incoming(target: Path) -> Iterator[tuple[int, Path]]:
    """A temporary file on the layout's own file system, gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=_INCOMING, dir=target)
    try:
        yield handle, Path(name)
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Temporary files of writes that were killed; only called under the lock, so none is in use."""
    for path in target.glob(f"{_INCOMING}*"):
        path.unlink(missing_ok=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One writer at a time: `index.json` is read, changed and replaced. The folder is the lock, no extra file."""
    handle = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Make the folder, and turn what the system refuses into one message."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(
            "the OCI layout cannot be written",
            where=str(target),
            why=error.strerror or str(error),
            way_out="free some space or publish to a folder that you may write to; the run's artifacts are kept, "
            "running the recipe again publishes at once",
        ) from error
