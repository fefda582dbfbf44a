"""What `chat` and `serve` open: a model wherever it lies, checked where asked, within a device's memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError, StageError

if TYPE_CHECKING:
    from artifacts.artifact import Artifact
    from artifacts.attestation_check import Policy
    from artifacts.bundle import Bundle
    from pipeline.device import Device
    from stages.runtimes.llamacpp_library import CacheType

_CELLS: Final = 256  # llama.cpp rounds a context up to multiples of this
_SHORTEST: Final = 512  # tokens
PLAN: Final = "memory.json"


@dataclass(frozen=True)
class FoundModel:
    """A model on disk. `model` is the file for llama.cpp, None of a checkpoint."""

    name: str
    type: str
    folder: Path
    model: Path | None = None
    mmproj: Path | None = None
    bundle: Bundle | None = None


@dataclass(frozen=True)
class Room:
    """How much a model may take while it answers. `predicted` and `budget` in bytes; None: not known."""

    context: int  # tokens; 0: as many as a question needs
    predicted: int | None = None
    budget: int | None = None
    device: str = ""
    kv_cache: CacheType = "F16"


def find_model(name: str, runs_dir: Path, policy: Policy | None = None, mmproj: Path | None = None) -> FoundModel:
    """The model that `name` means: a bundle's folder, a reference, a GGUF file, or what `find_artifact` finds.

    Raises:
        RecipeError, StoreError: there is none, or an image encoder was named for what has its own. GateError: the
            policy refuses it, or nothing is signed.
    """
    from artifacts.artifact import Artifact as Opened
    from artifacts.bundle import MANIFEST_NAME
    from artifacts.registry.place import looks_like_reference
    from pipeline.commands.check import refuse_untrusted
    from pipeline.commands.load import find_artifact
    from pipeline.commands.pull import kept_bundle

    path = Path(name).expanduser()
    if looks_like_reference(name) or (path / MANIFEST_NAME).is_file():
        _refuse_mmproj(mmproj, name)
        bundle = kept_bundle(name)
        if policy is not None:
            refuse_untrusted(bundle, policy)
        else:
            bundle.refuse_damage()
        title = bundle.manifest.annotations.get("org.opencontainers.image.title", "model")
        return _of_artifact(Opened.open(bundle.folder), title, bundle)
    if policy is not None:
        raise RecipeError(
            f"{name} is no bundle, so a policy cannot be checked",
            way_out="give a bundle's folder or a reference; or leave the policy out",
        )
    if path.is_file():
        from stages.runtimes.finished import gguf_files

        files = gguf_files(path, str(mmproj) if mmproj is not None else None)
        return FoundModel(path.stem, "gguf", path.parent, path, files.mmproj)
    artifact = find_artifact(name, runs_dir)
    _refuse_mmproj(mmproj, name)
    return _of_artifact(artifact, name, None)


def _refuse_mmproj(mmproj: Path | None, name: str) -> None:
    if mmproj is not None:
        raise RecipeError(
            f"--mmproj has no meaning for {name}",
            why="a bundle and an artifact bring their own image encoder",
            way_out="leave it out, or give the model's .gguf file",
        )


def _of_artifact(artifact: Artifact, name: str, bundle: Bundle | None) -> FoundModel:
    if artifact.type not in ("gguf", "checkpoint", "gptq"):
        raise RecipeError(
            f"an artifact of type {artifact.type!r} cannot answer",
            where=str(artifact.path),
            way_out="choose a gguf, a gptq or a checkpoint",
        )
    if artifact.type != "gguf":
        return FoundModel(name, artifact.type, artifact.path, bundle=bundle)
    from stages.runtimes.gguf_parts import model_file

    mmproj = artifact.path / "mmproj.gguf"
    return FoundModel(
        name, "gguf", artifact.path, model_file(artifact.path), mmproj if mmproj.is_file() else None, bundle
    )


def room_for(found: FoundModel, device: str | None, context: int | None, own: int = 0) -> Room:
    """The longest context up to what is asked for that fits the device's memory.

    Args:
        device: a profile's name; None: the one that the bundle was planned for, and none of a loose file.
        context: tokens; None: the device's.
        own: bytes that the program will take beyond what it takes by now.

    Raises:
        RecipeError: no such device, or not even a short context fits.
    """
    from stages.runtimes.gguf_parts import read_model

    profile = _profile(found, device)
    if found.model is None:
        return _of_checkpoint(found, profile, context, asked=device is not None)
    header = read_model(found.model)
    architecture = header.fields.get("general.architecture")
    trained = header.fields.get(f"{architecture}.context_length")
    wanted = context or (profile.context if profile is not None else 4096)
    wanted = min(wanted, trained) if isinstance(trained, int) else wanted
    if profile is None:
        return Room(wanted)
    return _fitting(found, profile, wanted, own)


def _of_checkpoint(found: FoundModel, profile: Device | None, context: int | None, *, asked: bool) -> Room:
    """A checkpoint takes what its plan says; transformers cannot be told to take less.

    Args:
        asked: the device was asked for, and is not only what the bundle was made for.
    """
    from pipeline.device import show_bytes

    if context is not None:
        raise RecipeError("--context is for GGUF models", why="transformers takes what a question needs")
    plan = _plan(found)
    planned = plan.get("measured") or plan.get("predicted")
    if profile is None or not isinstance(planned, int):
        if asked:
            raise RecipeError(
                f"the memory of {found.name} is not known",
                why="it has no plan" if found.bundle is None else f"its {PLAN} has no figure for a {found.type}",
                way_out="leave --device out",
            )
        return Room(0)
    if planned > profile.memory:
        raise RecipeError(
            f"{found.name} does not fit the device '{profile.name}'",
            why=f"it needs {show_bytes(planned)}, the device allows {show_bytes(profile.memory)}",
            way_out="choose a larger device, or a smaller model",
        )
    return Room(profile.context, planned, profile.memory, profile.name)


def _fitting(found: FoundModel, profile: Device, wanted: int, own: int) -> Room:
    from pipeline.device import show_bytes
    from stages.runtimes.prediction import predict_files

    assert found.model is not None
    context = wanted
    while True:
        try:
            plan = predict_files(found.model, found.mmproj, context, cache_type=profile.kv_cache)
            needed = plan.total + _taken(found) + own
        except StageError as error:
            raise RecipeError(
                "its memory cannot be planned", where=str(found.model), why=error.what, way_out="leave --device out"
            ) from error
        if needed <= profile.memory:
            return Room(context, needed, profile.memory, profile.name, profile.kv_cache)
        shorter = max(_SHORTEST, context // 2 // _CELLS * _CELLS)
        if context <= _SHORTEST:
            raise RecipeError(
                f"{found.name} does not fit the device '{profile.name}'",
                why=f"even a context of {context} tokens needs {show_bytes(needed)}, the device allows "
                f"{show_bytes(profile.memory)}",
                way_out="choose a larger device, or a smaller model",
            )
        context = shorter


def _taken(found: FoundModel) -> int:
    """Bytes that this program takes by now beyond the bare process that a prediction counts with."""
    import psutil

    from stages.runtimes.prediction import process_bytes

    resident: int = psutil.Process().memory_info().rss
    return max(0, resident - process_bytes(found.mmproj is not None))


def _profile(found: FoundModel, name: str | None) -> Device | None:
    from pipeline.device import Device, device, device_names
    from pipeline.explain import nearest

    if name is not None:
        try:
            return device(name)
        except KeyError:
            raise RecipeError(f"there is no device {name!r}", way_out=nearest(name, device_names())) from None
    data = _plan(found)
    if data.get("budget") is None:
        return None
    try:
        kept = {"kv_cache": data["kv_cache"]} if data.get("kv_cache") else {}
        return Device.model_validate(
            {"name": data["device"], "memory": data["budget"], "context": data["context"], **kept}
        )
    except (ValueError, KeyError) as error:
        raise RecipeError("the memory plan cannot be read", where=str(found.folder / PLAN), why=str(error)) from error


def _plan(found: FoundModel) -> dict[str, object]:
    """What a bundle says about memory; nothing of what is no bundle."""
    if found.bundle is None or PLAN not in found.bundle.manifest.files:
        return {}
    try:
        data = json.loads((found.folder / PLAN).read_bytes())
        if not isinstance(data, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise RecipeError("the memory plan cannot be read", where=str(found.folder / PLAN), why=str(error)) from error
    return data
