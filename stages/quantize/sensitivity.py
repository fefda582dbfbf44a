"""How much worse a language model predicts when some of its weights are rounded: the KL of next-token distributions.

Measured on fixed sequences, with one group of weights rounded at a time or with all. What stands before the first block
that changes is not computed again: every block's inputs are kept from the pass of the whole model.

Refusals have a second measure. Safety tuning changes weights little, and what it taught is one direction: the log-odds
of a refusal's first token, and of those behind it, move to one side or the other with every rounded group. KL, which is
a square, does not tell the sides apart: sums of it promise little where many small moves go the same way. Signed moves
add up, so these can be made to cancel.
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
    part: int  # 0: ordinary ones; from 1 on: kinds of refusals
    inputs: list[tuple[torch.Tensor, Mapping[str, object]]]  # of every block: hidden states, and what else it takes
    logprobs: torch.Tensor  # (counted predictions, vocabulary)
    ids: torch.Tensor  # (sequences, length): rows of the embedding matrix; -1 where an image stands


class Probe:
    """A language model that is asked the same again and again.

    Args:
        trunk: with `layers` and `norm`, as all of transformers' decoders have them. head: of the model.
        text: what is predicted. refusals: by kind, e.g. beside a picture and without one.

    Raises:
        StageError: the model is built otherwise.
    """

    def __init__(
        self,
        trunk: torch.nn.Module,
        head: torch.nn.Module,
        embedding: torch.nn.Module,
        text: Sequence[Batch],
        refusals: Sequence[Sequence[Batch]],
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
        self._sequences = [
            self._kept(batch, part) for part, batches in enumerate((text, *refusals)) for batch in batches
        ]
        self.kinds = len([batches for batches in refusals if batches])

    def divergence(self, first: int | None) -> Divergence:
        """With the weights as they are now. `first`: the first block that changed; None: the embeddings did."""
        import torch

        totals, counts = {False: 0.0, True: 0.0}, {False: 0, True: 0}
        with torch.inference_mode():
            for sequences in self._sequences:
                hidden = sequences.inputs[first or 0][0] if first is not None else self._embedded(sequences)
                for layer, (_, given) in zip(self._layers[first or 0 :], sequences.inputs[first or 0 :], strict=True):
                    hidden = _states(layer(hidden, **given))
                now = self._logprobs(sequences.batch, self._norm(hidden))
                before = sequences.logprobs
                totals[sequences.part > 0] += float((before.exp() * (before - now)).sum())
                counts[sequences.part > 0] += len(before)
        return Divergence(*(max(0.0, totals[which]) / max(1, counts[which]) for which in (False, True)))

    def log_odds(self) -> list[float]:
        """Of what refusals say, with the weights as they are now: for each kind the mean over first tokens, and that
        over all behind them."""
        import torch

        with torch.inference_mode():
            return [float(odds) for kind in range(self.kinds) for odds in self._log_odds(kind)]

    def gradients(self, weights: Sequence[torch.nn.Parameter]) -> list[list[torch.Tensor]]:
        """Of each of these log-odds, by each weight. In bfloat16: there are as many as weights, several times."""
        import torch

        found = []
        with _trainable(weights):
            for kind in range(self.kinds):
                both = self._log_odds(kind)
                for place, odds in enumerate(both):
                    grads = torch.autograd.grad(odds, weights, retain_graph=place + 1 < len(both), allow_unused=True)
                    pairs = zip(weights, grads, strict=True)
                    found.append([(torch.zeros_like(w) if g is None else g).bfloat16() for w, g in pairs])
        return found

    def _log_odds(self, kind: int) -> list[torch.Tensor]:
        import torch

        begun, followed = [], []
        for sequences in self._sequences:
            if sequences.part == kind + 1:
                hidden = self._embedded(sequences)
                for layer, (_, given) in zip(self._layers, sequences.inputs, strict=True):
                    hidden = _states(layer(hidden, **given))
                odds, first = self._spoken_odds(sequences, self._norm(hidden))
                begun.append(odds[first])
                followed.append(odds[~first])
        return [torch.cat(found).mean() for found in (begun, followed) if any(map(len, found))]

    def _spoken_odds(self, sequences: _Sequences, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens,): log-odds of every token of the answers; and which are the first."""
        batch = sequences.batch
        rows, places = batch.counted.nonzero(as_tuple=True)
        inside = places + 1 < batch.lengths[rows]  # of the last position nothing is known to follow
        rows, places = rows[inside], places[inside]
        spoken = sequences.ids[rows, places + 1]
        logits: torch.Tensor = self._head(hidden[rows, places]).float()
        others = logits.scatter(1, spoken[:, None], float("-inf")).logsumexp(-1)
        chosen = logits.gather(1, spoken[:, None])[:, 0]
        return chosen - others, places == batch.counted.int().argmax(1)[rows]

    def _kept(self, batch: Batch, part: int) -> _Sequences:
        import torch

        with torch.no_grad(), _inputs(self._layers) as inputs:  # gradients are taken of them later
            logprobs = self._logprobs(batch, batch.through(self._trunk))
        if len(inputs) != len(self._layers):
            raise StageError("not every block of the language model computes", way_out="name a type instead of auto")
        return _Sequences(batch, part, inputs, logprobs, _rows_of(batch.embeddings, self._embedding))

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
