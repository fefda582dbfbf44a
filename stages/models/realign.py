"""Realignment: the projector is told how an earlier exit's features differ from those it was trained on.

A projector knows the features of one exit only; at an earlier one it meets others and the model half sees. Most of the
difference is affine: features x_l of exit l are mapped to those of the default exit by least squares,
min |M x_l + c - x_d|^2 over the patches of unlabelled images, and M and c are folded into the projector's first linear
layer, so nothing is added to the model and nothing is trained. (Affine short cuts between the layers of a transformer:
Din et al., 2023, arXiv 2303.09435; there for language models, beside the model.)

Sums of products are all that is kept of an image, so memory does not grow with their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from artifacts.errors import StageError

if TYPE_CHECKING:
    import torch

_RIDGE: Final = 1e-3  # of the mean variance of a channel


@dataclass(frozen=True)
class Affine:
    """x -> matrix @ x + offset, both float64: (width, width) and (width,)."""

    matrix: torch.Tensor
    offset: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features.double() @ self.matrix.T + self.offset


class AffineFit:
    """Least squares with a small ridge, from pairs that are added image by image."""

    def __init__(self, width: int):
        import torch

        self._patches = 0
        self._products = torch.zeros(width, width, dtype=torch.float64)  # x x^T
        self._crossed = torch.zeros(width, width, dtype=torch.float64)  # x y^T
        self._from = torch.zeros(width, dtype=torch.float64)
        self._to = torch.zeros(width, dtype=torch.float64)

    def add(self, features: torch.Tensor, wanted: torch.Tensor) -> None:
        """Both (patches, width): of the early exit, and of the exit that the projector knows."""
        x, y = features.double().cpu(), wanted.double().cpu()
        self._patches += x.shape[0]
        self._products += x.T @ x
        self._crossed += x.T @ y
        self._from += x.sum(0)
        self._to += y.sum(0)

    def solve(self) -> Affine:
        """Raises:
        StageError: too few patches to tell the channels apart.
        """
        import torch

        width = self._from.shape[0]
        if self._patches < 4 * width:
            raise StageError(
                f"{self._patches} patches are too few to realign {width} channels",
                why=f"at least {4 * width} are needed",
                way_out="raise realign_images",
            )
        mean, wanted = self._from / self._patches, self._to / self._patches
        covariance = self._products / self._patches - torch.outer(mean, mean)
        crossed = self._crossed / self._patches - torch.outer(mean, wanted)
        ridge = _RIDGE * covariance.diagonal().mean()
        matrix = torch.linalg.solve(covariance + ridge * torch.eye(width, dtype=torch.float64), crossed).T
        return Affine(matrix, wanted - matrix @ mean)


def fold(affine: Affine, layer: torch.nn.Linear) -> None:
    """Make `layer(x)` what `layer(affine(x))` was; its inputs may be several feature vectors in a row.

    Raises:
        StageError: the layer does not take such features.
    """
    import torch

    width = affine.offset.shape[0]
    if layer.in_features % width:
        raise StageError(f"a layer of {layer.in_features} inputs does not take features of {width} channels")
    with torch.no_grad():
        parts = layer.weight.double().view(layer.out_features, -1, width)
        offset = (parts @ affine.offset.to(parts.device)).sum(1)
        layer.weight.copy_((parts @ affine.matrix.to(parts.device)).view_as(layer.weight))
        if layer.bias is None:
            layer.bias = torch.nn.Parameter(offset.to(layer.weight.dtype), requires_grad=False)
        else:
            layer.bias.add_(offset.to(layer.bias.dtype))


def explained(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """R^2, averaged over channels; both (patches, width). 1: equal, 0: no better than the mean."""
    error = (wanted - found).double().square().sum(0)
    spread = (wanted - wanted.mean(0)).double().square().sum(0).clamp_min(1e-12)
    return float((1 - error / spread).mean())
