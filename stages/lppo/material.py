"""What is asked in training and in its validation: exits, prompts, pictures, questions. Never of the test split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from artifacts.errors import RecipeError
from artifacts.manifest import sha256_bytes
from stages.data import images, prompts
from stages.data.prompt_sets import Prompt
from stages.lppo.params import LPPOParams, TrainingParams
from stages.lppo.sampler import ExitSampler, ExitsInTurn, PromptPool, Question, SceneSampler, share_out
from stages.models.spec import ModelSpec


def chosen_exits(params: TrainingParams, spec: ModelSpec) -> tuple[int, ...]:
    """The exits to harden, in the order in which `variant: paper` takes them.

    Raises:
        RecipeError: the model has no image encoder, or not these exits.
    """
    if spec.vision is None:
        raise RecipeError(
            f"there are no exits to harden: this model ({spec.family}) has no image encoder",
            way_out="leave the stage out",
        )
    if params.exits == "all":
        return tuple(range(1, spec.vision.layers + 1))
    return _existing("exits", params.exits, spec.vision.layers)


def validation_exits(params: TrainingParams, spec: ModelSpec) -> tuple[int, ...]:
    """The exits at which validation prompts are asked.

    Raises:
        RecipeError: the model has no image encoder, or not these exits.
    """
    hardened = chosen_exits(params, spec)
    if params.validation_exits is None:
        return hardened
    assert spec.vision is not None
    return _existing("validation_exits", params.validation_exits, spec.vision.layers)


def _existing(name: str, exits: Sequence[int], last: int) -> tuple[int, ...]:
    wrong = sorted({exit for exit in exits if not 1 <= exit <= last})
    if wrong or not exits:
        what = ", ".join(map(str, wrong)) or "an empty list"
        raise RecipeError(
            f"{name}: {what} is not among the exits of this model",
            why=f"its image encoder has {last} blocks here",
            way_out=f"choose layers from 1 to {last}, or leave it out for all of them",
        )
    return tuple(dict.fromkeys(exits))


def new_sampler(params: TrainingParams, exits: Sequence[int], seed: int) -> SceneSampler:
    """Everything that is asked in training; train split only."""
    counts = share_out(params.prompts_per_step, params.prompts.shares())
    pools = {}
    for kind in counts:
        sets = {
            name: [prompt for prompt in prompts.load_prompts(name, "train", seed=seed) if prompt.intent == kind]
            for name in params.prompts.kinds()[kind]
        }
        pools[kind] = PromptPool(sets, seed)
    if not isinstance(params, LPPOParams):
        drawn = ExitSampler(exits, floor=1.0, sharpness=0.0)  # nothing is answered, so nothing says which are the worst
    elif params.variant == "paper":
        drawn = ExitsInTurn(exits, params.steps)
    else:
        drawn = ExitSampler(exits, floor=params.dro_floor, sharpness=params.dro_sharpness)
    return SceneSampler(
        drawn,
        pools,
        counts,
        per_scene=params.prompts_per_scene,
        images=params.images,
        seed=seed,
        questions=known_answers(params.images, seed) if params.question_scenes else None,
        question_scenes=params.question_scenes,
        contrasted=share_out(params.contrasts, params.prompts.shares()) if params.contrast else None,
    )


def known_answers(n: int, seed: int) -> dict[int, list[Question]]:
    """Questions of easy-VQA's train split about those of the first `n` training images that are its pictures.

    Yes/no questions are as often about something that is there as about something that is not: unbalanced, answering
    "no" pays without looking.
    """
    from stages.data.easy_vqa import TRUTH, VqaQuestion, load_questions

    by_picture: dict[int, list[VqaQuestion]] = {}
    for question in load_questions("train"):
        by_picture.setdefault(question.image, []).append(question)
    found: dict[int, list[Question]] = {}
    for number, (package, member) in enumerate(images.image_names("train", n, seed)):
        if package != "easy-vqa":
            continue
        asked = by_picture.get(int(Path(member).stem), [])
        yes = [q for q in asked if q.answer == "yes"]
        no = [q for q in asked if q.answer == "no"][: len(yes)]
        found[number] = [
            (Prompt(f"easy-vqa-train-{q.image}-{i}", q.question, "visual question", "benign", package), q.answer)
            for i, q in enumerate([*(q for q in asked if q.answer not in TRUTH), *yes, *no])
        ]
    return found


def validation_prompts(params: TrainingParams) -> list[Prompt]:
    """Some prompts of each kind, always the same.

    Raises:
        RecipeError: none of a kind that is trained on.
    """
    instead = [prompt for name in params.prompts.validation for prompt in prompts.load_prompts(name, "validation")]
    asked: list[Prompt] = []
    for kind, names in params.prompts.kinds().items():
        trained = [prompt for name in names for prompt in prompts.load_prompts(name, "validation")]
        found = [prompt for prompt in instead if prompt.intent == kind]
        found = found or [prompt for prompt in trained if prompt.intent == kind]
        if not found and params.prompts.shares()[kind]:
            raise none_to_validate_by(kind, names)
        asked += sorted(found, key=lambda prompt: sha256_bytes(prompt.id.encode()))[: params.validation]
    return asked


def none_to_validate_by(kind: str, sets: Sequence[str]) -> RecipeError:
    return RecipeError(
        f"no {kind} prompt to validate by",
        why=f"all of {', '.join(sets)} is for training",
        way_out="name another set beside them, or under prompts.validation, or set validation to 0",
    )
