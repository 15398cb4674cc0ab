"""Importance weights through compiled graphs: the density of very many points, evaluated where Python and memory cost most.

An engine weights K particles of N rows, and both change from call to call, while a graph has one shape. So the points, each
a row with its latents, are laid one after the other and cut into tiles of T, the last one filled up. A tile is small enough
to stay near the processor, and one graph serves all numbers of rows and particles.

Only densities of given points go this way. What is drawn, where modes are sought and how chains move stays as it is, so
that results are the same up to rounding. A graph sees parameters that change in place and nothing else that happens to a
program: a `CapturedProgram` lives for one judgement.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from pyro_vae.graph import Compile, Graph, compile_mode
from pyro_vae.layouts import Layout, Values
from pyro_vae.log_joint import Layouts, LogJoint
from pyro_vae.memory import Density, Evaluator, bytes_needed
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, take
from pyro_vae.seeds import seeded
from pyro_vae.tracing import CannotCapture
from pyro_vae.warn import warn

TILE, MOST, FEW = 2**25, 512, 16
"""Bytes that the eager evaluation of a tile would allocate, at most; its points, at most and at least."""

WORTH = 2**37
"""Bytes that the eager evaluations to come would allocate, from which a compilation pays."""

TOLERANCE = 30.0
"""Deviation of a captured density from the eager one that rounding explains, in units of the last place, see `_close`.

Of VAEs with 784 pixels, Gaussian, Laplace and Bernoulli, in float32, compiled graphs were never off by more than 3.
"""


class Tiles:
    """One density of points of one shape: counted while its evaluations are eager, a graph over tiles from then on.

    Args:
        program: what is evaluated.
        density: how.
        rows: some rows.
        z: latents (K, N, ...) of them, for their shapes.
        memory: bytes that a tile may take.

    Attributes:
        wanted: whether a graph should take over.
        tried: whether a graph was tried, so that there is one or none can be.
        graph: None while evaluations are eager.
    """

    def __init__(self, program: Program, density: Density, rows: Rows, z: Values, memory: int) -> None:
        self._program, self._density, self._names = program, density, list(z)
        self._each, _ = bytes_needed(program, rows, z, density)
        most = min(TILE, memory) // self._each
        self._size = min(MOST, 2 ** (most.bit_length() - 1)) if most else 0
        self._spent = 0
        self.wanted = self.tried = self._told = False
        self.graph: Graph | None = None

    def count(self, points: int) -> None:
        """So many points were evaluated eagerly."""
        self._spent += points * self._each

    def reached(self, done: int, total: int) -> None:
        """See `CapturedProgram.reached`."""
        self.wanted = self.wanted or (total - done) * self._spent >= done * WORTH
        self._spent = self._spent if done < total else 0  # other rows, or another engine, come next

    def capture(self, rows: Rows, z: Values) -> None:
        """Make the graph at some latents (K, N, ...) of the rows, and compare it with the eager density at others.

        At the same points nothing would be seen of what Python took from them, as x.numpy() does, and the graph keeps.

        Raises:
            CannotCapture: says why; it may do at points less alike if `tried` is False.
        """
        self.tried = True
        if self._size < FEW:
            raise CannotCapture(f"{FEW} points of this program take more memory than a tile may")
        if self._program.layout(rows).model is Layout.LOOPED:
            raise CannotCapture("the model cannot be run on copies of the rows")
        num_particles, num_rows = _shape(z)
        place = torch.arange(self._size, device=rows[0].device)
        row, particle = place % num_rows, place // num_rows % num_particles
        points = (*take(rows, row), *(value[particle, row] for value in z.values()))
        others = _others(points)
        self.tried = others is not None
        if others is None:
            raise CannotCapture("the points at hand are all alike in x or in a latent, so that no graph can be checked")
        with seeded(0, row.device):
            graph = Graph(self._evaluate, points)
            before = _random_state(row.device)
            graph(*points)
            drawn = not all(map(torch.equal, before, _random_state(row.device)))
        if drawn:
            raise CannotCapture("the model draws random numbers besides its latents")
        elsewhere = [take(points, index) for index in others]
        found = torch.cat([graph(*each)[0].clone() for each in elsewhere])  # a CUDA graph writes to the same place again
        should = torch.cat([self._evaluate(*each)[0] for each in elsewhere])
        self.tried = bool(should.isfinite().any())
        if not self.tried:
            raise CannotCapture("none of the points at hand has a density, so that no graph can be checked")
        if not _close(found, should, points[0].dtype):
            raise CannotCapture("the captured density differs from the eager one")
        self.graph = graph

    def tell(self, reason: CannotCapture) -> None:
        """Warn, once, that evaluations stay eager."""
        if not self._told:
            text = f"The evaluation goes on without compilation: {reason}."
            warn(text, RuntimeWarning)
        self._told = True

    def __call__(self, graph: Graph, rows: Rows, z: Values) -> Tensor:
        """The density of latents (K, N, ...) of the rows, (K, N), float64."""
        num_particles, num_rows = _shape(z)
        # One row after the other: its particles meet it in the cache.
        row = torch.arange(num_rows, device=rows[0].device).repeat_interleave(num_particles)
        points = [row, *(value.transpose(0, 1).flatten(0, 1) for value in z.values())]
        out = torch.empty(len(row), dtype=torch.float64, device=row.device)
        for start in range(0, len(row), self._size):
            at, *latents = (_filled(part[start : start + self._size], self._size) for part in points)
            (found,) = graph(*take(rows, at), *latents)
            out[start : start + self._size] = found[: len(row) - start]
        return out.unflatten(0, (num_rows, num_particles)).T.contiguous()

    def _evaluate(self, *points: Tensor) -> tuple[Tensor]:
        """The rows and the latents of T points, each (T, ...) -> their density, (T,)."""
        count = len(points) - len(self._names)
        z = {name: value[None] for name, value in zip(self._names, points[count:], strict=True)}
        with torch.no_grad():
            return (self._density(self._program.log_joint(points[:count]), z)[0],)


class CapturedProgram(Evaluator):
    """The same program for one judgement, its densities captured where that pays.

    Args:
        program: what is judged.
        compile: True captures at the first use; "auto" counts first, see `reached`; False never does.
        memory: byte budget.

    Raises:
        ValueError: `compile` is none of these.
    """

    def __init__(self, program: Program, compile: Compile, memory: int) -> None:
        super().__init__(program.model, program.guide)
        self._plain, self._mode, self._memory = program, compile_mode(compile), memory
        self._tiles: dict[Hashable, Tiles] = {}

    def layout(self, rows: Rows) -> Layouts:
        """See `Program.layout`."""
        return self._plain.layout(rows)

    def log_joint(self, x: Data) -> LogJoint:
        """See `Program.log_joint`."""
        return self._plain.log_joint(x)

    def reached(self, done: int, total: int) -> None:
        """So many of so many rows are done: a graph is made for the others where it pays, if they are like these.

        Counted and never clocked, so that the same call always does the same.
        """
        for tiles in self._tiles.values():
            tiles.reached(done, total)

    def evaluated(self, rows: Rows, z: Values, density: Density) -> Tensor | None:
        """See `Evaluator`: by a graph, where there is one; else the points are counted."""
        num_particles, num_rows = _shape(z)
        if self._mode is False or num_particles * num_rows < FEW:
            return None
        shapes = [(part.shape[1:], part.dtype) for part in rows] + [(n, v.shape[2:], v.dtype) for n, v in z.items()]
        key = (density, *shapes)
        if key not in self._tiles:
            self._tiles[key] = Tiles(self._plain, density, rows, z, self._memory)
        tiles = self._tiles[key]
        if tiles.graph is None and not tiles.tried and (tiles.wanted or self._mode is True):
            try:
                tiles.capture(rows, z)
            except CannotCapture as reason:
                if self._mode is True:
                    tiles.tell(reason)
        if tiles.graph is None:
            tiles.count(num_particles * num_rows)
            return None
        return tiles(tiles.graph, rows, z)


def _shape(z: Values) -> tuple[int, int]:
    """K and N of latents (K, N, ...)."""
    num_particles, num_rows = next(iter(z.values())).shape[:2]
    return num_particles, num_rows


def _filled(part: Tensor, size: int) -> Tensor:
    """(n, ...) -> (size, ...), its last entry repeated."""
    return part if len(part) == size else torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _others(points: tuple[Tensor, ...]) -> list[Tensor] | None:
    """Where to look instead of at T points, indices (T,); None where one of their tensors is the same throughout.

    Another order shows what was kept of single points, one point alone (repeated) what was kept of them all, as their mean.
    Rolled by one, and alone, no tensor is what it was.
    """
    place = torch.arange(len(points[0]), device=points[0].device)
    alone = {0}
    for part in points:
        first = part[:1]
        differs = ((part != first) & ~(part.isnan() & first.isnan())).reshape(len(part), -1).any(-1)
        if part.numel() and not bool(differs.any()):
            return None
        alone.update(differs.nonzero()[:1].flatten().tolist())
    return [place.roll(1), place.flip(0), *(torch.full_like(place, point) for point in sorted(alone))]


def _close(found: Tensor, should: Tensor, dtype: torch.dtype) -> bool:
    """Whether densities (n,) computed in `dtype` differ by rounding alone where finite (some must be), else not at all.

    A density near zero may be a sum of large terms that cancel (log-scales and squares), with their rounding: what is
    allowed goes by the point's own size, or that of a typical point, which unlike the mean no single one can raise.
    """
    finite = torch.isfinite(should)
    if not torch.allclose(found[~finite], should[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return False
    size = should[finite].abs()
    allowed = TOLERANCE * torch.finfo(dtype).eps * (1.0 + torch.maximum(size, size.median()))
    return bool(((found - should)[finite].abs() <= allowed).all())
