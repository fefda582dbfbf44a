"""A step of l-ppo against a step of TRL's PPOTrainer: the same text-only model, prompts, lengths, epochs and LoRA.

    python benchmarks/lppo_vs_trl.py

Each side is a process of its own that does one step when it is told to. The sides take turns, in reversed order every
other round, so what else the machine does hits all of them. Linux only. About 10 minutes on two quiet cores, and a few
more when TRL's environment has to be made. Writes benchmarks/results/lppo_vs_trl.json.

What is alike: SmolLM2-135M-Instruct in float32; LoRA (rank, scale, layers); 16 responses a step, each of exactly 20
tokens (nothing ends a response early); prompts of exactly 42 tokens with the chat template, so neither side pads; 2
epochs of one minibatch, so as many optimizer steps; eta, eps, c1, lambda, gamma, gradient clipping; threads.

What differs, and how it was decided:
- TRL 1.12.0 is the last release with PPO. Its environment has our versions of everything else. It is not patched.
- TRL draws one response to a prompt, so each prompt stands in its data set as often as we sample it. What the responses
  to a prompt share, and what the prompts of a scene share (the system's turn), we compute once. `ours, nothing shared`
  shows what is left where each prompt is asked once and stands alone in its scene.
- Reward: a rule here. TRL needs a model: one block of width 64 costs it next to nothing. `trl, as in its examples`
  takes one of the policy's size.
- Value model: a linear layer on the policy's trunk here, by design. TRL's is a model of its own, of the policy's size,
  all of it trained (`full`); cheaper ones that its interface allows: an adapter and a head (`lora`), or a head alone on
  a frozen model (`head`), which can learn less than ours.
- Reference: the policy without its adapter, on both sides.
- We also hold answers to harmless prompts at the reference's by an exact KL (`anchor`), as is our default; TRL has no
  such thing. We run with deterministic kernels, as the stage does.
- Micro-batches: as many responses as ours, or all of a step at once; TRL samples all at once, its fastest. One setting
  takes as little memory as it can, four responses at a time.
- What counts is TRL's fastest setting for time, and for memory the leanest one with our micro-batch; the leanest of all
  is told beside it. Every setting does `--trials` steps first; then the fastest, the one most like TRL's examples,
  and ours race for `--rounds`. The first step of every process is left out.

Memory: before each step a process's high-water mark is set back (/proc/PID/clear_refs), after it VmHWM is read: the
kernel's own peak of all resident memory, libraries and weights included, loading left out. RssAnon, memory that is the
process's own, is looked at fifty times a second. CPU time is told beside wall time: a busy machine changes it less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Final, Self, TypedDict, cast

from artifacts.home import cache_dir
from stages.data.prompts import load_prompts
from stages.lppo.params import LPPOParams

HERE: Final = Path(__file__).parent
RESULTS: Final = HERE / "results" / "lppo_vs_trl.json"
TRL: Final = "1.12.0"
WITH_TRL: Final = ("torch", "transformers", "peft")  # what TRL needs and does not depend on
SPEED_AIM: Final = 2.0  # times as fast
AS_IN_EXAMPLES: Final = "trl, as in its examples"
OURS: Final = "ours"
MEMORY_AIM: Final = 0.5  # of the memory


@dataclass
class Turn:
    """One step of one side."""

    seconds: float
    cpu_seconds: float  # of all its threads
    resident: int  # bytes, peak
    anonymous: int  # bytes, peak
    parts: dict[str, float] = field(default_factory=dict)  # seconds; only ours


class Told(TypedDict, total=False):
    """What a side says at the end of a turn."""

    seconds: float
    parts: dict[str, float]


class Side:
    """A process that does one step a turn."""

    def __init__(self, name: str, command: Sequence[str], log: Path, threads: int):
        self.name = name
        self.turns: list[Turn] = []
        self._log = log
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # a side that waits must not spin
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self._told()
        self._turn()  # warm-up

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def step(self) -> None:
        self.turns.append(self._turn())
        last = self.turns[-1]
        print(f"{self.name:32} {last.seconds:7.2f} s {last.resident / 2**20:7.0f} MiB", flush=True)

    def _turn(self) -> Turn:
        assert self._process.stdin is not None
        proc = Path("/proc") / str(self._process.pid)
        (proc / "clear_refs").write_text("5")
        before = cpu_seconds(proc)
        peaks, done = [0], threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                peaks.append(memory(proc, "RssAnon"))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            told = self._told()
        finally:
            done.set()
            looking.join()
        spent = cpu_seconds(proc) - before
        return Turn(told["seconds"], spent, memory(proc, "VmHWM"), max(peaks), told.get("parts", {}))

    def _told(self) -> Told:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        return cast("Told", json.loads(line))


def memory(proc: Path, name: str) -> int:
    """Bytes, from /proc/PID/status."""
    lines = (proc / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def cpu_seconds(proc: Path) -> float:
    """User and system time so far, from /proc/PID/stat."""
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trl_environment(folder: Path) -> Path:
    """The interpreter of an environment with TRL 1.12.0 and, of all else, the versions that run here; made once."""
    python, whole = folder / "bin" / "python", folder / "whole"
    own = {f"{one.name}=={one.version}" for one in distributions() if one.name.lower() not in ("trl", "icet-pipeline")}
    constraints = "\n".join(sorted(own))
    if not whole.is_file() or whole.read_text() != constraints:
        print(f"making an environment with TRL {TRL} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pinned = folder / "constraints.txt"
        pinned.write_text(constraints)
        command = [python, "-m", "pip", "install", "-q", "-c", pinned, f"trl=={TRL}", *WITH_TRL]
        subprocess.run([*map(str, command)], check=True)
        whole.write_text(constraints)
    return python


def language_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint of its own, float32."""
    if not (folder / "config.json").is_file():
        from transformers import LlamaForCausalLM

        from stages.models.smol_llava import base_model, write_tokenizer

        llava = base_model()
        model = LlamaForCausalLM(llava.config.text_config)
        model.model.load_state_dict(llava.model.language_model.state_dict())
        model.tie_weights()
        folder.mkdir(parents=True)
        write_tokenizer(folder)
        model.save_pretrained(folder)
    return folder


def demo_model(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        from stages.models.smol_llava import assemble

        assemble(folder)
    return folder


def prompts_of_length(checkpoint: Path, tokens: int) -> list[dict[str, object]]:
    """Our training prompts that are `tokens` long with the chat template: as many harmful ones as others."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sides: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    for kind, sets in LPPOParams().prompts.kinds().items():
        for prompt in (prompt for name in sets for prompt in load_prompts(name, "train") if prompt.intent == kind):
            turn = [{"role": "user", "content": prompt.text}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
            if len(ids) == tokens:
                sides[prompt.intent == "harmful"].append(
                    {"id": prompt.id, "text": prompt.text, "intent": prompt.intent, "ids": ids}
                )
    some = min(map(len, sides.values()))
    return [*sides[True][:some], *sides[False][:some]]


def trl_settings(responses: int, micro_batch: int) -> dict[str, dict[str, object]]:
    """What is tried of TRL; batches in responses."""
    small = {"rewards": "small", "rollout": responses}
    return {
        AS_IN_EXAMPLES: {"value": "full", "rewards": "full", "rollout": responses, "per_device": micro_batch},
        "trl, value adapter": {"value": "lora", **small, "per_device": micro_batch},
        "trl, value head": {"value": "head", **small, "per_device": micro_batch},
        "trl, value head, one batch": {"value": "head", **small, "per_device": responses},
        "trl, value head, small batches": {"value": "head", "rewards": "small", "rollout": 4, "per_device": 4},
    }


def told_of(side: Side) -> dict[str, object]:
    """Medians, peaks, every step, and where the time went."""
    seconds = [turn.seconds for turn in side.turns]
    parts = {name for turn in side.turns for name in turn.parts}
    middle = {name: statistics.median(turn.parts.get(name, 0.0) for turn in side.turns) for name in parts}
    whole = sum(middle.values())
    return {
        "median_seconds": round(statistics.median(seconds), 3),
        "median_cpu_seconds": round(median_cpu(side), 3),
        "step_seconds": [round(value, 3) for value in seconds],
        "peak_resident_mib": round(max(turn.resident for turn in side.turns) / 2**20),
        "peak_anonymous_mib": round(max(turn.anonymous for turn in side.turns) / 2**20),
        **(
            {"share_of_time": {k: round(v / whole, 3) for k, v in sorted(middle.items(), key=lambda kv: -kv[1])}}
            if parts
            else {}
        ),
    }


def compared(ours: Side, theirs: Side) -> dict[str, float]:
    """How many times as fast: of medians, and round by round; shares of memory."""
    each = [theirs.turns[i].seconds / ours.turns[i].seconds for i in range(min(len(ours.turns), len(theirs.turns)))]
    found = {"times_as_fast": median_seconds(theirs) / median_seconds(ours)}
    found |= {
        "round_by_round_least": min(each),
        "round_by_round_median": statistics.median(each),
        "round_by_round_most": max(each),
        "times_less_cpu": median_cpu(theirs) / median_cpu(ours),
    }
    return {name: round(value, 3) for name, value in (found | shares_of_memory(ours, theirs)).items()}


def median_seconds(side: Side) -> float:
    return statistics.median(turn.seconds for turn in side.turns)


def median_cpu(side: Side) -> float:
    return statistics.median(turn.cpu_seconds for turn in side.turns)


def peak(side: Side) -> int:
    return max(turn.resident for turn in side.turns)


def shares_of_memory(ours: Side, theirs: Side) -> dict[str, float]:
    anonymous = [max(turn.anonymous for turn in side.turns) for side in (ours, theirs)]
    return {"resident_share": peak(ours) / peak(theirs), "anonymous_share": anonymous[0] / anonymous[1]}


def task_of(arguments: argparse.Namespace, small: Path, demo: Path) -> dict[str, object]:
    """What both sides read."""
    params = LPPOParams()
    alike = ("lora_rank", "lora_alpha", "lora_targets", "lr", "kl", "clip", "c1", "gamma", "lam", "max_grad_norm")
    return {
        "checkpoint": str(small),
        "demo_checkpoint": str(demo),
        "prompts_per_step": arguments.prompts,
        "samples": arguments.samples,
        "response_tokens": arguments.response_tokens,
        "ppo_epochs": arguments.epochs,
        **{name: getattr(params, name) for name in alike},
        "prompts": prompts_of_length(small, arguments.prompt_tokens),
    }


def arguments_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of every side in the race")
    parser.add_argument("--trials", type=int, default=1, help="steps of every setting of TRL before it")
    parser.add_argument("--prompts", type=int, default=4, help="in a step, even, at least 4")
    parser.add_argument("--samples", type=int, default=4, help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=42)
    parser.add_argument("--response-tokens", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmarks", help="environment, models and logs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> int:
    arguments = arguments_given()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    python = trl_environment(work / f"trl-{TRL}")
    task = task_of(arguments, language_model(work / "smollm2-135m"), demo_model(work / "smol-llava"))
    written = work / "task.json"
    written.write_text(json.dumps(task))

    def start(name: str, setting: Mapping[str, object], *, trl: bool) -> Side:
        program = [python, HERE / "sides" / "trl_ppo.py"] if trl else [sys.executable, HERE / "sides" / "ours.py"]
        log = work / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        return Side(name, [*map(str, program), str(written), json.dumps(setting)], log, arguments.threads)

    micro_batch = 2 * arguments.samples  # one scene
    theirs = trl_settings(arguments.prompts * arguments.samples, micro_batch)
    ours = {
        OURS: {"samples": arguments.samples, "prompts_per_scene": 2, "micro_batch": 1},
        "ours, nothing shared": {"samples": 1, "prompts_per_scene": 1, "micro_batch": micro_batch},
    }
    load = os.getloadavg()
    tried: dict[str, Side] = {}
    for name, setting in theirs.items():
        with start(name, setting, trl=True) as side:
            for _ in range(arguments.trials):
                side.step()
        tried[name] = side
    fastest = min(tried, key=lambda name: median_seconds(tried[name]))
    leanest = min(tried, key=lambda name: peak(tried[name]))
    leanest_alike = min(
        (name for name in tried if theirs[name]["per_device"] == micro_batch), key=lambda name: peak(tried[name])
    )

    with ExitStack() as stack:
        race = [stack.enter_context(start(name, setting, trl=False)) for name, setting in ours.items()]
        chosen = dict.fromkeys((fastest, AS_IN_EXAMPLES))
        race += [stack.enter_context(start(name, theirs[name], trl=True)) for name in chosen]
        for number in range(arguments.rounds):
            for side in race if number % 2 == 0 else reversed(race):
                side.step()
    with start("ours, demo, Q4_0", {"demo": True, "quantizer": "Q4_0"}, trl=False) as pictured:
        for _ in range(2):
            pictured.step()

    raced = {side.name: side for side in race}
    verdict: dict[str, object] = {
        "times_as_fast": compared(raced[OURS], raced[fastest])["times_as_fast"],
        "aim_times_as_fast": SPEED_AIM,
        "trl_fastest": fastest,
        "memory_share": round(peak(raced[OURS]) / peak(tried[leanest_alike]), 3),
        "aim_memory_share": MEMORY_AIM,
        "trl_leanest_with_our_micro_batch": leanest_alike,
        "memory_share_against_leanest": round(peak(raced[OURS]) / peak(tried[leanest]), 3),
        "trl_leanest": leanest,
    }
    prompts = cast("list[object]", task["prompts"])
    unsaid = ("prompts", "checkpoint", "demo_checkpoint")
    summary = {
        "command": shlex.join(["python", "benchmarks/lppo_vs_trl.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads a side",
        "load_before": [round(value, 2) for value in load],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")} | {"trl": TRL},
        "task": {name: value for name, value in task.items() if name not in unsaid}
        | {"prompt_tokens": arguments.prompt_tokens, "distinct_prompts": len(prompts)},
        "settings": {**ours, **theirs},
        "verdict": verdict,
        "against": {f"{one} / {other}": compared(raced[one], raced[other]) for one in ours for other in chosen},
        "race": {name: told_of(side) for name, side in raced.items()},
        "tried": {name: told_of(side) for name, side in tried.items()},
        "demo_with_pictures": told_of(pictured),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(verdict, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
