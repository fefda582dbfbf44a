"""`pipeline check`: whether a bundle may be trusted, by a key or by a policy.

A policy is a YAML file:

    policy: 1
    signers:                             # one of them must have signed
      - key: signer.pub                  # a public key; paths are relative to the policy
      - {authority: ca.pem, subject: Release team}
      - {identity: me@example.com, issuer: "https://accounts.google.com"}   # keyless, by Sigstore
    gates: {max_asr: 0.15, min_fidelity: 0.99}   # must have held, at limits at least as strict
    base_models: ["HuggingFaceTB/*"]     # all that it is made from
    max_age_days: 90                     # since its gates were checked
    allow_unverified: false
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from artifacts.errors import GateError, RecipeError

if TYPE_CHECKING:
    from artifacts.attestation_check import Finding, Policy
    from artifacts.bundle import Bundle


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SignerEntry(_Part):
    """Whose signature is believed."""

    key: Path | None = Field(default=None, description="A public key in PEM.")
    authority: Path | None = Field(default=None, description="A certificate whose holders may sign.")
    subject: str | None = Field(default=None, description="Only this holder: the whole subject, or one part of it.")
    identity: str | None = Field(default=None, description="Who signed without a key: an e-mail or a workflow's URL.")
    issuer: str | None = Field(
        default=None, description="Who vouches for that identity, e.g. https://accounts.google.com."
    )
    sigstore: Path | None = Field(default=None, description="Configuration of another Sigstore than the public one.")

    @model_validator(mode="after")
    def _one(self) -> SignerEntry:
        if [self.key, self.authority, self.identity].count(None) != 2:
            raise ValueError("a signer has a key or an authority or an identity")
        if (self.identity is None) != (self.issuer is None):
            raise ValueError("an identity and its issuer belong together")
        if self.subject is not None and self.authority is None:
            raise ValueError("only the holder of a certificate has a subject")
        return self


class PolicyFile(_Part):
    """What must hold of a bundle."""

    policy: Literal[1]
    signers: list[SignerEntry] = Field(min_length=1)
    gates: dict[str, float | None] | None = Field(
        default=None, description="Gate -> the loosest limit; null: any limit, but it must have held."
    )
    base_models: list[str] = Field(default_factory=list, description="Patterns; empty: all.")
    max_age_days: float | None = Field(default=None, gt=0)
    allow_unverified: bool = False


def read_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        RecipeError: it cannot be read, or a key or gate in it does not exist.
    """
    from artifacts.attestation_check import Policy
    from artifacts.keyless import Identity
    from artifacts.signing import Trust
    from pipeline.explain import explain, nearest
    from pipeline.recipe import Gates
    from pipeline.yaml_source import plain, read_yaml

    document = read_yaml(path)
    try:
        found = PolicyFile.model_validate(plain(document.data))
    except ValidationError as error:
        raise explain(error, PolicyFile, document, ()) from None
    for name in found.gates or {}:
        if name not in Gates.model_fields:
            raise RecipeError(
                f"unknown gate {name!r}",
                where=str(document.mark(("gates", name))),
                way_out=nearest(name, Gates.model_fields),
            )

    def beside(file: Path | None) -> Path | None:
        if file is None:
            return None
        place = path.parent / file.expanduser()
        if not place.is_file():
            raise RecipeError(f"there is no {place}", where=str(path), way_out="paths are relative to the policy")
        return place

    def trust(one: SignerEntry) -> Trust:
        if one.identity is not None and one.issuer is not None:
            return Trust(identity=Identity(one.identity, one.issuer, beside(one.sigstore)))
        return Trust(beside(one.key), beside(one.authority), one.subject)

    return Policy(
        tuple(trust(one) for one in found.signers),
        found.gates,
        tuple(found.base_models),
        timedelta(days=found.max_age_days) if found.max_age_days is not None else None,
        found.allow_unverified,
    )


def policy_of(key: Path | None, policy: Path | None) -> Policy:
    """The policy that `--key` or `--policy` means.

    Raises:
        RecipeError: neither or both.
    """
    from artifacts.attestation_check import Policy
    from artifacts.signing import Trust

    if (key is None) == (policy is None):
        raise RecipeError(
            "say whom to trust",
            why="a signature by just anybody shows nothing",
            way_out="give --key signer.pub, or --policy policy.yaml",
        )
    return read_policy(policy) if policy is not None else Policy((Trust(key=key),))


def check_named(name: str, policy: Policy) -> tuple[Bundle, list[Finding]]:
    """Look at everything about a bundle, in a folder or behind a reference. Every byte is read."""
    from artifacts.attestation_check import check_bundle
    from pipeline.commands.pull import kept_bundle

    bundle = kept_bundle(name)
    return bundle, check_bundle(bundle, policy)


def refuse_untrusted(bundle: Bundle, policy: Policy, where: str | None = None) -> None:
    """Raises:
    GateError: something about the bundle does not hold. `where`: it came from, if its folder is not to be named.
    """
    from artifacts.attestation_check import check_bundle

    wrong = [finding for finding in check_bundle(bundle, policy) if not finding.holds]
    if wrong:
        raise GateError(
            "the bundle may not be trusted",
            where=where or str(bundle.folder),
            why="; ".join(f"{finding.name}: {finding.reason}" for finding in wrong),
        )


def show_findings(bundle: Bundle, findings: list[Finding]) -> str:
    """As text: one line a finding."""
    from pipeline.commands.runs import table

    rows = [("ok" if finding.holds else "REFUSED", finding.name, finding.reason) for finding in findings]
    return f"{bundle.folder}\n{bundle.digest}\n{table(rows)}"
