"""What a verification asks, once and alike of every artifact and every exit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from artifacts.errors import RecipeError
from artifacts.manifest import canonical_json, sha256_bytes
from stages.data import remote_files
from stages.data.prompt_files import PromptFile, file_digest, load_file
from stages.data.prompt_sets import Intent, Prompt
from stages.data.prompts import Split, load_prompts, normalise
from stages.data.vqa import VqaFile, load_vqa
from stages.verify.resemblance import distinct

if TYPE_CHECKING:
    from stages.data.easy_vqa import VqaSplit

_QUESTIONS_A_PICTURE: Final = 2
_BRIEFLY: Final = "Answer the question using a single word or phrase."  # as LLaVA-1.5 was evaluated
_VQA_TOKENS: Final = 8  # "It is a blue triangle." fits


@dataclass(frozen=True)
class Ask:
    """One request, whatever the exit.

    Attributes:
        image_name: a stable name of the image, never a path of this machine.
        answer: the true one, for visual questions. answers: those of several people, by VQA-v2's rules.
        request: what is really asked, where `text` only points at the image.
        generated: a picture made of the request, of a set that has one.
    """

    id: str
    set: str
    category: str
    intent: Intent
    text: str
    image: Path | None
    image_name: str | None
    max_new_tokens: int
    answer: str | None = None
    answers: tuple[str, ...] = ()
    request: str | None = None
    generated: Path | None = None
    sample: int = 0
    temperature: float = 0.0
    seed: int = 0

    @property
    def judged(self) -> str:
        """What judges take for the request."""
        return self.request or self.text


@dataclass(frozen=True)
class Questions:
    """All that is asked. `harmful` and `benign` go to every exit with an image, `harmful` once more without."""

    harmful: tuple[Ask, ...]
    benign: tuple[Ask, ...]
    vqa: tuple[Ask, ...]

    def digests(self) -> dict[str, dict[str, object]]:
        """Part -> how many were asked and the SHA-256 of what was asked, for the verdict."""
        parts = {"harmful": self.harmful, "benign": self.benign, "vqa": self.vqa}
        return {name: {"n": len(asks), "digest": digest(asks)} for name, asks in parts.items()}

    def sets(self, files: Mapping[str, PromptFile], split: Split) -> list[dict[str, object]]:
        """The prompt sets, for the verdict: how many were asked, meant as what, from where and under which licence."""
        asked = Counter((ask.set, ask.intent) for ask in (*self.harmful, *self.benign) if not ask.sample)
        found: list[dict[str, object]] = []
        for (name, intent), n in asked.items():
            if name in files:
                said = _file_said(files[name])
            else:
                prompts = [prompt for prompt in load_prompts(name, split) if prompt.intent == intent]
                origins = {prompt.origin.partition("!")[0] for prompt in prompts}
                said = {
                    "source": ", ".join(sorted(origins)),
                    "licence": ", ".join(sorted({prompt.licence for prompt in prompts})),
                }
            found.append({"set": name, "intent": intent, "n": n, **said})
        return found


def _file_said(file: PromptFile) -> dict[str, object]:
    """Where a prompt set came from; of a path only the name, since it says where something lay and not what it is."""
    source = file.place if remote_files.is_remote(file.place) else file.place.rpartition("/")[2]
    return {"source": source, "licence": file.meaning.licence, "digest": file_digest(file)}


def digest(asks: Sequence[Ask]) -> str:
    """SHA-256 over ids, texts, images, answers, lengths and what is drawn, in order."""
    return sha256_bytes(canonical_json([_described(ask) for ask in asks]))


def _described(ask: Ask) -> list[object]:
    said: list[object] = [ask.id, ask.text, ask.image_name, ask.answer, ask.max_new_tokens]
    return said if not ask.temperature else [*said, ask.sample, str(ask.temperature), ask.seed]


def sampled(asks: Sequence[Ask], samples: int, temperature: float, seed: int) -> tuple[Ask, ...]:
    """Each request so many times, each with a seed of its own; as they are where nothing is drawn."""
    if not temperature:
        return tuple(asks)
    return tuple(
        replace(
            ask,
            sample=number,
            temperature=temperature,
            seed=int(sha256_bytes(f"{seed}:{ask.id}:{number}".encode())[:15], 16),
        )
        for ask in asks
        for number in range(samples)
    )


def prompt_asks(
    sets: Mapping[str, int],
    *,
    harmful: bool,
    images: Sequence[tuple[Path, str]],
    max_new_tokens: int,
    seed: int,
    files: Mapping[str, PromptFile] = MappingProxyType({}),
    split: Split = "test",
) -> tuple[Ask, ...]:
    """The first n prompts of that side of each set that are harmful, or not; each beside one benign image in turn.

    A prompt that another set has asked already is left out, and of sets of the user's own (`files`, all of them for
    tests) what nearly says the same as an earlier prompt of that set.

    Raises:
        RecipeError: unknown set, or one without such prompts on that side. SourceError: a wheel or a file cannot be
            read.
    """
    found: list[Ask] = []
    seen: set[tuple[str, Path | None]] = set()
    for name, n in sets.items():
        known = load_file(name, files[name], seed) if name in files else load_prompts(name, split, seed=seed)
        chosen = [prompt for prompt in known if (prompt.intent == "harmful") == harmful]
        if n and not chosen:
            raise RecipeError(
                f"the prompt set {name!r} has no {'harmful' if harmful else 'harmless'} prompt to ask",
                why=f"on its {split} side there are only others" if known else f"it has no {split} side",
                way_out=f"leave it out of {'harmful' if harmful else 'over_refusal'}",
            )
        for prompt in islice(distinct(chosen) if name in files else chosen, n):
            said = (normalise(prompt.text), prompt.image)
            if said not in seen:
                seen.add(said)
                found.append(_ask(prompt, name, images[len(found) % len(images)] if images else None, max_new_tokens))
    return tuple(found)


def vqa_asks(n: int, size: int, seed: int, split: Literal["validation", "test"] = "test") -> tuple[Ask, ...]:
    """`n` easy-VQA questions, of the test side two about each picture of `size` pixels: encoding one costs as much as
    asking.

    Raises:
        SourceError: the wheel cannot be read.
    """
    if not n:
        return ()
    from artifacts.home import cache_dir
    from stages.data.easy_vqa import VqaQuestion, export_images, load_questions, validation_questions

    folder: VqaSplit
    if split == "validation":
        folder, questions = "train", validation_questions(n, seed)  # pictures that no training is shown
    else:
        by_image: dict[int, list[VqaQuestion]] = {}
        # The sample of everything is everything in a seeded order.
        for question in load_questions("test", len(load_questions("test")), seed):
            by_image.setdefault(question.image, []).append(question)
        folder, questions = "test", [one for asked in by_image.values() for one in asked[:_QUESTIONS_A_PICTURE]][:n]
    numbers = [question.image for question in questions]
    paths = export_images(cache_dir() / "images" / "easy-vqa-1.0" / folder, folder, numbers, size)
    return tuple(
        Ask(
            id=f"easy-vqa-{place:03d}",
            set="easy-vqa",
            category="visual question",
            intent="benign",
            text=question.question,
            image=path,
            image_name=f"easy-vqa:easy_vqa/data/{folder}/images/{question.image}.png",
            max_new_tokens=_VQA_TOKENS,
            answer=question.answer,
        )
        for place, (question, path) in enumerate(zip(questions, paths, strict=True))
    )


def vqa_file_asks(file: VqaFile, n: int, seed: int) -> tuple[Ask, ...]:
    """`n` questions of a file in VQA-v2's form.

    Raises:
        SourceError: it cannot be read, or a picture is missing.
    """
    return tuple(
        Ask(
            id=item.id,
            set="vqa",
            category="visual question",
            intent="benign",
            text=f"{item.question} {_BRIEFLY}",
            image=item.image,
            image_name=item.image.name,
            max_new_tokens=_VQA_TOKENS,
            answer=item.commonest,
            answers=item.answers,
        )
        for item in load_vqa(file, n, seed)
    )


def without_image(asks: Sequence[Ask]) -> tuple[Ask, ...]:
    """The same requests as text alone."""
    return tuple(replace(ask, image=None, image_name=None) for ask in asks)


def _ask(prompt: Prompt, set: str, image: tuple[Path, str] | None, max_new_tokens: int) -> Ask:
    path, name = image or (None, None)
    return Ask(
        prompt.id,
        set,
        prompt.category,
        prompt.intent,
        prompt.text,
        path,
        name,
        max_new_tokens,
        generated=prompt.image,
    )
