"""Keyless signatures (Sigstore): an identity instead of a key.

Who signs shows a token of an identity provider (SIGSTORE_ID_TOKEN, what a CI service offers, or a login in a browser).
Sigstore's authority gives a certificate for that identity that holds for minutes, and its public log keeps what was
signed and when. Who checks names the identity and the provider. What is published this way tells the world who signed.

`instance` is a client trust configuration (sigstore protobuf-specs, ClientTrustConfig) of an own Sigstore; without it
the public one is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken

TOKEN: Final = "SIGSTORE_ID_TOKEN"  # environment variable, as Sigstore's own client has it
STATEMENT_SUFFIX: Final = ".intoto.sigstore.json"


class Keyless:
    """Who signs with an identity. The token is asked for once."""

    suffix: Final = STATEMENT_SUFFIX

    def __init__(self, instance: Path | None = None) -> None:
        self.instance = instance

    def load(self) -> None:
        """Get the token, before any work.

        Raises:
            RecipeError: there is none, or Sigstore cannot be reached.
        """
        with_token = self._token
        if not with_token.in_validity_period():
            raise RecipeError("the identity token has expired", way_out=f"set {TOKEN} anew, or log in again")

    def configure(self, config: object) -> None:
        """Tell OpenSSF's model-signing who signs."""
        from model_signing import signing

        assert isinstance(config, signing.Config)
        config.use_sigstore_signer(identity_token=str(self._token), trust_config=self.instance)

    def envelope(self, statement: bytes) -> bytes:
        """The statement in a Sigstore bundle."""
        from sigstore.dsse import Statement
        from sigstore.sign import SigningContext

        with SigningContext.from_trust_config(self._sigstore).signer(self._token) as signer:
            return signer.sign_dsse(Statement(statement)).to_json().encode()

    @cached_property
    def _sigstore(self) -> ClientTrustConfig:
        return trust_config(self.instance)

    @cached_property
    def _token(self) -> IdentityToken:
        from sigstore.errors import Error
        from sigstore.oidc import IdentityToken, Issuer, detect_credential

        try:
            known = os.environ.get(TOKEN) or detect_credential()
            if known:
                return IdentityToken(known)
            return Issuer(self._sigstore.signing_config.get_oidc_url()).identity_token()
        except (Error, OSError) as error:
            raise RecipeError(
                "there is no identity to sign with", why=str(error) or type(error).__name__, way_out=f"set {TOKEN}"
            ) from error


@dataclass(frozen=True)
class Identity:
    """Whose keyless signature is believed. `identity`: an e-mail address or a workflow's URL; `issuer`: who vouches."""

    identity: str
    issuer: str
    instance: Path | None = None

    suffix = STATEMENT_SUFFIX

    def payload(self, data: bytes) -> bytes:
        """What is inside a Sigstore bundle that this identity signed.

        Raises:
            ValueError: it is none, or another signed it.
        """
        from sigstore.errors import Error
        from sigstore.models import Bundle
        from sigstore.verify import Verifier
        from sigstore.verify.policy import Identity as Named

        try:
            verifier = Verifier(trusted_root=trust_config(self.instance).trusted_root)
            policy = Named(identity=self.identity, issuer=self.issuer)
            return verifier.verify_dsse(Bundle.from_json(data), policy)[1]
        except Error as error:
            raise ValueError(str(error) or type(error).__name__) from error


def trust_config(instance: Path | None) -> ClientTrustConfig:
    """The public Sigstore, or another.

    Raises:
        RecipeError: its configuration cannot be read, or had from the public one.
    """
    from sigstore.errors import Error
    from sigstore.models import ClientTrustConfig

    try:
        return (
            ClientTrustConfig.from_json(instance.read_text())
            if instance is not None
            else ClientTrustConfig.production()
        )
    except (Error, OSError, ValueError) as error:
        raise RecipeError(
            f"Sigstore's configuration cannot be read: {instance or 'the public one'}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            way_out="the public one is fetched from the network; or name a client trust configuration of your own",
        ) from error
