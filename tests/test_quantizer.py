"""The quantizer of l-ppo: every layer gets the type that ships, and gradients pass it straight through."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from test_quantization_aware import stored_layers
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.errors import RecipeError, StageError
from stages.lppo.quantization import Quantizer, check_quantizer
from stages.models import checkpoint
from stages.models.adapter import LoRA, with_adapter
from stages.models.family import family_of
from stages.quantize.convert import TYPES, convert_language_model, quantize_model
from stages.runtimes.gguf_header import read_header
from stages.runtimes.gptq_grid import Grid, round_to_grid
from stages.runtimes.imatrix import Collected, native_importance, read_imatrix, write_imatrix
from stages.runtimes.llamacpp_library import library
from stages.runtimes.mixture import outline_of_text, tensor_types
from stages.runtimes.rounding import round_weights

LORA = LoRA(4, 8.0, ("q_proj", "o_proj", "down_proj"), None)
HEADS, KV_HEADS, BLOCKS = 8, 2, 4


def _checkpoint(tokenizer: Path, folder: Path, width: int, inner: int, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def wide(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that every type divides."""
    return _checkpoint(tiny_llava, tmp_path_factory.mktemp("wide"), 256, 512)


@pytest.fixture(scope="module")
def wide_bfloat16(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As most models are published."""
    return _checkpoint(tiny_llava, tmp_path_factory.mktemp("wide-bfloat16"), 256, 512, torch.bfloat16)


@pytest.fixture(scope="module")
def demo_shaped(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 320 and 160 numbers, as the demo's 576: 32 divides them and 256 does not."""
    return _checkpoint(tiny_llava, tmp_path_factory.mktemp("demo"), 320, 160)


@pytest.fixture(scope="module")
def imatrix(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    floats = folder / "f16.gguf"
    convert_language_model(wide, floats, folder / "links", name="wide", metadata={})
    noise = np.random.default_rng(3)
    collected = {
        name: Collected(noise.gamma(0.5, size=(1, tensor.shape[0])).astype(np.float32), np.array([7.0], np.float32))
        for name, tensor in read_header(floats).tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    write_imatrix(folder / "imatrix.gguf", collected, datasets=["noise"], chunks=1, chunk_size=7)
    return folder / "imatrix.gguf"


def _adapted(folder: Path, *, trained: bool = True, dtype: str = "float32") -> tuple[LlamaForCausalLM, PeftModel]:
    """A model with an adapter that has learned something."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    trunk = with_adapter(model.model, LORA)
    if trained:
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trunk.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model, trunk


def _layers(trunk: PeftModel) -> dict[str, torch.nn.Module]:
    base = trunk.get_base_model()
    return {name: module for name, module in base.named_modules() if name.endswith("_proj")}


def _effective(module: torch.nn.Module) -> torch.Tensor:
    """What a layer multiplies with."""
    if hasattr(module, "base_layer"):
        return (module.base_layer.weight + module.get_delta_weight("default")).detach()
    return module.weight.detach()


def _ship(model: LlamaForCausalLM, tokenizer: Path, folder: Path, file_type: str, imatrix: Path | None) -> Path:
    """Merge, convert and quantize: what the gguf stage does, with an importance matrix if there is one."""
    merged = folder / "merged"
    model.save_pretrained(merged)
    for path in tokenizer.glob("token*"):
        shutil.copy(path, merged)
    convert_language_model(merged, folder / "f16.gguf", folder / "links", name="tiny", metadata={})
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[file_type]
    params.nthread = 1
    entries: ctypes.Array[ctypes.Structure] | None = None
    if imatrix is not None:
        entries = native_importance(lib, read_imatrix(imatrix))
        params.imatrix = entries
    target = folder / "q.gguf"
    assert lib.llama_model_quantize(os.fsencode(folder / "f16.gguf"), os.fsencode(target), params) == 0
    return target


@pytest.mark.parametrize(
    ("model", "file_type", "with_imatrix"),
    [
        ("wide", "Q4_K_M", False),
        ("wide", "Q3_K_M", True),
        ("wide", "Q2_K", False),
        ("wide", "IQ3_S", True),
        ("wide", "IQ2_XXS", True),
        ("wide", "Q4_0", True),
        ("wide_bfloat16", "Q4_0", False),
        ("wide_bfloat16", "Q4_K_M", False),
        ("demo_shaped", "Q4_K_M", False),
        ("demo_shaped", "Q2_K", False),
        ("demo_shaped", "IQ4_XS", False),
    ],
)
def test_every_layer_is_rounded_to_the_bit_as_in_the_mixture_that_ships(
    request: pytest.FixtureRequest, tmp_path: Path, imatrix: Path, model: str, file_type: str, with_imatrix: bool
) -> None:
    folder: Path = request.getfixturevalue(model)
    used = imatrix if with_imatrix else None
    _, trunk = _adapted(folder)
    quantizer = Quantizer(trunk, file_type, checkpoint=folder, imatrix=used)
    quantizer.refresh()

    whole, to_merge = _adapted(folder, dtype=checkpoint.dtype_of(checkpoint.read_config(folder)))
    with torch.no_grad():
        for part, found in zip(to_merge.parameters(), trunk.parameters(), strict=True):
            if part.requires_grad:
                part.copy_(found)
    to_merge.merge_and_unload()
    shipped = stored_layers(_ship(whole, folder, tmp_path, file_type, used), heads=HEADS, kv_heads=KV_HEADS)
    assert quantizer.types == {name: stored_as for name, (stored_as, _) in shipped.items()}
    for name, module in _layers(trunk).items():
        # Adding and subtracting the adapter's part costs the last bits of a float32.
        difference = np.abs(_effective(module).numpy() - shipped[name][1])
        assert difference.max() <= (1e-6 if hasattr(module, "base_layer") else 0), name
    if file_type != "Q4_0":
        assert len(set(quantizer.types.values())) > 1  # a mixture, or replacements


@pytest.mark.parametrize("kind", ["llava-next", "idefics3", "mistral", "qwen2", "qwen3", "smollm3"])
def test_layers_of_every_family_get_the_types_of_the_file_that_ships(
    kind: str, tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_family(kind)
    config = checkpoint.read_config(folder)
    family = family_of(config)
    trunk = with_adapter(family.trunk(family.load(folder)), LORA)
    types = Quantizer(trunk, "Q4_K_M", checkpoint=folder).types
    convert_language_model(folder, tmp_path / "f16.gguf", tmp_path / "links", name="tiny", metadata={})
    quantize_model(tmp_path / "f16.gguf", tmp_path / "q.gguf", "Q4_K_M")
    shipped = {name: tensor.type for name, tensor in read_header(tmp_path / "q.gguf").tensors.items()}
    matrices = {name: type for name, type in shipped.items() if name.startswith("blk.") and type != "F32"}
    assert len(types) == len(matrices) == 14
    assert sorted(types.values()) == sorted(matrices.values())
    assert types["layers.1.mlp.down_proj"] == shipped["blk.1.ffn_down.weight"]
    assert types["layers.0.self_attn.v_proj"] == shipped["blk.0.attn_v.weight"]
    # What the plan can say before there is a checkpoint.
    planned = tensor_types(outline_of_text(family.spec(config).text), "Q4_K_M")
    assert {name: type for name, type in planned.items() if name.startswith("blk.")} == matrices


def test_a_model_that_llama_cpp_does_not_run_has_no_file_types(tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family("mllama")
    family = family_of(checkpoint.read_config(folder))
    trunk = with_adapter(family.trunk(family.load(folder)), LORA)
    with pytest.raises(StageError, match="does not know"):
        Quantizer(trunk, "Q4_0", checkpoint=folder)
    assert set(Quantizer(trunk, "Q4_0").types.values()) == {"Q4_0"}
    assert set(Quantizer(trunk, "gptq-4bit-32", checkpoint=folder).types.values()) == {"gptq-4bit-32"}


def test_without_a_checkpoint_one_type_stands_for_all_layers(demo_shaped: Path, wide: Path) -> None:
    assert set(Quantizer(_adapted(wide)[1], "Q2_K").types.values()) == {"Q2_K"}
    assert set(Quantizer(_adapted(demo_shaped)[1], "Q2_K").types.values()) == {"Q4_0"}
    assert set(Quantizer(_adapted(wide)[1], "Q4_K", checkpoint=wide).types.values()) == {"Q4_K"}
    with pytest.raises(RecipeError, match="mixtures"):
        Quantizer(_adapted(wide)[1], "Q4_K_M")


def test_an_importance_matrix_is_honoured_without_a_checkpoint_too(wide: Path, imatrix: Path) -> None:
    _, trunk = _adapted(wide, trained=False)
    Quantizer(trunk, "Q3_K", imatrix=imatrix).refresh()
    original = LlamaForCausalLM.from_pretrained(wide).model.layers[1].mlp.down_proj.weight.detach().numpy()
    columns = read_imatrix(imatrix)["blk.1.ffn_down.weight"]
    found = _effective(_layers(trunk)["layers.1.mlp.down_proj"]).numpy()
    assert np.array_equal(found, round_weights(original, "Q3_K", columns))
    assert not np.array_equal(found, round_weights(original, "Q3_K"))


def test_an_importance_matrix_of_another_model_is_refused(wide: Path, imatrix: Path) -> None:
    narrow = {name: values[:32] for name, values in read_imatrix(imatrix).items()}
    quantizer = Quantizer(_adapted(wide)[1], "Q4_K", imatrix=narrow)
    with pytest.raises(StageError, match="32 columns for rows of"):
        quantizer.refresh()


def test_a_type_that_needs_an_importance_matrix_is_refused_without_one(wide: Path) -> None:
    with pytest.raises(StageError, match="makes no IQ2_XXS"):
        Quantizer(_adapted(wide)[1], "IQ2_XXS", checkpoint=wide)
    with pytest.raises(RecipeError, match="importance matrix"):
        Quantizer(_adapted(wide)[1], "IQ2_XXS")


def test_a_gptq_grid_is_met_by_every_layer(demo_shaped: Path) -> None:
    _, trunk = _adapted(demo_shaped)
    before = {name: _effective(module) for name, module in _layers(trunk).items()}
    quantizer = Quantizer(trunk, "gptq-4bit-64", checkpoint=demo_shaped)
    quantizer.refresh()
    assert set(quantizer.types.values()) == {"gptq-4bit-64"}
    for name, module in _layers(trunk).items():
        assert torch.allclose(_effective(module), round_to_grid(before[name], Grid(4, 64)), atol=1e-6), name


def test_only_layers_whose_adapter_has_changed_are_rounded_again(wide: Path) -> None:
    _, trunk = _adapted(wide)
    quantizer = Quantizer(trunk, "Q4_0")
    quantizer.refresh()
    layers = {name: getattr(module, "base_layer", module) for name, module in _layers(trunk).items()}
    rounded = {name: layer.weight.data for name, layer in layers.items()}
    changed = "layers.2.self_attn.o_proj"
    with torch.no_grad():
        _layers(trunk)[changed].lora_B["default"].weight.mul_(2)
    quantizer.refresh()
    assert {name for name, layer in layers.items() if layer.weight.data is not rounded[name]} >= {changed}
    kept = {name for name, layer in layers.items() if layer.weight.data.data_ptr() == rounded[name].data_ptr()}
    assert kept == set(layers) - {changed}
    fresh = _adapted(wide)[1]
    with torch.no_grad():
        _layers(fresh)[changed].lora_B["default"].weight.mul_(2)
    Quantizer(fresh, "Q4_0").refresh()
    for name, module in _layers(fresh).items():
        assert torch.equal(_effective(module), _effective(_layers(trunk)[name])), name


class _StraightThrough(torch.autograd.Function):
    """The estimator as the papers write it: rounded forwards, the identity backwards."""

    @staticmethod
    def forward(context: object, weight: torch.Tensor, round_: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return round_(weight)

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient, None


@pytest.mark.parametrize("type", ["Q4_0", "Q3_K", "gptq-4bit-32"])
def test_outputs_and_gradients_are_those_of_an_explicit_straight_through_estimator(wide: Path, type: str) -> None:
    _, trunk = _adapted(wide)
    reference = copy.deepcopy(trunk)
    Quantizer(trunk, type).refresh()

    def round_(weight: torch.Tensor) -> torch.Tensor:
        if type.startswith("gptq"):
            return round_to_grid(weight, Grid(4, 32))
        values: NDArray[np.float32] = weight.detach().numpy()
        return torch.from_numpy(round_weights(values, type))

    # In the reference every layer computes with STE(W + sBA), written out.
    for module in _layers(reference).values():
        if hasattr(module, "base_layer"):
            weight, scale = module.base_layer.weight, module.scaling["default"]
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight

            def explicit(
                x: torch.Tensor,
                weight: torch.Tensor = weight,
                scale: float = scale,
                a: torch.Tensor = a,
                b: torch.Tensor = b,
            ) -> torch.Tensor:
                rounded: torch.Tensor = _StraightThrough.apply(weight + scale * b @ a, round_)
                return x @ rounded.T

            module.forward = explicit
        else:
            module.weight.data = round_(module.weight.data)

    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2))
    found, expected = (model(inputs_embeds=x).last_hidden_state for model in (trunk, reference))
    assert torch.allclose(found, expected, atol=1e-4)
    for output in (found, expected):
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in trunk.named_parameters() if parameter.requires_grad}
    compared = 0
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            gradient = gradients[name]
            assert gradient is not None and parameter.grad is not None and parameter.grad.abs().max() > 0
            assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))
            compared += 1
    assert compared == 2 * 3 * BLOCKS


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q4_K_M", "Q2_K", "IQ3_S", "Q3_K_L", "gptq-4bit", "gptq-8bit-64"])
def test_quantizers_are_accepted(name: str) -> None:
    check_quantizer(name)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "IQ2_M", "Q2_K_S", "IQ1_S"])
def test_small_quantizers_are_accepted_with_an_importance_matrix_only(name: str) -> None:
    check_quantizer(name, imatrix=True)
    with pytest.raises(RecipeError, match="importance matrix"):
        check_quantizer(name)


@pytest.mark.parametrize("name", ["q4", "F16", "gptq", "gptq-4bit-48", "Q4_K_XL"])
def test_other_quantizers_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be rounded"):
        check_quantizer(name)


def test_gptq_takes_no_importance_matrix() -> None:
    with pytest.raises(RecipeError, match="takes no importance matrix"):
        check_quantizer("gptq-4bit", imatrix=True)
