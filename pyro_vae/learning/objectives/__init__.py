"""Objectives: Pyro ELBO objects that know each row's terms, the losses of `pyro.infer.SVI` and of `pv.fit`.

For row x let z_1 .. z_K ~ q(z | x) and log w_k = log p(x, z_k) - log q(z_k | x), in nats.

| object | what it maximises | gradient for the guide | needs a reparametrised guide |
|---|---|---|---|
| `ELBO` | E log w, KL exact or sampled, beta, free bits | by reparametrisation | yes |
| `IWAE`, `Renyi` | log (1/K) sum_k w_k; its relatives of order alpha | by reparametrisation | yes |
| `STL`, `DReG` | E log w; the bound of `IWAE` | along the path of z alone: less noise | yes |
| `ReweightedWakeSleep` | the bound of `IWAE` for the model, KL(p || q) for the guide | of log q alone | no |
| `ScoreFunction` | E log w | REINFORCE: unbiased, and very noisy | no |

The loss is minus the bound, summed over the rows with Pyro's scales; masks are honoured. Weights are taken row by row
before anything is summed or scaled: an exponent with the sum of a batch, or with the scale of a plate, has no meaning.
"""

from pyro_vae.learning.objectives.elbo import ELBO
from pyro_vae.learning.objectives.kl import KL, analytic_kl, sampled_kl
from pyro_vae.learning.objectives.multisample import IWAE, Renyi
from pyro_vae.learning.objectives.objective import Objective, sites_of
from pyro_vae.learning.objectives.paths import STL, DReG
from pyro_vae.learning.objectives.schedules import Schedule, cyclic, warm_up
from pyro_vae.learning.objectives.score import Baseline, ScoreFunction, leave_one_out, no_baseline
from pyro_vae.learning.objectives.wake_sleep import ReweightedWakeSleep

__all__ = [
    "ELBO",
    "IWAE",
    "KL",
    "STL",
    "Baseline",
    "DReG",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "Schedule",
    "ScoreFunction",
    "analytic_kl",
    "cyclic",
    "leave_one_out",
    "no_baseline",
    "sampled_kl",
    "sites_of",
    "warm_up",
]
