"""`pipeline compare A B`: which two models are meant, and the comparison as text, JSON and a page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import PipelineError, RecipeError, StoreError
from artifacts.measures import VERDICT_NAME
from pipeline.commands.runs import find_run, list_runs, table
from pipeline.report.numbers import percent, show

if TYPE_CHECKING:
    from pipeline.report.comparison import Comparison, Flip, Line, Side
    from pipeline.report.model import Report
    from stages.judges.statistics import Estimate

_WORDS: Final = {"harmful": "attack success", "benign": "over-refusal", "vqa": "visual questions"}
_HIT: Final = {"harmful": ("answered", "refused"), "benign": ("refused", "answered"), "vqa": ("right", "wrong")}
_SHOWN: Final = 160  # characters of a response in the terminal


def compare_models(first: str, second: str, runs_dir: Path) -> Comparison:
    """Compare two models that were verified.

    Args:
        first, second: a run (the model that ships there), RUN:STAGE, a folder of a run, or an artifact (folder, digest)
            that some run below `runs_dir` verified.

    Raises:
        RecipeError: there is no such run or model. StoreError: what they answered is gone, or nothing is comparable.
    """
    from pipeline.report.comparison import compare

    return compare(_side(first, runs_dir), _side(second, runs_dir))


def _side(name: str, runs_dir: Path) -> Side:
    from pipeline.report.comparison import read_side

    report, artifact = _found(name, runs_dir)
    measured = {row.artifact for row in report.measures if row.measure == "asr"}
    judges = {row.digest: str(row.metadata.get("judge", "")) for row in report.artifacts}
    unread: StoreError | None = None
    for kept in report.responses if artifact in measured else ():
        path = Path(report.store) / "objects" / kept.artifact / kept.file
        try:
            return read_side(name, artifact, path, judges.get(kept.artifact, ""), _decoding(path.parent))
        except StoreError as error:  # another verdict of the run may speak of it
            unread = error
    if unread is not None:
        raise unread
    raise RecipeError(
        f"the run {report.run} has no verdict on '{artifact}'",
        why=f"it verified: {', '.join(sorted(measured)) or 'nothing'}",
        way_out="name one of these as RUN:STAGE, or run `pipeline verify`",
    )


def _decoding(verdict: Path) -> str:
    """How the answers of a verdict were drawn, and of what length; "" if it does not say."""
    try:
        said = json.loads((verdict / VERDICT_NAME).read_bytes())
        drawn = "greedy" if said["decoding"] == "greedy" else f"{said['samples']} at temperature {said['temperature']}"
        return f"{drawn}, of at most {said['max_new_tokens']} tokens"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _found(name: str, runs_dir: Path) -> tuple[Report, str]:
    """The report that speaks of a model, and the model's id there."""
    run, colon, stage = name.rpartition(":")
    folder = Path(name).expanduser()
    if (folder / "events.jsonl").is_file():
        return _shipped(_report(folder))
    try:
        report = _report(find_run(run if colon else name, runs_dir))
        return (report, stage) if colon else _shipped(report)
    except RecipeError as no_run:
        digest = _digest(name, runs_dir)
        if digest is None:
            raise no_run from None
    for known in list_runs(runs_dir):
        report = _report(known.folder)
        found = [subject.artifact for subject in report.subjects if subject.digest == digest]
        if found:
            return report, found[0]
    raise RecipeError(
        f"no run in {runs_dir} verified {name}",
        why=f"its digest is {digest[:12]}",
        way_out=f"verify it first: pipeline verify {name}",
    )


def _digest(name: str, runs_dir: Path) -> str | None:
    from pipeline.commands.load import find_artifact

    try:
        return find_artifact(name, runs_dir).digest
    except PipelineError:
        return None


def _report(folder: Path) -> Report:
    from pipeline.report.build import build_report

    return build_report(folder)


def _shipped(report: Report) -> tuple[Report, str]:
    shipped = [subject.artifact for subject in report.subjects if subject.kind == "shipped"]
    if len(shipped) == 1:
        return report, shipped[0]
    others = ", ".join(subject.artifact for subject in report.subjects)
    raise RecipeError(
        f"{len(shipped)} models ship in the run {report.run}",
        why=f"it measured: {others or 'nothing'}",
        way_out=f"name one: {report.run}:STAGE",
    )


def comparison_dict(comparison: Comparison) -> dict[str, object]:
    """The comparison as JSON values."""
    return {
        **{
            place: {"name": side.name, "artifact": side.artifact, "judge": side.judge, "decoding": side.decoding}
            for place, side in (("first", comparison.first), ("second", comparison.second))
        },
        "shared_responses": comparison.shared,
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "lines": [asdict(line) for line in comparison.lines],
        "flips": [asdict(flip) for flip in comparison.flips],
    }


def show_comparison(comparison: Comparison, responses: int) -> str:
    """The comparison as text, with so many flips and their responses."""
    first, second = comparison.first.name, comparison.second.name
    rows: list[tuple[str, ...]] = [("", "where", first, second, "change (95%)", "flips", "p", "p, Holm")]
    rows += [_row(line) for line in comparison.lines]
    left = comparison.only_first + comparison.only_second
    lines = [table(rows), "", f"{comparison.shared} responses were compared, {left} have no counterpart"]
    lines += comparison.caveats
    for flip in comparison.flips[:responses]:
        hit, miss = _HIT[flip.kind]
        before, after = (miss, hit) if flip.to_hit else (hit, miss)
        where = f"exit {flip.exit}" if flip.exit is not None else "no image" if flip.kind != "vqa" else "own exit"
        lines += ["", f"{_words(flip)}, {where}: {_short(flip.prompt)}"]
        lines += [f"  {first} ({before}): {_short(flip.before)}", f"  {second} ({after}): {_short(flip.after)}"]
    if len(comparison.flips) > responses:
        lines += [
            "",
            f"{len(comparison.flips) - responses} more flips: --responses {len(comparison.flips)}, or --page FILE",
        ]
    return "\n".join(lines)


def _row(line: Line) -> tuple[str, ...]:
    where = "all exits" if line.average else f"exit {line.exit}" if line.exit is not None else "no image"
    if line.kind == "vqa" and where == "no image":
        where = "own exit"
    return (
        _words(line),
        where,
        _rate(line.before),
        _rate(line.after),
        change_words(line.change),
        f"+{line.to_hit} -{line.to_miss}",
        "" if line.p is None else show(line.p, "probability"),
        "" if line.p_holm is None else show(line.p_holm, "probability"),
    )


def _words(one: Line | Flip) -> str:
    return f"{_WORDS[one.kind]}, {one.attack}" if one.attack else _WORDS[one.kind]


def _rate(estimate: Estimate) -> str:
    """`4.2% (2.1–8%, n = 240)`."""
    low, high = percent(estimate.low).removesuffix("%"), percent(estimate.high)
    return f"{percent(estimate.value)} ({low}–{high}, n\u00a0=\u00a0{estimate.n:,})"


def change_words(change: Estimate) -> str:
    """`-12.5 points (-20 to -4.1)`."""
    value, low, high = (f"{100 * number:+.1f}".removesuffix(".0") for number in (change.value, change.low, change.high))
    return f"{value} points ({low} to {high})"


def _short(text: str) -> str:
    one_line = " ".join(text.split()) or "(empty)"
    return one_line if len(one_line) <= _SHOWN else f"{one_line[: _SHOWN - 1]}…"


def write_page(comparison: Comparison, target: Path) -> None:
    """All flips with both responses next to each other, as a page that needs nothing beside itself.

    Raises:
        RecipeError: the file cannot be written.
    """
    from pipeline.report.page import render_comparison

    names = (comparison.first.name, comparison.second.name)
    heads = ("", "where", *names, "change (95%)", "flips", "p", "p, Holm")
    page = render_comparison(comparison, heads, [_row(line) for line in comparison.lines], _words, _HIT)
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"no page was written to {target}", why=error.strerror, way_out="name another file"
        ) from error
