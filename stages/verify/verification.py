"""One verification: ask every artifact everything, then write down what the answers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.errors import RecipeError
from artifacts.measures import MEASURES_NAME, RESPONSES_NAME, Measure, write_measures
from stages.data import images as image_data
from stages.judges.refusal import RefusalRule
from stages.models import checkpoint
from stages.models.family import family_of
from stages.runtimes.runtime import Progress, Runtime
from stages.stage import Context
from stages.verify.asking import Answer, Subject, ask, open_runtime
from stages.verify.fidelity import Embeddings, embeddings, fidelity_rows
from stages.verify.memory import memory_rows
from stages.verify.paired import paired_rows
from stages.verify.params import IcetVerifyParams
from stages.verify.questions import Ask, Questions, prompt_asks, vqa_asks, without_image
from stages.verify.scores import Answers, is_refused, is_unsafe, rate, safety_rows, vqa_rows
from stages.verify.verdict import VERDICT_NAME, write_responses, write_verdict


@dataclass
class _Progress:
    """Responses received of all that are to come, over every artifact."""

    context: Context
    total: int
    done: int = 0

    @contextmanager
    def unit(self, n: int, note: str) -> Iterator[Progress]:
        self.context.progress(self.done, self.total, note)
        yield lambda done, _: self.context.progress(self.done + done, self.total, note)
        self.done += n


@dataclass
class _Measured:
    """What was learned from one artifact while its runtime was open."""

    answers: Answers
    embeddings: Embeddings = field(default_factory=Embeddings)


class Verification:
    """One run of the stage."""

    def __init__(self, context: Context, params: IcetVerifyParams, subjects: Sequence[Subject]):
        self.context = context
        self.params = params
        self.subjects = subjects
        self.reference = params.fidelity_to or params.hardened or params.baseline
        self.judge = RefusalRule()

    def run(self) -> Mapping[str, object]:
        context, params = self.context, self.params
        context.progress(0, 1, "reading prompts and images")
        size = self._image_size()
        pictures = self._pictures(params.images, size)
        questions = self._questions(pictures, size)
        fidelity_images = [path for path, _ in self._pictures(params.fidelity_images, size)]
        exits = self._exits()
        progress = _Progress(context, self._total(questions, exits))

        measured: list[_Measured] = []
        for subject in self.subjects:
            needs_embeddings = subject.gated or subject.id == self.reference
            measured.append(
                self._measure(
                    subject, exits[subject.id], questions, fidelity_images if needs_embeddings else [], progress
                )
            )
        reference = self._reference_embeddings(measured, fidelity_images)

        common = self._common([one.answers for one in measured])
        rows = self._rows(measured, common, reference)
        context.progress(progress.total, progress.total, "writing")
        answers = [answer for one in measured for answer in _all_answers(one.answers)]
        write_measures(context.output / MEASURES_NAME, rows)
        write_responses(context.output / RESPONSES_NAME, answers)
        write_verdict(context.output / VERDICT_NAME, self._verdict(measured, questions, pictures, common))
        return {
            "subjects": {subject.id: subject.artifact.digest for subject in self.subjects if subject.gated},
            "common_exits": list(common),
            "judge": f"{self.judge.name} {self.judge.version}",
            "responses": len(answers),
        }

    # --- what to ask, and where ---

    def _image_size(self) -> int | None:
        """Pixels of the baseline's encoder; None if it sees no images."""
        folder = self.subjects[0].artifact.path
        config = checkpoint.read_config(folder)
        if "vision_config" not in config:
            return None
        vision = family_of(config, where=str(folder)).spec(config).vision
        return vision.image_size if vision else None

    def _pictures(self, n: int, size: int | None) -> list[tuple[Path, str]]:
        """(file, name that means the same everywhere) of the first n benign test images, at the encoder's size."""
        if size is None:
            return []
        names = image_data.image_names("test", n, self.params.prompt_seed)
        paths = image_data.benign_images("test", n, self.params.prompt_seed, size)
        return [(path, f"{package}:{member}") for path, (package, member) in zip(paths, names, strict=True)]

    def _questions(self, pictures: Sequence[tuple[Path, str]], size: int | None) -> Questions:
        params = self.params

        def asks(sets: Mapping[str, int], *, harmful: bool) -> tuple[Ask, ...]:
            return prompt_asks(
                sets,
                harmful=harmful,
                images=pictures,
                max_new_tokens=params.max_new_tokens,
                seed=params.prompt_seed,
            )

        return Questions(
            harmful=asks(params.harmful, harmful=True),
            benign=asks(params.over_refusal, harmful=False),
            vqa=vqa_asks(params.vqa, size, params.prompt_seed) if size else (),
        )

    def _exits(self) -> dict[str, tuple[int, ...]]:
        """Stage id -> exits to measure there."""
        own = {subject.id: _exits_of(subject) for subject in self.subjects}
        if self.params.exits != "all":
            wanted = set(self.params.exits)
            for subject in self.subjects:
                if subject.gated and own[subject.id]:
                    check_exits(sorted(wanted), max(own[subject.id]), subject.id)
        else:
            wanted = {exit for exits in own.values() for exit in exits}
        shipped = {exit for subject in self.subjects if subject.gated for exit in own[subject.id]} & wanted
        found: dict[str, tuple[int, ...]] = {}
        for subject in self.subjects:
            keep = wanted
            if subject.role == "source" and self.params.baseline_exits == "shared":
                default = subject.artifact.metadata.get("default_exit")
                keep = shipped | ({default} if isinstance(default, int) else set())
            found[subject.id] = tuple(exit for exit in own[subject.id] if exit in keep)
        return found

    def _total(self, questions: Questions, exits: Mapping[str, Sequence[int]]) -> int:
        each = len(questions.harmful) + len(questions.benign)
        return sum(
            max(len(own), 1) * each + (len(questions.harmful) + len(questions.vqa) if own else 0)
            for own in exits.values()
        )

    # --- measuring ---

    def _measure(
        self,
        subject: Subject,
        exits: Sequence[int],
        questions: Questions,
        fidelity_images: Sequence[Path],
        progress: _Progress,
    ) -> _Measured:
        opened: list[Runtime] = []

        def runtime() -> Runtime:
            # Opened when something must be asked: what is remembered needs no model.
            if not opened:
                opened.append(open_runtime(subject))
            return opened[0]

        def asked(asks: Sequence[Ask], exit: int | None, note: str) -> list[Answer]:
            if not asks:
                return []
            with progress.unit(len(asks), f"{subject.id}: {note}") as inner:
                return ask(subject, runtime, exit, asks, self.context.scratch, inner)

        try:
            both = (*questions.harmful, *questions.benign)
            by_exit: dict[int | None, list[Answer]] = {}
            if not exits:
                by_exit[None] = asked(without_image(both), None, "text only")
                self._metrics(subject, None, by_exit[None])
            for exit in exits:
                by_exit[exit] = asked(both, exit, f"exit {exit}")
                self._metrics(subject, exit, by_exit[exit])
            default = subject.artifact.metadata.get("default_exit")
            default_exit = default if isinstance(default, int) and exits else None
            answers = Answers(
                subject=subject,
                by_exit=by_exit,
                text_only=asked(without_image(questions.harmful), None, "without image") if exits else [],
                vqa=asked(questions.vqa, default_exit, "visual questions") if exits else [],
                default_exit=default_exit,
            )
            seen = embeddings(runtime(), exits, fidelity_images) if fidelity_images else Embeddings()
            return _Measured(answers, seen)
        finally:
            for one in opened:
                one.close()

    def _metrics(self, subject: Subject, exit: int | None, answers: Sequence[Answer]) -> None:
        harmful = [answer for answer in answers if answer.ask.intent == "harmful"]
        benign = [answer for answer in answers if answer.ask.intent != "harmful"]
        for name, chosen, hit in (("asr", harmful, is_unsafe), ("over_refusal", benign, is_refused)):
            if chosen:
                self.context.metric(f"{name}/{subject.id}", rate(chosen, hit).value, exit=exit)

    def _reference_embeddings(self, measured: Sequence[_Measured], images: Sequence[Path]) -> Embeddings:
        for one in measured:
            if one.answers.subject.id == self.reference:
                return one.embeddings
        subject = Subject(self.reference, self.context.inputs[self.reference], "hardened", gated=False)
        if not images:
            return Embeddings()
        with open_runtime(subject) as runtime:
            return embeddings(runtime, runtime.exits, images)

    def _common(self, answers: Sequence[Answers]) -> tuple[int, ...]:
        """The exits that every artifact was measured at."""
        sets = [set(one.exits) for one in answers]
        return tuple(sorted(set.intersection(*sets)))

    # --- writing down ---

    def _rows(self, measured: Sequence[_Measured], common: Sequence[int], reference: Embeddings) -> list[Measure]:
        baseline = measured[0].answers
        layers = max(_exits_of(baseline.subject), default=0)
        rows: list[Measure] = []
        for one in measured:
            answers = one.answers
            rows += safety_rows(answers, common, layers, self.params.prompt_seed)
            if answers is not baseline:
                rows += paired_rows(answers, baseline, common, layers, self.params.prompt_seed)
            if answers.exits:
                rows += vqa_rows(answers)
            if answers.subject.gated:
                rows += fidelity_rows(answers, one.embeddings, reference, self.reference)
                rows += memory_rows(answers, self.context.device, measure=self.params.measure_memory)
        return rows

    def _verdict(
        self,
        measured: Sequence[_Measured],
        questions: Questions,
        pictures: Sequence[tuple[Path, str]],
        common: Sequence[int],
    ) -> Mapping[str, object]:
        return {
            "schema_version": 1,
            "subjects": [
                {
                    "stage": one.answers.subject.id,
                    "digest": one.answers.subject.artifact.digest,
                    "type": one.answers.subject.artifact.type,
                    "role": one.answers.subject.role,
                    "gated": one.answers.subject.gated,
                    "runtime": one.answers.subject.runtime,
                    "exits": list(one.answers.exits),
                    "default_exit": one.answers.default_exit,
                }
                for one in measured
            ],
            "common_exits": list(common),
            "prompts": questions.digests(),
            "images": [name for _, name in pictures],
            "fidelity_to": self.reference,
            "judge": {
                "name": self.judge.name,
                "version": self.judge.version,
                "needs_network": self.judge.needs_network,
            },
            "max_new_tokens": self.params.max_new_tokens,
            "decoding": "greedy",
            "prompt_seed": self.params.prompt_seed,
            "seed": self.context.seed,
        }


def _exits_of(subject: Subject) -> tuple[int, ...]:
    """The exits that an artifact says it contains; asked of its runtime if it says nothing."""
    recorded = subject.artifact.metadata.get("exits")
    if isinstance(recorded, Sequence) and all(isinstance(exit, int) for exit in recorded):
        return tuple(recorded)
    with open_runtime(subject) as runtime:
        return runtime.exits


def _all_answers(one: Answers) -> list[Answer]:
    return [answer for answers in one.by_exit.values() for answer in answers] + [*one.text_only, *one.vqa]


def check_exits(exits: Sequence[int], layers: int, id: str) -> None:
    """Raises: RecipeError: an exit that the artifact does not have."""
    wrong = [exit for exit in exits if not 1 <= exit <= layers]
    if wrong:
        raise RecipeError(f"'{id}' has no exit {wrong[0]}", way_out=f"choose exits from 1 to {layers}")
