"""What this process may use of the machine, and has used. Light: processes whose memory is measured import it."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_resident() -> int:
    """The most memory that this process has held, in bytes."""
    # Linux keeps the parent's size at the moment of the fork in ru_maxrss; VmHWM starts anew with exec.
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
