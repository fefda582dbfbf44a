"""How a side takes turns: it prints a line of JSON when it is ready and after each step, and then waits for `go`.

Runs in either environment, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time


class Turns:
    """Standard output belongs to the turns; whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = 0.0

    def wait(self, **told: object) -> None:
        """Tell `told`, and return when the next step may begin. Without a next step the process ends here."""
        print(json.dumps(told), file=self._out, flush=True)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # the trainers have no way to be stopped between two steps
        self._began = time.perf_counter()

    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._began
