"""Batched decoding from embeddings, for runtimes and for rollouts.

Notable:
- a batch is ragged: every row starts at position 0 of its own cache and pads stand behind it, so a row's keys lie where
  they would lie alone; with the row count a multiple of 4 and the cache a multiple of 64, its arithmetic is then the
  same alone and in any batch but for the last bits, since some processors' matrix libraries take other kernels for
  other shapes: tests hold logits to 1e-5, and greedy answers to be equal;
- a prefix (system text, image) is computed once and copied into the rows that share it;
- rows that have ended leave the batch when half of it is gone;
- only what is picked from is put through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from stages.models.crossing import Crossing, Placed, masks_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_ROWS: Final = 4  # row counts are multiples of it: matrix kernels treat the last rows of other counts differently
_KEYS: Final = 64  # cache lengths are multiples of it: attention sums keys in vectors from position 0
_QUERIES: Final = 16  # prompt lengths in a batch are padded to multiples of it, for the same reason

Pick = Callable[["torch.Tensor", Sequence[int]], "torch.Tensor"]
"""Next tokens (rows,) from logits (rows, vocabulary) and the numbers of the prompts that the rows belong to."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of what several prompts begin with, by block: (2, key-value heads, length, head width).

    `crossed`: those of the image beside, in blocks that attend to it, (2, key-value heads, image tokens, head width);
    text behind the image sees the first `seen` of its tokens.
    """

    states: Mapping[int, torch.Tensor]
    length: int
    crossed: Mapping[int, torch.Tensor] = field(default_factory=dict)
    seen: int = 0

    @property
    def nbytes(self) -> int:
        return sum(int(held.nbytes) for held in (*self.states.values(), *self.crossed.values()))


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
            `past_key_values`, gives `last_hidden_state` (every Llama-like model of transformers does); with images
            beside the text, it takes what mllama's takes for them.
        head: hidden states to logits.
        embed: token ids to embeddings.
        stop: tokens that end an answer.
    """

    def __init__(self, trunk: torch.nn.Module, head: torch.nn.Module, embed: torch.nn.Module, stop: Collection[int]):
        self._trunk = trunk
        self._head = head
        self._embed = embed
        self._stop = frozenset(stop)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, over all blocks."""
        config = cast("PreTrainedConfig", self._trunk.config)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = next(self._embed.parameters()).element_size()
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * size)

    def prefix(self, before: torch.Tensor, image: Placed | None = None) -> Prefix:
        """Compute what several prompts begin with: embeddings (length, width), and behind them an image."""
        import torch

        with torch.inference_mode():
            embeddings = before if image is None else torch.cat([before, image.embeddings])
            length = embeddings.shape[0]
            positions = torch.arange(length, device=embeddings.device)[None]
            crossing = None if image is None else Crossing.of([image], start=before.shape[0])
            cache = _Cache()
            self._run(cache, embeddings[None], positions, crossing)
            held = {block: torch.stack((keys[0], cache.values[block][0])) for block, keys in cache.keys.items()}
            if crossing is None:
                return Prefix(held, length)
            blocks = set(cast("Sequence[int]", self._trunk.config.cross_attention_layers))  # type: ignore[union-attr]
            return Prefix(
                {block: states for block, states in held.items() if block not in blocks},
                length,
                {block: states for block, states in held.items() if block in blocks},
                int(crossing.seen[0]),
            )

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

    def _run(
        self, cache: _Cache, embeddings: torch.Tensor, positions: torch.Tensor, crossing: Crossing | None = None
    ) -> torch.Tensor:
        import torch

        length = cache.length or embeddings.shape[1]
        mask = torch.arange(length, device=positions.device)[None, None, None] <= positions[:, None, :, None]
        cache.positions = positions
        beside = cache.masks(embeddings) if crossing is None else crossing.arguments(positions, cached=False)
        out = self._trunk(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **beside,
        )
        states: torch.Tensor = out.last_hidden_state
        return states


@dataclass
class _Crossed:
    """One block's keys and values of the images beside: (rows, heads, image tokens, width)."""

    keys: torch.Tensor
    values: torch.Tensor
    is_initialized: bool = True  # mllama asks


class _Cache:
    """Keys and values by block, (rows, heads, length, width), each row from its own position 0.

    What transformers' attention layers ask of a cache is `update`, and mllama's cross-attention `layers`. `length` 0:
    it holds what comes, for a prefix.
    """

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.positions: torch.Tensor
        self.length = 0
        self.layers: list[_Crossed] = []
        self._prefixes: Sequence[Prefix | None] = ()
        self._seen: torch.Tensor  # (rows,): how much of its image a row sees; 0: it has none

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
        cache._cross(prefixes)
        device = prompts[0].device
        return cache, torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)[None]

    def _cross(self, prefixes: Sequence[Prefix | None]) -> None:
        """Blocks that attend to images find these in `layers`; a row without one finds zeros, which add nothing."""
        import torch

        crossed = next((prefix.crossed for prefix in prefixes if prefix and prefix.crossed), None)
        if crossed is None:
            return
        nothing = torch.empty(0)
        self.layers = [_Crossed(nothing, nothing, False) for _ in range(max(crossed) + 1)]
        for block, like in crossed.items():
            rows = [
                prefix.crossed[block] if prefix and prefix.crossed else like.new_zeros(like.shape)
                for prefix in prefixes
            ]
            both = torch.stack(rows)
            self.layers[block] = _Crossed(both[:, 0], both[:, 1])
        seen = [prefix.seen if prefix else 0 for prefix in prefixes]
        self._seen = torch.tensor(seen, device=next(iter(crossed.values())).device)

    def masks(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the trunk takes where images stand beside; the text that is run stands behind them."""
        n = max((layer.keys.shape[2] for layer in self.layers if layer.is_initialized), default=0)
        if not n:
            return {}
        behind = (self._seen > 0)[:, None].expand(embeddings.shape[:2])
        return masks_of(behind, self._seen, n, embeddings.dtype)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values, (rows, heads, new, width), at their positions; give the whole block's."""
        import torch

        if not self.length:
            self.keys[layer_idx], self.values[layer_idx] = keys, values
            return keys, values
        if layer_idx not in self.keys:
            for held, new, part in ((self.keys, keys, 0), (self.values, values, 1)):
                layer = new.new_zeros(new.shape[0], new.shape[1], self.length, new.shape[3])
                for row, prefix in enumerate(self._prefixes):
                    if prefix is not None:
                        layer[row, :, : prefix.length] = prefix.states[layer_idx][part]
                held[layer_idx] = layer
        row_index = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for layer, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            layer[row_index, :, self.positions] = new.transpose(1, 2)
        return self.keys[layer_idx], self.values[layer_idx]

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows go on."""
        self.keys = {block: layer[rows] for block, layer in self.keys.items()}
        self.values = {block: layer[rows] for block, layer in self.values.items()}
        if self.layers:
            self._seen = self._seen[rows]
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[rows], layer.values[rows]


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
