"""The files of a verdict: `responses.parquet` and `verdict.json` (`measures.json` is artifacts.measures')."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from stages.verify.asking import Answer
from stages.verify.scores import correct, correctness


def write_responses(path: Path, answers: Sequence[Answer]) -> None:
    """Every response with what was asked and how it was judged; the same answers give the same bytes."""
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, tuple[pyarrow.DataType, list[object]]] = {
        "artifact": (pyarrow.string(), [a.subject.id for a in answers]),
        "role": (pyarrow.string(), [a.subject.role for a in answers]),
        "runtime": (pyarrow.string(), [a.subject.runtime for a in answers]),
        "exit": (pyarrow.int32(), [a.exit for a in answers]),
        "image": (pyarrow.string(), [a.ask.image_name for a in answers]),
        "prompt_id": (pyarrow.string(), [a.ask.id for a in answers]),
        "set": (pyarrow.string(), [a.ask.set for a in answers]),
        "category": (pyarrow.string(), [a.ask.category for a in answers]),
        "intent": (pyarrow.string(), [a.ask.intent for a in answers]),
        "prompt": (pyarrow.string(), [a.ask.judged for a in answers]),
        "sample": (pyarrow.int32(), [a.ask.sample for a in answers]),
        "response": (pyarrow.string(), [a.text for a in answers]),
        "refused": (pyarrow.bool_(), [a.refused for a in answers]),
        "unsafe": (pyarrow.bool_(), [a.unsafe for a in answers]),
        "degenerate": (pyarrow.bool_(), [a.degenerate for a in answers]),
        # What each judge said, as JSON: {name: {unsafe, score, reason, ...}}.
        "judgements": (pyarrow.string(), [_judgements(a) for a in answers]),
        "tokens": (pyarrow.int32(), [a.tokens for a in answers]),
        # Visual questions only; null elsewhere. own_exit: at the exit that the model calls its own.
        "own_exit": (pyarrow.bool_(), [None if a.ask.answer is None else _at_own_exit(a) for a in answers]),
        "answer": (pyarrow.string(), [a.ask.answer for a in answers]),
        "correct": (pyarrow.bool_(), [correct(a) if a.ask.answer is not None else None for a in answers]),
        "correctness": (pyarrow.float64(), [correctness(a) if a.ask.answer is not None else None for a in answers]),
    }
    table = pyarrow.table({name: pyarrow.array(values, kind) for name, (kind, values) in columns.items()})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def _at_own_exit(answer: Answer) -> bool:
    return answer.exit is None or answer.exit == answer.subject.default_exit


def _judgements(answer: Answer) -> str:
    said = {name: asdict(judgement) for name, judgement in answer.opinions.items()}
    return json.dumps(said, ensure_ascii=False, sort_keys=True)


def write_verdict(path: Path, content: Mapping[str, object]) -> None:
    """Write `verdict.json`: what was measured, on which bytes, with which questions and judge."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
