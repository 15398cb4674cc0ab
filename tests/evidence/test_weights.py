import arviz as az
import numpy as np
import pytest
import torch

from pyro_vae.evidence import weights


def generalised_pareto(k: float, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Log-weights whose weights are generalised Pareto with shape k, by the inverse of its distribution function."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log1p((u.pow(-k) - 1.0) / k)


def test_log_mean_exp_equals_the_logarithm_of_the_mean_and_survives_large_numbers() -> None:
    log_weights = torch.tensor([[0.0, -1000.0], [np.log(3.0), -1001.0]], dtype=torch.float64)
    expected = torch.tensor([np.log(2.0), -1000.0 + np.log((1.0 + np.exp(-1.0)) / 2.0)], dtype=torch.float64)
    torch.testing.assert_close(weights.log_mean_exp(log_weights), expected)


def test_standard_error_and_bias_of_a_lognormal_are_those_of_many_repetitions() -> None:
    """Weights exp(N(0, 0.5^2)): sd and mean of the estimator over 200,000 repetitions, K = 50."""
    repeats, count, sigma = 200_000, 50, 0.5
    log_weights = sigma * torch.randn(count, repeats, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    estimates = weights.log_mean_exp(log_weights)
    spread = estimates.std()
    # The relative error of a standard deviation of m normal draws is 1 / sqrt(2 m).
    assert abs(weights.standard_error(log_weights).mean() / spread - 1.0) < 4.0 / (2 * repeats) ** 0.5 + 0.03
    true_bias = estimates.mean() - sigma**2 / 2
    error = 4.0 * spread / repeats**0.5
    assert abs(weights.bias(log_weights).mean() - true_bias) < error
    assert weights.bias(log_weights).mean() < -2.0 * error  # the bias is resolved, so the test can fail


def test_ess_counts_equal_weights_and_single_ones() -> None:
    equal = torch.zeros(50, dtype=torch.float64)
    single = torch.full((50,), -torch.inf, dtype=torch.float64)
    single[7] = -3.0
    nothing = torch.full((50,), -torch.inf, dtype=torch.float64)
    three_to_one = torch.log(torch.tensor([3.0, 1.0] + [0.0] * 48, dtype=torch.float64))
    found = weights.ess(torch.stack([equal, single, nothing, three_to_one], dim=1))
    torch.testing.assert_close(found, torch.tensor([50.0, 1.0, 0.0, 16.0 / 10.0], dtype=torch.float64))


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_equals_arviz(k: float) -> None:
    # 3 sqrt(2,500) is whole: the tail is rounded up by us and ArviZ 0.x, down by ArviZ 1.x.
    log_weights = generalised_pareto(k, (2500, 5), seed=int(10 * k))
    ours = weights.pareto_k(log_weights)
    if hasattr(az, "psislw"):  # ArviZ 0.x: draws in the last dimension
        _, theirs = az.psislw(log_weights.T.numpy().copy())
    else:
        from arviz_stats.base import array_stats

        # ArviZ 1.x asks for log-likelihoods, whose negatives are the log-weights of leave-one-out.
        theirs = array_stats.psislw(-log_weights.T.numpy(), axis=-1)[1]
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=1e-6)


def test_pareto_k_finds_the_shape_it_was_given() -> None:
    """The posterior sd of k from M tail draws is about (1 + k) / sqrt(M); averaged over 200 columns."""
    for k in (0.3, 0.8):
        log_weights = generalised_pareto(k, (20_000, 200), seed=5)
        size = 3.0 * 20_000**0.5
        prior_pull = 10 / (size + 10) * abs(0.5 - k)
        assert abs(weights.pareto_k(log_weights).mean() - k) < 4.0 * (1.0 + k) / (size * 200) ** 0.5 + prior_pull + 0.02


def test_pareto_k_without_a_tail_or_without_draws() -> None:
    assert weights.pareto_k(torch.zeros(1000, 2, dtype=torch.float64)).tolist() == [-torch.inf] * 2
    assert weights.pareto_k(torch.zeros(20, 1, dtype=torch.float64)).isnan().all()


def test_threshold_is_the_published_one() -> None:
    assert weights.pareto_threshold(100) == pytest.approx(0.5)
    assert weights.pareto_threshold(100_000) == pytest.approx(0.7)


def test_one_particle_has_an_unknown_error() -> None:
    one = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    assert weights.standard_error(one).isinf().all()


@pytest.mark.parametrize("stratified", [False, True])
def test_equal_halves_lie_apart_as_a_normal_variable_does(*, stratified: bool) -> None:
    """|N(0, 1)| over 4,000 columns; in two strata, three nats apart, only the strata's own scatter counts."""
    generator = torch.Generator().manual_seed(8)
    log_weights = 0.4 * torch.randn(800, 4000, generator=generator, dtype=torch.float64)
    strata = (torch.arange(800) >= 300).long()[:, None].expand(-1, 4000)
    if stratified:
        log_weights = log_weights + 3.0 * strata
    apart = weights.halves(log_weights, strata if stratified else None)
    for threshold, share in ((1.0, 0.3173), (1.96, 0.05), (2.576, 0.01)):
        found = (apart > threshold).double().mean()
        assert abs(found - share) < 4.5 * (share * (1.0 - share) / 4000) ** 0.5 + 0.05 * share
    if stratified:  # without the strata the scatter between them would count as error, and nothing would be seen
        assert weights.halves(log_weights).mean() < 0.7 * apart.mean()


def test_halves_that_disagree_are_flagged_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(9)
    log_weights = 0.4 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    log_weights[1::2, 1] += 0.4  # ten standard errors of a half
    log_weights[::2, 2] -= 0.4
    apart = weights.halves(log_weights)
    assert apart[0] < 4.0
    assert (apart[1:] > 6.0).all()


def test_halves_without_weight_agree_or_are_infinitely_far_apart() -> None:
    log_weights = torch.full((40, 3), -torch.inf, dtype=torch.float64)
    log_weights[::2, 1] = 0.0
    log_weights[:, 2] = 0.0
    assert weights.halves(log_weights).tolist() == [0.0, torch.inf, 0.0]
