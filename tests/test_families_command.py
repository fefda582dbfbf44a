"""`pipeline families`: the matrix says what the code does, and the page is the code's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.errors import PipelineError
from pipeline.cli import app
from pipeline.commands.families import list_families
from stages.early_exit import EarlyExitParams, EarlyExitStage
from stages.lppo.params import LPPOParams
from stages.lppo.stage import LPPOStage
from stages.models import checkpoint
from stages.models.family import family_of
from stages.quantize.gguf import GGUFParams, GGUFStage
from stages.quantize.gptq import GPTQParams, GPTQStage
from stages.stage import Planned, Stage, StageParams


def _print(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["families", *arguments], prog_name="pipeline")
    assert result.exit_code == 0, result.output
    return result.output


def test_the_page_in_docs_is_the_one_that_the_code_makes() -> None:
    page = Path(__file__).parent.parent / "docs" / "families.md"
    assert page.read_text(encoding="utf-8") == _print("--markdown")


def test_the_table_names_every_family_once() -> None:
    lines = _print().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [family.name for family in list_families()]
    assert {entry["name"] for entry in json.loads(_print("--json"))} == {family.name for family in list_families()}


@pytest.mark.parametrize("kind", ["llava-next", "idefics3", "mllama", "qwen2"])
def test_what_the_table_denies_is_refused_before_work_starts_and_the_rest_is_planned(
    kind: str, tiny_family: Callable[[str], Path]
) -> None:
    config = checkpoint.read_config(tiny_family(kind))
    family = family_of(config)
    (support,) = [entry for entry in list_families() if entry.name == family.name]
    stages: list[tuple[bool, Stage[StageParams]]] = [
        (support.early_exit, EarlyExitStage(EarlyExitParams(layer=1))),
        (support.realign, EarlyExitStage(EarlyExitParams(layer=1, realign=True))),
        (support.lppo, LPPOStage(LPPOParams())),
        (support.llamacpp, GGUFStage(GGUFParams(type="Q8_0"))),
        (support.gptq, GPTQStage(GPTQParams(group_size=32))),
    ]
    for allowed, stage in stages:
        inputs = {"checkpoint": Planned(type="checkpoint", spec=family.spec(config))}
        if allowed:
            assert stage.plan(inputs).spec is not None
        else:
            with pytest.raises(PipelineError):
                stage.plan(inputs)
