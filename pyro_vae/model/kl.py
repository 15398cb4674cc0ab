"""KL(N(mu, Sigma) || a Normal with independent dimensions), registered with torch.

torch knows KL(q || p) of two multivariate Normals and of two independent ones, but not of one against the other, and Pyro's
`TraceMeanField_ELBO` then samples it without a word. With p = N(m, diag(s^2)) and Sigma = L L':

    KL = ( sum_j (Sigma_jj + (mu_j - m_j)^2) / s_j^2 - D + sum_j log s_j^2 - log |Sigma| ) / 2,

for p = N(0, I) the (tr Sigma + mu'mu - D - log |Sigma|) / 2 of the textbook.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl


@register_kl(MultivariateNormal, Independent)
def kl_multivariate_independent(q: MultivariateNormal, p: Independent[Normal]) -> Tensor:
    """KL(q || p) in nats, of q's batch shape.

    Raises:
        NotImplementedError: p is no Normal of independent dimensions; callers then sample the KL.
    """
    base = p.base_dist
    if not isinstance(base, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    factor = q._unbroadcasted_scale_tril
    variance = factor.square().sum(-1)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    squares = (variance + (q.loc - base.loc).square()) / base.variance
    return 0.5 * ((squares - 1.0 + base.variance.log()).sum(-1) - log_det)
