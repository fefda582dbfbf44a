"""A run, a signer and the bundle that came of them; keys and certificates."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from run_folder import RECIPE, RunFolder

from artifacts.attestation_check import Finding, Policy
from artifacts.bundle import ATTESTATIONS, ROLE, Bundle, BundleFile, write_bundle
from artifacts.signing import Signer, Trust
from pipeline.graph import Graph, build_graph
from pipeline.publish import publish
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


def certify(
    folder: Path,
    key: Path,
    name: str,
    issuer: tuple[Path, Path] | None,
    days: tuple[int, int],
    *,
    authority: bool | None = None,
) -> Path:
    """A certificate for a key, valid from and to so many days from now; self-signed without an issuer (key, cert).

    `authority`: whether its holder may issue others; default: of a self-signed one.
    """
    ca = issuer is None if authority is None else authority
    own = serialization.load_pem_private_key(key.read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    by, signs = subject, own
    if issuer is not None:
        by = x509.load_pem_x509_certificate(issuer[1].read_bytes()).subject
        signs = serialization.load_pem_private_key(issuer[0].read_bytes(), None)
    now = datetime.now(UTC)
    assert isinstance(own, ec.EllipticCurvePrivateKey) and isinstance(signs, ec.EllipticCurvePrivateKey)
    usage = x509.KeyUsage(True, False, False, False, False, ca, ca, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
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


def rebuilt(
    bundle: Bundle, folder: Path, changes: Mapping[str, bytes], *, attested: bool = False, **notes: str
) -> Bundle:
    """A bundle in `folder` as somebody else would make it: other contents of some files, `notes` in the manifest."""
    files = [
        BundleFile(name, changes.get(name, bundle.folder / name), layer.media_type, layer.annotations[ROLE])
        for name, layer in bundle.manifest.files.items()
    ]
    made = write_bundle(folder, files, bundle.config, {**bundle.manifest.annotations, **notes})
    if attested:
        shutil.copytree(bundle.folder / ATTESTATIONS, folder / ATTESTATIONS)
    return made


def wrong_of(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.reason for finding in findings if not finding.holds}
