"""Fidelity: whether the deployed runtime gives the language model the image embeddings that transformers would give.

Cosine of the flattened embeddings of one image (tokens times width) at one exit; the row's value is the smallest over
the images, because a gate must see the worst. Reference: transformers on the checkpoint `fidelity_to`, by default the
hardened one, else the baseline. The baseline serves because no stage before the GGUF touches the tower's weights: cut
after l blocks, it is the shipped tower. Where a stage does change the tower, name the checkpoint in `fidelity_to`;
otherwise the cosine falls and the gate stops, which is the safe side.

A runtime may lose image tokens: llama.cpp drops the first patch of a CLIP tower and hands over CLS as the last token
(`stages.runtimes.llamacpp_cls`). What is compared is then every token that is meant to be a patch, with that patch, and
`fidelity_lost_tokens` says how many of the reference's tokens never arrive, which no cosine would show fairly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.measures import Measure
from stages.runtimes.runtime import Runtime
from stages.verify.scores import Answers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Embeddings:
    """What one runtime gives the language model for some images."""

    by_exit: Mapping[int, Sequence[NDArray[np.float32]]] = field(default_factory=dict)  # (tokens, width) an image
    slots: Sequence[Sequence[int] | None] = ()  # an image: `Runtime.image_slots`


def embeddings(runtime: Runtime, exits: Sequence[int], images: Sequence[Path], own: int | None = None) -> Embeddings:
    """What the language model receives for each image at each of these exits.

    `own`: where the artifact says that its files leave the encoder. There they are used as they are, so files that
    leave it elsewhere are found out.
    """
    return Embeddings(
        {exit: [runtime.image_embeddings(None if exit == own else exit, image) for image in images] for exit in exits},
        [runtime.image_slots(image) for image in images] if exits else (),
    )


def fidelity_rows(one: Answers, deployed: Embeddings, reference: Embeddings, reference_id: str | None) -> list[Measure]:
    """`fidelity_cosine` (smallest over images), `fidelity_cosine_mean`, and `fidelity_lost_tokens` (most of an image)
    where the runtime loses any, per exit."""
    rows: list[Measure] = []
    for exit in one.exits:

        def row(name: str, value: float | None, note: str, n: int | None = None, exit: int = exit) -> Measure:
            unit = "image tokens" if name.endswith("tokens") else "cosine"
            return one.row(name, value, exit=exit, unit=unit, n=n, note=note)

        if exit not in deployed.by_exit or exit not in reference.by_exit:
            known = exit in deployed.by_exit
            why = f"'{reference_id}' has no exit {exit}" if known else f"exit {exit} was not measured"
            if reference_id is None:
                why = "there is no checkpoint to compare with: give one as the baseline"
            rows.append(row("fidelity_cosine", None, why))
            continue
        pairs = list(zip(deployed.by_exit[exit], reference.by_exit[exit], deployed.slots, strict=True))
        wrong = [(here.shape, there.shape) for here, there, slots in pairs if not _comparable(here, there, slots)]
        if wrong or not pairs:
            why = f"image embeddings are {wrong[0][0]} here and {wrong[0][1]} in '{reference_id}'" if wrong else ""
            rows.append(row("fidelity_cosine", None, why or "no images"))
            continue
        cosines = [cosine(*_kept(here, there, slots)) for here, there, slots in pairs]
        if not all(map(math.isfinite, cosines)):
            rows.append(row("fidelity_cosine", None, "an image's embeddings are not all numbers", len(cosines)))
            continue
        lost = max(len(there) - len(_kept(here, there, slots)[1]) for here, there, slots in pairs)
        against = f"transformers on '{reference_id}'" + (f"; without {lost} that the runtime loses" if lost else "")
        if any(_reordered(slots) for _, _, slots in pairs):
            against += "; they arrive in another order"
        rows += [
            row("fidelity_cosine", min(cosines), against, len(cosines)),
            row("fidelity_cosine_mean", sum(cosines) / len(cosines), against, len(cosines)),
        ]
        if lost:
            most = max(len(there) for _, there, _ in pairs)
            rows.append(row("fidelity_lost_tokens", float(lost), f"of {most} that transformers gives", len(cosines)))
    return rows


def _comparable(here: NDArray[np.float32], there: NDArray[np.float32], slots: Sequence[int] | None) -> bool:
    if slots is None:
        return here.shape == there.shape
    return len(here) == len(slots) and here.shape[1:] == there.shape[1:] and max(slots) < len(there)


def _reordered(slots: Sequence[int] | None) -> bool:
    """Whether the language model reads the kept tokens in another order than the reference's."""
    kept = [slot for slot in slots or () if slot >= 0]
    return kept != sorted(kept)


def _kept(
    here: NDArray[np.float32], there: NDArray[np.float32], slots: Sequence[int] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The rows that are meant to be the same."""
    if slots is None:
        return here, there
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    return here[rows], there[[slots[row] for row in rows]]


def cosine(here: NDArray[np.float32], there: NDArray[np.float32]) -> float:
    """Cosine of two arrays of one shape, flattened, in double precision; 0 if either is all zero."""
    import numpy as np

    a, b = here.astype(np.float64).ravel(), there.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0
