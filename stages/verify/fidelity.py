"""Fidelity: whether the deployed runtime gives the language model the image embeddings that transformers would give.

Cosine of the flattened embeddings of one image (tokens times width) at one exit; the row's value is the smallest over
the images, because a gate must see the worst. Reference: transformers on the checkpoint `fidelity_to`, by default the
hardened one, else the baseline. The baseline serves because no stage before the GGUF touches the tower's weights: cut
after l blocks, it is the shipped tower. Where a stage does change the tower, name the checkpoint in `fidelity_to`;
otherwise the cosine falls and the gate stops, which is the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.measures import Measure
from stages.runtimes.runtime import Runtime
from stages.verify.scores import Answers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Embeddings = Mapping[int, Sequence["NDArray[np.float32]"]]  # exit -> one array (tokens, width) an image


def embeddings(runtime: Runtime, exits: Sequence[int], images: Sequence[Path]) -> Embeddings:
    """What the language model receives for each image at each of these exits."""
    return {exit: [runtime.image_embeddings(exit, image) for image in images] for exit in exits}


def fidelity_rows(one: Answers, deployed: Embeddings, reference: Embeddings, reference_id: str) -> list[Measure]:
    """`fidelity_cosine` (smallest over images) and `fidelity_cosine_mean`, per exit."""
    rows: list[Measure] = []
    against = f"transformers on '{reference_id}'"
    for exit in one.exits:
        if exit not in deployed or exit not in reference:
            why = f"'{reference_id}' has no exit {exit}" if exit in deployed else f"exit {exit} was not measured"
            rows.append(one.row("fidelity_cosine", None, exit=exit, unit="cosine", note=why))
            continue
        pairs = list(zip(deployed[exit], reference[exit], strict=True))
        shapes = {(here.shape, there.shape) for here, there in pairs if here.shape != there.shape}
        if shapes or not pairs:
            here, there = shapes.pop() if shapes else ((), ())
            why = f"image embeddings are {here} here and {there} in '{reference_id}'" if pairs else "no images"
            rows.append(one.row("fidelity_cosine", None, exit=exit, unit="cosine", note=why))
            continue
        cosines = [cosine(here, there) for here, there in pairs]
        rows += [
            one.row("fidelity_cosine", min(cosines), exit=exit, unit="cosine", n=len(cosines), note=against),
            one.row(
                "fidelity_cosine_mean",
                sum(cosines) / len(cosines),
                exit=exit,
                unit="cosine",
                n=len(cosines),
                note=against,
            ),
        ]
    return rows


def cosine(here: NDArray[np.float32], there: NDArray[np.float32]) -> float:
    """Cosine of two arrays of one shape, flattened, in double precision; 0 if either is all zero."""
    import numpy as np

    a, b = here.astype(np.float64).ravel(), there.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0
