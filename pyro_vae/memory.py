"""Work under a byte budget: what one evaluation allocates is measured once, and blocks are cut to fit.

The measure adds up everything that an evaluation of a few rows and particles allocates, freed or not, so it is an upper
bound of the peak and the blocks are on the safe side. Chunks change the rounding of a result at most: no random number is
drawn inside them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.layouts import KEPT, Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.program import Program
from pyro_vae.rows import Rows, probe, take

Density = Callable[[LogJoint, Values], Tensor]
"""(log joint of N rows, latents (K, N, ...)) -> (K, N), float64, as `at_u`; a function of a module: it is remembered."""

BUDGET = 2**30
"""Default byte budget, 1 GiB."""

CACHE = 2**27
"""Chunks are not made larger than this many bytes: enough to keep the cores busy, small enough to stay near the cache."""


BLOCK_ROWS, BLOCK_NUMBERS = 512, 2**22
"""Rows of a block, and the numbers that its particles hold (rows x K x D), at most, or those of one row."""


def block_rows(num_particles: int, dim: int) -> int:
    """Rows that a block may have, of K particles in D dimensions: no byte budget changes it, nor what is drawn."""
    return max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // (num_particles * dim)))


class _Tally(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += sum(leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def bytes_allocated(work: Callable[[], object]) -> int:
    """Bytes of all tensors that `work()` makes, those it frees again included."""
    with _Tally() as tally:
        work()
    return tally.bytes


class Evaluator(Program):
    """A program that may know a faster way to the densities of many points than `in_chunks` does."""

    @abstractmethod
    def evaluated(self, rows: Rows, z: Values, density: Density) -> Tensor | None:
        """`density` for latents (K, N, ...) of the rows, (K, N), float64, no graph kept; None where it knows none."""


def in_chunks(program: Program, rows: Rows, z: Values, density: Density, budget: int) -> Tensor:
    """`density(log_joint, z)` for all particles and rows, no graph kept, at most `budget` bytes at a time.

    Args:
        program: gives the log joint.
        rows: N rows.
        z: latents (K, N, *event_shape).
        density: what is evaluated.
        budget: bytes.

    Returns:
        (K, N), float64.

    Raises:
        ValueError: the budget does not hold one particle of one row.
    """
    num_particles, num_rows = next(iter(z.values())).shape[:2]
    with torch.no_grad():
        each, shared = bytes_needed(program, rows, z, density)
        if each > budget:
            raise ValueError(f"memory={budget} bytes is less than one particle of one row takes ({each}): give more.")
        if isinstance(program, Evaluator) and (known := program.evaluated(rows, z, density)) is not None:
            return known
        chunk = max(each, min(budget - shared, CACHE))
        row_step = min(num_rows, chunk // each)
        particle_step = max(1, chunk // (each * row_step))
        out = torch.empty(num_particles, num_rows, dtype=torch.float64, device=rows[0].device)
        for start in range(0, num_rows, row_step):
            at = slice(start, start + row_step)
            log_joint = program.log_joint(take(rows, at))
            for first in range(0, num_particles, particle_step):
                k = slice(first, first + particle_step)
                out[k, at] = density(log_joint, {name: value[k, at] for name, value in z.items()})
    return out


def gradient_rows(program: Program, rows: Rows, u: Tensor, budget: int) -> int:
    """How many rows of u (K, N, D) a gradient of the log joint takes at a time, at least one."""
    each, _ = bytes_needed(program, rows, {"u": u}, at_u)
    # The backward pass keeps what the density allocated and makes as much again.
    return max(1, min(budget // 3, CACHE) // (each * len(u)))


def at_u(log_joint: LogJoint, values: Values) -> Tensor:
    """The log joint at values["u"], a `density` for `in_chunks`."""
    return log_joint(values["u"])


def bytes_needed(program: Program, rows: Rows, z: Values, density: Density) -> tuple[int, int]:
    """Bytes of one particle of one row, and those that any number of them share, from small runs of 4 and of 2 rows.

    Shapes alone decide them, so a program remembers the last few.
    """
    cache: dict[Hashable, tuple[int, int]] = program.__dict__.setdefault("_bytes_needed", {})
    shapes = [(part.shape[1:], part.dtype) for part in rows] + [(name, v.shape[2:], v.dtype) for name, v in z.items()]
    key = (density, *shapes)
    if key not in cache:
        cache[key] = _measure(program, rows, z, density)
        for old in list(cache)[:-KEPT]:
            del cache[old]
    return cache[key]


def _measure(program: Program, rows: Rows, z: Values, density: Density) -> tuple[int, int]:
    def run(count: int) -> int:
        log_joint = program.log_joint(probe(rows, count))
        index = torch.arange(count) % len(rows[0])
        some = {name: value[:1, index].repeat(2, *(1,) * (value.dim() - 1)) for name, value in z.items()}
        return bytes_allocated(lambda: density(log_joint, some))

    large, small = run(4), run(2)
    each = max(1, -(-(large - small) // 4))  # two particles of two rows more
    return each, max(0, small - 4 * each)
