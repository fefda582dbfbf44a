"""`pipeline plan --explore`: what a budget could be met with, and what is known of each way."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from artifacts.artifact import Artifact
from artifacts.manifest import Provenance
from artifacts.measures import MEASURES_NAME, Measure, write_measures
from pipeline.cli import app
from pipeline.commands.explore import Explored, Measured, explore
from pipeline.commands.load import load_graph, open_store
from pipeline.keys import content_key, provenance
from stages.models.smol_llava import smol_llava_spec
from stages.quantize.known import Costs, known_costs, note_costs
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence
from stages.runtimes.mixture import outline_of_text

RECIPE = """\
recipe: 1
name: tight
source: {{model: demo:smol-llava}}
device: {{memory: {memory}, context: 512}}
stages:
  gguf: {{uses: gguf, with: {{type: {type}}}}}
"""


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="pipeline")


def explored(folder: Path, memory: str, type: str) -> Explored:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(memory=memory, type=type))
    (found,) = explore(load_graph(str(path), within_budget=False))
    return found


def test_what_does_not_fit_is_shown_with_every_change_that_would_make_it_fit(tmp_path: Path) -> None:
    found = explored(tmp_path, "340MiB", "F16")
    own = found.ways[0]
    assert (own.change, own.type, own.exit, own.blocks, own.fits) == ("as in the recipe", "F16", 11, 30, False)
    single = {way.change: way for way in found.ways}
    assert single["Q4_0"].fits and single["Q4_0"].memory < own.memory and single["Q4_0"].size < own.size
    assert single["exit 10"].memory < own.memory and single["exit 10"].exit == 10
    assert single["3 blocks fewer"].blocks == 27
    for way in found.ways:
        if ", " in way.change:  # two changes stand where one is not enough, and are enough
            assert way.fits and single.get(way.type, own).fits is False
    assert {way.type for way in found.ways if way.fits} > {"Q4_0", "Q8_0"}


def test_the_command_shows_a_table_and_gives_it_to_programs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(memory="340MiB", type="F16"))
    refused = cli("plan", str(path))
    assert refused.exit_code == 2 and "does not fit" in refused.stderr
    shown = cli("plan", str(path), "--explore")
    assert shown.exit_code == 0, shown.output
    line = r"^  Q4_0 +11 +30 +\d+ MiB +\d+ MiB +fits +not known +not measured"
    assert re.search(line, shown.output, re.MULTILINE), shown.output
    data = json.loads(cli("plan", str(path), "--explore", "--json").output)
    assert data["explore"][0]["ways"][0]["fits"] is False and data["stages"]


def test_what_was_measured_of_a_checkpoint_says_what_types_should_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    shapes = outline_of_text(smol_llava_spec().text).shapes
    groups = {
        Group(name, (name,), None): [
            Option("Q8_0", 1, Divergence(0.25 / len(shapes), 0.5 / len(shapes))),
            Option("Q4_0", 1, Divergence(1.0 / len(shapes), 2.0 / len(shapes))),
        ]
        for name in shapes
    }
    source = _cached_source(tmp_path)
    note_costs(source.digest, groups)
    found = explored(tmp_path, "340MiB", "Q8_0")
    ways = {way.change: way for way in found.ways}
    assert source.digest[:12] in found.estimated_from
    assert found.ways[0].expected_kl_text == pytest.approx(0.25)
    assert found.ways[0].expected_kl_refusal == pytest.approx(0.5)
    assert ways["exit 10"].expected_kl_text == pytest.approx(0.25)  # without images the exit is not asked
    # Of fewer blocks nothing is known, and of types that were not looked at: K-quants, here.
    assert ways["1 block fewer" if "1 block fewer" in ways else "2 blocks fewer"].expected_kl_text is None
    assert ways["Q3_K_M"].expected_kl_text is None


def test_costs_of_tensors_that_share_a_group_but_not_a_type_are_the_mean() -> None:
    costs = Costs([(("a", "b"), {"Q4_0": Divergence(1.0, 4.0), "Q8_0": Divergence(0.0, 2.0)})])
    assert costs.of({"a": "Q4_0", "b": "Q8_0"}) == Divergence(0.5, 3.0)
    assert costs.of({"a": "Q4_0", "b": "F16"}) == Divergence(0.5, 2.0)
    assert costs.of({"a": "Q4_0", "b": "Q2_K"}) is None and costs.of({"a": "Q4_0"}) is None


HARDENED = RECIPE.replace("  gguf: {{", "  harden: {{uses: l-ppo, with: {{steps: 7}}}}\n  gguf: {{needs: harden, ")
CUT = HARDENED.replace(
    "  gguf: {{needs: harden", "  cut: {{uses: early-exit, needs: harden, with: {{layer: 11}}}}\n  gguf: {{needs: cut"
)


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        (RECIPE, {"Q4_0": False, "exit 10": False}),
        (HARDENED, {"Q4_0": True, "exit 10": False}),
        (HARDENED.replace("steps: 7", "steps: 8"), {"Q4_0": False, "exit 10": False}),
        (HARDENED.replace("recipe: 1", "recipe: 1\nseed: 5"), {"Q4_0": False}),
        (CUT, {"Q4_0": True}),  # the exit says it
        (CUT.replace("layer: 11", "layer: 11, realign: true"), {"Q4_0": False}),
    ],
)
def test_what_a_verification_in_the_store_found_of_the_same_stages_stands_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, counts: dict[str, bool]
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    digest = _verified(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.format(memory="340MiB", type="F16"))
    (found,) = explore(load_graph(str(path), within_budget=False))
    ways = {way.change: way for way in found.ways}
    expected = Measured(digest, kl_text=0.25, asr=0.5)
    assert {name: ways[name].measured for name in counts} == {
        name: expected if here else None for name, here in counts.items()
    }
    assert ways["Q8_0"].measured is None and ways["as in the recipe"].measured is None


def _verified(folder: Path) -> str:
    """Source, l-ppo, gguf and verdict in the store, as if the hardened recipe had run in Q4_0; the GGUF's digest."""
    path = folder / "ran.yaml"
    path.write_text(HARDENED.format(memory="340MiB", type="Q4_0"))
    graph = load_graph(str(path), within_budget=False)
    store, inputs = open_store(), dict[str, Artifact]()
    store.prepare()
    for number, node in enumerate(graph.nodes):
        key = str(number) * 64
        output = store.new_output(key)
        about: dict[str, object] = {"stage": node.id}
        if node.id == "gguf":
            writer = gguf.GGUFWriter(output / "model.gguf", "llama")
            writer.add_block_count(30)
            writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            about = {"type": "Q4_0", "default_exit": 11, "base": "demo:smol-llava"}
        origin = provenance(node.stage, key, inputs, seed=graph.recipe.seed_of(node.id))
        inputs = {node.id: store.add(key, output, node.planned.type, about, origin)}
    rows = [
        Measure(
            artifact="q4",
            digest=inputs["gguf"].digest,
            role="quantized",
            runtime="llamacpp",
            measure=name,
            value=value,
            band=band,
        )
        for name, value, band in (("kl_text", 0.25, None), ("asr", 0.5, "average"), ("asr", 0.75, "early"))
    ]
    output = store.new_output("b" * 64)
    write_measures(output / MEASURES_NAME, rows)
    store.add("b" * 64, output, "verdict", {}, Provenance(stage="icet-verify"))
    return inputs["gguf"].digest


@pytest.mark.parametrize(
    "other", ["tensor_types: {attn: F32}", "embedding_type: Q8_0", "mmproj_type: Q4_0", "imatrix: matrix"]
)
def test_figures_of_a_file_that_was_made_otherwise_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    _verified(tmp_path)
    path = tmp_path / "recipe.yaml"
    matrix = "  matrix: {uses: imatrix}\n" if "imatrix" in other else ""
    path.write_text(HARDENED.format(memory="340MiB", type=f"Q4_0, {other}") + matrix)
    (found,) = explore(load_graph(str(path), within_budget=False))
    assert found.ways[0].change == "as in the recipe" and found.ways[0].measured is None


def test_of_a_file_of_a_given_size_the_ways_begin_with_the_largest_type_that_it_holds(tmp_path: Path) -> None:
    whole, small = explored(tmp_path, "2GiB", "auto"), explored(tmp_path, "2GiB", "auto, target: 95MB")
    assert whole.ways[0].type == "F16" and small.ways[0].type not in ("F16", "Q8_0")
    assert small.ways[0].size - small.ways[0].memory < 0 and small.ways[0].size < 95_000_000 + (80 << 20)


def test_a_damaged_note_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    note_costs("ab", {Group("g", ("g",), 0): [Option("Q4_0", 1, Divergence(1.0, 2.0))]})
    assert known_costs("ab") == Costs([(("g",), {"Q4_0": Divergence(1.0, 2.0)})])
    (tmp_path / "sensitivity" / "ab.json").write_text('{"groups": [[["g"], {"Q4_0": [1.0')
    assert known_costs("ab") is None and known_costs("cd") is None


def _cached_source(folder: Path) -> Artifact:
    """Something in the store under the key of the recipe's source, as if the demo had been built."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(memory="340MiB", type="Q8_0"))
    graph = load_graph(str(path), within_budget=False)
    stage = graph.node("source").stage
    key = content_key(stage, {}, seed=graph.recipe.seed_of("source"), device={})
    store = open_store()
    store.prepare()
    output = store.new_output(key)
    (output / "config.json").write_text("{}")
    return store.add(key, output, "checkpoint", {}, Provenance(stage="source", key=key))
