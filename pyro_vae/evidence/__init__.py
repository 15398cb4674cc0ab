"""log p(x), with honest errors: estimates from weighted particles, closed forms, and blocks of rows."""

from pyro_vae.evidence.blocks import log_evidence
from pyro_vae.evidence.closed_form import exact
from pyro_vae.evidence.estimate import Estimate

__all__ = ["Estimate", "exact", "log_evidence"]
