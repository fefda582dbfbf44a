"""Shapes read from a config.json, with transformers' own defaults for what it leaves out. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, cast

from artifacts.errors import SourceError
from stages.models.spec import TextSpec

# What transformers 5.23 fills in when config.json is silent (LLaVA-1.5's names little more than its vocabulary).
TEXT_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
    },
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "smollm3": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
    },
    "mllama_text_model": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
_TIED_UNLESS_SAID: Final = ("smollm3",)


def section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A part of config.json such as `vision_config`; empty where there is none."""
    found = config.get(name)
    return cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}


def number(section: Mapping[str, object], name: str, defaults: Mapping[str, int]) -> int:
    """A size.

    Raises:
        SourceError: not a positive whole number, and there is no default.
    """
    value = section.get(name)
    if value is None:
        value = defaults.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        kind = section.get("model_type", "model")
        raise SourceError(
            f"config.json gives no usable {name} for its {kind}",
            why=f"it says {section.get(name)!r}; a positive whole number is needed",
        )
    return value


def text_spec(text: Mapping[str, object], tied: object = None) -> TextSpec:
    """The language model's shapes.

    Args:
        text: `text_config`, or the whole config.json of a model without a tower.
        tied: what the config around it says of `tie_word_embeddings`.

    Raises:
        SourceError: a shape that is neither given nor known.
    """
    kind = str(text.get("model_type") or "llama")
    defaults = TEXT_DEFAULTS.get(kind, {})
    width, heads = number(text, "hidden_size", defaults), number(text, "num_attention_heads", defaults)
    return TextSpec(
        layers=number(text, "num_hidden_layers", defaults),
        hidden_size=width,
        intermediate_size=number(text, "intermediate_size", defaults),
        heads=heads,
        kv_heads=number(text, "num_key_value_heads", {"num_key_value_heads": heads, **defaults}),
        head_dim=number(text, "head_dim", {"head_dim": width // heads, **defaults}),
        vocab_size=number(text, "vocab_size", defaults),
        tied_embeddings=bool(tied or text.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID)),
    )


def exit_of(feature_layer: object, layers: int) -> int:
    """`vision_feature_layer` as an exit 0..layers.

    Raises:
        SourceError: several layers at once, or one that the tower has not.
    """
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise SourceError(
            "config.json takes image features from several layers at once (vision_feature_layer is a list)",
            why="an exit is one layer",
            way_out="use a model whose vision_feature_layer is one number",
        )
    # hidden_states has layers + 1 entries, so -1 is `layers`.
    found = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= found <= layers:
        raise SourceError(f"config.json has vision_feature_layer {feature_layer}, but its tower has {layers} blocks")
    return found
