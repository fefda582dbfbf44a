"""Moving a bundle between its folder and a place: whole or not at all, every byte checked.

push  blobs, then the manifest by its digest, then what attests it, and the tag last: a tag never shows half a model.
pull  into `TARGET.partial` beside the target, every file hashed while it streams; renamed when all is there and, if
      there is a policy, it holds. A pull that was cut off goes on where it was. No link is followed, no path leaves the
      folder, nothing is executed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from artifacts.bundle import ATTESTATION_TYPES, ATTESTATIONS, CONFIG_NAME, MANIFEST_NAME, Bundle
from artifacts.disk import force_remove, give_name, new_folder
from artifacts.errors import StoreError
from artifacts.locks import FileLock
from artifacts.manifest import sha256_bytes
from artifacts.registry.manifest import (
    ARTIFACT_TYPE,
    EMPTY,
    LARGEST_MANIFEST,
    MEDIA_EMPTY,
    MEDIA_MANIFEST,
    TITLE,
    Descriptor,
    OciManifest,
    check_title,
    read_object,
    title,
)
from artifacts.registry.place import Place

Moved = Callable[[str, int, int], None]  # name, bytes done, bytes in all
_MOST_REFERRERS: Final = 256
_LARGEST_ATTESTATION: Final = 16 << 20  # bytes
_LARGEST_ATTESTATIONS: Final = 64 << 20  # bytes, all together


class _OtherBytesError(StoreError):
    """What came is not the blob."""


def push(bundle: Bundle, place: Place, tag: str | None, moved: Moved | None = None) -> str:
    """Bring a bundle to a place; what is there already is not sent again.

    Returns:
        The digest of its manifest.

    Raises:
        StoreError: the bundle is damaged, or the place cannot be reached or refuses.
    """
    bundle.refuse_damage()
    manifest = bundle.manifest
    done, total = 0, manifest.size
    place.put_blob(manifest.config, bundle.config_bytes)
    for name, layer in manifest.files.items():
        place.put_blob(layer, bundle.folder / name)
        done += layer.size
        if moved is not None:
            moved(name, done, total)
    place.put_manifest(manifest.data)
    for path in bundle.attestations():
        data = path.read_bytes()
        layer = Descriptor.of_bytes(data, bundle.media_type_of(path), {TITLE: path.name})
        empty = Descriptor.of_bytes(EMPTY, MEDIA_EMPTY)
        referrer = OciManifest.make(layer.media_type, empty, (layer,), {}, manifest.descriptor)
        place.put_blob(empty, EMPTY)
        place.put_blob(layer, data)
        place.put_manifest(referrer.data, subject=manifest.descriptor)
    if tag is not None:
        place.put_manifest(manifest.data, tag)
    return manifest.digest


def copy(bundle: Bundle, target: Path) -> Bundle:
    """The same bundle in another folder, which must not exist yet or be empty.

    Raises:
        StoreError: it is damaged, or the folder cannot be written.
    """
    bundle.refuse_damage()
    place = new_folder(target)
    partial = place.with_name(f"{place.name}.partial")
    with _writing(place):
        force_remove(partial)
        shutil.copytree(bundle.folder, partial, copy_function=shutil.copyfile)
        give_name(partial, place)
    return Bundle.open(target)


def resolve(place: Place, reference: str) -> OciManifest:
    """The model's manifest behind a tag or a digest.

    Raises:
        StoreError: there is none, it is no model, or it is not what its digest says.
    """
    where = f"{place.name} {reference}"
    data = place.manifest(reference)
    if reference.startswith("sha256:") and f"sha256:{sha256_bytes(data)}" != reference:
        raise StoreError("the manifest is not the one that was asked for", where=where, why="its digest is another")
    manifest = OciManifest.parse(data, where)
    if manifest.artifact_type != ARTIFACT_TYPE:
        raise StoreError("this is no model", where=where, why=f"its artifact type is {manifest.artifact_type[:80]!r}")
    return manifest


def pull(
    place: Place,
    manifest: OciManifest,
    target: Path,
    moved: Moved | None = None,
    check: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Bring a model from a place into the folder `target`, which must not exist yet or be empty.

    Args:
        check: looks at what has arrived before it appears; what it refuses by raising is removed.

    Raises:
        StoreError: the place or the disk fails, what was sent is not what the manifest says, or another process is
            pulling into it.
    """
    with _writing(target), _alone(new_folder(target)):
        _pull(place, manifest, new_folder(target), moved, check)  # asked again: another may have been there first
    return Bundle.open(target)


def _pull(
    place: Place, manifest: OciManifest, target: Path, moved: Moved | None, check: Callable[[Bundle], None] | None
) -> None:
    partial = target.with_name(f"{target.name}.partial")
    _prepare(partial, manifest, place)
    done, total = 0, manifest.size
    names = manifest.files
    for name, layer in names.items():
        _download(place, layer, partial, name)
        done += layer.size
        if moved is not None:
            moved(name, done, total)
    _download(place, manifest.config, partial, CONFIG_NAME)
    pull_attestations(place, manifest, partial)
    _remove_others(partial, {*names, CONFIG_NAME, MANIFEST_NAME})
    if check is not None:
        try:
            check(Bundle.open(partial))
        except BaseException:
            force_remove(partial)
            raise
    give_name(partial, target)


def attestations_of(place: Place, manifest: OciManifest) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every attestation that a bundle can hold. What other tools keep beside them (signatures
    without a file name, indexes) is theirs, and passed over.

    Raises:
        StoreError: one is not what its digest says, or is about another manifest; or they are too many or too large.
    """
    entries = [one for one in place.referrers(manifest.digest) if one.media_type == MEDIA_MANIFEST]
    ours = [one for one in entries if one.artifact_type in (*ATTESTATION_TYPES, "")]  # "": its manifest will tell
    if len(ours) > _MOST_REFERRERS:
        raise _too_much(place, manifest, f"{len(ours)} attestations, at most {_MOST_REFERRERS} are read")
    total = 0
    for found in ours:
        where = f"{place.name} {found.digest}"
        if found.size > LARGEST_MANIFEST:
            raise StoreError("an attestation's manifest is too large", where=where, why=f"{found.size} bytes")
        data = place.manifest(found.digest)
        if len(data) != found.size or f"sha256:{sha256_bytes(data)}" != found.digest:
            raise StoreError("an attestation's manifest is not what its entry says", where=where)
        referrer = _referrer(data, where)
        if referrer is None:
            continue
        if referrer.subject is None or referrer.subject.digest != manifest.digest:
            raise StoreError("an attestation is about another model", where=where, why="its subject is another digest")
        for layer in referrer.layers:
            if layer.size > _LARGEST_ATTESTATION or "/" in title(layer):
                raise StoreError("an attestation is refused", where=where, why=f"{layer.size} bytes, {title(layer)!r}")
            total += layer.size
            if total > _LARGEST_ATTESTATIONS:
                raise _too_much(place, manifest, f"attestations of more than {_LARGEST_ATTESTATIONS} bytes")
            content = b"".join(_checked(place, layer, 0, hashlib.sha256()))
            yield title(layer), content


def _referrer(data: bytes, where: str) -> OciManifest | None:
    """An attestation's manifest; None if another tool's: of another type, or with files that have no name."""
    content = read_object(data, where)
    layers = content.get("layers")
    if content.get("artifactType") not in ATTESTATION_TYPES or not isinstance(layers, list):
        return None
    return OciManifest.parse(data, where) if all(title(Descriptor.parse(one, where)) for one in layers) else None


def _too_much(place: Place, manifest: OciManifest, why: str) -> StoreError:
    return StoreError(
        "too much attests this model",
        where=f"{place.name} {manifest.digest}",
        why=why,
        way_out="remove what is no longer needed, with a registry tool, or publish it under another name",
    )


def _prepare(partial: Path, manifest: OciManifest, place: Place) -> None:
    """An own folder beside the target; what an earlier pull of the same manifest left there is kept."""
    known = partial / MANIFEST_NAME
    same = not partial.is_symlink() and known.is_file() and not known.is_symlink()
    if not (same and known.read_bytes() == manifest.data):
        if partial.is_symlink() or partial.exists():
            force_remove(partial)
        partial.mkdir(parents=True)
        _write(known, manifest.data)
    needed = manifest.size - sum(path.lstat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise StoreError(
            "the disk has no room for this model",
            where=str(partial),
            why=f"{needed} bytes are missing, {free} are free",
            way_out=f"free some space; {place.name} is asked for nothing until it fits",
        )


def _download(place: Place, blob: Descriptor, folder: Path, name: str) -> None:
    """One file, from where it was left off; a file of the right size with other bytes is fetched anew."""
    check_title(name, place.name)
    path = folder / name
    for part in list(path.relative_to(folder).parents)[-2::-1]:
        (folder / part).mkdir(exist_ok=True)
        if (folder / part).is_symlink():
            raise StoreError("a link stands in the way", where=str(folder / part), way_out="remove it")
    hasher = hashlib.sha256()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "r+b") as file:
        held = 0
        while chunk := file.read(1 << 20):
            held += len(chunk)
            hasher.update(chunk)
        if held > blob.size or (held == blob.size and hasher.hexdigest() != blob.hex):
            file.seek(0)
            file.truncate()
            held, hasher = 0, hashlib.sha256()
        if held < blob.size:
            _fetch(place, blob, file, held, hasher)
        file.flush()
        os.fsync(file.fileno())


def _fetch(place: Place, blob: Descriptor, file: BinaryIO, held: int, hasher: hashlib._Hash) -> None:
    """The rest of a file; where an earlier pull left other bytes, the whole of it. What is wrong is not kept."""
    try:
        for chunk in _checked(place, blob, held, hasher):
            file.write(chunk)
    except _OtherBytesError:
        file.seek(0)
        file.truncate()
        if not held:
            raise
        _fetch(place, blob, file, 0, hashlib.sha256())


def _checked(place: Place, blob: Descriptor, held: int, hasher: hashlib._Hash) -> Iterator[bytes]:
    """The rest of a blob while it streams; refused as soon as it is longer, or at its end when it is another."""
    for chunk in place.read(blob, held):
        held += len(chunk)
        if held > blob.size:
            raise _OtherBytesError("more was sent than the manifest says", where=f"{place.name} {blob.digest}")
        hasher.update(chunk)
        yield chunk
    if held != blob.size:
        raise StoreError(
            "less was sent than the manifest says",
            where=f"{place.name} {blob.digest}",
            why=f"{held} of {blob.size} bytes",
            way_out="try again: what has arrived is kept",
        )
    if hasher.hexdigest() != blob.hex:
        raise _OtherBytesError(
            "what was sent is not what the manifest says",
            where=f"{place.name} {blob.digest}",
            why=f"it hashes to sha256:{hasher.hexdigest()}",
            way_out="the copy there is damaged: publish it again",
        )


def pull_attestations(place: Place, manifest: OciManifest, partial: Path) -> None:
    """Bring what attests a manifest into a bundle's folder; what was there before goes."""
    folder = partial / ATTESTATIONS
    if folder.is_symlink() or folder.exists():
        force_remove(folder)
    seen: dict[str, bytes] = {}
    for name, content in attestations_of(place, manifest):
        check_title(name, place.name)
        if seen.get(name) == content:
            continue
        if name in seen:  # signed by more than one
            name = f"{sha256_bytes(content)[:12]}-{name}"
        seen[name] = content
    if seen:
        folder.mkdir()
    for name, content in seen.items():
        _write(folder / name, content)


def _remove_others(partial: Path, wanted: set[str]) -> None:
    """What an interrupted pull of something else left there."""
    for path in sorted(partial.rglob("*"), reverse=True):
        name = path.relative_to(partial).as_posix()
        if path.is_symlink() or (path.is_file() and name not in wanted and not name.startswith(f"{ATTESTATIONS}/")):
            path.unlink()
        elif path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two pulls into one folder would write into each other's files."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    if not lock.try_acquire():
        raise StoreError(
            f"another process is pulling into {target}", way_out="wait until it is done, or name another folder"
        )
    try:
        yield
    finally:
        lock.release(remove=True)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise StoreError(
            "the model cannot be written here",
            where=str(error.filename or target),
            why=error.strerror or str(error),
            way_out="free some space or name another folder, and pull again: what has arrived is kept",
        ) from error
