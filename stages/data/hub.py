"""The Hugging Face hub: model snapshots (`hub:ORG/NAME`, `hub:ORG/NAME@REVISION`) and single files of data sets
(`hub:ORG/NAME!PATH/IN/IT`), kept in the hub's own cache.

Of a model only what a safetensors checkpoint is made of comes down: no pickle, no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    from huggingface_hub import snapshot_download

    with _explained("model", id, revision):
        return Path(snapshot_download(id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))


@dataclass(frozen=True)
class DataFile:
    """One file of a data set: `hub:ORG/NAME@REVISION!PATH/IN/IT`."""

    id: str
    revision: str | None
    member: str

    @classmethod
    def parse(cls, source: str) -> DataFile:
        """
        Raises:
            ValueError: not of that form.
        """
        repository, mark, member = source.partition("!")
        if not mark or not member or ".." in member.split("/") or member.startswith("/"):
            raise ValueError(
                f"{source!r} is not of the form hub:ORG/NAME!PATH/IN/IT or hub:ORG/NAME@REVISION!PATH/IN/IT"
            )
        return cls(*parse(repository), member)

    def cached(self) -> Path | None:
        """The file if it is on this machine, without asking the network."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.id, self.member, repo_type="dataset", revision=self.revision, local_files_only=True
                )
            )
        except (OSError, ValueError):
            return None

    def commit(self) -> str:
        """The commit of the cached file; "" while it is not there."""
        path = self.cached()
        # .../snapshots/COMMIT/PATH/IN/IT
        return path.parents[len(Path(self.member).parts) - 1].name if path is not None else ""

    def fetch(self) -> Path:
        """Download it if it is not there yet.

        Raises:
            SourceError: no network and not cached, no such data set, revision or file, or no access.
        """
        from huggingface_hub import errors, hf_hub_download

        with _explained("data set", self.id, self.revision):
            try:
                return Path(hf_hub_download(self.id, self.member, repo_type="dataset", revision=self.revision))
            except errors.RemoteEntryNotFoundError as error:
                raise SourceError(f"the data set has no file {self.member!r}", where=f"hub:{self.id}") from error


@contextmanager
def _explained(thing: str, id: str, revision: str | None) -> Iterator[None]:
    """The hub's errors, as ours."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # only the console prints
    where = f"hub:{id}" + (f"@{revision}" if revision else "")
    page = f"https://huggingface.co/{'datasets/' if thing == 'data set' else ''}{id}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"the {thing} is gated",
            where=where,
            why="its owner wants its terms accepted first",
            way_out=f"accept them at {page}, then log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"the {thing} has no revision {revision!r}", where=where) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"there is no such {thing} on the hub, or it is private",
            where=where,
            way_out=f"check the id; for a folder write ./{id}; for a private {thing} log in with `hf auth login`",
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise SourceError(
            f"the hub cannot be reached, and the {thing} is not in its cache",
            where=where,
            why=why[0] if why else type(error).__name__,
            way_out="run `pipeline fetch RECIPE` where there is a network (HF_HOME moves the cache), or give a local "
            + ("folder; demo:smol-llava needs no hub" if thing == "model" else "file"),
        ) from error
