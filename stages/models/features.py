"""Encode once, project many: one pass of the frozen image encoder gives every exit, kept on disk for all later uses.

Notable: keyed by image bytes and by what the encoder computes (its weights, its config, the image processor), so
checkpoints that share a tower share features; images are encoded one at a time in float32, so a feature does not depend
on what it was encoded with, nor on a run having been interrupted; files appear by rename, so processes may share them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import SourceError
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from stages.models import checkpoint
from stages.models.family import family_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # done, total

_TOWER: Final = "vision_tower."  # in every LLaVA checkpoint, whatever stands before it
_BESIDE: Final = ("dtype", "torch_dtype", "transformers_version", "architectures")  # save_pretrained adds them
_LAYOUT: Final = 1  # raise it when the files mean something else


class Features:
    """Exit features of some images, memory-mapped: behaves as an array (images, exits 0..L, patches, width)."""

    def __init__(self, rows: Sequence[NDArray[np.floating]]):
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(images, exits, patches, width)."""
        exits, patches, width = self._rows[0].shape if self._rows else (0, 0, 0)
        return len(self._rows), exits, patches, width

    def __getitem__(self, index: int | tuple[int, int]) -> NDArray[np.floating]:
        """`[image]` is (exits, patches, width), `[image, exit]` is (patches, width); views, nothing is read yet."""
        if isinstance(index, tuple):
            image, exit = index
            row: NDArray[np.floating] = self._rows[image][exit]
            return row
        return self._rows[index]

    def select(self, images: Sequence[int], exits: Sequence[int]) -> NDArray[np.floating]:
        """Pairs of image and exit as one array in memory: (pairs, patches, width)."""
        return np.stack([self._rows[image][exit] for image, exit in zip(images, exits, strict=True)])


class ExitFeatures:
    """The features of one checkpoint's image encoder.

    Args:
        folder: the checkpoint.
        model: that checkpoint, if it is loaded anyway; else it is loaded when an image is not in the cache, and let go.
        dtype: how features are kept; float32 is exact, float16 takes half the disk.
        cache: where; `cache_dir()/features` when None.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        cache: Path | None = None,
    ):
        self._folder = folder
        self._model = model
        self._dtype = np.dtype(dtype)
        config = checkpoint.read_config(folder)
        self._family = family_of(config, where=str(folder))
        self.encoder_digest = encoder_digest(folder)
        self._files = (cache or cache_dir() / "features") / self.encoder_digest / dtype
        vision = self._family.spec(config).vision
        if vision is None:
            raise SourceError("the model has no image encoder", where=str(folder))
        self._exits = vision.layers + 1

    def get(self, images: Sequence[Path], progress: Progress | None = None) -> Features:
        """Features of every image, encoding those that the cache lacks.

        Raises:
            SourceError: an image cannot be read.
        """
        paths = [self._files / f"{_image_digest(image)}.npy" for image in images]
        opened: dict[Path, NDArray[np.floating]] = {}
        missing: dict[Path, Path] = {}  # cache file -> image
        for path, image in zip(paths, images, strict=True):
            row = self._open(path)
            if row is None:
                missing[path] = image
            else:
                opened[path] = row
        if missing:
            model = self._encoder()
            for done, (path, image) in enumerate(missing.items()):
                if progress is not None:
                    progress(done, len(missing))
                self._write(path, self._encode(model, image))
                row = self._open(path)
                if row is None:
                    raise SourceError("a feature file could not be read back", where=str(path))
                opened[path] = row
        return Features([opened[path] for path in paths])

    def _encoder(self) -> PreTrainedModel:
        """The model at hand, if it computes in float32: what is cached must not depend on who asked first."""
        if self._model is not None and str(self._model.dtype) == "torch.float32":
            return self._model
        return self._family.load(self._folder)

    def _encode(self, model: PreTrainedModel, image: Path) -> NDArray[np.floating]:
        import torch

        pixels = self._family.pixel_values(self._folder, [open_image(image)])
        with torch.inference_mode():
            states = self._family.hidden_states(model, pixels)[0]
        array: NDArray[np.floating] = states.float().cpu().numpy().astype(self._dtype)
        return array

    def _open(self, path: Path) -> NDArray[np.floating] | None:
        """The array in that file; None if there is none, or a half-written or foreign one."""
        try:
            row: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return row if row.ndim == 3 and row.shape[0] == self._exits and row.dtype == self._dtype else None

    def _write(self, path: Path, array: NDArray[np.floating]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                np.save(handle, array, allow_pickle=False)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def open_image(path: Path) -> Image:
    """An image in RGB, decoded now, so that a damaged file is noticed here.

    Raises:
        SourceError: missing, or not an image.
    """
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise SourceError("the image cannot be read", where=str(path), why=str(error)) from error


def encoder_digest(folder: Path) -> str:
    """SHA-256 over everything that an exit's features follow from: tower weights, tower config, image processor."""
    config = checkpoint.read_config(folder)
    tower = cast("Mapping[str, object]", config.get("vision_config") or {})
    computed = {key: value for key, value in tower.items() if key not in _BESIDE and not key.startswith("_")}
    parts = [
        f"layout {_LAYOUT}",
        canonical_json([computed, config.get("vision_feature_select_strategy")]).decode(),
    ]
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            parts.append(canonical_json(json.loads(path.read_bytes())).decode())
    tensors: dict[str, str] = {}
    for path in checkpoint.weight_files(folder):
        tensors |= checkpoint.tensor_digests(path, containing=_TOWER)
    parts += [f"{name} {digest}" for name, digest in sorted(tensors.items())]
    return sha256_bytes("\n".join(parts).encode())


def _image_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise SourceError("the image cannot be read", where=str(path), why=str(error)) from error
