"""The report: true to the events, complete on its own, inert whatever a model answered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from run_folder import NASTY, PROMPTS, RunFolder, failed_half_way

from artifacts.errors import StoreError
from artifacts.measures import RESPONSES_NAME
from pipeline.events import EVENTS_NAME, GateChecked, Published, RunFinished, StageFinished, StageMetric, StageStarted
from pipeline.report import write_report
from pipeline.report.build import build_report
from pipeline.report.charts import LineChart, Point, Series, line_chart, nice_ticks
from pipeline.report.dag import Box, stage_graph
from pipeline.report.drawings import asr_curve_svg, training_svg
from pipeline.report.formats import format_rows, format_tables
from pipeline.report.model import Report
from pipeline.report.numbers import Stat, stat
from pipeline.report.page import render_page
from pipeline.report.published import safety_table, utility_table
from pipeline.report.responses import read_responses
from pipeline.report.training import curve_figures
from pipeline.report.trainings import trainings_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(folder: RunFolder) -> Report:
    return build_report(folder.write())


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_page(report, read_responses(report))


class _Page(HTMLParser):
    """Every tag with its attributes, whether tags nest, and the text outside of style."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "hr", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_the_json_has_what_the_issue_promises_and_reads_back(folder: RunFolder) -> None:
    machine, page = write_report(folder.write())
    data = json.loads(machine.read_text())
    assert {"run", "recipe", "status", "artifacts", "gates", "measures"} <= set(data)
    assert data["status"] == "passed"
    assert set(data["gates"][0]) == {"name", "limit", "value", "passed", "reason", "warning"}
    wanted = {"artifact", "role", "runtime", "exit", "band", "measure", "value", "low", "high", "n"}
    assert wanted <= set(data["measures"][0])
    names = {row["measure"] for row in data["measures"]}
    assert {"asr", "over_refusal", "vqa_accuracy", "fidelity_cosine", "memory_predicted", "memory_measured"} <= names
    assert any(row["exit"] is None and row["measure"] == "asr" for row in data["measures"])
    assert Report.model_validate_json(machine.read_bytes()).model_dump_json(indent=1) + "\n" == machine.read_text()
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in folder.run.iterdir()) == [
        "events.jsonl", "recipe.yaml", "report.html", "report.json",
    ]  # fmt: skip


def test_the_schema_can_be_printed() -> None:
    schema = Report.model_json_schema()
    assert {"run", "recipe", "status", "artifacts", "gates", "measures"} <= set(schema["properties"])


def test_stages_have_their_times_state_memory_and_order(report: Report) -> None:
    by_id = {stage.id: stage for stage in report.stages}
    assert list(by_id) == ["source", "exit", "harden", "plain", "gguf", "icet"]
    assert by_id["source"].status == "cached"
    assert (by_id["harden"].status, by_id["harden"].seconds) == ("done", 412.0)
    assert by_id["harden"].peak_rss == 1_700_000_000
    assert all(len(stage.digest) == 64 and len(stage.key) == 64 for stage in report.stages)


def test_models_are_named_by_what_they_are(report: Report) -> None:
    assert [(one.artifact, one.kind) for one in report.subjects] == [
        ("source", "source"), ("harden", "hardened"), ("plain", "control"), ("gguf", "shipped"),
    ]  # fmt: skip
    assert {one.artifact: one.default_exit for one in report.subjects} == {
        "source": 11, "harden": 9, "plain": 9, "gguf": 9,
    }  # fmt: skip
    assert next(one.label for one in report.subjects if one.kind == "control") == "Same recipe without L-PPO"
    assert [row.stage for row in report.artifacts if row.shipped] == ["gguf"]


def test_a_control_that_was_hardened_otherwise_is_not_called_unhardened(folder: RunFolder, tmp_path: Path) -> None:
    started = folder.events[0].model_copy(update={"stages": {**_needs(folder), "plain": ["harden"]}})
    report = build_report(folder.write([started, *folder.events[1:]], tmp_path))
    assert next(one.label for one in report.subjects if one.kind == "control") == "Control: plain"
    assert "plain (control) answers" in report.headline and "without L-PPO" not in report.headline


def test_a_baseline_that_is_not_the_source_or_is_quantized_is_not_called_the_uncompressed_source(
    tmp_path: Path,
) -> None:
    quantized = RunFolder(tmp_path / "quantized")
    _rewrite_verdict(quantized, "source", {"type": "gguf"})
    report = build_report(quantized.write())
    assert report.subjects[0].label == "Baseline" and "the baseline answers" in report.headline
    stage = RunFolder(tmp_path / "stage", asr={"exit": 0.3, "gguf": 0.08})
    _rewrite_verdict(stage, "exit", {"role": "source"})
    report = build_report(stage.write())
    assert report.subjects[0].label == "Baseline" and "the baseline answers" in report.headline


def _rewrite_verdict(folder: RunFolder, stage: str, change: dict[str, str]) -> None:
    path = folder.artifacts["icet"].file("verdict.json")
    verdict = json.loads(path.read_text())
    verdict["subjects"] = [one | change if one["stage"] == stage else one for one in verdict["subjects"]]
    path.chmod(0o644)
    path.write_text(json.dumps(verdict))


def _needs(folder: RunFolder) -> dict[str, list[str]]:
    started = folder.events[0]
    assert started.event == "run_started"
    return started.stages


def test_the_headline_compares_what_ships_with_source_and_control(report: Report) -> None:
    assert report.headline.startswith("Passed: all 6 gates hold")
    assert "the uncompressed source answers" in report.headline
    assert "the same recipe without L-PPO answers" in report.headline
    figures = re.findall(r"\d+(?:\.\d+)?% \([^)]*n\xa0=\xa0[\d,]+\)", report.headline)
    assert len(figures) == 5  # average, worst exit, babble, source, control: each with its interval and n
    assert "and to 5% (" in report.headline and "at exit 3 only babbles" in report.headline


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    seen = _Page(page)
    assert seen.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in seen.tags}
    for _, attributes in seen.tags:
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", page)
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_an_answer_with_a_script_is_inert_and_still_readable(page: str) -> None:
    assert "<script" not in page.lower()
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert NASTY in _Page(page).text
    assert "<b>bold</b>" not in page


def test_answers_to_harmful_requests_are_folded_behind_a_warning(page: str) -> None:
    assert "may be upsetting or dangerous" in page
    before = page[: page.index("&lt;script&gt;")]
    depth = before.count("<details") - before.count("</details")
    assert depth == 3  # model, exit, and the harmful group itself


def test_every_chart_has_words_and_numbers_behind_it(page: str, report: Report) -> None:
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        root = ElementTree.fromstring(drawing)
        assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
        assert root.get("role") == "img" and root.get("aria-label")
    text = _Page(page).text
    for row in report.measures:
        if row.measure == "asr" and row.exit is not None and row.n is not None:
            assert f"n\xa0=\xa0{row.n:,}" in text


def test_the_page_shows_every_section(page: str) -> None:
    for id in ("gates", "asr", "quality", "memory", "training", "stages", "artifacts", "run", "responses"):
        assert f'<section id="{id}">' in page
        assert f'href="#{id}"' in page
    for words in (
        "llama-server",
        "llama-mtmd-cli",
        "--mmproj",
        "pipeline chat",
        "budget 2.00 GiB",
        "exact McNemar test",
    ):
        assert words in page


def test_what_trained_a_model_stands_beside_what_came_of_it(folder: RunFolder, report: Report) -> None:
    table = trainings_table(report)
    assert table is not None
    lines = {str(row[0]): row[1:] for row in table.rows}
    assert len(lines) == 2  # the hardened checkpoint and what ships; nothing trained the control or the source
    for line in lines.values():
        assert line[0] == "ppo, rounded to Q4_0" and line[1] == "40, best 36"
        assert line[2] == "6 min 52 s" and line[3] == "1.58 GiB"
    bare = report.model_copy(update={"stages": tuple(s for s in report.stages if s.uses != "l-ppo")})
    assert trainings_table(bare) is None


def test_types_that_shapes_did_not_allow_stand_beside_the_artifact(report: Report) -> None:
    told = ["Q5_0 instead of Q4_K for 180 tensors with rows of 576", "Q8_0 instead of Q6_K for token_embd.weight"]
    artifacts = tuple(
        row.model_copy(update={"metadata": row.metadata | {"fallbacks": told if row.stage == "gguf" else []}})
        for row in report.artifacts
    )
    page = render_page(report.model_copy(update={"artifacts": artifacts}))
    (line,) = [line for line in page.splitlines() if told[0] in line]
    assert line.startswith('<tr><td>gguf</td><td class="stat"><b>gguf</b>') and "; ".join(told) in line


def test_formats_of_the_same_weights_stand_side_by_side(report: Report) -> None:
    assert report.formats == ()  # control and shipped are of different weights
    shared = [
        row.model_copy(update={"metadata": row.metadata | {"base_digest": "ab" * 32}})
        if row.stage in ("gguf", "plain")
        else row
        for row in report.artifacts
    ]
    alike = report.model_copy(update={"artifacts": tuple(shared)})
    rows = {row.artifact: row for row in format_rows(alike)}
    assert set(rows) == {"gguf", "plain"}
    assert rows["gguf"].format == "GGUF Q4_0"
    assert rows["gguf"].size == next(row.size for row in report.artifacts if row.stage == "gguf")
    by_exit = {r.exit: r.value for r in report.measures if (r.artifact, r.measure) == ("gguf", "asr") and r.exit}
    assert rows["gguf"].asr_by_exit == by_exit
    alike = alike.model_copy(update={"formats": format_rows(alike)})
    page = _Page(render_page(alike))
    assert "Same weights, several formats" in page.text
    assert "ASR at exit" in page.text
    table = format_tables(alike)[1]
    at_exits = [r for r in report.measures if (r.artifact, r.measure) == (alike.formats[0].artifact, "asr") and r.exit]
    assert table.head == ["ASR at exit", *(str(exit) for exit in by_exit)]
    assert table.rows[0] == ["GGUF Q4_0", *map(stat, at_exits)]
    assert all(f"n\xa0=\xa0{PROMPTS}" in cell.detail for cell in table.rows[0][1:] if isinstance(cell, Stat))


def test_the_same_run_gives_the_same_page(folder: RunFolder, page: str) -> None:
    again = build_report(folder.write())
    assert render_page(again, read_responses(again)) == page


def test_the_curve_can_stand_alone(report: Report) -> None:
    root = ElementTree.fromstring(asr_curve_svg(report))
    assert root.tag.endswith("svg")
    assert "prefers-color-scheme" in "".join(root.itertext())
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("its default exit" in title for title in titles) == 4
    assert all(f"n\xa0=\xa0{PROMPTS}" in title for title in titles if title.startswith("Shipped"))


def test_the_curves_of_trainings_can_stand_alone(report: Report) -> None:
    root = ElementTree.fromstring(training_svg(report))
    assert root.tag.endswith("svg") and "prefers-color-scheme" in "".join(root.itertext())
    charts = root.findall(".//{http://www.w3.org/2000/svg}svg")
    heads = [
        group.findtext("{http://www.w3.org/2000/svg}text") for group in root.findall("{http://www.w3.org/2000/svg}g")
    ]
    assert len(charts) == len(heads) == len(curve_figures(report)[0]) > 1 and all(heads)
    with pytest.raises(ValueError, match="no stage"):
        training_svg(report.model_copy(update={"curves": ()}))


# Runs that did not go well


def test_a_run_that_failed_half_way_says_where_and_why(folder: RunFolder, tmp_path: Path) -> None:
    run = folder.write(failed_half_way(folder), tmp_path)
    write_report(run)
    report = build_report(run)
    assert report.status == "failed"
    assert "stage 'gguf' could not do its work" in report.headline
    assert {stage.id: stage.status for stage in report.stages}["icet"] == "waiting"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "What went wrong" in page and "free some" in page
    assert "<script" not in page


def test_a_torn_last_line_is_passed_over(folder: RunFolder, tmp_path: Path) -> None:
    run = folder.write(folder.events[:6], tmp_path)
    with (run / EVENTS_NAME).open("ab") as handle:
        handle.write(b'{"event":"stage_fin')
    write_report(run)
    report = build_report(run)
    assert report.status == "unfinished"
    assert "Not finished: 2 of 6 stages are done" in report.headline


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 20, 200])
def test_a_report_can_be_written_at_any_moment_of_a_run(folder: RunFolder, tmp_path: Path, kept: int) -> None:
    _, page = write_report(folder.write(folder.events[:kept], tmp_path))
    assert _Page(page.read_text(encoding="utf-8")).open == []


def test_a_run_without_events_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run at"):
        write_report(tmp_path)


def test_artifacts_that_are_gone_leave_what_the_events_know(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run = folder.write()
    folder.store.object_path(folder.artifacts["icet"].digest).chmod(0o755)
    shutil.rmtree(folder.store.root)
    report = build_report(run)
    assert report.status == "passed" and report.measures == () and len(report.gates) == 6
    assert all(row.size is None for row in report.artifacts)
    assert "no longer in the store" in render_page(report, read_responses(report))


def test_a_gate_that_was_not_measured_is_shown_as_failed(folder: RunFolder, tmp_path: Path) -> None:
    events = [
        event.model_copy(update={"value": None, "passed": False, "reason": "not measured: no rows"})
        if isinstance(event, GateChecked) and event.name == "max_asr"
        else event
        for event in folder.events
        if not isinstance(event, RunFinished)
    ]
    report = build_report(folder.write(events, tmp_path))
    assert report.status == "gate_failed"
    assert report.headline.startswith("Not published: 1 of 6 gates failed or could not be measured (max_asr).")
    assert "✗ not measured" in render_page(report)


def test_a_reused_training_shows_the_curves_of_the_run_that_did_it(folder: RunFolder, tmp_path: Path) -> None:
    folder.write(run=tmp_path / "first")
    reused = [
        event.model_copy(update={"cached": True, "peak_rss": 0}) if isinstance(event, StageFinished) else event
        for event in folder.events
        if not isinstance(event, StageStarted | StageMetric)
    ]
    report = build_report(folder.write(reused, tmp_path / "second"))
    assert all(stage.status == "cached" for stage in report.stages)
    assert {curve.name for curve in report.curves} == {"reward", "kl", "clip_fraction", "refusal"}
    assert all(len(curve.points) == 40 for curve in report.curves)


def test_the_publishable_report_is_the_same_whichever_run_made_the_files(folder: RunFolder, tmp_path: Path) -> None:
    made = build_report(folder.write(run=tmp_path / "first"))
    reused = [
        event.model_copy(update={"time": event.time + 1000})
        for event in folder.events
        if not isinstance(event, StageMetric)
    ]
    reused = [
        event.model_copy(update={"cached": True, "seconds": 0.2}) if isinstance(event, StageFinished) else event
        for event in reused
        if not isinstance(event, StageStarted)
    ]
    assert made.publishable() == build_report(folder.write(reused, tmp_path / "second")).publishable()


def test_what_was_published_is_shown_with_how_to_get_it(folder: RunFolder, tmp_path: Path) -> None:
    published = Published(target="oci-layout:dist:smol", digest="sha256:" + "a" * 64)
    report = build_report(folder.write([*folder.events[:-1], published, folder.events[-1]], tmp_path))
    page = render_page(report)
    assert "oras pull --oci-layout dist:smol" in page
    assert "the files are published" in page


# Drawing


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), about=st.integers(2, 9))
def test_ticks_are_few_round_and_inside(low: float, span: float, about: int) -> None:
    assume(span > abs(low) * 1e-9)  # below that a float has no digits left to draw
    ticks = nice_ticks(low, low + span, about)
    assert len(ticks) <= about + 2
    assert all(low - span * 1e-3 <= tick <= low + span * (1 + 1e-3) for tick in ticks)
    assert ticks == sorted(ticks)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=0, max_size=30),
    label=st.text(max_size=20).filter(lambda text: text.isprintable()),
)
def test_any_values_and_labels_give_a_well_formed_drawing(values: list[float], label: str) -> None:
    points = [Point(float(x), y, words=label) for x, y in enumerate(values)]
    chart = LineChart(label, label, [Series(label, "shipped", points)], "x", "y", str)
    ElementTree.fromstring(line_chart(chart))


def test_the_graph_leaves_out_arrows_that_say_nothing_new_and_keeps_boxes_apart() -> None:
    needs = {"a": [], "b": ["a"], "c": ["b", "a"], "d": ["a"], "e": ["c", "d"]}
    boxes = [Box(id, parents, id, "stage", "1 s", "done", id) for id, parents in needs.items()]
    for width in (1000, 350):
        root = ElementTree.fromstring(stage_graph(boxes, width))
        assert len(root.findall(".//*[@class='edge']")) == 5  # a-b, b-c, a-d, c-e, d-e; not a-c
        corners = [(float(box.get("x", "")), float(box.get("y", ""))) for box in root.findall(".//*[@class='box']")]
        assert len(set(corners)) == len(boxes)
        assert float(root.get("width", "0")) <= width


@pytest.mark.skipif(shutil.which("xmllint") is None, reason="xmllint is not installed")
def test_the_curve_passes_a_second_parser(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "curve.svg"
    path.write_text(asr_curve_svg(report), encoding="utf-8")
    subprocess.run(["xmllint", "--noout", str(path)], check=True)


def test_the_figures_can_be_put_beside_the_papers_table(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = build_report(folder.write())
    rows = [row for row in report.measures if row.artifact == "source" and row.measure == "asr"]
    asr = next(row for row in rows if row.band == "late")
    scores = [
        asr.model_copy(update={"measure": measure, "value": value, "low": low, "high": high, "unit": measure})
        for measure, value, low, high in (("toxicity", 0.11, 0.1, 0.12), ("reward", -0.52, -0.6, -0.4))
    ]
    others = {"asr_generated-image": 0.25, "over_refusal": 0.125}
    scores += [asr.model_copy(update={"measure": measure, "value": value}) for measure, value in others.items()]
    found = safety_table(report.model_copy(update={"measures": (*report.measures, *scores)}))
    assert found is not None
    assert found.head == ["model", "exits", "AASR", "ATS", "ATR", "AASR, generated image", "over-refusal"]
    (late,) = [row for row in found.rows if row[0] == "Source, uncompressed" and row[1] == "late"]
    assert asr.value is not None
    shown = [f"{100 * asr.value:.2f}", "11.00", "-0.52", "25.00", "12.50"]
    assert [cell.main for cell in late[2:]] == shown  # type: ignore[union-attr]
    assert "As the paper's Table 2" in render_page(report) and "As the paper's Table 3" not in render_page(report)
    assert utility_table(report) is None
    utility = [
        asr.model_copy(update={"measure": measure, "value": value, "low": low, "high": high, "unit": unit})
        for measure, value, low, high, unit in (
            ("vqa_accuracy", 0.625, 0.5, 0.75, "fraction"),
            ("reward_vqa", 0.48, 0.4, 0.5, "reward"),
        )
    ]
    with_utility = report.model_copy(update={"measures": (*report.measures, *utility)})
    table = utility_table(with_utility)
    assert table is not None and table.head == ["model", "exits", "accuracy", "ATR-UT"]
    ((name, band, *cells),) = table.rows
    assert (name, band) == ("Source, uncompressed", "late")
    assert [cell.main for cell in cells] == ["62.50", "0.48"]  # type: ignore[union-attr]
    assert "As the paper's Table 3" in render_page(with_utility)


def test_what_quantization_undid_is_listed_first(folder: RunFolder, report: Report) -> None:
    responses = read_responses(report)
    assert responses is not None
    (shipped,) = [model for model in responses.models if "(gguf)" in model.label]
    table = pyarrow.parquet.read_table(folder.artifacts["icet"].file(RESPONSES_NAME)).to_pylist()
    unsafe = {
        id: {(row["exit"], row["prompt_id"]) for row in table if row["artifact"] == id and row["unsafe"]}
        for id in ("harden", "gguf")
    }
    undone = unsafe["gguf"] - unsafe["harden"]
    assert undone
    marked = 0
    for exit in shipped.exits:
        (harmful,) = [group for group in exit.groups if group.harmful]
        flags = [any("before quantization" in chip.words for chip in answer.chips) for answer in harmful.answers]
        marked += sum(flags)
    assert marked == len(undone)


def test_at_each_exit_its_own_undone_requests_stand_first_however_few_are_shown(
    folder: RunFolder, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.report.responses.EMBEDDED", 1)  # three of each kind
    responses = read_responses(report)
    assert responses is not None
    rows = pyarrow.parquet.read_table(folder.artifacts["icet"].file(RESPONSES_NAME)).to_pylist()
    unsafe = {(row["artifact"], row["exit"], row["prompt_id"]) for row in rows if row["unsafe"]}
    undone = {(exit, id) for name, exit, id in unsafe if name == "gguf" and ("harden", exit, id) not in unsafe}
    (shipped,) = [model for model in responses.models if "(gguf)" in model.label]
    for exit in shipped.exits:
        (harmful,) = [group for group in exit.groups if group.harmful]
        marked = [any("before quantization" in chip.words for chip in answer.chips) for answer in harmful.answers]
        here = [id for at, id in undone if exit.label.partition(":")[0].partition(",")[0] == f"Exit {at}"]
        assert sum(marked) == min(len(here), 3) and marked == sorted(marked, reverse=True)
    listed = {(one.prompt, where) for one in responses.undone for where in one.where.split(", ")}
    assert len(listed) == len(undone)
    assert f"unsafe in the shipped file: {len(responses.undone)} requests" in render_page(report, responses)


def test_requests_put_in_another_way_do_not_count_among_the_plain_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = build_report(folder.write())
    path = folder.artifacts["icet"].file(RESPONSES_NAME)
    plain = pyarrow.parquet.read_table(path).to_pylist()
    attacked = [
        row | {"prompt_id": f"{row['prompt_id']}#typographic", "unsafe": True}
        for row in plain
        if row["intent"] == "harmful"
    ]
    path.chmod(0o644)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*plain, *attacked]), path)
    responses = read_responses(report)
    assert responses is not None
    exit = responses.models[0].exits[0]
    assert "of 6 harmful requests answered" in exit.label
    assert [group.label for group in exit.groups][:2] == [
        "Harmful requests (4 of 6)",
        "Harmful requests, typographic (4 of 6)",
    ]


def test_the_sets_that_were_asked_stand_there_with_their_licences(report: Report, page: str) -> None:
    ours, theirs = report.prompt_sets
    assert (ours.set, ours.n, ours.licence, theirs.licence) == ("advbench", 24, "MIT", "")
    asked = _Page(page).text.partition("Prompt sets that were asked")[2].partition("The recipe as it was run")[0]
    for words in ("harmful: to be refused", "package:pyrit==1.1.0", "not said", NASTY):
        assert words in asked


def test_responses_on_which_judges_differ_are_listed_folded_with_what_each_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = build_report(folder.write())
    path = folder.artifacts["icet"].file(RESPONSES_NAME)
    rows = pyarrow.parquet.read_table(path).to_pylist()

    def judged(row: dict[str, object]) -> str:
        unsafe = bool(row["unsafe"])
        differs = row["prompt_id"] == "h0" or row["intent"] == "benign"
        said = {"refusal-rule": (unsafe, "by rule"), "learned": (unsafe != differs, "probability 0.62")}
        return json.dumps(
            {name: {"unsafe": one, "degenerate": False, "reason": why} for name, (one, why) in said.items()}
        )

    path.chmod(0o644)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"judgements": judged(row)} for row in rows]), path)
    responses = read_responses(report)
    assert responses is not None
    distinct = {row["response"] for row in rows if row["prompt_id"] == "h0"}
    assert responses.disputed_total == len(responses.disputed) == len(distinct)
    first = responses.disputed[0]
    assert first.prompt.startswith("Request number h0") and first.where.startswith("Source, uncompressed, exit 1")
    assert sorted(chip.words for chip in first.chips) in (
        ["learned: safe (probability 0.62)", "refusal-rule: unsafe (by rule)"],
        ["learned: unsafe (probability 0.62)", "refusal-rule: safe (by rule)"],
    )
    page = render_page(report, responses)
    seen = _Page(page)
    assert seen.open == [] and "<script" not in page.lower() and "Where judges differ" in page
    listed = page[page.index("Where judges differ") : page.index('id="details"')]
    assert listed.count("<details>") == len(distinct) and "learned: " in listed
