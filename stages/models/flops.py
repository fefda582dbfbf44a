"""What an image encoder computes for one image, from shapes alone.

A multiplication and an addition count as two operations. With T tokens in a pass (patches, and CLS where there is one),
width d and intermediate width m, a block takes

    8 T d^2          queries, keys, values, output
    4 T^2 d          attention scores, and their sum over values
    4 T d m          the two layers of the MLP

and the patch embedding 6 P p^2 d for P patches of p x p pixels in three channels. Norms, biases and activations are
left out: they are below one percent of the rest. Towers that cut an image into tiles do all of it for each tile.
"""

from __future__ import annotations

from stages.models.spec import VisionSpec


def encoder_flops(vision: VisionSpec, blocks: int) -> int:
    """Operations for one image, at most, when the encoder is left after `blocks` blocks; the projector not counted."""
    tokens, width = vision.patches + vision.has_cls, vision.hidden_size
    block = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * vision.intermediate_size
    embedding = 6 * vision.patches * vision.patch_size**2 * width
    return vision.tiles * (embedding + blocks * block)
