"""One question to a model, in the runtime that it is made for, within the memory that it may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.commands.model import FoundModel, Room
    from stages.runtimes.runtime import Runtime


@dataclass(frozen=True)
class Chat:
    """An open runtime and what every question of this session shares."""

    runtime: Runtime
    image: Path | None
    exit: int | None
    max_new_tokens: int

    def about(self, image: Path) -> Chat:
        """The same conversation about another picture.

        Raises:
            RecipeError: there is none.
        """
        _refuse_missing(image)
        return replace(self, image=image)

    def answer(self, prompt: str) -> Iterator[str]:
        """The answer, in pieces as they come where the runtime can do that."""
        from stages.runtimes.llamacpp import LlamaCppRuntime
        from stages.runtimes.runtime import Request

        request = Request(prompt=prompt, image=self.image, exit=self.exit, max_new_tokens=self.max_new_tokens)
        if isinstance(self.runtime, LlamaCppRuntime):
            yield from self.runtime.stream(request)
        else:
            yield self.runtime.generate([request])[0].text


@contextmanager
def open_chat(
    found: FoundModel, image: Path | None, exit: int | None, max_new_tokens: int, room: Room | None = None
) -> Iterator[Chat]:
    """Load the model; `room`: the context that it may take, of a GGUF.

    Raises:
        RecipeError: not a model, no such exit, or no such image. SourceError, StageError: the model is damaged.
    """
    _refuse_missing(image)
    if exit is not None and image is None:
        raise RecipeError(
            "--exit has no meaning without --image",
            why="an exit is where the image encoder is left",
            way_out="add --image FILE",
        )
    with _runtime(found, room) as runtime:
        if exit is not None and exit not in runtime.exits:
            exits = runtime.exits
            raise RecipeError(
                f"there is no exit {exit} in this model",
                why="it sees no images" if not exits else f"its exits are {exits[0]} to {exits[-1]}",
                way_out=f"choose one of them; its default is {runtime.default_exit}" if exits else "leave --exit out",
            )
        yield Chat(runtime, image, exit, max_new_tokens)


def _refuse_missing(image: Path | None) -> None:
    if image is not None and not image.is_file():
        raise RecipeError(f"there is no image {image}", way_out="give the path of a PNG or JPEG file")


def _runtime(found: FoundModel, room: Room | None) -> Runtime:
    if found.model is not None:
        from stages.runtimes.llamacpp import LlamaCppRuntime
        from stages.runtimes.rehearsal import DEFAULT_UBATCH

        if room is None:
            return LlamaCppRuntime(found.model, found.mmproj, parallel=1, ubatch=DEFAULT_UBATCH, rows=1, today=True)
        # One sequence and no more tokens at once than the memory plan counts with.
        return LlamaCppRuntime(
            found.model,
            found.mmproj,
            parallel=1,
            context=room.context,
            ubatch=DEFAULT_UBATCH,
            rows=1,
            cache_type=room.kv_cache,
            today=True,
        )
    from stages.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(found.folder)
