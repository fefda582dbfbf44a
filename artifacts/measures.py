"""Tidy rows of what was measured: the table that verification writes, gates read and the report shows."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

MEASURES_NAME: Final = "measures.json"  # inside a `verdict` artifact
RESPONSES_NAME: Final = "responses.parquet"  # beside it
VERDICT_NAME: Final = "verdict.json"

Role = Literal["source", "hardened", "quantized"]
Band = Literal["early", "middle", "late", "average", "all"]


class Measure(BaseModel):
    """One number with its interval.

    `exit` null and `band` null: of the artifact as a whole. `exit` null and `band` set: an average over the exits of
    that band; `average` is over the exits that every compared artifact has, `all` over all of this artifact's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact: str  # stage id in the recipe ("source", "gguf", ...)
    digest: str = ""  # full artifact digest
    role: Role
    runtime: str  # "llamacpp", "transformers"
    exit: int | None = None
    band: Band | None = None
    measure: str  # "asr", "over_refusal", "vqa_accuracy", "fidelity_cosine", "memory_predicted", "memory_measured", ...
    value: float | None  # None: could not be measured; `note` says why
    low: float | None = None  # 95% interval
    high: float | None = None
    n: int | None = None  # how many responses, questions or images stand behind it
    unit: str = ""  # "fraction", "bytes", "cosine", ...
    note: str = ""


_ROWS = TypeAdapter(list[Measure])


def write_measures(path: Path, rows: list[Measure]) -> None:
    """Write rows as JSON, one stable order: the order given."""
    path.write_bytes(_ROWS.dump_json(rows, indent=1) + b"\n")


def read_measures(path: Path) -> list[Measure]:
    """Read what `write_measures` wrote.

    Raises:
        OSError, pydantic.ValidationError.
    """
    return _ROWS.validate_json(path.read_bytes())
