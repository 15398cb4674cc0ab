"""Which process of a job this one is, as its launcher says: `torchrun`, or any that sets the same variables.

Nothing is imported here, so that the command line can ask before it loads anything.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Where a process stands in its job.

    Attributes:
        rank: 0, 1, ..., size - 1 over all machines.
        size: processes in all.
        numbered: its number on this machine; None where nobody has said.
    """

    rank: int = 0
    size: int = 1
    numbered: int | None = 0

    @property
    def local(self) -> int:
        """Its number on this machine, by which it takes its GPU.

        Raises:
            ValueError: nobody has said, and it is not alone: all would take the first GPU.
        """
        if self.numbered is None and self.size > 1:
            raise ValueError(
                f"Nothing says which GPU is that of {self}: set LOCAL_RANK to the process's number on its machine, or give "
                "its GPU, such as device='cuda:1'."
            )
        return self.numbered or 0

    def __str__(self) -> str:
        """Such as rank 0 of 2."""
        return f"rank {self.rank} of {self.size}"


def place() -> Place:
    """What the environment says; a process without a launcher is alone.

    Raises:
        ValueError: a variable that is no whole number, or a rank that the job does not have.
    """
    told = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= told.keys():
        return Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local = int(told["RANK"]), int(told["WORLD_SIZE"]), numbered()
    except ValueError:
        rank, size, local = -1, 0, 0
    if not 0 <= rank < size:
        given = ", ".join(f"{name}={told[name]}" for name in names if name in told)
        raise ValueError(
            f"The environment says {given}, which is no place in a job: start it with torchrun, or unset them."
        )
    return Place(rank, size, local)


def numbered() -> int | None:
    """The number of this process on its machine, by LOCAL_RANK; None where that is not set.

    Raises:
        ValueError: it is no whole number.
    """
    told = os.environ.get("LOCAL_RANK")
    if told is None:
        return None
    if not told.strip().isdecimal():
        raise ValueError(
            f"The environment says LOCAL_RANK={told}: it must be the process's number on its machine, 0, 1, ..."
        )
    return int(told)
