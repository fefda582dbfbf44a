"""A finished model, taken as it is: a GGUF with its mmproj, a GPTQ folder, a checkpoint; copied byte for byte.

Notable: an artifact of ours keeps what its manifest says of it; of any other GGUF the header says how many exits its
image encoder has, and where it leaves it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError, StoreError
from artifacts.lineage import training_of
from artifacts.manifest import MANIFEST_NAME, Training
from stages.models import checkpoint
from stages.models.gptq import is_gptq
from stages.runtimes.gguf_header import check_language_model, read_vision_header
from stages.runtimes.gguf_parts import MMPROJ_NAME, MODEL_NAME, parts_of, read_model

Finished = Literal["gguf", "gptq", "checkpoint"]

NO_MMPROJ: Final = "none"
_PART: Final = re.compile(r"^.*(-\d{5}-of-\d{5}\.gguf)$")
_LATER: Final = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class GgufFiles:
    """The files of a GGUF model, wherever they lie and however they are called."""

    model: Path  # the first part, if there are several
    mmproj: Path | None

    @property
    def named(self) -> dict[Path, str]:
        """Every file, and what it is called in an artifact."""
        stem = MODEL_NAME.removesuffix(".gguf")
        parts = parts_of(self.model)
        found = {part: stem + _PART.sub(r"\1", part.name) if len(parts) > 1 else MODEL_NAME for part in parts}
        return found if self.mmproj is None else {**found, self.mmproj: MMPROJ_NAME}


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of such files that is no checkpoint."""
    if path.suffix == ".gguf":
        return True
    return path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))


def folder_type(folder: Path) -> Finished:
    """What a checkpoint folder is.

    Raises:
        SourceError: as `checkpoint.read_config`.
    """
    return "gptq" if is_gptq(checkpoint.read_config(folder)) else "checkpoint"


def gguf_files(path: Path, mmproj: str | None = None) -> GgufFiles:
    """The files that a GGUF path means.

    Args:
        path: the model's file, or a folder with one model in it.
        mmproj: the image encoder's file, "none", or None: the one file beside the model whose name says mmproj.

    Raises:
        RecipeError: there is none, or which one is meant cannot be told.
    """
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*.gguf"))
    projectors = [file for file in found if "mmproj" in file.name.lower()]
    if path.is_dir():
        models = [file for file in found if file not in projectors and not _LATER.search(file.name)]
        if len(models) != 1:
            raise RecipeError(
                f"{len(models)} GGUF models lie in {path.name}",
                where=str(path),
                why=", ".join(file.name for file in models) or "there is none",
                way_out="name the file itself",
            )
        path = models[0]
    if not path.is_file():
        raise RecipeError(
            f"there is no file {path.name}",
            where=str(path.parent),
            way_out="give a GGUF file, or the folder that holds it and its mmproj file",
        )
    if mmproj == NO_MMPROJ:
        return GgufFiles(path, None)
    if mmproj is not None:
        named = Path(mmproj).expanduser()
        if not named.is_file():
            raise RecipeError(
                f"there is no file {named.name}",
                where=str(named.parent),
                way_out=f"name the mmproj file, or {NO_MMPROJ}",
            )
        return GgufFiles(path, named)
    if len(projectors) > 1:
        raise RecipeError(
            f"{len(projectors)} image encoders lie beside {path.name}",
            where=str(folder),
            why=", ".join(file.name for file in projectors),
            way_out=f"name one as mmproj, or {NO_MMPROJ}",
        )
    return GgufFiles(path, projectors[0] if projectors else None)


def copy_gguf(files: GgufFiles, output: Path) -> Mapping[str, object]:
    """Copy the files under the names that an artifact has, and say what is in them.

    Raises:
        SourceError: a file is damaged, or none of its kind.
    """
    header = read_model(files.model)
    check_language_model(header)
    vision = read_vision_header(files.mmproj) if files.mmproj is not None else None
    for source, name in files.named.items():
        shutil.copyfile(source, output / name)
    return _recorded(files.model.parent, tuple(files.named)) or {
        "family": None,
        "architecture": header.architecture,
        "exits": list(range(1, vision.blocks + 1)) if vision else [],
        "default_exit": vision.default_exit if vision else None,
    }


def copy_folder(folder: Path, output: Path) -> None:
    """Copy what a checkpoint is made of, and nothing else that lies there.

    Raises:
        SourceError: as `checkpoint.read_config` and `checkpoint.weight_files`.
    """
    checkpoint.read_config(folder)
    files = [folder / "config.json", *checkpoint.weight_files(folder)]
    files += [folder / name for name in (checkpoint.INDEX, "quantize_config.json") if (folder / name).is_file()]
    for file in files:
        shutil.copyfile(file, output / file.name)
    checkpoint.copy_companions(folder, output)


def recorded(folder: Path) -> Mapping[str, object]:
    """What the manifest of an artifact of ours says of the checkpoint in a folder; nothing where there is none.

    Raises:
        SourceError: the files are not those of the manifest.
    """
    return _recorded(folder, _checkpoint_files(folder))


def training_of_folder(folder: Path) -> Training:
    """What the checkpoint in a folder was trained on, as far as a manifest of ours says it.

    Raises:
        SourceError: as `checkpoint.weight_files`.
    """
    return _training(folder, _checkpoint_files(folder))


def training_of_gguf(files: GgufFiles) -> Training:
    """The same of a GGUF's files."""
    return _training(files.model.parent, tuple(files.named))


def _checkpoint_files(folder: Path) -> tuple[Path, ...]:
    return (folder / "config.json", *checkpoint.weight_files(folder))


def _training(folder: Path, used: tuple[Path, ...]) -> Training:
    artifact = _ours(folder, used)
    if artifact is None:
        return Training()
    told = training_of(artifact)
    return Training(stages=told.stages) if artifact.damage(beside=True) else told  # changed since, nobody says by what


def _recorded(folder: Path, used: tuple[Path, ...]) -> Mapping[str, object]:
    artifact = _ours(folder, used)
    if artifact is None:
        return {}
    if damage := artifact.damage(beside=True):
        raise SourceError(
            "the files are not those of their manifest",
            where=str(folder),
            why="; ".join(damage),
            way_out=f"copy the artifact again, or remove {MANIFEST_NAME} to have the files measured for what they are",
        )
    return artifact.metadata


def _ours(folder: Path, used: tuple[Path, ...]) -> Artifact | None:
    """The artifact of ours that these files of a folder are of; beside it may lie what a bundle adds."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        artifact = Artifact.open(folder)
    except StoreError:
        return None  # a manifest.json of somebody else's
    if any(not any(entry.path == file.name for entry in artifact.manifest.files) for file in used):
        return None  # files from elsewhere beside it
    return artifact
