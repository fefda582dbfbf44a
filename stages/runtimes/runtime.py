"""Runtime: what answers prompts from an artifact, for any exit."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import StageError

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Request:
    """One prompt. `image` None: text only, and `exit` is not used."""

    prompt: str
    image: Path | None = None
    exit: int | None = None  # None: where the artifact's own files leave the encoder
    max_new_tokens: int = 32
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of what is drawn at a temperature


@dataclass(frozen=True)
class Response:
    """What came back. `tokens` excludes the end-of-turn token."""

    text: str
    tokens: tuple[int, ...]
    finish: Literal["stop", "length"]


def too_long(request: Request, need: int, limit: int, where: Path) -> StageError:
    """For a prompt that with its answer takes more tokens than the model has room for."""
    return StageError(
        f"a prompt and its answer take {need} tokens, there is room for {limit}",
        where=str(where),
        why=f"it begins {textwrap.shorten(request.prompt, 60, placeholder=' ...')!r}",
        way_out="leave the prompt out or shorten it, ask for fewer new tokens, or give a longer context",
    )


Answered = Callable[[int, Response], None]
"""The place of a request and its answer, as soon as it is there: in any order, each once."""


class Runtime(Protocol):
    """Greedy unless asked; the answer to a request does not depend on what it is batched with."""

    name: str  # "llamacpp", "transformers"
    exits: tuple[int, ...]  # 1..L that the artifact contains; empty for a text-only model
    default_exit: int | None

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None, answered: Answered | None = None
    ) -> list[Response]:
        """Answer every request, in the order given.

        Raises:
            StageError: an exit or image that the artifact cannot serve.
        """
        ...

    def image_embeddings(self, exit: int | None, image: Path) -> NDArray[np.float32]:
        """(image tokens, text width): what the language model receives for this image at this exit.

        None: where the artifact's own files leave the encoder, with nothing put in their place.
        """
        ...

    def image_slots(self, image: Path) -> Sequence[int] | None:
        """Which row of transformers' embeddings each row of `image_embeddings` should be, -1 where it is none.

        None: row i is row i. A runtime that loses image tokens says so here.
        """
        ...

    def logits(self, request: Request, continuation: str) -> NDArray[np.float32]:
        """(continuation tokens, vocabulary): next-token logits at each token of `continuation` (teacher forcing)."""
        ...

    def tokens(self, text: str) -> Sequence[int]:
        """Token ids of a text, nothing added: those that `logits` forces."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
