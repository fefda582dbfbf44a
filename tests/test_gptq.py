"""The stage `gptq` on tiny random models of every family: real GPTQModel, read back by stock transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from stage_setting import Told, context_of

from artifacts.artifact import Artifact
from artifacts.errors import PipelineError, RecipeError, StageError
from artifacts.manifest import Manifest
from stages.data.calibration_mix import CalibrationMix
from stages.models import checkpoint, gptq
from stages.models.family import families, family_of
from stages.models.memory import gptq_bytes
from stages.models.tiny import build_tiny_llava, tiny_llava_spec
from stages.quantize.gptq import GPTQParams, GPTQStage
from stages.quantize.gptq_checkpoint import put_back
from stages.stage import Planned
from tests.tiny_families import stock_processor
from tests.verify_setting import artifact_of, rows_of
from tests.verify_setting import run_stage as verify

needs_gptqmodel = pytest.mark.skipif(
    bool(gptq.missing_distributions()),
    reason="gptqmodel and optimum are not installed; `make test` has them: PYTHONPATH=.venv/gptq",
)
LLAVA = {"llava": "siglip", "llava-1.5": "clip"}  # kind, tower
MIX = {"samples": 8, "length": 24, "questions": 0.25, "prompts": 0.25, "pictures": 2}


def run_stage(model: Path, folder: Path, reporter: Told | None = None, **params: object) -> Artifact:
    context = context_of("gptq", folder, model, reporter or Told(), {"model": "tiny"})
    given = {"bits": 8, "group_size": 32, "calibration": MIX, "device": "cpu"} | params
    metadata = GPTQStage(GPTQParams.model_validate(given)).run(context)
    Manifest.of_folder(context.output, "gptq", metadata).write(context.output)
    return Artifact.open(context.output)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def dequantized(held: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """(rows, columns) of a matrix in the AutoGPTQ layout, as that project's documentation has it, without its code."""
    codes, zeros, scales, groups = (held[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        """(words, columns) of 32 bits, each column one stream of codes from the lowest bit on."""
        stream = ((words[:, None, :] >> torch.arange(32)[None, :, None]) & 1).flatten(0, 1)
        return (stream.unflatten(0, (-1, bits)) << torch.arange(bits)[None, :, None]).sum(1)

    # Codes of a column stand below each other, zeros of a group beside each other, less one.
    middles = (unpacked(zeros.T).T + 1) & (2**bits - 1)
    chosen = groups.long()
    weight: torch.Tensor = (unpacked(codes) - middles[chosen]) * scales.float()[chosen]
    return weight.T


def stock(folder: Path, kind: str) -> Any:
    """As anybody loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader = AutoModelForCausalLM if kind in ("llama", "qwen2") else AutoModelForImageTextToText
    return loader.from_pretrained(folder, dtype=torch.float32)


def inputs_of(kind: str, folder: Path, picture: Path) -> dict[str, torch.Tensor]:
    """A question, with an image where the model sees any, by transformers' own processor."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    image = Image.open(picture).convert("RGB")
    if kind in ("llama", "qwen2"):
        return dict(AutoTokenizer.from_pretrained(folder)("What is the answer?", return_tensors="pt"))
    if kind in LLAVA:
        from transformers import LlavaProcessor

        processor: Any = LlavaProcessor(
            AutoImageProcessor.from_pretrained(folder, backend="pil"),
            AutoTokenizer.from_pretrained(folder),
            patch_size=14,
            vision_feature_select_strategy="default" if LLAVA[kind] == "clip" else "full",
            num_additional_image_tokens=1 if LLAVA[kind] == "clip" else 0,  # CLS
        )
    else:
        processor = stock_processor(kind, folder)
    slot = "<|image|>" if kind == "mllama" else "<image>"
    return dict(
        processor(images=image if kind in LLAVA else [[image]], text=[f"{slot}What do you see?"], return_tensors="pt")
    )


def difference(kind: str, before: Path, after: Path, picture: Path) -> float:
    """Root mean square of the change of the logits, relative to the logits themselves."""
    given = inputs_of(kind, before, picture)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), gptq.silent():
        reference, found = (stock(folder, kind)(**given).logits for folder in (before, after))
    return float(((found - reference).pow(2).mean() / reference.pow(2).mean()).sqrt())


def answer(kind: str, folder: Path, picture: Path) -> tuple[list[int], int]:
    """Tokens that stock transformers generates about an image, and the one that a single pass says is first."""
    given, model = inputs_of(kind, folder, picture), stock(folder, kind)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"), gptq.silent():
        said = model.generate(**given, max_new_tokens=4, do_sample=False)
        first = model(**given).logits[0, -1]
    return said[0, given["input_ids"].shape[1] :].tolist(), int(first.argmax())


@pytest.fixture(scope="module")
def model_of(
    tiny_llava: Path, tiny_family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    @cache
    def found(kind: str) -> Path:
        if kind == "llava-1.5":
            folder = tmp_path_factory.mktemp("clip")
            build_tiny_llava(folder, tower="clip")
            return folder
        return tiny_llava if kind == "llava" else tiny_family(kind)

    return found


@needs_gptqmodel
@pytest.mark.parametrize("kind", ["llava", "llava-1.5", "llava-next", "smolvlm", "mllama", "qwen2"])
def test_stock_transformers_loads_the_whole_with_images_and_eight_bits_hardly_change_its_logits(
    kind: str, model_of: Callable[[str], Path], images: list[Path], tmp_path: Path
) -> None:
    made = run_stage(model_of(kind), tmp_path)
    assert difference(kind, model_of(kind), made.path, images[0]) < 0.06
    said, first = answer(kind, made.path, images[0])
    assert 0 < len(said) <= 4 and said[0] == first

    before, after = tensors(model_of(kind)), tensors(made.path)
    family = family_of(checkpoint.read_config(made.path))
    matrices = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert {f"{name}.weight" for name in matrices} == set(before) - set(after)
    assert all(torch.equal(before[name], after[name]) for name in set(before) & set(after))
    assert any(family.tower in name for name in after) == (kind != "qwen2")
    assert not [name for name in matrices if family.tower in name or "layers." not in name]
    for name in matrices:
        error = dequantized(after, name, 8) - before[f"{name}.weight"]
        assert error.norm() < 0.02 * before[f"{name}.weight"].norm()


@needs_gptqmodel
def test_every_matrix_of_llama_3_2_vision_is_calibrated_by_what_it_reads(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    reporter = Told()
    made = run_stage(model_of("mllama"), tmp_path, reporter)
    assert made.metadata["calibration_samples"] == {"text": 4, "question": 2, "prompt": 2}
    seen = cast("dict[str, int]", made.metadata["calibration_tokens"])
    blocks = {0: "self_attn", 1: "cross_attn", 2: "self_attn", 3: "cross_attn"}
    matrices = [(block, f"{kind}.{name}_proj") for block, kind in blocks.items() for name in "qkvo"]
    matrices += [(block, f"mlp.{name}_proj") for block in blocks for name in ("gate", "up", "down")]
    assert set(seen) == {f"layers.{block}.{name}" for block, name in matrices}
    # Text alone goes around the cross-attention; its keys and values read the image, four of them 4 tiles * 17 tokens.
    text, with_image, image = (
        seen[f"layers.{name}"] for name in ("0.mlp.up_proj", "1.cross_attn.q_proj", "1.cross_attn.k_proj")
    )
    assert text - with_image == 4 * MIX["length"]
    assert image == 4 * 4 * 17 and seen["layers.3.cross_attn.v_proj"] == image
    assert seen["layers.3.mlp.down_proj"] == with_image and seen["layers.2.self_attn.k_proj"] == text
    assert reporter.shares == sorted(reporter.shares) and len(set(reporter.shares)) > 4 and reporter.shares[-1] == 1


@needs_gptqmodel
@pytest.mark.parametrize(
    ("bits", "group", "desc_act", "sym"),
    [(4, 32, False, True), (4, 64, True, False), (3, 32, False, True), (2, -1, False, True)],
)
def test_what_the_file_holds_is_what_the_loaded_model_computes(
    bits: int, group: int, desc_act: bool, sym: bool, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = run_stage(model_of("llava"), tmp_path, bits=bits, group_size=group, desc_act=desc_act, sym=sym)
    held = tensors(made.path)
    config = cast("dict[str, object]", checkpoint.read_config(made.path)["quantization_config"])
    assert config == json.loads((made.path / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["desc_act"], config["sym"]) == (bits, group, desc_act, sym)
    model = family_of(checkpoint.read_config(made.path)).load(made.path)
    with torch.inference_mode():
        for name in ("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj"):
            layer = cast("Any", model).model.language_model.get_submodule(name)
            (full,) = {key.removesuffix(".qweight") for key in held if key.endswith(f"{name}.qweight")}
            weight = dequantized(held, full, bits)
            given = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(layer(given), given @ weight.T, rtol=2e-3, atol=2e-3)
            groups = 1 if group == -1 else weight.shape[1] // group
            assert held[f"{full}.scales"].shape == (groups, weight.shape[0])
            order = held[f"{full}.g_idx"]
            assert order.bincount().tolist() == [weight.shape[1] // groups] * groups
            assert torch.equal(order, order.sort().values) == (not desc_act or groups == 1)


@needs_gptqmodel
def test_on_text_it_has_not_seen_a_calibrated_matrix_errs_less_than_a_rounded_one(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """GPTQ's point: the same grid, but errors where they matter least."""
    from transformers import AutoTokenizer

    from stages.data.calibration import Calibration, batches
    from stages.runtimes.gptq_grid import Grid, round_to_grid

    folder = model_of("llama")
    made = run_stage(folder, tmp_path, bits=4, calibration=MIX | {"samples": 48, "questions": 0, "prompts": 0})
    family = family_of(checkpoint.read_config(folder))
    model = family.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unseen = Calibration(family, folder, model, tokenizer, "validation", length=24, pictures=1, seed=1)
    held, before = tensors(made.path), tensors(folder)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        given: list[torch.Tensor] = []
        layer = family.trunk(model).get_submodule(f"layers.0.{name}")
        hook = layer.register_forward_hook(
            lambda module, args, output, given=given: given.append(args[0].flatten(0, 1))
        )
        for batch in batches([unseen.passage("text", number) for number in range(24)], 8):
            batch.through(family.trunk(model))
        hook.remove()
        weight = before[f"model.layers.0.{name}.weight"]
        calibrated = dequantized(held, f"model.layers.0.{name}", 4)
        errors = [
            (torch.cat(given) @ (other - weight).T).norm() for other in (calibrated, round_to_grid(weight, Grid(4, 32)))
        ]
        assert errors[0] < 0.95 * errors[1]


@needs_gptqmodel
def test_what_ships_is_verified_at_every_exit_beside_the_source(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = run_stage(model_of("llava"), tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copytree(model_of("llava"), tmp_path / "base")
    source = artifact_of(tmp_path / "base", "checkpoint", {"exits": [1, 2, 3], "default_exit": 2})
    few: dict[str, Any] = {"harmful": {"advbench": 2}, "over_refusal": {"everyday": 1}, "vqa": 2, "max_new_tokens": 3}
    verdict = verify(tmp_path / "out", {"source": source, "shipped": made}, images=1, fidelity_images=1, **few)
    rows = rows_of(verdict, "shipped", "asr")
    assert {row.runtime for row in rows} == {"transformers"}
    assert [(row.exit, row.n) for row in rows if row.exit is not None] == [(1, 2), (2, 2), (3, 2)]
    assert [row.value for row in rows_of(verdict, "shipped", "fidelity_cosine")] == pytest.approx([1.0] * 3)
    assert [row.n for row in rows_of(verdict, "shipped", "vqa_accuracy")] == [2]


@needs_gptqmodel
def test_the_same_checkpoint_gives_the_same_bytes(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    digests = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        digests.add(run_stage(model_of("llama"), tmp_path / place, bits=4).digest)
    assert len(digests) == 1


@needs_gptqmodel
def test_what_was_quantized_before_a_crash_is_not_quantized_again(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("stages.quantize.gptq.put_back", crash)
        run_stage(model_of("llama"), tmp_path, bits=4)
    monkeypatch.setattr("stages.quantize.gptq.quantize_language_model", crash)
    made = run_stage(model_of("llama"), tmp_path, bits=4)
    loss, kinds = made.metadata["loss"], made.metadata["calibration_samples"]
    assert isinstance(loss, dict) and len(loss) == 2 and isinstance(kinds, dict) and sum(kinds.values()) == 8


@needs_gptqmodel
@pytest.mark.parametrize("kind", ["llava", "llava-1.5", "smolvlm", "mllama"])
def test_every_byte_of_the_checkpoint_is_known_from_shapes(
    kind: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = run_stage(model_of(kind), tmp_path, bits=4)
    config = checkpoint.read_config(model_of(kind))
    spec = replace(family_of(config).spec(config), quantization=str(made.metadata["type"]))
    assert gptq_bytes(spec) == sum(tensor.nbytes for tensor in tensors(made.path).values())


@needs_gptqmodel
def test_only_the_calibration_s_own_folder_is_written(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here, work = tmp_path / "here", tmp_path / "work"
    for folder in (here, work):
        folder.mkdir()
    monkeypatch.chdir(here)
    made = run_stage(model_of("llama"), work)
    assert not list(here.iterdir()) and "INFO" not in capfd.readouterr().out
    assert (work / "scratch" / "gptqmodel.log").stat().st_size
    assert {path.name for path in made.path.iterdir() if path.suffix != ".safetensors"} >= {
        "config.json", "quantize_config.json", "model.safetensors.index.json", "tokenizer.json", "manifest.json",
    }  # fmt: skip


@needs_gptqmodel
def test_a_model_that_gptqmodel_does_not_know_is_refused_in_words(
    model_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptqmodel.models import auto

    monkeypatch.delitem(auto.MODEL_MAP, "llama")
    with pytest.raises(StageError, match="GPTQModel cannot quantize this language model"):
        run_stage(model_of("llama"), tmp_path)
    assert not list((tmp_path / "output").iterdir())


def test_a_group_that_does_not_divide_the_rows_is_refused_before_work_starts_with_those_that_do() -> None:
    spec = tiny_llava_spec()
    inputs = {"source": Planned("checkpoint", spec)}
    with pytest.raises(RecipeError) as refused:
        GPTQStage(GPTQParams(group_size=128)).plan(inputs)
    assert "64 columns" in str(refused.value) and "use group_size: 64; 32, 64, -1 all work" in str(refused.value)
    planned = GPTQStage(GPTQParams(group_size=64)).plan(inputs)
    assert planned.type == "gptq" and planned.spec is not None and planned.spec.quantization == "gptq-4bit-64"


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"group_size": 48},
        {"damp_percent": 0},
        {"calibration": {"samples": 0}},
        {"calibration": {"questions": 0.7, "prompts": 0.7}},
        {"calibration": {"sample": 3}},
    ],
)
def test_parameters_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        GPTQParams.model_validate(wrong)


def test_shares_of_what_a_model_cannot_be_asked_go_to_the_texts() -> None:
    mix = CalibrationMix(samples=10, questions=0.3, prompts=0.4)
    assert mix.counts(("text", "question", "prompt")) == {"text": 3, "question": 3, "prompt": 4}
    assert mix.counts(("text", "prompt")) == {"text": 6, "question": 0, "prompt": 4}
    assert mix.counts(("text",)) == {"text": 10, "question": 0, "prompt": 0}


def test_every_built_in_family_can_be_quantized_and_a_family_that_does_not_say_so_cannot() -> None:
    assert all(family.gptq for family in families())
    spec = tiny_llava_spec()
    family = next(family for family in families() if family.name == spec.family)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecipeError, match="does not know models of the family"):
        patch.setattr(type(family), "gptq", False)
        GPTQStage(GPTQParams(group_size=32)).plan({"source": Planned("checkpoint", spec)})


def test_what_is_missing_is_named(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.models.gptq._DISTRIBUTIONS", ("no_such_quantizer",))
    with pytest.raises(StageError, match=r"needs no_such_quantizer") as refused:
        run_stage(tiny_llava, tmp_path)
    assert "icet-pipeline[gptq]" in str(refused.value)
    config = json.loads((tiny_llava / "config.json").read_text())
    with pytest.raises(PipelineError, match="cannot be loaded without no_such_quantizer"):
        gptq.loading_arguments(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, where="here")
    with pytest.raises(PipelineError, match="quantized by 'awq'"):
        gptq.loading_arguments(config | {"quantization_config": {"quant_method": "awq"}}, where="here")
    assert gptq.loading_arguments(config, where="here") == {}


def test_a_matrix_without_a_counterpart_in_the_source_is_an_error(tiny_llava: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "q").mkdir()
    save_file({"model.layers.9.mlp.up_proj.qweight": torch.zeros(1)}, tmp_path / "q" / "model.safetensors")
    family = family_of(checkpoint.read_config(tiny_llava))
    with pytest.raises(StageError, match=r"no counterpart in the checkpoint, layers\.9\.mlp\.up_proj first"):
        put_back(family, tiny_llava, tmp_path / "q", tmp_path / "out", {})
