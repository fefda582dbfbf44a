"""The demo model: put together out of wheels, it is what its parts were, under stock transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from artifacts.errors import SourceError
from stages.data import package
from stages.data.chat import render
from stages.data.easy_vqa import export_images, is_correct, load_questions
from stages.models import smol_llava


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with the tensors that ship."""
    folder = tmp_path_factory.mktemp("smol-llava")
    smol_llava.assemble(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, **inputs: torch.Tensor) -> str:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, **inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))


def test_it_loads_in_stock_transformers_and_knows_the_capital_of_france(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    turn = render(str(tokenizer.chat_template), "What is the capital of France?", image=False)
    assert "Paris" in _answer(model, tokenizer, turn.after)


def test_it_answers_questions_about_a_picture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil.from_pretrained(checkpoint)
    questions = [q for q in load_questions("test", n=80) if q.answer not in ("yes", "no")][:12]
    right = 0
    for question in questions:
        path = export_images(tmp_path, "test", [question.image])[0]
        pixels = processor(images=Image.open(path), return_tensors="pt").pixel_values
        turn = render(str(tokenizer.chat_template), question.question, image=True)
        text = turn.before + smol_llava.IMAGE_TOKEN * 64 + turn.after
        right += is_correct(_answer(model, tokenizer, text, pixel_values=pixels), question.answer)
    assert right >= 6  # chance is 1 in 3 for shapes and 1 in 8 for colours


def test_several_may_write_the_same_pictures_at_once(tmp_path: Path) -> None:
    numbers = range(40)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(export_images, tmp_path, "test", numbers) for _ in range(8)]
    written = [future.result() for future in futures]
    assert all(paths == written[0] for paths in written)
    assert sorted(tmp_path.iterdir()) == written[0]  # and nothing else is left there


def test_the_config_alone_tells_the_shapes_that_the_spec_states(model: PreTrainedModel) -> None:
    spec, config = smol_llava.smol_llava_spec(), model.config
    assert spec.vision is not None
    assert config.vision_feature_layer + config.vision_config.num_hidden_layers + 1 == spec.vision.default_exit
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (384, spec.text.hidden_size)
    assert config.text_config.vocab_size == spec.text.vocab_size
    assert model.get_input_embeddings().weight.shape == (spec.text.vocab_size, spec.text.hidden_size)


def test_the_image_token_is_one_special_token_of_the_old_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 49152
    assert tokenizer.encode("<image>", add_special_tokens=False) == [smol_llava.IMAGE_TOKEN_ID]
    assert smol_llava.IMAGE_TOKEN_ID in tokenizer.all_special_ids


def test_plain_conversations_are_rendered_as_the_language_model_was_tuned(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Who are you?"},
    ]
    original = smol_llava._tokenizer()
    ours, theirs = (
        each.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        for each in (tokenizer, original)
    )
    assert ours == theirs


def test_the_tower_computes_what_the_onnx_file_computes() -> None:
    """Parity with the reference: the same weights, given the CLS token and 224 pixels that the ONNX graph wants."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator
    from transformers import SiglipVisionConfig, SiglipVisionModel

    whole = onnx.load_from_string(package.read_member(smol_llava.SOURCES[0]))
    initialisers = {tensor.name: numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    last = "/backbone/encoder/layer.2/Add_1_output_0"  # three blocks show every kind of tensor
    by_output = {name: node for node in whole.graph.node for name in node.output}
    assert last in by_output
    needed, queue = set(), [last]
    while queue:
        node = by_output.get(queue.pop())
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            queue += node.input
    nodes = [node for node in whole.graph.node if node.output[0] in needed]
    output = onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "part", whole.graph.input, [output], whole.graph.initializer)
    part = onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=whole.ir_version)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = ReferenceEvaluator(part).run(None, {"input_image": pixels})[0]

    tensors = {name.removeprefix("model.vision_tower."): t for name, t in smol_llava._tower_tensors().items()}
    config = SiglipVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
        image_size=112, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False,
    )  # fmt: skip
    tower = SiglipVisionModel(config).eval()
    tower.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        patches = tower.embeddings.patch_embedding(torch.from_numpy(pixels)).flatten(2).transpose(1, 2)
        table = torch.from_numpy(initialisers["onnx::Reshape_1962"].copy()).reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        places = torch.nn.functional.interpolate(table, size=(16, 16), mode="bicubic", align_corners=False)
        patches = patches + places.flatten(2).transpose(1, 2)
        cls = torch.from_numpy(initialisers["backbone.embeddings.cls_token"] + initialisers["onnx::Concat_1957"])
        states = torch.cat([cls, patches], dim=1)
        for layer in tower.encoder.layers[:3]:
            states = layer(states, attention_mask=None)
    assert np.abs(states.numpy() - expected).max() < 1e-3


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Module()
    path = tmp_path / "odd.safetensors"
    save_file({"projector.linear_9.weight": torch.zeros(2)}, path, metadata={"lora_scale": "2.0"})
    tensors, scale = smol_llava.read_tensors(path)
    model.model = torch.nn.Module()
    model.model.multi_modal_projector = torch.nn.Linear(2, 2)
    model.model.language_model = torch.nn.Module()
    model.model.language_model.layers = torch.nn.ModuleList()
    with pytest.raises(SourceError, match="do not fit"):
        smol_llava.apply_tensors(model, tensors, scale)


def test_missing_or_damaged_tensors_are_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"recipes/demo/train\.py"):
        smol_llava.read_tensors(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(SourceError, match="cannot be read"):
        smol_llava.read_tensors(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("triangle", "triangle", True),
        ("Triangle.", "triangle", True),
        ("The picture shows a blue triangle.", "triangle", True),
        ("The picture shows a blue triangle.", "blue", True),
        ("yes or no", "yes", False),
        ("circle", "triangle", False),
        ("grey", "gray", True),
        ("", "no", False),
    ],
)
def test_an_answer_counts_when_it_is_the_only_one_of_its_kind(response: str, answer: str, expected: bool) -> None:
    assert is_correct(response, answer) is expected
