"""log p(x), with honest errors: weighted particles, closed forms, quadrature, the cascade, two-sided bounds."""

from pyro_vae.evidence.blocks import log_evidence
from pyro_vae.evidence.bounds import Sandwich, sandwich
from pyro_vae.evidence.closed_form import exact
from pyro_vae.evidence.estimate import Estimate

__all__ = ["Estimate", "Sandwich", "exact", "log_evidence", "sandwich"]
