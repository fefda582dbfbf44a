"""`pipeline verify`: any model, no recipe, the same report and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError
from pipeline.cli import app
from pipeline.commands.load import find_artifact
from pipeline.commands.verify import Wanted, verification

SMALL = (
    *("--set", "harmful={advbench: 3}", "--set", "over_refusal={everyday: 2}", "--set", "vqa=2"),
    *("--set", "images=1", "--set", "fidelity_images=1", "--set", "language=1", "--set", "max_new_tokens=3"),
    *("--set", "measure_memory=false"),
)


def test_a_gguf_without_a_recipe_or_a_baseline_is_verified_and_a_gate_that_fails_is_exit_code_3(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    model = tiny_verified["gguf"].path / "model.gguf"
    gates = ("--gate", "max_over_refusal=1.0", "--gate", "min_fidelity=0.9")
    runs = ("--runs-dir", str(tmp_path / "runs"))
    result = CliRunner().invoke(app, ["verify", str(model), "--exits", "2", *SMALL, *gates, *runs, "--plain"])
    assert result.exit_code == 3, result.output
    assert "give one as the baseline" in result.output  # what could not be measured fails, and says why
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {
        "max_over_refusal": True,
        "min_fidelity": False,
    }
    asr = [row for row in report["measures"] if row["measure"] == "asr" and row["exit"]]
    assert [(row["exit"], row["n"], row["runtime"]) for row in asr] == [(2, 3, "llamacpp")]
    assert not [row for row in report["measures"] if row["measure"] in ("mcnemar_p", "asr_change")]
    (subject,) = report["subjects"]
    assert (subject["kind"], subject["default_exit"]) == ("shipped", 2)
    assert (folder / "report.html").stat().st_size > 10_000


def test_a_gguf_may_be_the_baseline_of_another(tiny_verified: dict[str, Artifact], tmp_path: Path) -> None:
    model = str(tiny_verified["gguf"].path / "model.gguf")
    gates = ("--gate", "max_kl=0.001", "--gate", "max_over_refusal_rise=0", "--gate", "max_utility_drop=0")
    runs = ("--runs-dir", str(tmp_path / "runs"))
    command = ["verify", model, "--baseline", model, "--exits", "2", *SMALL, *gates, *runs, "--plain"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    measures = json.loads((folder / "report.json").read_text())["measures"]
    rows = {row["measure"]: row for row in measures if row["artifact"] == "target"}
    assert rows["kl_text"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["kl_text"]["note"] == "llamacpp on 'source' to this, a token; text only"
    assert rows["unsafe_by_quantization"]["value"] == 0
    # llama.cpp's encoder is under test itself.
    assert rows["fidelity_cosine"]["value"] is None and "give one as the baseline" in rows["fidelity_cosine"]["note"]


def test_with_a_baseline_the_target_ships_and_the_baseline_is_what_it_is_compared_with(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    source, model = (str(tiny_verified[name].path) for name in ("source", "gguf"))
    graph = verification(Wanted(model, baseline=source, gates=["memory=1GiB"], settings=["vqa=7"]), tmp_path)
    assert [(node.id, node.planned.type) for node in graph.nodes] == [
        ("source", "checkpoint"),
        ("target", "gguf"),
        ("verify", "verdict"),
    ]
    assert graph.shipped == ("target",)
    assert graph.recipe.gates.asked() == {"memory": 1 << 30}
    (verdict,) = graph.verdicts
    assert verdict.stage.params.model_dump()["vqa"] == 7
    alone = verification(Wanted(source), tmp_path)
    assert alone.shipped == ("source",)


def test_a_stage_is_the_recipes_however_often_it_was_verified(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "cut.yaml").write_text(
        "recipe: 1\nname: cut\nsource: {model: demo:tiny-llava}\nstages: {exit: {uses: early-exit, with: {layer: 1}}}\n"
    )
    result = CliRunner().invoke(app, ["run", str(tmp_path / "cut.yaml"), "--runs-dir", str(runs), "--plain"])
    assert result.exit_code == 0, result.output
    (recipes,) = runs.iterdir()
    made = {stage: find_artifact(stage, runs).digest for stage in ("source", "exit")}
    asked = (
        "--baseline",
        "demo:tiny-llava",
        "--exits",
        "1",
        *SMALL,
        "--set",
        "language=0",
        "--set",
        "fidelity_images=0",
    )
    for _ in range(2):
        result = CliRunner().invoke(app, ["verify", "exit", *asked, "--runs-dir", str(runs), "--plain"])
        assert result.exit_code == 0, result.output
        assert {stage: find_artifact(stage, runs).digest for stage in made} == made
    verifications = sorted(folder.name for folder in runs.iterdir() if folder != recipes)
    assert len(verifications) == 2
    assert find_artifact(f"{verifications[0]}:verify", runs).type == "verdict"
    with pytest.raises(RecipeError, match=f"the run {recipes.name} has no artifact of a stage 'verify'"):
        find_artifact("verify", runs)
    shutil.rmtree(recipes)
    with pytest.raises(RecipeError, match="known only by RUN:ID"):
        find_artifact("source", runs)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("./none.gguf"), "check the path"),
        (Wanted("demo:tiny-lava"), "demo:tiny-llava"),
        (Wanted("demo:tiny-llava", exits="1;2"), "--exits 1,5,9"),
        (Wanted("demo:tiny-llava", exits="7"), "choose exits from 1 to 3"),
        (Wanted("demo:tiny-llava", gates=["max_ars=0.1"]), "max_asr"),
        (Wanted("demo:tiny-llava", settings=["vqas=1"]), "vqa"),
        (Wanted("demo:tiny-llava", judges=["perspective"]), "network: true"),
        (Wanted("demo:tiny-llava", judges=["refusal-rul"]), "known judges"),
        (Wanted("demo:tiny-llava", baseline="demo:nothing"), "demo:"),
    ],
)
def test_what_cannot_be_verified_is_refused_with_the_way_out(wanted: Wanted, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        verification(wanted, tmp_path)
    assert message in str(refused.value)
