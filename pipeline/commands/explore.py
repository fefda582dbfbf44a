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
from typing import TYPE_CHECKING, Final

from artifacts.errors import PipelineError, StageError
from pipeline.commands.known import Known, Made, Measured, matrix_of, planned_chain
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
    known = Known(checkpoint, matrix_of(node, cached), planned_chain(graph, node), store)
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


def _way(change: str, spec: ModelSpec, room: _Room, known: Known) -> Way:
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
        measured=known.measured(Made.planned(spec)),
    )


def _made_way(made: Artifact, spec: ModelSpec, room: _Room, known: Known) -> Way:
    """The file that the recipe's own stage has made: its types were chosen, so no type's name stands for it.

    Raises:
        PipelineError: its files are damaged.
    """
    from stages.runtimes.gguf_header import read_header
    from stages.runtimes.gguf_parts import mmproj_file, model_file, read_model
    from stages.runtimes.prediction import predict_files

    model, encoder = model_file(made.path), mmproj_file(made.path)
    header = read_model(model)
    plan = predict_files(model, encoder, room.context, cache_type=room.cache_type)
    size = sum(tensor.nbytes for tensor in header.tensors.values())
    if encoder is not None:
        size += sum(tensor.nbytes for tensor in read_header(encoder).tensors.values())
    text, refusal = known.expected({name: tensor.type for name, tensor in header.tensors.items()})
    return Way(
        change="as in the recipe",
        type="auto",
        exit=made.default_exit,
        blocks=spec.text.layers,
        size=size,
        memory=plan.total,
        fits=None if room.budget is None else plan.total <= room.budget,
        expected_kl_text=text,
        expected_kl_refusal=refusal,
        measured=known.measured_of(made.digest),
    )


def _encoder_bytes(spec: ModelSpec) -> int:
    from stages.runtimes.hollow import encoder_tensors

    if spec.vision is None:
        return 0
    return sum(tensor.nbytes for tensor in encoder_tensors(spec.vision, spec.text.hidden_size).values())


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
