"""Judges by name, as recipes write them: NAME, or NAME:SOURCE for one whose model lies somewhere.

    refusal-rule
    learned
    toxicity:hub:ORG/NAME          a sequence classifier with a toxic label
    reward:./folder                a sequence classifier with one label
    llama-guard:hub:meta-llama/Llama-Guard-3-1B     or a folder, or ./NAME.gguf
    perspective                    needs the network and $PERSPECTIVE_API_KEY
    openai:MODEL@https://HOST/v1   any endpoint of that kind; needs the network, $OPENAI_API_KEY if it wants a key

Third parties add judges through the entry-point group `pipeline.judges`: a class as `stages.judges.judge.Judge` has it,
made with SOURCE. If something stands behind its name it says so in `takes`, e.g. "a server"; "a model" may lie on the
hub and counts in content keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final

from artifacts.errors import RecipeError
from stages.judges.judge import Judge

RULE: Final = "refusal-rule"
_GROUP: Final = "pipeline.judges"
_MODEL: Final = "a model"


@dataclass(frozen=True)
class _Kind:
    """`judge`: "module:CLASS", read when asked for. `takes`: what stands behind the colon; "" where nothing does."""

    judge: EntryPoint
    open: Callable[[type, str], Judge]
    takes: str = ""

    @property
    def type(self) -> type[Judge]:
        found: type[Judge] = self.judge.load()
        return found


def _alone(judge: type, source: str) -> Judge:
    made: Judge = judge()
    return made


def _located(judge: type, source: str) -> Judge:
    from stages.judges.reward_model import locate

    made: Judge = judge(locate(source))
    return made


def _guard(judge: type, source: str) -> Judge:
    from stages.judges.llama_guard import open_guard
    from stages.judges.reward_model import locate

    made: Judge = judge(open_guard(_local(source) or locate(source)))
    return made


def _endpoint(judge: type, source: str) -> Judge:
    model, _, url = source.partition("@")
    made: Judge = judge(model, url)
    return made


def _theirs(judge: type, source: str) -> Judge:
    made: Judge = judge(source)
    return made


def _ours(judge: str) -> EntryPoint:
    return EntryPoint("", f"stages.judges.{judge}", _GROUP)


_KINDS: Final[Mapping[str, _Kind]] = {
    RULE: _Kind(_ours("refusal:RefusalRule"), _alone),
    "learned": _Kind(_ours("learned:LearnedJudge"), _alone),
    "toxicity": _Kind(_ours("toxicity:ToxicityModel"), _located, _MODEL),
    "reward": _Kind(_ours("reward_model:RewardModel"), _located, _MODEL),
    "llama-guard": _Kind(_ours("llama_guard:LlamaGuard"), _guard, _MODEL),
    "perspective": _Kind(_ours("remote:Perspective"), _alone),
    "openai": _Kind(_ours("remote:OpenAIJudge"), _endpoint, "MODEL@URL"),
}


def open_judge(written: str) -> Judge:
    """The judge that a recipe names.

    Raises:
        RecipeError: there is none of that name. SourceError: its model cannot be had.
    """
    name, _, source = written.partition(":")
    kind = _kind(name)
    return kind.open(kind.type, source)


def check_judges(written: Sequence[str], *, network: bool) -> None:
    """Refuse what cannot judge; reads no model.

    Raises:
        RecipeError: none, one twice, an unknown name, a model that is missing or not here, or a judge that needs a
            network that is not allowed.
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
        path = _local(source) if kind.takes == _MODEL else None
        if path is not None and not path.exists():
            raise RecipeError(
                f"the model of the judge {name} is not there",
                where=str(path),
                way_out=f"write {name}:./FOLDER, {name}:/PATH or {name}:hub:ORG/NAME",
            )
        if kind.type.needs_network and not network:
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
        elif _kind(name).takes == _MODEL and _local(source) is None:
            found.append(remote(source))
    return found


def fingerprint(written: Sequence[str]) -> str:
    """What decides a judgement beside the name: versions and the digests of local models. Of the rule the name, since
    its own identity is part of every verdict's key."""
    from stages.judges.learned import card_digest

    parts = []
    for one in written:
        name, _, source = one.partition(":")
        kind = _kind(name)
        digest = card_digest() if name == "learned" else ""
        if kind.takes == _MODEL:
            digest = _model_digest(source)
        parts.append(" ".join(filter(None, (one, "" if name == RULE else kind.type.version, digest))))
    return " ".join(parts)


def _local(source: str) -> Path | None:
    """The path of a model that lies on this machine; None of one on the hub."""
    from stages.judges.reward_model import remote

    return Path(source).expanduser() if source.endswith(".gguf") or not remote(source) else None


def _model_digest(source: str) -> str:
    """Of all files of a GGUF model, or of a checkpoint."""
    from artifacts.manifest import sha256_file
    from stages.judges.reward_model import source_digest
    from stages.runtimes.finished import gguf_files, is_gguf

    path = _local(source)
    if path is None or not is_gguf(path):
        return source_digest(source)
    return " ".join(map(sha256_file, gguf_files(path).named))


def _kind(name: str) -> _Kind:
    if name in _KINDS:
        return _KINDS[name]
    for entry in entry_points(group=_GROUP):
        if entry.name == name:
            return _checked(entry)
    raise RecipeError(f"there is no judge {name!r}", way_out=f"known judges: {', '.join(_KINDS)}")


def _checked(entry: EntryPoint) -> _Kind:
    try:
        judge = entry.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"the judge {entry.name!r} cannot be imported",
            where=entry.value,
            why=str(error),
            way_out="install it again",
        ) from error
    unsaid = [word for word in ("name", "version", "needs_network", "quantity") if not hasattr(judge, word)]
    if unsaid or not isinstance(judge, type):
        raise RecipeError(
            f"the judge {entry.name!r} does not say what it is",
            where=entry.value,
            why=f"no {', '.join(unsaid)}" if unsaid else "it is no class",
            way_out="a judge is a class with name, version, needs_network and quantity, as stages.judges.judge has it",
        )
    return _Kind(entry, _theirs, str(getattr(judge, "takes", "")))
