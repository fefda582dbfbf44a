"""Our side: `stages.lppo.algorithm.train`, one step a turn, with a clock at its parts.

    python ours.py task.json '{"samples": 4, "prompts_per_scene": 2, "micro_batch": 1}'
    python ours.py task.json '{"demo": true, "quantizer": "Q4_0"}'

Text-only scenes have an image of no tokens; what all prompts begin with, the system's turn, stands before it.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import AutoTokenizer
from turns import Turns

from stages.data.images import benign_images
from stages.data.prompt_sets import Prompt
from stages.judges.refusal import RefusalRule
from stages.lppo import algorithm
from stages.lppo.learner import StepReport
from stages.lppo.material import chosen_exits, new_sampler
from stages.lppo.params import LPPOParams
from stages.lppo.policy import Policy
from stages.lppo.reward import Rewards
from stages.lppo.rollout import Prefixes, Scene, pack_prefixes
from stages.lppo.sampler import ExitSampler, PromptPool, SceneSampler
from stages.lppo.states import States
from stages.models import checkpoint
from stages.models.crossing import Placed
from stages.models.family import Family, family_of
from stages.models.features import ExitFeatures

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Seconds by part of a step, each without what its own parts took; a part's name tells what it is part of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[str] = []
        self._since = time.perf_counter()

    def charge(self) -> None:
        now = time.perf_counter()
        self.seconds["/".join(self._within) or "rest"] += now - self._since
        self._since = now

    def enter(self, name: str) -> None:
        self.charge()
        self._within.append(name)

    def leave(self) -> None:
        self.charge()
        self._within.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str | Callable[..., str], function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def inner(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return inner


def watch(clock: Clock, policy: Policy) -> None:
    """Put the clock at what a step calls; that costs a few microseconds a call."""

    def trunk(*args: Any) -> str:
        cache = args[4] if len(args) > 4 else None
        return "trunk" if cache is None else "prefix" if cache.get_seq_length() == 0 else "tokens"

    def forward(*args: Any) -> str:
        return "update" if torch.is_grad_enabled() else "reference"

    replaced: dict[str, Callable[..., Any]] = {
        "hidden": clock.timed(trunk, policy.hidden),
        "logprobs": clock.timed("head", policy.logprobs),
        "evaluate": clock.timed(forward, policy.evaluate),
        "quantize": clock.timed("quantize", policy.quantize),
    }
    for name, function in replaced.items():
        setattr(policy, name, function)
    for module, name, part in ((algorithm, "generate", "generate"), (torch.autograd, "backward", "update/backward")):
        setattr(module, name, clock.timed(part, getattr(module, name)))
    register_optimizer_step_pre_hook(lambda *_: clock.enter("update/optimizer"))
    register_optimizer_step_post_hook(lambda *_: clock.leave())


class TextStates:
    """Scenes without an image.

    Args:
        ids: token ids of each prompt, by its own id; they begin alike.
    """

    def __init__(self, policy: Policy, ids: Mapping[str, Sequence[int]]):
        rows = list(ids.values())
        self._shared = next(i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1)
        self._policy = policy
        self._ids = ids
        self._before = policy.embedded(rows[0][: self._shared])
        self._nothing = Placed(self._before[:0])

    def __call__(self, scenes: Sequence[Scene], samples: int) -> Prefixes:
        prompts = [
            [self._policy.embedded(self._ids[prompt.id][self._shared :]) for prompt in scene.prompts]
            for scene in scenes
        ]
        return pack_prefixes(self._before, [self._nothing] * len(scenes), prompts, samples)


def text_sampler(task: Mapping[str, Any], params: LPPOParams) -> SceneSampler:
    """Half of the prompts harmful; one exit, which nothing looks at."""
    prompts = [Prompt(one["id"], one["text"], "", one["intent"], "") for one in task["prompts"]]
    pools = {
        name: PromptPool({name: [p for p in prompts if (p.intent == "harmful") is harmful]}, seed=0)
        for name, harmful in (("harmful", True), ("harmless", False))
    }
    counts = dict.fromkeys(pools, params.prompts_per_step // 2)
    exits = ExitSampler([0], floor=1.0, sharpness=0.0)
    return SceneSampler(exits, pools, counts, per_scene=params.prompts_per_scene, images=1, seed=0)


def new_policy(family: Family, folder: Path, params: LPPOParams) -> Policy:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounding = params.rounding()
    policy = Policy(
        family,
        family.load(folder),
        tokenizer,
        params.lora(),
        quantizer=rounding,
        checkpoint=folder if rounding else None,
    )
    return policy


def main() -> None:
    turns = Turns()
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    setting = json.loads(sys.argv[2])
    torch.use_deterministic_algorithms(True, warn_only=True)  # as the stage does
    folder = Path(task["demo_checkpoint" if setting.get("demo") else "checkpoint"])
    config = checkpoint.read_config(folder)
    family = family_of(config)
    if setting.get("demo"):
        params = LPPOParams(quantizer=setting.get("quantizer"), checkpoint_every=1000)
        exits = chosen_exits(params, family.spec(config))
        sampler = new_sampler(params, exits, 0)
        features = ExitFeatures(folder).get(benign_images("train", params.images, seed=0))
        policy = new_policy(family, folder, params)
        states: Callable[[Sequence[Scene], int], Prefixes] = States(policy, features)
    else:
        names = ("lora_rank", "lora_alpha", "lora_targets", "lr", "kl", "clip", "c1", "gamma", "lam", "max_grad_norm")
        responses = task["prompts_per_step"] * task["samples"]
        params = LPPOParams(
            prompts_per_step=responses // setting["samples"],
            prompts_per_scene=setting["prompts_per_scene"],
            samples=setting["samples"],
            micro_batch=setting["micro_batch"],
            max_new_tokens=task["response_tokens"],
            ppo_epochs=task["ppo_epochs"],
            minibatches=1,
            checkpoint_every=1000,
            **{name: task[name] for name in names},
        )
        sampler = text_sampler(task, params)
        policy = new_policy(family, folder, params)
        policy.end_tokens = policy.end_tokens[:0]  # responses of one length: nothing ends them early
        states = TextStates(policy, {prompt["id"]: prompt["ids"] for prompt in task["prompts"]})
    clock = Clock()
    watch(clock, policy)

    def report(step: StepReport) -> None:
        clock.charge()
        parts = dict(clock.seconds)
        turns.wait(seconds=turns.seconds(), parts=parts, metrics=dict(step.metrics))
        clock.charge()
        clock.seconds.clear()

    turns.wait(ready=True)
    with tempfile.TemporaryDirectory() as scratch:
        algorithm.train(
            policy,
            sampler,
            clock.timed("states", states),
            clock.timed("judge", Rewards(RefusalRule(), params.rewards)),  # type: ignore[arg-type]
            params.model_copy(update={"steps": 10_000, "schedule": "constant"}),
            seed=0,
            scratch=Path(scratch),
            report=report,
        )


if __name__ == "__main__":
    main()
