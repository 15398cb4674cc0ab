"""Figures: each function draws on one Axes and returns it, takes `ax=`, and names its units.

Colours are Okabe & Ito's (2008), which colour-blind readers can tell apart; what they stand for is told by hatches, dashes,
markers or words as well.
"""

from pyro_vae.report.plots.bounds import inference_gap, sandwich
from pyro_vae.report.plots.checks import calibration, predictive_check
from pyro_vae.report.plots.comparison import comparison
from pyro_vae.report.plots.curves import convergence, learning_curve, rate_distortion
from pyro_vae.report.plots.decoded import manifold, samples, traversals
from pyro_vae.report.plots.figure import save
from pyro_vae.report.plots.histograms import pareto_k
from pyro_vae.report.plots.latents import latent_space, latent_usage
from pyro_vae.report.plots.pictures import images, reconstructions
from pyro_vae.report.plots.seconds import nats_against_seconds

__all__ = [
    "calibration",
    "comparison",
    "convergence",
    "images",
    "inference_gap",
    "latent_space",
    "latent_usage",
    "learning_curve",
    "manifold",
    "nats_against_seconds",
    "pareto_k",
    "predictive_check",
    "rate_distortion",
    "reconstructions",
    "samples",
    "sandwich",
    "save",
    "traversals",
]
