"""`pipeline verify`: a recipe made of what was typed, with a model and a verification, and nothing of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import RecipeError

if TYPE_CHECKING:
    from pipeline.graph import Graph
    from pipeline.yaml_source import Value

_STAGE = "verify"
_TARGET = "target"


@dataclass(frozen=True)
class Wanted:
    """What is to be verified, and how.

    Attributes:
        target, baseline: a GGUF file or folder, a checkpoint folder (GPTQ or not), a Hugging Face id, demo:NAME, a
            bundle's folder or reference; or an artifact as `find_artifact` knows it.
        mmproj: the image encoder of a GGUF target; None: the one beside it.
        exits: "all", or numbers.
        gates: NAME=VALUE, as in a recipe's `gates`.
        settings: NAME=VALUE, a parameter of the stage icet-verify.
        device: a device profile.
    """

    target: str
    mmproj: str | None = None
    baseline: str | None = None
    exits: str = "all"
    judges: Sequence[str] = ()
    gates: Sequence[str] = ()
    settings: Sequence[str] = ()
    device: str | None = None


def verification(wanted: Wanted, runs_dir: Path) -> Graph:
    """The graph of one verification.

    Raises:
        RecipeError: as of a recipe. StoreError: an artifact that is not there.
    """
    from pipeline.commands.runs import VERIFICATION
    from pipeline.graph import build_graph
    from pipeline.recipe import recipe_of

    source: dict[str, Value] = {"model": _model(wanted.target, runs_dir), "as_is": True}
    if wanted.mmproj is not None:
        source["mmproj"] = wanted.mmproj if wanted.mmproj == "none" else str(Path(wanted.mmproj).expanduser().resolve())
    setting: dict[str, Value] = {"baseline": None, "exits": _exits(wanted.exits)}
    stages: dict[str, Value] = {}
    needs = "source"
    if wanted.baseline is not None:
        stages[_TARGET] = {"uses": "source", "with": source}
        source = {"model": _model(wanted.baseline, runs_dir), "as_is": True}
        setting |= {"baseline": "source", "baseline_exits": "shared"}
        needs = _TARGET
    if wanted.judges:
        setting["judges"] = list(wanted.judges)
    stages[_STAGE] = {"uses": "icet-verify", "needs": needs, "with": setting}
    data: dict[str, Value] = {"recipe": 1, "name": f"verify-{_slug(wanted.target)}", "source": source, "stages": stages}
    if wanted.device is not None:
        data["device"] = wanted.device
    overrides = [*(f"stages.{_STAGE}.with.{text}" for text in wanted.settings), *(f"gates.{g}" for g in wanted.gates)]
    return build_graph(recipe_of(data, VERIFICATION, overrides))


def _model(name: str, runs_dir: Path) -> str:
    """What `source: {model: ...}` takes for it."""
    from artifacts.registry.place import looks_like_reference
    from pipeline.commands.pull import kept_bundle
    from stages.data import hub

    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    if looks_like_reference(name):
        bundle = kept_bundle(name)
        bundle.refuse_damage()
        return str(bundle.folder)
    if name.startswith(("demo:", "hub:")) or hub.is_id(name):
        return name
    if path.is_absolute() or name.startswith(("./", "../", "~/")) or path.suffix == ".gguf":
        raise RecipeError(f"there is no {name}", way_out="check the path")
    from pipeline.commands.load import find_artifact

    return str(find_artifact(name, runs_dir).path)


def _exits(text: str) -> Value:
    if text == "all":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"cannot read the exits {text!r}", way_out="write --exits all, or --exits 1,5,9") from None


def _slug(target: str) -> str:
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(target).name.removesuffix(".gguf")).strip("-._")
    return words or "model"
