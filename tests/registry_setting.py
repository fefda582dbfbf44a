"""A real registry on loopback (Debian's docker-registry), which tests may kill and start again; and small bundles."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from artifacts.bundle import Bundle, BundleFile, write_bundle
from artifacts.manifest import canonical_json
from artifacts.registry.manifest import (
    EMPTY,
    MEDIA_DOC,
    MEDIA_EMPTY,
    MEDIA_MANIFEST,
    MEDIA_WEIGHTS,
    Descriptor,
    OciManifest,
)
from artifacts.registry.place import Place

NEEDS_REGISTRY = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="docker-registry is not installed (apt install docker-registry)"
)
CONFIG = {"descriptor": {"name": "tiny"}, "config": {"format": "gguf", "quantization": "Q4_0"}}


class RegistryServer:
    """One docker-registry process. Its uploads outlive it: the secret that signs their addresses is fixed."""

    def __init__(self, folder: Path, auth: str = "", address: str = "127.0.0.1") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder / "data"
        self._config = folder / "config.yml"
        self._config.write_text(
            "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.root}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{address}:{self.port}', secret: fixed}}\n" + (f"auth: {{{auth}}}\n" if auth else "")
        )
        self._address = address
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"{'localhost' if self._address == '127.0.0.1' else self._address}:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            try:
                with socket.create_connection((self._address.strip("[]"), self.port), timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the registry did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def get(self, path: str) -> bytes:
        asked = urllib.request.Request(f"http://{self.host}/v2/{path}", headers={"Accept": MEDIA_MANIFEST})
        with urllib.request.urlopen(asked) as answer:
            found: bytes = answer.read()
        return found


def small_bundle(folder: Path, weights: bytes = b"GGUF" + bytes(range(256)) * 64) -> Bundle:
    """Two layers; attestations as a test puts them there."""
    files = [
        BundleFile("model.gguf", weights, MEDIA_WEIGHTS, "model"),
        BundleFile("verdict/icet/measures.json", b"[]\n", MEDIA_DOC, "verdict"),
    ]
    return write_bundle(folder, files, CONFIG, {"org.opencontainers.image.title": "tiny"})


def attest(bundle: Bundle, name: str, content: bytes) -> None:
    """Put a file where what was signed about a bundle lies."""
    (bundle.folder / "attestations").mkdir(exist_ok=True)
    (bundle.folder / "attestations" / name).write_bytes(content)


def attest_as_others(place: Place, model: OciManifest) -> None:
    """What other tools keep beside a model: cosign's signatures (old and new form), Notation's; none has a name."""
    for kind, media, more in (
        ("application/vnd.dev.cosign.artifact.sig.v1+json", "application/vnd.dev.cosign.simplesigning.v1+json",
         {"dev.cosignproject.cosign/signature": "MEUCIQ=="}),
        ("application/vnd.dev.sigstore.bundle.v0.3+json", "application/vnd.dev.sigstore.bundle.v0.3+json", {}),
        ("application/vnd.cncf.notary.signature", "application/jose+json", {}),
    ):  # fmt: skip
        data, empty = canonical_json({"signature": kind}), Descriptor.of_bytes(EMPTY, MEDIA_EMPTY)
        layer = Descriptor.of_bytes(data, media, more)
        content = {
            "schemaVersion": 2, "mediaType": MEDIA_MANIFEST, "artifactType": kind, "config": empty.to_dict(),
            "layers": [layer.to_dict()], "subject": model.descriptor.to_dict(),
        }  # fmt: skip
        place.put_blob(empty, EMPTY)
        place.put_blob(layer, data)
        place.put_manifest(canonical_json(content), subject=model.descriptor)
