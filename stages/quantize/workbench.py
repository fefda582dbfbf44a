"""A loaded language model whose weights can be rounded at will, and what is asked of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.data.calibration_mix import CalibrationMix
from stages.models import checkpoint
from stages.models.family import Family, family_of
from stages.quantize.sensitivity import Divergence, Probe, rounded
from stages.quantize.types import EMBEDDING, FLOATS, OUTPUT
from stages.resources import device_of
from stages.runtimes.imatrix import Importance
from stages.runtimes.rounding import round_weights
from stages.stage import Context, StageParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.data.calibration import Batch, Passage, Side

_TOGETHER: Final = 4  # sequences in one pass


class ProbeMix(CalibrationMix):
    """Less of all: it goes through the model once for each group."""

    samples: int = Field(default=12, ge=1, description="sequences in all")
    length: int = Field(
        default=64, ge=8, description="of a passage of text, and the most that is kept of an answer, in tokens"
    )
    pictures: int = Field(default=4, ge=1, description="training pictures that questions and prompts stand beside")


class AutoParams(StageParams):
    """How sensitivity is measured."""

    calibration: ProbeMix = Field(default=ProbeMix(), description="ordinary sequences that must be predicted as before")
    refusals: int = Field(
        default=8, ge=1, description="training prompts behind which a refusal must be, each with a picture and without"
    )
    refusal_weight: float = Field(
        default=1.0, ge=0, description="what refusals count beside ordinary text, both as shares of what stock loses"
    )
    blocks: int = Field(default=1, ge=1, description="neighbouring blocks that share their types; more are quicker")


@dataclass(frozen=True)
class Together:
    """What was measured with every weight rounded."""

    kl: Divergence
    log_odds: tuple[float, ...]  # of refusals' first tokens, by kind


class Workbench:
    """Args:
    folder: the checkpoint. importance: columns of its matrices.

    Raises:
        SourceError, StageError: it cannot be loaded, or is not built as decoders are.
    """

    def __init__(self, context: Context, folder: Path, importance: Importance | None, params: AutoParams) -> None:
        config = checkpoint.read_config(folder)
        self._family = family_of(config, where=str(folder))
        self._folder, self._params, self._context = folder, params, context
        self._importance: Importance = importance or {}
        self._model = self._family.load(folder, device=device_of("auto", context.team))
        self._model.requires_grad_(False)
        self.weights = _weights(self._family, self._model, folder)
        self._probes: dict[Side, Probe] = {}
        self._known: dict[tuple[Side, frozenset[tuple[str, str]]], Together] = {}

    def columns(self, name: str) -> NDArray[np.float32] | None:
        """The importance of a matrix's columns, if it is known."""
        return self._importance.get(name)

    def rounded(self, name: str, type: str) -> torch.Tensor:
        """A matrix as llama.cpp would compute with it."""
        import torch

        weight = self.weights[name].detach().float().cpu().numpy()
        return torch.from_numpy(round_weights(weight, type, self.columns(name)))

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, these matrices have other values."""
        with rounded([self.weights[name] for name in values], list(values.values())):
            yield

    def together(self, types: Mapping[str, str], side: Side) -> Together:
        """With all these matrices rounded at once. Measured once for the same types."""
        key = side, frozenset(types.items())
        if key not in self._known:
            probe = self.probe(side)
            values = {name: self.rounded(name, type) for name, type in types.items() if type not in FLOATS}
            with self.holding(values):
                self._known[key] = Together(probe.divergence(None), tuple(probe.log_odds()))
        return self._known[key]

    def probe(self, side: Side) -> Probe:
        """Training material to choose by, or validation material to judge the choice by."""
        if side not in self._probes:
            self._probes[side] = self._made(side)
        return self._probes[side]

    def _made(self, side: Side) -> Probe:
        from stages.data.calibration import batches

        tokenizer = checkpoint.load_tokenizer(self._folder)
        mix, count = self._params.calibration, self._params.refusals
        material = mix.material(self._family, self._folder, self._model, tokenizer, side, self._context.seed)
        kinds, ordinary = material.kinds(), mix.passages(material)
        if side == "train":  # of the whole text, so once
            mix.tell(self._context, material.left_out)
        beside = (True, False) if "question" in kinds else (False,)
        refusals = [
            [material.refusal(number, picture=picture) for number in range(count)]
            for picture in (beside if "prompt" in kinds else ())
        ]

        def batched(passages: Sequence[Passage]) -> list[Batch]:
            return list(batches(sorted(passages, key=lambda passage: passage.order), _TOGETHER))

        embedding = cast("torch.nn.Module", self._model.get_input_embeddings())
        return Probe(
            self._family.trunk(self._model),
            self._family.head(self._model),
            embedding,
            batched(ordinary),
            [batched(kind) for kind in refusals],
        )


def _weights(family: Family, model: PreTrainedModel, folder: Path) -> dict[str, torch.nn.Parameter]:
    """The matrices of the language model by the names that they have in the GGUF."""
    import torch

    from stages.runtimes.mixture import outline_of
    from stages.runtimes.tensor_names import stored_names

    trunk = family.trunk(model)
    linear = {name: module for name, module in trunk.named_modules() if isinstance(module, torch.nn.Linear)}
    names = stored_names(list(linear), trunk, outline_of(folder))
    found = {names[name]: cast("torch.nn.Parameter", module.weight) for name, module in linear.items()}
    found[EMBEDDING] = cast("torch.nn.Parameter", model.get_input_embeddings().weight)
    found[OUTPUT] = cast("torch.nn.Parameter", family.head(model).weight)
    return found
