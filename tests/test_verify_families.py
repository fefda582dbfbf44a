"""icet-verify and gguf on other families: a model without images, and one that only transformers runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError
from stages.models import checkpoint
from stages.models.family import family_of
from stages.stage import Planned, stage_class
from tests.verify_setting import artifact_of, rows_of, run_stage

FEW = {"harmful": {"advbench": 2}, "over_refusal": {"everyday": 1}, "vqa": 2, "max_new_tokens": 3}


def _artifacts(folder: Path, base: Path, exits: list[int]) -> dict[str, Artifact]:
    """Two copies: what is verified is a checkpoint, too."""
    metadata = {"exits": exits, "default_exit": exits[-1] if exits else None}
    for name in ("source", "shipped"):
        shutil.copytree(folder, base / name)
    return {name: artifact_of(base / name, "checkpoint", metadata) for name in ("source", "shipped")}


def test_a_text_only_model_is_verified_on_text(tiny_family: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    verdict = run_stage(tmp_path / "out", _artifacts(tiny_family("qwen2"), tmp_path, []), **FEW)
    for artifact in ("source", "shipped"):
        assert [(row.exit, row.n) for row in rows_of(verdict, artifact, "asr")] == [(None, 2)]
    flips = rows_of(verdict, "shipped", "flips_to_unsafe")
    assert flips and all(row.value == 0 for row in flips)


def test_a_model_with_cross_attention_is_verified_at_its_exits(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    inputs = _artifacts(tiny_family("mllama"), tmp_path, [1, 2, 3])
    verdict = run_stage(tmp_path / "out", inputs, exits=[1, 3], images=1, fidelity_images=1, **FEW)
    rows = rows_of(verdict, "shipped", "asr")
    assert [row.exit for row in rows if row.exit is not None] == [1, 3]
    cosines = [row.value for row in rows_of(verdict, "shipped", "fidelity_cosine")]
    assert cosines == pytest.approx([1.0, 1.0])


def test_llama_3_2_vision_is_refused_as_gguf_before_any_work(tiny_family: Callable[[str], Path]) -> None:
    config = checkpoint.read_config(tiny_family("mllama"))
    planned = Planned(type="checkpoint", spec=family_of(config).spec(config))
    stage = stage_class("gguf")
    with pytest.raises(RecipeError, match="mllama cannot become GGUF"):
        stage(stage.Params.model_validate({"type": "Q8_0"})).plan({"source": planned})
