"""Processes that work on one thing together: who this one is, which part is its own, and how numbers go around.

Under a launcher such as `torchrun` every process (a rank) runs the same program. `joined` connects them for the time of a
block: gloo between CPUs, NCCL between GPUs. All ranks must then come to the same calls in the same order. A rank that
leaves the block, by an error or because it was killed, closes its connections, so that the others do not wait for it:
their next call raises `Lost`. Without a launcher a process is a team of one, `ALONE`, and nothing is sent.

What goes around are tensors and bytes; nothing is pickled.
"""

from __future__ import annotations

import datetime
import itertools
import re
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pyro_vae.launch import Place, numbered, place

_joins = itertools.count()

_PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for one that works. One that has ended closes its connections, and is not waited for."""

_MEETINGS = 10
"""How often a rank goes to a meeting point that is closed on it."""

_GONE = re.compile("closed|reset by peer|broken pipe|timed out|timeout|remote process exited", re.IGNORECASE)
"""What gloo, NCCL and sockets say where another rank has ended; all else (memory, dtypes) is an error of this one."""


class Lost(ConnectionError):
    """Another rank has ended, or the exchange with it has failed, so that this one cannot go on."""


class Team:
    """The ranks of a job, seen from one of them.

    Args:
        rank: this one's number.
        size: how many there are.
        group: their process group; None for a team of one.
        device: where what is sent must lie.

    Attributes:
        rank: likewise.
        size: likewise.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._device = group, device

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """What makes this rank's random numbers its own; nothing on rank 0, so that one process draws as ever."""
        return (self.rank,) if self.rank else ()

    def part(self, count: int) -> slice:
        """This rank's part of `count` things in a row; parts differ by one thing at most."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def turns(self, count: int) -> range:
        """This rank's part of `count` things, dealt like cards."""
        return range(self.rank, count, self.size)

    def add(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place: the same bits on each of them."""
        if self.size > 1:
            with self._connected() as dist:
                dist.all_reduce(values, group=self._group)
        return values

    def same(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.size > 1:
            with self._connected() as dist:
                dist.broadcast(values, src=0, group=self._group)
        return values

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank has to say, by rank."""
        if self.size == 1:
            return [content]
        sizes = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        sizes[self.rank] = len(content)
        sizes = self.add(sizes)
        own = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=self._device)
        own[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        with self._connected() as dist:
            dist.all_gather(everyone, own, group=self._group)
        return [part[:size].cpu().numpy().tobytes() for part, size in zip(everyone, sizes.tolist(), strict=True)]

    def require_same(self, told: Mapping[str, Any], mend: str) -> None:
        """Refuse to go on where ranks differ; all of them refuse.

        Args:
            told: the same names on each rank, and what must be the same, told by `repr`.
            mend: what to do, a sentence.

        Raises:
            ValueError: names what differs from rank 0's.
        """
        if self.size == 1:
            return
        sums = [zlib.crc32(f"{name}={value!r}".encode()) for name, value in told.items()]
        own = torch.tensor(sums, dtype=torch.int64, device=self._device)
        apart = self.add((own != self.same(own.clone())).long()).tolist()
        if differing := [name for name, ranks in zip(told, apart, strict=True) if ranks]:
            raise ValueError(f"The {self.size} ranks of this job differ in {', '.join(differing)}: {mend}")

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """torch.distributed, whose errors are told in a sentence."""
        import torch.distributed as dist

        try:
            yield dist
        except RuntimeError as error:
            told = _first_line(error)
            if not _GONE.search(str(error)):
                raise Lost(f"The exchange with the other processes failed ({told}).") from error
            why = "" if "closed by peer" in str(error) else f" ({told})"
            raise Lost(
                f"Another of the {self.size} processes of this job has ended; if it was not stopped from outside, its own "
                f"message says why{why}."
            ) from error


ALONE = Team()


def standing() -> Place:
    """Where this process stands in its job: by the process group that a program has made, else by the environment."""
    told = place()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size(), numbered())
    return told


@contextmanager
def joined(device: torch.device | None = None) -> Iterator[Team]:
    """This process as a member of its job, connected with the others; `ALONE` without a launcher.

    A process group that is there already stays as it is: another one is made beside it, and closed again on leaving.

    Args:
        device: where numbers lie that go around; None for the CPU.

    Raises:
        Lost: the others cannot be reached.
    """
    here = standing()
    if here.size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    # Whoever first imports it while there is a group (optimisers do) keeps that group open to the end of the process.
    import torch.distributed.nn.functional

    device = device or torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    ours = not dist.is_initialized()
    try:
        if ours:
            _connect(backend, here)
            team = Team(here.rank, here.size, dist.group.WORLD, device)
        else:
            team = Team(here.rank, here.size, dist.new_group(backend=backend, timeout=_PATIENCE), device)
    except RuntimeError as error:
        raise Lost(f"The other processes of this job cannot be reached from {here}: {_first_line(error)}.") from error
    try:
        yield team
    finally:
        # Only without any reference to it are its connections closed, so that no other rank waits for this one.
        group, team._group = team._group, None
        dist.destroy_process_group(None if ours else group)
        del group


def _connect(backend: str, here: Place) -> None:
    """A process group of the whole job.

    Without torchrun each group has a meeting point that rank 0 opens and closes. A rank that comes to the next group before
    rank 0 has left the last one meets nobody there, and is cut off when that is closed: it tries again.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    # A prefix of its own, or a second group under torchrun would read the addresses of the first.
    prefix = f"pyro_vae/{next(_joins)}"
    for left in reversed(range(_MEETINGS)):
        try:
            store = PrefixStore(prefix, next(rendezvous("env://", here.rank, here.size))[0])
            if here.rank == 0:
                store.set("open", "yes")
            store.wait(["open"], _PATIENCE)
            break
        except dist.DistNetworkError:
            if left == 0:
                raise
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=_PATIENCE)


@contextmanager
def held() -> Iterator[None]:
    """Ctrl-C held back until the block has ended, so that no call is left half-way which the other ranks have come to."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(signal.SIGINT, came[0])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all their entries in the widest of their dtypes."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")
