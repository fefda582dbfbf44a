"""A bundle's papers against the published schemas, and read by other people's programs.

| paper | schema | where it comes from |
| --- | --- | --- |
| OCI manifest, index, layout | OCI image-spec 1.1 (rc2) | Debian: golang-github-opencontainers-image-spec-dev |
| ModelPack config | CNCF model-spec | PyPI: modelpack-client, which ships it |
| bom.cdx.json | CycloneDX 1.6, strict | PyPI: cyclonedx-python-lib, which ships it |
| statements | in-toto and SLSA define them as protobufs | PyPI: in-toto-attestation |

OCI's own schema allows any further member, and no package has the final 1.1: `STRICT` below was written from the text
of the specification (manifest.md, descriptor.md), so that a member that it does not define is noticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry as Schemas
from referencing import Resource
from referencing.jsonschema import DRAFT4
from registry_setting import NEEDS_REGISTRY, RegistryServer
from trust_setting import Setting

from artifacts.bundle import Bundle
from artifacts.registry.manifest import MEDIA_INDEX
from artifacts.registry.oci_layout import Layout
from artifacts.registry.remote import Registry
from artifacts.registry.transfer import attestations_of, push
from stages.data.package import PINS

OCI = Path("/usr/share/gocode/src/github.com/opencontainers/image-spec/schema")
_DESCRIPTOR = {
    "type": "object",
    "required": ["mediaType", "digest", "size"],
    "additionalProperties": False,
    "properties": {
        "mediaType": {"type": "string", "pattern": r"^[\w.+-]+/[\w.+-]+$"},
        "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
        "size": {"type": "integer", "minimum": 0},
        "artifactType": {"type": "string", "pattern": r"^[\w.+-]+/[\w.+-]+$"},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
STRICT = {
    "type": "object",
    "required": ["schemaVersion", "mediaType", "artifactType", "config", "layers"],
    "additionalProperties": False,
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.manifest.v1+json"},
        "artifactType": {"type": "string", "pattern": r"^[\w.+-]+/[\w.+-]+$"},
        "config": _DESCRIPTOR,
        "layers": {"type": "array", "minItems": 1, "items": _DESCRIPTOR},
        "subject": _DESCRIPTOR,
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


@pytest.fixture
def bundle(setting: Setting) -> Bundle:
    return Bundle.open(setting.root / "bundle")


@pytest.fixture(scope="module")
def layout(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layout") / "dist"
    push(Bundle.open(setting.root / "bundle"), Layout(folder), "v1")
    return folder


def _without_id(part: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in part.items() if name != "id"}


def _manifests(layout: Path) -> list[bytes]:
    """The model's and those of what attests it."""
    index = json.loads((layout / "index.json").read_bytes())
    names = [entry["digest"].removeprefix("sha256:") for entry in index["manifests"]]
    return [(layout / "blobs" / "sha256" / name).read_bytes() for name in names]


def test_manifests_index_and_layout_are_what_oci_publishes(layout: Path) -> None:
    if not OCI.is_dir():
        pytest.skip("apt install golang-github-opencontainers-image-spec-dev has the schemas")
    # Without their ids, for they refer to each other by file name.
    schemas = {path.name: json.loads(path.read_bytes(), object_hook=_without_id) for path in OCI.glob("*.json")}
    known = Schemas().with_resources(
        (name, Resource.from_contents(schema, default_specification=DRAFT4)) for name, schema in schemas.items()
    )

    def check(name: str, content: bytes) -> None:
        jsonschema.Draft4Validator(schemas[name], registry=known).validate(json.loads(content))

    manifests = _manifests(layout)
    assert len(manifests) == 4
    for manifest in manifests:
        check("image-manifest-schema.json", manifest)
    check("image-index-schema.json", (layout / "index.json").read_bytes())
    check("image-layout-schema.json", (layout / "oci-layout").read_bytes())
    with pytest.raises(jsonschema.ValidationError):
        check("image-manifest-schema.json", b'{"schemaVersion": 2, "config": {}, "layers": []}')


def test_manifests_have_no_member_that_the_oci_specification_does_not_define(layout: Path) -> None:
    manifests = [json.loads(data) for data in _manifests(layout)]
    for manifest in manifests:
        jsonschema.Draft202012Validator(STRICT).validate(manifest)
    subjects = [manifest["subject"] for manifest in manifests if "subject" in manifest]
    assert len(subjects) == 3 and len({json.dumps(subject) for subject in subjects}) == 1


def test_the_config_is_what_modelpack_publishes(bundle: Bundle) -> None:
    from license_expression import get_spdx_licensing
    from modelpack_client.schema import CONFIG_SCHEMA

    jsonschema.Draft202012Validator(CONFIG_SCHEMA).validate(bundle.config)
    licences = bundle.config["descriptor"]["licenses"]  # type: ignore[index]
    assert licences == ["Apache-2.0"] == [bundle.manifest.annotations["org.opencontainers.image.licenses"]]
    assert get_spdx_licensing().validate(licences[0]).errors == []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(CONFIG_SCHEMA).validate({**bundle.config, "more": 1})


@NEEDS_REGISTRY
def test_another_modelpack_client_pulls_it_from_a_registry(bundle: Bundle, tmp_path: Path) -> None:
    registry = RegistryServer(tmp_path / "registry")
    registry.start()
    try:
        place = Registry(f"{registry.host}/me/tiny")
        push(bundle, place, "v1")
        name = f"{registry.host}/me/tiny:v1"
        command = [sys.executable, "-m", "modelpack_client", "--insecure", "pull", name, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(list(attestations_of(place, bundle.manifest))) == 3
    finally:
        registry.kill()
    for title in bundle.manifest.files:
        assert (tmp_path / "out" / title).read_bytes() == (bundle.folder / title).read_bytes()


def test_the_bill_of_materials_is_valid_cyclonedx_and_names_every_file(bundle: Bundle) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (bundle.folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and "timestamp" not in bom["metadata"]
    assert {one["name"] for one in model["pedigree"]["ancestors"]} >= {"HuggingFaceTB/SmolLM2-135M-Instruct"}
    hashes = {one["name"]: one["hashes"][0]["content"] for one in bom["components"] if one["type"] == "file"}
    assert hashes == {name: bundle.manifest.files[name].hex for name in ("model.gguf", "mmproj.gguf")}
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {metric["type"] for metric in metrics} >= {"max_asr", "min_fidelity"}


def test_statements_are_what_their_specifications_define(bundle: Bundle) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    for name, message in (("provenance", Provenance()), ("test-result", TestResult())):
        envelope = json.loads((bundle.folder / "attestations" / f"{name}.intoto.json").read_bytes())
        assert set(envelope) == {"payload", "payloadType", "signatures"}  # DSSE, protocol.md
        assert envelope["payloadType"] == "application/vnd.in-toto+json" and len(envelope["signatures"]) == 1
        statement = json.loads(b64decode(envelope["payload"]))
        found = json_format.ParseDict(statement, statement_pb2.Statement())
        Statement.copy_from_pb(found).validate()
        json_format.ParseDict(statement["predicate"], message)  # no field that the definition does not have
        if name == "provenance":
            parts = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
            named = {one["name"]: one for one in parts if "name" in one}
            assert (
                "commit" in named["llama.cpp"]["annotations"]["build"]
                and len(named["source"]["digest"]["sha256"]) == 64
            )
            # The demo's prompts lie in wheels, of which the digest is known beforehand.
            data = {one["uri"]: one for one in parts if "uri" in one and "digest" in one}
            wheel = data[f"pkg:pypi/pyrit@{PINS['pyrit'].version}"]
            assert wheel["digest"] == {"sha256": PINS["pyrit"].sha256}
            assert "adv_bench" in wheel["annotations"]["read"]
        digests = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
        assert digests["model.gguf"] == bundle.manifest.files["model.gguf"].hex


def test_the_index_says_what_each_manifest_is(layout: Path) -> None:
    index = json.loads((layout / "index.json").read_bytes())
    assert index["mediaType"] == MEDIA_INDEX
    assert {entry["artifactType"] for entry in index["manifests"]} == {
        "application/vnd.cncf.model.manifest.v1+json",
        "application/vnd.dev.sigstore.bundle.v0.3+json",
        "application/vnd.in-toto+json",
    }
