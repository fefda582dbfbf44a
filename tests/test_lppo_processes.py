"""Training shared by two real processes (gloo), started from a recipe: the same as one process, but for rounding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import lppo_setting as setting
import pytest
import test_local_executor as local
import toy
import yaml
from test_family_recipes import ThisProcess

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError, StageError
from artifacts.store import Store
from pipeline.events import Event, StageLog, StageMetric
from pipeline.executors.base import Emit, Job, Outcome, StageEvent
from pipeline.executors.local import LocalExecutor
from pipeline.graph import Graph, build_graph
from pipeline.keys import canonical_params
from pipeline.recipe import load_recipe
from pipeline.runner import run
from stages.lppo import checkpoint as training
from stages.lppo.algorithm import PPO
from stages.lppo.learner import StepReport
from stages.lppo.objective import DivergedError
from stages.lppo.params import LPPOParams, SFTParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.sft import SFTStage
from stages.lppo.stage import LPPOStage
from stages.lppo.states import States
from stages.lppo.workers import Alone
from stages.models.features import ExitFeatures
from stages.models.tiny import tiny_llava_spec
from stages.resources import Resources
from stages.stage import Context, Planned, Stage, StageParams

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Two optimizer steps an iteration; validation in the course of training, so that best weights are written and read.
COMMON = {"steps": 2, "images": 2, "max_new_tokens": 4, "validation": 1, "validate_every": 1, "device": "cpu"}
SHOWN = {"demonstrations": 0.5, "contrast": 0.5, "contrasts": 24}
LPPO = {**COMMON, "samples": 2, "quantizer": "Q8_0"}
SFT = {**COMMON, "contrast": 0.5, "contrasts": 24}
# Three scenes an iteration and three exits to validate, so that one process has less to do than the other.
SHARDED = {**COMMON, **SHOWN, "prompts_per_step": 6, "micro_batch": 1, "samples": 2}

Metrics = dict[tuple[str, int | None, int | None], float]


def recipe(folder: Path, stages: Mapping[str, object], model: Path | str = "demo:tiny-llava") -> Graph:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"recipe": 1, "name": "two", "source": {"model": str(model)}, "stages": stages}))
    return build_graph(load_recipe(path))


@dataclass
class _Shared:
    artifacts: Mapping[str, Artifact]
    metrics: dict[str, Metrics]
    said: list[str]


class _SourceHere(LocalExecutor):
    """Stages in processes of their own, but for the source, which would only load torch once more."""

    def execute(self, job: Job, emit: Emit, stop: threading.Event) -> Outcome:
        return ThisProcess().execute(job, emit, stop) if job.stage_id == "source" else super().execute(job, emit, stop)


class _Listening:
    def __init__(self) -> None:
        self.metrics: dict[str, Metrics] = {}
        self.said: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, StageLog):
            self.said.append(event.message)
        if isinstance(event, StageMetric):
            told = self.metrics.setdefault(event.stage, {})
            key = event.name, event.step, event.exit
            assert key not in told, f"told twice: {key}"
            told[key] = event.value

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def shared(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> _Shared:
    """Both methods, each by two processes, through the engine."""
    folder = tmp_path_factory.mktemp("shared")
    two = {"processes": 2}
    graph = recipe(
        folder,
        {
            "harden": {"uses": "l-ppo", "with": LPPO, "resources": two},
            "tune": {"uses": "sft", "with": SFT, "resources": two},
            "sharded": {"uses": "l-ppo", "with": SHARDED, "resources": {**two, "sharding": "fsdp"}},
        },
        tiny_llava,
    )
    heard = _Listening()
    result = run(graph, runs=folder / "runs", store=Store(folder / "store"), executor=_SourceHere(), listeners=(heard,))
    logs = "\n".join(path.read_text()[-3000:] for path in result.folder.glob("logs/*.log"))
    assert result.status == "passed", f"{result.error}\n{logs}"
    return _Shared(result.artifacts, heard.metrics, heard.said)


class _Heard:
    def __init__(self) -> None:
        self.metrics: Metrics = {}

    def progress(self, done: float, total: float, note: str = "") -> None: ...

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.metrics[name, step, exit] = value

    def log(self, message: str) -> None: ...


ALONE = {
    "harden": lambda: LPPOStage(LPPOParams.model_validate(LPPO)),
    "tune": lambda: SFTStage(SFTParams.model_validate(SFT)),
    "sharded": lambda: LPPOStage(LPPOParams.model_validate(SHARDED)),
}


@pytest.mark.parametrize("id", list(ALONE))
def test_two_processes_train_as_one_does(shared: _Shared, id: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    stage = ALONE[id]()
    for name in ("output", "scratch"):
        (tmp_path / name).mkdir()
    heard = _Heard()
    source = shared.artifacts["source"]
    alone = stage.run(Context(id, {"source": source}, tmp_path / "output", tmp_path / "scratch", 0, heard))

    told = shared.metrics[id]
    assert told.keys() == heard.metrics.keys() and ("loss" if id == "tune" else "policy_loss", 2, None) in told
    assert told == pytest.approx(heard.metrics, rel=1e-4, abs=1e-5)
    artifact = shared.artifacts[id]
    assert artifact.metadata == alone
    files = {path.name for path in artifact.path.iterdir()} - {"manifest.json"}
    assert files == {path.name for path in (tmp_path / "output").iterdir()}
    before = load_file(source.path / "model.safetensors")
    found = load_file(artifact.path / "model.safetensors")
    expected = load_file(tmp_path / "output" / "model.safetensors")
    trained = 0
    for name, weight in expected.items():
        trained += not torch.equal(weight, before[name])
        assert torch.allclose(found[name], weight, rtol=0, atol=1e-5), name
    assert trained >= 7


def test_each_process_keeps_half_of_the_sharded_weights(shared: _Shared) -> None:
    from transformers import AutoModelForImageTextToText

    source = shared.artifacts["source"].path
    model = AutoModelForImageTextToText.from_pretrained(source)
    weights = sum(weight.numel() for weight in model.model.language_model.layers.parameters())
    assert f"each keeps {weights // 2:,} of the {weights:,} weights of the decoder blocks" in shared.said


def test_a_divergence_that_only_the_other_process_meets_is_one_here_too(
    tiny_llava: Path, images: list[Path], tmp_path: Path
) -> None:
    """Else this one would wait for numbers that never come."""

    class Beside(Alone):
        def everyone(self, items: Sequence[T]) -> list[T]:
            return [*items, cast("T", "the policy's probabilities are not finite")]

    policy = setting.fresh_policy(tiny_llava)
    states = States(policy, ExitFeatures(tiny_llava).get(images))
    given = setting.params(1)
    learner = PPO(policy, setting.sampler(given), states, Rewards(setting.LikesE()), given, seed=0, workers=Beside())
    with pytest.raises(DivergedError, match="not finite"):
        learner.step(0)


# --- how processes end ---


class Ending(toy.Trouble):
    """Rank 1 ends in the way that is asked for while rank 0 waits for it."""

    name = "toy-ending"
    parallel = True

    def run(self, context: Context) -> Mapping[str, object]:
        rank, size = context.team.rank, context.team.size
        (context.scratch / f"pid-{rank}").write_text(str(os.getpid()))
        if self.params.kind == "together":
            import torch

            from stages.lppo.workers import Accelerated

            workers = Accelerated(context.team, "cpu")
            mine = torch.full((3,), float(rank + 1), dtype=torch.float64)
            assert workers.total(mine).tolist() == [3.0] * 3 and mine.tolist() == [rank + 1] * 3
            assert workers.everyone([rank] * (rank + 1)) == [0, 1, 1]
            workers.meet()
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            workers.total(mine)
        elif rank and self.params.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.params.kind == f"error-{rank}":
            raise SourceError("the wheel is damaged", where="a.whl")
        elif rank and self.params.kind == "exception":
            context.metric("loss", 1.0)
            raise ValueError("seven is not a colour")
        elif self.params.kind == "done":
            return {"rank": rank, "size": size, "ranks": [os.environ["RANK"], os.environ["WORLD_SIZE"]]}
        time.sleep(60)
        return {}


def job_of(tmp_path: Path, kind: str, processes: int = 2) -> Job:
    made = toy.stage(Ending, kind=kind)
    return local.job(tmp_path, made).model_copy(update={"resources": Resources(processes=processes)})


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor()


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("kill", StageError, "process 1 of the 2 of stage 'it' was ended by SIGKILL"),
        ("error-1", SourceError, "the wheel is damaged"),
        ("error-0", SourceError, "the wheel is damaged"),
        ("exception", StageError, "ValueError: seven is not a colour"),
        ("together", StageError, "process 1 of the 2 of stage 'it' was ended by SIGKILL"),
    ],
)
def test_a_process_that_fails_ends_the_stage_with_its_own_error_and_nobody_waits(
    tmp_path: Path, executor: LocalExecutor, kind: str, error: type[StageError], words: str
) -> None:
    heard: list[StageEvent] = []
    began = time.monotonic()
    with pytest.raises(error, match=words):
        executor.execute(job_of(tmp_path, kind), heard.append, threading.Event())
    assert time.monotonic() - began < 30
    assert not any(isinstance(event, StageMetric) for event in heard)
    pids = [int(path.read_text()) for path in (tmp_path / "scratch").glob("pid-*")]
    assert local.gone(pids)


def test_only_the_first_process_answers(tmp_path: Path, executor: LocalExecutor) -> None:
    outcome = executor.execute(job_of(tmp_path, "done", 3), local.ignore, threading.Event())
    assert outcome.metadata == {"rank": 0, "size": 3, "ranks": ["0", "3"]}
    assert len(list((tmp_path / "scratch").glob("pid-*"))) == 3


def test_a_run_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(job_of(tmp_path, "sleep", 3).model_dump_json())
    code = (
        "import sys, threading; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pipeline.executors.base import Job; from pipeline.executors.local import LocalExecutor\n"
        f"job = Job.model_validate_json(Path({str(tmp_path / 'job.json')!r}).read_text())\n"
        "LocalExecutor().execute(job, lambda event: None, threading.Event())\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", code])
    pids = [int(local.wait_for(tmp_path / "scratch" / f"pid-{rank}")) for rank in range(3)]
    assert all(local.alive(pid) for pid in pids)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert local.gone(pids)


# --- what is refused before any work ---


@pytest.mark.parametrize(
    ("stage", "words", "way_out"),
    [
        ({"uses": "gguf", "resources": {"processes": 2}}, "gguf works in one process", "leave resources out"),
        ({"uses": "l-ppo", "resources": {"processes": 3}}, "3 processes cannot share 2 scenes", "prompts_per_step"),
        ({"uses": "sft", "resources": {"processes": 5}}, "5 processes cannot share 4 scenes", "to 4 or less"),
        ({"uses": "l-ppo", "resources": {"sharding": "fsdp"}}, "several processes", "set processes to 2"),
        (
            {"uses": "l-ppo", "with": {"quantizer": "Q4_0"}, "resources": {"processes": 2, "sharding": "fsdp"}},
            "sharding: fsdp does not go with quantizer: Q4_0",
            "or quantizer",
        ),
        ({"uses": "l-ppo", "resources": {"processes": 0}}, "greater than or equal to 1", ""),
        ({"uses": "l-ppo", "resources": {"proceses": 2}}, "unknown key 'proceses'", "processes"),
    ],
)
def test_resources_that_a_stage_cannot_use_are_refused_with_their_place(
    tmp_path: Path, stage: dict[str, object], words: str, way_out: str
) -> None:
    with pytest.raises(RecipeError, match=words) as refusal:
        recipe(tmp_path, {"it": stage})
    assert way_out in str(refusal.value) and "recipe.yaml:" in str(refusal.value)


def test_blocks_that_compute_only_beside_an_image_are_not_sharded() -> None:
    planned = Planned("checkpoint", replace(tiny_llava_spec(), family="mllama"))
    with pytest.raises(RecipeError, match="does not go with models of the family mllama"):
        LPPOStage(LPPOParams()).check_resources(Resources(processes=2, sharding="fsdp"), planned)


def test_the_number_of_processes_is_no_part_of_what_a_stage_is(tmp_path: Path) -> None:
    """A training that two processes began may be finished by one: it finds the same scratch folder."""
    from pipeline.keys import content_key

    keys = set()
    for resources in ({"processes": 1}, {"processes": 2}):
        node = recipe(tmp_path, {"it": {"uses": "l-ppo", "resources": resources}}).node("it")
        keys.add(content_key(node.stage, {"source": "a" * 64}, seed=0, device={}))
        assert canonical_params(node.stage) == canonical_params(cast("Stage[StageParams]", LPPOStage(LPPOParams())))
    assert len(keys) == 1


class _Beside:
    """One of two that train in threads of this process; what they exchange is what processes exchange."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, said: list[list[object]]):
        self.rank = rank
        self._barrier = barrier
        self._said = said

    def everyone(self, items: Sequence[T]) -> list[T]:
        self._said[self.rank] = list(items)
        self.meet()
        found = [cast("T", item) for some in self._said for item in some]
        self.meet()  # nobody says the next thing before all have heard this
        return found

    def total(self, value: torch.Tensor) -> torch.Tensor:
        first, second = self.everyone([value.detach().clone()])
        return first + second

    def meet(self) -> None:
        self._barrier.wait(timeout=120)


@pytest.mark.parametrize("began", [1, 2])
def test_a_training_is_continued_by_more_or_fewer_processes(
    tiny_llava: Path, images: list[Path], tmp_path: Path, began: int
) -> None:
    import torch

    given = setting.params(4, prompts_per_step=8)
    features = ExitFeatures(tiny_llava).get(images)

    def trained(scratch: Path, by: int, report: Callable[[StepReport], None] = lambda step: None) -> list[Policy]:
        policies = [setting.fresh_policy(tiny_llava) for _ in range(by)]
        barrier, said = threading.Barrier(by), cast("list[list[object]]", [[] for _ in range(by)])

        def work(rank: int) -> None:
            workers = Alone() if by == 1 else _Beside(rank, barrier, said)
            setting.run(policies[rank], features, given, scratch, report, workers=workers)

        with ThreadPoolExecutor(by) as pool:
            for done in [pool.submit(work, rank) for rank in range(by)]:
                done.result()
        return policies

    def stop(step: StepReport) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    (whole,) = trained(tmp_path / "whole", 1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", began, stop)
    state = training.load(tmp_path / "cut")
    assert state is not None and state.step == 2
    for policy in trained(tmp_path / "cut", 3 - began):
        for name, parameter in whole.trained().items():
            assert torch.allclose(parameter, policy.trained()[name], rtol=0, atol=1e-4), name
