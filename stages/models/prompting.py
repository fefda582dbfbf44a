"""What a prompt and an image become in front of the language model, shared by training and the transformers runtime.

Notable: the chat template's text is tokenized as a whole, with the image's token in it, and then cut there: a
SentencePiece tokenizer would put a space before text that stands alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, cast

from artifacts.errors import SourceError
from stages.data.chat import Turn, answer_place, answer_tokens, render
from stages.models.crossing import Placed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.models.family import Family, Geometry


class Prompting:
    """Tokens of single-turn prompts, up to the point where the model answers.

    Args:
        embed: token ids (n,) to embeddings (n, width).

    Raises:
        SourceError: the checkpoint has no chat template.
    """

    def __init__(self, family: Family, tokenizer: PreTrainedTokenizerBase, embed: torch.nn.Module):
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise SourceError(
                "the checkpoint has no chat template",
                why="without it nobody knows what the model was tuned to read",
                way_out="put a chat_template.jinja into the folder",
            )
        self._family = family
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = {
            name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        self._embed = embed
        self._bos = cast("int | None", tokenizer.bos_token_id)
        self._starts = self._bos is not None and tokenizer("").input_ids[:1] == [self._bos]

    def text(self, prompt: str) -> list[int]:
        """A prompt without an image."""
        return self._started(self.ids(self._turn(prompt, image=False).after))

    def around_image(self, prompt: str) -> tuple[list[int], list[int]]:
        """A prompt with an image: what stands before the image, and what stands behind it.

        Raises:
            SourceError: the tokenizer has no token for the image, or the chat template no place for it.
        """
        slot = self._family.image_slot
        turn = self._turn(prompt, image=True)
        ids = self.ids(turn.before + slot + turn.after)
        token = cast("int | None", self._tokenizer.convert_tokens_to_ids(slot))
        if token is None or ids.count(token) != 1:
            raise SourceError(
                f"the tokenizer does not read {slot} as one token of its own",
                why=f"models of the family {self._family.name} have one, which says where the image goes",
                way_out="take the tokenizer files that came with the model",
            )
        place = ids.index(token)
        return self._started(ids[:place]), ids[place + 1 :]

    def _turn(self, prompt: str, *, image: bool) -> Turn:
        with _explained():
            return render(
                self._template,
                prompt,
                image=image,
                slot=self._family.image_slot,
                special_tokens=self._special_tokens,
            )

    @cached_property
    def _answered(self) -> tuple[str, str]:
        with _explained():
            return answer_place(self._template, special_tokens=self._special_tokens, slot=self._family.image_slot)

    def image(self, tokens: torch.Tensor, geometry: Geometry) -> Placed:
        """An image's tokens (tokens, width) as they reach the language model, the texts around them embedded."""
        import torch

        texts = [self.embedded(self.ids(text)) for text in self._family.surround(geometry)]
        tokens = tokens.to(texts[0])
        woven = [texts[0]]
        if len(texts) > 1:
            for part, text in zip(tokens.chunk(len(texts) - 1), texts[1:], strict=True):
                woven += [part, text]
        return Placed(torch.cat(woven), self._family.beside(tokens, geometry))

    def answer(self, text: str) -> list[int]:
        """An answer as it stands behind a prompt, without an end."""
        return answer_tokens(self._answered, text, self.ids)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return cast("list[int]", self._tokenizer(text, add_special_tokens=False).input_ids)

    def embedded(self, ids: Sequence[int]) -> torch.Tensor:
        """(tokens, width); no gradient."""
        import torch

        weight = cast("torch.Tensor", self._embed.weight)
        with torch.no_grad():
            return cast("torch.Tensor", self._embed(torch.tensor(ids, dtype=torch.long, device=weight.device)))

    def _started(self, ids: list[int]) -> list[int]:
        """With BOS, if the tokenizer adds one and the template did not."""
        if self._starts and ids[:1] != [self._bos]:
            return [cast("int", self._bos), *ids]
        return ids


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SourceError(
            "the checkpoint's chat template does not fit the model",
            why=str(error),
            way_out="put the chat_template.jinja that came with the model into the folder",
        ) from error
