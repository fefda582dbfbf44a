"""What every training here has around its steps: rates, checkpoints, roll-backs, validation, and when to stop.

- Killed at any moment and started again, it ends with the same bits: a step is a function of its number and of what
  the checkpoint holds.
- A step that diverges (a gradient that is not finite, a KL beyond its bound) is never kept: back to the last
  checkpoint, half the learning rate; after `max_rollbacks` of these, training stops with the reason. That weights are
  broken shows in the step that starts from them, so a checkpoint counts once that step has gone well; what ships is
  looked at, too.
- Early stopping looks at ASR and over-refusal together, on validation prompts: a model that refuses everything has an
  ASR of zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from artifacts.errors import StageError
from stages.lppo import checkpoint
from stages.lppo.checkpoint import Course, Standing, TrainingState
from stages.lppo.learner import Learner, StepReport, mean
from stages.lppo.objective import DivergedError, rate
from stages.lppo.params import TrainingParams
from stages.lppo.policy import scaled
from stages.lppo.validation import ExitStanding, Validation
from stages.lppo.watch import Watch
from stages.lppo.workers import Workers


@dataclass(frozen=True)
class Ending:
    """How a training ended. `step`: whose weights the policy has now; `share`: how far towards them, where chosen."""

    step: int
    steps_done: int
    reason: str
    rollbacks: int
    standings: Mapping[int, ExitStanding]  # of these weights, on validation prompts; empty if not asked for
    share: float | None = None


class Loop:
    """Runs a learner to its end.

    Args:
        validation: asks validation prompts; None: never.
        watch: stops training at a stated bound; None: there is none.
        report: is called after each step.
    """

    def __init__(
        self,
        learner: Learner,
        params: TrainingParams,
        *,
        scratch: Path,
        report: Callable[[StepReport], None],
        workers: Workers,
        validation: Validation | None = None,
        watch: Watch | None = None,
    ):
        self._learner = learner
        self._params = params
        self._scratch = scratch
        self._report = report
        self._workers = workers
        self._validation = validation
        self._watch = watch
        self._course = Course()
        self._standings: Mapping[int, ExitStanding] = {}

    def run(self) -> Ending:
        """Train, from the checkpoint in `scratch` if there is one.

        Raises:
            StageError: training kept diverging, or broke a bound.
        """
        params, policy = self._params, self._learner.policy
        step, good = 0, checkpoint.load(self._scratch)
        self._workers.meet()  # nobody writes before all have read
        if good is not None:
            step = self._restore(good)
        else:
            good = self._state(0)
        untried: TrainingState | None = None  # the newest state to keep, from which no step has started
        since, before = time.monotonic(), self._course.seconds
        while True:
            reason = self._reason(step)
            try:
                if reason is None:
                    shown = self._step(step)
                elif untried is not None and self._ships(step):
                    self._learner.check(step)
            except DivergedError as error:
                step, untried = self._roll_back(good, step, error), None
                continue
            if untried is not None:
                good, untried = self._keep(untried), None
            if reason is not None:
                return self._end(step, reason)
            step += 1
            self._course = replace(self._course, seconds=before + time.monotonic() - since)
            self._report(replace(shown, steps=self._expected(step)))
            if self._watch is not None:
                self._watch.see(step, shown.metrics)
            if self._validate(step) or step % params.checkpoint_every == 0 or self._reason(step) is not None:
                # Here and in `_restore`, so that going on from a checkpoint is the same as never having stopped.
                policy.quantize()
                untried = self._state(step)

    def _step(self, step: int) -> StepReport:
        """The learner's step, at the rates that are due."""
        params = self._params
        if step % params.quantize_every == 0:
            self._learner.policy.quantize()
        rising = min(1.0, (step % params.steps + 1) / (params.warmup + 1))
        scale = self._course.lr_scale * rising * rate(self._through(step), params.schedule)
        for group in self._learner.optimizer.param_groups:
            group["lr"] = scale * group["initial_lr"]
        return self._learner.step(step)

    @property
    def _total(self) -> int:
        return self._learner.sampler.steps(self._params.steps)

    def _reason(self, step: int) -> str | None:
        """Why training is over after `step` steps; None: it is not."""
        params, course = self._params, self._course
        if params.patience is not None and course.waited >= params.patience and course.best is not None:
            return f"{course.waited} validations were no better than the one after step {course.best.step}"
        if step >= self._total:
            return "all steps are done"
        if params.max_minutes is not None and self._minutes() >= params.max_minutes:
            return f"{params.max_minutes:g} minutes have passed"
        return None

    def _ships(self, step: int) -> bool:
        """Whether the weights of the last step are those that ship, and not better ones of an earlier step."""
        best = self._course.best
        return best is None or best.step == step

    def _validate(self, step: int) -> bool:
        """Ask validation prompts if it is time; keep the weights if they are the best so far."""
        every = self._params.validate_every
        if self._validation is None or not every or (step % every and self._reason(step) is None):
            return False
        found, now = self._ask(step)
        course = self._course
        if now.better_than(course.best):
            self._standings = found
            if self._workers.rank == 0:
                checkpoint.save_best(self._scratch, step, self._learner.policy.adapter())
            course = replace(course, best=now, waited=0)
        else:
            course = replace(course, waited=course.waited + 1)
        self._course = course
        return True

    def _ask(self, step: int, share: float | None = None) -> tuple[Mapping[int, ExitStanding], Standing]:
        """Where the policy stands with the weights that it has: those of `step`, or `share` of the way to them."""
        assert self._validation is not None
        policy = self._learner.policy
        if self._course.original is None:
            with policy.as_reference():
                self._course = replace(self._course, original=_over_refusal(self._validation.original()))
        policy.quantize()
        found = self._validation()
        assert self._course.original is not None
        over_refusal = _over_refusal(found)
        excess = max(0.0, over_refusal - self._course.original - self._params.over_refusal_rise)
        asr = 1 - mean([one.refusal for one in found.values()])
        now = Standing(step, round(asr, 12), over_refusal, round(excess, 12), share)  # or the last bits break ties
        self._validation.told(found, now, self._course.original)
        return found, now

    def _interpolate(self, step: int) -> float:
        """Give the policy that share of the way to its weights which validation prompts like best; say which.

        Between two fine-tunings of one model, and so between it and its fine-tuning, weights can be averaged (WiSE-FT,
        arXiv 2109.01903). Where two shares do equally well the smaller one is taken: less has changed.
        """
        policy = self._learner.policy
        learned = policy.adapter()
        best: Standing | None = None
        for share in sorted(set(self._params.interpolation)):
            policy.set_adapter(scaled(learned, share))
            found, now = self._ask(step, share)
            if now.better_than(best):
                self._standings, best = found, now
        assert best is not None and best.share is not None
        policy.set_adapter(scaled(learned, best.share))
        return best.share

    def _end(self, step: int, reason: str) -> Ending:
        policy, best = self._learner.policy, self._course.best
        at = step
        self._workers.meet()  # the first has written what the others read
        if best is not None and best.step != step:
            adapter = checkpoint.load_best(self._scratch, best.step)
            if adapter is None:
                reason += f"; the weights of step {best.step} were better but cannot be read any more"
            else:
                policy.set_adapter(adapter)
                at = best.step
        share = None
        if self._validation is not None and self._params.interpolation:
            share = self._interpolate(at)
        policy.quantize()
        if self._validation is not None and share is None and (best is None or best.step != at or not self._standings):
            self._standings = self._validation()
        return Ending(at, step, reason, self._course.rollbacks, self._standings, share)

    def _through(self, step: int) -> float:
        """The share of the training that has passed when a step begins; each exit in turn is a training of its own."""
        done = step % self._params.steps / max(1, self._params.steps - 1)
        most = self._params.max_minutes
        return done if most is None else min(1.0, max(done, self._minutes() / most))

    def _expected(self, step: int) -> int:
        """How many steps there will be, as far as the first `step` tell."""
        most = self._params.max_minutes
        return self._total if most is None else min(self._total, max(step, round(step * most / self._minutes())))

    def _minutes(self) -> float:
        """Of training, the mean over the processes, so that all of them stop together."""
        import torch

        spent = self._workers.total(torch.tensor(self._course.seconds, dtype=torch.float64))
        return float(spent) / self._workers.size / 60

    # --- what is kept ---

    def _keep(self, state: TrainingState) -> TrainingState:
        if self._workers.rank == 0:
            checkpoint.save(self._scratch, state)
        return state

    def _roll_back(self, good: TrainingState, step: int, error: DivergedError) -> int:
        course = self._course
        if course.rollbacks >= self._params.max_rollbacks:
            raise StageError(
                f"training diverged at step {min(step + 1, self._total)}, after {course.rollbacks} roll-backs",
                why=str(error),
                way_out=self._learner.calmer,
            ) from None
        lowered = replace(
            good.course,
            lr_scale=course.lr_scale / 2,
            rollbacks=course.rollbacks + 1,
            seconds=course.seconds,
        )
        return self._restore(self._keep(replace(good, course=lowered)))

    def _state(self, step: int) -> TrainingState:
        """Everything that the next step depends on, copied."""
        learner = self._learner
        parameters = learner.policy.trained()
        moments = {
            name: {kind: value.detach().cpu().clone() for kind, value in learner.optimizer.state[parameter].items()}
            for name, parameter in parameters.items()
            if parameter in learner.optimizer.state
        }
        weights = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        exits = learner.sampler.exits
        seen = {} if self._watch is None else self._watch.seen
        return TrainingState(
            step,
            weights,
            moments,
            dict(exits.failure),
            learner.kl_coefficient,
            self._course,
            seen,
            dict(exits.first),
        )

    def _restore(self, state: TrainingState) -> int:
        """Undo `_state`, with the weights rounded as they were then; the number of steps that are done."""
        import torch

        learner = self._learner
        learner.optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in learner.policy.trained().items():
                parameter.copy_(state.weights[name])
                kept = state.moments.get(name, {})
                # Adam keeps its step count on the CPU.
                found = {
                    kind: value.clone() if kind == "step" else value.to(parameter.device, copy=True)
                    for kind, value in kept.items()
                }
                if found:
                    learner.optimizer.state[parameter] = found
        learner.policy.quantize()
        learner.optimizer.zero_grad(set_to_none=True)
        learner.sampler.exits.failure.update(state.failure)
        learner.sampler.exits.first = dict(state.first)
        learner.kl_coefficient = state.kl_coefficient
        if self._watch is not None:
            self._watch.restore(state.seen)
        self._course = state.course
        self._standings = {}  # perhaps of weights that are gone; asked again at the end
        return state.step


def _over_refusal(found: Mapping[int, ExitStanding]) -> float:
    return mean([one.over_refusal for one in found.values()])
