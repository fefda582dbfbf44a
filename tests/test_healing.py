"""Healing after `prune`: nearer to the unpruned model on held-out material, and the same bits after a crash."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from prune_setting import DEPTH, Reporter, passages, prune
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from artifacts.manifest import sha256_file
from stages.data.articles import load_articles
from stages.data.calibration import Batch, batches
from stages.models import checkpoint
from stages.models.family import family_of
from stages.models.tiny import build_tiny_llava
from stages.prune import healing
from stages.prune.healing import Pair
from stages.prune.params import HealParams


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with six blocks in its language model."""
    folder = tmp_path_factory.mktemp("deep")
    build_tiny_llava(folder, text_layers=DEPTH)
    return folder


HEALED = {
    "layers": [2, 3],
    "validation": 12,
    "calibration": {"length": 32},
    "heal": {"steps": 40, "batch": 6, "lr": 0.02, "rank": 16, "pictures": 4, "checkpoint_every": 2},
}


def test_the_teacher_is_the_unpruned_model_whatever_the_adapter_says(deep: Path) -> None:
    family = family_of(checkpoint.read_config(deep))
    model = family.load(deep)
    batch: Batch = next(batches(passages(model), 3))
    with torch.no_grad():
        plain = model.lm_head(model.model.language_model(inputs_embeds=batch.embeddings).last_hidden_state)
        pair = Pair(family, model, [1, 2])
        before = pair.student(batch)
        for parameter in pair.adapt(HealParams(), seed=0).values():
            parameter.add_(0.05)
        torch.testing.assert_close(pair.teacher(batch), plain[batch.counted].log_softmax(-1), rtol=0, atol=1e-5)
        assert (pair.student(batch) - before).abs().max() > 1e-3
    assert len(model.model.language_model.layers) == DEPTH
    assert model.config.text_config.num_hidden_layers == DEPTH


@pytest.fixture(scope="module")
def healed(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, object], Reporter]:
    reporter = Reporter()
    folder, metadata = prune(deep, tmp_path_factory.mktemp("healed"), HEALED, reporter)
    return folder, metadata, reporter


def test_healing_brings_the_pruned_model_nearer_to_the_unpruned_one_on_held_out_material(
    deep: Path, healed: tuple[Path, Mapping[str, object], Reporter], tmp_path: Path
) -> None:
    folder, metadata, reporter = healed
    kl = metadata["kl_to_unpruned"]
    assert isinstance(kl, dict) and kl["healed"] < 0.8 * kl["pruned"]
    assert [step for name, _, step in reporter.metrics if name == "kl"] == list(range(1, 41))
    # The same on the saved files, measured without the stage on articles of the test side.
    full, small = (AutoModelForImageTextToText.from_pretrained(name).eval() for name in (deep, folder))
    untouched, _ = prune(deep, tmp_path, {"layers": [2, 3]})
    cut = AutoModelForImageTextToText.from_pretrained(untouched).eval()
    text = " ".join(article.text for article in load_articles("test")[:8])
    ids = torch.tensor(AutoTokenizer.from_pretrained(deep)(text[:4000]).input_ids[: 8 * 32]).reshape(8, 32)
    with torch.no_grad():
        teacher, before, after = (model(ids).logits.log_softmax(-1) for model in (full, cut, small))
    assert healing.divergences(teacher, after).mean() < healing.divergences(teacher, before).mean()


_KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from prune_setting import Reporter, prune
    from test_healing import HEALED

    class Loud(Reporter):
        def metric(self, name, value, *, step=None, exit=None):
            print(name, step, flush=True)

    output = Path({folder!r}) / "output"
    if output.exists():
        output.rmdir()
    prune(Path({source!r}), Path({folder!r}), HEALED, Loud())
"""


def test_healing_that_is_killed_and_started_again_writes_the_same_weights(
    deep: Path, healed: tuple[Path, Mapping[str, object], Reporter], tmp_path: Path
) -> None:
    code = textwrap.dedent(_KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path), source=str(deep))

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    killed = start()
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("kl 5"):
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "scratch" / "healing" / "healing.safetensors").is_file()
    continued = start()
    said, _ = continued.communicate()
    assert continued.returncode == 0
    steps = [int(line.split()[1]) for line in said.splitlines() if line.startswith("kl ")]
    assert steps[0] > 1 and steps[-1] == 40
    assert sha256_file(tmp_path / "output" / "model.safetensors") == sha256_file(healed[0] / "model.safetensors")
