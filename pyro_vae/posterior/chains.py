"""Hamiltonian chains on p(z | x), for all rows at once: posterior draws whose convergence can be judged.

Several chains of each row start further apart than the posterior is wide, and go through the transitions of `hmc` at
beta = 1. Warm-up tunes the step size eps of each row to an acceptance of 0.8 and freezes it: the draws that are kept come
from one kernel that leaves p(z | x) as it is (Neal 2011, arXiv:1206.1901, sec. 4.2 and 4.3).

Where the start's shape whitens the posterior well it is near N(0, I), in which a leapfrog path of length pi/2 leads to an
independent point and one of length 2 pi back to its beginning, whatever is accepted. So eps is never above pi / 2L, and
each transition takes eps times a number between 0.8 and 1.2, drawn without regard to where the chains are.

Chains move within a mode and seldom between two. Where modes are apart, chains that started in different ones disagree,
which R-hat shows (`diagnostics.chain_mixing`); modes in which no chain started it cannot show. Weighted particles
(`laplace`) weigh modes rightly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.memory import BUDGET, block_rows
from pyro_vae.parameters import judging
from pyro_vae.posterior.hmc import Bridge, Points, transition
from pyro_vae.posterior.starts import Begin, Start, at_modes
from pyro_vae.program import Program
from pyro_vae.rows import Data, Rows, as_rows, even_blocks, positive, take
from pyro_vae.seeds import Seed, seeded

TARGET_ACCEPTANCE, RATE = 0.8, 0.5
"""What warm-up aims at, and how much of the difference it adds to log eps after a transition."""

APART = math.sqrt(3.0)
"""Deviations of the noise that is added to the start's draws: the width of draws that are like the posterior doubles."""

SHORTEST = 1e-3
"""The least eps, relative to the largest: a chain that cannot move must not bring the others of its row to a halt."""

JITTER = 0.2
"""eps varies by so much, relative, from one transition to the next."""

STARTED, MOVED = 0, 1
"""Sub-streams of a block's seed."""


@dataclass(frozen=True, repr=False)
class Chains:
    """C chains of S draws for each of N rows.

    Attributes:
        z: latents by site name, each (C, S, N, *event_shape), in their own support.
        log_joint: log p(x, u) of the unconstrained vector u, Jacobian included, (C, S, N), float64, in nats.
        acceptance: probability with which the transition to a draw was accepted, (C, S, N), float64; the mean of those
            that thinning joins.
        step_size: eps of each row in whitened coordinates, (N,), float64.
        num_leapfrog: L.
        evaluations: passes through the decoder that a row cost, forwards or backwards, (N,), integers.
    """

    z: Mapping[str, Tensor]
    log_joint: Tensor
    acceptance: Tensor
    step_size: Tensor
    num_leapfrog: int
    evaluations: Tensor

    def __repr__(self) -> str:
        """Sizes, latents and how often a move was accepted."""
        chains, draws, rows = self.acceptance.shape
        latents = ", ".join(f"{name} {tuple(value.shape[3:])}" for name, value in self.z.items())
        accepted = self.acceptance.mean((0, 1))
        return (
            f"Chains({chains} of {draws} draws for each of {rows} rows; {latents}; "
            f"acceptance {float(accepted.min()):.2f} to {float(accepted.max()):.2f})"
        )

    @classmethod
    def cat(cls, parts: Sequence[Chains]) -> Chains:
        """One object of all rows of `parts`, in order."""
        return cls(
            z={name: torch.cat([part.z[name] for part in parts], dim=2) for name in parts[0].z},
            log_joint=torch.cat([part.log_joint for part in parts], dim=2),
            acceptance=torch.cat([part.acceptance for part in parts], dim=2),
            step_size=torch.cat([part.step_size for part in parts]),
            num_leapfrog=parts[0].num_leapfrog,
            evaluations=torch.cat([part.evaluations for part in parts]),
        )


@dataclass(frozen=True)
class Hamiltonian:
    """Chains by Hamiltonian Monte Carlo, with settings; `posterior.hamiltonian` is one with defaults.

    Attributes:
        start: where chains begin, `at_modes`, `at_guide` or `at_prior`; its shape whitens the coordinates.
        num_leapfrog: L, leapfrog steps of a transition.
        warm_up: transitions that tune the step sizes, and are not kept.
        thin: of so many transitions the last is kept.
    """

    start: Begin = at_modes
    num_leapfrog: int = 4
    warm_up: int = 200
    thin: int = 1

    def __call__(
        self,
        program: Program,
        x: Data,
        *,
        num_chains: int = 4,
        num_draws: int = 500,
        seed: Seed = 0,
        memory: int = BUDGET,
    ) -> Chains:
        """Draws of p(z | x) for each row.

        Args:
            program: model and guide.
            x: rows, (N, ...), or a tuple of tensors with N rows each.
            num_chains: C.
            num_draws: S, kept of each chain.
            seed: of everything.
            memory: byte budget of the evaluations, besides the draws themselves.

        Raises:
            ValueError: a number below one, a program that does not fit.
        """
        positive(num_chains=num_chains, num_draws=num_draws, memory=memory)
        positive(num_leapfrog=self.num_leapfrog, warm_up=self.warm_up, thin=self.thin)
        rows = as_rows(x)
        everything = torch.arange(len(rows[0]), device=rows[0].device)
        with judging(program.modules_found()):
            most = block_rows(num_chains, program.log_joint(take(rows, slice(1))).dim)
            parts = []
            for block, index in enumerate(even_blocks(everything, most)):
                some = take(rows, index)
                with seeded(seed, index.device, block, STARTED):
                    start = self.start(program, some, memory)
                with seeded(seed, index.device, block, MOVED):
                    parts.append(self._run(_Walk(program, some, start, num_chains, self.num_leapfrog, memory), num_draws))
        return Chains.cat(parts)

    def _run(self, walk: _Walk, num_draws: int) -> Chains:
        """Warm-up, then the draws that are kept, of one block of rows; ambient generator."""
        walk.warm_up(self.warm_up)
        kept, log_joint, acceptance = [], [], []
        for _ in range(num_draws):
            accepted = torch.stack([walk.move() for _ in range(self.thin)]).mean(0)
            kept.append(walk.latents())
            log_joint.append(walk.points.log_p)
            acceptance.append(accepted)
        passes = 2 * len(walk.points.log_p) * (self.num_leapfrog * (self.warm_up + num_draws * self.thin) + 1)
        return Chains(
            z={name: torch.stack([z[name] for z in kept], dim=1) for name in kept[0]},
            log_joint=torch.stack(log_joint, dim=1),
            acceptance=torch.stack(acceptance, dim=1),
            step_size=walk.step,
            num_leapfrog=self.num_leapfrog,
            evaluations=walk.start.cost + passes,
        )


hamiltonian = Hamiltonian()


class _Walk:
    """C chains of some rows on their way; all draws by the ambient generator.

    Attributes:
        points: where the chains are.
        step: eps of each row, (n,).
    """

    def __init__(self, program: Program, rows: Rows, start: Start, num_chains: int, num_leapfrog: int, memory: int) -> None:
        self.start, self.num_leapfrog, self.log_joint = start, num_leapfrog, program.log_joint(rows)
        u = start.draw(num_chains)
        noise = torch.randn(u.shape, dtype=torch.float64, device=u.device)
        # More than the start's own spread: chains that agree have then forgotten where they began.
        u = u + APART * start.shape.colour(noise).to(u.dtype)
        self.bridge = Bridge(program, rows, lambda _: _flat, u, memory)
        self.points: Points = self.bridge(u)
        self.longest = 0.5 * math.pi / num_leapfrog
        first = min(0.5 * u.shape[-1] ** -0.25, self.longest)
        self.step = torch.full((u.shape[1],), first, dtype=torch.float64, device=u.device)

    def move(self) -> Tensor:
        """One transition of every chain: the probabilities of acceptance, (C, n)."""
        jitter = 1.0 + JITTER * (2.0 * torch.rand_like(self.step) - 1.0)
        self.points, accepted = transition(
            self.bridge, self.points, 1.0, self.step * jitter, self.start.shape, self.num_leapfrog
        )
        return accepted

    def warm_up(self, num_transitions: int) -> None:
        """Tune the step sizes; those that stay are geometric means over the second half.

        In the first half the chain that does worst decides: one that began where the density is steep would else never
        leave, and the others, which have arrived, make up for it in the mean.
        """
        total, count = torch.zeros_like(self.step), 0
        for i in range(num_transitions):
            first, accepted = 2 * i < num_transitions - 1, self.move()
            accepted = accepted.amin(0) if first else accepted.mean(0)
            step = self.step * torch.exp(RATE * (accepted - TARGET_ACCEPTANCE))
            self.step = step.clamp(SHORTEST * self.longest, self.longest)
            if not first:
                total, count = total + self.step.log(), count + 1
        self.step = torch.exp(total / count)

    def latents(self) -> dict[str, Tensor]:
        """The named latents where the chains are, each (C, n, *event_shape)."""
        with torch.no_grad():
            return self.log_joint.unflatten(self.points.u)


def _flat(u: Tensor) -> Tensor:
    """The density that the bridge leaves behind at beta = 1."""
    return 0.0 * u.double().sum(-1)
