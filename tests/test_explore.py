"""`pipeline plan --explore`: what a budget could be met with, and what is known of each way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from artifacts.artifact import Artifact
from artifacts.manifest import Provenance
from artifacts.measures import MEASURES_NAME, Band, Measure, write_measures
from pipeline.cli import app
from pipeline.commands.explore import Explored, explore
from pipeline.commands.known import Measured
from pipeline.commands.load import load_graph, open_store
from pipeline.device import kinds_for
from pipeline.graph import Graph
from pipeline.keys import content_key, device_numbers, provenance
from stages.models.smol_llava import smol_llava_spec
from stages.models.tiny import tiny_llava_spec
from stages.quantize.known import Costs, known_costs, matrix_digest, note_costs
from stages.quantize.options import Group, Option
from stages.quantize.sensitivity import Divergence
from stages.runtimes.hollow import text_tensors, write_hollow_model
from stages.runtimes.imatrix import Collected, read_imatrix, write_imatrix
from stages.runtimes.mixture import outline_of_text
from stages.runtimes.prediction import predict_files, predict_memory

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
    note_costs(source.digest, groups, "")
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
    _judged(
        inputs["gguf"].digest,
        [("kl_text", None, None, 0.25), ("asr", None, "average", 0.5), ("asr", None, "early", 0.75)],
    )
    return inputs["gguf"].digest


def _judged(digest: str, found: Sequence[tuple[str, int | None, Band | None, float]]) -> None:
    """A verdict about a GGUF in the store: measure, exit, band, value."""
    store = open_store()
    output = store.new_output("b" * 64)
    rows = [
        Measure(
            artifact="q4",
            digest=digest,
            role="quantized",
            runtime="llamacpp",
            measure=measure,
            exit=exit,
            band=band,
            value=value,
        )
        for measure, exit, band, value in found
    ]
    write_measures(output / MEASURES_NAME, rows)
    store.add("b" * 64, output, "verdict", {}, Provenance(stage="icet-verify"))


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
    assert whole.ways[0].type == "F16" and whole.ways[0].change == "F16 for chosen types"
    sizes = {
        type: sum(predict_memory(replace(smol_llava_spec(), quantization=type), 512).by_type.values())
        for type in kinds_for(smol_llava_spec())
    }
    fitting = {type: size for type, size in sizes.items() if size <= 95_000_000}
    assert sizes[small.ways[0].type] == max(fitting.values()) and len(fitting) < len(sizes)


def test_a_file_whose_types_were_chosen_stands_first_with_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("smol", "tiny").format(memory="340MiB", type="auto"))
    graph = load_graph(str(path))
    (before,) = explore(graph)
    outline = outline_of_text(tiny_llava_spec().text)
    types = {name: "Q8_0" if "ffn" in name else "Q5_0" for name in outline.shapes}
    inputs: dict[str, Artifact] = {}
    for node in graph.nodes:
        about: dict[str, object] = {"stage": node.id}
        if node.id == "gguf":
            about["default_exit"] = 2

        def fill(output: Path, id: str = node.id) -> None:
            if id == "gguf":
                write_hollow_model(output / "model.gguf", outline, text_tensors(outline, types))

        inputs = {node.id: _stored(graph, node.id, inputs, about, fill)}
    groups = {
        Group(name, (name,), None): [Option(type, 1, Divergence(1.0, 2.0)) for type in ("Q5_0", "Q8_0")]
        for name in types
    }
    note_costs(inputs["gguf"].manifest.provenance.inputs["source"], groups, "")
    rows: list[tuple[str, int | None, Band | None, float]] = [
        ("kl_text", None, None, 0.25),
        ("asr", None, "average", 0.5),
        ("vqa_accuracy", None, "all", 0.5),
        ("vqa_accuracy", 1, None, 0.25),
        ("vqa_accuracy", 2, None, 0.75),
    ]
    _judged(inputs["gguf"].digest, rows)
    (found,) = explore(graph)
    made, *others = found.ways
    plan = predict_files(inputs["gguf"].file("model.gguf"), None, 512)
    assert (made.change, made.type, made.exit, made.blocks) == ("as in the recipe", "auto", 2, 2)
    assert (made.size, made.memory, made.fits) == (sum(plan.by_type.values()), plan.total, True)
    assert made.expected_kl_text == pytest.approx(len(types)) and made.expected_kl_refusal == pytest.approx(
        2 * len(types)
    )
    # What it sees, at its own exit.
    assert made.measured == Measured(inputs["gguf"].digest, kl_text=0.25, asr=0.5, vqa_accuracy=0.75)
    assert [way.change for way in others] == [way.change for way in before.ways]


def test_what_was_measured_with_one_importance_matrix_is_not_said_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path / "home"))
    shapes = outline_of_text(smol_llava_spec().text).shapes
    for file, square in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        entries = {
            name: Collected(np.full((1, row), square, np.float32), np.ones(1, np.float32))
            for name, (row, _) in shapes.items()
            if name.startswith("blk.")
        }
        write_imatrix(tmp_path / f"{file}.gguf", entries, datasets=[file], chunks=1, chunk_size=8)
    groups = {Group(name, (name,), None): [Option("Q8_0", 1, Divergence(1.0, 2.0))] for name in shapes}
    note_costs(_cached_source(tmp_path).digest, groups, matrix_digest(read_imatrix(tmp_path / "one.gguf")))
    expected = {}
    for more in ("", ", imatrix: ./one.gguf", ", imatrix: ./same.gguf", ", imatrix: ./other.gguf"):
        expected[more] = explored(tmp_path, "340MiB", f"Q8_0{more}").ways[0].expected_kl_text
    assert list(expected.values()) == [None, pytest.approx(len(shapes)), pytest.approx(len(shapes)), None]


def test_a_damaged_note_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_HOME", str(tmp_path))
    note_costs("ab", {Group("g", ("g",), 0): [Option("Q4_0", 1, Divergence(1.0, 2.0))]}, "")
    assert known_costs("ab", "") == Costs([(("g",), {"Q4_0": Divergence(1.0, 2.0)})])
    (tmp_path / "sensitivity" / "ab.json").write_text('{"matrix": "", "groups": [[["g"], {"Q4_0": [1.0')
    assert known_costs("ab", "") is None and known_costs("cd", "") is None


def _cached_source(folder: Path) -> Artifact:
    """Something in the store under the key of the recipe's source, as if the demo had been built."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(memory="340MiB", type="Q8_0"))
    graph = load_graph(str(path), within_budget=False)
    return _stored(graph, "source", {}, {}, lambda output: None)


def _stored(
    graph: Graph, id: str, inputs: Mapping[str, Artifact], about: dict[str, object], fill: Callable[[Path], None]
) -> Artifact:
    """An artifact in the store, where a run would look for that of this stage."""
    node, seed = graph.node(id), graph.recipe.seed_of(id)
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    key = content_key(node.stage, digests, seed=seed, device=device_numbers(graph))
    store = open_store()
    store.prepare()
    output = store.new_output(key)
    (output / "config.json").write_text("{}")
    fill(output)
    return store.add(key, output, node.planned.type, about, provenance(node.stage, key, inputs, seed=seed))
