"""`pipeline stages`: what it lists is what recipes are checked against."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands.stages import list_stages
from stages.stage import stage_class, stage_names


def _print(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["stages", *arguments], prog_name="pipeline")
    assert result.exit_code == 0, result.output
    return result.output


def test_every_stage_is_listed_with_what_it_does() -> None:
    lines = _print().splitlines()
    assert [line.split()[0] for line in lines] == list(stage_names())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", stage_names())
def test_every_parameter_is_described_and_its_default_is_what_a_recipe_would_say(name: str) -> None:
    (kind,) = json.loads(_print(name, "--json"))
    cls = stage_class(name)
    assert {parameter["name"].partition(".")[0] for parameter in kind["parameters"]} == {
        field.alias or field_name for field_name, field in cls.Params.model_fields.items()
    }
    assert all(parameter["description"] for parameter in kind["parameters"])
    written: dict[str, Any] = {}
    for parameter in kind["parameters"]:
        if parameter["default"] is not None and parameter["type"] != "section":
            *sections, inner = parameter["name"].split(".")
            place = written
            for section in sections:
                place = place.setdefault(section, {})
            place[inner] = yaml.safe_load(parameter["default"])
    required = {p["name"] for p in kind["parameters"] if p["default"] is None}
    optional = {p["name"] for p in kind["parameters"] if p["type"] == "section" and p["default"] == "null"}
    if required or optional:
        return  # no whole set of defaults to compare
    assert cls.Params.model_validate(written) == cls.Params.model_validate({})


def test_one_stage_is_shown_for_people_and_a_wrong_name_has_a_way_out() -> None:
    shown = _print("l-ppo")
    assert "rewards.helpfulness: number = 1" in shown and "takes checkpoint, makes checkpoint" in shown
    result = CliRunner().invoke(app, ["stages", "lppo"], prog_name="pipeline")
    assert result.exit_code == 2


def test_the_table_for_the_docs_has_a_section_for_every_stage() -> None:
    page = _print("--markdown")
    for kind in list_stages():
        assert f"\n## {kind.name}\n" in page


def test_the_page_in_docs_is_the_one_that_the_code_makes() -> None:
    page = Path(__file__).parent.parent / "docs" / "stages.md"
    assert page.read_text(encoding="utf-8") == _print("--markdown")


def test_the_guide_to_l_ppo_says_what_each_parameter_does_and_its_default() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "lppo.md").read_text(encoding="utf-8")
    section = _print("--markdown").partition("\n## l-ppo\n")[2].partition("\n## ")[0]
    quoted = re.compile(r"`([^`]*)`")
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \| `(.*?)` \|", section, re.M)
    expected = {name: default for name, type, default in rows if type != "section"}
    found: dict[str, str] = {}
    for row in guide.partition("\n## What the parameters do\n")[2].partition("\n## ")[0].splitlines():
        if row.startswith("| `"):
            names, defaults, effect = row.strip("| ").split(" | ")
            assert effect and not found.keys() & quoted.findall(names)
            found |= dict(zip(quoted.findall(names), quoted.findall(defaults), strict=True))
    assert found == expected
