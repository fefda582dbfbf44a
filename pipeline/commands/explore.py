"""What a budget could be met with: fewer bits, an earlier exit, fewer blocks; what each takes, and what is known of it.

Notable:
- memory and size are predicted as in the plan, from shapes;
- the KL that a type should come to is the sum of what each group of tensors was measured to cost in it, where
  `type: auto` has measured this very checkpoint with the same importance matrix, or without one; else it is not known,
  and not guessed. It is KL without images: an earlier exit does not change it, and what fewer blocks do to it is not
  known before they are gone;
- what a verification in the store has measured of the same model in the same type, at the same exit, with as many
  blocks, stands beside; the same model is one that the same stages with the same parameters made of the same source,
  and a file of which single tensors, the image encoder or an importance matrix differ is another one;
- a file that `type: auto` has made already stands first, with its own figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from artifacts.errors import PipelineError, StageError
from artifacts.measures import MEASURES_NAME, Measure, read_measures
from pipeline.commands.runs import table
from pipeline.device import kinds_for, show_bytes

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.store import Store
    from pipeline.graph import Graph, Node
    from stages.models.spec import ModelSpec
    from stages.runtimes.llamacpp_library import CacheType
    from stages.runtimes.prediction import MemoryPlan

_CONTEXT: Final = 2048  # tokens, where the recipe names no device
_USUAL: Final = "Q4_0"
_EXITS: Final = 6  # that are shown with no other change, at most
_SHARES: Final = (0.05, 0.1, 0.2, 0.3)  # of the blocks that could be dropped
_SHOWN: Final = ("kl_text", "kl_refusal", "asr", "vqa_accuracy")


@dataclass(frozen=True)
class Measured:
    """What a verification found of such a model."""

    digest: str
    kl_text: float | None = None
    kl_refusal: float | None = None
    asr: float | None = None  # average over exits
    vqa_accuracy: float | None = None


@dataclass(frozen=True)
class Way:
    """One way to make the model of a stage. Bytes; nats a token."""

    change: str  # against the recipe
    type: str
    exit: int | None  # None: it sees no images
    blocks: int  # of the language model
    size: int  # of the tensors in all files
    memory: int
    fits: bool | None  # None: no device is named
    expected_kl_text: float | None  # None: not known
    expected_kl_refusal: float | None
    measured: Measured | None = None


@dataclass(frozen=True)
class Explored:
    """The ways of one gguf stage, the recipe's own first."""

    stage: str
    budget: int | None
    context: int
    estimated_from: str  # which measurement of sensitivity; "" if there is none
    ways: tuple[Way, ...] = field(default=())
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def explore(graph: Graph) -> list[Explored]:
    """Every gguf stage's ways. Runs nothing, downloads nothing.

    Args:
        graph: built without its check of the budget: what does not fit is what this is for.
    """
    from pipeline.commands.load import open_store
    from pipeline.keys import cached_artifacts

    store = open_store()
    cached = cached_artifacts(graph, store)
    return [_explored(graph, node, store, cached) for node in graph.nodes if node.planned.type == "gguf"]


@dataclass(frozen=True)
class _Room:
    """What a device allows. `budget` None: no device is named."""

    context: int = _CONTEXT
    budget: int | None = None
    cache_type: CacheType = "F16"

    def plan(self, spec: ModelSpec) -> MemoryPlan:
        from stages.runtimes.prediction import predict_memory

        return predict_memory(spec, self.context, cache_type=self.cache_type)

    def file_bytes(self, spec: ModelSpec) -> int:
        """Of the language model's tensors."""
        return sum(self.plan(spec).by_type.values())

    def holds(self, spec: ModelSpec) -> bool:
        return self.budget is None or self.plan(spec).total <= self.budget


def _explored(graph: Graph, node: Node, store: Store, cached: Mapping[str, Artifact]) -> Explored:
    device = graph.recipe.device
    room = _Room(device.context, device.memory, device.kv_cache) if device is not None else _Room()
    spec = node.planned.spec
    if spec is None:
        note = "known once the source has been read" if node.needs else "of a finished GGUF nothing can be changed"
        return Explored(node.id, room.budget, room.context, "", note=note)
    checkpoint = next((cached[id].digest for id in node.needs if id in cached), "")
    known = _Known(checkpoint, _matrix(node, cached), _planned_chain(graph, node), store)
    try:
        ways = [_way(change, one, room, known) for change, one in _specs(spec, room)]
    except StageError as error:
        return Explored(node.id, room.budget, room.context, "", note=f"unknown: {error.what}")
    made = cached.get(node.id)
    if made is not None and spec.quantization is None:
        with suppress(PipelineError):
            ways.insert(0, _made_way(made, spec, room, known))
    return Explored(node.id, room.budget, room.context, known.estimated_from, tuple(ways))


def _specs(spec: ModelSpec, room: _Room) -> Iterator[tuple[str, ModelSpec]]:
    """The recipe's model, then with one change at a time, then what fits with two where one is not enough."""
    types = kinds_for(spec)
    own = spec
    if spec.quantization is None:  # of a stage that chooses, stands the largest type that there is room for
        sized = [_of_type(spec, type) for type in types]
        limit = spec.file_bytes
        fitting = [one for one in sized if room.holds(one) and (limit is None or room.file_bytes(one) <= limit)]
        least = min(sized, key=room.file_bytes)
        largest = max(fitting, key=room.file_bytes, default=least)
        own = largest if room.budget or limit is not None else _of_type(spec, _USUAL)
    yield "as in the recipe" if spec.quantization is not None else f"{own.quantization} for chosen types", own
    others = [(type, _of_type(own, type)) for type in types if type != own.quantization]
    yield from others
    exits = list(_exits(own))
    yield from exits[:: max(1, -(-len(exits) // _EXITS))]
    yield from _fewer_blocks(own)
    for type, one in [(str(own.quantization), own), *others]:
        if not room.holds(one):
            for changes in (_exits(one), _fewer_blocks(one)):  # of each kind the least that is enough
                yield from islice(((f"{type}, {name}", less) for name, less in changes if room.holds(less)), 1)


def _of_type(spec: ModelSpec, type: str) -> ModelSpec:
    return replace(spec, quantization=type, tensor_types=())


def _exits(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """All earlier ones, the latest first."""
    if spec.vision is not None:
        for exit in range(spec.vision.default_exit - 1, 0, -1):
            yield f"exit {exit}", spec.with_exit(exit)


def _fewer_blocks(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Some of the language model's blocks dropped."""
    layers = spec.text.layers
    for gone in dict.fromkeys(max(1, round(share * layers)) for share in _SHARES):
        if gone < layers:
            text = replace(spec.text, layers=layers - gone)
            kept = tuple(pair for pair in spec.tensor_types if _exists(pair[0], text.layers))
            yield f"{gone} blocks fewer" if gone > 1 else "1 block fewer", replace(spec, text=text, tensor_types=kept)


def _exists(tensor: str, layers: int) -> bool:
    parts = tensor.split(".")
    return parts[0] != "blk" or int(parts[1]) < layers


def _way(change: str, spec: ModelSpec, room: _Room, known: _Known) -> Way:
    from stages.runtimes.prediction import planned_types

    plan = room.plan(spec)
    text, refusal = known.expected(planned_types(spec))
    exit = spec.vision.default_exit if spec.vision is not None else None
    return Way(
        change=change,
        type=str(spec.quantization),
        exit=exit,
        blocks=spec.text.layers,
        size=room.file_bytes(spec) + _encoder_bytes(spec),
        memory=plan.total,
        fits=None if room.budget is None else plan.total <= room.budget,
        expected_kl_text=text,
        expected_kl_refusal=refusal,
        measured=known.measured(_Made.planned(spec)),
    )


def _made_way(made: Artifact, spec: ModelSpec, room: _Room, known: _Known) -> Way:
    """The file that the recipe's own stage has made: its types were chosen, so no type's name stands for it.

    Raises:
        PipelineError: its files are damaged.
    """
    from stages.runtimes.gguf_header import read_header
    from stages.runtimes.gguf_parts import model_file, read_model
    from stages.runtimes.llamacpp import MMPROJ_NAME
    from stages.runtimes.prediction import predict_files

    model, mmproj = model_file(made.path), made.path / MMPROJ_NAME
    encoder = mmproj if mmproj.exists() else None
    header = read_model(model)
    plan = predict_files(model, encoder, room.context, cache_type=room.cache_type)
    size = sum(tensor.nbytes for tensor in header.tensors.values())
    if encoder is not None:
        size += sum(tensor.nbytes for tensor in read_header(encoder).tensors.values())
    text, refusal = known.expected({name: tensor.type for name, tensor in header.tensors.items()})
    return Way(
        change="as in the recipe",
        type="auto",
        exit=_exit_of(made),
        blocks=spec.text.layers,
        size=size,
        memory=plan.total,
        fits=None if room.budget is None else plan.total <= room.budget,
        expected_kl_text=text,
        expected_kl_refusal=refusal,
        measured=known.measured_of(made.digest),
    )


def _exit_of(made: Artifact) -> int | None:
    exit = made.metadata.get("default_exit")
    return exit if isinstance(exit, int) else None


def _matrix(node: Node, cached: Mapping[str, Artifact]) -> str | None:
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


def _encoder_bytes(spec: ModelSpec) -> int:
    from stages.runtimes.hollow import encoder_tensors

    if spec.vision is None:
        return 0
    return sum(tensor.nbytes for tensor in encoder_tensors(spec.vision, spec.text.hidden_size).values())


class _Known:
    """What has been measured: sensitivity of this checkpoint, and verdicts about what this chain made."""

    def __init__(self, checkpoint: str, matrix: str | None, chain: Sequence[_Step], store: Store) -> None:
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

    def measured(self, made: _Made) -> Measured | None:
        return self._verdicts.get(made)

    def measured_of(self, digest: str) -> Measured | None:
        return self._by_digest.get(digest)


@dataclass(frozen=True)
class _Made:
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
        exit = _exit_of(made)
        matrices = {name: tensor.shape for name, tensor in header.tensors.items() if len(tensor.shape) > 1}
        return cls(
            params.type,
            exit,
            blocks,
            params.mmproj_type if exit is not None else "",
            params.imatrix is not None,
            tuple(sorted(chosen_types(params.wanted(), matrices).items())),
        )


_Step = tuple[str, Mapping[str, object], int]  # a stage's name, its parameters, its seed
_VARIED: Final = ("layer", "drop")  # parameters that a way changes; its exit and its blocks say them


def _planned_chain(graph: Graph, node: Node) -> Sequence[_Step]:
    """What the recipe does from the source on, before this stage quantizes."""
    from pipeline.keys import canonical_params

    found = []
    while node.needs:
        node = graph.node(node.needs[0])
        found.append(_step(type(node.stage).name, canonical_params(node.stage), graph.recipe.seed_of(node.id)))
    return _in_order(found)


def _made_chain(store: Store, made: Artifact) -> Sequence[_Step]:
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


def _step(stage: str, params: Mapping[str, object], seed: int) -> _Step:
    return stage, {name: value for name, value in params.items() if name not in _VARIED}, seed


def _in_order(backwards: list[_Step]) -> Sequence[_Step]:
    """An encoder that is cut behind all training is the same model left earlier, which the way's exit says."""
    last = backwards[0] if backwards else None
    cut = last is not None and last[0] == "early-exit" and not last[1].get("realign")
    return backwards[:0:-1] if cut else backwards[::-1]


def _verdicts(store: Store, chain: Sequence[_Step]) -> Iterator[tuple[_Made, Measured]]:
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
            key = _Made.of(made)
            if key is not None:
                yield key, Measured(made.digest, **{name: _value(about, name, _exit_of(made)) for name in _SHOWN})


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


def show_explored(found: Sequence[Explored]) -> str:
    """One table a stage."""
    if not found:
        return "explore  no stage makes a GGUF"
    return "\n".join(line for one in found for line in _lines(one))


def _lines(one: Explored) -> Iterator[str]:
    limit = f", budget {show_bytes(one.budget)}" if one.budget is not None else ""
    yield f"\nexplore  {one.stage}: context {one.context}{limit}"
    if not one.ways:
        yield f"  {one.note}"
        return
    head = ("  change", "exit", "blocks", "size", "memory", "", "KL expected", "KL measured", "ASR", "VQA")
    rows = [head]
    for way in one.ways:
        measured = way.measured or Measured("")
        rows.append(
            (
                f"  {way.change}",
                str(way.exit or "-"),
                str(way.blocks),
                show_bytes(way.size),
                show_bytes(way.memory),
                {True: "fits", False: "too large", None: ""}[way.fits],
                _pair(way.expected_kl_text, way.expected_kl_refusal, "not known"),
                _pair(measured.kl_text, measured.kl_refusal, "not measured"),
                _share(measured.asr),
                _share(measured.vqa_accuracy),
            )
        )
    yield table(rows)
    yield "  KL: nats a token on ordinary text / on refusals, without images. " + (
        f"Expected: {one.estimated_from}, summed over groups of tensors."
        if one.estimated_from
        else "Expected ones are known of a checkpoint that type: auto has measured."
    )


def _pair(text: float | None, refusal: float | None, otherwise: str) -> str:
    if text is None and refusal is None:
        return otherwise
    return " / ".join("-" if value is None else f"{value:.2g}" for value in (text, refusal))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"
