"""A checkpoint folder as transformers saves it: read with suspicion, written deterministically.

Only safetensors are read; pickles (`*.bin`, `*.pt`, ...) and code that comes with a model are refused, since both can
run anything on the reader's machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast

from artifacts.errors import SourceError
from artifacts.manifest import sha256_bytes, sha256_file
from stages.models.gptq import interpreted, loading_arguments, silent

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["float32", "bfloat16", "float16"]

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

# What belongs to a checkpoint beside config and weights; everything else in a source folder is left behind.
COMPANIONS: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack")


def read_config(folder: Path) -> dict[str, object]:
    """config.json, and a look at the other JSON files for code that the model wants to bring along.

    Raises:
        SourceError: no folder, no or unreadable config.json, or `auto_map` (remote code).
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}", way_out="give the folder that holds config.json")
    config = _read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in _read_json(path):
            raise SourceError(
                f"{name} asks for code that comes with the model (auto_map)",
                where=str(path),
                why="such code could do anything on this machine; it is never run",
                way_out="use a checkpoint of a model class that transformers itself has, without auto_map",
            )
    return config


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"there is no {path.name}",
            where=str(path.parent),
            why="a checkpoint as transformers saves it has one",
            way_out="give the folder that holds config.json and the *.safetensors files",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path.name} cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(content, dict):
        raise SourceError(f"{path.name} is not a JSON object", where=str(path))
    return cast("dict[str, object]", content)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each whole by its own header.

    Raises:
        SourceError: none there, only pickles there, one is missing, truncated or damaged.
    """
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SourceError(f"{INDEX} lists no files", where=str(folder))
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise SourceError(f"{INDEX} names a file outside its folder", where=str(folder))
    else:
        names = [WEIGHTS]
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise _missing(path)
        _check_safetensors(path)
    return paths


def _missing(path: Path) -> SourceError:
    pickles = sorted(p.name for p in path.parent.iterdir() if any(fnmatch(p.name, pattern) for pattern in _PICKLES))
    if pickles:
        return SourceError(
            f"{path.name} is missing; {pickles[0]} is there, but pickles are never read",
            where=str(path.parent),
            why="unpickling a weight file can run any code on this machine",
            way_out="save the model again with save_pretrained(...), which writes safetensors",
        )
    return SourceError(
        f"the weight file {path.name} is missing",
        where=str(path.parent),
        way_out="copy or download the checkpoint again",
    )


def _check_safetensors(path: Path) -> None:
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as handle:
            handle.keys()
    except (safetensors.SafetensorError, OSError) as error:
        raise SourceError(
            f"the weight file {path.name} is truncated or damaged",
            where=str(path),
            why=f"{error} (it has {path.stat().st_size} bytes)",
            way_out="copy or download it again",
        ) from error


def tensor_digests(path: Path, containing: str) -> dict[str, str]:
    """Name -> SHA-256 over dtype, shape and bytes, of the tensors of a safetensors file whose names hold a word.

    Reads the bytes themselves (the format is a length, a JSON header, the data), since numpy has no bfloat16.
    """
    found: dict[str, str] = {}
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, dict[str, object]] = json.loads(handle.read(size))
        for name, entry in header.items():
            if name == "__metadata__" or containing not in name:
                continue
            begin, end = cast("tuple[int, int]", entry["data_offsets"])
            handle.seek(8 + size + begin)
            described = f"{entry['dtype']} {entry['shape']}\n".encode()
            found[name] = sha256_bytes(described + handle.read(end - begin))
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its chat template wherever that lies: in a file of its own, as processors
    have it, where the tokenizer's settings have none. No code out of the folder is run.

    Raises:
        SourceError: there is none, or a file is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        beside = folder / "chat_template.json"  # which transformers reads for processors alone
        if beside.is_file() and not tokenizer.chat_template:
            tokenizer.chat_template = str(json.loads(beside.read_bytes())["chat_template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).strip().splitlines()
        raise SourceError(
            "the checkpoint's tokenizer cannot be read", where=str(folder), why=why[0] if why else None
        ) from error
    return tokenizer


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        ValueError: not a floating type that weights are kept in.
    """
    import torch

    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if found is None:
        raise ValueError(f"dtype {name!r} is none of float32, bfloat16, float16")
    return found


def dtype_of(config: Mapping[str, object]) -> DType:
    """The dtype that a config.json says its weights have; float32 where it says nothing."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return cast("DType", name) if name in ("float32", "bfloat16", "float16") else "float32"


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu", *, images: bool = True) -> PreTrainedModel:
    """Load a checkpoint in eval mode, gradients off; safetensors only, no remote code, no network.

    Args:
        images: image-text-to-text; else a causal language model.

    Raises:
        SourceError: a weight file is missing or damaged, tensors are missing or have other shapes, or a quantized
            checkpoint needs what is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    quantized = loading_arguments(read_config(folder), where=str(folder))
    weight_files(folder)
    logging.disable_progress_bar()  # progress belongs to events, not to stderr
    try:
        with silent() if quantized else nullcontext():
            model, info = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_pretrained(
                folder,
                dtype=torch_dtype(dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **quantized,
            )
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()
        raise SourceError("the checkpoint cannot be loaded", where=str(folder), why=why[0] if why else None) from error
    missing = sorted(str(name) for name in info["missing_keys"])
    if missing:
        raise SourceError(
            f"{len(missing)} tensors are missing, {missing[0]} first",
            where=str(folder),
            why="config.json describes a larger or another model than the weight files hold",
            way_out="copy or download the checkpoint again",
        )
    loaded = cast("PreTrainedModel", model)
    if quantized:
        interpreted(loaded)
    return cast("PreTrainedModel", loaded.to(device).eval().requires_grad_(False))


def save_model(model: PreTrainedModel, folder: Path, companions_from: Path) -> None:
    """Write config and safetensors of `model` into `folder`, with tokenizer, templates and processors of another one.

    The same weights give the same bytes.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    copy_companions(companions_from, folder)
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """safetensors writes files that only their owner may read: another user of a shared store could not."""
    for path in folder.iterdir():
        path.chmod(0o644)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside config and weights; generation_config.json only where there is none."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or not any(fnmatch(path.name, pattern) for pattern in COMPANIONS):
            continue
        if path.name == "generation_config.json" and (target / path.name).exists():
            continue
        shutil.copyfile(path, target / path.name)


def content_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that a checkpoint is made of; the rest of the folder is not read.

    Raises:
        SourceError: as `read_config` and `weight_files`.
    """
    read_config(folder)
    files = [folder / "config.json", *weight_files(folder)]
    files += [p for p in folder.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in COMPANIONS)]
    return files_digest(sorted(files))


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents, in the order given."""
    return sha256_bytes("".join(f"{path.name}\0{sha256_file(path)}\n" for path in paths).encode())
