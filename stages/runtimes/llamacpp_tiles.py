"""LLaVA-NeXT's tiles in llama.cpp, and which of transformers' image tokens they are.

transformers gives the overview, then the patches of all tiles row by row across the whole picture, padding cut away,
each row ended by `image_newline`. llama.cpp (0.3.36: mtmd.cpp, the projector `mlp`) gives tile after tile, padding and
all, then the overview, and no `image_newline`; of a picture not larger than the encoder's square it makes the overview
alone. So the language model reads the same patches in another order than it was trained on. Whoever turns this round in
llama.cpp will see the fidelity measured here fall, and the gate stop.
"""

from __future__ import annotations

from pathlib import Path

from stages.runtimes.gguf_header import VisionHeader
from stages.runtimes.llamacpp_cls import image_slots


def tile_slots(vision: VisionHeader, image: Path) -> tuple[int, ...]:
    """For each of llama.cpp's image tokens, the row of transformers' that it should be; -1: none."""
    import torch
    from PIL import Image
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    with Image.open(image) as picture:
        width, height = picture.size
    tokens, size = vision.pass_tokens, vision.image_size
    side = size // vision.patch_size
    overview = image_slots(vision.cls_order if vision.has_cls else None, tokens)
    if width <= size and height <= size:
        return overview
    candidates = [[rows * size, columns * size] for rows, columns in vision.grids]
    best_height, best_width = select_best_resolution((height, width), candidates)
    rows, columns = best_height // size, best_width // size
    numbers = torch.arange(rows * side * columns * side).reshape(1, rows * side, columns * side)
    # A row of patches and its newline; the overview stands before them all.
    kept = unpad_image(numbers, (height, width))[0]
    reference = {
        int(patch): tokens + y * (kept.shape[1] + 1) + x for y, row in enumerate(kept) for x, patch in enumerate(row)
    }
    found: list[int] = []
    for row in range(rows):
        for column in range(columns):
            for slot in overview:
                y, x = divmod(slot, side)
                patch = (row * side + y) * columns * side + column * side + x
                found.append(reference.get(patch, -1) if slot >= 0 else -1)
    return (*found, *overview)
