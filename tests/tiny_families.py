"""Random two- and three-layer models of the real classes, with real processors, one for each model family.

`demo:tiny-llava`'s tokenizer is taken along, with the tokens that the family adds. Prompts, images, tiles and exits all
change the answer, since weights are as large as in `stages.models.tiny`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_SIZE, _PATCH, _WIDTH = 56, 14, 64

_IDEFICS_TOKENS = [
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(3) for column in range(3)),
]
# In the manner of the models' own: parts only, never a plain string.
_PARTS = (
    "{% for m in messages %}{% for p in m['content'] if p['type'] == 'image' %}IMAGE{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
_TEMPLATES = {
    "llava-next": "<|im_start|>user ASK {{ ' ' }}" + _PARTS.replace("IMAGE", "<image>\n") + "<|im_end|>\nassistant:",
    "idefics3": "<|im_start|>User:" + _PARTS.replace("IMAGE", "<image>") + "<end_of_utterance>\nAssistant:",
    "mllama": "{{ bos_token }}user\n\n" + _PARTS.replace("IMAGE", "<|image|>") + "<|im_end|>assistant\n\n",
}


def build(kind: str, folder: Path, tiny_llava: Path, seed: int = 0) -> None:
    """Write a checkpoint with tokenizer, chat template and image processor, as transformers saves one.

    `kind`: llava-next, idefics3, smolvlm, mllama, or a text-only `model_type`.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copyfile(tiny_llava / name, folder / name)
    slot = "<|image|>" if kind == "mllama" else "<image>"
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": slot})
    if kind in ("idefics3", "smolvlm"):
        tokenizer.add_special_tokens({"additional_special_tokens": _IDEFICS_TOKENS})
    assert tokenizer.image_token == slot and len(tokenizer(slot, add_special_tokens=False).input_ids) == 1
    template = {"smolvlm": "idefics3"}.get(kind, kind)
    tokenizer.chat_template = _TEMPLATES.get(template) or (tiny_llava / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES.get(kind) or _causal(kind))(_config(kind, tokenizer))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.numel() == 1:
                weight.fill_(0.7)  # gates, which are born closed
            elif weight.ndim == 1:
                noise = torch.randn(weight.shape, generator=generator) * 0.1
                weight.copy_(noise + (1.0 if "norm" in name.split(".")[-2] and name.endswith("weight") else 0.0))
            else:
                scale = 0.5 if "embed" in name else 1.5 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 3
    model.save_pretrained(folder)
    if kind in _PROCESSORS:
        (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[kind]))
    if kind == "llava-next":
        processor = {"processor_class": "LlavaNextProcessor", "patch_size": _PATCH, "num_additional_image_tokens": 1}
        processor |= {"vision_feature_select_strategy": "default", "image_token": "<image>"}
        (folder / "processor_config.json").write_text(json.dumps(processor))


def stock_processor(kind: str, folder: Path) -> Any:
    """transformers' own processor. SmolVLM's wants packages for video; for images it does what Idefics3's does."""
    from transformers import AutoImageProcessor, AutoTokenizer, Idefics3Processor, LlavaNextProcessor, MllamaProcessor

    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "llava-next":
        return LlavaNextProcessor(images, tokenizer, _PATCH, "default", num_additional_image_tokens=1)
    if kind == "mllama":
        return MllamaProcessor(images, tokenizer)
    return Idefics3Processor(images, tokenizer, image_seq_len=(_SIZE // _PATCH // 2) ** 2)


_CLASSES = {
    "llava-next": "LlavaNextForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
_NORMALIZED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_TILED = {"size": {"longest_edge": 2 * _SIZE}, "max_image_size": {"longest_edge": _SIZE}, "do_image_splitting": True}
_PINPOINTS = [[_SIZE, 2 * _SIZE], [2 * _SIZE, _SIZE], [2 * _SIZE, 2 * _SIZE]]
_PROCESSORS: dict[str, dict[str, object]] = {
    "llava-next": {
        **_NORMALIZED,
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": _SIZE},
        "crop_size": {"height": _SIZE, "width": _SIZE},
        "image_grid_pinpoints": _PINPOINTS,
    },
    "idefics3": {**_NORMALIZED, **_TILED, "image_processor_type": "Idefics3ImageProcessor"},
    "smolvlm": {**_NORMALIZED, **_TILED, "image_processor_type": "SmolVLMImageProcessor"},
    "mllama": {
        **_NORMALIZED,
        "image_processor_type": "MllamaImageProcessor",
        "size": {"height": _SIZE, "width": _SIZE},
        "max_image_tiles": 4,
    },
}


def _causal(kind: str) -> str:
    return {"llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3"}.get(kind, kind.capitalize()) + "ForCausalLM"


def _config(kind: str, tokenizer: Any) -> Any:
    import transformers

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": _SIZE,
        "patch_size": _PATCH,
    }
    image = tokenizer.convert_tokens_to_ids("<|image|>" if kind == "mllama" else "<image>")
    if kind == "llava-next":
        return transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**vision, projection_dim=_WIDTH),
            text_config=transformers.MistralConfig(**text, head_dim=32),
            image_token_index=image,
            image_grid_pinpoints=_PINPOINTS,
        )
    if kind in ("idefics3", "smolvlm"):
        name = {"idefics3": "Idefics3Config", "smolvlm": "SmolVLMConfig"}[kind]
        llama = transformers.LlamaConfig(**text, head_dim=32)
        return getattr(transformers, name)(vision_config=vision, text_config=llama, image_token_id=image)
    if kind == "mllama":
        # The image's token has an embedding, but no logit: it is the first behind the vocabulary.
        more = {"num_hidden_layers": 4, "vocab_size": image, "cross_attention_layers": [1, 3]}
        more["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        layers = {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 3 * _WIDTH}
        vision["attention_heads"] = vision.pop("num_attention_heads")
        return transformers.MllamaConfig(
            vision_config=vision | layers, text_config=text | more, image_token_index=image
        )
    head = {"head_dim": 32} if kind in ("llama", "mistral", "qwen3") else {}
    return transformers.AutoConfig.for_model(kind, **text, **head)
