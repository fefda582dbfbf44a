"""Drawn answers: from the model's own distribution, the same for a seed, and the same alone as in company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from pydantic import ValidationError

from artifacts.artifact import Artifact
from stages.runtimes.llamacpp import LlamaCppRuntime
from stages.runtimes.runtime import Request, Runtime
from stages.runtimes.sampling import Picker
from stages.runtimes.transformers import TransformersRuntime
from stages.verify.params import IcetVerifyParams
from tests.verify_setting import rows_of, run_stage


def test_tokens_are_drawn_from_the_softmax_at_the_temperature() -> None:
    logits = np.array([2.0, 1.0, 0.0, -3.0], dtype=np.float32)
    picker = Picker(Request("x", temperature=0.7, seed=1))
    counts = np.bincount([picker.pick(logits) for _ in range(4000)], minlength=4)
    expected = 4000 * scipy.special.softmax(logits.astype(float) / 0.7)
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.001
    assert {Picker(Request("x")).pick(logits) for _ in range(5)} == {0}


@pytest.mark.parametrize("open_runtime", [LlamaCppRuntime, TransformersRuntime])
def test_a_drawn_answer_depends_on_its_seed_and_not_on_its_company(
    open_runtime: Callable[[Path], Runtime], tiny_verified: dict[str, Artifact], images: list[Path]
) -> None:
    artifact = tiny_verified["gguf" if open_runtime is LlamaCppRuntime else "source"]
    requests = [
        Request(prompt, image, 1 if image else None, 6, temperature, seed)
        for prompt in ("What is this?", "Tell me about the weather.")
        for image in (images[0], None)
        for temperature, seed in ((0.0, 0), (1.0, 1), (1.0, 2))
    ]
    with open_runtime(artifact.path) as runtime:
        together = runtime.generate(requests)
        assert runtime.generate(requests[::-1])[::-1] == together
        for place in (1, 5, 8):
            assert runtime.generate([requests[place]]) == [together[place]]
    for first in range(0, len(requests), 3):
        assert together[first + 1].tokens != together[first + 2].tokens


def test_several_samples_of_a_prompt_are_one_observation(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    drawn = {"samples": 3, "temperature": 1.0, "exits": [2], "vqa": 0, "language": 0, "fidelity_images": 0}
    verdict = run_stage(tmp_path, tiny_verified, **drawn)
    (asr,) = [row for row in rows_of(verdict, "gguf", "asr") if row.exit]
    assert asr.n == 5 and asr.low is not None and asr.low <= (asr.value or 0) <= (asr.high or 0)
    (mixture,) = rows_of(verdict, "gguf", "asr_mixture")  # there is but one exit to draw, so it is the same
    assert mixture.value == pytest.approx(asr.value)
    (flips,) = [row for row in rows_of(verdict, "gguf", "flips_to_unsafe") if row.exit]
    assert flips.n == 5  # prompts: a prompt counts if any of its samples is unsafe
    with pytest.raises(ValidationError, match="give a temperature"):
        IcetVerifyParams(samples=2)
