"""Measure where the other exits stand: ASR at every exit and without a picture, for seeds and amounts of tuning.

    python -m recipes.demo.measure_gap --shipped recipes/demo/smol-llava.safetensors
    python -m recipes.demo.measure_gap --vary --seeds 0 1 2 --extra 4 8

Held-out prompts only: Do-Not-Answer (another origin than anything in training) and AdvBench's test side. Judged by the
refusal rule on 24 tokens, greedy, transformers, float32; pictures from easy-VQA's test side. Nothing here feeds back
into training. Answers stay in the work folder; only figures are written to `--out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from artifacts.home import cache_dir
from recipes.demo.answering import answers
from recipes.demo.material import exit_features, vqa_accuracy
from recipes.demo.train import Settings, Trainer
from recipes.demo.tuning import load_trained, merged
from stages.data.easy_vqa import load_questions
from stages.data.prompts import load_prompts, prompts_digest
from stages.judges.refusal import RefusalRule
from stages.models.smol_llava import DEFAULT_EXIT

PICTURES = 4  # the prompts are dealt out over so many test pictures
TOKENS = 24


def prompt_sets(n: int) -> dict[str, list[str]]:
    """Held-out prompts: two harmful sets, and benign ones that should be answered."""
    benign = [*load_prompts("everyday", "test", n=n // 2), *load_prompts("overrefusal", "test", n=n // 2)]
    return {
        "donotanswer": [p.text for p in load_prompts("donotanswer", "test", n=n)],
        "advbench": [p.text for p in load_prompts("advbench", "test", n=n)],
        "benign": [p.text for p in benign],
    }


def digests(n: int) -> dict[str, str]:
    return {name: prompts_digest(load_prompts(name, "test", n=n)) for name in ("donotanswer", "advbench")}


class Meter:
    """Asks one model in memory everything, at every exit."""

    def __init__(self, trainer: Trainer, n: int, exits: Sequence[int], work: Path):
        self.trainer, self.exits, self.work = trainer, list(exits), work
        self.sets = prompt_sets(n)
        self.pictures = exit_features(trainer.model, "test", range(PICTURES))
        self.questions = load_questions("test", n=160)
        numbers = sorted({question.image for question in self.questions})
        self.vqa = dict(zip(numbers, exit_features(trainer.model, "test", numbers), strict=True))

    def measure(self, label: str, sets: Sequence[str], vqa: bool = True) -> list[dict[str, object]]:
        """Rows of label, exit (None: no picture), set, complied, degenerate, n; and of VQA accuracy."""
        rows: list[dict[str, object]] = []
        trainer = self.trainer
        began = time.monotonic()
        with merged(trainer.model), (self.work / f"responses-{label}.jsonl").open("w") as kept:
            for exit in [*self.exits, None]:
                for name in sets:
                    prompts = self.sets[name]
                    texts = self._ask(prompts, exit)
                    judged = RefusalRule().score(prompts, texts)
                    row: dict[str, object] = {
                        "model": label,
                        "exit": exit,
                        "set": name,
                        "complied": sum(j.unsafe for j in judged),
                        "degenerate": sum(j.degenerate for j in judged),
                        "n": len(prompts),
                    }
                    rows.append(row)
                    for prompt, text, j in zip(prompts, texts, judged, strict=True):
                        line = {**row, "prompt": prompt, "response": text, "unsafe": j.unsafe}
                        kept.write(json.dumps(line) + "\n")
                    trainer.log(minutes=round((time.monotonic() - began) / 60, 1), **row)
                if vqa and exit is not None:
                    found = {number: states[exit] for number, states in self.vqa.items()}
                    right = vqa_accuracy(trainer.model, trainer.tokenizer, self.questions, found)
                    rows.append({"model": label, "exit": exit, "set": "vqa", "accuracy": right,
                                 "n": len(self.questions)})  # fmt: skip
                    trainer.log(**rows[-1])
        return rows

    def _ask(self, prompts: Sequence[str], exit: int | None) -> list[str]:
        model, tokenizer = self.trainer.model, self.trainer.tokenizer
        if exit is None:
            return [text for text, _ in answers(model, tokenizer, prompts, None, TOKENS)]
        texts = [""] * len(prompts)
        for picture in range(PICTURES):
            indices = range(picture, len(prompts), PICTURES)
            asked = [prompts[index] for index in indices]
            found = answers(model, tokenizer, asked, self.pictures[picture, exit], TOKENS)
            for index, (text, _) in zip(indices, found, strict=True):
                texts[index] = text
        return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shipped", type=Path, nargs="*", default=[], help="tensor files to measure in full")
    parser.add_argument("--vary", action="store_true", help="repeat the last safety stage and measure each result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--extra", type=int, nargs="*", default=[4, 8], help="steps beyond the first passing check")
    parser.add_argument("--n", type=int, default=64, help="prompts of each set")
    parser.add_argument("--exits", type=int, nargs="+", default=list(range(1, 13)))
    parser.add_argument("--sets", nargs="+", default=["donotanswer", "advbench", "benign"])
    parser.add_argument("--work", type=Path, default=cache_dir() / "demo-training")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo-icet-gap.json"))
    arguments = parser.parse_args()

    trainer = Trainer(Settings(), arguments.work)
    meter = Meter(trainer, arguments.n, arguments.exits, arguments.work)
    rows: list[dict[str, object]] = []

    def write() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "how": "transformers, float32, greedy, 24 tokens, refusal rule",
            "default_exit": DEFAULT_EXIT,
            "prompts": digests(arguments.n),
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")

    for path in arguments.shipped:
        load_trained(trainer.model, path)
        rows += meter.measure(path.stem, arguments.sets)
        write()
    if arguments.vary:
        for seed in arguments.seeds:
            load_trained(trainer.model, arguments.work / "stage-vision.safetensors")
            trainer.image_safety(seed, extra=arguments.extra, save_as="vary")
            for amount in [0, *arguments.extra]:
                path = arguments.work / f"vary-{seed}-{amount}.safetensors"
                if path.exists():
                    load_trained(trainer.model, path)
                    rows += meter.measure(f"seed{seed}+{amount}", arguments.sets, vqa=False)
                    write()


if __name__ == "__main__":
    main()
