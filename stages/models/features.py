"""Encode once, project many: one pass of the frozen image encoder gives every exit, kept on disk for all later uses.

Notable: keyed by image bytes and by what the encoder computes (its weights, its config, the image processor), so
checkpoints that share a tower share features; images are encoded one at a time in float32, so a feature does not depend
on what it was encoded with, nor on a run having been interrupted; files appear by rename, so processes may share them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.disk import write_cached
from artifacts.errors import SourceError
from artifacts.home import cache_dir
from artifacts.manifest import canonical_json, sha256_bytes, sha256_file
from stages.models import checkpoint
from stages.models.family import Geometry, family_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # done, total

_BESIDE: Final = ("dtype", "torch_dtype", "transformers_version", "architectures")  # save_pretrained adds them
_LAYOUT: Final = 2  # raise it when the files mean something else


Select = Callable[[NDArray[np.floating], int], NDArray[np.floating]]
"""The features of one exit (patches, width) out of an image's (exits 0..L, patches, width)."""


@dataclass(frozen=True)
class _Entry:
    """What is kept of one image."""

    states: NDArray[np.floating]  # (exits 0..L, patches, width), memory-mapped
    geometry: Geometry


class Features:
    """Exit features of some images, memory-mapped; images may have different numbers of patches."""

    def __init__(self, entries: Sequence[_Entry], select: Select):
        self._entries = tuple(entries)
        self._select = select

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int | tuple[int, int]) -> NDArray[np.floating]:
        """`[image]` is all that was kept, (exits 0..L, patches, width), a view of which nothing is read yet;
        `[image, exit]` is what the family projects, (patches, vision width)."""
        if isinstance(index, tuple):
            image, exit = index
            return self._select(self._entries[image].states, exit)
        return self._entries[index].states

    def geometry(self, image: int) -> Geometry:
        """What the family must know of the image beside its features."""
        return self._entries[image].geometry


class ExitFeatures:
    """The features of one checkpoint's image encoder.

    Args:
        folder: the checkpoint.
        model: that checkpoint, if it is loaded anyway; else it is loaded when an image is not in the cache, and let go.
        cache: where; `cache_dir()/features` when None.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel | None = None,
        cache: Path | None = None,
    ):
        self._folder = folder
        self._model = model
        config = checkpoint.read_config(folder)
        self._family = family_of(config, where=str(folder))
        vision = self._family.spec(config).vision
        if vision is None:
            raise SourceError("the model has no image encoder", where=str(folder))
        self.encoder_digest = encoder_digest(folder)
        self._files = (cache or cache_dir() / "features") / self.encoder_digest / "float32"
        self._exits = vision.layers + 1
        self._select: Select = partial(self._family.exit_features, config)

    def get(self, images: Sequence[Path], progress: Progress | None = None) -> Features:
        """Features of every image, encoding those that the cache lacks.

        Raises:
            SourceError: an image cannot be read.
        """
        paths = [self._files / f"{_image_digest(image)}.npy" for image in images]
        opened: dict[Path, _Entry] = {}
        missing: dict[Path, Path] = {}  # cache file -> image
        for path, image in zip(paths, images, strict=True):
            entry = self._open(path)
            if entry is None:
                missing[path] = image
            else:
                opened[path] = entry
        if missing:
            model = self._encoder()
            for done, (path, image) in enumerate(missing.items()):
                if progress is not None:
                    progress(done, len(missing))
                self._encode(model, image, path)
                entry = self._open(path)
                if entry is None:
                    raise SourceError("a feature file could not be read back", where=str(path))
                opened[path] = entry
        return Features([opened[path] for path in paths], self._select)

    def _encoder(self) -> PreTrainedModel:
        """The model at hand, if it computes in float32: what is cached must not depend on who asked first."""
        if self._model is not None and str(self._model.dtype) == "torch.float32":
            return self._model
        return self._family.load(self._folder)

    def _encode(self, model: PreTrainedModel, image: Path, path: Path) -> None:
        import torch

        inputs = self._family.image_inputs(self._folder, open_image(image))
        with torch.inference_mode():
            states = self._family.hidden_states(model, inputs)
        array: NDArray[np.floating] = states.float().cpu().numpy()
        geometry = json.dumps(self._family.geometry(inputs)).encode()
        write_cached(path.with_suffix(".json"), lambda handle: handle.write(geometry))
        write_cached(path, lambda handle: np.save(handle, array, allow_pickle=False))

    def _open(self, path: Path) -> _Entry | None:
        """What those files hold; None if there are none, or half-written or foreign ones."""
        try:
            states: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
            geometry = json.loads(path.with_suffix(".json").read_bytes())
        except (OSError, ValueError, EOFError):
            return None
        fits = states.ndim == 3 and states.shape[0] == self._exits and states.dtype == np.float32
        return _Entry(states, tuple(geometry)) if fits and isinstance(geometry, list) else None


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
    names = family_of(config, where=str(folder)).tower
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
        tensors |= checkpoint.tensor_digests(path, containing=names)
    parts += [f"{name} {digest}" for name, digest in sorted(tensors.items())]
    return sha256_bytes("\n".join(parts).encode())


def _image_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise SourceError("the image cannot be read", where=str(path), why=str(error)) from error
