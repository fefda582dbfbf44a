"""What a run would do: the stages in order, what the store already has, and the memory that the result will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pipeline.commands.runs import table
from pipeline.device import show_bytes

if TYPE_CHECKING:
    from pipeline.graph import Graph


@dataclass(frozen=True)
class PlannedStage:
    """One line of the plan. `digest` "" and `cached` False: it will be run. `memory`: bytes, of a quantized model."""

    id: str
    uses: str
    needs: tuple[str, ...]
    makes: str
    summary: str
    cached: bool
    digest: str
    memory: int | None = None
    memory_note: str = ""


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
    """Look up what is cached and predict memory; changes nothing and downloads nothing."""
    from pipeline.commands.load import open_store
    from pipeline.keys import cached_artifacts

    cached = cached_artifacts(graph, open_store())
    device = graph.recipe.device
    stages = []
    for node in graph.nodes:
        memory, note = _memory(graph, node.id)
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


def _memory(graph: Graph, id: str) -> tuple[int | None, str]:
    planned = graph.node(id).planned
    if planned.type != "gguf":
        return None, ""
    if planned.spec is None or planned.spec.quantization is None:
        return None, "known once the source has been read"
    from stages.models.memory import predict_memory

    context = graph.recipe.device.context if graph.recipe.device else 2048
    total = predict_memory(planned.spec, planned.spec.quantization, context).total
    note = f"{planned.spec.quantization}, context {context}"
    vision = planned.spec.vision
    if vision is not None and vision.at_most:
        note += f"; at most: the exit is chosen while running, counted here as {vision.default_exit}"
    return total, note


def show_plan(plan: Plan) -> str:
    """The plan as text: one line a stage, aligned."""
    lines = [f"{plan.recipe}  ({plan.path})"]
    rows = [("stage", "uses", "needs", "makes", "state")]
    for stage in plan.stages:
        state = f"cached {stage.digest[:12]}" if stage.cached else "will run"
        rows.append((stage.id, stage.uses, ", ".join(stage.needs) or "-", stage.makes, state))
    lines += ["", table(rows), ""]
    budget = plan.device.get("memory")
    if isinstance(budget, int):
        lines.append(f"device   {plan.device['name']}: {show_bytes(budget)}, context {plan.device['context']} tokens")
    for stage in plan.stages:
        if stage.makes != "gguf":
            continue
        needed = show_bytes(stage.memory) if stage.memory is not None else "unknown"
        lines.append(f"memory   {stage.id}: {needed} ({stage.memory_note})")
    if plan.gates:
        lines.append("gates    " + ", ".join(f"{name} {limit}" for name, limit in plan.gates.items()))
    lines.append(f"publish  {plan.publish or 'nowhere'}")
    return "\n".join(lines)
