"""Stacking: the mixture of programs that gives some rows the highest log score.

Yao, Vehtari, Simpson & Gelman, 2018 (Bayesian Analysis 13, eq. 4): the weights w on the simplex that maximise

    l(w) = (1/N) sum_i log sum_m w_m p_m(x_i).

l is concave, and EM for the weights of a mixture climbs it: w_m <- w_m g_m with
g_m = (1/N) sum_i p_m(x_i) / sum_k w_k p_k(x_i). As l(w*) - l(w) <= max_m g_m - 1 for the best w*, it is known how far there
is to go.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 1e-9
"""Nats a row that the weights may fall short of the best."""

STEPS = 20_000
"""Steps at most; they are cheap, and programs that hardly differ need many."""


def stacking_weights(log_p: Tensor) -> Tensor:
    """Weights of M programs, (M,) float64, non-negative and of sum 1.

    Args:
        log_p: log p_m(x_i) in nats, (N, M), without NaN. A row to which all programs give no probability says nothing.
    """
    values = log_p.double()[(log_p > -torch.inf).any(-1)]
    weights = torch.full_like(log_p[0], 1.0 / log_p.shape[1], dtype=torch.float64)
    if len(values) == 0:
        return weights
    p = (values - values.amax(-1, keepdim=True)).exp()
    for _ in range(STEPS):
        gain = (p / (p @ weights)[:, None]).mean(0)
        if bool(gain.max() - 1.0 < CLOSE):
            break
        weights = weights * gain
    return weights / weights.sum()
