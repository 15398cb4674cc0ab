"""What the package promises as a whole: SVI finds the exact maximum, and MNIST trains as it should."""

import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_vae as pv


def ppca_maximum(x: torch.Tensor, latent_dim: int) -> float:
    """The largest mean log-likelihood of probabilistic PCA, variances divided by n (Tipping & Bishop 1999, eq. 8)."""
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    dim = len(values)
    noise = values[latent_dim:].mean()
    log_det = values[:latent_dim].log().sum() + (dim - latent_dim) * noise.log()
    return float(-0.5 * (dim * math.log(2.0 * math.pi) + log_det + dim))


def test_the_formula_of_the_maximum_is_scikit_learns_up_to_n_over_n_minus_one() -> None:
    x = pv.data.load("digits").x[:, 2:20].double()
    theirs = PCA(n_components=5).fit(x.numpy()).score(x.numpy())
    n, dim = x.shape
    # With variances c = n / (n - 1) times as large, log det grows by d log c and the squares shrink by c.
    ours = ppca_maximum(x, 5) - 0.5 * (dim * math.log(n / (n - 1)) + dim * ((n - 1) / n - 1.0))
    assert ours == pytest.approx(theirs, abs=1e-8)


def test_svi_on_a_linear_decoder_reaches_the_maximum_of_ppca() -> None:
    x = pv.data.dequantise(pv.data.load("digits").x, 17, seed=0)[:, 17:41] * 4.0
    best = ppca_maximum(x.double(), 3)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(3, 24), scale=pv.likelihoods.Learned()),
        guide=pv.guides.FullNormal(torch.nn.Identity(), latent_dim=3, features=24),
    )
    epochs = 120
    pv.fit(vae, x, epochs=epochs, batch_size=200, lr=2e-2, schedule=lambda o: CosineAnnealingLR(o, epochs), progress=False)
    reached = pv.log_evidence(vae, x, method=pv.evidence.exact)
    assert best - 0.05 < reached.mean <= best + reached.mean_standard_error
    # The guide is the exact posterior there, so the guide's estimate is the same to its own error.
    guide = pv.log_evidence(vae, x, method=pv.posterior.from_guide, num_particles=200)
    error = 4.0 * guide.mean_standard_error + abs(float(guide.bias.mean())) * 2.0 + 1e-4
    assert abs(guide.mean - reached.mean) < error


@pytest.mark.slow
def test_mnist_passes_400_nats_in_25_epochs(mnist_root: object) -> None:
    data = pv.data.load(str(mnist_root))
    splits = data.split(valid=1 / 6, seed=0)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(10, 784, hidden=(200, 200)), scale=pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(784, hidden=(200, 200)), latent_dim=10),
    )
    with pytest.warns(UserWarning, match="columns of x are constant"):
        history = pv.fit(vae, splits.train.x, splits.valid.x, epochs=25, batch_size=128, lr=1e-3, progress=False)
    assert history.elbo[-1] > 400.0
    assert history.valid_elbo[-1] > 400.0
