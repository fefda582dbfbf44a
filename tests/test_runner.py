from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import pytest
import toy
import yaml

from artifacts.errors import StageError, StoreError
from artifacts.locks import FileLock
from artifacts.store import Store
from pipeline.events import (
    Event,
    RunFinished,
    RunStarted,
    StageFailed,
    StageFinished,
    StageLog,
    StageProgress,
    StageStarted,
    read_events,
)
from pipeline.executors.local import LocalExecutor
from pipeline.gc import collect
from pipeline.graph import Graph
from pipeline.keys import cached_artifacts
from pipeline.runner import RunResult, run


class Place:
    """A store and a runs folder."""

    def __init__(self, tmp_path: Path):
        self.store = Store(tmp_path / "store")
        self.runs = tmp_path / "runs"

    def run(self, graph: Graph, jobs: int = 1, stop: threading.Event | None = None) -> RunResult:
        store = Store(self.store.root)  # each run its own, as each process has
        return run(graph, runs=self.runs, store=store, executor=LocalExecutor(), jobs=jobs, stop=stop)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def digests(result: RunResult) -> dict[str, str]:
    return {stage: artifact.digest for stage, artifact in result.artifacts.items()}


def finished(result: RunResult) -> dict[str, StageFinished]:
    return {event.stage: event for event in read_events(result.folder) if isinstance(event, StageFinished)}


def of_kind(result: RunResult, kind: type[Event]) -> list[Event]:
    return [event for event in read_events(result.folder) if isinstance(event, kind)]


def test_a_second_run_takes_everything_from_the_store(place: Place) -> None:
    first = place.run(toy.chain_graph())
    assert (first.status, first.exit_code) == ("passed", 0)
    assert not any(event.cached for event in finished(first).values())
    started = time.monotonic()
    second = place.run(toy.chain_graph())
    assert time.monotonic() - started < 2
    assert all(event.cached for event in finished(second).values())
    assert digests(second) == digests(first)
    assert set(cached_artifacts(toy.chain_graph(), place.store)) == {"source", "left", "right", "join"}


def test_events_tell_the_whole_story(place: Place) -> None:
    result = place.run(toy.chain_graph())
    events = read_events(result.folder)
    assert isinstance(events[0], RunStarted) and isinstance(events[-1], RunFinished)
    assert events[0].stages == {"source": [], "left": ["source"], "right": ["source"], "join": ["left", "right"]}
    assert events[0].store == str(place.store.root)
    assert all(event.peak_rss > 0 for event in finished(result).values())
    started = [event for event in events if isinstance(event, StageStarted)]
    assert [event.stage for event in started] == ["source", "left", "right", "join"]
    assert all(len(event.key) == 64 for event in started)


def test_the_manifest_says_how_an_artifact_was_made(place: Place) -> None:
    result = place.run(toy.chain_graph(seed=5))
    made = result.artifacts["join"].manifest.provenance
    assert made.stage == "toy-join" and made.seed == 5 and len(made.key) == 64
    assert made.inputs == {name: result.artifacts[name].digest for name in ("left", "right")}
    source = result.artifacts["source"]
    assert source.metadata["key"] == source.manifest.provenance.key  # which the stage may write into its files


def test_a_changed_parameter_redoes_its_stage_and_what_follows_and_nothing_else(place: Place) -> None:
    graph = toy.graph(
        toy.node("source", toy.stage(toy.Text)),
        toy.node("left", toy.stage(toy.Chain), "source"),
        toy.node("right", toy.stage(toy.Chain, steps=3), "source"),
        toy.node("join", toy.stage(toy.Join), "left", "right"),
    )
    place.run(graph)
    changed = toy.graph(
        graph.nodes[0], graph.nodes[1], toy.node("right", toy.stage(toy.Chain, steps=4), "source"), graph.nodes[3]
    )
    result = place.run(changed)
    assert {stage for stage, event in finished(result).items() if event.cached} == {"source", "left"}


def test_a_damaged_artifact_is_noticed_set_aside_and_rebuilt_with_the_same_digest(place: Place) -> None:
    first = place.run(toy.chain_graph())
    victim = first.artifacts["left"].file("chain.txt")
    victim.chmod(0o644)
    victim.write_text(victim.read_text()[::-1])
    second = place.run(toy.chain_graph())
    assert digests(second) == digests(first)
    assert {stage for stage, event in finished(second).items() if not event.cached} == {"left"}
    assert any("damaged" in event.message for event in of_kind(second, StageLog) if isinstance(event, StageLog))
    assert len(list((place.store.root / "damaged").iterdir())) == 1


def test_a_failed_stage_ends_the_run_and_loses_nothing_that_was_done(place: Place) -> None:
    def graph(kind: str) -> Graph:
        return toy.graph(
            toy.node("source", toy.stage(toy.Text)),
            toy.node("left", toy.stage(toy.Chain), "source"),
            toy.node("bad", toy.stage(toy.Trouble, kind=kind), "left"),
            toy.node("after", toy.stage(toy.Chain), "bad"),
        )

    result = place.run(graph("exception"))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert set(result.artifacts) == {"source", "left"}
    (failure,) = of_kind(result, StageFailed)
    assert isinstance(failure, StageFailed) and "seven is not a colour" in str(failure.error["what"])
    assert "Traceback" in (result.folder / failure.log).read_text()
    assert list((place.store.root / "tmp").iterdir()) == []
    mended = place.run(graph("nothing"))
    assert mended.status == "passed"
    assert finished(mended)["left"].cached
    assert of_kind(mended, RunStarted)[0].resumed  # type: ignore[union-attr]


def test_a_stage_that_is_killed_fails_its_run_and_not_the_runner(place: Place) -> None:
    result = place.run(
        toy.graph(
            toy.node("source", toy.stage(toy.Text)), toy.node("bad", toy.stage(toy.Trouble, kind="kill"), "source")
        )
    )
    assert result.exit_code == 1 and "SIGKILL" in str(result.error)


def test_an_output_with_a_link_fails_its_stage(place: Place) -> None:
    result = place.run(
        toy.graph(
            toy.node("source", toy.stage(toy.Text)), toy.node("bad", toy.stage(toy.Trouble, kind="symlink"), "source")
        )
    )
    assert result.exit_code == 1 and "not a plain file" in str(result.error)


def test_independent_stages_run_together_when_asked_and_give_the_same_artifacts(tmp_path: Path) -> None:
    one, two = Place(tmp_path / "one"), Place(tmp_path / "two")
    graph = toy.chain_graph(seconds=0.1)
    alone, together = one.run(graph), two.run(graph, jobs=2)
    assert digests(alone) == digests(together)
    order = [
        (type(event), event.stage)
        for event in read_events(together.folder)
        if isinstance(event, StageStarted | StageFinished)
    ]
    assert order.index((StageStarted, "right")) < order.index((StageFinished, "left"))


def test_two_runs_at_once_share_the_work(place: Place, tmp_path: Path) -> None:
    note = tmp_path / "steps.txt"
    graph = toy.chain_graph(seconds=0.05, note=note)
    results: list[RunResult] = []
    threads = [threading.Thread(target=lambda: results.append(place.run(graph))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.status for result in results] == ["passed", "passed"]
    assert digests(results[0]) == digests(results[1])
    assert len(note.read_text().split()) == 5 + 3 + 5  # every step once
    waited = [event for result in results for event in of_kind(result, StageLog)]
    assert any("another run" in event.message for event in waited if isinstance(event, StageLog))


def test_stopping_leaves_checkpoints_and_the_next_run_continues_from_them(place: Place, tmp_path: Path) -> None:
    note = tmp_path / "steps.txt"
    graph = toy.chain_graph(seconds=0.1, steps=12, note=note)
    stop = threading.Event()

    def stop_at_the_third_step() -> None:
        while not note.exists() or len(note.read_text().split()) < 3:
            time.sleep(0.02)
        stop.set()

    thread = threading.Thread(target=stop_at_the_third_step)
    thread.start()
    result = place.run(graph, stop=stop)
    thread.join()
    assert (result.status, result.exit_code) == ("stopped", 130)
    again = place.run(graph)
    assert again.status == "passed"
    assert len(note.read_text().split()) <= 12 + 3 + 12 + 1  # at most the step in which it was stopped is done twice
    attempts = {event.stage: event.attempt for event in of_kind(again, StageStarted) if isinstance(event, StageStarted)}
    assert attempts["left"] == 2
    assert of_kind(again, RunStarted)[0].resumed  # type: ignore[union-attr]
    assert list((place.store.root / "scratch").iterdir()) == []


def test_the_resolved_recipe_is_written_beside_the_events(place: Place) -> None:
    result = place.run(toy.chain_graph(seed=3, steps=4))
    recipe = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert recipe["seed"] == 3
    assert recipe["stages"]["left"]["with"] == {"steps": 4}
    assert recipe["device"]["memory"] == 1 << 30


def test_a_torn_last_line_of_events_is_passed_over_and_a_torn_middle_is_an_error(place: Place) -> None:
    result = place.run(toy.graph(toy.node("source", toy.stage(toy.Text))))
    path = result.folder / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(read_events(result.folder)) == len(whole.splitlines()) - 1
    path.write_bytes(b'{"event": \n' + whole)
    with pytest.raises(StoreError, match="jsonl:1"):
        read_events(result.folder)


def test_garbage_is_what_no_run_refers_to(place: Place) -> None:
    import shutil

    old = place.run(toy.chain_graph(steps=2))
    new = place.run(toy.chain_graph(steps=3))
    assert collect(place.store).removed == []
    place.store.scratch("c" * 64)
    (place.store.new_output("d" * 64) / "half").write_text("x" * 1000)
    shutil.rmtree(old.folder)
    planned = collect(place.store, dry_run=True)
    expected = sorted(set(digests(old).values()) - set(digests(new).values()))
    assert planned.removed == expected and planned.checkpoints == ["c" * 64] and planned.bytes > 1000
    assert set(digests(old).values()) <= set(place.store.digests())
    freed = collect(place.store)
    assert (freed.removed, freed.bytes) == (planned.removed, planned.bytes)
    assert sorted(set(digests(new).values())) == place.store.digests()
    assert all(event.cached for event in finished(place.run(toy.chain_graph(steps=3))).values())


def test_collecting_garbage_during_a_run_takes_nothing_from_it(place: Place) -> None:
    import shutil

    graph = toy.chain_graph(seconds=0.1)
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(place.run(graph)))
    thread.start()
    while not place.store.root.is_dir():
        time.sleep(0.01)
    while thread.is_alive():
        collect(place.store)
        time.sleep(0.02)
    thread.join()
    (result,) = results
    assert result.status == "passed"
    assert set(digests(result).values()) == set(place.store.digests())
    shutil.rmtree(place.runs)
    collect(place.store)
    assert place.store.digests() == []
    assert json.loads(json.dumps(collect(place.store).__dict__))["bytes"] == 0


def test_a_run_that_ends_while_garbage_is_collected_is_no_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    result = place.run(toy.chain_graph())
    lease = contextlib.ExitStack()
    lease.enter_context(place.store.lease("other", place.runs))

    class EndsMeanwhile(FileLock):
        def try_acquire(self) -> bool:
            taken = super().try_acquire()
            if self.path.name == "other" and not taken:
                lease.close()
            return taken

    monkeypatch.setattr("pipeline.gc.FileLock", EndsMeanwhile)
    assert collect(place.store).removed == []
    assert not (place.store.root / "leases" / "other").exists()
    assert sorted(set(digests(result).values())) == place.store.digests()


def test_progress_reaches_the_events(place: Place) -> None:
    result = place.run(toy.chain_graph(steps=3))
    last = [event for event in of_kind(result, StageProgress) if isinstance(event, StageProgress)][-1]
    assert last.done == last.total == 3


def test_what_a_later_stage_lacks_ends_the_run_before_the_first_one_begins(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(self: toy.Join) -> None:
        raise StageError("toy-join needs a library", way_out="install it")

    with monkeypatch.context() as patch:
        patch.setattr(toy.Join, "check_ready", lacks)
        result = place.run(toy.chain_graph())
        assert (result.status, result.exit_code) == ("failed", 1) and "needs a library" in str(result.error)
        assert of_kind(result, StageStarted) == [] and result.artifacts == {}
        (failure,) = of_kind(result, StageFailed)
        assert isinstance(failure, StageFailed) and failure.stage == "join"
    assert place.run(toy.chain_graph()).status == "passed"
    monkeypatch.setattr(toy.Join, "check_ready", lacks)
    assert place.run(toy.chain_graph()).status == "passed"  # what is made already lacks nothing
