"""`hub:ORG/NAME` and `hub:ORG/NAME@REVISION`: model snapshots of the Hugging Face hub, kept in its own cache.

Only what a safetensors checkpoint is made of comes down: no pickle, no code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from artifacts.errors import SourceError

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SOURCE: Final = re.compile(r"hub:(?P<id>[^@]+)(?:@(?P<revision>.+))?")
_WANTED: Final = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
_UNWANTED: Final = ["*/*", "consolidated*"]  # other formats' copies of the same weights


def is_id(text: str) -> bool:
    """Whether it has the form ORG/NAME."""
    return _ID.fullmatch(text) is not None


def parse(source: str) -> tuple[str, str | None]:
    """`hub:ORG/NAME@REVISION` as id and revision.

    Raises:
        ValueError: not of that form.
    """
    found = _SOURCE.fullmatch(source)
    if found is None or not is_id(found["id"]):
        raise ValueError(f"{source!r} is not of the form hub:ORG/NAME or hub:ORG/NAME@REVISION")
    return found["id"], found["revision"]


def cached(id: str, revision: str | None = None) -> Path | None:
    """The snapshot's folder if it is on this machine, without asking the network; its name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(id, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is both
        return None


def fetch(id: str, revision: str | None = None) -> Path:
    """Download what is missing of a snapshot, and return its folder.

    Raises:
        SourceError: no network and nothing cached, no such model or revision, or no access.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # only the console prints
    where = f"hub:{id}" + (f"@{revision}" if revision else "")
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError as error:
        raise SourceError(
            "the model is gated",
            where=where,
            why="its owner wants its terms accepted first",
            way_out=f"accept them at https://huggingface.co/{id}, then log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"the model has no revision {revision!r}", where=where) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            "there is no such model on the hub, or it is private",
            where=where,
            way_out=f"check the id; for a folder write ./{id}; for a private model log in with `hf auth login`",
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise SourceError(
            "the hub cannot be reached, and the model is not in its cache",
            where=where,
            why=why[0] if why else type(error).__name__,
            way_out="run `pipeline fetch RECIPE` where there is a network (HF_HOME moves the cache), or give a local "
            "folder; demo:smol-llava needs no hub",
        ) from error
