"""Runtime `transformers`: the checkpoint itself answers, at any exit.

Notable: the encoder runs once an image (`ExitFeatures`); what stands before the prompt's text (system text and image)
is computed once per exit and image; answers are the same alone and in any batch (`stages.models.decoding`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import StageError
from stages.models import checkpoint
from stages.models.decoding import Decoder, Pick, Prefix, greedy
from stages.models.family import Geometry, family_of
from stages.models.features import ExitFeatures
from stages.models.prompting import Prompting
from stages.runtimes.runtime import Answered, Progress, Request, Response, too_long
from stages.runtimes.sampling import Picker

if TYPE_CHECKING:
    import torch

_BATCH: Final = 96  # rows decoded together, at most: matrix products are no faster with more
_CACHE_BYTES: Final = 1 << 30  # keys and values of rows that are decoded together
_PREFIX_BYTES: Final = 256 << 20  # kept keys and values of prefixes
_ROWS: Final = 4  # rows decoded together, at least


def _pick(requests: Sequence[Request]) -> Pick:
    """What picks the tokens of these requests' answers."""
    if all(request.temperature == 0 for request in requests):
        return greedy
    pickers = [Picker(request) for request in requests]

    def pick(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        import torch

        host = logits.float().cpu().numpy()
        tokens = [pickers[request].pick(row) for request, row in zip(rows, host, strict=True)]
        return torch.tensor(tokens, device=logits.device)

    return pick


class TransformersRuntime:
    """Loads a checkpoint folder.

    Args:
        folder: the checkpoint.
        dtype: of the computation; float32 is the reference that fidelity is measured against.
        batch: rows decoded together, at most. chat_template: instead of the checkpoint's own.

    Raises:
        SourceError: the checkpoint cannot be loaded, or has no chat template.
    """

    name = "transformers"

    def __init__(
        self,
        folder: Path,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch: int = _BATCH,
        chat_template: str | None = None,
    ):
        config = checkpoint.read_config(folder)
        self._folder = folder
        self._family = family_of(config, where=str(folder))
        vision = self._family.spec(config).vision
        self.exits: tuple[int, ...] = tuple(range(1, vision.layers + 1)) if vision else ()
        self.default_exit: int | None = vision.default_exit if vision else None
        self._model = self._family.load(folder, dtype=dtype)
        self._tokenizer = checkpoint.load_tokenizer(folder)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        embed = self._model.get_input_embeddings()
        self._prompting = Prompting(self._family, self._tokenizer, embed)
        self._decoder = Decoder(
            self._family.trunk(self._model), self._family.head(self._model), embed, self._stop_tokens()
        )
        self._features = ExitFeatures(folder, self._model) if vision else None
        self._prefixes: OrderedDict[tuple[int, Path, str], Prefix] = OrderedDict()
        self._batch = batch

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None, answered: Answered | None = None
    ) -> list[Response]:
        self._encode([request.image for request in requests if request.image is not None])
        prepared = [self._prepare(request) for request in requests]
        answers: list[Response | None] = [None] * len(requests)
        for chosen in self._batches(requests, prepared):
            prefixes = [self._prefix(requests[i], prepared[i][1]) for i in chosen]
            for i, prefix in zip(chosen, prefixes, strict=True):
                self._check_room(requests[i], len(prepared[i][0]) + (prefix.length if prefix is not None else 0))
            batch = self._decoder.generate(
                [self._prompting.embedded(prepared[i][0]) for i in chosen],
                [requests[i].max_new_tokens for i in chosen],
                prefixes,
                _pick([requests[i] for i in chosen]),
            )
            for i, answer in zip(chosen, batch, strict=True):
                text = cast("str", self._tokenizer.decode(answer.tokens, skip_special_tokens=True))
                response = Response(text, answer.tokens, "stop" if answer.stopped else "length")
                answers[i] = response
                if answered is not None:
                    answered(i, response)
            if progress is not None:
                progress(sum(answer is not None for answer in answers), len(requests))
        return [answer for answer in answers if answer is not None]

    def _batches(
        self, requests: Sequence[Request], prepared: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[list[int]]:
        """Numbers of the requests that are decoded together: equal lengths, so that little is padded, and of as many
        exits as there is room for their prefixes."""
        exits = [self._exit(request) for request in requests]
        seeing = next((i for i, request in enumerate(requests) if request.image is not None), None)
        prefix = self._prefix(requests[seeing], prepared[seeing][1]) if seeing is not None else None
        images = len({request.image for request in requests})
        together = max(1, _PREFIX_BYTES // (prefix.nbytes * images)) if prefix is not None else 1
        ranks = {exit: place // together for place, exit in enumerate(sorted(set(exits)))}
        order = sorted(
            range(len(requests)),
            key=lambda i: (ranks[exits[i]], -requests[i].max_new_tokens, len(prepared[i][0]), exits[i], i),
        )
        needed = max(
            (len(after) + request.max_new_tokens for request, (after, _) in zip(requests, prepared, strict=True)),
            default=0,
        )
        row = self._decoder.token_bytes * (needed + (prefix.length if prefix is not None else 0))
        rows = min(self._batch, max(_CACHE_BYTES // max(row, 1) // _ROWS, 1) * _ROWS)
        for start in range(0, len(order), rows):
            yield order[start : start + rows]

    def image_embeddings(self, exit: int | None, image: Path) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            tokens, _ = self._image_tokens(self._checked(self.default_exit if exit is None else exit), image)
        array: NDArray[np.float32] = tokens.float().cpu().numpy()
        return array

    def image_slots(self, image: Path) -> None:
        """Nothing is lost here: this runtime is what others are compared with."""

    def logits(self, request: Request, continuation: str) -> NDArray[np.float32]:
        """Row i predicts token i of the continuation: row 0 stands after the prompt's last token."""
        after, before = self._prepare(request)
        forced = self._prompting.answer(continuation)
        if not forced:
            return np.zeros((0, self._model.get_output_embeddings().weight.shape[0]), dtype=np.float32)
        prompt = self._prompting.embedded([*after, *forced[:-1]])
        logits = self._decoder.logits(prompt, last=len(forced), prefix=self._prefix(request, before))
        array: NDArray[np.float32] = logits.float().cpu().numpy()
        return array

    def tokens(self, text: str) -> list[int]:
        return self._prompting.answer(text)

    def close(self) -> None:
        """Let go of what was kept between requests; the model goes with the object."""
        self._prefixes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, request: Request) -> tuple[list[int], list[int]]:
        """Tokens after the image, and before it; a text-only prompt is all after."""
        if request.image is None:
            return self._prompting.text(request.prompt), []
        before, after = self._prompting.around_image(request.prompt)
        return after, before

    def _check_room(self, request: Request, length: int) -> None:
        """Refuse a prompt of so many tokens that its answer ends beyond the positions that the model has."""
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(room, int) and length + request.max_new_tokens > room:
            raise too_long(request, length + request.max_new_tokens, room, self._folder)

    def _prefix(self, request: Request, before: Sequence[int]) -> Prefix | None:
        """Keys and values of `before` and the image at the request's exit, computed once."""
        import torch

        if request.image is None:
            return None
        exit = self._exit(request)
        key = (exit, request.image, repr(before))
        found = self._prefixes.pop(key, None)
        if found is None:
            with torch.inference_mode():
                tokens, geometry = self._image_tokens(exit, request.image)
                image = self._prompting.image(tokens, geometry)
            found = self._decoder.prefix(self._prompting.embedded(before), image)
        self._prefixes[key] = found
        while len(self._prefixes) > 1 and sum(prefix.nbytes for prefix in self._prefixes.values()) > _PREFIX_BYTES:
            self._prefixes.popitem(last=False)
        return found

    def _image_tokens(self, exit: int, image: Path) -> tuple[torch.Tensor, Geometry]:
        import torch

        if self._features is None:
            raise StageError("the checkpoint has no image encoder", where=str(self._folder))
        found = self._features.get([image])
        features = torch.from_numpy(np.array(found[0, exit]))
        return self._family.project(self._model, features, found.geometry(0)), found.geometry(0)

    def _encode(self, images: Sequence[Path]) -> None:
        if images and self._features is not None:
            self._features.get(list(dict.fromkeys(images)))

    def _exit(self, request: Request) -> int:
        """The exit a request asks for; 0 for a text-only one."""
        if request.image is None:
            return 0
        return self._checked(self.default_exit if request.exit is None else request.exit)

    def _checked(self, exit: int | None) -> int:
        if exit is None or exit not in self.exits:
            raise StageError(
                f"the checkpoint has no exit {exit}",
                where=str(self._folder),
                why=f"its exits are 1..{len(self.exits)}" if self.exits else "it has no image encoder",
            )
        return exit

    def _stop_tokens(self) -> set[int]:
        found = self._model.generation_config.eos_token_id
        stop = set(found) if isinstance(found, list) else {found}
        return {int(token) for token in (*stop, self._tokenizer.eos_token_id) if token is not None}
