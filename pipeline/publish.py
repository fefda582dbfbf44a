"""Publishing: what ships, as bundles, signed where there is a key; only if the verdict about these bytes passed.

Each shipped artifact becomes one bundle; several get the stage's id behind the tag or folder. Responses of models are
not published.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from artifacts.artifact import Artifact
from artifacts.attestation import Made, Origin, provenance, test_result
from artifacts.bundle import ROLE, UNVERIFIED, Bundle, BundleFile, write_bundle
from artifacts.card import Gate
from artifacts.errors import StoreError
from artifacts.keyless import Keyless
from artifacts.registry.place import LAYOUT, REGISTRY, Reference, check_tag
from artifacts.registry.transfer import Moved, push
from artifacts.signing import Signer, sign_bundle, sign_statement
from artifacts.store import Store
from pipeline.bundling import Run, base_models, bundle_of, lineage, materials, tools, verdicts_of
from pipeline.events import GateChecked, RunStarted, read_events
from pipeline.graph import Graph
from pipeline.proof import bundle_problem, run_problem
from pipeline.recipe import Publish
from pipeline.report.build import build_report
from pipeline.report.headline import headline
from pipeline.report.model import Report
from pipeline.rundir import RECIPE_NAME
from pipeline.targets import FOLDER, HUB, OLLAMA, Target


@dataclass(frozen=True)
class PublishResult:
    """Where it is now. `digest` is that of the first bundle's manifest; `tags` has every one."""

    target: str
    digest: str
    tags: Mapping[str, str] = field(default_factory=dict)  # tag, folder or hub id -> manifest digest
    unverified: bool = False


def publish(
    graph: Graph,
    run_dir: Path,
    artifacts: Mapping[str, Artifact],
    *,
    to: str | None = None,
    signer: Signer | Keyless | None = None,
    allow_unverified: bool = False,
    moved: Moved | None = None,
) -> PublishResult:
    """Publish what a run ships.

    Args:
        artifacts: recipe stage id -> artifact.
        to, signer: instead of the recipe's.
        allow_unverified: publish, marked as unverified, although a gate failed or nothing was verified.

    Raises:
        GateError: a gate of the recipe failed or was not checked, or no verdict is about these bytes.
        RecipeError: no such target or key. StoreError: nothing to ship, or it cannot be written.
    """
    where = graph.recipe.publish
    if to is None and where is None:
        raise StoreError("the recipe does not say where to publish", way_out="add `publish: {to: oci-layout:dist}`")
    if missing := [name for name in ("cyclonedx", "huggingface_hub") if find_spec(name) is None]:
        raise StoreError(
            "publishing needs libraries that are not installed",
            why=", ".join(missing),
            way_out="pip install 'icet-pipeline[publish]'; the run's artifacts are kept, `pipeline publish` goes on",
        )
    target = Target.parse(to if to is not None else where.to if where is not None else "")
    if signer is None and where is not None and where.sign is not None:
        signer = _signer(where)
    if signer is not None:
        signer.load()  # before any work
    report = build_report(run_dir)
    shipped = [id for id in graph.shipped if id in artifacts]
    if not shipped:
        raise StoreError("there is nothing to publish", why="no shipped artifact was made, or the store lost it")
    problem = run_problem(graph, report, artifacts, [artifacts[id] for id in shipped])
    if problem is not None and not allow_unverified:
        raise problem
    run = Run(graph, run_dir / RECIPE_NAME, artifacts, _public(report, problem is None), report.versions)
    written: dict[str, str] = {}
    for id in shipped:
        one = _named(target, graph.name, id if len(shipped) > 1 else "")
        written[one.tag or one.name] = _publish_one(
            run, id, one, signer, run_dir, unverified=problem is not None, moved=moved
        )
    first = next(iter(written))
    tagged = target.scheme in (LAYOUT, REGISTRY, OLLAMA)
    place = f"{target.scheme}{target.name}:{first}" if tagged else target.scheme + first
    return PublishResult(place, written[first], written, problem is not None)


def _signer(where: Publish) -> Signer | Keyless | None:
    if where.sign == "keyless":
        return Keyless(where.sigstore.expanduser() if where.sigstore is not None else None)
    if where.sign is None:
        return None
    certificate = where.certificate.expanduser() if where.certificate is not None else None
    return Signer(where.sign.expanduser(), certificate, tuple(path.expanduser() for path in where.chain))


def publish_bundle(
    bundle: Bundle, to: str, *, allow_unverified: bool = False, moved: Moved | None = None
) -> PublishResult:
    """Bring a bundle that exists to another place, unchanged if it passed.

    Args:
        allow_unverified: pass on what did not pass, marked; nothing attests a bundle that is marked only now, because
            the mark gives it another digest.

    Raises:
        GateError: no passed verdict is about its files. StoreError: it is damaged, or the place refuses.
    """
    problem = bundle_problem(bundle)
    if problem is not None and not allow_unverified:
        raise problem
    title = bundle.manifest.annotations.get("org.opencontainers.image.title", "model")
    target = _named(Target.parse(to), title, "")
    if problem is None or bundle.unverified:
        return PublishResult(to, _send(bundle, target, moved), unverified=bundle.unverified)
    with _marked(bundle) as marked:
        return PublishResult(to, _send(marked, target, moved), unverified=True)


@contextmanager
def _marked(bundle: Bundle) -> Iterator[Bundle]:
    """The same files under a manifest that says that they are unverified; beside them, where they can be linked."""
    beside = bundle.folder.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".unverified-", dir=beside if os.access(beside, os.W_OK) else None) as name:
        files = [
            BundleFile(title, bundle.folder / title, layer.media_type, layer.annotations.get(ROLE, ""),
                       layer.annotations, layer.hex)
            for title, layer in bundle.manifest.files.items()
        ]  # fmt: skip
        annotations = {**bundle.manifest.annotations, UNVERIFIED: "true"}
        yield write_bundle(Path(name) / "bundle", files, bundle.config, annotations, link=True)


def _named(target: Target, name: str, stage: str) -> Target:
    """The target of one artifact: a tag where there are tags, and the stage's id where several ship."""
    end = f"-{stage}" if stage else ""
    if target.scheme in (FOLDER, HUB):
        return Target(target.scheme, f"{target.name}{end}")
    default = "latest" if target.scheme == OLLAMA else re.sub(r"[^A-Za-z0-9._-]", "-", name)
    tag = (target.tag or default) + end
    check_tag(tag)
    return Target(target.scheme, target.name, tag)


def _public(report: Report, passed: bool) -> Report:
    """The report as it is published: the same whenever the same files are, so without this publishing itself."""
    public = report.publishable().model_copy(update={"status": "passed" if passed else "gate_failed"})
    return public.model_copy(update={"headline": headline(public)})


def _publish_one(
    run: Run,
    id: str,
    target: Target,
    signer: Signer | Keyless | None,
    run_dir: Path,
    *,
    unverified: bool,
    moved: Moved | None,
) -> str:
    attest = partial(_attest, run=run, id=id, signer=signer, run_dir=run_dir)
    if target.scheme == FOLDER:
        return bundle_of(run, id, Path(target.name), unverified=unverified, attest=attest).digest
    with _staging(run.artifacts[id]) as folder:
        bundle = bundle_of(run, id, folder / "bundle", unverified=unverified, link=True, attest=attest)
        return _send(bundle, target, moved)


@contextmanager
def _staging(artifact: Artifact) -> Iterator[Path]:
    """A folder in the artifact's own store, where files can be linked instead of copied and `gc` finds leftovers."""
    root = artifact.path.parent.parent
    if not os.access(root / "tmp", os.W_OK):
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    store = Store(root)
    with store.lock(artifact.digest):
        folder = store.new_output(artifact.digest)
        try:
            yield folder
        finally:
            store.discard(folder)


def _send(bundle: Bundle, target: Target, moved: Moved | None) -> str:
    if target.scheme == HUB:
        from artifacts.registry.hub import upload

        upload(bundle, target.name)
        return bundle.digest
    if target.scheme == OLLAMA:
        from artifacts.registry.ollama import create

        create(bundle, f"{target.name}:{target.tag}")
        return bundle.digest
    if target.scheme == FOLDER:
        from artifacts.registry.transfer import copy

        return copy(bundle, Path(target.name)).digest
    place = Reference("layout" if target.scheme == LAYOUT else "registry", target.name).open()
    return push(bundle, place, target.tag, moved)


def _attest(bundle: Bundle, run: Run, id: str, signer: Signer | Keyless | None, run_dir: Path) -> None:
    """Sign the bundle and what is stated about it; without a signer nothing is stated."""
    if signer is None:
        return
    sign_bundle(bundle, signer)
    sign_statement(bundle, signer, "provenance", provenance(bundle, _origin(run, id, run_dir)))
    gates = [Gate(gate.name, gate.limit, gate.value, gate.passed, gate.reason) for gate in run.report.gates]
    sign_statement(bundle, signer, "test-result", test_result(bundle, gates))


def _origin(run: Run, id: str, run_dir: Path) -> Origin:
    events = read_events(run_dir)
    started = next((event.time for event in events if isinstance(event, RunStarted)), 0.0)
    checked = max((event.time for event in events if isinstance(event, GateChecked)), default=started)
    source = str(run.graph.recipe.source.get("model", ""))
    made = []
    for stage in lineage(run, id):
        manifest = run.artifacts[stage].manifest
        how = manifest.provenance
        made.append(
            Made(
                stage, run.graph.node(stage).uses, manifest.digest, how.key, how.code_version, how.seed, how.params,
                how.inputs,
            )
        )  # fmt: skip
    return Origin(
        run=run_dir.name,
        recipe=run.recipe.read_text(encoding="utf-8"),
        source=source,
        started=started,
        checked=checked,
        stages=made,
        verdicts={name: verdict.digest for name, verdict in verdicts_of(run, id).items()},
        materials=materials(run, id),
        versions={**tools(run, id), **run.versions},
        base_models=base_models(source),
    )
