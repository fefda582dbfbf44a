"""What was found so far, one line a finding, written as it comes: a verification that is killed goes on from there."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self


class Remembered:
    """Lists of JSON values by a key. Lines that were being written when the power went count for nothing.

    Attributes:
        known: by key; what comes later wins.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: dict[str, list[object]] = {}
        self._whole = True  # the file ends with a line's end
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        self._whole = content.endswith("\n") or not content
        for line in content.split("\n"):
            try:
                key, *values = json.loads(line)
            except (ValueError, TypeError):
                continue
            self.known[str(key)] = values

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if not self._whole:
            self._file.write("\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, key: str, *values: object) -> None:
        """Raises: TypeError: a value that JSON does not have."""
        self.known[key] = list(values)
        self._file.write(json.dumps([key, *values]) + "\n")
        self._file.flush()
