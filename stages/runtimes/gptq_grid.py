"""The grid that GPTQ puts weights on, rounded to nearest.

GPTQ (Frantar et al., 2023) does two things: it lays a grid of 2^bits values over every group of a row, and it rounds
the columns one after another, correcting the ones still to come for the error made so far, by the Hessian of the
calibration data. Here is only the first: the grid of GPTQModel 7.6 (quantization/quantizer.py, `Quantizer.find_params`
with its defaults `sym=True, mse=0`), to which every weight is rounded by itself. So training meets steps of the size
that ships, not the very weights: those depend on data and on all other columns, and take minutes to compute. Groups are
consecutive columns, as with `desc_act=False`; a last group that is not full is a group of its own, as there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    import torch

BITS: Final = (2, 3, 4, 8)
GROUPS: Final = (16, 32, 64, 128, 256, 512, 1024)  # columns; what GPTQModel's kernels know
_DEFAULT_GROUP: Final = 128
_NAME: Final = re.compile(r"gptq-(\d+)bit(?:-(\d+))?")


@dataclass(frozen=True)
class Grid:
    bits: int
    group: int  # columns that share a scale

    @property
    def name(self) -> str:
        return f"gptq-{self.bits}bit-{self.group}"


def is_grid(name: str) -> bool:
    """Whether a quantizer's name means GPTQ."""
    return name.startswith("gptq")


def parse_grid(name: str) -> Grid:
    """`gptq-4bit`, or with the group size `gptq-4bit-64`; 128 when left out, as in GPTQModel.

    Raises:
        RecipeError: not such a name, or bits or a group that GPTQModel has no kernel for.
    """
    match = _NAME.fullmatch(name)
    if match:
        grid = Grid(int(match[1]), int(match[2] or _DEFAULT_GROUP))
        if grid.bits in BITS and grid.group in GROUPS:
            return grid
    raise RecipeError(
        f"weights cannot be rounded to {name!r}",
        why=f"a GPTQ quantizer is gptq-<bits>bit or gptq-<bits>bit-<group>, bits one of {', '.join(map(str, BITS))}, "
        f"group one of {', '.join(map(str, GROUPS))}",
        way_out="use gptq-4bit, or gptq-4bit-64, with the bits and the group size of the gptq stage",
    )


def round_to_grid(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The float32 values of (rows, width) weights after each was rounded to the nearest point of its group's grid.

    Scales are float16 and so are the products, as in the files and in GPTQModel's kernels.
    """
    import torch

    groups = torch.split(weights, grid.group, dim=1)
    return torch.cat([_round_group(group.float(), grid.bits) for group in groups], dim=1)


def _round_group(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns of one group)."""
    import torch

    top = 2**bits - 1
    zero = (top + 1) // 2  # the code that stands for 0
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    high = torch.maximum(low.abs(), high)
    # A group without negative weights keeps its lower bound 0 although the zero stays in the middle: half of its range
    # is cut off. So it is in GPTQModel, and so it ships.
    low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = ((high - low) / top)[:, None]
    codes = torch.clamp(torch.round(weights / scale) + zero, 0, top)
    values: torch.Tensor = (codes - zero) * scale.half().float()
    return values.half().float()
