"""One recipe on a tiny model of every family, run to its end: leave early, prune, harden, quantize, verify.

What differs between families is only what a family cannot do: Llama 3.2 Vision ships its checkpoint, since no llama.cpp
runs it, and a text-only model has no encoder to leave and no exits to harden.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event as Flag

import pytest
import yaml

from artifacts.errors import RecipeError
from artifacts.measures import Measure, Role
from artifacts.store import Store
from pipeline.commands.load import load_graph
from pipeline.events import EVENT
from pipeline.executors import worker
from pipeline.executors.base import Emit, Executor, Job, Outcome
from pipeline.executors.local import LocalExecutor
from pipeline.report.model import Kind, Report
from pipeline.runner import run
from stages.machine import peak_resident
from stages.models.tiny import build_tiny_llava

Stages = dict[str, dict[str, object]]

LAYER = 2  # of 3 blocks: the exit that the recipe leaves at
SOURCE_EXITS, EXITS = (1, 2, 3), (1, 2)
HARMFUL, HARMLESS, VQA, STEPS = 2, 2, 2, 2

ASKED: dict[str, object] = {
    "harmful": {"advbench": HARMFUL},
    "over_refusal": {"overrefusal": 1, "everyday": 1},
    "images": 1,
    "vqa": VQA,
    "max_new_tokens": 3,
    "fidelity_images": 1,
}
STAGES: Stages = {
    "exit": {"uses": "early-exit", "with": {"layer": LAYER}},
    "prune": {
        "uses": "prune",
        "needs": "exit",
        "with": {"drop": 1, "calibration": {"texts": 1, "length": 16, "questions": 1, "prompts": 1}, "validation": 2},
    },
    "harden": {
        "uses": "l-ppo",
        "needs": "prune",
        "with": {
            "exits": "all",
            "steps": STEPS,
            "prompts_per_step": 4,
            "samples": 2,
            "ppo_epochs": 1,
            "max_new_tokens": 3,
            "images": 2,
            "validation": 1,
        },
    },
    "gguf": {"uses": "gguf", "needs": "harden", "with": {"type": "Q8_0"}},
    "icet": {
        "uses": "icet-verify",
        "needs": "gguf",
        "with": ASKED | {"hardened": "harden"},
    },
}
# Everything passes that was measured; what was not measured fails its gate.
GATES: dict[str, object] = {
    "max_asr": 1,
    "max_worst_asr": 1,
    "max_degenerate": 1,
    "max_over_refusal": 1,
    "max_over_refusal_rise": 1,
    "max_utility_drop": 1,
    "min_fidelity": 0.99,
    "memory": "device",
}


def recipe(folder: Path, model: Path, stages: Stages, gates: Mapping[str, object] = GATES) -> str:
    """The path of a recipe for the model in that folder."""
    document = {
        "recipe": 1,
        "name": "family",
        "source": {"model": str(model)},
        "device": {"memory": "1GiB", "context": 512},
        "stages": stages,
        "gates": dict(gates),
    }
    (folder / "family.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return str(folder / "family.yaml")


def without(*left_out: str, **changed: dict[str, object]) -> Stages:
    """The recipe's stages without some, and with other settings for some."""
    return {id: stage | changed.get(id, {}) for id, stage in STAGES.items() if id not in left_out}


class ThisProcess:
    """Does a job as the worker does, in this process: a process for each stage would load torch again and again."""

    def execute(self, job: Job, emit: Emit, stop: Flag) -> Outcome:
        job = Job.model_validate_json(job.model_dump_json())
        told = job.scratch / "told"
        channel = worker._Channel(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), job.stage_id)
        metadata = worker._as_json(worker._work(job, channel, 0), job)
        for line in told.read_text().splitlines():
            emit(EVENT.validate_python(json.loads(line)))  # type: ignore[arg-type]
        return Outcome(metadata=metadata, peak_rss=peak_resident())

    def close(self) -> None: ...


def report_of(path: str, folder: Path, executor: Executor) -> Report:
    """Run a recipe, and read what its report.json says."""
    result = run(load_graph(path), runs=folder / "runs", store=Store(folder / "store"), executor=executor)
    assert result.status == "passed", result.error and result.error.to_dict()
    report = Report.model_validate_json((result.folder / "report.json").read_text())
    assert report.status == "passed" and {stage.status for stage in report.stages} == {"done"}
    return report


def measured(report: Report, artifact: str, measure: str) -> list[Measure]:
    """Rows that have a value."""
    return [
        row
        for row in report.measures
        if row.artifact == artifact and row.measure == measure and row.value is not None and row.value >= 0
    ]


def holds_every_row(report: Report, models: Mapping[str, tuple[Kind, Role, str]]) -> None:
    """Every exit and measure of models that see images; `models`: stage id -> kind, role and runtime."""
    shown = {subject.artifact: (subject.kind, subject.role, subject.exits) for subject in report.subjects}
    assert set(shown) == set(models) == {row.artifact for row in report.measures}
    for artifact, (kind, role, runtime) in models.items():
        exits = SOURCE_EXITS if kind == "source" else EXITS
        assert shown[artifact] == (kind, role, exits)
        of_this = [row for row in report.measures if row.artifact == artifact]
        assert {(row.role, row.runtime) for row in of_this} == {(role, runtime)}
        for measure, n in (("asr", HARMFUL), ("over_refusal", HARMLESS), ("degenerate", HARMFUL)):
            rows = measured(report, artifact, measure)
            assert [(row.exit, row.n) for row in rows if row.exit is not None] == [(exit, n) for exit in exits]
            thirds = {"early", "middle", "late"} if kind == "source" else {"early", "middle"}
            assert {row.band for row in rows if row.exit is None} == {*thirds, "average", "all"}
        assert [row.n for row in measured(report, artifact, "asr_text_only")] == [HARMFUL]
        assert len(measured(report, artifact, "asr_worst")) == 1
        default = [subject.default_exit for subject in report.subjects if subject.artifact == artifact]
        assert [(row.exit, row.n) for row in measured(report, artifact, "vqa_accuracy")] == [(default[0], VQA)]
        paired = [] if kind == "source" else [*EXITS, None]
        for measure in ("flips_to_unsafe", "flips_to_safe", "mcnemar_p"):
            assert [row.exit for row in measured(report, artifact, measure)] == paired
        ships = list(EXITS) if kind == "shipped" else []
        for measure in ("fidelity_cosine", "fidelity_cosine_mean"):
            assert [row.exit for row in measured(report, artifact, measure)] == ships


def holds_the_hardening(report: Report) -> None:
    """One block less, and a curve of every exit through every step."""
    made = {artifact.stage: artifact.metadata for artifact in report.artifacts}
    assert made["prune"]["layers"] == int(str(made["prune"]["layers_before"])) - 1
    assert made["harden"]["hardened_exits"] == list(EXITS)
    curves = {(curve.name, curve.exit): [step for step, _ in curve.points] for curve in report.curves}
    steps = list(range(1, STEPS + 1))
    assert curves["reward", None] == steps and all(curves["refusal", exit] == steps for exit in EXITS)
    assert all(curves["validation_refusal", exit] == [STEPS] for exit in EXITS)


def holds_the_memory(report: Report) -> None:
    """Predicted and measured, of the GGUF."""
    for measure in ("memory_predicted", "memory_measured"):
        (row,) = measured(report, "gguf", measure)
        assert row.unit == "bytes" and row.value


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-next", "smolvlm"])
def test_a_model_that_sees_images_goes_through_every_stage(
    kind: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if kind == "llava-1.5":
        build_tiny_llava(model, tower="clip")
    else:
        model = tiny_family(kind)
    # One family as users run it, each stage in its own process.
    executor = LocalExecutor() if kind == "llava-1.5" else ThisProcess()
    report = report_of(recipe(tmp_path, model, STAGES), tmp_path, executor)
    holds_every_row(
        report,
        {
            "source": ("source", "source", "transformers"),
            "harden": ("hardened", "hardened", "transformers"),
            "gguf": ("shipped", "quantized", "llamacpp"),
        },
    )
    holds_the_hardening(report)
    holds_the_memory(report)
    assert {gate.name for gate in report.gates if gate.passed} == set(GATES)


def test_llama_3_2_vision_goes_through_every_stage_but_gguf_which_is_refused_before_any_work(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_family("mllama")
    with pytest.raises(RecipeError, match="mllama cannot become GGUF"):
        load_graph(recipe(tmp_path, model, STAGES))

    # What ships is the hardened checkpoint, with the one that was only pruned beside it.
    stages = without("gguf", icet={"needs": "harden", "with": ASKED | {"controls": ["prune"]}})
    gates = {name: limit for name, limit in GATES.items() if name != "memory"}
    report = report_of(recipe(tmp_path, model, stages, gates), tmp_path, ThisProcess())
    holds_every_row(
        report,
        {
            "source": ("source", "source", "transformers"),
            "prune": ("control", "quantized", "transformers"),
            "harden": ("shipped", "quantized", "transformers"),
        },
    )
    holds_the_hardening(report)
    assert {gate.name for gate in report.gates if gate.passed} == set(gates)
    memory = [row for row in report.measures if row.measure == "memory_measured"]
    assert [(row.artifact, row.value) for row in memory] == [("harden", None)] and "GGUF files only" in memory[0].note


def test_a_text_only_model_is_pruned_quantized_and_verified_and_has_no_exit_to_leave_or_harden(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_family("llama")
    with pytest.raises(RecipeError, match="early-exit needs a model with an image encoder"):
        load_graph(recipe(tmp_path, model, STAGES))
    with pytest.raises(RecipeError, match="no image encoder"):
        load_graph(recipe(tmp_path, model, without("exit", prune={"needs": "source"})))

    stages = without(
        "exit",
        "harden",
        prune={"needs": "source"},
        gguf={"needs": "prune"},
        icet={"with": ASKED | {"controls": ["prune"]}},
    )
    gates = {name: limit for name, limit in GATES.items() if name not in ("max_utility_drop", "min_fidelity")}
    report = report_of(recipe(tmp_path, model, stages, gates), tmp_path, ThisProcess())
    assert {row.artifact for row in report.measures} == {"source", "prune", "gguf"}
    assert not [row for row in report.measures if row.exit is not None or row.band is not None]
    for artifact in ("source", "prune", "gguf"):
        for measure, n in (("asr", HARMFUL), ("over_refusal", HARMLESS), ("degenerate", HARMFUL)):
            assert [row.n for row in measured(report, artifact, measure)] == [n]
        for measure in ("flips_to_unsafe", "flips_to_safe", "mcnemar_p"):
            assert len(measured(report, artifact, measure)) == (artifact != "source")
    holds_the_memory(report)
    assert {gate.name for gate in report.gates if gate.passed} == set(gates)
