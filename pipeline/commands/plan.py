"""What a run would do: the stages in order, what the store already has, and the memory that the result will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import PipelineError, SourceError, StageError
from pipeline.commands.runs import table
from pipeline.device import show_bytes

if TYPE_CHECKING:
    from pipeline.device import Device
    from pipeline.graph import Graph, Node
    from stages.models.spec import ModelSpec
    from stages.runtimes.llamacpp_library import CacheType
    from stages.runtimes.prediction import MemoryPlan

_BAR: Final = 40  # characters
_CONTEXT: Final = 2048  # tokens, where the recipe names no device
_GPTQ: Final = (
    "weights only: what transformers takes beside them depends on the kernels of the machine, and is not predicted"
)


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes that one conversation with a quantized model will take, by what they are for; None: not predicted."""

    type: str
    context: int  # tokens
    weights: int
    kv_cache: int | None = None
    compute: int | None = None
    vision: int | None = None  # image encoder, at work
    overhead: int | None = None
    total: int | None = None
    by_type: dict[str, int] | None = None  # of the weights: bytes in each tensor type
    fallbacks: tuple[str, ...] = ()  # tensors whose shape does not allow the type

    def parts(self) -> list[tuple[str, int | None]]:
        return [
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("compute", self.compute),
            ("image encoder", self.vision),
            ("overhead", self.overhead),
        ]


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan. `digest` "" and `cached` False: it will be run. `memory`: of a quantized model."""

    id: str
    uses: str
    needs: tuple[str, ...]
    makes: str
    summary: str
    cached: bool
    digest: str
    memory: PlannedMemory | None = None
    memory_note: str = ""
    missing: str = ""  # what this machine lacks to run it; "" if nothing, or if it is cached


@dataclass(frozen=True)
class Plan:
    """The answer of `pipeline plan`."""

    recipe: str
    path: str
    device: dict[str, int | str]
    stages: tuple[PlannedStage, ...]
    gates: dict[str, float | str]
    publish: str | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def make_plan(graph: Graph) -> Plan:
    """Look up what is cached and predict memory; runs nothing and downloads nothing."""
    from pipeline.commands.load import open_store
    from pipeline.keys import cached_artifacts

    cached = cached_artifacts(graph, open_store())
    device = graph.recipe.device
    stages = []
    for node in graph.nodes:
        memory, note = _of_file(node, device) or _memory(node.planned.type, node.planned.spec, device)
        stages.append(
            PlannedStage(
                id=node.id,
                uses=node.uses,
                needs=node.inputs,
                makes=node.planned.type,
                summary=type(node.stage).summary,
                cached=node.id in cached,
                digest=cached[node.id].digest if node.id in cached else "",
                memory=memory,
                memory_note=note,
                missing="" if node.id in cached else _missing(node),
            )
        )
    publish = graph.recipe.publish
    return Plan(
        recipe=graph.name,
        path=str(graph.recipe.path),
        device={"name": device.name, **device.numbers()} if device else {},
        stages=tuple(stages),
        gates=graph.recipe.gates.asked(),
        publish=publish.to if publish else None,
    )


def _missing(node: Node) -> str:
    try:
        node.stage.check_ready()
    except PipelineError as error:
        return "; ".join(filter(None, (error.what, error.way_out)))
    return ""


def _kept(device: Device | None) -> tuple[int, CacheType]:
    """Tokens of a conversation, and how their keys and values are kept."""
    return (_CONTEXT, "F16") if device is None else (device.context, device.kv_cache)


def _of_file(node: Node, device: Device | None) -> tuple[PlannedMemory | None, str] | None:
    """The same of a GGUF that the recipe starts from, which lies there; None of all else."""
    from stages.runtimes.finished import gguf_files
    from stages.runtimes.prediction import predict_files
    from stages.source import SourceParams, parse_model

    params = node.stage.params
    if not isinstance(params, SourceParams) or node.planned.type != "gguf":
        return None
    context, kept = _kept(device)
    files = gguf_files(Path(parse_model(params.model)[1]), params.mmproj)
    try:
        found = predict_files(files.model, files.mmproj, context, cache_type=kept)
    except (StageError, SourceError) as error:
        return None, f"unknown: {error.what}"
    return _planned(files.model.name, context, found, ()), ""


def _memory(makes: str, spec: ModelSpec | None, device: Device | None) -> tuple[PlannedMemory | None, str]:
    """What the artifact of a stage will take, and what to know of the figure."""
    context, kept = _kept(device)
    if makes not in ("gguf", "gptq"):
        return None, ""
    if spec is None:
        return None, "known once the source has been read"
    if makes == "gptq":
        if spec.quantization is None:
            return None, "not known of this stage"
        from stages.models.memory import gptq_bytes

        return PlannedMemory(spec.quantization, context, gptq_bytes(spec)), _GPTQ
    from stages.runtimes.prediction import planned_fallbacks, predict_memory

    notes = []
    try:
        if spec.quantization is None:
            found, words = _chosen(spec, device, context, kept)
            if found is None:
                return None, words
            notes.append(words)
        else:
            found = predict_memory(spec, context, cache_type=kept)
        other_types = tuple(str(fallback) for fallback in planned_fallbacks(spec))
    except StageError as error:
        return None, f"unknown: {error.what}"
    if spec.vision is not None and spec.vision.at_most:
        notes.append(f"at most: the exit is chosen while running, counted here as {spec.vision.default_exit}")
    return _planned(spec.quantization or "auto", context, found, other_types), "; ".join(notes)


def _planned(type: str, context: int, found: MemoryPlan, other_types: tuple[str, ...]) -> PlannedMemory:
    return PlannedMemory(
        type=type,
        context=context,
        weights=found.weights,
        kv_cache=found.kv_cache,
        compute=found.compute,
        vision=found.vision,
        overhead=found.overhead,
        total=found.total,
        by_type=dict(found.by_type),
        fallbacks=other_types,
    )


def _chosen(spec: ModelSpec, device: Device | None, context: int, kept: CacheType) -> tuple[MemoryPlan | None, str]:
    """What a model may come to whose types are chosen while running, and what it would with the smallest."""
    from stages.runtimes.prediction import least_memory, most_memory

    most = most_memory(spec, context, device.memory if device is not None else None, cache_type=kept)
    least = show_bytes(least_memory(spec, context, cache_type=kept).total)
    if most is None:
        return None, f"types are chosen while running, for a device that the recipe does not name; at least {least}"
    return most, f"at most: types are chosen while running, and the smallest come to {least}"


def show_plan(plan: Plan) -> str:
    """The plan as text: one line a stage, aligned; then the memory of each quantized model."""
    lines = [f"{plan.recipe}  ({plan.path})"]
    rows = [("stage", "uses", "needs", "makes", "state")]
    for stage in plan.stages:
        state = f"cached {stage.digest[:12]}" if stage.cached else "will run"
        rows.append((stage.id, stage.uses, ", ".join(stage.needs) or "-", stage.makes, state))
    lines += ["", table(rows), ""]
    budget = plan.device.get("memory")
    if isinstance(budget, int):
        kept = ", keys and values in Q8_0" if plan.device.get("kv_cache_bits") == 8 else ""
        lines.append(
            f"device   {plan.device['name']}: {show_bytes(budget)}, context {plan.device['context']} tokens{kept}"
        )
    for stage in plan.stages:
        if stage.makes in ("gguf", "gptq"):
            lines += _show_memory(stage, budget if isinstance(budget, int) else None)
    lines += [f"missing  {stage.id}: {stage.missing}" for stage in plan.stages if stage.missing]
    if plan.gates:
        lines.append("gates    " + ", ".join(f"{name} {limit}" for name, limit in plan.gates.items()))
    lines.append(f"publish  {plan.publish or 'nowhere'}")
    return "\n".join(lines)


def _show_memory(stage: PlannedStage, budget: int | None) -> list[str]:
    memory = stage.memory
    if memory is None:
        return [f"memory   {stage.id}: {stage.memory_note}"]
    context = "" if memory.total is None else f", context {memory.context}"
    rows = [
        (f"  {name}", _aligned(size), _types(memory) if name == "weights" else "")
        for name, size in memory.parts()
        if size
    ]
    if memory.total is not None:
        rows.append(("  total", _aligned(memory.total), _bar(memory, budget) if budget else ""))
    lines = [f"memory   {stage.id}: {memory.type}{context}", table(rows)]
    lines += [f"  note: {words}" for words in (*memory.fallbacks, stage.memory_note) if words]
    return lines


def _aligned(size: int) -> str:
    return show_bytes(size).rjust(len("1000 MiB"))


def _types(memory: PlannedMemory) -> str:
    return ", ".join(f"{name} {show_bytes(size)}" for name, size in (memory.by_type or {}).items() if size >= 1 << 20)


def _bar(memory: PlannedMemory, budget: int) -> str:
    """The budget as a line of characters, one letter for each part's share."""
    assert memory.total is not None
    bar, at = "", 0
    for name, size in memory.parts():
        at += size or 0
        bar += name[0].upper() * (round(_BAR * at / budget) - len(bar))
    return f"[{bar.ljust(_BAR, '.')[:_BAR]}] {100 * memory.total / budget:.0f}% of {show_bytes(budget)}"
