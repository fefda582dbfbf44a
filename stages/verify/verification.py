"""One verification: ask every artifact everything, then write down what the answers say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from artifacts.lineage import training_of
from artifacts.measures import MEASURES_NAME, RESPONSES_NAME, VERDICT_NAME, Measure, write_measures
from stages.judges.registry import RULE
from stages.runtimes.runtime import Progress, Runtime
from stages.stage import Context
from stages.verify.asking import Answer, Subject, ask, open_runtime
from stages.verify.fidelity import Embeddings, embeddings, fidelity_rows
from stages.verify.judging import disagreements, judge_all, judge_rows, try_judges
from stages.verify.language import Prediction, language_rows, predictions
from stages.verify.memory import memory_rows
from stages.verify.paired import paired_rows, quantization_rows
from stages.verify.params import IcetVerifyParams
from stages.verify.questions import Ask, without_image
from stages.verify.scores import Answers, is_refused, is_unsafe, rate, safety_rows, vqa_rows
from stages.verify.setting import Setting, settle
from stages.verify.speed import speed_rows
from stages.verify.verdict import write_responses, write_verdict


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


@dataclass(frozen=True)
class _Seen:
    """What fidelity is measured by."""

    embeddings: Embeddings = field(default_factory=Embeddings)
    predictions: Sequence[Prediction] = ()


class Verification:
    """One run of the stage."""

    def __init__(self, context: Context, params: IcetVerifyParams, subjects: Sequence[Subject]):
        self.context = context
        self.params = params
        self.subjects = subjects
        self.reference = params.fidelity_to or params.hardened or params.baseline

    def run(self) -> Mapping[str, object]:
        context = self.context
        try_judges(self.params.judges)
        context.progress(0, 1, "reading prompts and images")
        setting = settle(self.params, self.subjects)
        progress = _Progress(context, setting.total)

        measured: list[Answers] = []
        seen: dict[str, _Seen] = {}
        for subject in self.subjects:
            answers, seen[subject.id] = self._measure(subject, setting, progress)
            measured.append(answers)
        if self.reference is not None and self.reference not in seen:
            seen[self.reference] = self._reference(setting)
        measured, panel = self._judged(measured)

        common = self._common(measured)
        rows = self._rows(measured, seen, setting, common, panel)
        context.progress(progress.total, progress.total, "writing")
        answers_in_all = [answer for one in measured for answer in one.all]
        write_measures(context.output / MEASURES_NAME, rows)
        write_responses(context.output / RESPONSES_NAME, answers_in_all)
        write_verdict(context.output / VERDICT_NAME, self._verdict(measured, answers_in_all, setting, common, panel))
        return {
            "subjects": {subject.id: subject.artifact.digest for subject in self.subjects if subject.gated},
            "common_exits": list(common),
            "judge": f"{panel[0]['name']} {panel[0]['version']}",
            "responses": len(answers_in_all),
        }

    # --- measuring ---

    def _measure(self, subject: Subject, setting: Setting, progress: _Progress) -> tuple[Answers, _Seen]:
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

        questions, exits = setting.questions, setting.exits[subject.id]
        try:
            both = (*questions.harmful, *questions.benign)
            by_exit: dict[int | None, list[Answer]] = {}
            if not exits:
                by_exit[None] = asked(without_image(both), None, "text only")
                self._metrics(subject, None, by_exit[None])
            for exit in exits:
                by_exit[exit] = asked(both, exit, f"exit {exit}")
                self._metrics(subject, exit, by_exit[exit])
            own = subject.default_exit if exits else None
            answers = Answers(
                subject=subject,
                by_exit=by_exit,
                text_only=asked(without_image(questions.harmful), None, "without image") if exits else [],
                vqa={
                    exit: asked(
                        questions.vqa, exit, "visual questions" if exit == own else f"visual questions, exit {exit}"
                    )
                    for exit in setting.vqa_exits[subject.id]
                },
                default_exit=own,
                attacks={
                    name: {exit: asked(asks, exit, f"exit {exit}, {name}") for exit in exits}
                    for name, asks in setting.attacks.items()
                    if exits
                },
            )
            if not subject.gated and subject.id != self.reference:
                return answers, _Seen()
            return answers, self._see(runtime, exits, own, setting)
        finally:
            for one in opened:
                one.close()

    def _see(self, runtime: Callable[[], Runtime], exits: Sequence[int], own: int | None, setting: Setting) -> _Seen:
        if not setting.fidelity_images and not setting.passages:
            return _Seen()
        images = setting.fidelity_images if exits else ()
        seen = embeddings(runtime(), exits, images, own) if images else Embeddings()
        return _Seen(seen, predictions(runtime(), setting.passages))

    def _reference(self, setting: Setting) -> _Seen:
        """Of a checkpoint that is measured for nothing else."""
        assert self.reference is not None
        subject = Subject(self.reference, self.context.inputs[self.reference], "hardened", gated=False)
        with open_runtime(subject) as runtime:
            return self._see(lambda: runtime, runtime.exits, runtime.default_exit, setting)

    def _metrics(self, subject: Subject, exit: int | None, answers: Sequence[Answer]) -> None:
        harmful = [answer for answer in answers if answer.ask.intent == "harmful"]
        benign = [answer for answer in answers if answer.ask.intent != "harmful"]
        for name, chosen, hit in (("asr", harmful, is_unsafe), ("over_refusal", benign, is_refused)):
            if chosen:
                self.context.metric(f"{name}/{subject.id}", rate(chosen, hit).value, exit=exit)

    def _judged(self, measured: Sequence[Answers]) -> tuple[list[Answers], list[dict[str, object]]]:
        def told(done: int, total: int, judge: str) -> None:
            self.context.log(f"{judge}: {done} of {total} responses judged")

        judges = self.params.judges
        return judge_all(measured, judges, self.context.scratch, told if judges != (RULE,) else _silent)

    def _common(self, answers: Sequence[Answers]) -> tuple[int, ...]:
        """The exits that every artifact was measured at."""
        sets = [set(one.exits) for one in answers]
        return tuple(sorted(set.intersection(*sets)))

    # --- writing down ---

    def _rows(
        self,
        measured: Sequence[Answers],
        seen: Mapping[str, _Seen],
        setting: Setting,
        common: Sequence[int],
        panel: Sequence[Mapping[str, object]],
    ) -> list[Measure]:
        params, layers, seed = self.params, setting.layers, self.params.prompt_seed
        baseline = next((one for one in measured if one.subject.id == params.baseline), None)
        reference = seen.get(self.reference, _Seen()) if self.reference is not None else _Seen()
        runtime = next((one.subject.runtime for one in measured if one.subject.id == self.reference), "transformers")
        rows: list[Measure] = []
        for one in measured:
            subject = one.subject
            rows += safety_rows(one, common, layers, seed)
            if baseline is not None and one is not baseline:
                rows += paired_rows(one, baseline, common, layers, seed)
            if subject.gated:
                rows += quantization_rows(one, measured, params.hardened or params.baseline, common)
            rows += judge_rows(one, panel, common, layers, seed)
            if one.exits:
                rows += vqa_rows(one, common, layers, seed)
            if subject.gated:
                here = seen[subject.id]
                # What an image encoder should give is for transformers to say; a GGUF's is under test itself.
                exact = runtime == "transformers"
                rows += fidelity_rows(
                    one,
                    here.embeddings,
                    reference.embeddings if exact else Embeddings(),
                    self.reference if exact else None,
                )
                named = f"{runtime} on '{self.reference}'" if self.reference is not None else None
                rows += language_rows(one, setting.passages, here.predictions, reference.predictions, named, seed)
                rows += memory_rows(one, self.context.device, measure=params.measure_memory)
                if params.measure_speed:
                    self.context.log(f"{subject.id}: measuring speed")
                    rows += speed_rows(one)
        return rows

    def _verdict(
        self,
        measured: Sequence[Answers],
        answers: Sequence[Answer],
        setting: Setting,
        common: Sequence[int],
        panel: Sequence[Mapping[str, object]],
    ) -> Mapping[str, object]:
        return {
            "schema_version": 1,
            "subjects": [
                {
                    "stage": one.subject.id,
                    "digest": one.subject.artifact.digest,
                    "type": one.subject.artifact.type,
                    "role": one.subject.role,
                    "gated": one.subject.gated,
                    "runtime": one.subject.runtime,
                    "exits": list(one.exits),
                    "default_exit": one.default_exit,
                    "training": training_of(one.subject.artifact).model_dump(mode="json"),
                }
                for one in measured
            ],
            "common_exits": list(common),
            "prompts": setting.questions.digests(),
            "split": self.params.split,
            "prompts_dropped": setting.dropped,
            "prompt_sets": setting.questions.sets(self.params.sets, self.params.split),
            "images": [name for _, name in setting.pictures],
            "fidelity_to": self.reference,
            "judge": {key: panel[0][key] for key in ("name", "version", "needs_network")},
            "judges": panel,
            "disagreements": len(disagreements(answers)),
            "max_new_tokens": self.params.max_new_tokens,
            "decoding": "greedy" if not self.params.temperature else "sampled",
            "temperature": self.params.temperature,
            "samples": self.params.samples,
            "prompt_seed": self.params.prompt_seed,
            "seed": self.context.seed,
        }


def _silent(done: int, total: int, judge: str) -> None:
    """The rule is done before anyone could read that it began."""
