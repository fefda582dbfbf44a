"""What flows into the linear layers of a language model: the sums that an importance matrix is made of.

As llama.cpp's imatrix program collects it (tools/imatrix/imatrix.cpp): for every matrix of the decoder blocks the sum
of squared inputs of each column, and how many tokens were summed. Embeddings and head have no entry there either.

Notable: the sequences are embeddings, so images stand in them as the language model meets them, which llama-imatrix
cannot do. Padding is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from artifacts.errors import StageError
from stages.runtimes.imatrix import Collected

if TYPE_CHECKING:
    import torch

    from stages.data.calibration import Batch

Told = Callable[[int], None]
"""Sequences done."""


def collect(trunk: torch.nn.Module, batches: Iterable[Batch], told: Told = lambda done: None) -> dict[str, Collected]:
    """Sums over all tokens of all sequences, by the name of the layer in the trunk.

    Raises:
        StageError: a layer was given numbers that are not finite.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    done = 0
    with torch.inference_mode(), _watched(trunk, sums, counts) as watch:
        for batch in batches:
            watch.tokens = batch.tokens
            batch.through(trunk)
            done += len(batch.lengths)
            told(done)
    if wrong := [name for name, total in sums.items() if not torch.isfinite(total).all()]:
        raise StageError(
            f"the inputs of {wrong[0]} are not finite",
            why="the model computes with numbers that float32 cannot hold",
            way_out="check the checkpoint: this model answers nothing",
        )
    return {
        name: Collected(total.cpu().numpy().astype(np.float32)[None], np.array([counts[name]], np.float32))
        for name, total in sums.items()
    }


class _Watch:
    tokens: torch.Tensor  # (sequences, length), bool: what counts in the batch that is computed now


@contextmanager
def _watched(trunk: torch.nn.Module, sums: dict[str, torch.Tensor], counts: dict[str, int]) -> Iterator[_Watch]:
    import torch

    watch = _Watch()

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0][watch.tokens]
            squared = rows.double().square().sum(0)
            sums[name] = sums[name] + squared if name in sums else squared
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in trunk.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
