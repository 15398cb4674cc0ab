"""An unbiased estimate of an upper bound of log p(x), from independent estimates of p(x): coupled Metropolis chains.

Let Z-hat be a positive unbiased estimate of Z = p(x). By Jensen, log Z lies between two expectations of log Z-hat,

    E[log Z-hat]  <=  log Z  <=  E[Z-hat log Z-hat] / Z,

the second under the density of Z-hat times Z-hat / Z. That is the stationary distribution of the independence Metropolis
chain that proposes fresh Z-hat' and accepts with probability min(1, Z-hat' / Z-hat) (Andrieu, Doucet & Holenstein 2010).
Two such chains, one a step behind the other, that share proposals and uniform numbers, meet for good as soon as both
accept; the corrected average over the first of them is unbiased for the stationary mean although no chain has converged
(Jacob, O'Leary & Atchade 2020, arXiv:1708.03625; for such chains Middleton, Deligiannidis, Doucet & Jacob 2019,
arXiv:1902.01781).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coupled:
    """What coupled chains give: an unbiased value of each replicate, (R, N), and whether its chains have met, boolean."""

    value: Tensor
    met: Tensor


def coupled(log_z: Tensor, log_uniform: Tensor, steps: int) -> Coupled:
    """Unbiased estimates of E[Z-hat log Z-hat] / Z: H_{1:m} of Jacob et al., eq. 2.1, with m = `steps`.

    Args:
        log_z: log Z-hat of independent, identically distributed runs, (T, R, N): T > m for each of R replicates.
        log_uniform: logarithms of uniform numbers, (T, R, N).
        steps: m; the leading chain is averaged over its steps 1 .. m and corrected until the chains meet. To draw more runs
            for chains that have not met leaves m as it is, and the estimate unbiased.
    """
    lead, lag = log_z[0], log_z[1]  # the lagging chain begins at what is first proposed to the leading one
    total = torch.zeros_like(lead)
    met = torch.zeros_like(lead, dtype=torch.bool)
    for t in range(1, len(log_z)):
        proposal = log_z[t]
        lead = torch.where(log_uniform[t] < proposal - lead, proposal, lead)
        if t > 1:
            lag = torch.where(log_uniform[t] < proposal - lag, proposal, lag)
        met = met | (lead == lag)
        if t <= steps:
            total = total + lead / steps
        total = total + torch.where(met, 0.0, min(1.0, (t - 1) / steps) * (lead - lag))
    return Coupled(total, met)
