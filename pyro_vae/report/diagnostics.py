"""Diagnostics of a fitted program: each takes a program and rows, and returns a result that prints itself.

* `inference_gap`    how far the ELBO is below log p(x), and whether the family or the encoder is to blame
* `latent_usage`     which latent dimensions carry something, and q(z) against p(z)
* `convergence`      how the estimate of log p(x) grows with the number of particles
* `rate_distortion`  how many nats a code of x takes, and what is lost, from one annealed run
* `calibration`      whether draws of the guide, or an engine's, are posterior draws, on data simulated from the model
* `chain_mixing`     R-hat and effective draws of Hamiltonian chains, row by row
* `posterior_predictive`   whether the model draws data like x from the latents of x
"""

from pyro_vae.report.aggregate import Aggregate
from pyro_vae.report.compression import RateDistortion, rate_distortion
from pyro_vae.report.gap import InferenceGap, inference_gap
from pyro_vae.report.gaussians import FactorisedNormal, FullNormal, Gaussian
from pyro_vae.report.growth import Convergence, Curve, convergence
from pyro_vae.report.latents import LatentUsage, latent_usage
from pyro_vae.report.measured import Measured
from pyro_vae.report.mixing import Mixing, chain_mixing
from pyro_vae.report.ranks import Calibration, calibration
from pyro_vae.report.replicates import PosteriorPredictive, posterior_predictive

__all__ = [
    "Aggregate",
    "Calibration",
    "Convergence",
    "Curve",
    "FactorisedNormal",
    "FullNormal",
    "Gaussian",
    "InferenceGap",
    "LatentUsage",
    "Measured",
    "Mixing",
    "PosteriorPredictive",
    "RateDistortion",
    "calibration",
    "chain_mixing",
    "convergence",
    "inference_gap",
    "latent_usage",
    "posterior_predictive",
    "rate_distortion",
]
