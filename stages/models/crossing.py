"""Images that a language model attends to from some of its blocks (cross-attention), instead of reading their tokens.

Notable: the masks are those that transformers' mllama makes of its processor's `cross_attention_mask`: text before the
image sees every tile, padding too, and goes around the blocks' MLPs; text behind it sees the tiles that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Beside:
    """One image beside a prompt: `tokens` (n, width), of which text behind the image sees the first `seen`."""

    tokens: torch.Tensor
    seen: int


@dataclass(frozen=True)
class Placed:
    """An image in a prompt: `embeddings` (length, width) in the sequence, and what stands beside it, if anything."""

    embeddings: torch.Tensor
    beside: Beside | None = None


@dataclass(frozen=True)
class Crossing:
    """The images beside several prompts, one each."""

    tokens: torch.Tensor  # (rows, n, width)
    seen: torch.Tensor  # (rows,), int64
    start: int  # position from which the text stands behind the image

    @classmethod
    def of(cls, images: Sequence[Placed], start: int) -> Self | None:
        """None where nothing stands beside."""
        import torch

        beside = [image.beside for image in images if image.beside is not None]
        if not beside:
            return None
        tokens = torch.stack([each.tokens for each in beside])
        return cls(tokens, torch.tensor([each.seen for each in beside], device=tokens.device), start)

    def __getitem__(self, rows: Sequence[int]) -> Self:
        return type(self)(self.tokens[list(rows)], self.seen[list(rows)], self.start)

    def arguments(self, positions: torch.Tensor, *, cached: bool) -> dict[str, torch.Tensor]:
        """What the trunk takes beside the text at `positions` (rows, queries); `cached`: it has the tokens already."""
        masks = masks_of(positions >= self.start, self.seen, self.tokens.shape[1], self.tokens.dtype)
        return masks if cached else {"cross_attention_states": self.tokens, **masks}


def masks_of(behind: torch.Tensor, seen: torch.Tensor, n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The trunk's two masks.

    Args:
        behind: (rows, queries) bool: the text that stands behind the image.
        seen: (rows,): how many of the `n` image tokens that text sees.
    """
    import torch

    there = torch.arange(n, device=seen.device) < seen[:, None]
    blocked = behind[:, None, :, None] & ~there[:, None, None]
    mask = torch.zeros(blocked.shape, dtype=dtype, device=seen.device)
    return {
        "cross_attention_mask": mask.masked_fill_(blocked, torch.finfo(dtype).min),
        "full_text_row_masked_out_mask": behind[:, None, :, None].to(dtype),
    }
