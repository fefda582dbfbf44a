"""Requests answered in the sequences of one llama.cpp context: begun, decoded together, refilled as they end.

- A sequence that ends is refilled at once, and those that begin at once with prompts of one length are prefilled
  together.
- What comes before the prompt's text (system text and image) is computed once per exit and image and copied to the
  other sequences' KV; a sequence that keeps its image only forgets the last prompt and answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stages.runtimes.llamacpp_library import Sequences, TextModel
from stages.runtimes.llamacpp_vision import VisionEncoder
from stages.runtimes.runtime import Request, Response
from stages.runtimes.sampling import Picker


@dataclass(frozen=True)
class Job:
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
class Slot:
    """One sequence of the context: what its KV holds, and the answer that is growing in it."""

    prefix: tuple[object, ...] | None = ()
    prefix_length: int = 0
    held: int = 0  # tokens in the KV
    job: Job | None = None
    picker: Picker | None = None  # of that answer's tokens
    next: int = 0  # token that the next step appends
    tokens: list[int] = field(default_factory=list)


class Batch:
    """The sequences of a context and what is in them.

    Args:
        encoder: of the images that requests come with.
        rows: sequences decoded together, at least.
    """

    def __init__(self, model: TextModel, context: Sequences, encoder: VisionEncoder | None, *, rows: int) -> None:
        self.context = context
        self.slots = [Slot() for _ in range(context.sequences)]
        self._model, self._encoder, self._rows = model, encoder, rows

    def run(self, jobs: Sequence[Job], at_most: int | None = None) -> Iterator[tuple[Job, Response]]:
        """Answer all jobs; they are sorted so that those with one prefix follow each other and exits change rarely."""
        queue = deque(sorted(jobs, key=lambda job: (job.exit or 0, str(job.prefix[1:2]), len(job.after), job.index)))
        slots = self.slots[:at_most]
        try:
            while queue or any(slot.job for slot in slots):
                free = [number for number, slot in enumerate(slots) if slot.job is None]
                self.start({number: queue.popleft() for number in free[: len(queue)]})
                for slot in slots:
                    # A refilled sequence may end at its first token too: it is seen in the next round.
                    if slot.job is not None and self.finish(slot):
                        yield slot.job, self._response(slot)
                        self.release(slot)
                if any(slot.job for slot in slots):
                    self.advance()
        finally:
            for slot in self.slots:
                if slot.job is not None:
                    self.release(slot)

    def start(self, jobs: Mapping[int, Job]) -> None:
        """Put jobs into free sequences, by number: prefix, prompt, first token."""
        by_length: dict[int, list[int]] = {}
        for number, job in jobs.items():
            self.take_prefix(number, job)
            by_length.setdefault(len(job.after), []).append(number)
        context = self.context
        for length, numbers in by_length.items():
            together = max(context.room // max(length, 1), 1)
            for start in range(0, len(numbers), together):
                chosen = numbers[start : start + together]
                begun = [jobs[number] for number in chosen]
                logits = context.read_together(
                    chosen, [job.prefix_length for job in begun], [job.after for job in begun]
                )
                for number, job, row in zip(chosen, begun, logits, strict=True):
                    slot = self.slots[number]
                    slot.job, slot.tokens, slot.picker = job, [], Picker(job.request)
                    slot.held = job.prompt_length
                    slot.next = slot.picker.pick(row)

    def take_prefix(self, number: int, job: Job) -> None:
        """Make the KV of a free sequence hold exactly the job's prefix, at the least cost."""
        context, slot = self.context, self.slots[number]
        if slot.prefix == job.prefix:
            context.trim(number, job.prefix_length)
            slot.held = job.prefix_length
            return
        source = next((i for i, other in enumerate(self.slots) if other.prefix == job.prefix), None)
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
                assert self._encoder is not None
                for piece in self._encoder.pieces(job.exit, job.request.image):
                    if isinstance(piece, np.ndarray):
                        context.look(number, at, piece)
                    elif piece:
                        context.read(number, at, piece, outputs=0)
                    at += len(piece)
        slot.prefix, slot.prefix_length, slot.held = job.prefix, job.prefix_length, job.prefix_length

    def advance(self) -> None:
        """One decoding step: every sequence up to the last busy one gets a token; what idle ones get is forgotten."""
        context = self.context
        busy = [number for number, slot in enumerate(self.slots) if slot.job is not None]
        rows = self.slots[: max(busy[-1] + 1, self._rows)]
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

    def finish(self, slot: Slot) -> bool:
        """Whether the answer in this sequence is complete."""
        assert slot.job is not None
        if self._model.ends(slot.next) or slot.job.request.max_new_tokens <= len(slot.tokens):
            return True
        if slot.job.request.max_new_tokens == len(slot.tokens) + 1:
            slot.tokens.append(slot.next)  # the last token need not go through the model
            return True
        return False

    def _response(self, slot: Slot) -> Response:
        assert slot.job is not None
        full = len(slot.tokens) >= slot.job.request.max_new_tokens
        return Response(
            text=self._model.text(slot.tokens), tokens=tuple(slot.tokens), finish="length" if full else "stop"
        )

    def release(self, slot: Slot) -> None:
        slot.job, slot.tokens, slot.picker, slot.next = None, [], None, 0
