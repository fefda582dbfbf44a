"""OCI descriptors and manifests of models: written in one canonical form, and read as what a stranger sent.

Format: OCI image specification v1.1 (manifest.md, descriptor.md); the manifest is a CNCF ModelPack artifact
(modelpack/model-spec, docs/spec.md and docs/config.md). Why its media types and not Docker's
`application/vnd.docker.ai.*`: they are vendor neutral; each file is one uncompressed layer whose digest is the file's
own SHA-256; modctl, KitOps and Kubernetes image volumes read them, and so does Docker Model Runner, which unpacks a
ModelPack artifact by the file paths of its layers (docker/model-runner, pkg/distribution/internal/bundle/unpack.go).

What is read is refused unless it is whole and harmless: one manifest and no index, digests in SHA-256, sizes that are
numbers, file names that stay inside a folder and differ on every file system.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from artifacts.errors import StoreError
from artifacts.manifest import canonical_json, sha256_bytes

MEDIA_INDEX: Final = "application/vnd.oci.image.index.v1+json"
MEDIA_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
MEDIA_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
MEDIA_WEIGHTS: Final = "application/vnd.cncf.model.weight.v1.raw"  # GGUF, mmproj, safetensors
MEDIA_WEIGHT_CONFIG: Final = "application/vnd.cncf.model.weight.config.v1.raw"  # what describes the weights
MEDIA_DOC: Final = "application/vnd.cncf.model.doc.v1.raw"  # card, recipe, report
MEDIA_EMPTY: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"  # the content of MEDIA_EMPTY

TITLE: Final = "org.opencontainers.image.title"
FILEPATH: Final = "org.cncf.model.filepath"  # ModelPack's name for the same thing; both kinds of tools find it

RESERVED: Final = ("oci", "attestations")  # folders of a bundle that hold no layers
LARGEST_MANIFEST: Final = 4 << 20  # bytes; what registries accept too
_MOST_LAYERS: Final = 4096
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
# Device names that Windows opens instead of a file.
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Descriptor:
    """What a manifest says of a blob, or an index of a manifest. `digest` is `sha256:` and 64 hex digits."""

    media_type: str
    digest: str
    size: int  # bytes
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    @classmethod
    def of_bytes(
        cls, data: bytes, media_type: str, annotations: Mapping[str, str] | None = None, artifact_type: str = ""
    ) -> Self:
        return cls(media_type, f"sha256:{sha256_bytes(data)}", len(data), annotations or {}, artifact_type)

    @classmethod
    def parse(cls, value: object, where: str) -> Self:
        """Read a descriptor.

        Raises:
            StoreError: it is none, or its digest is not SHA-256.
        """
        if not isinstance(value, dict):
            raise _refused("an entry is no descriptor", where, f"it is {type(value).__name__}, not an object")
        media, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _refused("an entry has no SHA-256 digest", where, f"its digest is {str(digest)[:80]!r}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise _refused("an entry has no size", where, f"{digest} says {str(size)[:40]!r}")
        if not isinstance(media, str):
            raise _refused("an entry has no media type", where, digest)
        annotations = value.get("annotations") or {}
        if not isinstance(annotations, dict) or not all(isinstance(text, str) for text in annotations.values()):
            raise _refused("annotations are not texts", where, digest)
        kind = value.get("artifactType")
        return cls(media, digest, size, annotations, kind if isinstance(kind, str) else "")

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")

    def to_dict(self) -> dict[str, object]:
        found: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found


@dataclass(frozen=True)
class OciManifest:
    """An image manifest. `data` is the very text that its digest is of."""

    data: bytes
    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]
    subject: Descriptor | None = None

    @classmethod
    def make(
        cls,
        artifact_type: str,
        config: Descriptor,
        layers: tuple[Descriptor, ...],
        annotations: Mapping[str, str],
        subject: Descriptor | None = None,
    ) -> Self:
        """The one text that stands for this content: canonical JSON, no dates, no host facts."""
        content: dict[str, object] = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "artifactType": artifact_type,
            "config": config.to_dict(),
            "layers": [layer.to_dict() for layer in layers],
        }
        if annotations:
            content["annotations"] = dict(annotations)
        if subject is not None:
            content["subject"] = Descriptor(subject.media_type, subject.digest, subject.size).to_dict()
        return cls.parse(canonical_json(content), artifact_type)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Read a manifest that came from anywhere.

        Raises:
            StoreError: it is an index, no manifest, too large, or names files that must not be written.
        """
        content = read_object(data, where)
        media = content.get("mediaType")
        if media == MEDIA_INDEX or "manifests" in content:
            raise _refused(
                "an index stands here, not a model",
                where,
                "an index only points at manifests, which may be indexes again; none is followed",
                "give the digest of the model's manifest, NAME@sha256:...",
            )
        if content.get("schemaVersion") != 2 or media != MEDIA_MANIFEST:
            raise _refused("no OCI image manifest stands here", where, f"its media type is {str(media)[:80]!r}")
        layers = content.get("layers")
        if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
            raise _refused("the manifest has no list of layers", where, f"at most {_MOST_LAYERS} are read")
        annotations = content.get("annotations") or {}
        if not isinstance(annotations, dict) or not all(isinstance(text, str) for text in annotations.values()):
            raise _refused("the manifest's annotations are not texts", where)
        subject = content.get("subject")
        found = cls(
            data,
            str(content.get("artifactType") or ""),
            Descriptor.parse(content.get("config"), where),
            tuple(Descriptor.parse(layer, where) for layer in layers),
            annotations,
            Descriptor.parse(subject, where) if subject is not None else None,
        )
        found._check_titles(where)
        return found

    @property
    def digest(self) -> str:
        return f"sha256:{sha256_bytes(self.data)}"

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(MEDIA_MANIFEST, self.digest, len(self.data), artifact_type=self.artifact_type)

    @property
    def files(self) -> dict[str, Descriptor]:
        """Name -> layer, in the manifest's order."""
        return {title(layer): layer for layer in self.layers}

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.layers)

    def _check_titles(self, where: str) -> None:
        seen: dict[str, str] = {}
        for layer in self.layers:
            name = title(layer)
            check_title(name, where)
            if name.split("/")[0].casefold() in RESERVED:
                raise _refused(f"the file name {name[:80]!r} is refused", where, "that folder holds no layers")
            # File systems that fold case or normalise would let the second file replace the first.
            folded = unicodedata.normalize("NFC", name).casefold()
            clash = next((seen[key] for key in (folded, *_parents(folded)) if key in seen), None)
            if clash is None and any(key.startswith(f"{folded}/") for key in seen):
                clash = name
            if clash is not None:
                raise _refused("two files of the manifest would be one on disk", where, f"{clash!r} and {name!r}")
            seen[folded] = name


def title(layer: Descriptor) -> str:
    """The file name of a layer, "" when it has none; both annotations must agree where both are given."""
    names = {layer.annotations[key] for key in (TITLE, FILEPATH) if key in layer.annotations}
    return names.pop() if len(names) == 1 else ""


def check_title(name: str, where: str) -> None:
    """Refuse a name that would be written outside its folder, or not as written.

    Raises:
        StoreError.
    """
    parts = name.split("/")
    bad = (
        not name
        or len(name) > 512
        or name.startswith("/")
        or any(part in ("", ".", "..") or part.endswith((" ", ".")) or len(part) > 255 for part in parts)
        or any(character in name for character in '\\:*?"<>|')
        or any(unicodedata.category(character).startswith("C") for character in name)
        or any(_DEVICES.fullmatch(part) for part in parts)
    )
    if bad:
        raise _refused(
            f"the file name {name[:80]!r} is refused",
            where,
            "it would be written outside its folder, or not under this name on every system",
        )


def read_object(data: bytes, where: str) -> dict[str, object]:
    """Parse a JSON object of at most LARGEST_MANIFEST bytes.

    Raises:
        StoreError.
    """
    if len(data) > LARGEST_MANIFEST:
        raise _refused("the manifest is too large", where, f"more than {LARGEST_MANIFEST} bytes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refused("the manifest cannot be read", where, str(error)[:200]) from error
    if not isinstance(content, dict):
        raise _refused("the manifest cannot be read", where, "it is no JSON object")
    return content


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _refused(what: str, where: str, why: str | None = None, way_out: str | None = None) -> StoreError:
    return StoreError(what, where=where, why=why, way_out=way_out)
