"""The graph: order, and everything that is refused before any work starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import RecipeError
from pipeline.graph import Graph, build_graph
from pipeline.recipe import load_recipe
from stages.models.smol_llava import smol_llava_spec
from stages.models.spec import TextSpec
from stages.runtimes.hollow import encoder_tensors, text_tensors, write_hollow_encoder, write_hollow_model
from stages.runtimes.mixture import outline_of_text
from stages.runtimes.prediction import predict_files

HEAD = "recipe: 1\nname: g\nsource: {model: demo:tiny-llava}\n"
LADDER = (
    HEAD
    + """\
stages:
  icet: {uses: icet-verify, needs: [q4, q8], with: {controls: [plain]}}
  q8: {uses: gguf, needs: exit, with: {type: Q8_0}}
  q4: {uses: gguf, needs: exit, with: {type: Q4_0}}
  plain: {uses: gguf, with: {type: Q4_0}}
  exit: {uses: early-exit, with: {layer: 2}}
"""
)


def graph_of(folder: Path, text: str) -> Graph:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return build_graph(load_recipe(path))


def refused(folder: Path, text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        graph_of(folder, text)
    assert (caught.value.where or "").startswith(str(folder / "recipe.yaml:"))
    return caught.value


def test_every_stage_comes_after_what_it_takes_and_otherwise_in_the_recipes_order(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, LADDER)
    assert [node.id for node in graph.nodes] == ["source", "plain", "exit", "q8", "q4", "icet"]
    assert graph.node("icet").needs == ("q4", "q8")
    assert graph.node("icet").inputs == ("q4", "q8", "source", "plain")
    assert graph.shipped == ("q4", "q8")
    assert graph.node("source").needs == ()


def test_shapes_are_known_before_any_work(tmp_path: Path) -> None:
    planned = graph_of(tmp_path, LADDER).node("q4").planned
    assert planned.type == "gguf" and planned.spec is not None
    assert planned.spec.quantization == "Q4_0"
    assert planned.spec.vision is not None and planned.spec.vision.layers == 2


@pytest.mark.parametrize(
    ("stages", "line", "what", "more"),
    [
        ("  a: {uses: early-exitt, with: {layer: 2}}", 5, "unknown stage 'early-exitt'", "'early-exit'"),
        ("  a: {uses: early-exit, with: {layr: 2}}", 5, "unknown key 'layr'", "'layer'"),
        (
            "  a:\n    uses: early-exit\n    with:\n      layer: two",
            8,
            "layer 'two' is no exit",
            "auto",
        ),
        ("  a: {uses: early-exit}", 5, "'layer' is missing", None),
        ("  a: {uses: early-exit, with: {layer: 9}}", 5, "layer 9 is not an exit", "1 to 3"),
        ("  a: {uses: early-exit, needs: bee, with: {layer: 2}}", 5, "needs 'bee'", "choose one of: source, a"),
        ("  a: {uses: early-exit, needs: a, with: {layer: 2}}", 5, "a needs a", None),
        ("  a: {uses: gguf, with: {type: Q4_9}}", 5, "Q4_9", "Q4_"),
        (
            "  a: {uses: gguf, with: {type: Q4_0}}\n  b: {uses: early-exit, needs: a, with: {layer: 1}}",
            6,
            "'b' cannot take 'a'",
            "source",
        ),
        (
            "  a: {uses: early-exit, needs: [source, b], with: {layer: 1}}\n  b: {uses: early-exit, with: {layer: 1}}",
            5,
            "takes one input, not 2",
            None,
        ),
        (
            "  a: {uses: gguf, with: {type: Q4_0}}\n  v: {uses: icet-verify, needs: a, with: {baseline: sauce}}",
            6,
            "baseline of stage 'v' names 'sauce'",
            "'source'",
        ),
        (
            "  a: {uses: gguf, with: {type: Q4_0}}\n  v: {uses: icet-verify, needs: a, with: {controls: [a, bb]}}",
            6,
            "names 'bb'",
            None,
        ),
        ("  a: {uses: early-exit, with: {layer: 1}}\ngates: {max_asr: 0.1}", 6, "no stage that measures", "icet-"),
        (
            "  a: {uses: gguf, with: {type: Q4_0}}\n  v:\n    uses: icet-verify\n    needs: a\n    with:\n"
            "      split: validation\n      harmful: {advbench: 3}\ngates: {max_asr: 0.1}",
            12,
            "no gate may read what 'v' measures",
            "test side",
        ),
        ("  a: {uses: early-exit, with: {layer: 1}}\npublish: {to: oci-layout:d}", 6, "nothing to publish", "gguf"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(
    tmp_path: Path, stages: str, line: int, what: str, more: str | None
) -> None:
    error = refused(tmp_path, HEAD + "stages:\n" + stages + "\n")
    assert error.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert what in error.what
    if more:
        assert more in f"{error.what} {error.why} {error.way_out}"


def test_a_memory_gate_over_a_gptq_checkpoint_is_refused_since_it_could_never_hold(tmp_path: Path) -> None:
    stages = (
        "stages:\n  q: {uses: gptq, with: {group_size: 64}}\n  g: {uses: gguf}\n"
        "  icet: {uses: icet-verify, needs: [q, g]}\n"
    )
    error = refused(tmp_path, HEAD + stages + "gates: {memory: 1GiB}\n")
    assert error.what == "the gate `memory` cannot hold: 'q' is a GPTQ checkpoint"
    assert graph_of(tmp_path, HEAD + stages.replace("[q, g]", "g") + "gates: {memory: 1GiB}\n").shipped == ("g",)


def test_a_cycle_is_named_in_full(tmp_path: Path) -> None:
    stages = "".join(
        f"  {id}: {{uses: early-exit, needs: {need}, with: {{layer: 1}}}}\n"
        for id, need in (("a", "c"), ("b", "a"), ("c", "b"), ("d", "a"))
    )
    error = refused(tmp_path, HEAD + "stages:\n" + stages)
    circle = error.what.partition(": ")[2].split(" needs ")
    assert circle[0] == circle[-1] and set(circle) == {"a", "b", "c"}
    assert "a needs c" in error.what + " " + error.what  # in the direction in which the recipe says it


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("demo:smol-lava", "unknown demo model"),
        ("./nowhere", "there is no folder"),
        ("what is this", "no model that a source can read"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_its_line(tmp_path: Path, model: str, what: str) -> None:
    error = refused(tmp_path, LADDER.replace("demo:tiny-llava", model))
    assert error.where == f"{tmp_path / 'recipe.yaml'}:3"
    assert what in error.what


def test_a_family_that_is_not_known_is_refused(tmp_path: Path, tiny_llava: Path) -> None:
    import json
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_llava, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "mllama"
    (model / "config.json").write_text(json.dumps(config))
    error = refused(tmp_path, LADDER.replace("demo:tiny-llava", "./model"))
    assert "mllama" in f"{error.what} {error.why}"


def test_a_folder_is_found_from_the_recipe_and_not_from_where_the_user_stands(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_llava)
    monkeypatch.chdir("/")
    graph = graph_of(tmp_path, LADDER.replace("demo:tiny-llava", "./model"))
    assert graph.node("source").planned.spec is not None


def test_a_folder_given_on_the_command_line_is_found_from_where_the_user_stands(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/model").symlink_to(tiny_llava)
    (tmp_path / "recipe.yaml").write_text(LADDER)
    monkeypatch.chdir(tmp_path / "here")
    graph = build_graph(load_recipe(tmp_path / "recipe.yaml", ["source.model=./model"]))
    assert graph.node("source").planned.spec is not None


def test_a_shipped_recipe_is_valid_and_says_what_it_is_for() -> None:
    from recipes import purpose, shipped

    assert {"quickstart", "smoke"} <= set(shipped())
    for path in shipped().values():
        graph = build_graph(load_recipe(path))
        assert graph.recipe.name == path.stem
        assert purpose(path)
        assert f"pipeline run {path.stem}" in path.read_text(encoding="utf-8")


FINISHED = """\
recipe: 1
name: g
source: {{model: ./model.gguf, mmproj: {mmproj}}}
device: {{memory: {memory}, context: {context}}}
stages:
  icet: {{uses: icet-verify, needs: source, with: {{baseline: null}}}}
{gates}"""


def test_a_finished_gguf_for_which_the_memory_gate_cannot_hold_is_refused(tmp_path: Path) -> None:
    text = TextSpec(2, 256, 512, 4, 4, 64, 1000, tied_embeddings=True)
    outline = outline_of_text(text)
    write_hollow_model(tmp_path / "model.gguf", outline, text_tensors(outline, "F16"))
    needed = predict_files(tmp_path / "model.gguf", None, 512).total

    def recipe(memory: int, gates: str = "gates: {memory: device}\n", context: int = 512, mmproj: str = "none") -> str:
        return FINISHED.format(memory=memory, context=context, gates=gates, mmproj=mmproj)

    graph_of(tmp_path, recipe(needed))
    graph_of(tmp_path, recipe(needed - 1, gates=""))
    graph_of(tmp_path, recipe(needed - 1, gates=f"gates: {{memory: {needed}}}\n"))
    for small in (recipe(needed - 1), recipe(needed, gates=f"gates: {{memory: {needed - 1}}}\n")):
        error = refused(tmp_path, small)
        assert error.where == f"{tmp_path / 'recipe.yaml'}:3"
        assert error.what == "stage 'source': model.gguf takes more than the gate `memory` allows"
        assert "at a context of 512 tokens" in (error.why or "")

    vision = smol_llava_spec().vision
    assert vision is not None
    write_hollow_encoder(tmp_path / "mmproj.gguf", vision, 256, encoder_tensors(vision, 256))
    error = refused(tmp_path, recipe(1 << 30, context=vision.image_tokens, mmproj="./mmproj.gguf"))
    assert "has no room for an image" in error.what
    graph_of(tmp_path, recipe(1 << 30, mmproj="./mmproj.gguf"))
