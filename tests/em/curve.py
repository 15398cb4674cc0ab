"""A bent line in three dimensions, and a small network whose log p(x) is a quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv


def line_data(size: int, seed: int = 0) -> Tensor:
    """Rows around a bent line in three dimensions, float64."""
    generator = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (1, 3))
    return torch.cat([z, 0.7 * z.square() - 1.0, torch.sin(2.0 * z)], -1) + 0.4 * noise


class Curve:
    """z ~ N(0, 1), x ~ N(f(z), s^2 I) with a small network f: log p(x) by quadrature over z."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.encoder = nn.Linear(3, 2).double()
        self.log_scale = nn.Parameter(torch.tensor(-0.3, dtype=torch.float64))
        self.program = pv.Program(self.model, self.guide)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, log_scale = self.encoder(x).unsqueeze(-1).unbind(-2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x) of each row by the trapezium rule on a fine grid, which is exact to rounding for such integrands."""
        grid = torch.linspace(-9.0, 9.0, 6001, dtype=torch.float64)
        with torch.no_grad():
            loc, s = self.decoder(grid[:, None]), self.log_scale.exp()
            square = ((x[None] - loc[:, None]) / s).square().sum(-1)
            log_f = -0.5 * (square + grid[:, None].square()) - 3 * s.log() - 2.0 * math.log(2.0 * math.pi)
        return log_f.logsumexp(0) + (grid[1] - grid[0]).log()

    def state(self) -> dict[str, Tensor]:
        modules = (("d", self.decoder), ("e", self.encoder))
        named = {f"{at}.{name}": value for at, module in modules for name, value in module.state_dict().items()}
        named["log_scale"] = self.log_scale
        return {name: value.detach().clone() for name, value in named.items()}
