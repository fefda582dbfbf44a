"""Signatures: OpenSSF model-signing over the whole bundle, DSSE envelopes around what is stated about it.

One signer makes both. A key is an elliptic-curve key in PEM (P-256, P-384 or P-521); with a certificate the signature
carries the chain, and whoever checks needs only the authority; without a key, `artifacts.keyless`. The signature covers
every file but `attestations/`, so also `oci/manifest.json`, whose digest the statements name.

What model-signing leaves open is done here: it looks at certificates as of the day they were made, so that an expired
one passes; and it lets `.git*` files go unsigned.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from artifacts.bundle import ATTESTATIONS, Bundle
from artifacts.errors import PipelineError, RecipeError, StoreError
from artifacts.keyless import STATEMENT_SUFFIX, Identity, Keyless
from artifacts.manifest import canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIGNATURE: Final = "model.sigstore.json"
IN_TOTO: Final = "application/vnd.in-toto+json"
PASSWORD: Final = "PIPELINE_KEY_PASSWORD"  # environment variable


class UntrustedError(StoreError):
    """A signature is missing, damaged, or nobody's whom we trust."""

    exit_code = 3


@dataclass(frozen=True)
class Signer:
    """Who signs: a private key, and with it a certificate and its chain where there is an authority."""

    key: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    suffix = ".intoto.json"  # of the statements

    def load(self) -> EllipticCurvePrivateKey:
        """The private key.

        Raises:
            RecipeError: it cannot be read, or is of another kind.
        """
        with _installed():
            from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        try:
            key = load_pem_private_key(self.key.read_bytes(), self.password)
        except (OSError, ValueError, TypeError) as error:
            raise RecipeError(
                f"the key {self.key} cannot be read",
                why=str(error).split(".")[0],
                way_out=f"give a private key in PEM; {PASSWORD} opens one that has a password",
            ) from error
        if not isinstance(key, EllipticCurvePrivateKey):
            raise RecipeError(
                f"{self.key} is no elliptic-curve key",
                way_out="make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
            )
        return key

    @property
    def password(self) -> bytes | None:
        secret = os.environ.get(PASSWORD)
        return secret.encode() if secret else None

    def configure(self, config: object) -> None:
        """Tell OpenSSF's model-signing who signs."""
        from model_signing import signing

        assert isinstance(config, signing.Config)
        if self.certificate is None:
            config.use_elliptic_key_signer(private_key=self.key, password=self.password)
            return
        config.use_certificate_signer(
            private_key=self.key,
            signing_certificate=self.certificate,
            certificate_chain=self.chain or (self.certificate,),  # it does not take an empty one
        )

    def envelope(self, statement: bytes) -> bytes:
        """The statement in a DSSE envelope."""
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner

        envelope = Envelope(statement, IN_TOTO, {})
        envelope.sign(CryptoSigner(self.load()))
        return canonical_json(envelope.to_dict()) + b"\n"


@dataclass(frozen=True)
class Trust:
    """Whose signature is believed: a public key, whoever has a certificate of an authority, or an identity."""

    key: Path | None = None
    authority: Path | None = None
    subject: str | None = None  # of the certificate, as `openssl x509 -subject` or RFC 4514 has it: a part of it
    identity: Identity | None = None

    def __str__(self) -> str:
        if self.identity is not None:
            return f"{self.identity.identity} ({self.identity.issuer})"
        return f"key {self.key}" if self.key is not None else f"authority {self.authority}"


class Signatory(Protocol):
    """Who signed a bundle, and so is believed in what is stated about it."""

    def payload(self, data: bytes) -> bytes:
        """What is inside an envelope that they signed. Raises ValueError: it is none, or another signed it."""


@dataclass(frozen=True)
class KeyHolder:
    """Who has this key."""

    key: EllipticCurvePublicKey

    def payload(self, data: bytes) -> bytes:
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import FormatError, VerificationError
        from securesystemslib.signer import SSlibKey

        try:
            envelope = Envelope.from_dict(json.loads(data))
            if envelope.payload_type != IN_TOTO:
                raise ValueError(f"its payload is {envelope.payload_type!r}")
            envelope.verify([SSlibKey.from_crypto(self.key)], 1)
        except VerificationError as error:
            raise ValueError("it was changed after it was signed, or another key signed it") from error
        except (KeyError, TypeError, AttributeError, FormatError, RecursionError) as error:
            raise ValueError(f"it is damaged: {error}") from error
        payload: bytes = envelope.payload
        return payload


def sign_bundle(bundle: Bundle, signer: Signer | Keyless) -> Path:
    """Sign every file of the bundle; what an earlier signing left is replaced.

    Raises:
        RecipeError: the key or certificate cannot be used. StoreError: the bundle is damaged.
    """
    bundle.refuse_damage()
    signer.load()
    with _installed():
        from model_signing import hashing, signing
    config = signing.Config().set_hashing_config(_everything_but_attestations(hashing.Config()))
    path = bundle.folder / ATTESTATIONS / SIGNATURE
    with _signing(bundle):
        signer.configure(config)
        path.parent.mkdir(exist_ok=True)
        config.sign(bundle.folder, path)
    return path


def sign_statement(bundle: Bundle, signer: Signer | Keyless, name: str, statement: dict[str, object]) -> Path:
    """Put an in-toto statement into a signed envelope beside the signature, as `NAME.intoto.json`."""
    path = bundle.folder / ATTESTATIONS / f"{name}{signer.suffix}"
    path.parent.mkdir(exist_ok=True)
    with _signing(bundle):
        path.write_bytes(signer.envelope(canonical_json(statement)))
    return path


def verify_bundle(bundle: Bundle, trusted: Sequence[Trust]) -> tuple[Trust, Signatory]:
    """Who signed these very files.

    Raises:
        UntrustedError: there is no signature, nobody trusted made it, a certificate does not hold today, or a file
            differs.
    """
    signatures = [
        path
        for path in bundle.attestations()
        if path.name.endswith(".sigstore.json") and not path.name.endswith(STATEMENT_SUFFIX)
    ]
    if not signatures:
        raise UntrustedError(
            "there is no signature",
            where=str(bundle.folder / ATTESTATIONS),
            why="it was never signed, or its signature was removed",
            way_out="get it again from who publishes it; `pipeline publish --key` signs",
        )
    failures: list[UntrustedError] = []
    for path in signatures:
        for trust in trusted:
            try:
                return trust, _verified(bundle, path, trust)
            except UntrustedError as error:
                failures.append(error)
    raise failures[0] if len(failures) == 1 else _most_telling(failures)


def read_statement(path: Path, signatory: Signatory) -> dict[str, object]:
    """The statement inside an envelope that they signed.

    Raises:
        UntrustedError: the envelope is damaged, or signed by another.
    """
    try:
        statement = json.loads(signatory.payload(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UntrustedError(
            f"{path.name} is not signed by who signed the bundle", where=str(path), why=str(error)[:300]
        ) from error
    if not isinstance(statement, dict):
        raise UntrustedError(f"{path.name} holds no statement", where=str(path))
    return statement


def _verified(bundle: Bundle, path: Path, trust: Trust) -> Signatory:
    with _installed():
        from cryptography.exceptions import InvalidSignature
        from model_signing import hashing, verifying
        from OpenSSL.crypto import X509StoreContextError
        from sigstore.errors import Error as SigstoreError
    config = verifying.Config().set_hashing_config(_everything_but_attestations(hashing.Config()))
    signatory: Signatory
    try:
        if trust.identity is not None:
            one = signatory = trust.identity
            config.use_sigstore_verifier(identity=one.identity, oidc_issuer=one.issuer, trust_config=one.instance)
        elif trust.key is not None:
            signatory = KeyHolder(_public_key(trust.key))
            config.use_elliptic_key_verifier(public_key=trust.key)
        else:
            signatory = KeyHolder(_certified_key(path, trust))
            config.use_certificate_verifier(certificate_chain=[trust.authority])
        config.verify(bundle.folder, path)
    except SigstoreError as error:
        raise UntrustedError(f"it is no signature of {trust}", where=str(path), why=str(error)[:300]) from error
    except InvalidSignature as error:
        raise UntrustedError("the signature is damaged, or another key made it", where=str(path)) from error
    except X509StoreContextError as error:
        raise UntrustedError(
            "the certificate was not issued by the trusted authority", where=str(path), why=str(error)
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise _explained(error, path, trust) from error
    return signatory


def _explained(error: Exception, path: Path, trust: Trust) -> UntrustedError:
    said = str(error)
    if said.startswith("Key mismatch"):
        return UntrustedError("another key made the signature", where=str(path), why=f"it is not that of {trust.key}")
    if said.startswith("Signature mismatch: "):
        why = _differences(said.removeprefix("Signature mismatch: "))
        return UntrustedError("the files are not those that were signed", where=str(path), why=why)
    return UntrustedError("the signature cannot be used", where=str(path), why=said[:300])


def _differences(said: str) -> str:
    """model-signing's list of what differs, without digests, which it prints as Python does bytes."""
    try:
        differences = [str(one) for one in ast.literal_eval(said)]
    except (ValueError, SyntaxError):
        return said
    return "; ".join(re.sub(r"^Hash mismatch for '(.+?)': .*", r"\1 has other bytes", one) for one in differences)


def _certified_key(path: Path, trust: Trust) -> EllipticCurvePublicKey:
    """The key of the signing certificate, if all of its chain is valid today."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    material = json.loads(path.read_bytes())["verificationMaterial"]
    chain = material.get("x509CertificateChain")
    if chain is None:
        raise UntrustedError("the signature was made with a key, not a certificate", where=str(path))
    certificates = [x509.load_der_x509_certificate(base64.b64decode(one["rawBytes"])) for one in chain["certificates"]]
    now = datetime.now(UTC)
    for one in certificates:
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise UntrustedError(
                "the certificate has expired" if now > one.not_valid_after_utc else "the certificate is not valid yet",
                where=str(path),
                why=f"{one.subject.rfc4514_string()} holds from {one.not_valid_before_utc:%Y-%m-%d %H:%M} "
                f"to {one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
                way_out="let the publisher sign again with a certificate that holds",
            )
    name = certificates[0].subject.rfc4514_string()
    if trust.subject is not None and trust.subject not in (
        name,
        *(str(part.value) for part in certificates[0].subject),
    ):
        raise UntrustedError("the certificate is another signer's", where=str(path), why=f"it is that of {name}")
    key = certificates[0].public_key()
    if not isinstance(key, EllipticCurvePublicKey):
        raise UntrustedError("the certificate holds no elliptic-curve key", where=str(path))
    return key


def _public_key(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the key {path} cannot be read",
            why=str(error).split(".")[0],
            way_out="give the public key in PEM: openssl ec -in key.pem -pubout -out signer.pub",
        ) from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise RecipeError(f"{path} is no elliptic-curve key")
    return key


def _everything_but_attestations(config: object) -> object:
    from model_signing import hashing

    assert isinstance(config, hashing.Config)
    return config.set_ignored_paths(paths=[Path(ATTESTATIONS)], ignore_git_paths=False)


def _most_telling(failures: Sequence[UntrustedError]) -> UntrustedError:
    """Of several, that which says more than "another key": a trusted signer's own signature that does not hold."""
    others = ("another key", "the signature was made with", "it is no signature of")
    own = [error for error in failures if not error.what.startswith(others)]
    return (own or list(failures))[0]


@contextmanager
def _signing(bundle: Bundle) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # what the libraries raise, Sigstore's above all, has no base in common
        raise RecipeError(
            "the bundle cannot be signed", where=str(bundle.folder), why=str(error) or type(error).__name__
        ) from error


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise StoreError(
            "signatures need libraries that are not installed",
            why=str(error),
            way_out="pip install 'icet-pipeline[publish]'",
        ) from error
