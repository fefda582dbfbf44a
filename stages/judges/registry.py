"""Judges by name, as recipes write them: NAME, or NAME:SOURCE for one whose model lies somewhere.

    refusal-rule
    learned
    toxicity:hub:ORG/NAME          a sequence classifier with a toxic label
    reward:./folder                a sequence classifier with one label
    llama-guard:hub:meta-llama/Llama-Guard-3-1B     or a folder, or ./NAME.gguf
    perspective                    needs the network and $PERSPECTIVE_API_KEY
    openai:MODEL@https://HOST/v1   any endpoint of that kind; needs the network, $OPENAI_API_KEY if it wants a key

Third parties add judges through the entry-point group `pipeline.judges`: a callable that takes SOURCE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from artifacts.errors import RecipeError
from stages.judges.judge import Judge

RULE: Final = "refusal-rule"
_GROUP: Final = "pipeline.judges"


@dataclass(frozen=True)
class _Kind:
    """`takes`: what stands behind the colon; "" where nothing does."""

    open: Callable[[str], Judge]
    takes: str = ""
    network: bool = False


def _rule(source: str) -> Judge:
    from stages.judges.refusal import RefusalRule

    return RefusalRule()


def _learned(source: str) -> Judge:
    from stages.judges.learned import LearnedJudge

    return LearnedJudge()


def _toxicity(source: str) -> Judge:
    from stages.judges.reward_model import locate
    from stages.judges.toxicity import ToxicityModel

    return ToxicityModel(locate(source))


def _reward(source: str) -> Judge:
    from stages.judges.reward_model import RewardModel, locate

    return RewardModel(locate(source))


def _guard(source: str) -> Judge:
    from stages.judges.llama_guard import LlamaGuard, open_guard
    from stages.judges.reward_model import locate

    path = Path(source).expanduser()
    return LlamaGuard(open_guard(path if path.suffix == ".gguf" else locate(source)))


def _perspective(source: str) -> Judge:
    from stages.judges.remote import Perspective

    return Perspective()


def _openai(source: str) -> Judge:
    from stages.judges.remote import OpenAIJudge

    model, _, url = source.partition("@")
    return OpenAIJudge(model, url)


_KINDS: Final[Mapping[str, _Kind]] = {
    RULE: _Kind(_rule),
    "learned": _Kind(_learned),
    "toxicity": _Kind(_toxicity, "a model"),
    "reward": _Kind(_reward, "a model"),
    "llama-guard": _Kind(_guard, "a model"),
    "perspective": _Kind(_perspective, network=True),
    "openai": _Kind(_openai, "MODEL@URL", network=True),
}


def open_judge(written: str) -> Judge:
    """The judge that a recipe names.

    Raises:
        RecipeError: there is none of that name. SourceError: its model cannot be had.
    """
    name, _, source = written.partition(":")
    return _kind(name).open(source)


def check_judges(written: Sequence[str], *, network: bool) -> None:
    """Refuse what cannot judge; reads no model.

    Raises:
        RecipeError: none, one twice, an unknown name, a missing model, or one that needs a network that is not allowed.
    """
    if not written or len(set(written)) < len(written):
        raise RecipeError(
            "judges must be at least one, and each named once",
            why=f"judges: [{', '.join(written)}]",
            way_out=f"for example judges: [{RULE}]",
        )
    for one in written:
        name, _, source = one.partition(":")
        kind = _kind(name)
        if bool(kind.takes) != bool(source):
            why = f"behind {name}: stands {kind.takes}" if kind.takes else f"nothing stands behind {name}"
            raise RecipeError(f"cannot read the judge {one!r}", why=why, way_out=f"known judges: {', '.join(_KINDS)}")
        if name == "openai" and not all(source.partition("@")[::2]):
            raise RecipeError(f"cannot read the judge {one!r}", way_out="write openai:MODEL@https://HOST/v1")
        if kind.network and not network:
            raise RecipeError(
                f"the judge {name} sends every prompt and response to a server",
                way_out="allow it with `network: true`, or choose a judge that runs here",
            )


def downloads(written: Sequence[str]) -> list[str]:
    """The remote things that these judges read."""
    from stages.judges import learned
    from stages.judges.reward_model import remote

    found: list[str] = []
    for one in written:
        name, _, source = one.partition(":")
        if name == "learned":
            found += learned.SOURCES
        elif _kind(name).takes == "a model" and not source.endswith(".gguf") and remote(source):
            found.append(remote(source))
    return found


def fingerprint(written: Sequence[str]) -> str:
    """What decides a judgement beside the name: versions and the digests of local models."""
    from artifacts.manifest import sha256_file
    from stages.judges.reward_model import source_digest

    parts = []
    for one in written:
        name, _, source = one.partition(":")
        digest = ""
        if _kind(name).takes == "a model":
            digest = sha256_file(Path(source).expanduser()) if source.endswith(".gguf") else source_digest(source)
        parts.append(f"{one} {digest}".strip())
    return " ".join(parts)


def _kind(name: str) -> _Kind:
    if name in _KINDS:
        return _KINDS[name]
    for entry in entry_points(group=_GROUP):
        if entry.name == name:
            return _Kind(entry.load())
    raise RecipeError(f"there is no judge {name!r}", way_out=f"known judges: {', '.join(_KINDS)}")
