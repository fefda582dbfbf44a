"""The paper's thirds of an encoder: early, middle and late exits (arXiv 2411.04291, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

EncoderBand = Literal["early", "middle", "late"]
BANDS: Final[tuple[EncoderBand, ...]] = ("early", "middle", "late")


def band_of(exit: int, layers: int) -> EncoderBand:
    """The band of an exit of a tower with `layers` blocks: thirds, rounded up (24: 1-8, 9-16, 17-24).

    Raises:
        ValueError: the exit is not in 1..layers.
    """
    if not 1 <= exit <= layers:
        raise ValueError(f"exit {exit} is not in 1..{layers}")
    return BANDS[min(-(-exit * 3 // layers) - 1, 2)]


def exits_of(band: EncoderBand, exits: Iterable[int], layers: int) -> tuple[int, ...]:
    """Those of `exits` that lie in `band`."""
    return tuple(exit for exit in exits if band_of(exit, layers) == band)
