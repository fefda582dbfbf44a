"""Trust: what is signed can be checked by anybody, and whatever was tampered with is refused, with its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from run_folder import RECIPE, RunFolder

from artifacts.attestation_check import Finding, Policy, check_bundle
from artifacts.bundle import Bundle
from artifacts.errors import GateError, RecipeError, StoreError
from artifacts.registry.oci_layout import Layout
from artifacts.registry.transfer import pull, push, resolve
from artifacts.signing import Signer, Trust, sign_bundle, sign_statement
from pipeline.commands.check import read_policy
from pipeline.events import GateChecked
from pipeline.graph import Graph, build_graph
from pipeline.publish import publish, publish_bundle
from pipeline.recipe import load_recipe


def write_key(path: Path) -> Path:
    """A private key at `path`, and its public one beside it (`.pub`)."""
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = key.public_key()
    path.with_suffix(".pub").write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return path


def certify(folder: Path, key: Path, name: str, issuer: tuple[Path, Path] | None, days: tuple[int, int]) -> Path:
    """A certificate for a key, valid from and to so many days from now; self-signed without an issuer (key, cert)."""
    own = serialization.load_pem_private_key(key.read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    by, signs = subject, own
    if issuer is not None:
        by = x509.load_pem_x509_certificate(issuer[1].read_bytes()).subject
        signs = serialization.load_pem_private_key(issuer[0].read_bytes(), None)
    now = datetime.now(UTC)
    assert isinstance(own, ec.EllipticCurvePrivateKey) and isinstance(signs, ec.EllipticCurvePrivateKey)
    usage = x509.KeyUsage(True, False, False, False, False, issuer is None, issuer is None, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(signs, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


class Setting:
    """A run, a signer, and the bundle that came of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = RunFolder(root / "made")
        self.folder = self.run.write()
        self.key = write_key(root / "signer.pem")
        self.other_key = write_key(root / "other.pem")
        publish(self.graph("folder:unused"), self.folder, self.run.artifacts, to=f"folder:{root / 'bundle'}",
                signer=Signer(self.key))  # fmt: skip
        self.policy = Policy((Trust(key=self.key.with_suffix(".pub")),))

    def graph(self, to: str, recipe: str = RECIPE) -> Graph:
        (self.root / "recipe.yaml").write_text(recipe)
        return build_graph(load_recipe(self.root / "recipe.yaml", [f"publish.to={to}"]))

    def copy(self, target: Path) -> Bundle:
        shutil.copytree(self.root / "bundle", target)
        return Bundle.open(target)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("trust"))


def _wrong(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.reason for finding in findings if not finding.holds}


def test_what_a_trusted_signer_published_holds_in_every_respect(setting: Setting, tmp_path: Path) -> None:
    findings = check_bundle(setting.copy(tmp_path / "b"), setting.policy)
    assert _wrong(findings) == {}
    assert [finding.name for finding in findings] == ["files", "signature", "provenance", "verdict", "report"]


def test_a_bundle_that_went_through_a_place_is_checked_like_its_folder(setting: Setting, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "dist")
    push(setting.copy(tmp_path / "b"), layout, "v1")
    pulled = pull(layout, resolve(layout, "v1"), tmp_path / "anywhere" / "else")
    assert _wrong(check_bundle(pulled, setting.policy)) == {}


def test_every_byte_of_every_file_counts(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    files = sorted(path for path in bundle.folder.rglob("*") if path.is_file())
    assert len(files) > 15
    for path in files:
        data = path.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            try:
                wrong = _wrong(check_bundle(Bundle.open(bundle.folder), setting.policy))
            except StoreError as error:  # the manifest itself: not even a bundle any more
                assert path.name == "manifest.json" and path.parent.name == "oci", error
                wrong = {"files": str(error)}
            assert wrong, f"{path.relative_to(bundle.folder)} byte {at}"
        path.write_bytes(data)
    assert _wrong(check_bundle(Bundle.open(bundle.folder), setting.policy)) == {}


def test_a_file_that_comes_or_goes_is_refused(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    (bundle.folder / ".gitattributes").write_text("x")
    wrong = _wrong(check_bundle(bundle, setting.policy))
    assert (
        ".gitattributes is not in the manifest" in wrong["files"] and "not those that were signed" in wrong["signature"]
    )
    (bundle.folder / ".gitattributes").unlink()
    (bundle.folder / "RUN.md").unlink()
    assert "RUN.md is missing" in _wrong(check_bundle(bundle, setting.policy))["files"]


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
    assert reason in _wrong(check_bundle(bundle, setting.policy))[finding]


def test_another_key_is_refused(setting: Setting, tmp_path: Path) -> None:
    policy = Policy((Trust(key=setting.other_key.with_suffix(".pub")),))
    wrong = _wrong(check_bundle(setting.copy(tmp_path / "b"), policy))
    assert "another key made the signature" in wrong["signature"]
    assert "nobody trusted signed" in wrong["verdict"]


def test_an_attestation_by_another_key_is_refused(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    sign_statement(bundle, Signer(setting.other_key), "test-result", {"_type": "https://in-toto.io/Statement/v1"})
    assert "not signed by who signed the bundle" in _wrong(check_bundle(bundle, setting.policy))["verdict"]


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
        assert reason in _wrong(check_bundle(bundle, setting.policy))[finding], name


def test_a_verdict_about_other_files_is_refused_even_if_all_is_signed(setting: Setting, tmp_path: Path) -> None:
    """Who holds the key cannot put another model under an old verdict by mistake."""
    from artifacts.attestation import test_result
    from artifacts.bundle import ROLE, BundleFile, write_bundle
    from artifacts.card import Gate

    old = setting.copy(tmp_path / "old")
    files = [
        BundleFile(name, (old.folder / name).read_bytes(), layer.media_type, layer.annotations[ROLE])
        for name, layer in old.manifest.files.items()
    ]
    swapped = [
        BundleFile("model.gguf", b"GGUF other weights", one.media_type, one.role) if one.title == "model.gguf" else one
        for one in files
    ]
    config = {key: value for key, value in old.config.items() if key != "modelfs"}
    bundle = write_bundle(tmp_path / "new", swapped, config, old.manifest.annotations)
    signer = Signer(setting.key)
    sign_bundle(bundle, signer)
    sign_statement(bundle, signer, "test-result", test_result(bundle, [Gate("max_asr", 0.1, 0.0, True, "")]))
    wrong = _wrong(check_bundle(bundle, setting.policy))
    assert set(wrong) == {"provenance", "verdict"}
    assert "model.gguf is not the file that the verified artifact had" in wrong["verdict"]


@pytest.mark.parametrize(("days", "reason"), [((-30, 30), ""), ((-30, -1), "expired"), ((1, 30), "not valid yet")])
def test_a_certificate_holds_only_in_its_time(
    setting: Setting, tmp_path: Path, days: tuple[int, int], reason: str
) -> None:
    root_key = write_key(tmp_path / "root.key")
    root = certify(tmp_path, root_key, "root", None, (-60, 60))
    leaf = certify(tmp_path, setting.key, "Release team", (root_key, root), days)
    bundle = setting.copy(tmp_path / "b")
    sign_bundle(bundle, Signer(setting.key, leaf))
    wrong = _wrong(check_bundle(bundle, Policy((Trust(authority=root, subject="Release team"),))))
    assert wrong == {} if not reason else reason in wrong["signature"]


def test_a_certificate_of_another_authority_or_holder_is_refused(setting: Setting, tmp_path: Path) -> None:
    root_key, stranger_key = write_key(tmp_path / "root.key"), write_key(tmp_path / "stranger.key")
    root = certify(tmp_path, root_key, "root", None, (-60, 60))
    stranger = certify(tmp_path, stranger_key, "stranger", None, (-60, 60))
    leaf = certify(tmp_path, setting.key, "Release team", (stranger_key, stranger), (-30, 30))
    bundle = setting.copy(tmp_path / "b")
    sign_bundle(bundle, Signer(setting.key, leaf))
    wrong = _wrong(check_bundle(bundle, Policy((Trust(authority=root),))))
    assert "not issued by the trusted authority" in wrong["signature"]
    wrong = _wrong(check_bundle(bundle, Policy((Trust(authority=stranger, subject="Somebody"),))))
    assert "another signer's" in wrong["signature"]


def test_a_policy_asks_for_gates_base_models_and_freshness(setting: Setting, tmp_path: Path) -> None:
    bundle = setting.copy(tmp_path / "b")
    path = tmp_path / "policy.yaml"
    shutil.copyfile(setting.key.with_suffix(".pub"), tmp_path / "signer.pub")

    def wrong(rules: str, now: datetime | None = None) -> dict[str, str]:
        path.write_text("policy: 1\nsigners: [{key: signer.pub}]\n" + rules)
        return _wrong(check_bundle(bundle, read_policy(path), now))

    checked = datetime.fromtimestamp(
        max(event.time for event in setting.run.events if isinstance(event, GateChecked)), UTC
    )
    later = checked + timedelta(days=10)
    assert wrong("gates: {max_asr: 0.15, min_fidelity: null}\nbase_models: ['HuggingFaceTB/*', 'facebook/*']\n") == {}
    assert wrong("max_age_days: 11\n", later) == {}
    assert "10 days ago, at most 9" in wrong("max_age_days: 9\n", later)["freshness"]
    assert "future" in wrong("max_age_days: 9\n", checked - timedelta(days=1))["freshness"]
    assert "the policy asks for 0.01" in wrong("gates: {max_asr: 0.01}\n")["gates"]
    assert "max_kl was not checked" in wrong("gates: {max_kl: 1}\n")["gates"]
    assert "facebook/dinov2-small; the policy allows" in wrong("base_models: ['HuggingFaceTB/*']\n")["provenance"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("policy: 1\nsigners: []\n", "signers"),
        ("policy: 1\nsigners: [{key: nowhere.pub}]\n", "there is no"),
        ("policy: 1\nsigners: [{subject: me}]\n", "a key or an authority"),
        ("policy: 1\nsigners: [{key: a, authority: b}]\n", "a key or an authority"),
        ("policy: 1\nsigners: [{authority: p.yaml}]\ngates: {max_asrr: 1}\n", "max_asr"),
        ("policy: 1\nsigner: []\n", "signers"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_with_its_place(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_policy(tmp_path / "p.yaml")
    assert reason in str(caught.value)


def test_what_did_not_pass_is_published_only_when_asked_and_is_marked_for_ever(
    setting: Setting, tmp_path: Path, change: Callable[[RunFolder], Path]
) -> None:
    run = change(setting.run)
    to = f"folder:{tmp_path / 'b'}"
    with pytest.raises(GateError, match="allow-unverified"):
        publish(setting.graph(to), run, setting.run.artifacts, signer=Signer(setting.key))
    assert not (tmp_path / "b").exists()
    result = publish(setting.graph(to), run, setting.run.artifacts, signer=Signer(setting.key), allow_unverified=True)
    bundle = Bundle.open(tmp_path / "b")
    assert result.unverified and bundle.unverified
    assert "**Unverified.**" in (bundle.folder / "README.md").read_text()
    wrong = _wrong(check_bundle(bundle, setting.policy))
    assert set(wrong) == {"verdict"} and "unverified" in wrong["verdict"]
    loose = Policy(setting.policy.signers, allow_unverified=True)
    assert _wrong(check_bundle(bundle, loose)) == {}
    with pytest.raises(GateError, match="marked as unverified"):
        publish_bundle(bundle, f"folder:{tmp_path / 'c'}")


@pytest.fixture(params=["failed", "unchecked"])
def change(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[RunFolder], Path]:
    def changed(run: RunFolder) -> Path:
        events = [
            event.model_copy(update={"passed": False, "reason": "average ASR 0.4, must be at most 0.15"})
            if isinstance(event, GateChecked) and event.name == "max_asr"
            else event
            for event in run.events
            if request.param == "failed" or not isinstance(event, GateChecked)
        ]
        return run.write(events, tmp_path / "run")

    return changed


def test_a_key_that_cannot_sign_is_refused_before_any_work(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("not a key")
    for key in (tmp_path / "no.pem", tmp_path / "missing.pem"):
        with pytest.raises(RecipeError, match="cannot be read"):
            publish(setting.graph("folder:x"), setting.folder, setting.run.artifacts, to=f"folder:{tmp_path / 'b'}",
                    signer=Signer(key))  # fmt: skip
    assert not (tmp_path / "b").exists()
