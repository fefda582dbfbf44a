"""Whether a bundle may be trusted: each thing that must hold, looked at on its own, with its own reason.

files       every byte is the manifest's
signature   one of the trusted signers signed these files, and may sign today
provenance  that signer says how this very bundle was made; its base models are allowed
verdict     that signer says that the verdict passed; the measures are about the very bytes that ship
report      the report tells what the measures tell
gates       what the policy asks for was checked, held, and with limits at least as strict
freshness   the gates were checked lately enough
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from artifacts.artifact import Artifact
from artifacts.attestation import PROVENANCE, STATEMENT, TEST_RESULT
from artifacts.bundle import ARTIFACT, VERDICT, Bundle
from artifacts.bundle import MANIFEST_NAME as MANIFEST
from artifacts.errors import StoreError
from artifacts.keyless import STATEMENT_SUFFIX
from artifacts.manifest import MANIFEST_NAME, Manifest
from artifacts.measures import MEASURES_NAME, Measure
from artifacts.signing import Signatory, Trust, UntrustedError, read_statement, verify_bundle

_Statement = dict[str, dict[str, dict[str, dict[str, str]]]]  # as far as it is read


@dataclass(frozen=True)
class Policy:
    """What must hold. Without signers nothing is trusted."""

    signers: tuple[Trust, ...]
    gates: dict[str, float | None] | None = (
        None  # name -> the loosest limit allowed, None: any; None: no gate asked for
    )
    base_models: tuple[str, ...] = ()  # patterns such as "HuggingFaceTB/*"; none: all are allowed
    max_age: timedelta | None = None
    allow_unverified: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `reason` is what was found, or why it is refused."""

    name: str
    holds: bool
    reason: str


class _Gate(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    limit: float | str
    value: float | None
    passed: bool


class _ReportArtifact(BaseModel):
    model_config = ConfigDict(extra="ignore")

    digest: str
    shipped: bool = False


class _Report(BaseModel):
    """The part of report.json that is looked at."""

    model_config = ConfigDict(extra="ignore")

    gates: tuple[_Gate, ...] = ()
    measures: tuple[Measure, ...] = ()
    artifacts: tuple[_ReportArtifact, ...] = ()


class _Predicate(BaseModel):
    model_config = ConfigDict(extra="ignore")

    result: str
    passed: tuple[str, ...] = Field(default=(), alias="passedTests")
    failed: tuple[str, ...] = Field(default=(), alias="failedTests")


def check_bundle(bundle: Bundle, policy: Policy, now: datetime | None = None) -> list[Finding]:
    """Look at everything; what cannot be looked at is refused. Every byte is read."""
    findings = [_files(bundle)]
    signature, signatory = _signature(bundle, policy)
    findings.append(signature)
    origin, made = _provenance(bundle, policy, signatory)
    findings += [origin, _verdict(bundle, policy, signatory), _report(bundle)]
    if policy.gates is not None:
        findings.append(_gates(bundle, policy.gates))
    if policy.max_age is not None:
        findings.append(_freshness(made, policy.max_age, now or datetime.now(UTC)))
    return findings


def unsigned_findings(bundle: Bundle) -> list[Finding]:
    """What holds whoever signed: the verdict is about these bytes, and the report tells what it measured."""
    try:
        about = _about_these_bytes(bundle)
    except StoreError as error:
        about = _words(error)
    except (ValidationError, KeyError, OSError) as error:
        about = f"the verdict cannot be read: {error}"
    return [Finding("verdict", about is None, about or "it is about these files"), _report(bundle)]


def _files(bundle: Bundle) -> Finding:
    damage = bundle.damage()
    count = len(bundle.manifest.layers)
    return Finding("files", not damage, "; ".join(damage[:5]) or f"{count} files are as the manifest says")


def _signature(bundle: Bundle, policy: Policy) -> tuple[Finding, Signatory | None]:
    try:
        trust, signatory = verify_bundle(bundle, policy.signers)
    except UntrustedError as error:
        return Finding("signature", False, _words(error)), None
    return Finding("signature", True, f"signed by {trust}"), signatory


def _provenance(bundle: Bundle, policy: Policy, signatory: Signatory | None) -> tuple[Finding, datetime | None]:
    try:
        # The same files may have been verified again, and signed again: the latest word counts.
        statement = max(_statements(bundle, PROVENANCE, "provenance", signatory), key=_latest)
        predicate = statement["predicate"]
        made = _finished(statement)
        bases = [str(name) for name in predicate["buildDefinition"]["externalParameters"]["baseModels"]]
    except UntrustedError as error:
        return Finding("provenance", False, _words(error)), None
    except (KeyError, TypeError, ValueError) as error:
        return Finding("provenance", False, f"it does not say what it should: {error}"), None
    foreign = [base for base in bases if not any(fnmatch.fnmatchcase(base, one) for one in policy.base_models)]
    if policy.base_models and (foreign or not bases):
        allowed = ", ".join(policy.base_models)
        named = ", ".join(foreign) or "no base model that is known"
        return Finding("provenance", False, f"it is made from {named}; the policy allows {allowed}"), made
    return Finding(
        "provenance", True, f"made from {', '.join(bases) or 'a local model'}, checked {made:%Y-%m-%d}"
    ), made


def _verdict(bundle: Bundle, policy: Policy, signatory: Signatory | None) -> Finding:
    try:
        statement = _statements(bundle, TEST_RESULT, "test-result", signatory)[0]
        predicate = _Predicate.model_validate(statement["predicate"])
        about = _about_these_bytes(bundle)
    except (UntrustedError, StoreError) as error:
        return Finding("verdict", False, _words(error))
    except (ValidationError, KeyError, OSError) as error:
        return Finding("verdict", False, f"the verdict cannot be read: {error}")
    if about is not None and not policy.allow_unverified:
        return Finding("verdict", False, about)
    if (predicate.result != "PASSED" or bundle.unverified) and not policy.allow_unverified:
        failed = ", ".join(predicate.failed) or "no gate was checked"
        return Finding("verdict", False, f"it was published unverified: {failed}")
    if predicate.result != "PASSED" or bundle.unverified or about is not None:
        return Finding("verdict", True, "unverified, which the policy allows")
    return Finding("verdict", True, f"{len(predicate.passed)} gates passed, measured on these files")


def _about_these_bytes(bundle: Bundle) -> str | None:
    """Why the verdict is not about the files of this bundle; None when it is."""
    artifact = Artifact.open(bundle.folder)
    files = bundle.manifest.files
    if artifact.digest != bundle.manifest.annotations.get(ARTIFACT):
        return f"{MANIFEST_NAME} describes another artifact than the manifest's annotation"
    for entry in artifact.manifest.files:
        if entry.path not in files or files[entry.path].hex != entry.sha256:
            return f"{entry.path} is not the file that the verified artifact had"
    named = set(filter(None, bundle.manifest.annotations.get(VERDICT, "").split(",")))
    if not named:
        return "there is no verdict about it"
    for path in [name for name in bundle.named("verdict") if name.endswith(f"/{MANIFEST_NAME}")]:
        verdict = Manifest.read((bundle.folder / path).parent)
        named.discard(verdict.digest)
        measures = next((entry.sha256 for entry in verdict.files if entry.path == MEASURES_NAME), "")
        if files[path.replace(MANIFEST_NAME, MEASURES_NAME)].hex != measures:
            return f"the measures beside {path} are not the verdict's"
        rows = _measures(bundle.folder / path.replace(MANIFEST_NAME, MEASURES_NAME))
        if not any(row.digest == artifact.digest for row in rows):
            return f"the verdict is about other files: it measured nothing of {artifact.digest[:12]}"
    return "the verdict that the manifest names is not here" if named else None


def _report(bundle: Bundle) -> Finding:
    """The report is what people read: it must tell what the verdict's measures tell."""
    try:
        report = _read_report(bundle)
        rows = [
            row
            for name in bundle.named("verdict")
            if name.endswith(MEASURES_NAME)
            for row in _measures(bundle.folder / name)
        ]
    except (OSError, ValueError, StoreError) as error:
        return Finding("report", False, f"it cannot be read: {error}")
    artifact = bundle.manifest.annotations.get(ARTIFACT)
    if not any(row.digest == artifact and row.shipped for row in report.artifacts):
        return Finding("report", False, "it is the report of another file: what ships here is not in it")
    told = {row.model_dump_json() for row in report.measures}
    missing = [row for row in rows if row.model_dump_json() not in told]
    if missing:
        return Finding("report", False, f"it does not tell what was measured: {missing[0].measure} is another")
    return Finding("report", True, f"{len(rows)} measures, as in the verdict")


def _gates(bundle: Bundle, asked: dict[str, float | None]) -> Finding:
    try:
        checked = {gate.name: gate for gate in _read_report(bundle).gates}
    except (OSError, ValueError) as error:
        return Finding("gates", False, f"the report cannot be read: {error}")
    wrong = [reason for name, limit in asked.items() if (reason := _gate_problem(name, limit, checked.get(name)))]
    return Finding("gates", not wrong, "; ".join(wrong) or f"{', '.join(asked)} hold as the policy asks")


def _gate_problem(name: str, limit: float | None, gate: _Gate | None) -> str:
    if gate is None:
        return f"{name} was not checked"
    if not gate.passed or gate.value is None:
        return f"{name} did not hold"
    if limit is None:
        return ""
    holds = gate.value >= limit if name.startswith("min_") else gate.value <= limit
    return "" if holds else f"{name} is {gate.value:.6g}, the policy asks for {limit:.6g}"


def _freshness(made: datetime | None, most: timedelta, now: datetime) -> Finding:
    if made is None:
        return Finding("freshness", False, "nobody trusted says when it was verified")
    age = now - made
    if age < timedelta(minutes=-5):
        return Finding("freshness", False, f"it says that it was verified in the future, {made:%Y-%m-%d %H:%M} UTC")
    fresh = age <= most
    return Finding(
        "freshness", fresh, f"verified {age.days} days ago{'' if fresh else f', at most {most.days} are allowed'}"
    )


def _statements(bundle: Bundle, kind: str, name: str, signatory: Signatory | None) -> list[_Statement]:
    """The trusted statements of that kind about this bundle; at least one.

    Raises:
        UntrustedError.
    """
    candidates = [
        path
        for path in bundle.attestations()
        if path.name.endswith((f"{name}.intoto.json", f"{name}{STATEMENT_SUFFIX}"))
    ]
    if not candidates:
        raise UntrustedError(f"there is no {name} attestation: it was never made, or it was removed")
    if signatory is None:
        raise UntrustedError("nobody trusted signed the bundle, so nobody's word is taken")
    found: list[_Statement] = []
    failures: list[UntrustedError] = []
    for path in candidates:
        try:
            statement = read_statement(path, signatory)
            _refuse_other(bundle, statement, kind, path)
        except UntrustedError as error:
            failures.append(error)
            continue
        found.append(statement)  # type: ignore[arg-type]
    if not found:
        raise failures[0]
    return found


def _finished(statement: _Statement) -> datetime:
    """When its gates were checked, as a provenance says.

    Raises:
        KeyError, TypeError, ValueError: it does not.
    """
    metadata = statement["predicate"]["runDetails"]["metadata"]
    made = datetime.fromisoformat(metadata["finishedOn"])
    if made.tzinfo is None:
        raise ValueError(f"{made} is in no time zone")
    return made


def _latest(statement: _Statement) -> datetime:
    try:
        return _finished(statement)
    except (KeyError, TypeError, ValueError):
        return datetime.min.replace(tzinfo=UTC)


def _refuse_other(bundle: Bundle, statement: dict[str, object], kind: str, path: Path) -> None:
    if statement.get("_type") != STATEMENT or statement.get("predicateType") != kind:
        raise UntrustedError(f"{path.name} states something else", why=f"{str(statement.get('predicateType'))[:80]}")
    named = _subjects(statement)
    expected = {MANIFEST: bundle.digest.removeprefix("sha256:")}
    expected |= {name: layer.hex for name, layer in bundle.manifest.files.items()}
    wrong = [name for name, digest in named.items() if expected.get(name) != digest]
    if MANIFEST not in named or wrong:
        why = f"it says something else of {wrong[0]}" if wrong else f"it does not name {bundle.digest}"
        raise UntrustedError(f"{path.name} is about another bundle", why=why)


def _subjects(statement: dict[str, object]) -> dict[str, str]:
    """Name -> SHA-256; nothing when they cannot be read."""
    try:
        return {str(one["name"]): str(one["digest"]["sha256"]) for one in statement["subject"]}  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        return {}


def _read_report(bundle: Bundle) -> _Report:
    names = bundle.named("report")
    if not names:
        raise ValueError("there is none")
    return _Report.model_validate_json((bundle.folder / names[0]).read_bytes())


def _measures(path: Path) -> list[Measure]:
    from artifacts.measures import read_measures

    try:
        return read_measures(path)
    except (OSError, ValidationError) as error:
        raise UntrustedError(f"{path.name} cannot be read", where=str(path)) from error


def _words(error: StoreError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what
