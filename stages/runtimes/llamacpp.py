"""The runtime that ships: prompts in, responses out, from a GGUF and its mmproj, for any exit, through llama.cpp.

Notable:
- 16 to 32 sequences are decoded together, as their keys and values have room; a sequence that ends is refilled at once,
  and those that begin at once with prompts of one length are prefilled together;
- what comes before the prompt's text (system text and image) is computed once per exit and image and copied to the
  other sequences' KV; a sequence that keeps its image only forgets the last prompt and answer;
- the answer to a request is the same alone and in any batch, see `llamacpp_library`;
- tokenization as transformers': the GGUF's own chat template, rendered by `stages.data.chat`, the pieces before and
  after the image tokenized apart.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import SourceError, StageError
from stages.data.chat import Turn, render
from stages.runtimes.gguf_header import check_language_model, check_pair, read_vision_header
from stages.runtimes.gguf_parts import model_file, read_model
from stages.runtimes.llamacpp_cls import check_cls, cls_order, image_slots
from stages.runtimes.llamacpp_library import ROWS_AT_LEAST, UBATCH, CacheType, Sequences, TextModel
from stages.runtimes.llamacpp_tiles import tile_slots
from stages.runtimes.llamacpp_vision import AS_SHIPPED, VisionEncoder, read_image
from stages.runtimes.runtime import Answered, Progress, Request, Response
from stages.runtimes.sampling import Picker

MMPROJ_NAME: Final = "mmproj.gguf"
_PARALLEL: Final = (16, 32)  # sequences decoded together: these, and as many more as fit into
_KV_BYTES: Final = 1 << 30
_LOGIT_ROWS: Final = 32  # teacher forcing goes in pieces of this many tokens


@dataclass(frozen=True)
class _Job:
    """A request, tokenized. The prefix is what requests about one image at one exit share."""

    index: int
    request: Request
    before: tuple[int, ...]
    after: tuple[int, ...]
    exit: int | None  # None: no image
    prefix: tuple[object, ...]  # equal prefixes have equal keys; () is the empty prefix
    prefix_length: int

    @property
    def prompt_length(self) -> int:
        return self.prefix_length + len(self.after)


@dataclass
class _Slot:
    """One sequence of the context: what its KV holds, and the answer that is growing in it."""

    prefix: tuple[object, ...] | None = ()
    prefix_length: int = 0
    held: int = 0  # tokens in the KV
    job: _Job | None = None
    picker: Picker | None = None  # of that answer's tokens
    next: int = 0  # token that the next step appends
    tokens: list[int] = field(default_factory=list)


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
    ) -> None:
        """Load the model; encoders are loaded when an image needs one.

        Args:
            model: a GGUF file, or the folder of an artifact of type "gguf".
            mmproj: the image encoder; found in the folder when `model` is one.
            parallel: sequences decoded together, at most; default: 16, or up to 32 where memory allows.
            context: tokens that a sequence may hold; default: as many as the requests need.
            chat_template: instead of the GGUF's own.
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
            if mmproj is None and (folder / MMPROJ_NAME).exists():
                mmproj = folder / MMPROJ_NAME
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
        self._sequences: Sequences | None = None
        self._slots: list[_Slot] = []
        self.exits: tuple[int, ...] = tuple(range(1, vision.blocks + 1)) if vision else ()
        self.default_exit: int | None = vision.default_exit if vision else None
        if self._template is None:
            self.close()
            raise SourceError(
                f"{model.name} has no chat template",
                where=str(model),
                way_out="add tokenizer.chat_template to the GGUF, or give a template",
            )

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None, answered: Answered | None = None
    ) -> list[Response]:
        """Answer every request, in the order given. `progress` counts requests.

        Raises:
            StageError: an exit or image that the artifact cannot serve, or a prompt longer than the context.
        """
        jobs = [self._prepare(index, request) for index, request in enumerate(requests)]
        found: dict[int, Response] = {}
        for job, response in self._run(jobs):
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
        self._reserve([job])
        slot = self._slots[0]
        self._start({0: job})
        said = ""
        while slot.job is not None:
            done = self._finish(slot)
            text = self._model.text(slot.tokens)
            # A character may be cut in two by a token border: hold it back until it is whole.
            if text.startswith(said) and (done or not text.endswith("\ufffd")) and len(text) > len(said):
                yield text[len(said) :]
                said = text
            if done:
                self._release(slot)
            else:
                self._advance()

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
        forced = self._model.tokenize(continuation)
        self._reserve([job], extra=len(forced))
        context, slot = self._context(), self._slots[0]
        self._take_prefix(0, job)
        rows = [context.read(0, job.prefix_length, job.after)]
        position = job.prompt_length
        for start in range(0, len(forced) - 1, _LOGIT_ROWS):
            piece = forced[start : min(start + _LOGIT_ROWS, len(forced) - 1)]
            rows.append(context.read(0, position, piece, outputs=len(piece)))
            position += len(piece)
        slot.held = position
        self._release(slot)
        return np.concatenate(rows)[: len(forced)]

    def tokens(self, text: str) -> list[int]:
        return self._model.tokenize(text)

    def close(self) -> None:
        if self._sequences is not None:
            self._sequences.close()
            self._sequences = None
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

    def _prepare(self, index: int, request: Request) -> _Job:
        assert self._template is not None
        turn: Turn = render(self._template, request.prompt, image=request.image is not None)
        if request.image is None:
            tokens = tuple(self._model.tokenize(turn.after, start=True))
            return _Job(index, request, (), tokens, None, (), 0)
        encoder = self._encoder()
        exit = self._known_exit(request.exit)
        before = tuple(self._model.tokenize(turn.before, start=True))
        after = tuple(self._model.tokenize(turn.after))
        key = (exit, hashlib.sha256(read_image(request.image)).hexdigest(), before)
        return _Job(index, request, before, after, exit, key, len(before) + encoder.length(exit, request.image))

    def _reserve(self, jobs: Sequence[_Job], extra: int | None = None) -> None:
        """Make sure that the context has room for these jobs; what it holds is kept when it is large enough."""
        need = max(job.prompt_length + (job.request.max_new_tokens if extra is None else extra) for job in jobs)
        limit = min(self._limit or self._model.trained_context, self._model.trained_context)
        if need > limit:
            raise StageError(
                f"a prompt and its answer take {need} tokens, there is room for {limit}",
                where=str(self._model.path),
                way_out="shorten the prompt, ask for fewer new tokens, or give a longer context",
            )
        count = max(min(self._at_once(need), len(jobs)), self._rows)
        if self._sequences is not None:
            if self._sequences.length >= need and self._sequences.sequences >= count:
                return
            count = max(count, self._sequences.sequences)
            need = max(need, self._sequences.length)
            self._sequences.close()
            self._sequences = None
        length = self._limit if self._limit is not None else need
        self._sequences = Sequences(
            self._model,
            sequences=count,
            length=length,
            outputs=_LOGIT_ROWS,
            ubatch=self._ubatch,
            cache_type=self._cache_type,
        )
        self._slots = [_Slot() for _ in range(count)]

    def _at_once(self, length: int) -> int:
        """How many sequences of so many tokens are decoded together, at most."""
        if self._parallel is not None:
            return max(self._parallel, 1)
        least, most = _PARALLEL
        return min(max(_KV_BYTES // (length * self._model.token_bytes), least), most)

    def _context(self) -> Sequences:
        assert self._sequences is not None
        return self._sequences

    def _run(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Response]]:
        """Answer all jobs; they are sorted so that those with one prefix follow each other and exits change rarely."""
        if not jobs:
            return
        self._reserve(jobs)
        queue = deque(sorted(jobs, key=lambda job: (job.exit or 0, str(job.prefix[1:2]), len(job.after), job.index)))
        slots = self._slots if self._parallel is None else self._slots[: max(self._parallel, 1)]
        try:
            while queue or any(slot.job for slot in slots):
                free = [number for number, slot in enumerate(slots) if slot.job is None]
                self._start({number: queue.popleft() for number in free[: len(queue)]})
                for slot in slots:
                    # A refilled sequence may end at its first token too: it is seen in the next round.
                    if slot.job is not None and self._finish(slot):
                        yield slot.job, self._response(slot)
                        self._release(slot)
                if any(slot.job for slot in slots):
                    self._advance()
        finally:
            for slot in self._slots:
                if slot.job is not None:
                    self._release(slot)

    def _start(self, jobs: Mapping[int, _Job]) -> None:
        """Put jobs into free sequences, by number: prefix, prompt, first token."""
        by_length: dict[int, list[int]] = {}
        for number, job in jobs.items():
            self._take_prefix(number, job)
            by_length.setdefault(len(job.after), []).append(number)
        context = self._context()
        for length, numbers in by_length.items():
            together = max(context.room // max(length, 1), 1)
            for start in range(0, len(numbers), together):
                chosen = numbers[start : start + together]
                begun = [jobs[number] for number in chosen]
                logits = context.read_together(
                    chosen, [job.prefix_length for job in begun], [job.after for job in begun]
                )
                for number, job, row in zip(chosen, begun, logits, strict=True):
                    slot = self._slots[number]
                    slot.job, slot.tokens, slot.picker = job, [], Picker(job.request)
                    slot.held = job.prompt_length
                    slot.next = slot.picker.pick(row)

    def _take_prefix(self, number: int, job: _Job) -> None:
        """Make the KV of a free sequence hold exactly the job's prefix, at the least cost."""
        context, slot = self._context(), self._slots[number]
        if slot.prefix == job.prefix:
            context.trim(number, job.prefix_length)
            slot.held = job.prefix_length
            return
        source = next((i for i, other in enumerate(self._slots) if other.prefix == job.prefix), None)
        slot.prefix = None  # until it is whole
        if source is not None and job.prefix:
            context.copy(source, number)
            context.trim(number, job.prefix_length)
        else:
            context.trim(number, 0)
            if job.before:
                context.read(number, 0, job.before, outputs=0)
            if job.exit is not None:
                assert job.request.image is not None
                at = len(job.before)
                for piece in self._encoder().pieces(job.exit, job.request.image):
                    if isinstance(piece, np.ndarray):
                        context.look(number, at, piece)
                    elif piece:
                        context.read(number, at, piece, outputs=0)
                    at += len(piece)
        slot.prefix, slot.prefix_length, slot.held = job.prefix, job.prefix_length, job.prefix_length

    def _advance(self) -> None:
        """One decoding step: every sequence up to the last busy one gets a token; what idle ones get is forgotten."""
        context = self._context()
        busy = [number for number, slot in enumerate(self._slots) if slot.job is not None]
        rows = self._slots[: max(busy[-1] + 1, self._rows)]
        for number, slot in enumerate(rows):
            if slot.job is None:
                slot.held = slot.prefix_length if slot.prefix is not None else 0
                context.trim(number, slot.held)

        def pick(row: int, logits: NDArray[np.float32]) -> int:
            picker = rows[row].picker
            return picker.pick(logits) if picker is not None else 0

        picked = context.step([slot.next for slot in rows], [slot.held for slot in rows], pick)
        for number, (slot, token) in enumerate(zip(rows, picked, strict=True)):
            if slot.job is None:
                context.trim(number, slot.held)
                continue
            slot.tokens.append(slot.next)
            slot.held += 1
            slot.next = token

    def _finish(self, slot: _Slot) -> bool:
        """Whether the answer in this sequence is complete."""
        assert slot.job is not None
        if self._model.ends(slot.next) or slot.job.request.max_new_tokens <= len(slot.tokens):
            return True
        if slot.job.request.max_new_tokens == len(slot.tokens) + 1:
            slot.tokens.append(slot.next)  # the last token need not go through the model
            return True
        return False

    def _response(self, slot: _Slot) -> Response:
        assert slot.job is not None
        full = len(slot.tokens) >= slot.job.request.max_new_tokens
        return Response(
            text=self._model.text(slot.tokens), tokens=tuple(slot.tokens), finish="length" if full else "stop"
        )

    def _release(self, slot: _Slot) -> None:
        slot.job, slot.tokens, slot.picker, slot.next = None, [], None, 0
