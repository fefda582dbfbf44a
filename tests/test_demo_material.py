"""What the demo model is trained on keeps away from what it is judged by."""

from __future__ import annotations

import pytest

from recipes.demo.material import PLAIN, benign_requests
from stages.data.prompts import load_prompts


def _normal(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@pytest.mark.parametrize("split", ["validation", "test"])
def test_benign_training_questions_are_in_no_set_that_judges(split: str) -> None:
    judged = {
        _normal(prompt.text)
        for name in ("everyday", "pairs", "overrefusal")
        for prompt in load_prompts(name, split)  # type: ignore[arg-type]
    }
    assert judged
    assert not judged & {_normal(text) for text in (*PLAIN, *benign_requests())}
