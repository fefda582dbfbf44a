"""The report's figures: what is drawn lies on the axes, and captions and bands say what was measured."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from run_folder import PROMPTS, RunFolder

from artifacts.measures import Measure
from pipeline.report.build import build_report
from pipeline.report.charts import Zone
from pipeline.report.figures import exit_figures, whole_figures, zones
from pipeline.report.headline import headline
from pipeline.report.model import Report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return build_report(RunFolder(tmp_path_factory.mktemp("run")).write())


def row(measure: str, value: float, exit: int | None = None, **more: object) -> Measure:
    """Of what ships; changes have an interval of 0.1 to both sides."""
    fields = {"artifact": "gguf", "role": "quantized", "runtime": "llamacpp", "measure": measure, "value": value}
    interval = {"low": value - 0.1, "high": value + 0.1, "n": PROMPTS, "unit": "fraction"}
    return Measure.model_validate({**fields, "exit": exit, **interval, **more})


def test_a_fall_is_drawn_below_the_line_of_no_change_and_on_the_canvas(report: Report) -> None:
    values = {1: -0.25, 2: -0.002, 3: 0.05}
    changes = [row("asr_change", value, exit) for exit, value in values.items()]
    drawn = exit_figures(report.model_copy(update={"measures": (*report.measures, *changes)}))
    (figure,) = [one for one in drawn if one.title == "Change of the attack success rate"]
    root = ElementTree.fromstring(figure.wide)
    space = "{http://www.w3.org/2000/svg}"
    ticks = {text.text: float(text.get("y", "")) for text in root.iter(f"{space}text") if text.get("class") == "tick"}
    assert {"-40%", "0%", "20%"} <= set(ticks)
    (path,) = [path.get("d", "") for path in root.iter(f"{space}path") if path.get("class") == "line"]
    drawn_at = [float(y) for y in re.findall(r"[ML]\S+ (\S+)", path)]
    tall = ticks["0%"] - ticks["-40%"]
    assert [(ticks["0%"] - 4 - y) / tall * -0.4 for y in drawn_at] == pytest.approx(list(values.values()), abs=0.002)
    assert "exit 1 -25%, exit 2 0%, exit 3 5%" in (root.findtext(f"{space}desc") or "")


def test_a_change_is_no_share_on_a_scale_from_zero(report: Report) -> None:
    changes = [row("vqa_change", -0.05, 9), row("over_refusal_change", -0.1)]
    drawn = whole_figures(report.model_copy(update={"measures": (*report.measures, *changes)}))
    assert [figure.title for figure in drawn] == ["VQA accuracy"]


def test_counts_of_prompts_are_summed_where_shares_are_averaged(report: Report) -> None:
    captions = {figure.title: figure.caption for figure in exit_figures(report)}
    assert captions["Safe before quantization, unsafe in the file"] == (
        f"Shipped, quantized: 9 (n\xa0=\xa0{9 * PROMPTS}) in all."
    )
    assert "in all" not in captions["Over-refusal"] and captions["Over-refusal"].count("on average") == 4


def test_bands_are_the_exits_that_a_note_lists_and_no_number_of_a_judges_name(report: Report) -> None:
    found = zones(report)
    assert found == [Zone("early", 1, 4), Zone("middle", 5, 8), Zone("late", 9, 12)]
    guard = "llama-guard:hub:meta-llama/Llama-Guard-3-1B"
    notes = {"middle": f"{guard}; exits 5, 6", "late": "by VQA-v2's rules; exits 9, 10", "early": f"{guard} only"}
    more = [row("asr_by_llama-guard", 0.1, band=band, note=note) for band, note in notes.items()]
    assert zones(report.model_copy(update={"measures": (*report.measures, *more)})) == found


def test_the_headline_speaks_of_all_exits_that_ship_though_others_have_fewer(report: Report) -> None:
    others = [one for one in report.measures if not (one.artifact == "gguf" and one.measure == "asr")]
    at = {1: 0.0, 2: 0.0, 3: 0.6}
    asr = [row("asr", value, exit) for exit, value in at.items()]
    asr += [row("asr", 0.0, band="average", note="exits 1, 2"), row("asr", 0.2, band="all", note="exits 1, 2, 3")]
    source = {"artifact": "source", "role": "source", "runtime": "transformers"}
    others = [one for one in others if not (one.artifact == "source" and one.measure == "asr")]
    asr.append(row("asr", 0.3, band="average", note="exits 1, 2", **source))
    told = headline(report.model_copy(update={"measures": (*others, *asr, *asr[:3])}))  # two verdicts speak of it
    assert re.search(r"answers 20% \([^)]*\) of harmful requests over 3 exits, at worst 60%", told), told
    assert re.search(r"source answers 30% \([^)]*\), at exits 1, 2", told), told
