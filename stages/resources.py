"""How many processes share a stage's work: what a recipe asks for, and what each of them knows of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from artifacts.errors import StageError

Sharding = Literal["none", "fsdp"]


class Resources(BaseModel):
    """What a stage may use of this machine. Like the machine itself, it is no part of the content key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share the stage's work: one for each GPU, or on processors a part of the cores.",
    )
    sharding: Sharding = Field(
        default="none",
        description="fsdp: each process keeps a part of the frozen weights, so that the model need not fit one device.",
    )

    @model_validator(mode="after")
    def _several(self) -> Self:
        if self.sharding != "none" and self.processes == 1:
            raise ValueError(
                f"sharding: {self.sharding} splits weights over several processes; set processes to 2 or more"
            )
        return self


@dataclass(frozen=True)
class Team:
    """The processes that share one stage's work, all on this machine.

    Attributes:
        rank: of this process, 0 up to `size` - 1. Only what rank 0 reports, writes and returns counts; the others find
            the same folders but leave them alone.
        meeting: a file that is not there yet, through which they find each other:
            `torch.distributed.init_process_group(init_method=f"file://{meeting}", ...)`. None: there is nobody to find.
    """

    rank: int = 0
    size: int = 1
    meeting: Path | None = None
    sharding: Sharding = "none"


def device_of(wanted: str, team: Team) -> str:
    """`auto` resolved; each process of a team has a GPU of its own.

    Raises:
        StageError: a GPU is asked for and there is none, or there are fewer than processes.
    """
    import torch

    there = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not there:
        raise StageError("device: cuda, but torch sees no GPU", way_out="use device: auto or cpu")
    if not there:
        return "cpu"
    if team.size == 1:
        return "cuda"
    if team.size > there:
        raise StageError(
            f"{team.size} processes, but torch sees {there} GPU{'s' if there > 1 else ''}",
            why="each process needs one of its own",
            way_out=f"set resources.processes to {there} or less, or device: cpu",
        )
    torch.cuda.set_device(team.rank)
    return f"cuda:{team.rank}"
