"""Stage `early-exit`: a checkpoint that stock transformers loads, equal to the full model told to exit there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipVisionConfig

from artifacts.artifact import Artifact
from artifacts.errors import RecipeError
from artifacts.manifest import Manifest
from recipes.demo.train import Settings
from stages.data import easy_vqa
from stages.data.images import image_names
from stages.early_exit import EarlyExitParams, EarlyExitStage
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.flops import encoder_flops
from stages.models.llava import SiglipLlava
from stages.models.spec import ModelSpec, TextSpec
from stages.models.tiny import build_tiny_llava, tiny_llava_spec
from stages.runtimes.utility import Utility, earliest_within, validation_utility
from stages.stage import Context, Planned


class _Silent:
    def progress(self, done: float, total: float, note: str = "") -> None: ...
    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None: ...
    def log(self, message: str) -> None: ...


def cut(source: Path, tmp_path: Path, layer: int) -> tuple[Path, Mapping[str, object]]:
    output = tmp_path / f"exit-{layer}"
    output.mkdir()
    artifact = Artifact(source, Manifest.of_folder(source, "checkpoint", {}))
    context = Context("exit", {"source": artifact}, output, tmp_path / "scratch", 0, _Silent())
    return output, EarlyExitStage(EarlyExitParams(layer=layer)).run(context)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_cut_model_in_stock_transformers_equals_the_full_one_told_to_exit_there(
    tiny_llava: Path, images: list[Path], tmp_path: Path, layer: int
) -> None:
    folder, metadata = cut(tiny_llava, tmp_path, layer)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text="<|im_start|>user\n<image>\nhi<|im_end|>\n", images=Image.open(images[0]), return_tensors="pt"
    )
    full = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    small, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            small.eval()(**inputs).logits, full(**inputs, vision_feature_layer=layer).logits, rtol=0, atol=1e-5
        )
    assert metadata["exits"] == list(range(1, layer + 1)) and metadata["default_exit"] == layer
    assert len(small.model.vision_tower.encoder.layers) == layer
    gone = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in small.parameters())
    assert metadata["removed_parameters"] == gone
    assert SiglipLlava().spec(checkpoint.read_config(folder)) == tiny_llava_spec().with_exit(layer)


def test_the_pooling_head_goes_with_the_blocks(tiny_llava: Path, tmp_path: Path) -> None:
    model = SiglipLlava().load(tiny_llava)
    config = SiglipVisionConfig(**(model.config.vision_config.to_dict() | {"vision_use_head": True}))
    model.model.vision_tower = type(model.model.vision_tower)(config)
    model.config.vision_config = config
    checkpoint.save_model(model, tmp_path / "headed", companions_from=tiny_llava)
    folder, metadata = cut(tmp_path / "headed", tmp_path, 2)
    names = checkpoint.tensor_digests(folder / "model.safetensors", containing="vision_tower.")
    assert not [name for name in names if ".head." in name or ".layers.2." in name]
    assert metadata["removed_tensors"] > 16  # a block has 16 tensors
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_same_cut_gives_the_same_bytes(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, one = cut(tiny_llava, tmp_path / "a", 2)
    second, other = cut(tiny_llava, tmp_path / "b", 2)
    assert one == other
    assert Manifest.of_folder(first, "checkpoint", one).digest == Manifest.of_folder(second, "checkpoint", one).digest


def test_a_cut_model_can_be_cut_again(tiny_llava: Path, tmp_path: Path) -> None:
    folder, _ = cut(tiny_llava, tmp_path, 2)
    again, metadata = cut(folder, tmp_path, 1)
    assert metadata["default_exit"] == 1
    (tmp_path / "b").mkdir()
    straight, _ = cut(tiny_llava, tmp_path / "b", 1)
    assert (again / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def _plan(layer: int, spec: ModelSpec | None) -> Planned:
    return EarlyExitStage(EarlyExitParams(layer=layer)).plan({"source": Planned("checkpoint", spec)})


def test_the_plan_knows_the_smaller_shapes() -> None:
    assert _plan(2, tiny_llava_spec()).spec == tiny_llava_spec().with_exit(2)
    assert _plan(2, None).spec is None


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_layer_outside_the_tower_is_refused_with_the_valid_range(layer: int) -> None:
    with pytest.raises(RecipeError) as refused:
        _plan(layer, tiny_llava_spec())
    assert refused.value.way_out == "choose a layer from 1 to 3"


def test_a_layer_below_one_is_refused_even_when_the_model_is_not_known_yet() -> None:
    with pytest.raises(RecipeError):
        _plan(0, None)


def test_a_model_without_an_image_encoder_is_refused() -> None:
    text = TextSpec(2, 64, 128, 2, 1, 32, 512, True)
    with pytest.raises(RecipeError, match="image encoder"):
        _plan(1, ModelSpec("llama", text))


# --- layer: auto ---


class _Telling(_Silent):
    def __init__(self) -> None:
        self.metrics: list[tuple[str, float, int | None]] = []
        self.done: list[float] = []

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.done.append(done / total)

    def metric(self, name: str, value: float, *, step: int | None = None, exit: int | None = None) -> None:
        self.metrics.append((name, value, exit))


def _auto(source: Path, folder: Path, reporter: _Telling, **params: object) -> tuple[Path, dict[str, object]]:
    output = folder / "output"
    output.mkdir(parents=True)
    artifact = Artifact(source, Manifest.of_folder(source, "checkpoint", {}))
    context = Context("exit", {"source": artifact}, output, folder / "scratch", 0, reporter)
    stage = EarlyExitStage(EarlyExitParams.model_validate({"layer": "auto", "questions": 20, **params}))
    return output, dict(stage.run(context))


@pytest.fixture(scope="module")
def answering(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that was taught to say "yes" at exit 1 and "no" at exit 2, whatever it is asked."""
    folder = tmp_path_factory.mktemp("answering")
    processor = AutoProcessor.from_pretrained(tiny_llava)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava).train()
    taught = list(model.model.language_model.parameters())
    optimizer = torch.optim.Adam(taught, lr=2e-3)
    questions = easy_vqa.load_questions("train", n=60)
    pictures = easy_vqa.load_images("train", [question.image for question in questions])
    for step in range(60):
        for exit, answer in ((1, "yes"), (2, "no")):
            turn = f"<|im_start|>user\n<image>\n{questions[step].question}<|im_end|>\n<|im_start|>assistant\n"
            inputs = processor(text=turn + answer + "<|im_end|>", images=pictures[step], return_tensors="pt")
            labels = inputs["input_ids"].clone()
            labels[:, : len(processor(text=turn, images=pictures[step])["input_ids"][0])] = -100
            model(**inputs, labels=labels, vision_feature_layer=exit).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    checkpoint.save_model(model.eval(), folder, companions_from=tiny_llava)
    return folder


def test_every_exit_is_asked_and_the_table_says_what_the_cut_models_answer(answering: Path, tmp_path: Path) -> None:
    reporter = _Telling()
    folder, metadata = _auto(answering, tmp_path / "auto", reporter, tolerance=0.0, questions=30)
    table = metadata["utility"]
    assert isinstance(table, dict) and list(table) == ["1", "2"]  # the default exit is 2 of 3
    for layer in (1, 2):
        small, _ = cut(answering, tmp_path, layer)
        measured = validation_utility(small, [layer], 30, size=56, seed=0, scratch=tmp_path / f"of-{layer}")
        assert table[str(layer)]["right"] == measured[layer].right and table[str(layer)]["asked"] == 30
    truth = [question.answer for question in easy_vqa.validation_questions(30)]
    assert [table[layer]["right"] for layer in "12"] == [truth.count("yes"), truth.count("no")]
    assert 0 < truth.count("yes") != truth.count("no") > 0
    assert [(name, exit) for name, _, exit in reporter.metrics] == [
        ("validation_utility", 1),
        ("validation_utility", 2),
    ]
    assert reporter.done == sorted(reporter.done) and reporter.done[-1] == 1
    expected = earliest_within({int(exit): Utility(row["right"], 30) for exit, row in table.items()}, 2, 0.0)
    assert metadata["default_exit"] == expected
    assert SiglipLlava().spec(checkpoint.read_config(folder)) == tiny_llava_spec().with_exit(expected)


def test_exits_that_were_asked_before_a_kill_are_not_asked_again(tiny_llava: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "auto" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "utility.json").write_text('{"1": [7, 20], "2": [9, 20]}')
    _, metadata = _auto(tiny_llava, tmp_path / "auto", _Telling(), tolerance=0.05)
    assert metadata["default_exit"] == 2 and metadata["utility"] == {
        "1": {"right": 7, "asked": 20, "utility": 0.35},
        "2": {"right": 9, "asked": 20, "utility": 0.45},
    }
    (scratch / "utility.json").write_text("half a fi")
    assert _auto(tiny_llava, tmp_path / "again", _Telling())[1]["tolerance"] == 0.02


@pytest.mark.parametrize(("tolerance", "exit"), [(0.0, 4), (0.02, 3), (0.05, 3), (0.1, 2), (0.9, 1)])
def test_the_earliest_exit_within_the_tolerance_is_taken(tolerance: float, exit: int) -> None:
    utility = {1: Utility(20, 100), 2: Utility(80, 100), 3: Utility(88, 100), 4: Utility(90, 100)}
    assert earliest_within(utility, 4, tolerance) == exit


def test_validation_questions_are_asked_nowhere_else() -> None:
    asked = easy_vqa.validation_questions(200)
    assert len(set(asked)) == 200 and {question.image for question in asked} == set(easy_vqa.VALIDATION)
    closed = sum(question.answer in easy_vqa.TRUTH for question in asked)
    assert 95 <= closed <= 105  # always answering "no" must not pay; few pictures lack a kind
    assert easy_vqa.validation_questions(50) == asked[:50]
    trained_on = {member for _, member in image_names("train")}
    assert not trained_on & {f"easy_vqa/data/train/images/{number}.png" for number in easy_vqa.VALIDATION}
    assert Settings().images <= easy_vqa.VALIDATION.start


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_the_operations_of_an_encoder_are_those_that_torch_counts(tmp_path: Path, tower: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    build_tiny_llava(tmp_path, tower=tower)  # type: ignore[arg-type]
    family = family_of(checkpoint.read_config(tmp_path))
    vision = family.spec(checkpoint.read_config(tmp_path)).vision
    assert vision is not None
    model = family.load(tmp_path)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of CPUs
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.model.vision_tower(torch.zeros(1, 3, vision.image_size, vision.image_size))
    assert encoder_flops(vision, vision.layers) == counted.get_total_flops()


def test_a_fixed_exit_says_what_it_saves(tiny_llava: Path, tmp_path: Path) -> None:
    vision = tiny_llava_spec().vision
    assert vision is not None
    _, metadata = cut(tiny_llava, tmp_path, 1)
    assert metadata["encoder_flops_saved"] == encoder_flops(vision, 2) - encoder_flops(vision, 1)
    assert metadata["encoder_flops"] == encoder_flops(vision, 1)
    assert "utility" not in metadata


def test_an_exit_that_is_not_known_yet_is_planned_as_the_default_one() -> None:
    stage = EarlyExitStage(EarlyExitParams(layer="auto"))
    planned = stage.plan({"source": Planned("checkpoint", tiny_llava_spec())})
    assert planned.spec == tiny_llava_spec().with_exit(2, at_most=True) != tiny_llava_spec().with_exit(2)
    fixed = EarlyExitStage(EarlyExitParams(layer=1)).plan({"exit": planned})
    assert fixed.spec == tiny_llava_spec().with_exit(1)
    assert stage.plan({"source": Planned("checkpoint", None)}).spec is None
    assert stage.downloads() == list(easy_vqa.SOURCES)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"layer": 2, "tolerance": 0.1}, "tolerance has a meaning with layer: auto only"),
        ({"layer": "auto", "questions": 5000}, "less than or equal to 966"),
        ({"layer": "earliest"}, "layer 'earliest' is no exit; write a number of encoder blocks, or auto"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(params: Mapping[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EarlyExitParams.model_validate(params)


def test_parameters_survive_being_written_down_in_full() -> None:
    for params in (EarlyExitParams(layer=2), EarlyExitParams(layer="auto", tolerance=0.1)):
        assert EarlyExitParams.model_validate(params.model_dump(mode="json")) == params
