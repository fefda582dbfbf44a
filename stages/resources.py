"""How many processes share a stage's work: what a recipe asks for, and what each of them knows of the others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
