"""The policy computes with the weights that will ship: rounded as the deployed quantizer rounds them.

With W the original weight and sBA the adapter's part, what ships is Q(W + sBA), Q being the quantizer. Here the frozen
weight under the adapter is set to Q(W + sBA) - sBA, so the unchanged forward pass gives exactly Q(W + sBA), and the
gradient reaches A and B as if Q were not there: the straight-through estimator (Bengio et al., 2013), without a forward
pass of its own. Between two roundings the residue is kept and the adapter moves smoothly. The reference stays the
unrounded model, so the anchor on harmless answers also repairs what rounding has damaged.

Notable:
- W + sBA is taken through the checkpoint's own dtype first: the adapter is merged in it, whatever training computes in;
- a file type (Q4_K_M, IQ3_M, Q2_K, ...) gives each layer the type that it has in the file that ships; llama.cpp itself
  is asked which (`runtimes.mixture`). Without a checkpoint to ask about, one type stands for all layers;
- for GPTQ the grid is met, not the error feedback (`runtimes.gptq_grid` says what that leaves out);
- token embeddings and head are not rounded: llama.cpp keeps them at 5 to 8 bits where they are tied, GPTQ as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from artifacts.errors import RecipeError, StageError
from stages.machine import cores
from stages.runtimes.gptq_grid import is_grid, parse_grid, round_to_grid
from stages.runtimes.rounding import TYPES, check_type, round_weights, row_type
from stages.runtimes.tensor_names import stored_names

if TYPE_CHECKING:
    import torch
    from torch.nn import Linear

    from stages.runtimes.imatrix import Importance


def check_quantizer(name: str, *, imatrix: bool = False) -> None:
    """Refuse a quantizer that no policy can be trained with.

    Args:
        name: a file type of llama.cpp, a tensor type, or a GPTQ grid (`gptq-4bit`, `gptq-4bit-64`).
        imatrix: whether there is an importance matrix.

    Raises:
        RecipeError: not so.
    """
    from stages.runtimes.mixture import check_file_type, file_types

    if is_grid(name):
        parse_grid(name)
        if imatrix:
            raise RecipeError(
                f"the quantizer {name} takes no importance matrix",
                why="GPTQ has no use for one",
                way_out="leave imatrix out",
            )
        return
    if name in file_types():
        check_file_type(name, imatrix=imatrix)
        return
    if name not in TYPES:
        possible = (*file_types(), *TYPES, "gptq-4bit", "gptq-8bit")
        raise RecipeError(
            f"weights cannot be rounded to {name!r}",
            why=f"llama.cpp and GPTQ know {', '.join(dict.fromkeys(possible))}",
            way_out=f"use {difflib.get_close_matches(name, possible, n=1, cutoff=0.0)[0]}, or leave the quantizer out",
        )
    check_type(name, imatrix=imatrix)


class Quantizer:
    """Rounds every linear layer of a trunk, adapters included.

    Args:
        trunk: with adapters (PEFT) in place.
        type: file type or tensor type of llama.cpp, e.g. "Q4_K_M" or "Q4_0", or a GPTQ grid, e.g. "gptq-4bit-64".
        checkpoint: the folder that the trunk was loaded from. With it a file type gives each layer the type that it
            will have in the file, and weights are taken through its dtype; without, `type` must be one tensor type,
            which all layers get, and what ships is float32.
        imatrix: the importance matrix that the file will be made with; a file, or what `read_imatrix` returns.

    Raises:
        RecipeError: a type that weights cannot be rounded to here.
        SourceError: the importance matrix is of another model than the checkpoint.
        StageError: llama.cpp does not know the model, or makes no such file of it; or a layer has no part in the file.
    """

    def __init__(
        self,
        trunk: torch.nn.Module,
        type: str,
        *,
        checkpoint: Path | None = None,
        imatrix: Path | Importance | None = None,
    ):
        import torch
        from peft.tuners.lora import LoraLayer

        from stages.models.checkpoint import dtype_of, read_config

        adapters = {name: module for name, module in trunk.named_modules() if isinstance(module, LoraLayer)}
        adapted = {id(module.get_base_layer()) for module in adapters.values()}
        inside = {id(part) for module in adapters.values() for part in module.modules()} - adapted
        plain = {
            name: module
            for name, module in trunk.named_modules()
            if isinstance(module, torch.nn.Linear) and id(module) not in adapted | inside
        }
        # Adapters first: `_adapters` and the start of the other lists go side by side.
        self._adapters = list(adapters.values())
        self._names = [_own_name(name) for name in (*adapters, *plain)]
        self._layers = [*(cast("Linear", module.get_base_layer()) for module in self._adapters), *plain.values()]
        self._original = [layer.weight.data for layer in self._layers]
        self._rounded: list[torch.Tensor] = []
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # A and B of each adapter when it was rounded last
        self._dtype: torch.dtype = getattr(torch, dtype_of({} if checkpoint is None else read_config(checkpoint)))
        self._grid = parse_grid(type) if is_grid(type) else None
        self._importance: list[torch.Tensor | None] = [None] * len(self._layers)
        if self._grid is not None:
            self._types = [self._grid.name] * len(self._layers)
        else:
            self._choose(trunk, type, checkpoint, imatrix)

    @property
    def types(self) -> Mapping[str, str]:
        """What every linear layer is rounded to, by its name in the trunk; not always what was asked for."""
        return dict(zip(self._names, self._types, strict=True))

    def refresh(self) -> None:
        """Round again what has changed since the last time, for the adapter as it is now."""
        import torch

        now = [_parts(module) for module in self._adapters]
        # libggml lets go of the interpreter while it rounds.
        with torch.no_grad(), ThreadPoolExecutor(cores()) as pool:
            if not self._rounded:
                self._rounded = list(pool.map(self._residual, range(len(self._layers))))
            else:  # one after another takes the place of the old one: two sets of weights are enough
                pairs = enumerate(zip(now, self._seen, strict=True))
                changed = [number for number, (new, old) in pairs if not _same(new, old)]
                for number, weight in zip(changed, pool.map(self._residual, changed), strict=True):
                    self._rounded[number] = self._layers[number].weight.data = weight
        self._seen = [(a.clone(), b.clone()) for a, b in now]
        self._use(self._rounded)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the weights are the original ones; may be nested."""
        before = [layer.weight.data for layer in self._layers]
        self._use(self._original)
        try:
            yield
        finally:
            self._use(before)

    def _choose(
        self, trunk: torch.nn.Module, type: str, checkpoint: Path | None, imatrix: Path | Importance | None
    ) -> None:
        """Type and importance of every layer."""
        from stages.runtimes.imatrix import check_fits, read_imatrix
        from stages.runtimes.mixture import file_types, outline_of, tensor_types

        importance = read_imatrix(imatrix) if isinstance(imatrix, Path) else imatrix
        mixed = checkpoint is not None and type in file_types()
        outline = outline_of(checkpoint) if checkpoint is not None and (mixed or importance is not None) else None
        if outline is not None and importance is not None:
            check_fits(importance, outline.shapes, "the importance matrix")
        stored = {name: name for name in self._names}
        if outline is not None or importance is not None:
            stored = stored_names(self._names, trunk, outline)
        if outline is not None and mixed:
            mixture = tensor_types(outline, type, importance=importance)
            if missing := [name for name in self._names if stored[name] not in mixture]:
                raise StageError(
                    f"{missing[0]} has no tensor of its own in the GGUF",
                    where=str(checkpoint),
                    why=f"it would be {stored[missing[0]]}",
                    way_out="leave the quantizer out, or give one tensor type for all layers, such as Q4_K",
                )
            self._types = [mixture[stored[name]] for name in self._names]
        else:
            check_type(type, imatrix=importance is not None)
            self._types = [row_type(type, layer.weight.shape[1]) for layer in self._layers]
        if importance is not None:
            import torch

            found = [importance.get(stored[name]) for name in self._names]
            # llama.cpp, too, goes on without where a weight has none.
            self._importance = [None if values is None else torch.from_numpy(values) for values in found]

    def _residual(self, number: int) -> torch.Tensor:
        """Q(W + sBA) - sBA of one layer, in the dtype of the computation."""
        import torch

        weight = self._original[number]
        with torch.no_grad():
            if number >= len(self._adapters):
                return self._round(weight, number).to(weight)
            delta = cast("torch.Tensor", self._adapters[number].get_delta_weight("default"))
            return (self._round((weight + delta).to(self._dtype), number).to(weight.device) - delta.float()).to(
                weight.dtype
            )

    def _round(self, weight: torch.Tensor, number: int) -> torch.Tensor:
        import torch

        if self._grid is not None:
            return round_to_grid(weight, self._grid)
        importance = self._importance[number]
        rounded = round_weights(
            weight.float().cpu().numpy(), self._types[number], None if importance is None else importance.numpy()
        )
        return torch.from_numpy(rounded)

    def _use(self, weights: list[torch.Tensor]) -> None:
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.weight.data = weight


def _parts(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter."""
    a, b = (cast("torch.nn.ModuleDict", part)["default"].weight for part in (module.lora_A, module.lora_B))
    return cast("torch.Tensor", a).detach(), cast("torch.Tensor", b).detach()


def _same(new: tuple[torch.Tensor, torch.Tensor], old: tuple[torch.Tensor, torch.Tensor]) -> bool:
    import torch

    return torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])


def _own_name(name: str) -> str:
    """A layer's name in the trunk before PEFT put its own in front."""
    return name.removeprefix("base_model.model.")
