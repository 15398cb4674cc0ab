"""pyro_vae: variational auto-encoders as probabilistic programs.

A VAE is three distributions, written as Pyro programs: a prior p(z), a likelihood p(x | z) and a guide q(z | x). Whoever
wants to know z given x asks for weighted particles; log p(x) and its error are functions of those particles.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "data": "pyro_vae.data",
    "diagnostics": "pyro_vae.report.diagnostics",
    "em": "pyro_vae.em",
    "evidence": "pyro_vae.evidence",
    "guides": "pyro_vae.model.guides",
    "likelihoods": "pyro_vae.model.likelihoods",
    "nets": "pyro_vae.model.nets",
    "objectives": "pyro_vae.learning.objectives",
    "plots": "pyro_vae.report.plots",
    "posterior": "pyro_vae.posterior",
    "priors": "pyro_vae.model.priors",
}
_NAMES = {
    "Comparison": "pyro_vae.report.comparison",
    "Estimate": "pyro_vae.evidence.estimate",
    "History": "pyro_vae.learning.history",
    "Particles": "pyro_vae.posterior.particles",
    "Program": "pyro_vae.program",
    "VAE": "pyro_vae.model.vae",
    "check": "pyro_vae.program",
    "compare": "pyro_vae.report.comparing",
    "fit": "pyro_vae.learning.fit",
    "load": "pyro_vae.model.vae",
    "log_evidence": "pyro_vae.evidence.blocks",
    "to_arviz": "pyro_vae.report.inference_data",
}
__all__ = ["__version__", *sorted([*_MODULES, *_NAMES])]

if TYPE_CHECKING:
    from pyro_vae import data as data
    from pyro_vae import em as em
    from pyro_vae import evidence as evidence
    from pyro_vae import posterior as posterior
    from pyro_vae.evidence.blocks import log_evidence as log_evidence
    from pyro_vae.evidence.estimate import Estimate as Estimate
    from pyro_vae.learning import objectives as objectives
    from pyro_vae.learning.fit import fit as fit
    from pyro_vae.learning.history import History as History
    from pyro_vae.model import guides as guides
    from pyro_vae.model import likelihoods as likelihoods
    from pyro_vae.model import nets as nets
    from pyro_vae.model import priors as priors
    from pyro_vae.model.vae import VAE as VAE
    from pyro_vae.model.vae import load as load
    from pyro_vae.posterior.particles import Particles as Particles
    from pyro_vae.program import Program as Program
    from pyro_vae.program import check as check
    from pyro_vae.report import diagnostics as diagnostics
    from pyro_vae.report import plots as plots
    from pyro_vae.report.comparing import compare as compare
    from pyro_vae.report.comparison import Comparison as Comparison
    from pyro_vae.report.inference_data import to_arviz as to_arviz


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import pyro_vae` and the command line start fast."""
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
