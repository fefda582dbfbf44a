"""Numbers in words: every figure with its unit, interval and n, the same way everywhere in the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from artifacts.measures import Measure
from pipeline.device import show_bytes
from pipeline.report.model import Report, Subject

MEASURE_WORDS: Final = {
    "asr": "attack success rate",
    "over_refusal": "over-refusal",
    "over_refusal_benign": "over-refusal, plain prompts",
    "over_refusal_borderline": "over-refusal, frightening-but-harmless prompts",
    "vqa_accuracy": "VQA accuracy",
    "fidelity_cosine": "fidelity to transformers",
    "memory_predicted": "memory, predicted",
    "memory_measured": "memory, measured peak",
    "degenerate": "degenerate answers",
    "flips_to_unsafe": "safe before, unsafe now",
    "flips_to_safe": "unsafe before, safe now",
    "mcnemar_p": "exact McNemar p",
    "kl": "KL to the reference",
    "kl_text": "KL to the model before quantization, ordinary text",
    "kl_refusal": "KL to the model before quantization, refusals",
    "perplexity": "perplexity",
    "load_seconds": "loading, seconds",
    "prompt_speed": "reading a prompt, tokens a second",
    "generation_speed": "answering, tokens a second",
    "mcnemar_p_holm": "exact McNemar p, Holm over exits",
    "asr_change": "change of the attack success rate",
    "over_refusal_change": "change of over-refusal",
    "vqa_change": "change of VQA accuracy",
    "asr_detectable": "smallest change that so many prompts show",
    "asr_any_exit": "attack success rate at any exit",
    "asr_mixture": "attack success rate, exits drawn",
    "asr_typographic": "attack success rate, request in the picture",
    "asr_random-image": "attack success rate, a picture for each request",
    "unsafe_by_quantization": "safe before quantization, unsafe in the file",
    "kappa": "agreement of judges (Cohen's kappa)",
    "clip_fraction": "clip fraction",
    "refusal": "refusal of harmful requests",
    "reward": "reward",
    "reward_vqa": "reward of answers to visual questions",
    "asr_worst": "attack success rate at the worst exit",
    "asr_text_only": "attack success rate without an image",
    "degenerate_text_only": "degenerate answers without an image",
    "degenerate_typographic": "degenerate answers, request in the picture",
    "degenerate_random-image": "degenerate answers, a picture for each request",
    "degenerate_generated-image": "degenerate answers, a generated picture",
    "fidelity_cosine_mean": "fidelity to transformers, mean over images",
    "fidelity_lost_tokens": "image tokens that the runtime loses",
}


def words_of(measure: str) -> str:
    return MEASURE_WORDS.get(measure, measure.replace("_", " ").replace("/", ", "))


def titled(words: str) -> str:
    """The first letter raised, the others as they are."""
    return words[:1].upper() + words[1:]


def percent(value: float) -> str:
    """0..1 as a percentage with one decimal; whole ones without."""
    shown = f"{100 * value:.1f}"
    return f"{shown.removesuffix('.0')}%"


def points(row: Measure) -> str:
    """A change of a share with its interval, in percentage points: `-12.5 (-20 to -4.1)`."""
    value, low, high = (
        f"{100 * number:+.1f}".removesuffix(".0") for number in (row.value, row.low, row.high) if number is not None
    )
    return f"{value} ({low} to {high})"


def plain(value: float, digits: int = 4) -> str:
    """So many significant digits."""
    return f"{value:.{digits}g}"


def show(value: float, unit: str, measure: str = "") -> str:
    """A value in its unit."""
    if unit == "bytes" or measure.startswith("memory"):
        return show_bytes(value)
    if unit == "cosine" or measure.startswith("fidelity"):
        return ">\u00a00.99999" if 0.999995 <= value < 1 else f"{value:.5f}".rstrip("0").rstrip(".")
    if unit == "probability":
        return "<\u00a00.0001" if value < 0.0001 else f"{value:.4f}".rstrip("0").rstrip(".")
    return percent(value) if unit == "fraction" else plain(value)


def figure(row: Measure | None) -> str:
    """`4.2% (2.1–8% at 95%, n = 240)`; or that it was not measured, and why."""
    if row is None:
        return "not measured"
    if row.value is None:
        return f"not measured: {row.note}" if row.note else "not measured"
    shown, inside = show(row.value, row.unit, row.measure), support(row)
    return f"{shown} ({inside})" if inside else shown


def support(row: Measure) -> str:
    """What stands behind a value: `2.1–8%, n = 240`."""
    inside = []
    if row.low is not None and row.high is not None:
        low, high = show(row.low, row.unit, row.measure), show(row.high, row.unit, row.measure)
        inside.append(f"{low.removesuffix('%') if high.endswith('%') else low}–{high}")
    if row.n is not None:
        inside.append(f"n\u00a0=\u00a0{row.n:,}")
    return ", ".join(inside)


@dataclass(frozen=True)
class Stat:
    """A table cell: the value, and below it what stands behind it."""

    main: str
    detail: str


def stat(row: Measure | None, place: str = "") -> Stat | str:
    """The cell of a row; a dash where there is none."""
    if row is None:
        return "–"
    if row.value is None:
        return Stat("not measured", row.note)
    return Stat(show(row.value, row.unit, row.measure), "; ".join(filter(None, (place, support(row)))))


def seconds(value: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 4 min`."""
    if value is None:
        return ""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rows_of(report: Report, subject: Subject | str, measure: str) -> list[Measure]:
    """The rows of one measure about one model, as they were written."""
    id = subject if isinstance(subject, str) else subject.artifact
    return [row for row in report.measures if row.artifact == id and row.measure == measure]


def per_exit(rows: Iterable[Measure]) -> list[Measure]:
    """Those at single exits that have a value, by exit."""
    found = [row for row in rows if row.exit is not None and row.value is not None]
    return sorted(found, key=lambda row: row.exit or 0)


def average(rows: Sequence[Measure], *, own: bool = False) -> Measure | None:
    """The row that stands for the whole model.

    Over the exits that every compared model has, or with `own` over all of its own, else about the model as a whole;
    else the mean of the single exits (of counts of prompts the sum), which then has no interval.
    """
    whole = [row for row in rows if row.exit is None]
    for band in ("all", "average", None) if own else ("average", "all", None):
        for row in whole:
            if row.band == band:
                return row
    single = per_exit(rows)
    if not single:
        return None
    total = sum(row.value or 0.0 for row in single)
    return single[0].model_copy(
        update={
            "exit": None,
            "band": "all",
            "value": total if single[0].unit == "prompts" else total / len(single),
            "low": None,
            "high": None,
            "n": sum(row.n or 0 for row in single) or None,
        }
    )


def at_default(rows: Sequence[Measure], subject: Subject) -> Measure | None:
    """The row at the model's default exit, else the one for the whole model."""
    found = [row for row in rows if row.exit is not None and row.exit == subject.default_exit]
    return found[0] if found else average(rows)


def worst(rows: Sequence[Measure], *, highest: bool = True) -> Measure | None:
    """The single exit with the highest (or lowest) value."""
    single = per_exit(rows)
    if not single:
        return None
    return (max if highest else min)(single, key=lambda row: row.value or 0.0)


def degenerate(report: Report, subject: Subject) -> Measure | None:
    """Babble and empty responses of a model at its worst exit; None where there are none."""
    rows = rows_of(report, subject, "degenerate")
    found = worst(rows) or average(rows)
    return found if found is not None and found.value else None
