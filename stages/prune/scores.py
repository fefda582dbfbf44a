"""How little a block does: block influence and angular distance, read off its input and output through hooks.

- Block influence (ShortGPT, arXiv 2403.03853, equation 1): 1 - E[cos(x_i, x_(i+1))], the cosine of a block's input and
  output at the same token, over all tokens of the calibration sequences, image tokens included.
- Angular distance (arXiv 2403.17887, equation 6): arccos(cos(x_l, x_(l+n))) / pi at the last token of a sequence,
  between the input of block l and that of block l + n; averaged over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from artifacts.errors import StageError

if TYPE_CHECKING:
    import torch

    from stages.data.calibration import Batch

Forward = Callable[["Batch"], object]
"""One pass of the language model over a batch, without a KV cache."""


@dataclass(frozen=True)
class Scores:
    """`influence`: by block. `distance`: of every span of `span` neighbours, by its first block. `tokens`: seen."""

    influence: Mapping[int, float]
    distance: Mapping[int, float]
    span: int
    tokens: int


def score_blocks(layers: torch.nn.ModuleList, forward: Forward, batches: Iterable[Batch], span: int) -> Scores:
    """Score every block of a decoder.

    A block that a pass leaves out (cross-attention without an image) has no score.

    Raises:
        StageError: a state is not finite.
    """
    import torch

    depth = len(layers)
    cosines = [0.0] * depth  # summed over tokens, in double precision
    ran = [0] * depth  # tokens
    angles: dict[int, list[float]] = {}
    inputs: dict[int, torch.Tensor] = {}
    last: dict[int, torch.Tensor] = {}  # block -> its input at the last token of every sequence; `depth`: the output
    batch: Batch

    def before(number: int, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        states = cast("torch.Tensor", args[0] if args else kwargs["hidden_states"])
        inputs[number] = states
        last[number] = _last(states, batch)

    def after(number: int, output: object) -> None:
        states = cast("torch.Tensor", output[0] if isinstance(output, tuple) else output)
        cosine = torch.nn.functional.cosine_similarity(inputs.pop(number).double(), states.double(), dim=-1)
        cosines[number] += float(cosine[batch.tokens].sum())
        ran[number] += int(batch.lengths.sum())
        if number == depth - 1:
            last[depth] = _last(states, batch)

    handles = []
    for number, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, args, kwargs), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, __, output, number=number: after(number, output)))
    tokens = 0
    try:
        with torch.inference_mode():
            for batch in batches:
                last.clear()
                forward(batch)
                tokens += int(batch.lengths.sum())
                for first in range(depth - span + 1):
                    if first in last and first + span in last:
                        pair = last[first].double(), last[first + span].double()
                        cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1).clamp(-1, 1)
                        angles.setdefault(first, []).extend((cosine.arccos() / math.pi).tolist())
    finally:
        for handle in handles:
            handle.remove()
    influence = {block: 1 - cosines[block] / ran[block] for block in range(depth) if ran[block]}
    distance = {first: sum(found) / len(found) for first, found in angles.items()}
    if not all(map(math.isfinite, (*influence.values(), *distance.values()))):
        raise StageError(
            "the hidden states of the language model are not finite",
            why="a block's influence cannot be measured on them",
            way_out="use dtype: float32",
        )
    return Scores(influence, distance, span, tokens)


def _last(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    import torch

    return states[torch.arange(len(states), device=states.device), batch.lengths - 1]


def least_influential(scores: Scores, drop: int, fixed: Collection[int] = ()) -> tuple[int, ...]:
    """The `drop` blocks of least influence, ascending; `fixed` ones stay.

    Raises:
        StageError: fewer blocks may go.
    """
    free = sorted((value, block) for block, value in scores.influence.items() if block not in fixed)
    if len(free) < drop:
        raise StageError(
            f"{drop} blocks cannot be dropped: only {len(free)} can be judged",
            why="blocks that read the image by cross-attention stay",
            way_out=f"drop at most {len(free)}",
        )
    return tuple(sorted(block for _, block in free[:drop]))


def least_angle(scores: Scores, fixed: Collection[int] = ()) -> tuple[int, ...]:
    """The span of neighbours that turns its input least; spans that hold a `fixed` block are none.

    Raises:
        StageError: there is no such span.
    """
    spans = {first: range(first, first + scores.span) for first in scores.distance}
    free = sorted((scores.distance[first], first) for first, span in spans.items() if not set(span) & set(fixed))
    if not free:
        raise StageError(
            f"there are no {scores.span} neighbouring blocks that may go together",
            why="blocks that read the image by cross-attention stay",
            way_out="drop fewer, or use method: block-influence",
        )
    return tuple(spans[free[0][1]])
