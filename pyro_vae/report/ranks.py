"""Simulation-based calibration: whether draws of q(z | x) are draws of p(z | x), on data drawn from the model.

For (x, z) ~ p(x, z), z is an exact posterior draw given x. If z_1 .. z_L are further, independent ones, then the rank of
any f(x, z) among the f(x, z_l) is uniform on 0 .. L (Talts et al. 2018, arXiv:1804.06788, theorem 1). The functions f are

* the D unconstrained dimensions of z. Where a site's bijection works number by number the ranks are those of z itself;
* the log joint f = log p(x, z), which depends on the data. Without such a function the test is blind to much: a guide that
  is the prior whatever x is passes on every dimension (Modrák et al. 2023, arXiv:2211.02383, sec. 2).

A rank r with t ties becomes (r + (t + 1) v) / (L + 1), v uniform on [0, 1]: a probability integral transform, PIT, uniform
on [0, 1] exactly. With weights w_l, sum 1, of effective size S = 1 / sum w_l^2, the weights below stand for r / L, and
1 / S for 1 / L, which is exact only as the number of particles grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.evidence import weights
from pyro_vae.layouts import Values
from pyro_vae.log_joint import LogJoint
from pyro_vae.memory import BUDGET, block_rows, in_chunks
from pyro_vae.parameters import judging
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.report.bands import Uniform
from pyro_vae.report.groups import CHAIN, DRAW, Labels, gathered
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, probe, take
from pyro_vae.seeds import Seed, derive, seeded

if TYPE_CHECKING:
    import pandas as pd

LOG_JOINT = "log p(x, z)"
"""Name of the quantity that is no dimension."""

LEVEL = 0.05
"""A quantity with a smaller p-value lies outside of the 95 % band."""

SMALLEST = 1e-10
"""P-values below it are not told apart: the rounding of the convolutions is as large."""

CLEAR = 3.0
"""So many standard errors make a mean or a spread of the PIT worth a word."""

SIMULATED, DRAWN, TIES = range(3)
"""Sub-streams of the seed."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """PIT of Q quantities on N simulated rows, and what they say of uniformity.

    Attributes:
        names: of the quantities, Q texts: the unconstrained dimensions, then the log joint.
        pit: (N, Q), float64, uniform on [0, 1] where the draws are those of the posterior; NaN in a row without draws.
        num_draws: L of each row.
        engine: what drew.
    """

    names: tuple[str, ...]
    pit: Tensor
    num_draws: int
    engine: str

    def __len__(self) -> int:
        """N."""
        return len(self.pit)

    @property
    def known(self) -> Tensor:
        """Rows that have draws, boolean (N,)."""
        return self.pit.isfinite().all(1)

    @cached_property
    def expected(self) -> Uniform:
        """The distribution function of as many uniform numbers: the points, and the band."""
        return Uniform(int(self.known.sum()))

    @cached_property
    def p_value(self) -> Tensor:
        """P-value of uniformity of each quantity, (Q,), see `bands`."""
        return self.expected.p_value(self.pit[self.known])

    @property
    def adjusted(self) -> Tensor:
        """P-values to judge all Q together by, (Q,), after Holm 1979: one is below 0.05 in at most 5 % of exact guides."""
        order = self.p_value.argsort()
        factors = torch.arange(len(order), 0, -1, dtype=torch.float64)
        steps = (self.p_value[order] * factors).cummax(0).values.clamp_max(1.0)
        return torch.empty_like(steps).scatter(0, order, steps)

    @property
    def order(self) -> Tensor:
        """The quantities from the least uniform on, (Q,): by p-value, of equal ones the curve that goes further first."""
        further = self.difference.abs().amax(0).cpu().argsort(descending=True)
        return further[self.p_value[further].clamp_min(SMALLEST).argsort(stable=True)]

    @property
    def outside(self) -> Tensor:
        """Which quantities leave the simultaneous 95 % band, boolean (Q,)."""
        return self.p_value <= LEVEL

    @property
    def difference(self) -> Tensor:
        """ECDF of the PIT less that of uniform numbers, at `expected.points`: (G - 1, Q)."""
        used = self.pit[self.known]
        return self.expected.curve(used).double() / len(used) - self.expected.points.to(used)[:, None]

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """Ends of the band of `difference`, (G - 1,) each: all of a uniform quantity's curve is inside with 95 %."""
        lower, upper = (end / self.expected.count - self.expected.points for end in self.expected.band(1.0 - LEVEL))
        return lower, upper

    @property
    def mean(self) -> Tensor:
        """Mean PIT of each quantity, (Q,); 0.5 if calibrated, less where the draws lie too high."""
        return self.pit[self.known].mean(0)

    @property
    def spread(self) -> Tensor:
        """Variance of the PIT times 12, (Q,); 1 if calibrated, more where the draws are too narrow."""
        return 12.0 * self.pit[self.known].var(0)

    def to_dataframe(self) -> pd.DataFrame:
        """One line a quantity: quantity, p_value, adjusted, outside, mean and spread of the PIT."""
        import pandas as pd

        columns = ("p_value", "adjusted", "outside", "mean", "spread")
        frame = pd.DataFrame({name: getattr(self, name).cpu().numpy() for name in columns})
        frame.insert(0, "quantity", list(self.names))
        return frame

    def to_arviz(self) -> Any:
        """The PIT where ArviZ looks for it: `az.plot_ecdf_pit(result.to_arviz())` of ArviZ 1.x draws their ECDF.

        Group "prior_sbc", variable "pit" with one chain, a draw for each simulated row that has draws, and the quantities.
        ArviZ 0.x has no such function; its `plot_ecdf` takes the numbers: see `plots.calibration`, which does the same.
        """
        labels = Labels({"pit": (len(self.names),)}, len(self), {"pit": ["quantity"]}, {"quantity": self.names})
        known = self.pit[self.known]
        return gathered({"prior_sbc": labels.dataset({"pit": known[None]}, (CHAIN, DRAW), method=self.engine)})

    def __repr__(self) -> str:
        """How many quantities leave the band, the worst of them, and what is wrong with it."""
        count, total, order = int(self.outside.sum()), len(self.names), self.order.tolist()
        worst = order[0]
        head = f"{self.expected.count} simulated rows, {self.num_draws} draws each, {total} quantities"
        lines = [
            f"calibration of {self.engine} ({head})",
            f"  {count} of {total} leave the simultaneous 95 % band, {LEVEL * total:.2g} expected by chance",
            f"  smallest p-value {_short(self.p_value[worst])}, {_short(self.adjusted[worst])} among {total} (Holm): "
            f"{self.names[worst]}",
        ]
        lines += [f"  {self.names[index]}: {self._told(index)}" for index in order[: min(count, 3)]]
        if missing := len(self) - self.expected.count:
            lines.append(f"  WARNING: {missing} of {len(self)} simulated rows have no draws and are not counted")
        return "\n".join(lines)

    def _told(self, index: int) -> str:
        """What the mean and the spread of a PIT say, in units of their errors under uniformity."""
        mean, spread = float(self.mean[index]), float(self.spread[index])
        root = math.sqrt(self.expected.count)
        shift, wide = (mean - 0.5) * math.sqrt(12.0) * root, (spread - 1.0) / math.sqrt(0.8) * root
        words = []
        if abs(shift) > CLEAR:
            words.append("draws too low" if shift > 0.0 else "draws too high")
        # Draws that lie to one side narrow the PIT by themselves.
        if wide > CLEAR or (wide < -CLEAR and not words):
            words.append("draws too narrow" if wide > 0.0 else "draws too wide")
        return f"{', '.join(words) or 'another shape'} (mean PIT {mean:.3f} for 0.5, spread {spread:.3f} for 1)"


def _short(p_value: Tensor) -> str:
    return f"{float(p_value):.2g}" if float(p_value) >= SMALLEST else f"below {SMALLEST:g}"


def calibration(
    program: Program,
    *,
    num_simulated: int = 1000,
    num_draws: int = 100,
    method: Engine | None = None,
    like: Data | None = None,
    seed: Seed = 0,
    memory: int = BUDGET,
) -> Calibration:
    """Rank statistics of the guide, or of an engine's weighted particles, on rows simulated from the model.

    They judge the guide where the model's own data lie, which are not the real data, and say nothing of the model. A guide
    that is calibrated on average over x may be wrong for single x; a guide that fails is wrong.

    Args:
        program: a `VAE` or any `Program`.
        num_simulated: N, rows to simulate. A scale that is 10 % off is seen with 1,000, 30 % with 100.
        num_draws: L, draws of the guide, or particles of the engine, for each row.
        method: an engine such as `posterior.laplace`; None for the guide's draws as they are. `posterior.from_guide`
            weights the same draws.
        like: rows with the shapes to simulate and with whatever the model is conditioned on, repeated as needed; a `VAE`
            that reads no conditions needs none.
        seed: of everything.
        memory: byte budget of the densities.

    Returns:
        the PIT of each latent dimension and of the log joint, with p-values and a band.

    Raises:
        ValueError: fewer than two rows or draws, a program that does not fit or cannot be simulated.
        TypeError: `method` is no engine.
    """
    positive(num_simulated=num_simulated, num_draws=num_draws, memory=memory)
    for name, value in (("num_simulated", num_simulated), ("num_draws", num_draws)):
        if value < 2:
            raise ValueError(f"{name}={value} leaves no distribution to compare: give at least 2.")
    if method is not None and not isinstance(method, Engine):
        raise TypeError(f"method={method!r} is no engine: give None for the guide, or one such as pv.posterior.laplace.")
    shapes = program.template(num_simulated) if like is None else probe(as_rows(like, "like"), num_simulated)
    rows, exact = program.simulate(shapes, seed=derive(seed, SIMULATED))
    good, _ = program.usable_rows(rows)
    index = good.nonzero().flatten()
    if len(index) < 2:
        raise ValueError(f"{len(index)} of {num_simulated} simulated rows can be judged: the model draws what it refuses.")
    names = _names(program, take(rows, index[:1]), exact)
    pit = torch.full((num_simulated, len(names)), torch.nan, dtype=torch.float64, device=good.device)
    with judging(program.modules_found()):
        for block, part in enumerate(even_blocks(index, block_rows(num_draws, len(names) - 1))):
            truth = {name: exact[name][part] for name in exact}
            pit[part] = _pit(program, take(rows, part), truth, num_draws, method, derive(seed, DRAWN, block), memory)
    return Calibration(names, pit, num_draws, "guide" if method is None else f"{method.name}, weighted")


def _names(program: Program, row: Rows, exact: Values) -> tuple[str, ...]:
    """Of the unconstrained dimensions and of the log joint: z[2] where u is as z, else "simplex u0"."""
    found: list[str] = []
    for name, slot in program.layout(row).slots.items():
        shape = tuple(exact[name].shape[1:])
        if slot.shape != shape:
            found += [f"{name} u{i}" for i in range(slot.stop - slot.start)]
        else:
            places: Sequence[tuple[int, ...]] = list(itertools.product(*map(range, shape)))
            found += [f"{name}[{', '.join(map(str, place))}]" if place else name for place in places]
    return (*found, LOG_JOINT)


def _pit(
    program: Program, rows: Rows, truth: Values, num_draws: int, method: Engine | None, key: int, memory: int
) -> Tensor:
    """PIT of the true latents, each (n, ...), among L draws for each of n rows: (n, Q), float64."""
    if method is None:
        with seeded(key, rows[0].device):
            z, _ = program.sample(rows, num_draws)
        log_weights = torch.zeros(num_draws, len(rows[0]), dtype=torch.float64, device=rows[0].device)
    else:
        particles = method(program, rows, num_particles=num_draws, seed=key, memory=memory)
        z, log_weights = dict(particles.z), particles.log_weights.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    draws = _quantities(program, rows, z, memory)
    true = _quantities(program, rows, {name: value[None] for name, value in truth.items()}, memory)
    share = torch.softmax(log_weights, 0)[..., None]  # NaN where all weights are zero
    below, tied = ((share * compared).sum(0) for compared in (draws < true, draws == true))
    one = 1.0 / weights.ess(log_weights)[:, None]
    with seeded(derive(key, TIES), rows[0].device):
        inside = torch.rand(below.shape, dtype=torch.float64, device=below.device)
    return ((below + inside * (tied + one)) / (1.0 + one)).clamp(0.0, 1.0)


def _quantities(program: Program, rows: Rows, z: Values, memory: int) -> Tensor:
    """u and the log joint of latents (K, n, ...): (K, n, Q), float64; NaN counts as smaller than all numbers."""
    with torch.no_grad():
        u = program.log_joint(rows).flatten(z).double()
    log_joint = in_chunks(program, rows, z, LogJoint.of_sites, memory)
    return torch.cat([u, log_joint[..., None]], dim=-1).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
