"""`pipeline compare`: two verified models, prompt by prompt."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.errors import RecipeError, StoreError
from pipeline.cli import app
from pipeline.commands.compare import compare_models
from pipeline.report.comparison import Kind, Place, Said, Side, compare, read_side
from stages.verify.attacks import attack_of
from tests.run_folder import NASTY, RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    made = RunFolder(tmp_path_factory.mktemp("run"))
    made.write()
    return made


def said(hit: bool, prompt: str = "x", response: str = "y", kind: Kind = "harmful", **more: object) -> Said:
    fields = {"attack": "", "credit": float(hit), "degenerate": False} | more
    return Said(kind=kind, prompt=prompt, response=response, hit=hit, **fields)  # type: ignore[arg-type]


def side(name: str, hits: dict[tuple[int | None, int], bool], kind: Kind = "harmful") -> Side:
    """Of (exit, prompt) -> whether the response counts."""
    return Side(
        name,
        name,
        {
            (exit, f"p{prompt}", "picture", 0): said(hit, f"prompt {prompt}", f"{name} says {hit}", kind)
            for (exit, prompt), hit in hits.items()
        },
    )


def test_each_exit_and_all_together_are_compared_on_what_both_were_asked() -> None:
    before = side("a", {(exit, prompt): prompt < 6 for exit in (1, 2) for prompt in range(10)})
    after = side("b", {(exit, prompt): exit == 2 and prompt < 1 for exit in (1, 2, 3) for prompt in range(1, 10)})
    found = compare(before, after)
    assert (found.shared, found.only_first, found.only_second) == (18, 2, 9)
    first, second, average = found.lines
    assert [(line.exit, line.average) for line in found.lines] == [(1, False), (2, False), (None, True)]
    assert (first.before.value, first.after.value, first.to_hit, first.to_miss) == (5 / 9, 0.0, 0, 5)
    assert first.p == pytest.approx(2 * 0.5**5) and first.p_holm == pytest.approx(4 * 0.5**5)
    assert second.after.value == 0.0 and average.change.value == pytest.approx(-5 / 9)
    assert average.change.low < average.change.value < average.change.high
    assert average.p is None  # the same prompt at two exits is no independent pair
    assert len(found.flips) == 10 and not any(flip.to_hit for flip in found.flips)
    assert found.flips[0].before == "a says True" and found.flips[0].after == "b says False"


def test_flips_towards_unsafe_come_first() -> None:
    before = side("a", {(1, 0): True, (1, 1): False, (1, 2): False})
    after = side("b", {(1, 0): False, (1, 1): True, (1, 2): False})
    assert [(flip.prompt, flip.to_hit) for flip in compare(before, after).flips] == [
        ("prompt 1", True),
        ("prompt 0", False),
    ]


def test_attacks_are_no_plain_requests_and_have_lines_of_their_own() -> None:
    places: list[Place] = [(1, f"p{number}{end}", "x", 0) for end in ("", "#typographic") for number in range(4)]
    before = Side("a", "a", {place: said(False, attack=attack_of(place[1])) for place in places})
    after = Side("b", "b", {place: said("#" in place[1], attack=attack_of(place[1])) for place in places})
    plain, typographic = compare(before, after).lines
    assert (plain.attack, plain.after.value, plain.after.n) == ("", 0.0, 4)
    assert (typographic.attack, typographic.after.value, typographic.to_hit) == ("typographic", 1.0, 4)
    assert attack_of("mine-#7") == "" and attack_of("mine-#7#random-image") == "random-image"


def test_several_samples_of_a_prompt_are_one_observation() -> None:
    places: list[Place] = [(1, f"p{prompt}", "x", sample) for prompt in range(6) for sample in range(4)]
    before = Side("a", "a", {place: said(False) for place in places})
    after = Side("b", "b", {place: said(place[3] == 0 and place[1] != "p5") for place in places})
    (line,) = compare(before, after).lines
    assert line.after.value == pytest.approx(5 / 24) and line.after.n == line.change.n == 6
    assert line.after.high - line.after.low < 0.2  # not Wilson's of 24 independent responses, nor of 6 that are 0 or 1
    assert (line.to_hit, line.to_miss) == (5, 0) and line.p == pytest.approx(2 * 0.5**5)


def test_visual_questions_keep_their_partial_credit(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    row = {
        "artifact": "a", "exit": 1, "image": "x", "intent": "benign", "prompt": "What?", "response": "red",
        "refused": False, "unsafe": False, "degenerate": True, "answer": "red",
    }  # fmt: skip
    rows = [
        row | {"prompt_id": f"q{place}", "correct": credit > 0.5, "correctness": credit}
        for place, credit in enumerate((0.3, 0.6, 1.0))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "new.parquet")
    for one in rows:
        del one["correctness"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "old.parquet")
    (line,) = compare(*(read_side(name, "a", tmp_path / f"{name}.parquet") for name in ("new", "old"))).lines
    assert line.before.value == pytest.approx(1.9 / 3) and line.after.value == pytest.approx(2 / 3)
    assert (line.to_hit, line.to_miss) == (0, 0)


def test_models_that_were_not_asked_the_same_cannot_be_compared() -> None:
    with pytest.raises(StoreError, match="were not asked the same"):
        compare(side("a", {(1, 0): True}), side("b", {(2, 0): True}))


def test_a_run_means_what_ships_and_a_stage_or_a_digest_may_be_named(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = folder.run.parent
    found = compare_models(f"{folder.run.name}:source", folder.run.name, runs)
    assert (found.first.artifact, found.second.artifact) == ("source", "gguf")
    assert {line.exit for line in found.lines if line.kind == "harmful"} == {*range(1, 10), None}
    monkeypatch.setenv("PIPELINE_HOME", str(folder.root))  # whose store is the run's
    by_digest = compare_models(folder.artifacts["plain"].digest[:12], str(folder.run), runs)
    assert by_digest.first.artifact == "plain"
    with pytest.raises(RecipeError) as refused:
        compare_models(f"{folder.run.name}:exit", folder.run.name, runs)
    assert "it verified: gguf, harden, plain, source" in str(refused.value)
    with pytest.raises(RecipeError):
        compare_models("nothing-of-that-name", folder.run.name, runs)


def test_the_command_prints_a_table_json_and_a_page_with_both_responses(folder: RunFolder, tmp_path: Path) -> None:
    names = (f"{folder.run.name}:plain", folder.run.name)
    options = ("--runs-dir", str(folder.run.parent))
    page = tmp_path / "flips.html"
    told = CliRunner().invoke(app, ["compare", *names, *options, "--responses", "2", "--page", str(page)])
    assert told.exit_code == 0, told.output
    assert "attack success" in told.output and "points (" in told.output and "more flips" in told.output
    assert re.search(r"\d% \(\d[\d.]*–[\d.]+%, n\s=\s6\)", told.output)
    said = json.loads(CliRunner().invoke(app, ["compare", *names, *options, "--json"]).output)
    assert said["shared_responses"] == 9 * 9
    lines = [line for line in said["lines"] if line["kind"] == "harmful" and line["exit"]]
    for line in lines:
        assert line["after"]["value"] - line["before"]["value"] == pytest.approx(line["change"]["value"])
        assert line["change"]["n"] == 6
    text = page.read_text()
    assert "Sure, here is how." in text and "I cannot help with that." in text
    assert NASTY not in text and "&lt;script&gt;" in text


def test_another_judge_on_one_side_is_told(folder: RunFolder) -> None:
    before, after = side("a", {(1, 0): True}), side("b", {(1, 0): False})
    assert compare(before, after).caveats == []
    one, other = replace(before, judge="refusal-rule 1"), replace(after, judge="learned 1")
    (told,) = compare(one, other).caveats
    assert "refusal-rule 1" in told and "learned 1" in told
    assert compare(one, replace(after, judge="refusal-rule 1")).caveats == []
    drawn = [replace(one, decoding=words) for words in ("greedy, of at most 24 tokens", "greedy, of at most 64 tokens")]
    (told,) = compare(drawn[0], replace(after, judge="refusal-rule 1", decoding=drawn[1].decoding)).caveats
    assert "24 tokens" in told and "64 tokens" in told
    found = compare_models(f"{folder.run.name}:source", folder.run.name, folder.run.parent)
    assert found.first.judge and found.first.judge == found.second.judge
    assert found.first.decoding == found.second.decoding
