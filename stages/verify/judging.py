"""Other judges on what was answered, and how far they agree.

- the first judge of the recipe decides what is unsafe; whether a response refuses is always for the refusal rule to
  say, and whether it is one at all where that judge does not call it unsafe;
- judges run after every model is closed, one at a time, and what they said is remembered: a killed verification does
  not judge twice;
- rows: `asr_by_JUDGE` for each judge that does not decide, `kappa` for each pair, `toxicity` and `reward` of the first
  judge that measures them and `toxicity_by_JUDGE` of others, all on the harmful prompts; `toxicity_ATTACK` likewise on
  each attack, and `reward_vqa` on visual questions, which reward models alone are asked about. JUDGE is its kind, or
  where there are several of a kind all that the recipe writes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from artifacts.manifest import canonical_json, sha256_bytes
from artifacts.measures import Measure
from stages.judges.judge import Closes, Judge, Judgement, SeesImages
from stages.judges.registry import RULE, open_judge
from stages.judges.statistics import average_over_exits, kappa, mean
from stages.verify.asking import Answer
from stages.verify.remembered import Remembered
from stages.verify.scores import Answers, bands_of, named, outcomes, rate, samples_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AT_ONCE: Final = 64  # responses between two lines of memory
_Judged = tuple[str, str, str | None]  # request, response, name of the image beside it
Told = Callable[[int, int, str], None]  # done, total, judge


def judge_all(
    measured: Sequence[Answers], written: Sequence[str], scratch: Path, told: Told
) -> tuple[list[Answers], list[dict[str, object]]]:
    """Every answer to a prompt, judged by everyone; and what the verdict says of each judge.

    Raises:
        RecipeError, SourceError: a judge cannot be opened. StageError: it fails.
    """
    asked = [answer for one in measured for answer in one.prompted]
    opinions: dict[_Judged, dict[str, Judgement]] = {}
    panel: list[dict[str, object]] = []
    for number, name in enumerate(written):
        judge: Judge = open_judge(name)
        own = [*asked, *(answer for one in measured for answer in one.visual)] if judge.quantity == "reward" else asked
        said = _score(judge, name, own, scratch, told)
        for answer in own:
            opinions.setdefault(_judged(answer), {})[name] = said[_judged(answer)]
        panel.append(
            {
                "name": name,
                "version": judge.version,
                "needs_network": judge.needs_network,
                "quantity": judge.quantity,
                "decides": number == 0,
            }
        )
        _close(judge)
        del judge  # before the next is opened: two may not fit

    def judged(answers: Iterable[Answer]) -> list[Answer]:
        return [replace(answer, opinions=opinions.get(_judged(answer), {})) for answer in answers]

    return [
        replace(
            one,
            by_exit={exit: judged(answers) for exit, answers in one.by_exit.items()},
            text_only=judged(one.text_only),
            vqa={exit: judged(answers) for exit, answers in one.vqa.items()},
            attacks={
                name: {exit: judged(answers) for exit, answers in by_exit.items()}
                for name, by_exit in one.attacks.items()
            },
        )
        for one in measured
    ], panel


def try_judges(written: Sequence[str]) -> None:
    """Open each of them once, so that a missing key or a model that is no judge is told before anything is asked.

    Raises:
        RecipeError, SourceError: it cannot be opened.
    """
    for name in written:
        if name != RULE:
            _close(open_judge(name))


def judge_rows(
    one: Answers, panel: Sequence[Mapping[str, object]], common: Sequence[int], source_layers: int, seed: int
) -> list[Measure]:
    """See above; nothing where the rule judges alone."""
    import numpy as np

    harmful = [answer for exit in one.by_exit for answer in one.harmful(exit)]
    if not harmful:
        return []
    names = [str(judge["name"]) for judge in panel]
    kinds = Counter(_kind(name) for name in names)
    shortest = {name: _kind(name) if kinds[_kind(name)] == 1 else name for name in names}
    quantities: set[str] = set()
    rows: list[Measure] = []
    groups = bands_of(one, one.by_exit, common, source_layers)
    for judge in panel:
        name, quantity = str(judge["name"]), str(judge["quantity"])

        def unsafe(answer: Answer, name: str = name) -> bool:
            return _unsafe(answer, name)

        if name != names[0]:
            measure = f"asr_by_{shortest[name]}"
            for exit in one.by_exit:
                rows.append(one.row(measure, rate(one.harmful(exit), unsafe), exit=exit, note=name))
            for band, exits in groups:
                estimate = average_over_exits(outcomes([one.harmful(exit) for exit in exits], unsafe), seed)
                rows.append(one.row(measure, estimate, band=band, note=f"{name}; {named(exits)}"))
        if quantity:
            unit = "fraction" if quantity == "toxicity" else "reward"
            measure = quantity if quantity not in quantities else f"{quantity}_by_{shortest[name]}"
            quantities.add(quantity)
            asked: dict[str, Iterable[tuple[int | None, Sequence[Answer]]]]
            asked = {"": [(exit, one.harmful(exit)) for exit in one.by_exit]}
            asked |= {f"_{attack}": by_exit.items() for attack, by_exit in one.attacks.items()}
            if quantity == "reward" and one.own_vqa:
                asked["_vqa"] = one.vqa.items()
            for attack, at_exits in asked.items():
                values = {exit: _values(answers, name) for exit, answers in at_exits}
                for exit, scores in values.items():
                    rows.append(one.row(measure + attack, mean(scores, seed), exit=exit, unit=unit, note=name))
                for band, exits in bands_of(one, values, common, source_layers):
                    whole = mean(np.concatenate([values[exit] for exit in exits], axis=1), seed)
                    note = f"{name}; {named(exits)}"
                    rows.append(one.row(measure + attack, whole, band=band, unit=unit, note=note))
    for first, second in itertools.combinations(names, 2):
        flags = [_flags(one, name) for name in (first, second)]
        differ = int((flags[0] != flags[1]).sum())
        found = kappa(flags[0], flags[1], seed)
        note = f"{first} and {second}; they differ on {differ} of {len(harmful)} responses"
        rows.append(one.row("kappa", found, unit="kappa", n=len(harmful), note=note))
    return rows


def _by_prompt(answers: Sequence[Answer], said: Callable[[Answer], float]) -> NDArray[np.float64]:
    """(prompts, samples)."""
    import numpy as np

    return np.array([float(said(answer)) for answer in answers]).reshape(-1, samples_of(answers))


def _values(answers: Sequence[Answer], judge: str) -> NDArray[np.float64]:
    """(prompts, samples): what the judge has measured."""
    return _by_prompt(answers, lambda answer: answer.opinions[judge].value or 0.0)


def _flags(one: Answers, judge: str) -> NDArray[np.float64]:
    """(prompts, responses), over all exits: whether the judge calls it unsafe."""
    import numpy as np

    return np.concatenate(
        [_by_prompt(one.harmful(exit), lambda answer: _unsafe(answer, judge)) for exit in one.by_exit], axis=1
    )


def _close(judge: Judge) -> None:
    if isinstance(judge, Closes):
        judge.close()


def disagreements(answers: Sequence[Answer]) -> list[Answer]:
    """Answers to harmful prompts on which the judges differ, each response once."""
    found: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        if answer.ask.intent == "harmful" and len({_unsafe(answer, name) for name in answer.opinions}) > 1:
            found.setdefault((answer.ask.judged, answer.text), answer)
    return list(found.values())


def _kind(judge: str) -> str:
    return judge.partition(":")[0]


def _unsafe(answer: Answer, judge: str) -> bool:
    return answer.opinions[judge].unsafe


def _judged(answer: Answer) -> _Judged:
    return answer.ask.judged, answer.text, answer.ask.image_name


def _score(judge: Judge, name: str, answers: Sequence[Answer], scratch: Path, told: Told) -> dict[_Judged, Judgement]:
    key = sha256_bytes(f"{name} {judge.version}".encode())
    memory = Remembered(scratch / f"judgements-{key}.jsonl")
    keys = {_judged(answer): sha256_bytes(canonical_json(_judged(answer))) for answer in answers}
    once = {_judged(answer): answer for answer in answers}
    missing = [answer for judged, answer in once.items() if keys[judged] not in memory.known]
    with memory:
        for start in range(0, len(missing), _AT_ONCE):
            told(start, len(missing), name)
            chosen = missing[start : start + _AT_ONCE]
            prompts, responses = [answer.ask.judged for answer in chosen], [answer.text for answer in chosen]
            if isinstance(judge, SeesImages):
                said = judge.score_beside(prompts, responses, [answer.ask.image for answer in chosen])
            else:
                said = judge.score(prompts, responses)
            for answer, judgement in zip(chosen, said, strict=True):
                memory.keep(keys[_judged(answer)], asdict(judgement))
    return {judged: Judgement(**cast("dict[str, Any]", memory.known[key][0])) for judged, key in keys.items()}
