"""The graph: every stage of a recipe checked, in an order in which each finds its inputs made."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from artifacts.errors import PipelineError, RecipeError
from pipeline.device import budget_problem, files_problem, gptq_problem
from pipeline.explain import explain, nearest
from pipeline.recipe import CALIBRATION, SOURCE_ID, Recipe, StageEntry
from pipeline.yaml_source import Place
from stages.data.calibration_mix import CalibrationMix
from stages.stage import Located, Planned, Stage, StageParams, stage_class, stage_names


@dataclass(frozen=True)
class Node:
    """One stage of the recipe, ready to run."""

    id: str
    uses: str
    stage: Stage[StageParams]
    needs: tuple[str, ...]
    inputs: tuple[str, ...]  # needs, then what its parameters refer to; no duplicates
    planned: Planned


@dataclass(frozen=True)
class Graph:
    """Every node after the ones that it takes; the first one has the id "source"."""

    name: str
    nodes: tuple[Node, ...]
    recipe: Recipe

    def node(self, id: str) -> Node:
        """The node of that id.

        Raises:
            KeyError.
        """
        for node in self.nodes:
            if node.id == id:
                return node
        raise KeyError(id)

    @property
    def verdicts(self) -> tuple[Node, ...]:
        """The stages that measure."""
        return tuple(node for node in self.nodes if node.planned.type == "verdict")

    def verified(self, verdict: Node) -> tuple[str, ...]:
        """What a verdict is about: what it needs, without what it only compares with (baseline, controls)."""
        compared = set(verdict.stage.references().values())
        return tuple(id for id in verdict.needs if id not in compared)

    @property
    def shipped(self) -> tuple[str, ...]:
        """Stages whose artifacts are meant for users: what is verified, or else every GGUF that ends a path."""
        verified = dict.fromkeys(id for node in self.verdicts for id in self.verified(node))
        if verified:
            return tuple(verified)
        taken = {id for node in self.nodes for id in node.inputs}
        return tuple(node.id for node in self.nodes if node.planned.type == "gguf" and node.id not in taken)


def build_graph(recipe: Recipe, *, within_budget: bool = True) -> Graph:
    """Check the whole recipe, stages included, and put it in order. Nothing is loaded or fetched.

    Args:
        within_budget: False: a model that does not fit the device is no reason to refuse.

    Raises:
        RecipeError: unknown stage, parameter, input or type; a cycle; a stage that refuses; a budget that nothing fits.
    """
    entries = {SOURCE_ID: StageEntry.model_validate({"uses": "source", "with": recipe.source}), **recipe.stages}
    stages = {id: _stage(recipe, id, entry) for id, entry in entries.items()}
    if recipe.calibration is not None and not any(_calibrates(type(stage.params)) for stage in stages.values()):
        raise RecipeError(
            "the recipe says what to calibrate on, and no stage calibrates",
            where=recipe.where(CALIBRATION),
            way_out="take it out, or add a stage with `uses: imatrix` or `uses: gptq`",
        )
    needs: dict[str, tuple[str, ...]] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for id, stage in stages.items():
        takes_none = id == SOURCE_ID or (not stage.accepts and "needs" not in entries[id].model_fields_set)
        needs[id] = () if takes_none else tuple(dict.fromkeys(entries[id].needs))
        referred = _references(recipe, id, stage, stages)
        inputs[id] = tuple(dict.fromkeys((*needs[id], *referred)))
        for need in needs[id]:
            if need not in stages:
                raise RecipeError(
                    f"stage '{id}' needs '{need}', which is not a stage of this recipe",
                    where=recipe.where("stages", id, "needs"),
                    way_out=nearest(need, stages),
                )
    nodes: dict[str, Node] = {}
    for id in _order(recipe, inputs):
        stage = stages[id]
        _check_inputs(recipe, id, stage, needs[id], nodes)
        planned = _plan(recipe, id, stage, {name: nodes[name].planned for name in inputs[id]})
        _check_device(recipe, id, stage)
        if within_budget:
            _check_budget(recipe, id, stage, planned)
        _check_resources(recipe, id, stage, planned)
        nodes[id] = Node(id, entries[id].uses, stage, needs[id], inputs[id], planned)
    graph = Graph(recipe.name, tuple(nodes.values()), recipe)
    _check_ending(graph)
    return graph


def _place(id: str, *rest: str | int) -> Place:
    """Where a stage's parameters stand in the recipe; the source's are at its top."""
    return ("source", *rest) if id == SOURCE_ID else ("stages", id, "with", *rest)


def _stage(recipe: Recipe, id: str, entry: StageEntry) -> Stage[StageParams]:
    where = recipe.where("source") if id == SOURCE_ID else recipe.where("stages", id, "uses")
    try:
        cls = stage_class(entry.uses)
    except KeyError:
        raise RecipeError(
            f"unknown stage {entry.uses!r}", where=where, way_out=nearest(entry.uses, stage_names())
        ) from None
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the stage {entry.uses!r} cannot be loaded", where=where, why=str(error), way_out="run `pipeline doctor`"
        ) from error
    values = {key: _located(recipe, cls.Params, key, value, _place(id, key)) for key, value in entry.with_.items()}
    if recipe.calibration is not None and _calibrates(cls.Params):
        written = recipe.calibration.model_dump(exclude_unset=True)
        shared = _located(recipe, cls.Params, CALIBRATION, written, (CALIBRATION,))
        own = values.get(CALIBRATION, {})
        values[CALIBRATION] = {**shared, **own} if isinstance(shared, dict) and isinstance(own, dict) else own
    try:
        params = cls.Params.model_validate(values)
    except ValidationError as error:
        raise explain(error, cls.Params, recipe.document, _place(id)) from None
    except PipelineError as error:
        raise _at(error, recipe.where(*_place(id))) from error
    return cls(params)


def _calibrates(params: type[StageParams]) -> bool:
    field = params.model_fields.get(CALIBRATION)
    return field is not None and field.annotation is CalibrationMix


def _located(recipe: Recipe, model: type[StageParams], key: str, value: object, place: Place) -> object:
    """A path parameter, made absolute from the folder of the file in which it is written."""
    field = next((f for name, f in model.model_fields.items() if key in (name, f.alias)), None)
    if field is None:
        return value
    file = Path(recipe.mark(place).file)
    base = file.parent if recipe.mark(place).line else Path.cwd()
    if isinstance(value, str) and _mentions_path(field.annotation):
        return (base / Path(value).expanduser()).resolve()
    if not any(isinstance(mark, Located) for mark in (*field.metadata, *_marks(field.annotation))):
        return value
    return _absolute(value, base)


def _absolute(value: object, base: Path) -> object:
    if isinstance(value, list):
        return [_absolute(item, base) for item in value]
    if isinstance(value, dict):
        return {key: _absolute(item, base) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../", "~/")):
        return str((base / Path(value).expanduser()).resolve())
    return value


def _mentions_path(annotation: Any) -> bool:
    return annotation is Path or any(_mentions_path(part) for part in get_args(annotation))


def _marks(annotation: Any) -> list[object]:
    """What `Annotated` says anywhere in a type."""
    own = getattr(annotation, "__metadata__", ())
    return [*own, *(mark for part in get_args(annotation) for mark in _marks(part))]


def _references(recipe: Recipe, id: str, stage: Stage[StageParams], stages: Mapping[str, object]) -> tuple[str, ...]:
    found = stage.references()
    for parameter, target in found.items():
        if target not in stages:
            raise RecipeError(
                f"{parameter} of stage '{id}' names '{target}', which is not a stage of this recipe",
                where=recipe.where(*_place(id, parameter.partition("[")[0])),
                way_out=nearest(target, stages),
            )
    return tuple(found.values())


def _order(recipe: Recipe, inputs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Topological, and the recipe's own order wherever that is free."""
    sorter = graphlib.TopologicalSorter(inputs)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = list(reversed(error.args[1]))  # graphlib lists each node before the one that takes it
        raise RecipeError(
            f"the stages need each other in a circle: {' needs '.join(cycle)}",
            where=recipe.where("stages", cycle[0], "needs"),
            way_out="take one of these out of `needs`",
        ) from None
    rank = {id: position for position, id in enumerate(inputs)}
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=rank.__getitem__)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def _check_inputs(
    recipe: Recipe, id: str, stage: Stage[StageParams], needs: tuple[str, ...], nodes: Mapping[str, Node]
) -> None:
    if id == SOURCE_ID:
        return
    where = recipe.where("stages", id, "needs")
    if stage.accepts and not stage.many and len(needs) != 1:
        raise RecipeError(
            f"stage '{id}' takes one input, not {len(needs)}",
            where=where,
            why=f"it needs {', '.join(needs)}",
            way_out="leave one in `needs`, or write a matrix",
        )
    for need in needs:
        made = nodes[need].planned.type
        if made not in stage.accepts:
            fitting = [other.id for other in nodes.values() if other.planned.type in stage.accepts]
            raise RecipeError(
                f"stage '{id}' cannot take '{need}'",
                where=where,
                why=f"'{need}' makes a {made}, {stage.name} takes {' or '.join(stage.accepts) or 'nothing'}",
                way_out=f"it could take: {', '.join(fitting)}" if fitting else None,
            )


def _plan(recipe: Recipe, id: str, stage: Stage[StageParams], inputs: Mapping[str, Planned]) -> Planned:
    try:
        return stage.plan(inputs)
    except PipelineError as error:
        raise _at(error, recipe.where(*_place(id))) from error


def _at(error: PipelineError, where: str) -> RecipeError:
    """The same refusal, with its place in the recipe."""
    why = error.why if error.where is None else "; ".join(filter(None, (error.where, error.why)))
    return RecipeError(error.what, where=where, why=why, way_out=error.way_out)


def _check_device(recipe: Recipe, id: str, stage: Stage[StageParams]) -> None:
    reason = stage.needs_device()
    if recipe.device is None and reason is not None:
        raise RecipeError(
            f"stage '{id}' needs a device, and the recipe names none",
            where=recipe.where("stages", id),
            why=reason,
            way_out="add a device to the recipe, for instance `device: laptop-4gb`",
        )


def _check_budget(recipe: Recipe, id: str, stage: Stage[StageParams], planned: Planned) -> None:
    problem = _budget_problem(recipe, stage.params, planned)
    if problem is not None:
        what, why, way_out = problem
        where = recipe.where("source") if id == SOURCE_ID else recipe.where("stages", id)
        raise RecipeError(f"stage '{id}': {what}", where=where, why=why, way_out=way_out)


def _budget_problem(recipe: Recipe, params: StageParams, planned: Planned) -> tuple[str, str, str] | None:
    """What is wrong, why, and the way out. A GGUF that is there may be of any size, unless a gate asks for one."""
    from stages.runtimes.finished import gguf_files
    from stages.source import SourceParams, parse_model

    device, limit = recipe.device, recipe.gates.memory
    check = {"gguf": budget_problem, "gptq": gptq_problem}.get(planned.type)
    if device is None or check is None:
        return None
    if planned.spec is not None:
        return check(planned.spec, device)
    if not isinstance(params, SourceParams) or planned.type != "gguf" or limit is None:
        return None
    files = gguf_files(Path(parse_model(params.model)[1]), params.mmproj)
    return files_problem(files, device, device.memory if limit == "device" else limit)


def _check_resources(recipe: Recipe, id: str, stage: Stage[StageParams], planned: Planned) -> None:
    try:
        stage.check_resources(recipe.resources_of(id), planned)
    except PipelineError as error:
        raise _at(error, recipe.where("stages", id, "resources")) from error


def _check_ending(graph: Graph) -> None:
    recipe = graph.recipe
    asked = recipe.gates.asked()
    if asked and not graph.verdicts:
        raise RecipeError(
            "the recipe has gates but no stage that measures",
            where=recipe.where("gates"),
            why=f"{', '.join(asked)} could not be measured, so nothing could ever be published",
            way_out="add a stage with `uses: icet-verify` that needs the files to ship",
        )
    for node in graph.verdicts:
        if asked and (reason := node.stage.ungated()) is not None:
            raise RecipeError(
                f"no gate may read what '{node.id}' measures",
                where=recipe.where("gates"),
                why=reason,
                way_out="leave the gates out, and verify the recipe that you choose on the test side",
            )
    unmeasured = [id for id in graph.shipped if graph.node(id).planned.type == "gptq"]
    if "memory" in asked and unmeasured:
        raise RecipeError(
            f"the gate `memory` cannot hold: '{unmeasured[0]}' is a GPTQ checkpoint",
            where=recipe.where("gates", "memory"),
            why="what a process takes that answers from one depends on the kernels and the device that run it; it is "
            "neither predicted nor measured here, and a gate that was not measured fails",
            way_out="leave the gate out, or verify the GGUF alone where memory must hold",
        )
    if recipe.publish is not None and not graph.shipped:
        raise RecipeError(
            "there is nothing to publish",
            where=recipe.where("publish"),
            why="no stage makes a GGUF, and none is verified",
            way_out="add a stage with `uses: gguf`",
        )
