"""Recipes: reading, including, overriding, the matrix, and saying what is wrong and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe
from pipeline.yaml_source import MAX_BYTES, parse_yaml

GOOD = """\
recipe: 1
name: small
source: {model: demo:tiny-llava}
device: {memory: 2GiB, context: 1024}
stages:
  exit:
    uses: early-exit
    with: {layer: 2}
  gguf:
    uses: gguf
    needs: exit
    with: {type: Q8_0}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def refused(folder: Path, text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_recipe_is_read_with_its_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.device is not None
    assert recipe.device.numbers() == {"memory": 2 << 30, "context": 1024}
    assert recipe.stages["exit"].needs == ("source",)
    assert recipe.stages["gguf"].needs == ("exit",)
    assert recipe.seed == 0


def test_every_value_remembers_its_line(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.where("stages", "exit", "with", "layer") == f"{tmp_path / 'recipe.yaml'}:8"
    assert recipe.where("stages", "gguf", "with", "not written") == f"{tmp_path / 'recipe.yaml'}:12"


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "way_out"),
    [
        ("source:", "sorce:", 3, "unknown key 'sorce'", "'source'"),
        ("    uses: gguf\n", "    uses: gguf\n    neds: exit\n", 11, "unknown key 'neds'", "'needs'"),
        ("recipe: 1", "recipe: 2", 1, "recipe cannot be 2", "1"),
        ("    uses: early-exit\n", "", 6, "'stages.exit.uses' is missing", None),
        ("{memory: 2GiB, context: 1024}", "laptop-8g", 4, "unknown device 'laptop-8g'", "'laptop-8gb'"),
        ("2GiB", "2 gigs", 4, "not a size", "2GiB"),
        ("context: 1024", "context: many", 4, "not 'many'", None),
        ("name: small", "name: 'a name'", 2, "not a valid name", "letters"),
        ("stages:\n", "stages: []\nother:\n", 5, "stages", None),
        ("recipe: 1\n", "", 1, "'recipe' is missing", "recipe: 1"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_nearest_choice(
    tmp_path: Path, old: str, new: str, line: int, what: str, way_out: str | None
) -> None:
    error = refused(tmp_path, GOOD.replace(old, new, 1))
    assert error.where == f"{tmp_path / 'recipe.yaml'}:{line}"
    assert what in f"{error.what}; {error.way_out}"
    if way_out is not None:
        assert way_out in (error.way_out or "")


def test_two_stages_of_one_name_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD + "  exit: {uses: early-exit, with: {layer: 1}}\n")
    assert "two entries are named 'exit'" in error.what
    assert error.where == f"{tmp_path / 'recipe.yaml'}:13"
    assert "line 6" in (error.why or "")


def test_a_stage_may_not_take_the_name_of_the_source(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD + "  source: {uses: early-exit, with: {layer: 1}}\n")
    assert "may not be named 'source'" in error.what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "must be a mapping"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("a: [1, 2\nb: 3\n", "not YAML"),
        ("a: \x01", "character that YAML does not allow"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: !thing 1\n", "tag"),
        ("a: {<<: {b: 1}}\n", "`<<`"),
        ("a: &x {b: *x}\n", "deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested"),
        ("a: " + "9" * 5000, "too many digits"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    assert what in f"{caught.value.what} {caught.value.why}"
    assert (caught.value.where or "").startswith("r.yaml")


def test_aliases_that_multiply_are_refused() -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(RecipeError, match="more than"):
        parse_yaml("\n".join(layers), "bomb.yaml")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="1 MiB"):
        load_recipe(write(tmp_path, "#" * (MAX_BYTES + 1)))


def test_a_recipe_that_is_missing_a_folder_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"recipe: 1\nname: \xff\xfe\n")
    with pytest.raises(RecipeError, match="UTF-8") as caught:
        load_recipe(tmp_path / "binary.yaml")
    assert (caught.value.where or "").endswith("binary.yaml:2")


# YAML allows fewer control characters in its text than JSON.
words = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(words, json_values, max_size=4))
def test_json_is_read_as_json(data: dict[str, object]) -> None:
    import json

    assert parse_yaml(json.dumps(data, ensure_ascii=False), "r.yaml").data == data


@given(st.text(max_size=200))
def test_any_text_is_either_data_or_one_clear_refusal(text: str) -> None:
    try:
        parse_yaml(text, "r.yaml")
    except RecipeError as error:
        assert error.what


def test_numbers_and_words_mean_what_they_look_like() -> None:
    data = parse_yaml("a: 1e-4\nb: no\nc: 2026-01-01\nd: 0x10\ne: 010\nf: .5\ng: true\nh:\n", "r.yaml").data
    assert data == {"a": 1e-4, "b": "no", "c": "2026-01-01", "d": 16, "e": 10, "f": 0.5, "g": True, "h": None}


def test_an_included_recipe_is_the_base_and_errors_name_the_file_that_they_are_in(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", GOOD, "base.yaml")
    top = "include: shared/base.yaml\nname: mine\nstages:\n  exit: {with: {layer: 1}}\n"
    recipe = load(tmp_path, top)
    assert recipe.name == "mine"
    assert recipe.stages["exit"].uses == "early-exit"
    assert recipe.stages["exit"].with_ == {"layer": 1}
    assert recipe.where("stages", "exit", "with", "layer") == f"{tmp_path / 'recipe.yaml'}:4"
    assert recipe.where("stages", "gguf", "with", "type") == f"{tmp_path / 'shared/base.yaml'}:12"
    write(tmp_path / "shared", GOOD.replace("uses: gguf", "usez: gguf"), "base.yaml")
    error = refused(tmp_path, top)
    assert error.where == f"{tmp_path / 'shared/base.yaml'}:10"


def test_the_gates_of_an_included_recipe_can_be_dropped(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "gates: {max_asr: 0.1}\n", "base.yaml")
    assert load(tmp_path, "include: base.yaml\n").gates.asked() == {"max_asr": 0.1, "max_degenerate": 0.1}
    assert load(tmp_path, "include: base.yaml\ngates: null\n").gates.asked() == {}


def test_a_stage_of_an_included_recipe_can_be_dropped(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    assert set(load(tmp_path, "include: base.yaml\n").stages) == {"exit", "gguf"}
    left = load(tmp_path, "include: base.yaml\nstages: {gguf: null}\n")
    assert set(left.stages) == {"exit"}
    write(tmp_path, "include: base.yaml\nstages: {gguf: null}\n", "middle.yaml")
    assert set(load(tmp_path, "include: middle.yaml\nname: mine\n").stages) == {"exit"}
    error = refused(tmp_path, "include: base.yaml\nstages:\n  ggfu: null\n")
    assert error.what == "there is no stage 'ggfu' to drop" and "gguf" in str(error.way_out)
    assert error.where == f"{tmp_path / 'recipe.yaml'}:3"
    # Elsewhere null is a stage that somebody forgot to write.
    forgotten = GOOD.partition("  gguf:")[0] + "  gguf:\n"
    assert refused(tmp_path, forgotten).where == f"{tmp_path / 'recipe.yaml'}:{forgotten.count(chr(10))}"


def test_includes_that_go_in_a_circle_or_nowhere_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "include: b.yaml\n", "a.yaml")
    write(tmp_path, "include: [a.yaml]\n", "b.yaml")
    with pytest.raises(RecipeError, match="includes itself"):
        load_recipe(tmp_path / "a.yaml")
    error = refused(tmp_path, "name: x\ninclude: nowhere.yaml\n")
    assert error.where == f"{tmp_path / 'recipe.yaml'}:2"
    assert "nowhere.yaml" in error.what


def test_overrides_have_yaml_types_and_win(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        GOOD,
        "stages.exit.with.layer=1",
        "device.memory=1GiB",
        "seed=7",
        "gates.max_asr=0.5",
        "stages.gguf.needs=[exit]",
    )
    assert recipe.stages["exit"].with_["layer"] == 1
    assert recipe.device is not None and recipe.device.memory == 1 << 30
    assert recipe.seed == 7 and recipe.gates.max_asr == 0.5
    assert recipe.where("stages", "exit", "with", "layer") == "--set stages.exit.with.layer=1"


@pytest.mark.parametrize(
    ("override", "what", "way_out"),
    [
        ("stages.exitt.with.layer=1", "there is no stages.exitt", "'exit'"),
        ("gate.max_asr=1", "there is no gate", "'gates'"),
        ("gates.max_asrs=1", "there is no gates.max_asrs", "'max_asr'"),
        ("stages.exit.wit.layer=1", "there is no stages.exit.wit", "'with'"),
        ("name.deep=1", "name has no keys", None),
        ("seed", "cannot read", "--set"),
        ("seed=[1", "not YAML", None),
        ("seed=-1", "greater than or equal to 0", None),
    ],
)
def test_an_override_of_what_is_not_there_is_refused(
    tmp_path: Path, override: str, what: str, way_out: str | None
) -> None:
    error = refused(tmp_path, GOOD, override)
    assert what in error.what
    if way_out:
        assert way_out in (error.way_out or "")


MATRIX = """\
recipe: 1
name: many
source: {model: demo:tiny-llava}
matrix: {layer: [1, 2]}
stages:
  exit: {uses: early-exit, with: {layer: "${{ matrix.layer }}"}}
  gguf:
    uses: gguf
    needs: exit-${{ matrix.layer }}
    matrix: {type: [Q4_0, Q8_0]}
    with: {type: "${{ matrix.type }}"}
  icet: {uses: icet-verify, needs: gguf}
"""


def test_a_matrix_writes_its_stages_out_and_those_after_it_fan_in(tmp_path: Path) -> None:
    recipe = load(tmp_path, MATRIX)
    assert list(recipe.stages) == [
        "exit-1", "exit-2", "gguf-1-Q4_0", "gguf-1-Q8_0", "gguf-2-Q4_0", "gguf-2-Q8_0", "icet",
    ]  # fmt: skip
    assert recipe.stages["exit-2"].with_ == {"layer": 2}
    assert recipe.stages["gguf-2-Q4_0"].needs == ("exit-2",)
    assert recipe.stages["icet"].needs == ("gguf-1-Q4_0", "gguf-1-Q8_0", "gguf-2-Q4_0", "gguf-2-Q8_0")
    assert recipe.where("stages", "gguf-1-Q4_0", "with", "type").endswith(":11")


def test_a_stage_may_have_a_seed_of_its_own_and_a_matrix_may_give_it(tmp_path: Path) -> None:
    text = MATRIX.replace('with: {type: "${{ matrix.type }}"}', 'seed: "${{ matrix.layer }}"') + "\nseed: 7\n"
    recipe = load(tmp_path, text)
    assert [recipe.seed_of(id) for id in ("source", "exit-1", "gguf-1-Q4_0", "gguf-2-Q8_0", "icet")] == [7, 7, 1, 2, 7]
    assert "seed" in refused(tmp_path, text.replace('${{ matrix.layer }}"\n', 'twelve"\n')).what


def test_stages_that_share_an_axis_stay_in_step(tmp_path: Path) -> None:
    text = MATRIX.replace("needs: exit-${{ matrix.layer }}", "needs: exit").replace(
        '{type: "${{ matrix.type }}"}', '{type: "${{ matrix.type }}", note: "${{ matrix.layer }} layers"}'
    )
    recipe = load(tmp_path, text)
    assert recipe.stages["gguf-2-Q4_0"].needs == ("exit-2",)
    assert recipe.stages["gguf-2-Q4_0"].with_["note"] == "2 layers"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("matrix.type }}", "matrix.tipe }}", "names nothing"),
        ('${{ matrix.layer }}"', '${{ secrets.layer }}"', "names nothing"),
        ("[1, 2]", "[]", "is empty"),
        ("[1, 2]", "3", "matrix.layer"),
        ("  icet:", "  exit-1:", "two stages are named 'exit-1'"),
        ("[1, 2]", str(list(range(300))), "more than"),
    ],
)
def test_a_matrix_that_means_nothing_is_refused(tmp_path: Path, old: str, new: str, what: str) -> None:
    error = refused(tmp_path, MATRIX.replace(old, new, 1))
    assert what in error.what


@pytest.mark.parametrize(
    ("publish", "what", "way_out"),
    [
        ("{to: ghcr.io/me/model}", "cannot publish", "oci-layout"),
        ("{to: 'oci-layout:'}", "cannot publish", "oci-layout"),
        ("{to: oci-layout:dist, sign: key.pem}", "there is no key key.pem", "openssl"),
        ("{to: 'oci:me:secret@ghcr.io/me/model'}", "names no registry", "oci:HOST/NAME"),
    ],
)
def test_publishing_that_this_version_cannot_do_is_refused_before_work(
    tmp_path: Path, publish: str, what: str, way_out: str
) -> None:
    error = refused(tmp_path, GOOD + f"publish: {publish}\n")
    assert what in error.what and way_out in (error.way_out or "")
    assert error.where == f"{tmp_path / 'recipe.yaml'}:13"


def test_a_memory_gate_wants_a_device_or_a_size(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace("device: {memory: 2GiB, context: 1024}\n", "") + "gates: {memory: device}\n")
    assert "no device" in error.what
    assert load(tmp_path, GOOD + "gates: {memory: 1GiB}\n").gates.memory == 1 << 30


def test_a_recipe_written_out_again_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, MATRIX)
    data = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    again = load_recipe(write(tmp_path, yaml.safe_dump(data), "again.yaml"))
    assert again.model_dump() == recipe.model_dump()
