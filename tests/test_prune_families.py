"""Pruning in every family: judged with pictures, cut, healed, and loaded by stock transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_families
import torch
from PIL import Image
from test_prune import prune, skipped
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from artifacts.errors import StageError
from stages.data.calibration import Calibration, batches
from stages.models import checkpoint
from stages.models.family import family_of
from stages.prune.depth import cross_attention_blocks, cut
from stages.quantize.convert import convert_language_model

_SMALL = {"texts": 2, "length": 16, "questions": 2, "prompts": 2}


@pytest.mark.parametrize("kind", ["llava-next", "idefics3", "mllama", "qwen3", "smollm3"])
def test_a_block_is_chosen_dropped_and_healed(
    kind: str, tiny_family: Callable[[str], Path], images: list[Path], tmp_path: Path
) -> None:
    source = tiny_family(kind)
    family = family_of(checkpoint.read_config(source))
    params: dict[str, object] = {"drop": 1, "calibration": _SMALL, "validation": 3}
    folder, metadata = prune(source, tmp_path / "cut", params)
    dropped = metadata["dropped_layers"]
    assert isinstance(dropped, list) and len(dropped) == 1
    assert not set(dropped) & cross_attention_blocks(checkpoint.read_config(source))
    spec = family.spec(checkpoint.read_config(source))
    assert family.spec(checkpoint.read_config(folder)).text.layers == spec.text.layers - 1

    auto = AutoModelForImageTextToText if spec.vision is not None else AutoModelForCausalLM
    full = auto.from_pretrained(source).eval()
    small, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if spec.vision is not None:
        processor = tiny_families.stock_processor(kind, source)
        inputs = processor(text=f"{family.image_slot}what is this", images=[Image.open(images[0])], return_tensors="pt")
    else:
        inputs = AutoTokenizer.from_pretrained(source)("what is this in the picture", return_tensors="pt")
    with torch.no_grad(), skipped(family.trunk(full).layers, dropped):
        torch.testing.assert_close(small.eval()(**inputs).logits, full(**inputs).logits, rtol=0, atol=1e-5)

    params["heal"] = {"steps": 2, "batch": 3, "pictures": 2, "lr": 0.01}
    healed, metadata = prune(source, tmp_path / "healed", params)
    assert metadata["dropped_layers"] == dropped and set(metadata["kl_to_unpruned"]) == {"pruned", "healed"}
    again = auto.from_pretrained(healed).eval()
    with torch.no_grad():
        assert not torch.equal(again(**inputs).logits, small(**inputs).logits)


@pytest.mark.parametrize("kind", ["llava-next", "mllama"])
def test_passages_side_by_side_are_what_they_are_alone(kind: str, tiny_family: Callable[[str], Path]) -> None:
    folder = tiny_family(kind)
    family = family_of(checkpoint.read_config(folder))
    model = family.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    one, other = (
        Calibration(family, folder, model, tokenizer, "validation", length=16, pictures=2, seed=0) for _ in range(2)
    )
    assert one.kinds() == ("text", "question", "prompt")
    passages = sorted(one.mixed(6), key=lambda passage: passage.order)
    again = sorted(other.mixed(4) + other.mixed(2, start=4), key=lambda passage: passage.order)
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(passages, again, strict=True))
    with torch.no_grad():
        alone = [batch.through(family.trunk(model))[batch.counted] for batch in batches(passages, 1)]
        together = [batch.through(family.trunk(model))[batch.counted] for batch in batches(passages, 6)]
    torch.testing.assert_close(torch.cat(together), torch.cat(alone), rtol=0, atol=1e-4)


def test_a_smollm3_that_llama_cpp_would_misread_is_not_converted(
    tiny_family: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "deep"
    shutil.copytree(tiny_family("smollm3"), source)
    config = checkpoint.read_config(source)
    (source / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 6, "no_rope_layers": None, "layer_types": None})
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source)

    def convert(dropped: list[int]) -> None:
        folder = tmp_path / f"without-{dropped[0]}"
        cut(source, folder, dropped)
        convert_language_model(folder, folder / "m.gguf", folder / "links", dtype="F32", name="s", metadata={})

    with pytest.raises(StageError, match="rotary embeddings in the wrong blocks"):
        convert([1, 2])
    convert([4, 5])  # every fourth block is still the one without rotation
    assert (tmp_path / "without-4" / "m.gguf").is_file()
