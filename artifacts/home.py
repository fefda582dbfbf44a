"""Where the pipeline keeps what it downloads and makes: one folder, moved by `$PIPELINE_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """`$PIPELINE_HOME`, or the user's cache folder for `icet-pipeline`. Not created here."""
    home = os.environ.get("PIPELINE_HOME")
    return Path(home).expanduser() if home else Path(platformdirs.user_cache_dir("icet-pipeline", appauthor=False))
