"""The runner walks the graph: takes from the store what is there, makes what is not, and says everything in events.

- one folder a run; resuming is not a mode: a new run finds finished stages in the store by content key, and the
  checkpoints of an unfinished one in its scratch folder by the same key
- two runs that need the same work share it: the second waits for the first and takes its artifact
- a failed stage ends the run after the stages beside it; whatever was finished is kept
- after the stages: gates, report, publishing if every gate holds, and the report again with what became of it
"""

from __future__ import annotations

import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from artifacts.artifact import Artifact
from artifacts.errors import GateError, PipelineError, RecipeError, StageError
from artifacts.store import Damage, Store
from pipeline.events import (
    EVENTS_NAME,
    EventLog,
    GateChecked,
    Listener,
    Published,
    RunFinished,
    RunStarted,
    StageFailed,
    StageFinished,
    StageLog,
    StageStarted,
)
from pipeline.executors.base import Executor, Job, StoppedError
from pipeline.keys import cached_artifacts, canonical_params, content_key, device_numbers, provenance
from pipeline.report import PAGE_NAME
from pipeline.rundir import LOGS_NAME, create_run, ended_early, write_recipe
from stages.runtimes.llamacpp_build import llama_cpp_build

if TYPE_CHECKING:
    from pipeline.graph import Graph, Node

Status = Literal["passed", "failed", "gate_failed", "stopped"]

_MAIN_LIBRARIES = ("icet-pipeline", "torch", "transformers", "peft", "llama-cpp-python", "gguf", "numpy", "pydantic")
_PATIENCE = 0.2  # seconds between looks at the stop flag


@dataclass(frozen=True)
class RunResult:
    """What became of a run."""

    id: str
    folder: Path
    status: Status
    artifacts: Mapping[str, Artifact]  # stage id -> artifact, for every stage that has one
    error: PipelineError | None = None  # what ended it, if something did

    @property
    def exit_code(self) -> int:
        """0 done, 1 a stage failed, 2 the recipe was wrong, 3 a gate failed, 130 stopped."""
        if self.status == "failed":
            return self.error.exit_code if isinstance(self.error, RecipeError) else StageError.exit_code
        return {"passed": 0, "gate_failed": GateError.exit_code, "stopped": 130}[self.status]


def run(
    graph: Graph,
    *,
    runs: Path,
    store: Store,
    executor: Executor,
    listeners: tuple[Listener, ...] = (),
    jobs: int = 1,
    stop: threading.Event | None = None,
) -> RunResult:
    """Execute a recipe's graph once.

    Args:
        graph: from `pipeline.graph.build_graph`.
        runs: the folder below which the run gets its own.
        store: where artifacts are found and put.
        executor: does each stage's work.
        listeners: hear every event as it happens.
        jobs: how many independent stages may be at work at once; memory is the budget, so 1 unless asked.
        stop: set it from another thread to stop the run as Ctrl-C does.

    Raises:
        StoreError: the store cannot be used, or the run's events cannot be written. All else is in the result.
    """
    store.prepare()
    resumed = ended_early(runs, graph.name)
    folder, lock = create_run(runs, graph.name)
    try:
        write_recipe(graph, folder)
        log = EventLog(folder / EVENTS_NAME, listeners)
        try:
            flag = stop or threading.Event()
            with store.lease(folder.name, runs), _stop_on_signals(flag):
                return _Run(graph, folder, store, executor, log, flag).execute(jobs, resumed)
        finally:
            log.close()
            executor.close()
    finally:
        lock.release()


def run_graph(graph: Graph, runs: Path, listener: Listener, jobs: int = 1) -> RunResult:
    """Execute a recipe's graph on this machine, with the user's own store. See `run`."""
    from artifacts.home import cache_dir
    from pipeline.executors.local import LocalExecutor

    store = Store(cache_dir() / "store")
    return run(graph, runs=runs, store=store, executor=LocalExecutor(), listeners=(listener,), jobs=jobs)


class _Run:
    """One execution; `execute` is its story."""

    def __init__(
        self, graph: Graph, folder: Path, store: Store, executor: Executor, log: EventLog, stop: threading.Event
    ):
        self._graph = graph
        self._folder = folder
        self._store = store
        self._executor = executor
        self._log = log
        self._stop = stop
        self._started = time.time()
        self._artifacts: dict[str, Artifact] = {}
        self._error: PipelineError | None = None

    def execute(self, jobs: int, resumed: bool) -> RunResult:
        recipe = self._graph.recipe
        self._log.emit(
            RunStarted(
                run=self._folder.name,
                recipe=self._graph.name,
                recipe_path=str(recipe.path),
                stages={node.id: list(node.inputs) for node in self._graph.nodes},
                uses={node.id: node.uses for node in self._graph.nodes},
                versions=_versions(),
                resumed=resumed,
                store=str(self._store.root),
            )
        )
        try:
            self._check_ready()
            self._walk(jobs)
            status = self._finish()
        except (StoppedError, KeyboardInterrupt):
            status = "stopped"
        except PipelineError as error:
            self._fail("run", error)  # no stage, gate or publisher is to blame
            status = "failed"
        return self._end(status)

    def _end(self, status: Status) -> RunResult:
        page = "" if status == "stopped" else str(self._folder / PAGE_NAME)
        self._log.emit(RunFinished(status=status, seconds=time.time() - self._started, report=page))
        if page:
            self._report()
        return RunResult(self._folder.name, self._folder, status, dict(self._artifacts), self._error)

    # The stages

    def _check_ready(self) -> None:
        """Fail before the first stage begins what this machine could not do in a later one."""
        unready: dict[str, Exception] = {}
        for node in self._graph.nodes:
            try:
                node.stage.check_ready()
            except Exception as error:
                unready[node.id] = error
        done = cached_artifacts(self._graph, self._store) if unready else {}
        for id in unready:
            if id not in done:
                self._fail(id, unready[id])

    def _walk(self, jobs: int) -> None:
        """Do every stage whose inputs are there, `jobs` at a time, until all are done or one failed."""
        waiting = {node.id: node for node in self._graph.nodes}
        working: dict[Future[Artifact], Node] = {}
        # The threads that start workers live until every worker is gone: Linux kills a worker when they end.
        with ThreadPoolExecutor(max_workers=max(1, jobs), thread_name_prefix="stage") as pool:
            try:
                while waiting or working:
                    healthy = self._error is None and not self._stop.is_set()
                    for node in list(waiting.values()) if healthy else []:
                        if len(working) < max(1, jobs) and all(name in self._artifacts for name in node.inputs):
                            working[pool.submit(self._stage, waiting.pop(node.id))] = node
                    if not working:
                        break
                    done, _ = wait(working, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._settle(working.pop(future), future)
            except BaseException:
                self._stop.set()
                raise
        if self._stop.is_set():
            raise StoppedError

    def _settle(self, node: Node, future: Future[Artifact]) -> None:
        try:
            self._artifacts[node.id] = future.result()
        except StoppedError:
            self._stop.set()
        except Exception as error:
            self._fail(node.id, error, log=f"{LOGS_NAME}/{node.id}.log")

    def _stage(self, node: Node) -> Artifact:
        """The artifact of one node: from the store, from another run that is making it, or made now."""
        started = time.time()
        inputs = {name: self._artifacts[name] for name in node.inputs}
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        seed, device = self._graph.recipe.seed_of(node.id), device_numbers(self._graph)
        key = content_key(node.stage, digests, seed=seed, device=device)

        def say(damage: Damage) -> None:
            self._log.emit(StageLog(stage=node.id, message=f"{damage}; making it again"))

        peak_rss, cached = 0, True
        artifact = self._store.lookup(key, say)
        if artifact is None:
            with self._store.lock(key, give_up=self._patience(node.id)) as locked:
                if not locked:
                    raise StoppedError
                artifact = self._store.lookup(key, say)  # the run that we waited for may have made it
                if artifact is None:
                    artifact, peak_rss = self._make(node, key, inputs, seed, device)
                    cached = False
        self._log.emit(
            StageFinished(
                stage=node.id,
                digest=artifact.digest,
                cached=cached,
                seconds=time.time() - started,
                peak_rss=peak_rss,
            )
        )
        return artifact

    def _patience(self, stage_id: str) -> Callable[[], bool]:
        """What is asked while another run does the same work: says once that we wait, gives up when asked to stop."""
        told: list[bool] = []

        def give_up() -> bool:
            if not told:
                told.append(True)
                self._log.emit(StageLog(stage=stage_id, message="another run is doing this work; waiting for it"))
            return self._stop.is_set()

        return give_up

    def _make(
        self, node: Node, key: str, inputs: Mapping[str, Artifact], seed: int, device: Mapping[str, int]
    ) -> tuple[Artifact, int]:
        self._log.emit(StageStarted(stage=node.id, key=key, attempt=self._store.attempt(key)))
        cls = type(node.stage)
        output = self._store.new_output(key)
        job = Job(
            stage_id=node.id,
            key=key,
            stage_class=f"{cls.__module__}:{cls.__qualname__}",
            params=canonical_params(node.stage),
            inputs={name: artifact.path.resolve() for name, artifact in inputs.items()},
            output=output.resolve(),
            scratch=self._store.scratch(key).resolve(),
            guard=self._store.guard(key).resolve(),
            log=(self._folder / LOGS_NAME / f"{node.id}.log").resolve(),
            seed=seed,
            device=dict(device),
            resources=self._graph.recipe.resources_of(node.id),
        )
        try:
            outcome = self._executor.execute(job, self._log.emit, self._stop)
            made = self._store.add(
                key, output, node.planned.type, outcome.metadata, provenance(node.stage, key, inputs, seed=seed)
            )
        except BaseException:
            self._store.discard(output)
            raise
        return made, outcome.peak_rss

    def _fail(self, stage_id: str, error: Exception, log: str = "") -> None:
        if not isinstance(error, PipelineError):
            error = StageError(
                f"{stage_id} failed: {type(error).__name__}: {error}",
                why="this is a mistake in the pipeline itself",
                way_out="please report it with the run's events.jsonl",
            )
        self._error = self._error or error
        written = log if (self._folder / log).is_file() else ""
        self._log.emit(StageFailed(stage=stage_id, error=error.to_dict(), log=written))

    # After the stages

    def _finish(self) -> Status:
        if self._error is not None:
            return "failed"
        try:
            from pipeline.gates import check_gates

            results = check_gates(self._graph, self._artifacts)
        except Exception as error:
            self._fail("gates", error)
            return "gate_failed"
        for result in results:
            self._log.emit(
                GateChecked(
                    name=result.name,
                    limit=result.limit,
                    value=result.value,
                    passed=result.passed,
                    reason=result.reason,
                    warning=result.warning,
                )
            )
        failed = [result for result in results if not result.passed]
        self._report()
        if failed:
            self._error = GateError(
                f"{len(failed)} of {len(results)} gates failed: {', '.join(result.name for result in failed)}",
                where=self._folder.name,
                why="; ".join(result.reason for result in failed),
                way_out="the report shows every measure; harden more, compress less, or move the limit knowingly",
            )
            return "gate_failed"
        if self._graph.recipe.publish is not None:
            try:
                from pipeline.publish import publish

                published = publish(self._graph, self._folder, self._artifacts)
            except Exception as error:
                self._fail("publish", error)
                return "failed"
            self._log.emit(Published(target=published.target, digest=published.digest))
        return "passed"

    def _report(self) -> None:
        try:
            from pipeline.report import write_report

            write_report(self._folder)
        except Exception as error:  # a report that cannot be written must not undo what the run has done
            self._log.emit(
                StageLog(stage="report", message=f"the report could not be written: {type(error).__name__}: {error}")
            )


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`; the second one does not wait for anything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: list[tuple[int, Callable[..., object] | int | None]] = []
    for caught in (signal.SIGINT, signal.SIGTERM):
        before.append((caught, signal.signal(caught, handle)))
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine()}
    for name in _MAIN_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["executable"] = Path(sys.executable).name
    build = llama_cpp_build()
    return {**found, "llama.cpp": build} if build is not None else found
