"""`demo:tiny-llava`: a random but real LLaVA, small enough to build in tests and in the smoke recipe.

Notable: byte-deterministic for a seed; a SigLIP tower, or a CLIP tower with its CLS token, as LLaVA-1.5 has; widths
divisible by 32, so that Q4_0 and Q8_0 apply; a SentencePiece tokenizer, trained here, because llama.cpp's converter
knows byte-level BPE tokenizers only by a hash of their pre-tokenizer; weights large enough that exits, prompts and
images change the answer.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from stages.models.spec import ModelSpec, TextSpec, VisionSpec

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

Tower = Literal["siglip", "clip"]

# ChatML, as SmolLM2's template without its system turn; content is a string or a list with at most one image.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_BOS, _EOS, _PAD, _IMAGE = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"
_VOCABULARY: Final = 512
_WIDTH: Final = 64  # of tower and text model
_IMAGE_SIZE: Final = 56  # pixels
_PATCH: Final = 14  # pixels; 16 image tokens
_CONTEXT: Final = 2048

# What the tokenizer is trained on: any English with the words that prompts are made of.
_TEXT: Final = (
    "what is the colour of shape in this image a red blue green yellow circle square triangle yes no are there any how "
    "to make write explain describe tell me about sorry I cannot help with that request sure here are some steps "
    "please can you user assistant system answer question picture photo weather city capital country"
)


def _sentences() -> Iterator[str]:
    words = _TEXT.split()
    for step in range(1, 8):
        for start in range(len(words)):
            yield " ".join(words[(start + step * k) % len(words)] for k in range(6)) + ("?" if start % 2 else ".")


def _tokenizer_model() -> bytes:
    """A SentencePiece BPE model of 512 pieces: 4 control tokens, the bytes, then merges."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=out,
        model_type="bpe",
        vocab_size=_VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        # llama.cpp neither normalizes nor trims, so this model does not either.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        bos_piece=_BOS,
        eos_piece=_EOS,
        pad_piece=_PAD,
        control_symbols=[_IMAGE],
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def _vision_config(layers: int, tower: Tower) -> SiglipVisionConfig | CLIPVisionConfig:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    if tower == "clip":  # quick_gelu, as OpenAI's
        return CLIPVisionConfig(
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=_PATCH,
            projection_dim=_WIDTH,
        )
    return SiglipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH,
        hidden_act="gelu",
        vision_use_head=False,
    )


def _config(vision_layers: int, text_layers: int, tower: Tower) -> LlavaConfig:
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=text_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=_CONTEXT,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=_vision_config(vision_layers, tower),
        text_config=text,
        image_token_index=4,
        image_seq_length=(_IMAGE_SIZE // _PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def tiny_llava_spec(*, vision_layers: int = 3, text_layers: int = 2, tower: Tower = "siglip") -> ModelSpec:
    """The shapes of `build_tiny_llava`'s model, without building it."""
    return ModelSpec(
        family="llava-1.5" if tower == "clip" else "llava-siglip",
        text=TextSpec(
            layers=text_layers,
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            heads=2,
            kv_heads=1,
            head_dim=32,
            vocab_size=_VOCABULARY,
            tied_embeddings=True,
        ),
        vision=VisionSpec(
            layers=vision_layers,
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            heads=2,
            image_size=_IMAGE_SIZE,
            patch_size=_PATCH,
            default_exit=vision_layers - 1,
            has_cls=tower == "clip",
            projector_hidden=_WIDTH,
        ),
    )


def build_tiny_llava(
    folder: Path, *, vision_layers: int = 3, text_layers: int = 2, seed: int = 0, tower: Tower = "siglip"
) -> None:
    """Write a random LLaVA checkpoint with tokenizer, chat template and image processor into `folder`.

    Loads with stock `AutoModelForImageTextToText` and `AutoProcessor`; the same arguments give the same bytes. About
    0.1 M parameters, 56-pixel images, 16 image tokens, default exit `vision_layers - 1` (-2 as in LLaVA-1.5).
    """
    import torch
    from transformers import LlamaTokenizer, LlavaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    model = LlavaForConditionalGeneration(_config(vision_layers, text_layers, tower))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                noise = torch.randn(weight.shape, generator=generator) * 0.1
                weight.copy_(noise + (1.0 if name.endswith("norm.weight") or "norm" in name.split(".")[-2] else 0.0))
            else:
                # Rows of unit length give attention and logits that depend on the input, unlike std 0.02.
                fan_in = weight[0].numel()
                # A CLIP tower's patches must not drown its positions: llama.cpp may get those wrong, and it must show.
                loud = "embed" in name and not (tower == "clip" and "patch" in name)
                scale = 0.5 if loud else 1.5 / fan_in**0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder)

    (folder / "tokenizer.model").write_bytes(_tokenizer_model())
    tokenizer = LlamaTokenizer.from_pretrained(
        folder,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        unk_token="<unk>",
        add_bos_token=False,
        add_eos_token=False,
        add_prefix_space=False,
        extra_special_tokens={"image_token": _IMAGE},
        model_max_length=_CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    # save_pretrained forgets these two, and llama.cpp's default is to add BOS.
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved = {key: value for key, value in saved.items() if key not in ("is_local", "local_files_only")}
    _write_json(path, saved | {"add_bos_token": False, "add_eos_token": False})
    _write_processor(folder, tower)


def _write_processor(folder: Path, tower: Tower) -> None:
    square = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    image_processor: dict[str, object] = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    if tower == "clip":
        image_processor |= {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": _IMAGE_SIZE},
            "do_center_crop": True,
            "crop_size": square,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": _IMAGE,
        "patch_size": _PATCH,
        "num_additional_image_tokens": 1 if tower == "clip" else 0,  # CLS
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    _write_json(folder / "preprocessor_config.json", image_processor)
    _write_json(folder / "processor_config.json", processor)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
