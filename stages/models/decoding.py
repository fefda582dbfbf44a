"""Batched decoding from embeddings, for runtimes and for rollouts.

Notable:
- a batch is ragged: every row starts at position 0 of its own cache and pads stand behind it, so a row's keys lie where
  they would lie alone; with the row count a multiple of 4 and the cache a multiple of 64, its arithmetic is then the
  same, to the bit, alone and in any batch (measured with MKL and oneDNN; the tests hold it);
- a prefix (system text, image) is computed once and copied into the rows that share it;
- rows that have ended leave the batch when half of it is gone;
- only what is picked from is put through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_ROWS: Final = 4  # row counts are multiples of it: matrix kernels treat the last rows of other counts differently
_KEYS: Final = 64  # cache lengths are multiples of it: attention sums keys in vectors from position 0
_QUERIES: Final = 16  # prompt lengths in a batch are padded to multiples of it, for the same reason

Pick = Callable[["torch.Tensor", Sequence[int]], "torch.Tensor"]
"""Next tokens (rows,) from logits (rows, vocabulary) and the numbers of the prompts that the rows belong to."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of what several prompts begin with: (layers, 2, key-value heads, length, head width)."""

    states: torch.Tensor

    @property
    def length(self) -> int:
        return int(self.states.shape[3])

    @property
    def nbytes(self) -> int:
        return int(self.states.nbytes)


@dataclass(frozen=True)
class Answer:
    """Tokens without the one that ended the turn. `stopped`: it ended itself, rather than by `max_new_tokens`."""

    tokens: tuple[int, ...]
    stopped: bool


def greedy(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The likeliest token of every row."""
    return logits.argmax(-1)


class Decoder:
    """Answers prompts that are given as embeddings.

    Args:
        trunk: the language backbone: takes `inputs_embeds`, `position_ids`, a 4-D `attention_mask` and
            `past_key_values`, gives `last_hidden_state` (every Llama-like model of transformers does).
        head: hidden states to logits.
        embed: token ids to embeddings.
        stop: tokens that end an answer.
    """

    def __init__(self, trunk: torch.nn.Module, head: torch.nn.Module, embed: torch.nn.Module, stop: Collection[int]):
        self._trunk = trunk
        self._head = head
        self._embed = embed
        self._stop = frozenset(stop)

    def prefix(self, embeddings: torch.Tensor) -> Prefix:
        """Compute what several prompts begin with; embeddings (length, width)."""
        import torch

        with torch.inference_mode():
            cache = _Cache()
            self._run(cache, embeddings[None], torch.arange(embeddings.shape[0], device=embeddings.device)[None])
            layers = [torch.stack((keys[0], values[0])) for keys, values in zip(cache.keys, cache.values, strict=True)]
            return Prefix(torch.stack(layers)[:, :, :, : embeddings.shape[0]].contiguous())

    def logits(self, embeddings: torch.Tensor, last: int, prefix: Prefix | None = None) -> torch.Tensor:
        """(last, vocabulary): next-token logits at the `last` positions of one prompt (length, width)."""
        import torch

        with torch.inference_mode():
            cache, positions = _Cache.of([embeddings], [prefix], [0])
            states = self._run(cache, _padded([embeddings], positions.shape[1]), positions)
            end = embeddings.shape[0]
            logits: torch.Tensor = self._head(states[0, end - last : end])
            return logits

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        max_new_tokens: Sequence[int],
        prefixes: Sequence[Prefix | None] | None = None,
        pick: Pick = greedy,
    ) -> list[Answer]:
        """Answer a batch of prompts, each (length >= 1, width), standing behind its prefix if it has one."""
        import torch

        if not prompts:
            return []
        with torch.inference_mode():
            return self._generate(prompts, max_new_tokens, prefixes or [None] * len(prompts), pick)

    def _generate(
        self,
        prompts: Sequence[torch.Tensor],
        max_new_tokens: Sequence[int],
        prefixes: Sequence[Prefix | None],
        pick: Pick,
    ) -> list[Answer]:
        import torch

        answers: list[list[int]] = [[] for _ in prompts]
        stopped = [False] * len(prompts)
        rows = list(range(len(prompts)))  # row of the batch -> prompt; the rows behind them are padding
        cache, positions = _Cache.of(prompts, prefixes, max_new_tokens)
        states = self._run(cache, _padded(prompts, positions.shape[1]), positions)
        device = states.device
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        every = torch.arange(len(prompts), device=device)
        last, position = states[every, ends], positions[every, ends]
        if len(rows) % _ROWS:
            index = _filled(rows, device)
            cache.keep(index)
            last, position = last[index], position[index]
        while True:
            tokens = pick(self._head(last)[: len(rows)], rows).tolist()
            keep: list[int] = []
            for row, (prompt, token) in enumerate(zip(rows, tokens, strict=True)):
                if len(answers[prompt]) >= max_new_tokens[prompt] or stopped[prompt]:
                    continue  # it ended before, and its row is still here
                if token in self._stop:
                    stopped[prompt] = True
                    continue
                answers[prompt].append(token)
                if len(answers[prompt]) < max_new_tokens[prompt]:
                    keep.append(row)
            if not keep:
                break
            if _multiple(len(keep), _ROWS) <= len(position) // 2:
                index = _filled(keep, device)
                cache.keep(index)
                position = position[index]
                rows, tokens = [rows[row] for row in keep], [tokens[row] for row in keep]
            position = position + 1
            # Rows that have ended go on writing at one place of their own cache, which nobody reads.
            position = position.clamp(max=cache.length - 1)
            step = _filled(tokens, device)
            last = self._run(cache, self._embed(step)[:, None], position[:, None])[:, 0]
        return [Answer(tuple(answer), end) for answer, end in zip(answers, stopped, strict=True)]

    def _run(self, cache: _Cache, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        import torch

        length = cache.length or embeddings.shape[1]
        mask = torch.arange(length, device=positions.device)[None, None, None] <= positions[:, None, :, None]
        cache.positions = positions
        out = self._trunk(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        states: torch.Tensor = out.last_hidden_state
        return states


class _Cache:
    """Keys and values by layer, (rows, heads, length, width), each row from its own position 0.

    What transformers' attention layers ask of a cache is `update`. `length` 0: it holds what comes, for a prefix.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.positions: torch.Tensor
        self.length = 0
        self._prefixes: Sequence[Prefix | None] = ()

    @classmethod
    def of(
        cls, prompts: Sequence[torch.Tensor], prefixes: Sequence[Prefix | None], new_tokens: Sequence[int]
    ) -> tuple[_Cache, torch.Tensor]:
        """A cache for these rows, and their positions (rows, padded length), pads going on counting."""
        import torch

        width = _multiple(max(len(prompt) for prompt in prompts), _QUERIES)
        starts = [prefix.length if prefix else 0 for prefix in prefixes]
        cache = cls()
        needed = [s + len(p) + n for s, p, n in zip(starts, prompts, new_tokens, strict=True)]
        cache.length = _multiple(max(*needed, max(starts) + width), _KEYS)
        cache._prefixes = prefixes
        device = prompts[0].device
        return cache, torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)[None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values, (rows, heads, new, width), at their positions; give the whole layer."""
        import torch

        if not self.length:
            self.keys.append(keys)
            self.values.append(values)
            return keys, values
        if layer_idx == len(self.keys):
            for held, new, part in ((self.keys, keys, 0), (self.values, values, 1)):
                layer = new.new_zeros(new.shape[0], new.shape[1], self.length, new.shape[3])
                for row, prefix in enumerate(self._prefixes):
                    if prefix is not None:
                        layer[row, :, : prefix.length] = prefix.states[layer_idx, part]
                held.append(layer)
        row_index = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for layer, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            layer[row_index, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer_idx], self.values[layer_idx]

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on."""
        self.keys = [layer[rows] for layer in self.keys]
        self.values = [layer[rows] for layer in self.values]


def _multiple(number: int, of: int) -> int:
    """`number` rounded up."""
    return -(-number // of) * of


def _filled(numbers: list[int], device: torch.device) -> torch.Tensor:
    """The numbers, the first one repeated until the count suits the kernels."""
    import torch

    return torch.tensor(numbers + numbers[:1] * (_multiple(len(numbers), _ROWS) - len(numbers)), device=device)


def _padded(prompts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """(rows, width, hidden), zeros behind every prompt."""
    batch = prompts[0].new_zeros(len(prompts), width, prompts[0].shape[1])
    for row, prompt in enumerate(prompts):
        batch[row, : len(prompt)] = prompt
    return batch
