"""The Stage base class and the registry of stages.

A stage is one module below `stages/` (or a third party's, through the entry-point group `pipeline.stages`). It declares
typed parameters, the artifact types that it takes and the one that it makes, and does its work in `run`. It knows
nothing of scheduling, caching, or other stages.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar, Final, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, StageError
from artifacts.lineage import combined, training_of, trains_on_prompts
from artifacts.manifest import Training
from stages.models.spec import ModelSpec
from stages.resources import Resources, Team

MODEL_TYPES: Final = ("gguf", "gptq", "checkpoint")  # of artifacts that answer


class StageParams(BaseModel):
    """Base of every stage's parameters: frozen, unknown keys refused. Describe each field: the text is user help."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Located:
    """Marks a parameter, or the items of a list or mapping, that may be a path: `Annotated[str, Located()]`.

    What begins with "./", "../" or "~/" is taken from the folder of the file in which it is written.
    """


P = TypeVar("P", bound=StageParams)


class Reporter(Protocol):
    """Where a running stage sends what it has to say; the engine turns it into events."""

    def progress(self, done: float, total: float, note: str = "") -> None: ...

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...

    def log(self, message: str) -> None: ...


@dataclass(frozen=True)
class Context:
    """What a stage sees of the world while it runs.

    Attributes:
        stage_id: the stage's name in the recipe.
        inputs: recipe stage id -> artifact, in the order of `needs`, then those named by `references`.
        output: a fresh empty folder; the only place the stage writes its artifact.
        scratch: a folder that survives a crash and is found again by the same content key; checkpoints go here.
        seed: fixed by the recipe, the same on every run.
        device: the device profile's numbers, `{"memory": bytes, "context": tokens}`, and `"kv_cache_bits": 8` where
            keys and values are kept in Q8_0; empty when the recipe names none.
        team: the processes that share this work; alone, unless the recipe asks for more and the stage is `parallel`.
        key: the content key of this work: the digest of that part of the recipe, and of all that goes in, which decide
            the result. Empty where a stage is run without a recipe.
    """

    stage_id: str
    inputs: Mapping[str, Artifact]
    output: Path
    scratch: Path
    seed: int
    reporter: Reporter
    device: Mapping[str, int] = field(default_factory=dict)
    team: Team = field(default_factory=Team)
    key: str = ""

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.reporter.progress(done, total, note)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.reporter.metric(name, value, step=step, exit=exit)

    def log(self, message: str) -> None:
        self.reporter.log(message)

    def input(self, type: str) -> Artifact:
        """The one input of that artifact type.

        Raises:
            StageError: none, or more than one.
        """
        found = [artifact for artifact in self.inputs.values() if artifact.type == type]
        if len(found) != 1:
            raise StageError(f"stage '{self.stage_id}' needs one input of type {type!r}, it has {len(found)}")
        return found[0]


@dataclass(frozen=True)
class Planned:
    """What is known before any work starts about the artifact that a stage will make."""

    type: str
    spec: ModelSpec | None = None  # shapes of the model inside, if there is one and it is known


class Stage(ABC, Generic[P]):
    """One unit of work.

    Class attributes:
        name: the `uses:` name.
        code_version: raise it when the same parameters would give another result; part of the content key.
        accepts: artifact types that it takes; `output_type`: the one that it makes.
        many: whether it takes any number of inputs (>= 1) or exactly one (`sources` take none: accepts == ()).
        libraries: distributions whose versions are part of the content key (`uses_libraries`: with these parameters).
        reads_device: whether `run` reads `context.device`; only then is the device profile part of the content key, and
            only then does the engine let the stage see it.
        parallel: whether several processes may share its work (`resources: {processes: 2}`, see `Context.team`); the
            result must be the same but for rounding, since their number is no part of the content key.
        summary: one line for `pipeline plan` and the docs.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    code_version: ClassVar[str] = "1"
    accepts: ClassVar[tuple[str, ...]] = ()
    output_type: ClassVar[str]
    many: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()
    reads_device: ClassVar[bool] = False
    parallel: ClassVar[bool] = False
    Params: ClassVar[type[StageParams]]

    def __init__(self, params: P):
        self.params = params

    def uses_device(self) -> bool:
        """Whether `run` reads the device profile with these parameters; only then does a stage of that kind see it."""
        return type(self).reads_device

    def uses_libraries(self) -> Sequence[str]:
        """Distributions that decide the result with these parameters."""
        return type(self).libraries

    def needs_device(self) -> str | None:
        """Why a recipe that names no device cannot run this stage; None: it can."""
        return None

    def references(self) -> Mapping[str, str]:
        """Parameters that name other stages of the recipe: parameter name -> stage id. They become edges too."""
        return {}

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        """Refuse what cannot work, and say what will come out, before any work starts.

        Cheap: no torch, no download. `inputs` holds what is known of each input (a spec may be None).

        Raises:
            RecipeError: what the recipe asks for cannot work, with the nearest valid choice.
        """
        spec = next((planned.spec for planned in inputs.values() if planned.spec is not None), None)
        return Planned(type=self.output_type, spec=spec)

    def check_resources(self, resources: Resources, planned: Planned) -> None:
        """Refuse, before any work starts, what the stage cannot use with these parameters. `planned` is what it makes.

        Raises:
            RecipeError: more processes than can share the work, or a way of sharing that it does not know.
        """
        if resources.processes > 1 and not type(self).parallel:
            raise RecipeError(
                f"{self.name} works in one process, not {resources.processes}",
                why="the stage does not know how to share its work",
                way_out="leave resources out; stages that train (l-ppo, sft) can use several",
            )

    def check_ready(self) -> None:
        """Refuse what this machine lacks, such as a library; asked when a run begins, of every stage with work to do.

        Raises:
            StageError: what is missing, and how to get it.
        """

    def downloads(self) -> Sequence[str]:
        """The remote things that this stage will read (`package:...`, `hub:...`), for `pipeline fetch`."""
        return ()

    def fingerprint(self) -> str:
        """What the result depends on beside parameters and inputs (a local folder's content); part of the key."""
        return ""

    def ungated(self) -> str | None:
        """Why no gate may read what this stage measures; None: gates may."""
        return None

    def training(self, inputs: Mapping[str, Artifact]) -> Training:
        """What the model that comes out was trained on: what those that went in were, and this stage if it trains."""
        before = combined(training_of(artifact) for artifact in inputs.values() if artifact.type in MODEL_TYPES)
        return before.then(self.name) if trains_on_prompts(self.params.model_dump()) else before

    @abstractmethod
    def run(self, context: Context) -> Mapping[str, object]:
        """Do the work, write the artifact's files into `context.output`, return its metadata (JSON, no times).

        Raises:
            StageError: the work could not be done.
        """


# `uses:` name -> module below `stages` and class. A table, so that `pipeline --help` imports none of them.
_BUILT_IN: Mapping[str, str] = {
    "source": "stages.source:SourceStage",
    "early-exit": "stages.early_exit:EarlyExitStage",
    "prune": "stages.prune.stage:PruneStage",
    "reward-model": "stages.reward_model.stage:RewardModelStage",
    "l-ppo": "stages.lppo.stage:LPPOStage",
    "sft": "stages.lppo.sft:SFTStage",
    "imatrix": "stages.quantize.importance:ImatrixStage",
    "gguf": "stages.quantize.gguf:GGUFStage",
    "gptq": "stages.quantize.gptq:GPTQStage",
    "icet-verify": "stages.verify.stage:IcetVerifyStage",
}


@cache
def stage_names() -> tuple[str, ...]:
    """Every known `uses:` name, built in and third party, sorted."""
    found = set(_BUILT_IN) | {entry.name for entry in entry_points(group="pipeline.stages")}
    return tuple(sorted(found))


def stage_class(name: str) -> type[Stage[StageParams]]:
    """The class behind a `uses:` name.

    Raises:
        KeyError: unknown name.
    """
    target = _BUILT_IN.get(name)
    if target is not None:
        module, _, attribute = target.partition(":")
        found: type[Stage[StageParams]] = getattr(importlib.import_module(module), attribute)
        return found
    for entry in entry_points(group="pipeline.stages"):
        if entry.name == name:
            loaded: type[Stage[StageParams]] = entry.load()
            return loaded
    raise KeyError(name)
