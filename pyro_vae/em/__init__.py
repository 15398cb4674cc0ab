"""EM: exact where the decoder is linear, `ppca` and `factor_analysis`; by weighted particles for any other, `fit`."""

from pyro_vae.em.exact import factor_analysis, ppca
from pyro_vae.em.monte_carlo import fit
from pyro_vae.em.record import EMHistory

__all__ = ["EMHistory", "factor_analysis", "fit", "ppca"]
