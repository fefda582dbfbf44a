"""What is known of the GGUFs that a stage could make: what types should cost, and what was measured of such files.

`pipeline plan --explore` shows it (`pipeline.commands.explore`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from artifacts.errors import PipelineError
from artifacts.measures import MEASURES_NAME, Measure, read_measures

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.store import Store
    from pipeline.graph import Graph, Node
    from stages.models.spec import ModelSpec

_SHOWN: Final = ("kl_text", "kl_refusal", "asr", "vqa_accuracy")


@dataclass(frozen=True)
class Measured:
    """What a verification found of such a model."""

    digest: str
    kl_text: float | None = None
    kl_refusal: float | None = None
    asr: float | None = None  # average over exits
    vqa_accuracy: float | None = None


class Known:
    """What has been measured: sensitivity of this checkpoint, and verdicts about what this chain made."""

    def __init__(self, checkpoint: str, matrix: str | None, chain: Sequence[Step], store: Store) -> None:
        from stages.quantize.known import known_costs

        self._costs = known_costs(checkpoint, matrix) if checkpoint and matrix is not None else None
        verdicts = list(_verdicts(store, chain))
        self._verdicts = dict(verdicts)
        self._by_digest = {measured.digest: measured for _, measured in verdicts}
        self.estimated_from = f"sensitivity of {checkpoint[:12]}" if self._costs is not None else ""

    def expected(self, types: str | Mapping[str, str]) -> tuple[float | None, float | None]:
        """What the types of a file should cost in KL, text and refusals; None where that is not known."""
        if self._costs is None or isinstance(types, str):
            return (None, None)
        found = self._costs.of(types)
        return (None, None) if found is None else (found.text, found.refusal)

    def measured(self, made: Made) -> Measured | None:
        return self._verdicts.get(made)

    def measured_of(self, digest: str) -> Measured | None:
        return self._by_digest.get(digest)


@dataclass(frozen=True)
class Made:
    """By what two GGUFs of one chain are the same: all that a way may change, and all that decides types beside it."""

    type: str
    exit: int | None
    blocks: int
    encoder: str  # type of the image encoder's matrices
    imatrix: bool
    single: tuple[tuple[str, str], ...]  # tensors that were given types of their own, and which

    @classmethod
    def planned(cls, spec: ModelSpec) -> Self:
        vision = spec.vision
        return cls(
            str(spec.quantization),
            vision.default_exit if vision is not None else None,
            spec.text.layers,
            vision.quantization if vision is not None else "",
            spec.imatrix,
            tuple(sorted(spec.tensor_types)),
        )

    @classmethod
    def of(cls, made: Artifact) -> Self | None:
        """Of an artifact, by its header and the parameters that its manifest says it was made with; None: of no stage
        of ours, or its file is gone."""
        from stages.quantize.gguf import GGUFParams
        from stages.quantize.types import chosen_types
        from stages.runtimes.gguf_parts import model_file, read_model

        try:
            params = GGUFParams.model_validate(dict(made.manifest.provenance.params))
            header = read_model(model_file(made.path))
        except (PipelineError, ValueError):
            return None
        blocks = header.fields.get(f"{header.architecture}.block_count")
        if not isinstance(blocks, int):
            return None
        exit = made.default_exit
        return cls(
            params.type,
            exit,
            blocks,
            params.mmproj_type if exit is not None else "",
            params.imatrix is not None,
            tuple(sorted(chosen_types(params.wanted(), header.matrices).items())),
        )


Step = tuple[str, Mapping[str, object], int]  # a stage's name, its parameters, its seed
_VARIED: Final = ("layer", "drop")  # parameters that a way changes; its exit and its blocks say them


def planned_chain(graph: Graph, node: Node) -> Sequence[Step]:
    """What the recipe does from the source on, before this stage quantizes."""
    from pipeline.keys import canonical_params

    found = []
    while node.needs:
        node = graph.node(node.needs[0])
        found.append(_step(type(node.stage).name, canonical_params(node.stage), graph.recipe.seed_of(node.id)))
    return _in_order(found)


def _made_chain(store: Store, made: Artifact) -> Sequence[Step]:
    """What was done before this artifact was quantized; nothing where the store does not hold all of it any more."""
    found = []
    inputs = made.manifest.provenance.inputs
    while inputs:
        before = _opened(store, next(iter(inputs.values())))
        if before is None:
            return ()
        origin = before.manifest.provenance
        found.append(_step(origin.stage, origin.params, origin.seed))
        inputs = origin.inputs
    return _in_order(found)


def _step(stage: str, params: Mapping[str, object], seed: int) -> Step:
    return stage, {name: value for name, value in params.items() if name not in _VARIED}, seed


def _in_order(backwards: list[Step]) -> Sequence[Step]:
    """An encoder that is cut behind all training is the same model left earlier, which the way's exit says."""
    last = backwards[0] if backwards else None
    cut = last is not None and last[0] == "early-exit" and not last[1].get("realign")
    return backwards[:0:-1] if cut else backwards[::-1]


def _verdicts(store: Store, chain: Sequence[Step]) -> Iterator[tuple[Made, Measured]]:
    """What was measured of every GGUF of this chain that a verdict in the store is about."""
    for digest in store.digests():
        artifact = _opened(store, digest)
        if artifact is None or artifact.type != "verdict":
            continue
        try:
            rows = read_measures(artifact.file(MEASURES_NAME))
        except (PipelineError, OSError, ValueError):
            continue
        for id in dict.fromkeys(row.artifact for row in rows if row.runtime == "llamacpp"):
            about = [row for row in rows if row.artifact == id]
            made = _opened(store, about[0].digest)
            if made is None or not chain or _made_chain(store, made) != chain:
                continue
            key = Made.of(made)
            if key is not None:
                yield key, Measured(made.digest, **{name: _value(about, name, made.default_exit) for name in _SHOWN})


def _opened(store: Store, digest: str) -> Artifact | None:
    from artifacts.artifact import Artifact

    try:
        return Artifact.open(store.object_path(digest))
    except PipelineError:
        return None


def _value(rows: Sequence[Measure], measure: str, default_exit: int | None) -> float | None:
    """Of the artifact as a whole, else at the one exit that it was measured at; about images, at its own exit first."""
    found = [row for row in rows if row.measure == measure]
    whole = [row for row in found if row.exit is None and row.band in (None, "average", "all")]
    own = [row for row in found if measure == "vqa_accuracy" and row.exit is not None and row.exit == default_exit]
    return next((row.value for row in (own or whole or found)), None)


def matrix_of(node: Node, cached: Mapping[str, Artifact]) -> str | None:
    """The digest of the importance matrix of a stage; "": it has none; None: not known before it is made."""
    from stages.quantize.gguf import GGUFParams
    from stages.quantize.known import matrix_digest
    from stages.runtimes.imatrix import IMATRIX_NAME, read_imatrix, referred

    params = node.stage.params
    if not isinstance(params, GGUFParams) or params.imatrix is None:
        return ""
    made = next(iter(referred(params.imatrix).values()), None)
    with suppress(PipelineError, OSError):
        if made is None:
            return matrix_digest(read_imatrix(Path(params.imatrix)))
        if made in cached:
            return matrix_digest(read_imatrix(cached[made].file(IMATRIX_NAME)))
    return None
