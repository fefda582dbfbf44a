"""Stage `sft`: the baseline of `l-ppo`, with its parameters and data: refusals as targets, a random exit a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.lppo.hardening import Hardening, Setting, tell
from stages.lppo.params import SFTParams
from stages.stage import Context

if TYPE_CHECKING:
    from stages.lppo.loop import Ending


class SFTStage(Hardening[SFTParams]):
    name = "sft"
    code_version = "8"
    summary = "harden the language model by supervised fine-tuning on refusals (baseline of l-ppo)"
    Params = SFTParams

    def train(self, context: Context, setting: Setting) -> Ending:
        from stages.lppo.loop import Loop
        from stages.lppo.supervised import SFT

        learner = SFT(
            setting.policy,
            setting.sampler,
            setting.states,
            self.params,
            default_exit=setting.default_exit,
            seed=context.seed,
            workers=setting.workers,
        )
        loop = Loop(
            learner,
            self.params,
            scratch=context.scratch,
            report=lambda step: tell(context, step, {}),
            workers=setting.workers,
            validation=setting.validation,
        )
        return loop.run()
