"""Scenes, how they are packed into sequences, and how responses are generated from them.

A scene is a state of the paper seen several times: the features of one exit of one image, P(e_l), and several prompts
e_T. What prompts share is computed once, in generation and in training alike:

    [text before the image][P(e_l)] [prompt 1] [prompt 2] ... then the responses, several to a prompt

Every token attends to its own ancestors only and stands at the position that it would have alone, so the numbers are
those of one sequence a response (the tests compare them). A scene of 2 prompts with 4 responses each costs about 220
tokens instead of 1,000. Nothing is copied per response, neither prefix nor keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from stages.data.prompt_sets import Prompt
from stages.lppo.objective import DivergedError
from stages.models.crossing import Crossing, Placed

if TYPE_CHECKING:
    import torch

    from stages.lppo.policy import Policy

_PAD = -1  # segment of padding
_SHARED = 0  # segment of what every prompt of a scene sees; prompts are segments 1, 2, ...


@dataclass(frozen=True)
class Scene:
    """One exit of one image, and the prompts that are asked about it (or only beside it)."""

    exit: int
    image: int  # number in the list of images
    prompts: tuple[Prompt, ...]
    answers: tuple[str, ...] | None = None  # the right ones, where the prompts are questions that have some


@dataclass(frozen=True)
class Tags:
    """Who a token is: three (scenes, length) tensors of int64."""

    segment: torch.Tensor
    row: torch.Tensor  # response, -1 for tokens of the prefix
    position: torch.Tensor

    def then(self, later: Tags) -> Tags:
        import torch

        return Tags(
            torch.cat([self.segment, later.segment], 1),
            torch.cat([self.row, later.row], 1),
            torch.cat([self.position, later.position], 1),
        )


def attention_mask(queries: Tags, keys: Tags, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (scenes, 1, queries, keys): 0 where the key is the query or one of its ancestors."""
    import torch

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(queries, name)[:, :, None], getattr(keys, name)[:, None, :]

    (own, segment), (mine, row), (here, position) = pair("segment"), pair("row"), pair("position")
    # Pads see pads, so that no row of the softmax is empty.
    visible = (position <= here) & ((segment == _SHARED) | (segment == own)) & ((row == -1) | (row == mine))
    blocked = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, blocked)[:, None]


@dataclass(frozen=True)
class Prefixes:
    """The states of some scenes, padded to one length; every scene has the same number of responses."""

    embeddings: torch.Tensor  # (scenes, length, width)
    tags: Tags
    row_segment: torch.Tensor  # (scenes, rows): the prompt that a response answers
    row_last: torch.Tensor  # (scenes, rows): index of that prompt's last token
    row_position: torch.Tensor  # (scenes, rows): position of the response's first token
    crossing: Crossing | None = None  # the images that the language model attends to beside, where it does that

    def __getitem__(self, scenes: Sequence[int]) -> Self:
        chosen = list(scenes)
        tags = Tags(self.tags.segment[chosen], self.tags.row[chosen], self.tags.position[chosen])
        rows = (self.row_segment[chosen], self.row_last[chosen], self.row_position[chosen])
        crossing = None if self.crossing is None else self.crossing[chosen]
        return type(self)(self.embeddings[chosen], tags, *rows, crossing)


@dataclass(frozen=True)
class Responses:
    """What was generated: (scenes, rows, tokens) each. `mask` covers the token that ended the turn, too."""

    tokens: torch.Tensor  # int64
    mask: torch.Tensor  # bool
    logprobs: torch.Tensor  # float32, under the policy that generated, at its temperature
    values: torch.Tensor  # float32, V of the state before each token
    texts: list[list[str]]  # by scene and row, without the end of turn
    finished: torch.Tensor  # (scenes, rows) bool: ended its turn itself


def pack_prefixes(
    before: torch.Tensor, images: Sequence[Placed], prompts: Sequence[Sequence[torch.Tensor]], samples: int
) -> Prefixes:
    """Lay out scenes.

    Args:
        before: embeddings of the text before the image, (tokens, width).
        images: projected exit features of each scene.
        prompts: embeddings of what follows the image, by scene and prompt, (tokens, width).
        samples: responses to a prompt. Rows are prompt by prompt.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    embeddings, segments, positions = [], [], []
    row_segment, row_last, row_position = [], [], []
    for image, asked in zip(images, prompts, strict=True):
        start = before.shape[0] + image.embeddings.shape[0]
        segment = [_SHARED] * start
        position = list(range(start))
        of_row, last, first = [], [], []
        for number, prompt in enumerate(asked, start=1):
            segment += [number] * prompt.shape[0]
            position += range(start, start + prompt.shape[0])
            of_row += [number] * samples
            last += [len(segment) - 1] * samples
            first += [start + prompt.shape[0]] * samples
        embeddings.append(torch.cat([before, image.embeddings, *asked]))
        segments.append(torch.tensor(segment))
        positions.append(torch.tensor(position))
        row_segment.append(of_row)
        row_last.append(last)
        row_position.append(first)
    device = before.device
    segment_ids = pad_sequence(segments, batch_first=True, padding_value=_PAD).to(device)
    return Prefixes(
        embeddings=pad_sequence(embeddings, batch_first=True),
        tags=Tags(segment_ids, torch.full_like(segment_ids, -1), pad_sequence(positions, batch_first=True).to(device)),
        row_segment=torch.tensor(row_segment, device=device),
        row_last=torch.tensor(row_last, device=device),
        row_position=torch.tensor(row_position, device=device),
        crossing=Crossing.of(images, start=before.shape[0]),
    )


@dataclass(frozen=True)
class Sequences:
    """Prefixes followed by the response tokens that something is predicted from, padded to one length.

    `predictors` (scenes, rows, tokens): the index in the sequence from whose hidden state each response token follows.
    """

    tokens: torch.Tensor  # (scenes, response length), int64; embeddings come after the prefix's
    tags: Tags  # of the whole
    predictors: torch.Tensor


def pack_responses(prefixes: Prefixes, tokens: torch.Tensor, mask: torch.Tensor) -> Sequences:
    """Put responses behind their prefixes. The last token of a response predicts nothing, so it is left out."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    scenes, rows, steps = tokens.shape
    length = prefixes.tags.segment.shape[1]
    predictors = torch.zeros((scenes, rows, steps), dtype=torch.long, device=tokens.device)
    predictors[:, :, 0] = prefixes.row_last
    kept, segments, numbers, positions = [], [], [], []
    for scene in range(scenes):
        row, step = mask[scene, :, 1:].nonzero(as_tuple=True)  # (row, step) is an input if (row, step + 1) is predicted
        kept.append(tokens[scene, row, step])
        segments.append(prefixes.row_segment[scene, row])
        numbers.append(row)
        positions.append(prefixes.row_position[scene, row] + step)
        predictors[scene, row, step + 1] = length + torch.arange(len(row), device=tokens.device)
    responses = Tags(
        pad_sequence(segments, batch_first=True, padding_value=_PAD),
        pad_sequence(numbers, batch_first=True, padding_value=-1),
        pad_sequence(positions, batch_first=True),
    )
    return Sequences(pad_sequence(kept, batch_first=True), prefixes.tags.then(responses), predictors)


Pick = Callable[["torch.Tensor"], "torch.Tensor"]
"""Next tokens (scenes, rows) from log-probabilities (scenes, rows, vocabulary)."""


def sample_with(generators: Sequence[torch.Generator]) -> Pick:
    """Draw from the policy, each scene with a generator of its own: what a scene draws depends on no other scene.

    Raises (when called):
        DivergedError: probabilities are not finite.
    """
    import torch

    def pick(logprobs: torch.Tensor) -> torch.Tensor:
        # On the CPU, so that it does not depend on the device.
        probabilities = logprobs.float().exp().cpu()
        if not bool(torch.isfinite(probabilities).all()):
            raise DivergedError("the policy's probabilities are not finite")
        drawn = [
            torch.multinomial(rows, 1, generator=generator)[:, 0]
            for rows, generator in zip(probabilities, generators, strict=True)
        ]
        return torch.stack(drawn).to(logprobs.device)

    return pick


def greedy(logprobs: torch.Tensor) -> torch.Tensor:
    """The likeliest token."""
    return logprobs.argmax(-1)


def generate(policy: Policy, prefixes: Prefixes, max_new_tokens: int, pick: Pick) -> Responses:
    """Answer every prompt of every scene; all responses advance together, one token a step."""
    import torch

    scenes, rows = prefixes.row_segment.shape
    numbers = torch.arange(rows, device=prefixes.row_last.device).expand(scenes, rows)
    alive = torch.ones((scenes, rows), dtype=torch.bool, device=prefixes.row_last.device)
    tokens, masks, logprobs, values = [], [], [], []
    with torch.no_grad():
        cache = policy.new_cache()
        hidden = policy.hidden(prefixes.embeddings, prefixes.tags, prefixes.tags, prefixes.crossing, cache)
        width = hidden.shape[-1]
        hidden = hidden.gather(1, prefixes.row_last[:, :, None].expand(-1, -1, width))
        seen = prefixes.tags
        for step in range(max_new_tokens):
            scores = policy.logprobs(hidden)
            token = pick(scores)
            tokens.append(token)
            masks.append(alive)
            logprobs.append(scores.gather(-1, token[:, :, None])[:, :, 0])
            values.append(policy.values(hidden))
            alive = alive & ~policy.ends(token)
            if step + 1 == max_new_tokens or not bool(alive.any()):
                break
            new = Tags(prefixes.row_segment, numbers, prefixes.row_position + step)
            seen = seen.then(new)
            hidden = policy.hidden(policy.embed(token), new, seen, prefixes.crossing, cache)
    stacked = torch.stack(tokens, 2)
    mask = torch.stack(masks, 2)
    spoken = mask & ~policy.ends(stacked)
    texts = [[policy.decode(stacked[s, r][spoken[s, r]]) for r in range(rows)] for s in range(scenes)]
    return Responses(stacked, mask, torch.stack(logprobs, 2), torch.stack(values, 2), texts, ~alive)
