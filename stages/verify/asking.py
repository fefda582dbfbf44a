"""Asking one artifact, and remembering what it answered so that a killed verification goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from artifacts.artifact import Artifact
from artifacts.errors import StageError
from artifacts.manifest import sha256_bytes
from artifacts.measures import Role
from stages.judges.judge import Judgement
from stages.judges.refusal import RefusalRule, refused
from stages.runtimes.llamacpp_library import CacheType
from stages.runtimes.runtime import Progress, Request, Response, Runtime
from stages.verify.questions import Ask, digest
from stages.verify.remembered import Remembered

RuntimeName = Literal["llamacpp", "transformers"]
_RUNTIMES: dict[str, RuntimeName] = {"gguf": "llamacpp", "gptq": "transformers", "checkpoint": "transformers"}


@dataclass(frozen=True)
class Subject:
    """An artifact under verification. `gated`: it ships; controls and references do not. `cache_type`: how llama.cpp
    keeps keys and values on the device."""

    id: str
    artifact: Artifact
    role: Role
    gated: bool
    cache_type: CacheType = "F16"

    @property
    def default_exit(self) -> int | None:
        """The exit that the artifact calls its own; None if it says nothing."""
        return self.artifact.default_exit

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
    """One response of one artifact at one exit (None: no image), judged.

    `rule` says whether it refuses. Whether it is unsafe is for the deciding judge to say: the first of `opinions`, or
    the rule where there are none. What the rule calls no answer at all and nobody unsafe is counted apart.
    """

    subject: Subject
    exit: int | None
    ask: Ask
    text: str
    tokens: int
    rule: Judgement
    opinions: Mapping[str, Judgement] = field(default_factory=dict)  # by judge

    @property
    def unsafe(self) -> bool:
        """Of a harmful request; whoever decides, and against the rule if it calls the response none."""
        return self.ask.intent == "harmful" and next(iter(self.opinions.values()), self.rule).unsafe

    @property
    def degenerate(self) -> bool:
        return self.rule.degenerate and not self.unsafe

    @property
    def refused(self) -> bool:
        return refused(self.rule)


def open_runtime(subject: Subject) -> Runtime:
    """The runtime that the artifact ships with: llama.cpp for a GGUF, transformers for a checkpoint, GPTQ or not.

    Raises:
        StageError: it cannot be loaded.
    """
    if subject.runtime == "llamacpp":
        from stages.runtimes.llamacpp import LlamaCppRuntime

        return LlamaCppRuntime(subject.artifact.path, as_shipped=True, cache_type=subject.cache_type)
    from stages.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(subject.artifact.path)


def ask(
    subject: Subject,
    runtime: Callable[[], Runtime],
    exit: int | None,
    asks: Sequence[Ask],
    scratch: Path,
    progress: Progress,
) -> list[Answer]:
    """Ask all of `asks` at one exit. What an earlier, killed verification has been answered is read from `scratch`.

    At the exit that the artifact says is its own, its files are used as they are: what ships is what is measured.

    Args:
        runtime: called only if something has to be asked.
        exit: for asks with an image; None is the artifact's default exit.
    """
    own = subject.default_exit
    kept = "" if subject.cache_type == "F16" else f" {subject.cache_type}"
    key = sha256_bytes(f"{subject.artifact.digest} {subject.runtime} {exit}{kept}".encode())
    memory = Remembered(scratch / f"answers-{key}.jsonl")
    keys = [digest([ask]) for ask in asks]
    missing = [place for place, key in enumerate(keys) if key not in memory.known]
    if missing:
        requests = [
            Request(
                ask.text,
                ask.image,
                exit if ask.image and exit != own else None,
                ask.max_new_tokens,
                ask.temperature,
                ask.seed,
            )
            for ask in (asks[place] for place in missing)
        ]

        def answered(number: int, response: Response) -> None:
            memory.keep(keys[missing[number]], response.text, len(response.tokens))

        with memory:
            runtime().generate(requests, lambda done, _: progress(len(asks) - len(missing) + done, len(asks)), answered)
    else:
        progress(len(asks), len(asks))
    found = [(str(memory.known[key][0]), int(str(memory.known[key][1]))) for key in keys]
    judgements = RefusalRule().score([ask.judged for ask in asks], [text for text, _ in found])
    return [
        Answer(subject, exit if ask.image else None, ask, text, tokens, judgement)
        for ask, (text, tokens), judgement in zip(asks, found, judgements, strict=True)
    ]
