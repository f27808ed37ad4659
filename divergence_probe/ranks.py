"""Which of several cooperating processes this one is, without importing torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are; 1 for a process by itself.
        local_world: how many of them are on this machine.
        launcher: what started them all on this machine, alike in all of them.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    launcher: str = ""

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.world > 1

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all: it writes ``meta.json`` and the reports."""
        return self.rank == 0


def place() -> Place:
    """The process group's rank where there is a group, else what a launcher has set.

    ``torchrun`` sets RANK, WORLD_SIZE and LOCAL_WORLD_SIZE. A rank outside the world is none.
    """
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
    if rank is None or world is None or not 0 <= rank < world or world == 1:
        return Place()
    launcher = "-".join(filter(None, (str(os.getppid()), os.environ.get("MASTER_PORT"))))
    return Place(rank, world, _number("LOCAL_WORLD_SIZE") or world, launcher)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else None
