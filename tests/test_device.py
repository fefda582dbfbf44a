"""Device profiles and the budget that is checked before any work starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from artifacts.errors import RecipeError
from pipeline.cli import app
from pipeline.device import Device, device, device_names, parse_bytes, show_bytes
from pipeline.graph import build_graph
from pipeline.recipe import load_recipe
from stages.models.memory import gptq_bytes
from stages.models.smol_llava import smol_llava_spec
from stages.runtimes.memory import room_for_an_image


def test_every_shipped_profile_is_valid_and_they_are_listed_by_size() -> None:
    names = device_names()
    assert {"laptop-2gb", "laptop-8gb", "laptop-16gb", "phone-4gb"} <= set(names)
    sizes = [device(name).memory for name in names]
    assert sizes == sorted(sizes)
    assert all(device(name).note for name in names)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("800MiB", 800 << 20), ("1024", 1024), ("3 kib", 3072), (7, 7)],
)
def test_sizes_are_read_as_people_write_them(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 gigs", "-1GiB", "1e9", "1GiB2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError):
        Device.model_validate({"memory": 0, "context": 512})
    with pytest.raises(ValidationError):
        Device.model_validate({"memory": "1GiB", "context": 1})


def test_bytes_are_shown_for_people() -> None:
    assert [show_bytes(n) for n in (512, 5 << 20, 3 << 29)] == ["0 KiB", "5 MiB", "1.50 GiB"]


RECIPE = """\
recipe: 1
name: tight
source: {{model: demo:smol-llava}}
device: {{memory: {memory}, context: {context}}}
stages:
  gguf: {{uses: gguf, with: {{type: {type}}}}}
"""


def refused(folder: Path, memory: str, context: int, type: str) -> RecipeError:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(memory=memory, context=context, type=type))
    with pytest.raises(RecipeError) as caught:
        build_graph(load_recipe(path))
    assert caught.value.where == f"{path}:6"
    return caught.value


def test_a_type_that_does_not_fit_is_refused_with_the_numbers_and_the_largest_that_fits(tmp_path: Path) -> None:
    error = refused(tmp_path, "360MiB", 512, "F16")
    assert "F16 does not fit" in error.what
    assert "the device allows 360 MiB" in (error.why or "")
    assert "the largest type that fits is" in (error.way_out or "")


def test_a_budget_that_nothing_fits_is_refused_with_every_change_and_the_least_that_can_be_reached(
    tmp_path: Path,
) -> None:
    error = refused(tmp_path, "20MiB", 2048, "Q4_0")
    way_out = error.way_out or ""
    figure = r"(\d+) MiB"
    for words in (
        rf"no type fits: of F16, Q8_0, [\w, ]+, Q2_K the smallest, Q\d_\w+, needs {figure}",
        rf"with context: 256 it needs {figure};",
        rf"with kv_cache: Q8_0 it needs {figure};",
        rf"with exit 1 instead of 11 it needs {figure};",
        rf"with mmproj_type: IQ4_XS it needs {figure};",
        r"the least that these changes reach, Q\d_\w+, context: 256, kv_cache: Q8_0, exit 1 instead of 11, "
        rf"mmproj_type: IQ4_XS, is {figure}; an importance matrix allows smaller types; start from a smaller model",
    ):
        assert re.search(words, way_out), way_out
    assert way_out.endswith("is 'phone-2gb'")
    least = int(re.search(rf"mmproj_type: IQ4_XS, is {figure}", way_out)[1])  # type: ignore[index]
    # What was said to be in reach is, and what is a little less is not.
    change = "stages:\n  exit: {uses: early-exit, with: {layer: 1}}"
    kind = re.search(r"the smallest, (\w+),", way_out)[1]  # type: ignore[index]
    recipe = RECIPE.format(memory=f"{least + 1}MiB, kv_cache: Q8_0", context=256, type=f"{kind}, mmproj_type: IQ4_XS")
    path = tmp_path / "reached.yaml"
    path.write_text(recipe.replace("stages:", change).replace("uses: gguf,", "uses: gguf, needs: exit,"))
    assert build_graph(load_recipe(path)).node("gguf").planned.type == "gguf"
    with pytest.raises(RecipeError, match="does not fit"):
        path.write_text(path.read_text().replace(f"{least + 1}MiB", f"{least - 1}MiB"))
        build_graph(load_recipe(path))


def test_types_that_are_chosen_while_running_are_refused_only_where_no_choice_can_fit(tmp_path: Path) -> None:
    error = refused(tmp_path, "20MiB", 2048, "auto")
    assert "no choice of types fits the device 'inline'" in error.what
    assert re.search(r"with the smallest that the shapes allow it needs \d+ MiB", error.why or "")
    assert "the device allows 20 MiB, of which 2 MiB stay free" in (error.why or "")
    assert re.search(r"mmproj_type: IQ4_XS, is \d+ MiB; .*start from a smaller model", error.way_out or "")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(memory="220MiB", context=512, type="auto"))
    assert build_graph(load_recipe(path)).shipped == ("gguf",)


def test_a_change_that_is_enough_is_said_to_be(tmp_path: Path) -> None:
    error = refused(tmp_path, "230MiB", 4096, "Q4_0")
    assert re.search(r"with context: 256 it needs \d+ MiB and fits;", error.way_out or ""), error.way_out


def test_smaller_keys_and_values_can_make_a_context_fit(tmp_path: Path) -> None:
    whole = refused(tmp_path, "330MiB", 8192, "Q4_0")
    assert "Q4_0 does not fit" in whole.what
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(memory="330MiB, kv_cache: Q8_0", context=8192, type="Q4_0"))
    graph = build_graph(load_recipe(path))
    assert graph.shipped == ("gguf",)
    assert graph.recipe.device is not None and graph.recipe.device.numbers()["kv_cache_bits"] == 8
    text = CliRunner().invoke(app, ["plan", str(path)], prog_name="pipeline").output
    assert "context 8192 tokens, keys and values in Q8_0" in text


def test_a_gptq_checkpoint_whose_weights_alone_do_not_fit_is_refused_with_the_bits_that_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    wanted = "uses: gptq, with: {{group_size: 64, bits: {type}}}"
    quantized = RECIPE.replace("uses: gguf, with: {{type: {type}}}", wanted)

    def plan(memory: str, bits: int) -> None:
        path.write_text(quantized.format(memory=memory, context=512, type=bits))
        build_graph(load_recipe(path))

    size = gptq_bytes(replace(smol_llava_spec(), quantization="gptq-4bit-64")) >> 20
    plan(f"{size + 1}MiB", 4)
    with pytest.raises(RecipeError) as caught:
        plan(f"{size + 1}MiB", 8)
    error = caught.value
    assert error.where == f"{path}:6" and error.what == "stage 'gguf': gptq-8bit-64 does not fit the device 'inline'"
    assert f"the device allows {size + 1} MiB" in (error.why or "")
    assert re.match(r"with bits: 4 they take \d+ MiB; the smallest device that holds these is", error.way_out or "")
    with pytest.raises(RecipeError) as caught:
        plan("20MiB", 2)
    assert re.match(r"no bits fit: they take at least \d+ MiB; start from a smaller model", caught.value.way_out or "")


def test_a_budget_that_is_enough_is_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(memory="2GiB", context=2048, type="Q4_0"))
    assert build_graph(load_recipe(path)).shipped == ("gguf",)


def test_types_of_single_tensors_are_what_to_leave_out_where_that_is_enough(tmp_path: Path) -> None:
    error = refused(tmp_path, "300MiB", 512, "Q4_0, tensor_types: {ffn: F32}")
    assert "Q4_0 does not fit" in error.what
    largest = re.search(r"the largest type that fits is (\w+) \(\d+ MiB, without other types", error.way_out or "")
    assert largest is not None, error.way_out
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(memory="300MiB", context=512, type=largest[1]))
    build_graph(load_recipe(path))


@pytest.mark.parametrize(("target", "size"), [("200MB", 191), ("300MB", 286)])  # the second is more than all floats
def test_a_file_of_a_given_size_must_fit_too(target: str, size: int, tmp_path: Path) -> None:
    error = refused(tmp_path, "230MiB", 512, f"auto, target: {target}")
    assert f"a file of {size} MiB does not fit the device 'inline'" in error.what
    most = re.match(r"set target to (\d+) or less", error.way_out or "")
    assert most is not None
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(memory="230MiB", context=512, type=f"auto, target: {most[1]}"))
    build_graph(load_recipe(path))


def test_what_cannot_be_laid_out_for_the_device_is_refused(tmp_path: Path) -> None:
    """Rows of 576 fit no block of Q1_0, and nothing that is smaller stands in for it."""
    error = refused(tmp_path, "2GiB", 512, "Q1_0")
    assert "Q1_0" in error.what


@pytest.mark.parametrize("type", ["Q4_0", "auto"])
def test_a_context_without_room_for_an_image_is_refused_with_one_that_has_it(type: str, tmp_path: Path) -> None:
    tokens = 64  # of an image of demo:smol-llava
    error = refused(tmp_path, "2GiB", tokens, type)
    assert error.what == "stage 'gguf': a context of 64 tokens has no room for an image"
    assert "takes 64 tokens" in (error.why or "")
    enough = re.match(r"set context to (\d+) or more", error.way_out or "")
    assert enough is not None
    path = tmp_path / "recipe.yaml"
    for context in (room_for_an_image(tokens), int(enough[1])):
        path.write_text(RECIPE.format(memory="2GiB", context=context, type=type))
        build_graph(load_recipe(path))
    refused(tmp_path, "2GiB", room_for_an_image(tokens) - 1, type)
