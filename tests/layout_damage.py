"""What is wrong with an OCI image layout, by the specification and by its own digests, without this project's code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"


def layout_damage(target: Path) -> list[str]:
    """Every way in which it is broken, in words; empty when all is well."""
    try:
        layout = json.loads((target / "oci-layout").read_bytes())
        index = json.loads((target / "index.json").read_bytes())["manifests"]
    except (OSError, ValueError, KeyError) as error:
        return [f"the layout cannot be read: {error}"]
    found = [] if layout == {"imageLayoutVersion": "1.0.0"} else [f"oci-layout says {layout}"]
    for entry in index:
        found += _descriptor_damage(target, entry, "index.json")
        try:
            manifest = json.loads(_blob(target, str(entry["digest"])).read_bytes())
        except (OSError, ValueError, KeyError) as error:
            found.append(f"the manifest {entry.get('digest')} cannot be read: {error}")
            continue
        if manifest.get("schemaVersion") != 2 or manifest.get("mediaType") != _MANIFEST:
            found.append(f"{entry['digest']}: no image manifest of schema version 2")
        for descriptor in [manifest.get("config", {}), *manifest.get("layers", [])]:
            found += _descriptor_damage(target, descriptor, str(entry["digest"]))
    return found


def _descriptor_damage(target: Path, descriptor: Mapping[str, object], where: str) -> list[str]:
    digest, size, media = descriptor.get("digest"), descriptor.get("size"), descriptor.get("mediaType")
    if not isinstance(media, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)) or not isinstance(size, int):
        return [f"{where}: {dict(descriptor)!r} is no descriptor"]
    path = _blob(target, str(digest))
    if not path.is_file():
        return [f"{where}: blob {digest} is missing"]
    data = path.read_bytes()
    if len(data) != size or f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        return [f"{where}: blob {digest} is not what its descriptor says"]
    return []


def _blob(target: Path, digest: str) -> Path:
    return target / "blobs" / "sha256" / digest.removeprefix("sha256:")
