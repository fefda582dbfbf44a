"""Stage `source`: a model from the demo, a local folder, a hub or a GGUF file becomes the first artifact of a run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError, SourceError
from artifacts.manifest import Training
from stages.data import hub
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.licence import licence_of
from stages.models.smol_llava import SOURCES, assemble, smol_llava_spec
from stages.models.spec import ModelSpec
from stages.models.tiny import build_tiny_llava, tiny_llava_spec
from stages.runtimes import finished
from stages.stage import Context, Located, Planned, Stage, StageParams

Kind = Literal["demo", "folder", "hub", "gguf"]


@dataclass(frozen=True)
class _Demo:
    """A model that the project itself puts together."""

    spec: Callable[[], ModelSpec]
    build: Callable[[Path], None]
    downloads: tuple[str, ...] = ()
    weights: str = ""  # below recipes/demo/; part of the content key
    trained: bool = False  # whether on our training prompts; see recipes/demo/material.py


_DEMOS: Final[Mapping[str, _Demo]] = {
    "smol-llava": _Demo(
        smol_llava_spec,
        assemble,
        SOURCES,
        "smol-llava.safetensors",
        trained=True,
    ),
    "tiny-llava": _Demo(tiny_llava_spec, build_tiny_llava),
}


class SourceParams(StageParams):
    model: Annotated[str, Located()] = Field(
        description="demo:smol-llava, a folder (./NAME or absolute), a Hugging Face id (ORG/NAME or hub:ORG/NAME), or "
        "a finished GGUF (./NAME.gguf, or the folder that it lies in)"
    )
    mmproj: Annotated[str | None, Located()] = Field(
        default=None, description="the image encoder of a GGUF; default: the one beside it; none: leave it out"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch of a Hugging Face id; pin a commit")
    dtype: checkpoint.DType = Field(default="float32", description="the type that the weights are kept in")
    as_is: bool = Field(
        default=False,
        description="take the files byte for byte, as verifying what ships needs it; what is GGUF or GPTQ always is",
    )


class SourceStage(Stage[SourceParams]):
    """Reads safetensors only and runs no code that comes with a model."""

    name = "source"
    code_version = "2"
    summary = "read a model from the demo, a local folder or a hub"
    accepts = ()
    output_type = "checkpoint"
    libraries = ("torch", "transformers")
    Params = SourceParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        kind, name = parse_model(self.params.model)
        if self.params.revision is not None and kind != "hub":
            raise RecipeError(
                f"revision {self.params.revision!r} has no meaning for {self.params.model}",
                why="only a Hugging Face id has revisions",
                way_out="leave revision out",
            )
        if kind == "gguf":
            finished.gguf_files(Path(name), self.params.mmproj)
            return Planned(type="gguf")
        if self.params.mmproj is not None:
            raise RecipeError(f"mmproj has no meaning for {self.params.model}", way_out="leave mmproj out")
        try:
            spec = self._spec(kind, name)
            type = self._type(kind, name)
        except SourceError as error:  # known before any work: the recipe names what cannot work
            raise RecipeError(error.what, where=error.where, why=error.why, way_out=error.way_out) from error
        return Planned(type=type, spec=replace(spec, dtype=self.params.dtype) if spec else None)

    def _type(self, kind: Kind, name: str) -> finished.Finished:
        """What comes out; a hub's model that is not here yet is taken for a checkpoint."""
        if kind in ("demo", "gguf"):
            return "gguf" if kind == "gguf" else "checkpoint"
        folder = hub.cached(name, self.params.revision) if kind == "hub" else Path(name)
        return finished.folder_type(folder) if folder is not None else "checkpoint"

    def _spec(self, kind: Kind, name: str) -> ModelSpec | None:
        if kind == "demo":
            return _DEMOS[name].spec()
        folder: Path | None = Path(name)
        if kind == "hub":
            folder = hub.cached(name, self.params.revision)
            if folder is None:
                return None  # known once it is fetched
        assert folder is not None
        config = checkpoint.read_config(folder)
        spec = family_of(config, where=self.params.model).spec(config)
        if kind == "folder":
            checkpoint.weight_files(folder)
        return spec

    def fingerprint(self) -> str:
        kind, name = parse_model(self.params.model)
        if kind == "demo":
            return _demo_digest(_DEMOS[name])
        if kind == "gguf":
            files = tuple(finished.gguf_files(Path(name), self.params.mmproj).named)
            return _files_digest(files, tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))
        if kind == "folder":
            return _folder_digest(Path(name), _state(Path(name)))
        cached = hub.cached(name, self.params.revision)
        return cached.name if cached is not None else ""  # a snapshot's folder is named by its commit

    def downloads(self) -> Sequence[str]:
        kind, name = parse_model(self.params.model)
        if kind == "demo":
            return _DEMOS[name].downloads
        if kind == "hub":
            return (f"hub:{name}" + (f"@{self.params.revision}" if self.params.revision else ""),)
        return ()

    def training(self, inputs: Mapping[str, Artifact]) -> Training:
        kind, name = parse_model(self.params.model)
        if kind == "demo":
            whole = Training(complete=True)
            return whole.then(self.params.model) if _DEMOS[name].trained else whole
        if kind == "gguf":
            return finished.training_of_gguf(finished.gguf_files(Path(name), self.params.mmproj))
        folder = hub.cached(name, self.params.revision) if kind == "hub" else Path(name)
        return finished.training_of_folder(folder) if folder is not None else Training()

    def run(self, context: Context) -> Mapping[str, object]:
        kind, name = parse_model(self.params.model)
        context.progress(0, 2, f"reading {self.params.model}")
        planned = self._type(kind, name)
        if kind == "gguf":
            return finished.copy_gguf(finished.gguf_files(Path(name), self.params.mmproj), context.output)
        if kind == "demo":
            folder = context.output if self.params.dtype == "float32" else context.scratch / "assembled"
            _DEMOS[name].build(folder)
        elif kind == "folder":
            folder = Path(name)
        else:
            folder = hub.fetch(name, self.params.revision)
        family = family_of(checkpoint.read_config(folder), where=self.params.model)
        found = finished.folder_type(folder)
        if found != planned:
            raise SourceError(
                f"{self.params.model} is quantized by GPTQ",
                why="that is known only now that it has been downloaded, and the recipe was checked for a checkpoint",
                way_out="run the recipe again",
            )
        context.progress(1, 2, "writing")
        as_is = folder != context.output and (self.params.as_is or found != "checkpoint")
        if as_is:
            finished.copy_folder(folder, context.output)
        elif folder != context.output:
            # Loaded and saved, not copied: every tensor is checked, and later stages find transformers' own names.
            model = family.load(folder, dtype=self.params.dtype)
            checkpoint.save_model(model, context.output, companions_from=folder)
        checkpoint.make_readable(context.output)
        vision = family.spec(checkpoint.read_config(context.output)).vision
        context.progress(2, 2)
        return (finished.recorded(folder) if as_is else {}) or {
            "family": family.name,
            "exits": list(range(1, vision.layers + 1)) if vision else [],
            "default_exit": vision.default_exit if vision else None,
            # Not a folder's path: it says where something lay, not what it is.
            "model": Path(name).name if kind == "folder" else self.params.model,
            **licence_of(folder),
        }


def parse_model(model: str) -> tuple[Kind, str]:
    """What `model:` names: ("demo", name), ("folder", path), ("gguf", path) or ("hub", id).

    Raises:
        RecipeError: an unknown demo, or none of these forms.
    """
    kind, colon, rest = model.partition(":")
    if kind == "demo" and colon:
        if rest in _DEMOS:
            return "demo", rest
        near = difflib.get_close_matches(rest, _DEMOS, n=1, cutoff=0.0)
        raise RecipeError(f"unknown demo model {model!r}", way_out=f"did you mean demo:{near[0]}?")
    if kind == "hub" and colon and hub.is_id(rest):
        return "hub", rest
    if model.startswith(("./", "../", "~/", "/")) or Path(model).is_absolute():
        path = Path(model).expanduser()
        return "gguf" if finished.is_gguf(path) else "folder", str(path)
    if hub.is_id(model):
        return "hub", model
    raise RecipeError(
        f"{model!r} is no model that a source can read",
        way_out="write demo:smol-llava, a folder as ./NAME or /PATH, or a Hugging Face id as ORG/NAME",
    )


def _demo_digest(demo: _Demo) -> str:
    if not demo.weights:
        return ""
    with as_file(files("recipes") / "demo" / demo.weights) as path:
        return checkpoint.files_digest([path]) if path.is_file() else ""


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times: while these stay, the content is not read again in this process."""
    if not folder.is_dir():
        return ()
    return tuple(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()))


@lru_cache(maxsize=8)
def _files_digest(files: tuple[Path, ...], state: tuple[tuple[str, int, int], ...]) -> str:
    return checkpoint.files_digest(files)


@lru_cache(maxsize=8)
def _folder_digest(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    return checkpoint.content_digest(folder)
