"""Whatever was changed, swapped, removed or signed by another is refused, each with its own reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from run_folder import RunFolder
from trust_setting import Setting, rebuilt, wrong_of

from artifacts import attestation
from artifacts.attestation_check import Policy, check_bundle
from artifacts.bundle import ARTIFACT, CONFIG_NAME, MANIFEST_NAME, VERDICT, Bundle
from artifacts.card import Gate
from artifacts.errors import StoreError
from artifacts.signing import Signer, Trust, sign_bundle, sign_statement
from pipeline.publish import publish

_ATTESTED = {
    "model.sigstore.json": "signature",
    "provenance.intoto.json": "provenance",
    "test-result.intoto.json": "verdict",
}


def test_every_byte_of_every_file_counts(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    files = sorted(path for path in bundle.folder.rglob("*") if path.is_file())
    assert len(files) > 15
    for path in files:
        name = path.relative_to(bundle.folder).as_posix()
        data = path.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                wrong = wrong_of(check_bundle(Bundle.open(bundle.folder), setting.policy))
            except StoreError as error:  # the manifest itself: not even a bundle any more
                assert name == MANIFEST_NAME, error
                continue
            if name == MANIFEST_NAME:
                assert "not those that were signed: " in wrong["signature"] and MANIFEST_NAME in wrong["signature"]
            elif path.name in _ATTESTED:
                assert _ATTESTED[path.name] in wrong and "files" not in wrong, f"{name} byte {at}: {wrong}"
                assert path.name == "model.sigstore.json" or len(wrong) == 1, f"{name} byte {at}: {wrong}"
            else:
                assert wrong["files"] == f"{name} does not have the digest of the manifest"
                assert f"{name} has other bytes" in wrong["signature"], f"{name} byte {at}: {wrong}"
        path.write_bytes(data)
    assert wrong_of(check_bundle(Bundle.open(bundle.folder), setting.policy)) == {}


def test_every_digest_of_the_manifest_counts(setting: Setting, tmp_path: Path) -> None:
    """As somebody would change it who leaves everything else as it is; and once more signed by mistake."""
    bundle = setting.copy(tmp_path / "b")
    path, text = bundle.folder / MANIFEST_NAME, (bundle.folder / MANIFEST_NAME).read_text()
    digests = re.findall(r"[0-9a-f]{64}", text)
    files = {layer.hex: name for name, layer in bundle.manifest.files.items()} | {
        bundle.manifest.config.hex: CONFIG_NAME
    }
    annotations = bundle.manifest.annotations
    assert set(digests) == {*files, annotations[ARTIFACT], annotations[VERDICT]}
    for digest in digests:
        path.write_text(text.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
        changed = Bundle.open(bundle.folder)
        wrong = wrong_of(check_bundle(changed, setting.policy))
        assert MANIFEST_NAME in wrong["signature"]
        if digest in files:
            assert wrong["files"] == f"{files[digest]} does not have the digest of the manifest"
            continue
        signer = Signer(setting.key)
        sign_bundle(changed, signer)
        sign_statement(
            changed, signer, "test-result", attestation.test_result(changed, [Gate("max_asr", 0.1, 0.0, True, "")])
        )
        reason = "describes another artifact" if digest == annotations[ARTIFACT] else "names is not here"
        assert reason in wrong_of(check_bundle(changed, setting.policy))["verdict"]


def test_every_digest_of_a_statement_counts(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    statement = attestation.test_result(bundle, [Gate("max_asr", 0.1, 0.0, True, "")])
    subjects = statement["subject"]
    assert isinstance(subjects, list) and len(subjects) == len(bundle.manifest.files) + 1
    for number, subject in enumerate(subjects):
        other = [*subjects[:number], {**subject, "digest": {"sha256": "0" * 64}}, *subjects[number + 1 :]]
        sign_statement(bundle, Signer(setting.key), "test-result", {**statement, "subject": other})
        reason = wrong_of(check_bundle(bundle, setting.policy))["verdict"]
        assert "is about another bundle" in reason and subject["name"] in reason
    for broken in ([], [{}], [{"name": "x", "digest": "y"}], "x", [None], subjects[1:]):
        sign_statement(bundle, Signer(setting.key), "test-result", {**statement, "subject": broken})
        assert "is about another bundle" in wrong_of(check_bundle(bundle, setting.policy))["verdict"]


def test_a_file_that_comes_or_goes_is_refused(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    (bundle.folder / ".gitattributes").write_text("x")
    wrong = wrong_of(check_bundle(bundle, setting.policy))
    assert (
        ".gitattributes is not in the manifest" in wrong["files"] and "not those that were signed" in wrong["signature"]
    )
    (bundle.folder / ".gitattributes").unlink()
    (bundle.folder / "RUN.md").unlink()
    assert "RUN.md is missing" in wrong_of(check_bundle(bundle, setting.policy))["files"]


@pytest.mark.parametrize(
    ("name", "finding", "reason"),
    [
        ("model.sigstore.json", "signature", "there is no signature"),
        ("provenance.intoto.json", "provenance", "there is no provenance attestation"),
        ("test-result.intoto.json", "verdict", "there is no test-result attestation"),
    ],
)
def test_a_removed_attestation_is_missed(
    setting: Setting, tmp_path: Path, name: str, finding: str, reason: str
) -> None:
    bundle = setting.copy(tmp_path / "b")
    (bundle.folder / "attestations" / name).unlink()
    assert reason in wrong_of(check_bundle(bundle, setting.policy))[finding]


def test_another_key_is_refused(setting: Setting, tmp_path: Path) -> None:
    policy = Policy((Trust(key=setting.other_key.with_suffix(".pub")),))
    wrong = wrong_of(check_bundle(setting.copy(tmp_path / "b"), policy))
    assert "another key made the signature" in wrong["signature"]
    assert "nobody trusted signed" in wrong["verdict"]


def test_an_attestation_by_another_key_is_refused(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    sign_statement(bundle, Signer(setting.other_key), "test-result", {"_type": "https://in-toto.io/Statement/v1"})
    assert "not signed by who signed the bundle" in wrong_of(check_bundle(bundle, setting.policy))["verdict"]


def _second_bundle(setting: Setting, root: Path) -> Bundle:
    """Another run of the same recipe by the same signer, whose model is another."""
    run = RunFolder(root / "made", asr={"source": 0.3, "harden": 0.05, "plain": 0.4, "gguf": 0.06})
    publish(setting.graph("folder:unused"), run.write(), run.artifacts, to=f"folder:{root / 'b2'}",
            signer=Signer(setting.key))  # fmt: skip
    return Bundle.open(root / "b2")


def test_a_verdict_report_or_signature_of_another_model_is_refused(setting: Setting, tmp_path: Path) -> None:
    other = _second_bundle(setting, tmp_path)
    for name, finding, reason in (
        ("attestations/test-result.intoto.json", "verdict", "about another bundle"),
        ("attestations/provenance.intoto.json", "provenance", "about another bundle"),
        ("attestations/model.sigstore.json", "signature", "not those that were signed"),
        ("report.json", "report", "does not tell what was measured"),
        ("verdict/icet/measures.json", "files", "verdict/icet/measures.json"),
    ):
        bundle = setting.copy(tmp_path / name.replace("/", "-"))
        shutil.copyfile(other.folder / name, bundle.folder / name)
        assert reason in wrong_of(check_bundle(bundle, setting.policy))[finding], name


def test_a_verdict_about_other_files_is_refused_even_if_all_is_signed(setting: Setting, tmp_path: Path) -> None:
    """Who holds the key cannot put another model under an old verdict by mistake."""
    old = setting.copy(tmp_path / "old")
    bundle = rebuilt(old, tmp_path / "new", {"model.gguf": b"GGUF other weights"})
    signer = Signer(setting.key)
    sign_bundle(bundle, signer)
    sign_statement(
        bundle, signer, "test-result", attestation.test_result(bundle, [Gate("max_asr", 0.1, 0.0, True, "")])
    )
    wrong = wrong_of(check_bundle(bundle, setting.policy))
    assert set(wrong) == {"provenance", "verdict"}
    assert "model.gguf is not the file that the verified artifact had" in wrong["verdict"]
