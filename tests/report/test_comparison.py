"""`pv.compare`: paired differences against closed forms, ranking, weights, refusals, tables."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian, kl_normal
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table
from scipy.optimize import minimize_scalar
from torch import Tensor

import pyro_vae as pv
from pyro_vae.evidence.blocks import INTERRUPTED
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.report import plots
from pyro_vae.report.comparable import remarks_on
from pyro_vae.report.comparison import Comparison
from pyro_vae.report.difference import Difference
from pyro_vae.report.stacking import stacking_weights
from pyro_vae.report.tables import text_of

INF, NAN = math.inf, math.nan
EXACT = pv.evidence.exact


@pytest.fixture
def ax() -> Iterator[Axes]:
    yield plt.subplots()[1]
    plt.close("all")


def moved() -> tuple[LinearGaussian, LinearGaussian, LinearGaussian]:
    """The source of the data, and two models that are wrong in different ways."""
    source, shifted, wide = (LinearGaussian() for _ in range(3))
    shifted.bias = shifted.bias + torch.linspace(0.0, 0.5, 6, dtype=torch.float64)
    wide.scale = wide.scale * torch.linspace(0.8, 1.6, 6, dtype=torch.float64)
    precision = wide.weight.T / wide.scale.square()
    wide.covariance = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + precision @ wide.weight)
    wide.gain = wide.covariance @ precision
    return source, shifted, wide


def estimate_of(log_p: list[float], error: float = 0.1, reasons: dict[int, str] | None = None) -> Estimate:
    values = torch.tensor(log_p, dtype=torch.float64)
    told = tuple((reasons or {}).get(i, "" if value == value else "nothing came") for i, value in enumerate(log_p))
    estimate = Estimate.known(values, torch.full_like(values, error), "test", 1)
    return Estimate(**{**vars(estimate), "reasons": told})


def comparison_of(**log_p: list[float]) -> Comparison:
    return Comparison({name: estimate_of(values) for name, values in log_p.items()})


# Against closed forms


def test_exact_values_give_the_differences_of_the_closed_forms() -> None:
    source, shifted, wide = moved()
    x = source.draw(300)
    programs = {"wide": wide.program(), "source": source.program(), "shifted": shifted.program()}
    found = pv.compare(programs, x, method=EXACT)
    truth = source.log_p(x) - shifted.log_p(x)
    assert truth.mean() > 0.1
    difference = found.difference("source", "shifted")
    torch.testing.assert_close(difference.values, truth, rtol=0.0, atol=1e-9)
    assert difference.mean == pytest.approx(float(truth.mean()), abs=1e-9)
    assert difference.data_standard_error == pytest.approx(float(truth.std()) / 300**0.5, rel=1e-8)
    assert difference.num_paired == 300
    # Paired: far below the error that two separate means would have.
    apart = math.hypot(*(found.estimates[name].data_standard_error for name in ("source", "shifted")))
    assert difference.data_standard_error < 0.5 * apart
    # The other way round it has the other sign and the same errors.
    back = found.difference("shifted", "source")
    assert back.mean == -difference.mean
    assert back.data_standard_error == difference.data_standard_error
    assert found.best == "source"
    means = {name: float(known.log_p(x).mean()) for name, known in zip(programs, (wide, source, shifted), strict=True)}
    assert found.ranking == tuple(sorted(means, key=means.__getitem__, reverse=True))


def test_the_cascade_is_within_its_monte_carlo_errors() -> None:
    source, shifted, _ = moved()
    x = source.draw(200)
    found = pv.compare({"source": source.program(1.3, 0.2), "shifted": shifted.program(1.2)}, x, seed=3)
    difference = found.difference("source", "shifted")
    truth = source.log_p(x) - shifted.log_p(x)
    assert abs(difference.mean - float(truth.mean())) < 4.5 * difference.mean_standard_error
    assert 0.0 < difference.mean_standard_error < 0.05
    scaled = (difference.values - truth) / difference.standard_errors
    # Mean square of 200 standardised errors: 1, with a standard error of sqrt(2 / 200).
    assert abs(float(scaled.square().mean()) - 1.0) < 4.5 * 0.1
    parts = [found.estimates[name].standard_error for name in ("source", "shifted")]
    torch.testing.assert_close(difference.standard_errors, (parts[0] ** 2 + parts[1] ** 2).sqrt())
    assert difference.mean_standard_error == pytest.approx(float(difference.standard_errors.square().sum().sqrt()) / 200)


def test_programs_draw_independently_and_seeds_repeat() -> None:
    known = LinearGaussian()
    x = known.draw(1000)
    same = {"a": known.program(1.3), "b": known.program(1.3)}
    first, again, other = (
        pv.compare(same, x, method=pv.posterior.from_guide, num_particles=100, seed=seed) for seed in (5, 5, 6)
    )
    errors = [first.estimates[name].log_p - known.log_p(x) for name in "ab"]
    assert abs(float(torch.corrcoef(torch.stack(errors))[0, 1])) < 4.5 / 1000**0.5
    assert torch.equal(first.log_p, again.log_p)
    assert not torch.equal(first.log_p, other.log_p)


def test_the_data_error_covers_the_expected_difference() -> None:
    """E[log p_a - log p_b] over x ~ p_a is KL(p_a || p_b). 400 samples of 200 rows; unpaired errors would cover all."""
    source, shifted, _ = moved()
    x = source.draw(80_000)
    zero = torch.zeros(80_000, dtype=torch.float64)
    one, other = (Estimate.known(known.log_p(x), zero, "exact", 1) for known in (source, shifted))
    whole = Difference.of("a", one, "b", other)
    p, q = source.marginal(), shifted.marginal()
    truth = float(kl_normal(p.mean[None], p.scale_tril, q.mean[None], q.scale_tril))
    covered, unpaired = 0, 0
    for start in range(0, 80_000, 200):
        rows = torch.zeros(80_000, dtype=torch.bool)
        rows[start : start + 200] = True
        part = whole.where(rows)
        index = rows.nonzero().flatten()
        wide = math.hypot(one.take(index).data_standard_error, other.take(index).data_standard_error)
        covered += abs(part.mean - truth) < 1.96 * part.data_standard_error
        unpaired += abs(part.mean - truth) < 1.96 * wide
    assert abs(covered / 400 - 0.95) < 4.5 * (0.95 * 0.05 / 400) ** 0.5
    assert unpaired == 400


# Ranking, and rows without a number


@pytest.mark.parametrize(
    ("log_p", "ranking"),
    [
        ({"a": [-3.0, -1.0], "b": [-1.0, -2.0], "c": [-5.0, -5.0]}, ("b", "a", "c")),
        ({"a": [0.0, -INF], "b": [-90.0, -80.0]}, ("b", "a")),
        ({"a": [-INF, -INF, 5.0], "b": [-INF, -9.0, -9.0], "c": [-8.0, -INF, -9.0]}, ("c", "b", "a")),
        ({"a": [NAN, NAN], "b": [-INF, -INF], "c": [-1.0, -1.0]}, ("c", "b", "a")),
        # Only the rows that both have count: on these b is better, however good the other row of a is.
        ({"a": [100.0, -2.0], "b": [NAN, -1.0]}, ("b", "a")),
        ({"a": [NAN, NAN], "b": [NAN, NAN]}, ("a", "b")),
    ],
)
def test_ranking(log_p: dict[str, list[float]], ranking: tuple[str, ...]) -> None:
    found = comparison_of(**log_p)
    assert found.ranking == ranking
    frame = found.to_dataframe()
    assert tuple(frame["name"]) == ranking
    assert frame["rank"].tolist() == list(range(1, len(log_p) + 1))
    assert str(found)


def test_rows_that_cannot_be_paired_are_counted_and_told() -> None:
    one = estimate_of([-1.0, -INF, NAN, -2.0, -INF, -3.0], reasons={3: "k-hat above 0.70"})
    other = estimate_of([-2.0, -1.0, -1.0, -2.5, -INF, NAN])
    difference = Difference.of("one", one, "other", other)
    assert (difference.num_paired, difference.num_impossible, difference.num_missing) == (2, 2, 2)
    assert difference.num_unreliable == 1
    assert difference.mean == pytest.approx(0.75)
    assert difference.mean_standard_error == pytest.approx(0.1 * math.sqrt(4.0) / 2.0)
    assert difference.data_standard_error == pytest.approx(np.std([1.0, 0.5], ddof=1) / 2**0.5)
    for told in ("1 of these rows are not reliable", "2 more rows have no probability", "2 more rows have no number"):
        assert told in str(difference)
    found = Comparison({"one": one, "other": other})
    assert found.common.tolist() == [True, True, False, True, True, False]
    notes = "\n".join(found.notes)
    assert "'one' has no number for 1 of 6 rows, first row 2 (nothing came): they are in no mean" in notes
    assert "'one' gives no probability to 2 of 6 rows, first row 1: its mean is -inf; on the 2 rows" in notes
    assert "'one' is not reliable on 1 of 6 rows, first row 3 (k-hat above 0.70); on the 1 rows" in notes
    for told in ("the unit that these rows have", "used for fitting", "another training seed"):
        assert told in notes
    assert all(note in str(found) for note in found.notes)


def test_the_mean_is_minus_infinity_and_the_others_keep_theirs() -> None:
    found = comparison_of(a=[-1.0, -INF, -1.5], b=[-2.0, -3.0, -2.25])
    frame = found.to_dataframe().set_index("name")
    assert frame.loc["a", "log_p"] == -INF
    assert frame.loc["a", "difference"] == -INF
    assert math.isnan(frame.loc["a", "difference_data_standard_error"])
    assert frame.loc["a", ["rows", "paired", "impossible", "reliable"]].tolist() == [3, 2, 1, 3]
    assert found.to_best("a").mean == pytest.approx(0.875)
    assert "on the 2 rows that are possible in both its difference to 'b' is 0.875 (data error 0.12)" in str(found)


def test_a_row_that_one_program_lacks_is_in_no_difference_of_the_table() -> None:
    found = comparison_of(a=[-1.0, -2.0, -9.0], b=[-2.0, -2.5, -3.0], c=[-4.0, -4.0, NAN])
    frame = found.to_dataframe().set_index("name")
    assert found.ranking == ("a", "b", "c")
    assert frame["difference"].tolist() == pytest.approx([0.0, -0.75, -2.5])
    assert frame["paired"].tolist() == [2, 2, 2]
    assert frame["rows"].tolist() == [3, 3, 2]
    assert (frame["log_p"] - frame.loc["a", "log_p"]).tolist() == pytest.approx(frame["difference"].tolist())
    # Two by themselves are compared on all rows that these have.
    assert found.difference("b", "a").mean == pytest.approx((-1.0 - 0.5 + 6.0) / 3.0)


def test_equals_and_noise_are_noted() -> None:
    notes = "\n".join(comparison_of(a=[-1.0, -2.0, -3.0], b=[-1.2, -1.9, -3.1], c=[-6.0, -7.1, -8.2]).notes)
    assert "Within 1.96 data errors of the best, 'a': 'b'." in notes
    assert "Much of the data error comes from the draws, which a smaller target reduces: 'b', 'c'." in notes
    with pytest.raises(ValueError, match="'d' is no program of this comparison: give two of 'a', 'b'"):
        comparison_of(a=[0.0], b=[0.0]).difference("a", "d")


# Stacking


def test_two_weights_are_those_of_a_scalar_search() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(60, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0]) - torch.tensor(
        [3.0, 2.8]
    )
    log_p[7, 0] = -INF

    def loss(weight: float) -> float:
        return -float(torch.logsumexp(log_p + torch.tensor([weight, 1.0 - weight], dtype=torch.float64).log(), -1).mean())

    best = minimize_scalar(loss, bounds=(1e-9, 1.0 - 1e-9), method="bounded", options={"xatol": 1e-12})
    weights = stacking_weights(log_p)
    assert 0.05 < best.x < 0.95
    assert float(weights[0]) == pytest.approx(best.x, abs=1e-4)
    assert loss(float(weights[0])) == pytest.approx(best.fun, abs=2e-9)
    assert float(weights.sum()) == pytest.approx(1.0)
    # A row's common factor, hundreds of nats here, says nothing.
    shift = 500.0 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(stacking_weights(log_p + shift), weights, atol=1e-7, rtol=0.0)


def test_many_weights_satisfy_the_conditions_of_the_optimum() -> None:
    """Karush, Kuhn and Tucker: E[p_m / mixture] is 1 where the weight is positive, at most 1 where it is not."""
    log_p = torch.randn(80, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_p[:, 3] -= 3.0  # of no use
    weights = stacking_weights(log_p)
    gain = (log_p.exp() / (log_p.exp() @ weights)[:, None]).mean(0)
    assert (gain < 1.0 + 1e-8).all()
    assert ((gain - 1.0).abs() < 1e-4)[weights > 1e-3].all()
    assert weights[3] < 1e-3
    assert (weights[:3] > 0.1).all()


def test_weights_of_one_that_is_always_better_and_of_rows_that_say_nothing() -> None:
    log_p = torch.tensor([[-1.0, -2.0], [-5.0, -9.0], [-INF, -INF]])
    torch.testing.assert_close(stacking_weights(log_p), torch.tensor([1.0, 0.0]).double(), atol=1e-6, rtol=0.0)
    assert stacking_weights(log_p[2:]).tolist() == [0.5, 0.5]
    weights = comparison_of(a=[-1.0, -2.0], b=[NAN, NAN], c=[-2.0, -1.0]).weights
    assert weights["a"] == pytest.approx(0.5)
    assert math.isnan(weights["b"])


# Discrete data, tuples, refusals


def pair(observe: Callable[..., Any], guide_of: Callable[..., Tensor] = lambda x, *_: x.new_zeros(len(x))) -> pv.Program:
    """z ~ N(0, 1), `observe(z, *rows)`, and q(z | x) = N(guide_of(*rows), 1.2)."""

    def model(*rows: Tensor) -> None:
        with pyro.plate("data", len(rows[0])):
            observe(pyro.sample("z", dist.Normal(rows[0].new_zeros(()), 1.0)), *rows)

    def guide(*rows: Tensor) -> None:
        with pyro.plate("data", len(rows[0])):
            pyro.sample("z", dist.Normal(guide_of(*rows), 1.2))

    return pv.Program(model, guide)


def columns(z: Tensor) -> Tensor:
    return z[..., None] * torch.tensor([0.5, -1.0, 0.2]) + torch.tensor([0.0, 0.3, -0.4])


BINARY = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
BERNOULLI = pair(lambda z, x: pyro.sample("x", dist.Bernoulli(logits=columns(z)).to_event(1), obs=x))
COIN = pair(lambda z, x: pyro.sample("x", dist.Bernoulli(logits=0.0 * columns(z)).to_event(1), obs=x))
NORMAL = pair(lambda z, x: pyro.sample("x", dist.Normal(columns(z), 1.0).to_event(1), obs=x))
FACTOR = pair(lambda z, x: (pyro.sample("x", dist.Normal(columns(z), 1.0).to_event(1), obs=x), pyro.factor("f", 0.1 * z)))
TWICE = pair(lambda z, x: [pyro.sample(name, dist.Normal(columns(z), 1.0).to_event(1), obs=x) for name in ("x", "again")])
SQUARE = pair(lambda z, x: pyro.sample("x", dist.Normal(columns(z), 1.0).to_event(1), obs=x**2 + 1.0))
JOINT = pair(
    lambda z, x, y: (
        pyro.sample("x", dist.Normal(columns(z), 1.0).to_event(1), obs=x),
        pyro.sample("y", dist.Normal(z, 1.0), obs=y),
    )
)
GIVEN = pair(lambda z, x, y: pyro.sample("x", dist.Normal(columns(z + y), 1.0).to_event(1), obs=x))
CODES = pair(lambda z, x: pyro.sample("x", dist.OneHotCategorical(logits=columns(z)), obs=x))
HALF = pair(
    lambda z, x: pyro.sample("x", dist.Normal(columns(z), 1.0).mask(torch.tensor([True, False, True])).to_event(1), obs=x)
)


def test_bits_per_dimension_of_a_fair_coin_are_one() -> None:
    found = pv.compare({"bernoulli": BERNOULLI, "coin": COIN}, BINARY, method=EXACT)
    frame = found.to_dataframe().set_index("name")
    assert frame.loc["coin", "bits_per_dimension"] == pytest.approx(1.0, abs=1e-6)
    assert frame.loc["coin", "log_p"] == pytest.approx(-3.0 * math.log(2.0), abs=1e-6)
    assert "  bits/dim  " in str(found)
    assert any("how x was rounded" in note for note in found.notes)
    assert not any("unit" in note for note in found.notes)
    densities = pv.compare({"a": NORMAL, "b": NORMAL}, BINARY, method=EXACT)
    assert "bits_per_dimension" not in densities.to_dataframe().columns
    assert not any("rounded" in note for note in densities.notes)


def test_a_conditional_program_beside_one_that_is_not() -> None:
    x, y = torch.randn(5, 3), torch.linspace(-2.0, 2.0, 5)
    found = pv.compare({"given": GIVEN, "not": NORMAL}, {"not": x.clone(), "given": (x, y)}, method=EXACT)
    cov = torch.eye(3) + torch.outer(columns(torch.ones(())) - columns(torch.zeros(())), torch.tensor([0.5, -1.0, 0.2]))
    for name, shift in (("given", y), ("not", torch.zeros(5))):
        truth = torch.distributions.MultivariateNormal(columns(shift), cov).log_prob(x)
        torch.testing.assert_close(found.estimates[name].log_p, truth.double(), atol=1e-4, rtol=0.0)
    assert tuple(found.estimates) == ("given", "not")
    assert found.remarks == (
        "'given' is told x[1] and 'not' is not: its number is log p(x | y), and y may tell of x what the other has to find "
        "out.",
    )


def test_conditions_that_differ_are_told_and_those_that_do_not_are_not() -> None:
    x, y = torch.randn(5, 3), torch.linspace(-2.0, 2.0, 5)
    assert remarks_on({"a": (x, y), "b": (x, y.double()[:, None])}) == ()
    assert remarks_on({"a": (x,), "b": (x,)}) == ()
    other = y.clone()
    other[3] += 0.5
    first, second = remarks_on({"a": (x, y), "b": (x, other)})
    assert first.startswith("'a' is told x[1] and 'b' is not: ")
    assert second.startswith("'b' is told x[1] and 'a' is not: ")
    (more,) = remarks_on({"a": (x, y, other), "b": (x, other), "c": (x,)})[:1]
    assert more.startswith("'a' is told x[1], x[2] and 'b', 'c' are not: ")
    assert more.endswith("what the others have to find out.")


@pytest.mark.parametrize("missing", [False, True])
def test_row_sums_among_the_conditions_are_told_to_make_no_log_p(missing: bool) -> None:
    x = torch.tensor([[1.0, 0.0, 4.0], [2.0, 7.0, 1.0], [0.0, 3.0, 0.0]])
    library = torch.tensor([5, 3 if missing else 10, 3])
    if missing:
        x[1, 1] = NAN
    told = "is the sum of each row of x, a function of x: log p(x | x[1]) leaves out how likely that sum is, so it is no"
    (all_are_told,) = remarks_on({"a": (x, library), "b": (x, library[:, None].float())})
    assert all_are_told == f"x[1] of 'a', 'b' {told} log p(x)."
    differs, sums = remarks_on({"lib": (x, library), "no": (x,)})
    assert differs.startswith("'lib' is told x[1] and 'no' is not")
    assert sums == f"x[1] of 'lib' {told} log p(x)."
    assert remarks_on({"a": (x, library + 1), "b": (x, library + 1)}) == ()


def test_other_precision_is_no_other_value() -> None:
    single, double = LinearGaussian(dtype=torch.float32), LinearGaussian()
    x = double.draw(20)
    x[3, 1] = NAN  # missing in both
    found = pv.compare({"a": single.program(), "b": double.program()}, {"a": x.float(), "b": x}, method=EXACT)
    assert abs(found.difference("a", "b").mean) < 1e-4
    assert found.difference("a", "b").num_missing == 1


def test_masks_are_noted() -> None:
    found = pv.compare({"half": HALF, "whole": NORMAL}, BINARY, method=EXACT)
    assert "'half' masks part of x" in found.notes[0]


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
VAE = pv.VAE(
    prior=pv.priors.StandardNormal(2),
    likelihood=pv.likelihoods.Bernoulli(pv.nets.MLP(2, 3)),
    guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=2),
)
OTHER = X.clone()
OTHER[2, 1] += 0.01


@pytest.mark.parametrize(
    ("programs", "x", "message"),
    [
        ([NORMAL, NORMAL], X, "programs is a list: give names to them"),
        ({"a": NORMAL}, X, r"programs has 1 entries \('a'\): give at least two"),
        ({}, X, "programs has 0 entries"),
        ({"a": NORMAL, 2: NORMAL}, X, "programs has the name 2, a int: give texts"),
        ({"a": NORMAL, "b": NORMAL.model}, X, r"programs\['b'\] is a function: give a VAE, or pv.Program"),
        ({"a": NORMAL, "b": NORMAL}, {"a": X}, r"x has no rows for 'b' \(it has \['a'\]\)"),
        ({"a": NORMAL, "b": NORMAL}, {"a": X, "b": X, "c": X}, "x has rows for 'c', which is no program"),
        ({"a": NORMAL, "b": NORMAL}, {"a": X, "b": X[:3]}, "x of 'a' has 4 rows and x of 'b' has 3: give both the same"),
        ({"a": NORMAL, "b": NORMAL}, {"a": X, "b": X[:, :2]}, r"'a' has rows of shape \(3,\) and x of 'b' of shape \(2,\)"),
        (
            {"a": NORMAL, "b": NORMAL},
            {"a": X, "b": OTHER},
            "'a' and x of 'b' hold other values in 1 of 4 rows, first in row 2",
        ),
        (
            {"a": NORMAL, "b": NORMAL},
            {"a": X, "b": OTHER},
            "dequantised or binarised draws, draw them once and give the same",
        ),
        ({"a": NORMAL, "b": NORMAL}, {"a": X, "b": X.flip(0)}, "hold other values in 4 of 4 rows, first in row 0"),
        ({"a": BERNOULLI, "b": NORMAL}, BINARY, r"'a' gives x a mass function \(Bernoulli\) and 'b' a density \(Normal\)"),
        ({"a": NORMAL, "b": BERNOULLI}, BINARY, r"'a' gives x a density \(Normal\) and 'b' a mass function \(Bernoulli\)"),
        ({"a": BERNOULLI, "b": CODES}, torch.eye(3), r"A row of x has 3 dimensions in 'a' \(Bernoulli\) and 1 in 'b'"),
        ({"a": NORMAL, "b": FACTOR}, X, "Program 'b' has the factor 'f', so that its log p may be no log-density of x"),
        ({"a": NORMAL, "b": TWICE}, X, r"Program 'b' observes x 2 times \(sites 'x', 'again'\)"),
        ({"a": SQUARE, "b": NORMAL}, X, "Program 'a' observes 'x' with rows of shape .3,., which are not x with rows of"),
        ({"a": NORMAL, "b": JOINT}, {"a": X, "b": (X, X[:, 0])}, r"Program 'b' observes 'y' with rows of shape \(\)"),
        ({"a": NORMAL, "b": VAE}, X, r"Program 'b': x has the value .* Bernoulli takes"),
        ({"a": NORMAL, "b": GIVEN}, X, r"Program 'b': The model|Program 'b': The guide"),
    ],
)
def test_what_does_not_compare_is_refused_before_any_work(
    programs: Any, x: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.report.comparing.log_evidence", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ValueError, match=message):
        pv.compare(programs, x)


def test_rows_of_another_type_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"x\['b'\] is a list|x\['b'\]\[0\] is a list"):
        pv.compare({"a": NORMAL, "b": NORMAL}, {"a": X, "b": [[1.0]]})  # type: ignore[dict-item]


# Ctrl-C


def stopping(at: int, calls: list[int]) -> Callable[..., Estimate]:
    """A method whose call number `at` is interrupted."""

    def method(program: pv.Program, rows: Any, seed: Any) -> Estimate:
        calls.append(len(rows[0]))
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return estimate_of([-1.0 * len(calls)] * len(rows[0]))

    return method


def test_after_ctrl_c_what_is_finished_is_kept_and_the_rest_told() -> None:
    calls: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    found = pv.compare({"a": NORMAL, "b": NORMAL, "c": NORMAL}, X, method=stopping(2, calls))
    assert len(calls) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert found.estimates["a"].log_p.tolist() == [-1.0] * 4
    assert found.estimates["b"].reasons == found.estimates["c"].reasons == (INTERRUPTED,) * 4
    assert found.notes[0].startswith("Interrupted")
    assert "'c' has no number for 4 of 4 rows, first row 0 (interrupted before it was reached): it is not compared." in str(
        found
    )
    assert found.ranking == ("a", "b", "c")
    assert found.to_dataframe()["log_p"].tolist()[0] == -1.0


def test_ctrl_c_within_a_program_ends_all_and_keeps_its_first_rows() -> None:
    calls: list[int] = []
    x = torch.randn(2 * 1024, 3)
    found = pv.compare({"a": NORMAL, "b": NORMAL}, x, method=stopping(2, calls))
    assert len(calls) == 2
    reached = calls[0]
    assert (~found.estimates["a"].log_p.isnan()).sum() == reached < len(x)
    assert found.estimates["b"].log_p.isnan().all()
    assert "Interrupted" in str(found)


def test_ctrl_c_before_anything_is_finished_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        pv.compare({"a": NORMAL, "b": NORMAL}, X, method=stopping(1, []))


# Tables and figures


def test_the_table_of_arviz_is_that_of_its_own_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = {"a": [-3.0, -1.0, -4.0, -2.0], "best": [-1.0, -2.0, -1.5, -1.0], "c": [-5.0, -5.0, -6.0, -4.0]}
    found = comparison_of(**log_p)
    values = {name: np.array(value) for name, value in log_p.items()}
    for version, suffix, sign in (("0.23.4", "_loo", 1.0), ("1.3.0", "", -1.0)):
        monkeypatch.setattr("pyro_vae.report.versions.metadata.version", lambda _, version=version: version)
        table = found.to_arviz()
        wanted = ["rank", f"elpd{suffix}", f"p{suffix}", "elpd_diff", "weight", "se", "dse", "warning", "scale"]
        assert list(table.columns) == wanted
        assert list(table.index) == ["best", "a", "c"]
        assert table["rank"].tolist() == [0, 1, 2]
        for name in table.index:
            gap = values["best"] - values[name]
            line = table.loc[name]
            assert line[f"elpd{suffix}"] == pytest.approx(values[name].sum())
            assert line["elpd_diff"] == pytest.approx(sign * gap.sum())
            assert line["dse"] == pytest.approx(2.0 * gap.std(ddof=1))
            assert line["se"] == pytest.approx(2.0 * values[name].std(ddof=1))
            assert math.isnan(line[f"p{suffix}"])
        assert not table["warning"].any()
        assert (table["scale"] == "log").all()


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values")  # ArviZ 0.23 sorts with it
def test_arviz_draws_its_table() -> None:
    source, shifted, wide = moved()
    programs = {"source": source.program(), "shifted": shifted.program(), "wide": wide.program()}
    found = pv.compare(programs, source.draw(50), method=EXACT)
    before = found.to_arviz()
    options: dict[str, Any] = {"plot_ic_diff": True} if int(az.__version__.split(".")[0]) < 1 else {}
    assert az.plot_compare(found.to_arviz(), **options) is not None
    assert list(before.index) == list(found.ranking)
    plt.close("all")


def bars(ax: Axes) -> list[np.ndarray[Any, Any]]:
    """Ends of the bars of each set, (programs, 2)."""
    return [np.array([[line[0, 0], line[1, 0]] for line in box[2][0].get_segments()]) for box in ax.containers]


def test_the_figure_has_a_bar_for_each_error(ax: Axes) -> None:
    found = comparison_of(a=[-3.0, -1.0, -4.0, -2.0], best=[-1.0, -2.0, -1.5, -1.0], c=[-5.0, -5.0, -6.0, -4.0])
    assert plots.comparison(found, ax) is ax
    assert ax.get_title() == "Difference of log p(x) to the best, 4 paired rows"
    assert ax.get_xlabel() == "difference to the best (nats per row, more is better)"
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["1  best\n-1.375", "2  a\n-2.500", "3  c\n-5.000"]
    assert list(ax.get_yticks()) == [0, -1, -2]
    low, high = ax.get_ylim()
    assert low < -2.5 < 0.0 < high
    data, draws = bars(ax)
    for i, name in enumerate(("a", "c")):
        difference = found.difference(name, "best")
        for ends, error in ((data[i], difference.data_standard_error), (draws[i], difference.mean_standard_error)):
            assert ends == pytest.approx([difference.mean - 1.96 * error, difference.mean + 1.96 * error])
    assert ax.get_xscale() == "linear"


def test_the_figure_in_bits_counts_less_as_better(ax: Axes) -> None:
    found = pv.compare({"bernoulli": BERNOULLI, "coin": COIN}, BINARY, method=EXACT)
    plots.comparison(found, ax, bits=True)
    assert ax.get_xlabel() == "difference to the best (bits per dimension, less is better)"
    frame = found.to_dataframe()
    gap = frame["bits_per_dimension"][1] - frame["bits_per_dimension"][0]
    assert gap > 0.0
    assert bars(ax)[0].mean() == pytest.approx(gap)
    assert f"{frame['bits_per_dimension'][0]:.4f}" in ax.get_yticklabels()[0].get_text()
    with pytest.raises(ValueError, match="bits=True is for discrete data"):
        plots.comparison(comparison_of(a=[0.0, 1.0], b=[1.0, 3.0]), ax, bits=True)


def test_the_figure_has_no_bits_where_nothing_was_seen(ax: Axes) -> None:
    rows = {name: Estimate(**{**vars(estimate_of([0.0, 1e-9])), "dimensions": torch.zeros(2).long()}) for name in "ab"}
    plots.comparison(Comparison(rows), ax, bits=True)
    assert [text.get_text() for text in ax.texts] == ["no number", "no number"]


def test_the_figure_tells_what_it_cannot_draw(ax: Axes) -> None:
    found = comparison_of(a=[-1.0, -2.0, -3.0], far=[-900.0, -801.0, -777.0], near=[-1.1, -2.0, -3.2], no=[0.0, -INF, 0.0])
    infinite = Comparison({**found.estimates, "unsure": estimate_of([-2.0, -2.5, -4.0], error=INF)})
    plots.comparison(infinite, ax)
    assert ax.get_xscale() == "symlog"
    low, high = ax.get_xlim()
    assert low < -900.0 < 0.0 < high
    assert "no probability in 1 of 3 rows" in [text.get_text() for text in ax.texts]
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told[1].endswith("; 1 without a finite error")
    assert not told[0].endswith("error")


def test_tables_are_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    table = Table("program", "nats")
    table.add_row("a", "-1.5")
    assert "program" in text_of(table)
    assert "-1.5" in text_of(table)
