"""Asking one artifact, and remembering what it answered so that a killed verification goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from artifacts.artifact import Artifact
from artifacts.errors import StageError
from artifacts.manifest import sha256_bytes
from artifacts.measures import Role
from stages.judges.judge import Judge, Judgement
from stages.runtimes.runtime import Progress, Request, Runtime
from stages.verify.questions import Ask, digest

RuntimeName = Literal["llamacpp", "transformers"]
_RUNTIMES: dict[str, RuntimeName] = {"gguf": "llamacpp", "gptq": "transformers", "checkpoint": "transformers"}


@dataclass(frozen=True)
class Subject:
    """An artifact under verification. `gated`: it ships; controls and references do not."""

    id: str
    artifact: Artifact
    role: Role
    gated: bool

    @property
    def runtime(self) -> RuntimeName:
        """Raises: StageError: an artifact of a type that no runtime answers from."""
        found = _RUNTIMES.get(self.artifact.type)
        if found is None:
            raise StageError(
                f"'{self.id}' is of type {self.artifact.type!r}; verification reads {', '.join(_RUNTIMES)}"
            )
        return found


@dataclass(frozen=True)
class Answer:
    """One response of one artifact at one exit (None: no image), judged."""

    subject: Subject
    exit: int | None
    ask: Ask
    text: str
    tokens: int
    judgement: Judgement

    @property
    def unsafe(self) -> bool:
        return self.judgement.unsafe

    @property
    def degenerate(self) -> bool:
        return self.judgement.degenerate

    @property
    def refused(self) -> bool:
        return not self.unsafe and not self.degenerate


def open_runtime(subject: Subject) -> Runtime:
    """The runtime that the artifact ships with: llama.cpp for a GGUF, transformers for a checkpoint, GPTQ or not.

    Raises:
        StageError: it cannot be loaded.
    """
    if subject.runtime == "llamacpp":
        from stages.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(subject.artifact.path)
    from stages.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(subject.artifact.path)


def ask(
    subject: Subject,
    runtime: Callable[[], Runtime],
    exit: int | None,
    asks: Sequence[Ask],
    judge: Judge,
    scratch: Path,
    progress: Progress,
) -> list[Answer]:
    """Ask all of `asks` at one exit. What an earlier, killed verification has been answered is read from `scratch`.

    Args:
        runtime: called only if something has to be asked.
        exit: for asks with an image; None is the artifact's default exit.
    """
    key = sha256_bytes(f"{subject.artifact.digest} {subject.runtime} {exit} {digest(asks)}".encode())
    path = scratch / f"answers-{key}.json"
    found = _remembered(path, len(asks))
    if found is None:
        requests = [Request(ask.text, ask.image, exit if ask.image else None, ask.max_new_tokens) for ask in asks]
        responses = runtime().generate(requests, progress)
        found = [(response.text, len(response.tokens)) for response in responses]
        _remember(path, found)
    else:
        progress(len(asks), len(asks))
    judgements = judge.score([ask.text for ask in asks], [text for text, _ in found])
    return [
        Answer(subject, exit if ask.image else None, ask, text, tokens, judgement)
        for ask, (text, tokens), judgement in zip(asks, found, judgements, strict=True)
    ]


def _remembered(path: Path, n: int) -> list[tuple[str, int]] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(text), int(tokens)) for text, tokens in content]
    except (OSError, ValueError, TypeError):
        return None
    return found if len(found) == n else None


def _remember(path: Path, answers: Sequence[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
