"""The one family of errors that a user may see: each says what, where, why and the way out.

The command line prints them without a traceback and exits with `exit_code`:
1 a stage failed, 2 the recipe or the arguments are wrong, 3 a gate failed.
"""

from __future__ import annotations

from typing import ClassVar


class PipelineError(Exception):
    """Something a user can act on.

    Args:
        what: the thing that is wrong, one sentence without a full stop ("unknown stage 'prunee'").
        where: the place: `file:line`, a stage id, an artifact digest, a path.
        why: the reason, if it is not in `what`.
        way_out: what to do about it ("did you mean 'prune'?").
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, way_out: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.way_out = way_out

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.way_out:
            lines.append(f"  fix: {self.way_out}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str | None]:
        """The same four parts for `--json` and for crossing a process border."""
        return {
            "kind": type(self).__name__,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "way_out": self.way_out,
        }


class RecipeError(PipelineError):
    """The recipe, an argument, or what they name cannot work; refused before any work starts."""

    exit_code = 2


class StageError(PipelineError):
    """A stage could not do its work."""


class SourceError(StageError):
    """A model, wheel or data set is missing, damaged, or cannot be fetched."""


class StoreError(PipelineError):
    """The artifact store cannot be read or written."""


class GateError(PipelineError):
    """A gate failed or could not be measured; nothing is published."""

    exit_code = 3
