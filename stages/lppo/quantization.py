"""The policy computes with the weights that will ship: rounded as the deployed quantizer rounds them.

With W the original weight and sBA the adapter's part, what ships is Q(W + sBA), Q being the quantizer. Here the frozen
weight under the adapter is set to Q(W + sBA) - sBA, so the unchanged forward pass gives exactly Q(W + sBA), and the
gradient reaches A and B as if Q were not there: the straight-through estimator (Bengio et al., 2013), without a forward
pass of its own. Between two roundings the residue is kept and the adapter moves smoothly. The reference stays the
unrounded model, so the anchor on harmless answers also repairs what rounding has damaged.

Token embeddings and head are not rounded: llama.cpp keeps them at 6 to 8 bits where they are tied.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from stages.runtimes.rounding import check_type, round_weights

if TYPE_CHECKING:
    import torch
    from torch.nn import Linear

_THREADS = 2  # libggml lets go of the interpreter while it rounds; matrices in flight cost memory


class Quantizer:
    """Rounds every linear layer of a trunk, adapters included.

    Args:
        trunk: with adapters (PEFT) in place.
        type: tensor type of llama.cpp, e.g. "Q4_0".

    Raises:
        RecipeError: a type that weights cannot be rounded to here.
    """

    def __init__(self, trunk: torch.nn.Module, type: str):
        import torch
        from peft.tuners.lora import LoraLayer

        check_type(type)
        self._type = type
        self._adapters = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
        adapted = {id(module.get_base_layer()) for module in self._adapters.values()}
        inside = {id(part) for module in self._adapters.values() for part in module.modules()} - adapted
        self._plain = [
            module
            for module in trunk.modules()
            if isinstance(module, torch.nn.Linear) and id(module) not in adapted | inside
        ]
        bases = [cast("Linear", module.get_base_layer()) for module in self._adapters.values()]
        # Adapters first: `refresh` goes through both lists side by side.
        self._layers = [*bases, *self._plain]
        self._original = [layer.weight.data for layer in self._layers]
        self._rounded: list[torch.Tensor] = []

    def refresh(self) -> None:
        """Round again, for the adapter as it is now."""
        import torch

        self._use(self._original)
        self._rounded.clear()  # two sets of weights are enough
        with torch.no_grad(), ThreadPoolExecutor(_THREADS) as pool:
            self._rounded.extend(pool.map(self._residual, range(len(self._layers))))
        self._use(self._rounded)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the weights are the original ones."""
        self._use(self._original)
        try:
            yield
        finally:
            if self._rounded:
                self._use(self._rounded)

    def _residual(self, number: int) -> torch.Tensor:
        """Q(W + sBA) - sBA of one layer, in the dtype of the computation."""
        import torch

        weight = self._original[number]
        adapters = list(self._adapters.values())
        with torch.no_grad():
            if number >= len(adapters):
                return self._round(weight).to(weight)
            delta = cast("torch.Tensor", adapters[number].get_delta_weight("default"))
            return (self._round(weight + delta).to(weight.device) - delta.float()).to(weight.dtype)

    def _round(self, weight: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.from_numpy(round_weights(weight.float().cpu().numpy(), self._type))

    def _use(self, weights: list[torch.Tensor]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.weight.data = weight
