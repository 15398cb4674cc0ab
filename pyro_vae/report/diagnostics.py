"""Diagnostics of a fitted program: each takes a program and rows, and returns a result that prints itself.

* `inference_gap`    how far the ELBO is below log p(x), and whether the family or the encoder is to blame
* `latent_usage`     which latent dimensions carry something, and q(z) against p(z)
"""

from pyro_vae.report.aggregate import Aggregate
from pyro_vae.report.gap import InferenceGap, inference_gap
from pyro_vae.report.gaussians import FactorisedNormal, FullNormal, Gaussian
from pyro_vae.report.latents import LatentUsage, latent_usage
from pyro_vae.report.measured import Measured

__all__ = [
    "Aggregate",
    "FactorisedNormal",
    "FullNormal",
    "Gaussian",
    "InferenceGap",
    "LatentUsage",
    "Measured",
    "inference_gap",
    "latent_usage",
]
