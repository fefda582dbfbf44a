"""What each group of tensors costs in each type: measured in one type, computed for the others.

Each group alone is rounded to one type by libggml, and the KL of next-token distributions is measured, on ordinary
text and on the tokens of refusals (`sensitivity`). Only calibration articles and training prompts are read. KL grows
with the square of the change, so for other types it is scaled by the error that each leaves in the weights, columns
weighed by the importance matrix; rows are sampled for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from artifacts.errors import StageError
from stages.data.calibration_mix import CalibrationMix
from stages.models import checkpoint
from stages.models.family import Family, family_of
from stages.quantize.sensitivity import Divergence, Probe, rounded
from stages.quantize.types import EMBEDDING, OUTPUT
from stages.resources import device_of
from stages.runtimes.imatrix import Importance
from stages.runtimes.rounding import NEED_IMATRIX, TYPES, round_weights, row_type
from stages.stage import Context, StageParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from stages.data.calibration import Batch, Passage

Shapes = Mapping[str, tuple[int, ...]]
"""Of matrices, by GGUF name, in ggml's order: the row length comes first."""

_TOGETHER: Final = 4  # sequences in one pass
_SAMPLED: Final = 96  # rows of a matrix that errors are computed of
_ALIGNED: Final = 32  # bytes
_BELOW: Final = 2.0  # bits a weight
_ANCHOR: Final = "Q4_0"  # what is measured: quick to round to, and every row of 32 numbers allows it
_NOTED: Final = "sensitivity.json"
_PARTS: Final = (
    ("attn_q", "attn_k"),
    ("attn_qkv",),
    ("attn_v",),
    ("attn_output",),
    ("ffn_gate", "ffn_up"),
    ("ffn_down",),
)


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
    refusals: int = Field(default=8, ge=1, description="training prompts behind which a refusal must be")
    refusal_weight: float = Field(
        default=1.0, ge=0, description="what KL on the tokens of refusals counts, beside that on ordinary ones"
    )
    blocks: int = Field(default=1, ge=1, description="neighbouring blocks that share their types; more are quicker")


@dataclass(frozen=True)
class Group:
    """Tensors that get one type. `first`: the first block with one of them; None: it is the embeddings or the head."""

    name: str
    tensors: tuple[str, ...]
    first: int | None


@dataclass(frozen=True)
class Option:
    """A group in one type."""

    type: str
    nbytes: int  # in the file
    cost: Divergence


def groups_of(shapes: Shapes, blocks: int) -> list[Group]:
    """The groups of a model with these matrices; `blocks` neighbouring ones share theirs."""
    found: list[Group] = []
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1)
    for first in range(0, depth, blocks):
        inside = range(first, min(first + blocks, depth))
        for parts in _PARTS:
            names = [f"blk.{block}.{part}.weight" for block in inside for part in parts]
            if present := tuple(name for name in names if name in shapes):
                found.append(Group(f"blk.{first}.{'+'.join(parts)}", present, first))
    found += [Group(name, (name,), None) for name in (EMBEDDING, OUTPUT) if name in shapes]
    return found


def candidates(width: int, *, imatrix: bool) -> list[str]:
    """Types that rows of that length allow, without any fallback."""
    return [type for type in TYPES if row_type(type, width) == type and (imatrix or type not in NEED_IMATRIX)]


def least_bytes(shapes: Shapes, groups: Sequence[Group], *, imatrix: bool, floor: float = 0.0) -> int:
    """What the groups take at least. `floor`: bits a weight of the smallest type."""
    return sum(
        min(_bytes(type, group, shapes) for type in _possible(group, shapes, imatrix=imatrix, floor=floor))
        for group in groups
    )


def floor_of(shapes: Shapes, groups: Sequence[Group], limit: int, *, imatrix: bool) -> float:
    """Bits a weight below which no type is worth a look: far below what there is room for on average."""
    weights = sum(int(np.prod(shapes[name])) for group in groups for name in group.tensors)
    floor = 8 * limit / weights - _BELOW
    return floor if least_bytes(shapes, groups, imatrix=imatrix, floor=floor) <= limit else 0.0


def measure(
    context: Context,
    folder: Path,
    shapes: Shapes,
    importance: Importance | None,
    params: AutoParams,
    floor: float,
    progress: Callable[[float], None],
) -> dict[Group, list[Option]]:
    """What each group costs in each type of at least `floor` bits that its rows allow.

    A group that was measured before a crash is not measured again: what is known lies in the scratch folder.

    Raises:
        StageError: the model is not built as decoders are.
    """
    config = checkpoint.read_config(folder)
    family = family_of(config, where=str(folder))
    model = family.load(folder, device=device_of("auto", context.team))
    weights = _weights(family, model, folder)
    groups = groups_of(shapes, params.blocks)
    if unknown := [name for group in groups for name in group.tensors if name not in weights]:
        raise StageError(f"{unknown[0]} is no layer of its own in this model", way_out="name a type instead of auto")
    noted = _noted(context.scratch)
    probe: Probe | None = None
    found: dict[Group, list[Option]] = {}
    for done, group in enumerate(groups):
        matrices = [weights[name] for name in group.tensors]
        columns = [importance.get(name) if importance is not None else None for name in group.tensors]
        if group.name not in noted:
            probe = probe or _probe(context, family, model, folder, params)

            with rounded(matrices, [_rounded(*pair) for pair in zip(matrices, columns, strict=True)]):
                changed = probe.divergence(group.first)
            noted[group.name] = [changed.text, changed.refusal]
            _note(context.scratch, noted)
        progress((done + 1) / len(groups))
        known = all(entry is not None for entry in columns)
        possible = _possible(group, shapes, imatrix=known, floor=floor)
        errors = [_errors(matrix, {*possible, _ANCHOR}, entry) for matrix, entry in zip(matrices, columns, strict=True)]
        total = {type: sum(error[type] for error in errors) for type in errors[0]}
        measured = Divergence(*noted[group.name])
        scale = {type: total[type] / max(total[_ANCHOR], 1e-30) for type in possible}
        found[group] = [
            Option(
                type,
                _bytes(type, group, shapes),
                Divergence(measured.text * scale[type], measured.refusal * scale[type]),
            )
            for type in possible
        ]
    return found


def _possible(group: Group, shapes: Shapes, *, imatrix: bool, floor: float) -> list[str]:
    weighed = imatrix and group.first is not None  # importance matrices hold nothing of embeddings and head
    widths = {shapes[name][0] for name in group.tensors}
    lists = [candidates(width, imatrix=weighed) for width in widths]
    found = [type for type in lists[0] if all(type in others for others in lists[1:])]
    return [type for type in found if _bits(type) >= floor] or found or ["F16"]


def _bits(type: str) -> float:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return 8 * int(size) / int(block)


def bytes_in(type: str, shape: tuple[int, ...]) -> int:
    """Of a tensor of that shape."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    return int(np.prod(shape)) // int(block) * int(size)


def _bytes(type: str, group: Group, shapes: Shapes) -> int:
    return sum(padded(bytes_in(type, shapes[name])) for name in group.tensors)


def padded(nbytes: int) -> int:
    """What a tensor takes in the file."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _rounded(weight: torch.Tensor, columns: NDArray[np.float32] | None) -> torch.Tensor:
    import torch

    return torch.from_numpy(round_weights(weight.detach().float().cpu().numpy(), _ANCHOR, columns))


def _errors(weight: torch.Tensor, types: set[str], columns: NDArray[np.float32] | None) -> dict[str, float]:
    """Squared change of the weights, columns weighed, summed over the matrix; by type."""
    rows = weight.detach()[:: max(1, len(weight) // _SAMPLED)].float().cpu().numpy()
    scale = len(weight) / len(rows)
    weighed = np.ones(rows.shape[1], np.float32) if columns is None else columns
    exact = rows.astype(np.float16).astype(np.float64)

    def error(type: str) -> float:
        if type == "F16":
            return 0.0
        change = round_weights(rows, type, columns) - exact
        return scale * float((change**2 * weighed).sum())

    return {type: error(type) for type in sorted(types)}


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


def _probe(context: Context, family: Family, model: PreTrainedModel, folder: Path, params: AutoParams) -> Probe:
    from transformers import AutoTokenizer

    from stages.data.calibration import Calibration, batches

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    mix = params.calibration
    material = Calibration(
        family, folder, model, tokenizer, "train", length=mix.length, pictures=mix.pictures, seed=context.seed
    )
    kinds = material.kinds()
    ordinary = [material.passage(kind, number) for kind, count in mix.counts(kinds).items() for number in range(count)]
    refusing = [material.refusal(number) for number in range(params.refusals)] if "prompt" in kinds else []

    def batched(passages: list[Passage]) -> list[Batch]:
        return list(batches(sorted(passages, key=lambda passage: passage.order), _TOGETHER))

    embedding = cast("torch.nn.Module", model.get_input_embeddings())
    return Probe(family.trunk(model), family.head(model), embedding, batched(ordinary), batched(refusing))


def _noted(scratch: Path) -> dict[str, list[float]]:
    try:
        noted = json.loads((scratch / _NOTED).read_bytes())
        return {name: [float(value) for value in pair] for name, pair in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _note(scratch: Path, noted: Mapping[str, Sequence[float]]) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    part = scratch / f"{_NOTED}.tmp"
    part.write_text(json.dumps(noted), encoding="utf-8")
    part.replace(scratch / _NOTED)
