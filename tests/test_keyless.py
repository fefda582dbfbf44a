"""Keyless signatures, against a Sigstore on loopback (`sigstore_stand_in`; the public one cannot be reached here)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sigstore_stand_in import ISSUER, Sigstore, identity_token
from trust_setting import Setting, wrong_of

from artifacts.attestation_check import Policy, check_bundle
from artifacts.bundle import Bundle
from artifacts.errors import RecipeError
from artifacts.keyless import Identity, Keyless
from artifacts.registry.oci_layout import Layout
from artifacts.registry.transfer import pull, push, resolve
from artifacts.signing import Trust
from pipeline.commands.check import read_policy
from pipeline.publish import publish

ME = "me@example.com"


@pytest.fixture(scope="module")
def sigstore() -> Iterator[Sigstore]:
    service = Sigstore()
    yield service
    service.close()


@pytest.fixture(scope="module")
def signed(sigstore: Sigstore, setting: Setting) -> Bundle:
    """Published as `ME`."""
    configuration = sigstore.configuration(setting.root / "sigstore.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGSTORE_ID_TOKEN", identity_token(ME))
        publish(setting.graph("folder:unused"), setting.folder, setting.run.artifacts,
                to=f"folder:{setting.root / 'by-me'}", signer=Keyless(configuration))  # fmt: skip
    return Bundle.open(setting.root / "by-me")


def test_an_identity_signs_and_whoever_names_it_may_check(signed: Bundle, setting: Setting, tmp_path: Path) -> None:
    assert [path.name for path in signed.attestations()] == [
        "model.sigstore.json", "provenance.intoto.sigstore.json", "test-result.intoto.sigstore.json",
    ]  # fmt: skip
    (tmp_path / "policy.yaml").write_text(
        f"policy: 1\nsigners: [{{identity: {ME}, issuer: '{ISSUER}', sigstore: {setting.root / 'sigstore.json'}}}]\n"
    )
    layout = Layout(tmp_path / "dist")
    push(signed, layout, "v1")
    pulled = pull(layout, resolve(layout, "v1"), tmp_path / "out")
    assert wrong_of(check_bundle(pulled, read_policy(tmp_path / "policy.yaml"))) == {}


@pytest.mark.parametrize(("identity", "issuer"), [("you@example.com", ISSUER), (ME, "https://other.example")])
def test_another_identity_or_provider_is_refused(signed: Bundle, setting: Setting, identity: str, issuer: str) -> None:
    trust = Trust(identity=Identity(identity, issuer, setting.root / "sigstore.json"))
    wrong = wrong_of(check_bundle(signed, Policy((trust,))))
    assert "it is no signature of" in wrong["signature"] and "nobody trusted signed" in wrong["verdict"]


def test_another_sigstore_a_key_and_a_changed_statement_are_refused(
    signed: Bundle, setting: Setting, tmp_path: Path
) -> None:
    other = Sigstore()
    elsewhere = Trust(identity=Identity(ME, ISSUER, other.configuration(tmp_path / "other.json")))
    other.close()
    assert "it is no signature of" in wrong_of(check_bundle(signed, Policy((elsewhere,))))["signature"]
    assert "signature" in wrong_of(check_bundle(signed, setting.policy))
    me = Policy((Trust(identity=Identity(ME, ISSUER, setting.root / "sigstore.json")),))
    by_key = Bundle.open(setting.root / "bundle")
    assert "signature" in wrong_of(check_bundle(by_key, me))
    copy = tmp_path / "b"
    shutil.copytree(signed.folder, copy)
    path = copy / "attestations" / "test-result.intoto.sigstore.json"
    path.write_text(
        path.read_text().replace('"logIndex": "0"', '"logIndex": "1"').replace('"logIndex":"0"', '"logIndex":"1"')
    )
    assert "not signed by who signed the bundle" in wrong_of(check_bundle(Bundle.open(copy), me))["verdict"]


@pytest.mark.parametrize("token", ["", "no token"])
def test_without_an_identity_nothing_is_published(
    setting: Setting, sigstore: Sigstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", token or identity_token(ME, seconds=-60))
    signer = Keyless(sigstore.configuration(tmp_path / "sigstore.json"))
    with pytest.raises(RecipeError, match="no identity to sign with"):
        publish(setting.graph("folder:unused"), setting.folder, setting.run.artifacts, to=f"folder:{tmp_path / 'b'}",
                signer=signer)  # fmt: skip
    assert not (tmp_path / "b").exists()
