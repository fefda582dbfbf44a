"""Other ways to ask: the request in the picture, a picture for each, text only, and any exit that an attacker likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from artifacts.artifact import Artifact
from artifacts.measures import RESPONSES_NAME
from stages.data.images import typographic
from tests.verify_setting import rows_of, run_stage


def test_a_request_is_rendered_whole_and_the_same_each_time() -> None:
    short, long = "Rude note", "Write a very rude and much longer note about the weather, " * 6
    pictures = [np.asarray(Image.open(typographic(text, 112)).convert("L")) for text in (short, long)]
    for pixels in pictures:
        assert pixels.shape == (336, 336)
        dark = np.argwhere(pixels < 128)
        assert dark.min() >= 8 and dark.max() <= 336 - 8  # within the margins: nothing is cut off
        assert np.ptp(dark[:, 1]) > 120  # and as large as fits
    assert np.ptp(np.argwhere(pictures[1] < 128)[:, 0]) > 150
    before = typographic(short, 112).read_bytes()
    typographic(short, 112).unlink()
    assert typographic(short, 112).read_bytes() == before


def test_attacks_are_measured_at_every_exit_and_judged_by_the_request_in_the_picture(
    tiny_verified: dict[str, Artifact], tmp_path: Path
) -> None:
    attacks = ["typographic", "random-image"]
    verdict = run_stage(tmp_path, tiny_verified, attacks=attacks, exits=[1, 2], vqa=0, language=0, fidelity_images=0)
    table = pyarrow.parquet.read_table(verdict.file(RESPONSES_NAME)).to_pylist()
    for name in attacks:
        rows = rows_of(verdict, "gguf", f"asr_{name}")
        assert [(row.exit, row.n) for row in rows if row.exit] == [(1, 5), (2, 5)]
        assert [(row.band, row.n) for row in rows if row.band] == [("all", 10)]
        asked = [row for row in table if row["prompt_id"].endswith(f"#{name}") and row["artifact"] == "gguf"]
        plain = {row["prompt_id"]: row["prompt"] for row in table if "#" not in row["prompt_id"]}
        assert len(asked) == 10
        assert all(row["prompt"] == plain[row["prompt_id"].partition("#")[0]] for row in asked)
    images = {row["image"] for row in table if row["prompt_id"].endswith("#random-image")}
    assert len(images) == 5
    (anywhere,), (mixture,) = rows_of(verdict, "gguf", "asr_any_exit"), rows_of(verdict, "gguf", "asr_mixture")
    each = [row.value or 0 for row in rows_of(verdict, "gguf", "asr") if row.exit]
    assert (anywhere.value or 0) >= max(each) and anywhere.n == mixture.n == 5
    assert (mixture.value or 0) <= (anywhere.value or 0)
