"""What a verification asks of whom, and at which exits: settled before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import RecipeError, StageError
from stages.data import images as image_data
from stages.models import checkpoint
from stages.models.family import family_of
from stages.runtimes.gguf_header import read_vision_header
from stages.runtimes.gguf_parts import mmproj_file
from stages.runtimes.llamacpp import check_template
from stages.verify.asking import Subject, open_runtime
from stages.verify.attacks import attack_asks
from stages.verify.language import Passage, passages
from stages.verify.overlap import without_training_prompts
from stages.verify.params import IcetVerifyParams
from stages.verify.questions import Ask, Questions, prompt_asks, sampled, vqa_asks, vqa_file_asks


@dataclass(frozen=True)
class Setting:
    """The same for every artifact."""

    questions: Questions
    pictures: Sequence[tuple[Path, str]]  # benign images beside the prompts: file, name that means the same everywhere
    fidelity_images: Sequence[Path]
    passages: Sequence[Passage]
    exits: Mapping[str, tuple[int, ...]]  # stage id -> exits to measure there
    vqa_exits: Mapping[str, tuple[int | None, ...]]  # stage id -> exits for visual questions, the default one first
    attacks: Mapping[str, Sequence[Ask]]  # the harmful prompts, asked in other ways
    dropped: int  # prompts that a training had seen
    layers: int  # of the tower that the thirds are thirds of

    @property
    def total(self) -> int:
        """Responses in all."""
        asked = self.questions
        each = len(asked.harmful) + len(asked.benign) + sum(len(asks) for asks in self.attacks.values())
        return sum(
            max(len(own), 1) * each + (len(asked.harmful) if own else 0) + len(asked.vqa) * len(self.vqa_exits[id])
            for id, own in self.exits.items()
        )


def settle(params: IcetVerifyParams, subjects: Sequence[Subject]) -> Setting:
    """Read prompts and images.

    Args:
        subjects: the baseline first, if there is one.

    Raises:
        RecipeError: an exit that an artifact does not have. StageError: one has none of those asked, or sees no images
            beside one that does. SourceError: a wheel cannot be read, or a GGUF cannot be asked.
    """
    size = next(filter(None, map(image_size, subjects)), None)
    pictures = _pictures(params, params.images, size)
    own = {subject.id: exits_of(subject) for subject in subjects}
    exits = _exits(params, subjects, own)
    for subject in subjects:
        if subject.runtime == "llamacpp":
            check_template(subject.artifact.path)
    questions, dropped = _questions(params, pictures, size, subjects)
    harmful = list(dict.fromkeys(ask.text for ask in questions.harmful))
    return Setting(
        questions=questions,
        pictures=pictures,
        fidelity_images=[path for path, _ in _pictures(params, params.fidelity_images, size)],
        passages=passages(params.language, harmful, params.prompt_seed, params.split),
        exits=exits,
        vqa_exits={subject.id: _vqa_exits(params, subject, exits[subject.id]) for subject in subjects},
        attacks={
            name: attack_asks(name, questions.harmful, size, params.prompt_seed, params.generated, params.split)
            for name in params.attacks
        }
        if size
        else {},
        dropped=dropped,
        layers=max((exit for exits in own.values() for exit in exits), default=0),  # the source's tower is whole
    )


def image_size(subject: Subject) -> int | None:
    """Pixels of an artifact's encoder; None if it sees no images."""
    folder = subject.artifact.path
    if subject.runtime == "llamacpp":
        mmproj = mmproj_file(folder)
        return None if mmproj is None else read_vision_header(mmproj).image_size
    config = checkpoint.read_config(folder)
    if "vision_config" not in config:
        return None
    vision = family_of(config, where=str(folder)).spec(config).vision
    return vision.image_size if vision else None


def exits_of(subject: Subject) -> tuple[int, ...]:
    """The exits that an artifact says it contains; asked of its runtime if it says nothing."""
    recorded = subject.artifact.metadata.get("exits")
    if isinstance(recorded, Sequence) and all(isinstance(exit, int) for exit in recorded):
        return tuple(recorded)
    with open_runtime(subject) as runtime:
        return runtime.exits


def check_exits(exits: Sequence[int], layers: int, id: str) -> None:
    """Raises: RecipeError: an exit that the artifact does not have."""
    wrong = [exit for exit in exits if not 1 <= exit <= layers]
    if wrong:
        raise RecipeError(f"'{id}' has no exit {wrong[0]}", way_out=f"choose exits from 1 to {layers}")


def _pictures(params: IcetVerifyParams, n: int, size: int | None) -> list[tuple[Path, str]]:
    """The first n benign images of the side that is asked, at the encoder's size."""
    if size is None:
        return []
    names = image_data.image_names(params.split, n, params.prompt_seed)
    paths = image_data.benign_images(params.split, n, params.prompt_seed, size)
    return [(path, f"{package}:{member}") for path, (package, member) in zip(paths, names, strict=True)]


def _questions(
    params: IcetVerifyParams, pictures: Sequence[tuple[Path, str]], size: int | None, subjects: Sequence[Subject]
) -> tuple[Questions, int]:
    """What is asked, and how many prompts are not because a training had seen them."""
    artifacts = [(subject.id, subject.artifact) for subject in subjects]

    def asks(sets: Mapping[str, int], *, harmful: bool) -> tuple[tuple[Ask, ...], int]:
        found = prompt_asks(
            sets,
            harmful=harmful,
            images=pictures,
            max_new_tokens=params.max_new_tokens,
            seed=params.prompt_seed,
            files=params.sets,
            split=params.split,
        )
        left, seen = without_training_prompts(found, artifacts, params.overlap, params.split)
        return sampled(left, params.samples, params.temperature, params.prompt_seed), seen

    harmful, seen = asks(params.harmful, harmful=True)
    benign, also = asks(params.over_refusal, harmful=False)
    vqa: tuple[Ask, ...] = ()
    if size and params.vqa_file is not None:
        vqa = vqa_file_asks(params.vqa_file, params.vqa, params.prompt_seed)
    elif size:
        vqa = vqa_asks(params.vqa, size, params.prompt_seed, params.split)
    return Questions(harmful, benign, vqa), seen + also


def _exits(
    params: IcetVerifyParams, subjects: Sequence[Subject], own: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    if params.exits != "all":
        wanted = set(params.exits)
        for subject in subjects:
            if subject.gated and own[subject.id]:
                check_exits(sorted(wanted), max(own[subject.id]), subject.id)
    else:
        wanted = {exit for exits in own.values() for exit in exits}
    blind = next((subject.id for subject in subjects if not own[subject.id]), None)
    seeing = next((subject.id for subject in subjects if own[subject.id]), None)
    if blind is not None and seeing is not None:
        raise StageError(
            f"'{blind}' sees no images and '{seeing}' does",
            why="asked beside images the one could not be compared with the other, asked without",
            way_out="give the image encoder that belongs to it (`--mmproj FILE`, or mmproj.gguf beside the model), or "
            "compare with a model that sees none",
        )
    shipped = {exit for subject in subjects if subject.gated for exit in own[subject.id]} & wanted
    found: dict[str, tuple[int, ...]] = {}
    for subject in subjects:
        shared = subject.role == "source" and params.baseline_exits == "shared"
        asked = shipped if shared else wanted
        keep = asked | {subject.default_exit} if shared else asked
        found[subject.id] = tuple(exit for exit in own[subject.id] if exit in keep)
        if asked and own[subject.id] and not found[subject.id]:
            raise StageError(
                f"'{subject.id}' has none of the exits that are asked: {_listed(asked)}",
                why=f"it has {_listed(own[subject.id])}; asked without images it could be compared with nothing",
                way_out=f"ask for one of them too, or leave '{subject.id}' out",
            )
    return found


def _listed(exits: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(exits)))


def _vqa_exits(params: IcetVerifyParams, subject: Subject, exits: Sequence[int]) -> tuple[int | None, ...]:
    """The default exit, of a model that sees images, and where the recipe wants it every other that is measured."""
    if not exits:
        return ()
    own = subject.default_exit
    return (own, *(exit for exit in exits if exit != own)) if params.vqa_exits == "all" else (own,)
