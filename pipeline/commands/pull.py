"""`pipeline pull` and `pipeline registry`: bundles from where others put them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    from artifacts.attestation_check import Policy
    from artifacts.bundle import Bundle
    from artifacts.registry.manifest import OciManifest
    from artifacts.registry.place import Place, Reference
    from artifacts.registry.transfer import Moved


@dataclass(frozen=True)
class Shown:
    """What `pipeline registry show` says."""

    reference: str
    digest: str
    annotations: dict[str, str]
    files: dict[str, int]  # name -> bytes
    attestations: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, object]:
        return {**self.__dict__, "size": self.size}


def list_tags(name: str) -> list[str]:
    """The tags of a repository or layout."""
    from artifacts.registry.place import Reference

    return Reference.parse(name).open().tags()


def show_model(name: str) -> Shown:
    """What there is behind a reference; nothing but manifests and attestations is fetched."""
    from artifacts.registry.transfer import attestations_of

    reference, place, manifest = _resolve(name)
    return Shown(
        str(reference),
        manifest.digest,
        dict(manifest.annotations),
        {title: layer.size for title, layer in manifest.files.items()},
        tuple(title for title, _ in attestations_of(place, manifest)),
    )


def pull_bundle(name: str, target: Path, policy: Policy | None = None, moved: Moved | None = None) -> Bundle:
    """Bring a model into the folder `target`; what the policy refuses never appears there.

    Raises:
        RecipeError, StoreError. GateError: the policy refuses it.
    """
    from artifacts.registry.transfer import pull
    from pipeline.commands.check import refuse_untrusted

    reference, place, manifest = _resolve(name)

    def check(bundle: Bundle) -> None:
        if policy is not None:
            refuse_untrusted(bundle, policy, str(reference))

    return pull(place, manifest, target, moved, check)


def kept_bundle(name: str) -> Bundle:
    """The bundle that `name` means: a folder, or a reference, whose files are fetched once and kept in the cache.

    What attests it is fetched every time: it may have been taken back.

    Raises:
        RecipeError, StoreError.
    """
    from artifacts.bundle import Bundle
    from artifacts.home import cache_dir
    from artifacts.locks import holding
    from artifacts.registry.place import looks_like_reference
    from artifacts.registry.transfer import pull, pull_attestations

    if not looks_like_reference(name):
        return Bundle.open(Path(name).expanduser())
    _, place, manifest = _resolve(name)
    folder = cache_dir() / "bundles" / manifest.digest.removeprefix("sha256:")
    with holding(folder.with_name(f"{folder.name}.use")):  # whoever comes second waits, and fetches nothing again
        if not folder.is_dir():
            return pull(place, manifest, folder)
        pull_attestations(place, manifest, folder)
        return Bundle.open(folder)


def _resolve(name: str) -> tuple[Reference, Place, OciManifest]:
    from artifacts.registry.place import Reference
    from artifacts.registry.transfer import resolve

    reference = Reference.parse(name)
    place = reference.open()
    wanted = reference.reference
    if not wanted:
        tags = place.tags()
        if len(tags) != 1 and "latest" not in tags:
            raise RecipeError(
                f"{reference} needs a tag or a digest",
                why=f"it has the tags {', '.join(tags[:20]) or 'none'}",
                way_out=f"write {reference}:TAG",
            )
        wanted = tags[0] if len(tags) == 1 else "latest"
    return reference, place, resolve(place, wanted)


def show_shown(shown: Shown) -> str:
    """As text."""
    from pipeline.commands.runs import table
    from pipeline.device import show_bytes

    head = [("reference", shown.reference), ("digest", shown.digest), ("size", show_bytes(shown.size))]
    head += [(key.rpartition(".")[2], text) for key, text in sorted(shown.annotations.items())]
    head.append(("attested by", ", ".join(shown.attestations) or "nothing"))
    files = [(f"  {name}", show_bytes(size)) for name, size in shown.files.items()]
    return "\n".join([table(head), "", "files", table(files)])
