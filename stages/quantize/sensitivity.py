"""How much worse a language model predicts when some of its weights are rounded: the KL of next-token distributions.

Measured on fixed sequences, with one group of weights rounded at a time or with all. What stands before the first block
that changes is not computed again: every block's inputs are kept from the pass of the whole model.

What single groups lose does not add up: safety tuning changes weights little, and in one direction, and where many
small changes go the same way, refusals lose several times the sum. So the gradient is taken where all are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from artifacts.errors import StageError

if TYPE_CHECKING:
    import torch

    from stages.data.calibration import Batch


@dataclass(frozen=True)
class Divergence:
    """Mean KL(reference || rounded) in nats a token: of ordinary text, and of the tokens of refusals."""

    text: float
    refusal: float


@dataclass
class _Sequences:
    batch: Batch
    refusal: bool  # or ordinary
    inputs: list[tuple[torch.Tensor, Mapping[str, object]]]  # of every block: hidden states, and what else it takes
    logprobs: torch.Tensor  # (counted predictions, vocabulary)
    ids: torch.Tensor  # (sequences, length): rows of the embedding matrix; -1 where an image stands


class Probe:
    """A language model that is asked the same again and again.

    Args:
        trunk: with `layers` and `norm`, as all of transformers' decoders have them. head: of the model.
        text, refusals: what is predicted.

    Raises:
        StageError: the model is built otherwise.
    """

    def __init__(
        self,
        trunk: torch.nn.Module,
        head: torch.nn.Module,
        embedding: torch.nn.Module,
        text: Sequence[Batch],
        refusals: Sequence[Batch],
    ) -> None:
        layers, norm = getattr(trunk, "layers", None), getattr(trunk, "norm", None)
        if layers is None or norm is None:
            raise StageError(
                "the language model is not built as decoders are",
                why="it has no `layers` with a `norm` behind them",
                way_out="name a type instead of auto",
            )
        self._trunk, self._head, self._embedding = trunk, head, embedding
        self._layers = cast("torch.nn.ModuleList", layers)
        self._norm = cast("torch.nn.Module", norm)
        self._sequences = [self._kept(batch, refusal=False) for batch in text]
        self._sequences += [self._kept(batch, refusal=True) for batch in refusals]
        self._counts = {
            which: max(1, sum(len(one.logprobs) for one in self._sequences if one.refusal is which))
            for which in (False, True)
        }

    def divergence(self, first: int | None) -> Divergence:
        """With the weights as they are now. `first`: the first block that changed; None: the embeddings did."""
        import torch

        totals = {False: 0.0, True: 0.0}
        with torch.inference_mode():
            for sequences in self._sequences:
                hidden = sequences.inputs[first or 0][0] if first is not None else self._embedded(sequences)
                for layer, (_, given) in zip(self._layers[first or 0 :], sequences.inputs[first or 0 :], strict=True):
                    hidden = _states(layer(hidden, **given))
                totals[sequences.refusal] += float(self._divergence(sequences, hidden))
        return Divergence(*(max(0.0, totals[which]) / self._counts[which] for which in (False, True)))

    def gradients(self, weights: Sequence[torch.nn.Parameter], text: float, refusal: float) -> list[torch.Tensor]:
        """Of `text` times the one KL and `refusal` times the other, with the weights as they are now, by each."""
        import torch

        with _trainable(weights):
            for sequences in self._sequences:
                factor = (refusal if sequences.refusal else text) / self._counts[sequences.refusal]
                hidden = self._embedded(sequences)
                for layer, (_, given) in zip(self._layers, sequences.inputs, strict=True):
                    hidden = _states(layer(hidden, **given))
                (factor * self._divergence(sequences, hidden)).backward()  # type: ignore[no-untyped-call]
            return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]

    def _divergence(self, sequences: _Sequences, hidden: torch.Tensor) -> torch.Tensor:
        """Summed over the predictions that count."""
        now, before = self._logprobs(sequences.batch, self._norm(hidden)), sequences.logprobs
        return (before.exp() * (before - now)).sum()

    def _kept(self, batch: Batch, *, refusal: bool) -> _Sequences:
        import torch

        with torch.no_grad(), _inputs(self._layers) as inputs:  # gradients are taken of them later
            logprobs = self._logprobs(batch, batch.through(self._trunk))
        if len(inputs) != len(self._layers):
            raise StageError("not every block of the language model computes", way_out="name a type instead of auto")
        return _Sequences(batch, refusal, inputs, logprobs, _rows_of(batch.embeddings, self._embedding))

    def _logprobs(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._head(hidden[batch.counted]).float().log_softmax(-1)
        return found

    def _embedded(self, sequences: _Sequences) -> torch.Tensor:
        """The inputs with the embedding matrix as it is now."""
        import torch

        known = sequences.ids >= 0
        return torch.where(known[..., None], self._embedding(sequences.ids.clamp(min=0)), sequences.inputs[0][0])


@contextmanager
def _inputs(layers: torch.nn.ModuleList) -> Iterator[list[tuple[torch.Tensor, Mapping[str, object]]]]:
    kept: list[tuple[torch.Tensor, Mapping[str, object]]] = []

    def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...], given: Mapping[str, object]) -> None:
        rest = dict(given)
        hidden = args[0] if args else cast("torch.Tensor", rest.pop("hidden_states"))
        kept.append((hidden, rest))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _states(output: object) -> torch.Tensor:
    return cast("torch.Tensor", output[0] if isinstance(output, tuple) else output)


def _rows_of(embeddings: torch.Tensor, embedding: torch.nn.Module) -> torch.Tensor:
    """Which row of the embedding matrix each vector is, -1 if none; compared by their bits."""
    import torch

    weight = cast("torch.Tensor", embedding.weight).detach()
    noise = torch.Generator().manual_seed(0)
    factors = torch.randint(1, 2**31, (weight.shape[1],), generator=noise).to(weight.device)

    def mark(rows: torch.Tensor) -> torch.Tensor:
        return (rows.float().contiguous().view(torch.int32).long() * factors).sum(-1)

    known, order = mark(weight).sort()
    asked = mark(embeddings)
    place = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
    return torch.where(known[place] == asked, order[place], -1)


@contextmanager
def _trainable(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, trained in zip(weights, before, strict=True):
            weight.requires_grad_(trained)
            weight.grad = None


@contextmanager
def rounded(weights: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, these weights have other values."""
    originals = [weight.data for weight in weights]
    try:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value.to(weight.data)
        yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
