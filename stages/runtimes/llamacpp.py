"""The runtime that ships: prompts in, responses out, from a GGUF and its mmproj, for any exit, through llama.cpp.

Notable:
- 16 to 32 sequences are decoded together, as their keys and values have room, see `llamacpp_batch`;
- the answer to a request is the same alone and in any batch, see `llamacpp_library`;
- tokenization as transformers': the GGUF's own chat template, rendered by `stages.data.chat`, the pieces before and
  after the image tokenized apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import SourceError, StageError
from stages.data.chat import Turn, answer_place, answer_tokens, render
from stages.runtimes.gguf_header import check_language_model, check_pair, read_vision_header
from stages.runtimes.gguf_parts import mmproj_file, model_file, read_model
from stages.runtimes.llamacpp_batch import Batch, Job
from stages.runtimes.llamacpp_cls import check_cls, cls_order, image_slots
from stages.runtimes.llamacpp_library import ROWS_AT_LEAST, UBATCH, CacheType, Sequences, TextModel
from stages.runtimes.llamacpp_tiles import tile_slots
from stages.runtimes.llamacpp_vision import AS_SHIPPED, VisionEncoder, read_image
from stages.runtimes.runtime import Answered, Progress, Request, Response, too_long

_PARALLEL: Final = (16, 32)  # sequences decoded together: these, and as many more as fit into
_KV_BYTES: Final = 1 << 30
_LOGIT_ROWS: Final = 32  # teacher forcing goes in pieces of this many tokens


class LlamaCppRuntime:
    """Answers from `model.gguf` and, for images, `mmproj.gguf`; greedy."""

    name = "llamacpp"

    def __init__(
        self,
        model: Path,
        mmproj: Path | None = None,
        *,
        parallel: int | None = None,
        context: int | None = None,
        chat_template: str | None = None,
        as_shipped: bool = False,
        ubatch: int = UBATCH,
        rows: int = ROWS_AT_LEAST,
        cache_type: CacheType = "F16",
        today: bool = False,
    ) -> None:
        """Load the model; encoders are loaded when an image needs one.

        Args:
            model: a GGUF file, or the folder of an artifact of type "gguf".
            mmproj: the image encoder; found in the folder when `model` is one.
            parallel: sequences decoded together, at most; default: 16, or up to 32 where memory allows.
            context: tokens that a sequence may hold; default: as many as the requests need.
            chat_template: instead of the GGUF's own.
            today: templates that print a date print today's, for who talks to the model; else always the same.
            as_shipped: take a CLIP tower's position table that llama.cpp will misread, if its file makes no promise: to
                measure what its users get.
            ubatch: tokens computed at once, at most; fewer take less memory, and may round otherwise in a batch.
            rows: sequences decoded together, at least; one alone takes half the memory of two, and may round otherwise.
            cache_type: of keys and values.

        Raises:
            SourceError: a file is missing or damaged.
            StageError: the files do not belong together, llama.cpp refuses them, or it is one for which the image
                encoder's position table was not made.
        """
        if model.is_dir():
            folder, model = model, model_file(model)
            mmproj = mmproj or mmproj_file(folder)
        header = read_model(model)
        check_language_model(header)
        vision = read_vision_header(mmproj) if mmproj is not None else None
        if vision is not None:
            check_pair(header, vision)
            if vision.cls_order is not None or not as_shipped:
                check_cls(vision)
        self._model = TextModel(model)
        self._vision = VisionEncoder(self._model, vision) if vision is not None else None
        self._template = chat_template or self._model.chat_template
        self._parallel = parallel
        self._limit, self._cache_type = context, cache_type
        self._ubatch, self._rows = ubatch, rows
        self._today = today
        self._batch: Batch | None = None
        self.exits: tuple[int, ...] = tuple(range(1, vision.blocks + 1)) if vision else ()
        self.default_exit: int | None = vision.default_exit if vision else None
        if self._template is None:
            self.close()
            raise _no_template(model)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None, answered: Answered | None = None
    ) -> list[Response]:
        """Answer every request, in the order given. `progress` counts requests.

        Raises:
            StageError: an exit or image that the artifact cannot serve, or a prompt longer than the context.
        """
        jobs = [self._prepare(index, request) for index, request in enumerate(requests)]
        if not jobs:
            return []
        found: dict[int, Response] = {}
        at_most = None if self._parallel is None else max(self._parallel, 1)
        for job, response in self._reserve(jobs).run(jobs, at_most):
            found[job.index] = response
            if answered is not None:
                answered(job.index, response)
            if progress is not None:
                progress(len(found), len(jobs))
        return [found[index] for index in range(len(jobs))]

    def stream(self, request: Request) -> Iterator[str]:
        """The answer to one request, piece by piece as it is generated; the pieces joined are `generate`'s text.

        Raises:
            StageError: as `generate`.
        """
        job = self._prepare(0, request)
        batch = self._reserve([job])
        slot = batch.slots[0]
        batch.start({0: job})
        said = ""
        while slot.job is not None:
            done = batch.finish(slot)
            text = self._model.text(slot.tokens)
            # A character may be cut in two by a token border: hold it back until it is whole.
            if text.startswith(said) and (done or not text.endswith("\ufffd")) and len(text) > len(said):
                yield text[len(said) :]
                said = text
            if done:
                batch.release(slot)
            else:
                batch.advance()

    def image_embeddings(self, exit: int | None, image: Path) -> NDArray[np.float32]:
        """(image tokens, text width): what the language model receives for this image at this exit.

        None: where the mmproj file itself leaves the encoder; llama.cpp then reads that file, and no other made of it.
        """
        return self._encoder().embeddings(self._known_exit(exit), image)

    def image_slots(self, image: Path) -> tuple[int, ...] | None:
        vision = self._encoder().vision
        if vision.projector == "mlp" and vision.tiles:
            return tile_slots(vision, image)
        return image_slots(vision.cls_order or cls_order(), vision.pass_tokens) if vision.has_cls else None

    def logits(self, request: Request, continuation: str) -> NDArray[np.float32]:
        """(continuation tokens, vocabulary): next-token logits at each token of `continuation` (teacher forcing).

        Row i predicts token i of the continuation: row 0 stands after the prompt's last token.
        """
        job = self._prepare(0, request)
        forced = self.tokens(continuation)
        batch = self._reserve([job], extra=len(forced))
        context, slot = batch.context, batch.slots[0]
        batch.take_prefix(0, job)
        rows = [context.read(0, job.prefix_length, job.after)]
        position = job.prompt_length
        for start in range(0, len(forced) - 1, _LOGIT_ROWS):
            piece = forced[start : min(start + _LOGIT_ROWS, len(forced) - 1)]
            rows.append(context.read(0, position, piece, outputs=len(piece)))
            position += len(piece)
        slot.held = position
        batch.release(slot)
        return np.concatenate(rows)[: len(forced)]

    def load_encoder(self) -> None:
        """Load the image encoder that ships, if there is one; else the first image does that.

        Raises:
            StageError: llama.cpp does not load it.
        """
        if self._vision is not None:
            self._vision.load(AS_SHIPPED)

    def tokens(self, text: str) -> list[int]:
        return answer_tokens(self._answered, text, self._model.tokenize)

    def close(self) -> None:
        if self._batch is not None:
            self._batch.context.close()
            self._batch = None
        if self._vision is not None:
            self._vision.close()
        self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encoder(self) -> VisionEncoder:
        if self._vision is None:
            raise StageError(
                "this model does not see images",
                where=str(self._model.path),
                why="there is no mmproj.gguf beside it",
                way_out="leave the image out, or give the mmproj file that belongs to the model",
            )
        return self._vision

    def _known_exit(self, exit: int | None) -> int:
        """AS_SHIPPED or an exit that there is."""
        if exit is None:
            return AS_SHIPPED
        if exit not in self.exits:
            raise StageError(
                f"there is no exit {exit} in this model",
                where=str(self._model.path),
                why=f"its image encoder has {len(self.exits)} blocks",
                way_out=f"choose an exit between 1 and {len(self.exits)}",
            )
        return exit

    def _prepare(self, index: int, request: Request) -> Job:
        turn = self._turn(request)
        if request.image is None:
            tokens = tuple(self._model.tokenize(turn.after, start=True))
            return Job(index, request, (), tokens, None, (), 0)
        encoder = self._encoder()
        exit = self._known_exit(request.exit)
        before = tuple(self._model.tokenize(turn.before, start=True))
        after = tuple(self._model.tokenize(turn.after))
        key = (exit, hashlib.sha256(read_image(request.image)).hexdigest(), before)
        return Job(index, request, before, after, exit, key, len(before) + encoder.length(exit, request.image))

    def _turn(self, request: Request) -> Turn:
        assert self._template is not None
        with _explained(self._model.path):
            return render(self._template, request.prompt, image=request.image is not None, today=self._today)

    @cached_property
    def _answered(self) -> tuple[str, str]:
        assert self._template is not None
        with _explained(self._model.path):
            return answer_place(self._template)

    def _reserve(self, jobs: Sequence[Job], extra: int | None = None) -> Batch:
        """Sequences with room for these jobs; those that there are, with what they hold, when they have it."""
        need = max(job.prompt_length + (job.request.max_new_tokens if extra is None else extra) for job in jobs)
        limit = min(self._limit or self._model.trained_context, self._model.trained_context)
        if need > limit:
            longest = max(jobs, key=lambda job: job.prompt_length + job.request.max_new_tokens)
            raise too_long(longest.request, need, limit, self._model.path)
        count = max(min(self._at_once(need), len(jobs)), self._rows)
        if self._batch is not None:
            there = self._batch.context
            if there.length >= need and there.sequences >= count:
                return self._batch
            count, need = max(count, there.sequences), max(need, there.length)
            self._batch = None
            there.close()
        length = self._limit if self._limit is not None else need
        context = Sequences(
            self._model,
            sequences=count,
            length=length,
            outputs=_LOGIT_ROWS,
            ubatch=self._ubatch,
            cache_type=self._cache_type,
        )
        self._batch = Batch(self._model, context, self._vision, rows=self._rows)
        return self._batch

    def _at_once(self, length: int) -> int:
        """How many sequences of so many tokens are decoded together, at most."""
        if self._parallel is not None:
            return max(self._parallel, 1)
        least, most = _PARALLEL
        return min(max(_KV_BYTES // (length * self._model.token_bytes), least), most)


def check_template(folder: Path) -> None:
    """Whether the chat template in a folder's GGUF can be asked, with an image if there is an encoder; loads nothing.

    Raises:
        SourceError: there is none, or it does not fit.
    """
    model = model_file(folder)
    template = read_model(model).fields.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise _no_template(model)
    with _explained(model):
        render(template, "Hi", image=mmproj_file(folder) is not None)


def _no_template(model: Path) -> SourceError:
    return SourceError(
        f"{model.name} has no chat template",
        where=str(model),
        why="without it nobody knows what the model was tuned to read",
        way_out="make the GGUF anew of a checkpoint that has one: add tokenizer.chat_template",
    )


@contextmanager
def _explained(model: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SourceError(
            "the chat template in the GGUF does not fit the model",
            where=str(model),
            why=str(error),
            way_out="make the GGUF anew of a checkpoint with the chat template that came with the model",
        ) from error
