"""The support matrix: which families there are, and what can be done with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from stages.models.card import Card
from stages.models.family import families

_YES, _NO = "yes", "-"
_HEAD: Final = ("family", "model_type", "early-exit", "realign", "l-ppo", "prune", "GGUF, llama.cpp", "GPTQ")
_INTRODUCTION: Final = """\
# Model families

What the pipeline can do with which models; `pipeline families` prints the same. This page is made from the code:

    pipeline families --markdown > docs/families.md

A family is one file in `stages/models/`. Exits count as transformers' `hidden_states`: 0 are the embeddings, l is after
l blocks. Another family comes from any installed package, as a subclass of `stages.models.family.Family` under the
entry-point group `pipeline.families`.
"""


@dataclass(frozen=True)
class Support:
    """One family. Text-only models have no encoder to leave, so ICET, early exit and l-ppo do not apply to them."""

    name: str
    model_types: tuple[str, ...]
    early_exit: bool
    realign: bool
    lppo: bool
    prune: bool
    llamacpp: bool
    gptq: bool
    card: Card

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def row(self) -> tuple[str, ...]:
        marks = (self.early_exit, self.realign, self.lppo, self.prune, self.llamacpp, self.gptq)
        return (self.name, ", ".join(self.model_types), *(_YES if mark else _NO for mark in marks))


def list_families() -> list[Support]:
    """Every family, built in and installed, in the order in which they are asked whether a model is theirs."""
    found = []
    for family in families():
        sees = family.card.tower != _NO
        found.append(
            Support(
                name=family.name,
                model_types=family.model_types,
                early_exit=sees,
                realign=family.realigns,
                lppo=sees,
                prune=True,
                llamacpp="llamacpp" in family.runtimes,
                gptq=family.gptq,
                card=family.card,
            )
        )
    return found


def show_families(found: Sequence[Support]) -> str:
    """A table for the terminal."""
    rows = [_HEAD, *(family.row() for family in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_families(found: Sequence[Support]) -> str:
    """docs/families.md, without its last newline."""
    lines = [_INTRODUCTION, _line(_HEAD), _line(("---",) * len(_HEAD))]
    lines += [_line(family.row()) for family in found]
    for family in found:
        card = family.card
        lines += ["", f"## {family.name}", ""]
        lines += [
            f"- **{name}**: {value}"
            for name, value in (
                ("for example", ", ".join(f"`{model}`" for model in card.models)),
                ("image encoder", card.tower),
                ("projector", card.projector),
                ("language model", card.language),
                ("default exit", card.default_exit),
                ("features", card.features),
                ("image in the prompt", card.prompt),
            )
            if value != _NO
        ]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
