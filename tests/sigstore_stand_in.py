"""A Sigstore on loopback, as far as its client speaks to it: an authority (Fulcio), a log of certificates, a log of
signatures (Rekor v1), and the configuration that names them. Nothing of the public one can be reached here.

Everything that the client verifies is real: the certificate and its signed timestamp (RFC 6962), the inclusion proof in
a tree of one leaf, the signed checkpoint and the promise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from stand_ins import Service

ISSUER = "https://issuer.example"
_SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_OIDC_ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")


def identity_token(identity: str, seconds: int = 600) -> str:
    """As a provider gives it; here nobody checks who signed it."""
    now = int(time.time())
    claims = {"iss": ISSUER, "sub": identity, "aud": "sigstore", "iat": now, "exp": now + seconds}
    return jwt.encode(claims, "0" * 32, algorithm="HS256")


class Sigstore(Service):
    """Its certificates hold for ten minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._root, self._log, self._certificates = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
        self._authority = self._certify(self._root.public_key(), None)

    def configuration(self, path: Path) -> Path:
        """The client trust configuration, written to `path`."""
        ever = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, object]:
            return {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": _b64(_der(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": ever,
                },
                "logId": {"keyId": _b64(_id(key))},
            }  # fmt: skip

        service = [{"url": self.url, "majorApiVersion": 1, "validFor": ever, "operator": "here"}]
        authority = self._authority.public_bytes(serialization.Encoding.DER)
        path.write_text(
            json.dumps(
                {
                    "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                    "trustedRoot": {
                        "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                        "tlogs": [log(self._log)],
                        "ctlogs": [log(self._certificates)],
                        "certificateAuthorities": [
                            {
                                "subject": {"organization": "here", "commonName": "here"},
                                "certChain": {"certificates": [{"rawBytes": _b64(authority)}]},
                                "validFor": ever,
                            }
                        ],
                    },
                    "signingConfig": {
                        "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                        "caUrls": service,
                        "oidcUrls": service,
                        "rekorTlogUrls": service,
                        "rekorTlogConfig": {"selector": "ANY"},
                    },
                }
            )
        )
        return path

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, object]:
        self.calls.append(path)
        if path == "/api/v2/signingCert":
            claims = jwt.decode(headers["Authorization"].removeprefix("Bearer "), options={"verify_signature": False})
            asked = x509.load_pem_x509_csr(base64.b64decode(json.loads(body)["certificateSigningRequest"]))
            key = asked.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            chain = [self._certify(key, claims["sub"]), self._authority]
            texts = [one.public_bytes(serialization.Encoding.PEM).decode() for one in chain]
            return 200, {"signedCertificateEmbeddedSct": {"chain": {"certificates": texts}}}
        if path == "/.well-known/openid-configuration":
            return 200, {"authorization_endpoint": f"{self.url}/auth", "token_endpoint": f"{self.url}/token"}
        if path == "/api/v1/log/entries":
            return 201, {"0" * 64: self._entry(json.loads(body))}
        return 404, {}

    def _certify(self, key: ec.EllipticCurvePublicKey, identity: str | None) -> x509.Certificate:
        """The authority's own certificate, or one for an identity, with the timestamp of the log of certificates."""
        now, name = datetime.now(UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
        leaf = identity is not None
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]) if leaf else name)
            .issuer_name(name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(minutes=10))
            .add_extension(
                x509.KeyUsage(leaf, False, False, False, False, not leaf, not leaf, False, False), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._root.public_key()), critical=False)
        )
        if identity is None:
            builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
            return builder.sign(self._root, hashes.SHA256())
        builder = (
            builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_OIDC_ISSUER, ISSUER.encode()), critical=False)
        )
        stamp = self._stamp(builder.sign(self._root, hashes.SHA256()).tbs_certificate_bytes, now)
        return builder.add_extension(x509.UnrecognizedExtension(_SCT_LIST, stamp), critical=False).sign(
            self._root, hashes.SHA256()
        )

    def _stamp(self, certificate: bytes, now: datetime) -> bytes:
        """A signed certificate timestamp (RFC 6962, 3.2) in a list, in an octet string."""
        at = struct.pack("!Q", int(now.timestamp() * 1000))
        entry = _id(self._root) + struct.pack("!I", len(certificate))[1:] + certificate
        signed = self._certificates.sign(b"\0\0" + at + b"\0\1" + entry + b"\0\0", ec.ECDSA(hashes.SHA256()))
        stamp = b"\0" + _id(self._certificates) + at + b"\0\0" + b"\4\3" + struct.pack("!H", len(signed)) + signed
        listed = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        return b"\4" + (bytes([len(listed)]) if len(listed) < 128 else bytes([0x81, len(listed)])) + listed

    def _entry(self, proposed: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
        """What the log makes of a proposed DSSE entry (rekor, pkg/types/dsse/v0.0.1)."""
        content = proposed["spec"]["proposedContent"]
        text = str(content["envelope"])
        envelope = json.loads(text)
        verifiers = content["verifiers"]
        assert isinstance(verifiers, list)
        payload = base64.b64decode(envelope["payload"])
        body = rfc8785.dumps(
            {
                "apiVersion": "0.0.1",
                "kind": "dsse",
                "spec": {
                    "envelopeHash": {"algorithm": "sha256", "value": hashlib.sha256(text.encode()).hexdigest()},
                    "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
                    "signatures": [
                        {"signature": one["sig"], "verifier": verifiers[0]} for one in envelope["signatures"]
                    ],
                },
            }
        )
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"here - 1\n1\n{_b64(root)}\n"
        signed = _b64(_id(self._log)[:4] + self._log.sign(note.encode(), ec.ECDSA(hashes.SHA256())))
        entry = {"body": _b64(body), "integratedTime": int(time.time()), "logID": _id(self._log).hex(), "logIndex": 0}
        promise = self._log.sign(rfc8785.dumps(entry), ec.ECDSA(hashes.SHA256()))
        proof = {
            "logIndex": 0, "rootHash": root.hex(), "treeSize": 1, "hashes": [],
            "checkpoint": f"{note}\n\N{EM DASH} here {signed}\n",
        }  # fmt: skip
        return {**entry, "verification": {"signedEntryTimestamp": _b64(promise), "inclusionProof": proof}}


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_der(key)).digest()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()
