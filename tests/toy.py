"""Tiny real stages for the tests of the engine, and graphs of them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, cast

from artifacts.errors import SourceError
from pipeline.graph import Graph, Node
from pipeline.recipe import Recipe
from stages.stage import Context, Planned, Stage, StageParams


class TextParams(StageParams):
    text: str = "hello"
    kilobytes: int = 1


class Text(Stage[TextParams]):
    """Makes a text file; takes nothing."""

    name = "toy-text"
    output_type = "text"
    libraries = ("pydantic",)
    Params = TextParams

    def run(self, context: Context) -> Mapping[str, object]:
        (context.output / "sub").mkdir()
        (context.output / "sub" / "text.txt").write_text(self.params.text * 1024 * self.params.kilobytes)
        print("to the log")
        return {"words": len(self.params.text.split()), "key": context.key}


class ChainParams(StageParams):
    steps: int = 5
    seconds: float = 0.0  # a step
    note: Path | None = None  # appended to at every step, to see which steps were done how often


class Chain(Stage[ChainParams]):
    """Hashes its input again and again, with a checkpoint after each step, as training does."""

    name = "toy-chain"
    accepts: ClassVar[tuple[str, ...]] = ("text",)
    output_type = "text"
    Params = ChainParams

    def run(self, context: Context) -> Mapping[str, object]:
        data = b"".join(sorted(p.read_bytes() for a in context.inputs.values() for p in a.path.rglob("*.txt")))
        checkpoint = context.scratch / "checkpoint"
        step, value = 0, hashlib.sha256(data + str(context.seed).encode()).hexdigest()
        if checkpoint.exists():
            first, value = checkpoint.read_text().split()
            step = int(first)
        while step < self.params.steps:
            time.sleep(self.params.seconds)
            value = hashlib.sha256(value.encode()).hexdigest()
            step += 1
            (context.scratch / "partial").write_text(f"{step} {value}")
            (context.scratch / "partial").replace(checkpoint)
            if self.params.note is not None:
                with self.params.note.open("a") as handle:
                    handle.write(f"{step}\n")
            context.metric("value", int(value[:6], 16) / 1e6, step=step, exit=3)
            context.progress(step, self.params.steps, f"step {step}")
        (context.output / "chain.txt").write_text(value)
        return {"steps": step}


class Join(Chain):
    name = "toy-join"
    many = True


class TroubleParams(StageParams):
    kind: str


class Trouble(Stage[TroubleParams]):
    """Fails in the way that is asked for."""

    name = "toy-trouble"
    accepts: ClassVar[tuple[str, ...]] = ("text",)
    output_type = "text"
    Params = TroubleParams

    def run(self, context: Context) -> Mapping[str, object]:
        print("last words")
        match self.params.kind:
            case "pipeline-error":
                raise SourceError("the wheel is damaged", where="a.whl", why="digest", way_out="fetch it again")
            case "exception":
                raise ValueError("seven is not a colour")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "illegal":
                os.kill(os.getpid(), signal.SIGILL)
            case "exit":
                os._exit(0)
            case "no-json":
                return {"when": object()}
            case "symlink":
                (context.output / "link").symlink_to("/etc/hostname")
            case "device":
                return {"memory": context.device["memory"]}
            case "nan":
                context.metric("loss", float("nan"), step=1)
            case "family":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
                (context.scratch / "pids").write_text(f"{os.getpid()} {child.pid}")
                time.sleep(60)
            case "memory":
                block = bytearray(200 << 20)
                block[::4096] = b"x" * len(block[::4096])
                time.sleep(0.6)
        return {}


class DeviceReader(Trouble):
    name = "toy-device"
    reads_device = True


def node(id: str, stage: Stage[StageParams], *inputs: str) -> Node:
    return Node(id, type(stage).name, stage, inputs, inputs, Planned(type=type(stage).output_type))


def stage(
    cls: type[Stage[TextParams]] | type[Stage[ChainParams]] | type[Stage[TroubleParams]], **params: object
) -> Stage[StageParams]:
    made = cast("type[Stage[StageParams]]", cls)
    return made(made.Params.model_validate(params))


def graph(*nodes: Node, seed: int = 0, name: str = "toy") -> Graph:
    stages = {item.id: {"uses": item.uses, "needs": list(item.needs) or ["source"]} for item in nodes[1:]}
    recipe = Recipe.model_validate(
        {
            "recipe": 1,
            "name": name,
            "source": {},
            "stages": stages or {"nothing": {"uses": "nothing"}},
            "seed": seed,
            "device": {"memory": 1 << 30, "context": 512},
        }
    )
    return Graph(name, nodes, recipe)


def chain_graph(seed: int = 0, **params: object) -> Graph:
    """source -> two chains -> one that joins them."""
    return graph(
        node("source", stage(Text)),
        node("left", stage(Chain, **params), "source"),
        node("right", stage(Chain, **{**params, "steps": 3}), "source"),
        node("join", stage(Join, **params), "left", "right"),
        seed=seed,
    )
