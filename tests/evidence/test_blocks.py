import functools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import LinearGaussian
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_vae as pv
from pyro_vae import memory

GUIDE = pv.posterior.from_guide


@pytest.fixture
def known() -> LinearGaussian:
    return LinearGaussian(dtype=torch.float32)


@pytest.mark.parametrize("method", [pv.posterior.from_guide, pv.posterior.from_prior])
def test_the_answer_does_not_depend_on_the_budget(known: LinearGaussian, method: object) -> None:
    x = known.draw(40)
    answers = [
        pv.log_evidence(known.program(1.2), x, method=method, num_particles=300, seed=5, memory=memory)  # type: ignore[arg-type]
        for memory in (2**30, 2**18, 2**14)
    ]
    for other in answers[1:]:
        torch.testing.assert_close(other.log_p, answers[0].log_p, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.standard_error, answers[0].standard_error, rtol=1e-3, atol=1e-6)


def test_blocks_are_padded_evenly_and_their_rows_come_back_in_order(known: LinearGaussian) -> None:
    x = known.draw(1100)
    told: list[tuple[str, int, int]] = []
    estimate = pv.log_evidence(
        known.program(1.1), x, method=GUIDE, num_particles=50, on_block=lambda *block: told.append(block)
    )
    assert told == [("guide", 367, 1100), ("guide", 734, 1100), ("guide", 1100, 1100)]
    error = (estimate.log_p - known.log_p(x)).abs()
    assert (error < 8.0 * estimate.standard_error).all()


def test_seeds_repeat_and_rows_are_independent(known: LinearGaussian) -> None:
    x = known.draw(1).repeat(2000, 1)
    program = known.program(1.3)
    a, b, c = (pv.log_evidence(program, x, method=GUIDE, num_particles=50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.log_p, b.log_p)
    assert not torch.equal(a.log_p, c.log_p)
    assert len(a.log_p.unique()) == 2000
    # Neighbouring rows of one block share a generator; they must not share noise: correlation within 4 / sqrt(n).
    pairs = torch.corrcoef(torch.stack([a.log_p[:-1], a.log_p[1:]]))[0, 1]
    assert abs(pairs) < 4.0 / 2000**0.5


def test_many_particles_for_few_rows_are_one_row_a_block(known: LinearGaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BLOCK_NUMBERS", 300)
    done: list[int] = []
    pv.log_evidence(
        known.program(), known.draw(3), method=GUIDE, num_particles=200, on_block=lambda _, rows, __: done.append(rows)
    )
    assert done == [1, 2, 3]


def test_bad_rows_of_a_bare_program_disturb_no_other(known: LinearGaussian) -> None:
    x = known.draw(30)
    clean = pv.log_evidence(known.program(1.2), x, method=GUIDE, num_particles=100)
    x[[3, 17], 2] = torch.tensor([torch.nan, torch.inf])
    spoilt = pv.log_evidence(known.program(1.2), x, method=GUIDE, num_particles=100)
    bad = torch.zeros(30, dtype=torch.bool)
    bad[[3, 17]] = True
    assert torch.equal(spoilt.log_p[~bad], clean.log_p[~bad])
    assert spoilt.log_p[bad].isnan().all()
    assert not spoilt.reliable[bad].any()
    assert "NaN" in spoilt.reasons[3]
    assert spoilt.mean == pytest.approx(float(clean.log_p[~bad].mean()))
    assert "2 of them have no value and are not in the mean" in str(spoilt)


def test_a_row_outside_the_support_is_impossible() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Exponential(torch.exp(z)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    program = pv.Program(model, guide)
    estimate = pv.log_evidence(program, torch.tensor([0.5, -1.0, 2.0]), method=GUIDE, num_particles=500)
    assert estimate.log_p[1] == -torch.inf
    assert "support" in estimate.reasons[1]
    assert torch.isfinite(estimate.log_p[[0, 2]]).all()
    assert estimate.mean == -torch.inf
    alone = pv.log_evidence(program, torch.tensor([-1.0]), method=GUIDE, num_particles=500)
    assert alone.log_p.tolist() == [-torch.inf]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "guide"}, "method='guide' is not a method"),
        ({"method": pv.posterior.hamiltonian}, "method=hamiltonian makes chains, which have no weights"),
        ({"method": GUIDE, "num_particles": 0}, "num_particles=0 must be a whole number of at least 1"),
        ({"method": GUIDE, "num_particles": -3}, "num_particles=-3"),
        ({"num_particles": 300}, "num_particles=300: without a method the cascade chooses"),
        ({"method": GUIDE, "target": 0.1}, "target=0.1 is for the cascade: .* leave out method=guide"),
        ({"target": 0.0}, "target=0.0 must be a positive number of nats"),
        ({"target": -0.1}, "target=-0.1"),
        ({"target": float("nan")}, "target=nan"),
        ({"target": float("inf")}, "target=inf"),
        ({"target": "0.1"}, "target='0.1'"),
        ({"target": True}, "target=True"),
        ({"memory": 0}, "memory=0"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
    ],
)
def test_bad_arguments_are_named(known: LinearGaussian, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pv.log_evidence(known.program(), known.draw(2), **arguments)  # type: ignore[arg-type]


def test_data_on_another_device_are_refused() -> None:
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 3), scale=1.0),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=(4,)), latent_dim=1),
    )
    with pytest.raises(ValueError, match=r"x is on meta, the parameters on cpu: give x.to"):
        pv.log_evidence(vae, torch.zeros(2, 3, device="meta"))
    with pytest.raises(ValueError, match=r"dtype torch.float64, the parameters torch.float32"):
        pv.log_evidence(vae, torch.zeros(2, 3, dtype=torch.float64))


X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))


class Parts:
    """A program in pieces, one of which a test replaces by a wrong one."""

    def __init__(self) -> None:
        self.decoder, self.encoder = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.6).to_event(1))

    def model_without_plate(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide_without_to_event(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.6))

    def guide_of_another_name(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(self.encoder(x), 0.6).to_event(1))

    def model_of_a_subsample(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x[index])

    def guide_of_a_subsample(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(self.encoder(x[index]), 0.6).to_event(1))

    def model_that_observes_nothing(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1))

    def autoguide(self) -> AutoNormal:
        guide = AutoNormal(self.model)
        guide(X[:5])
        return guide

    def point_guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))


WRONG: dict[str, tuple[Callable[[Parts], pv.Program], object, str]] = {
    "no plate": (lambda p: pv.Program(p.model_without_plate, p.guide), X, "lies outside every plate"),
    "to_event": (lambda p: pv.Program(p.model, p.guide_without_to_event), X, r"add .to_event\(1\)"),
    "names": (lambda p: pv.Program(p.model, p.guide_of_another_name), X, "'z' .* is not in the guide"),
    "subsample": (lambda p: pv.Program(p.model_of_a_subsample, p.guide_of_a_subsample), X, "a subsampled plate"),
    "nothing observed": (lambda p: pv.Program(p.model_that_observes_nothing, p.guide), X, "observes nothing"),
    "columns": (lambda p: pv.Program(p.model, p.guide), X[:, :3], "cannot be run on 3 rows of x, shape"),
    "precision": (lambda p: pv.Program(p.model, p.guide), X.double(), "x has dtype torch.float64, the parameters"),
    "tuple": (lambda p: pv.Program(p.model, p.guide), (X, X), r"cannot be called with the 2 tensor\(s\) of x"),
    "autoguide": (lambda p: pv.Program(p.model, p.autoguide()), X, "an AutoNormal, whose parameters belong to the rows"),
    "no density": (lambda p: pv.Program(p.model, p.point_guide), X, "is a Delta, which has no density"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_program_is_told_the_same_as_by_check(kind: str) -> None:
    make, x, message = WRONG[kind]
    told = []
    for use in (pv.check, pv.log_evidence):
        with pytest.raises(ValueError, match=message) as refusal:
            use(make(Parts()), x)  # type: ignore[arg-type]
        told.append(str(refusal.value))
    assert told[0] == told[1]


def test_bad_rows_at_the_beginning_are_not_taken_for_a_bad_program() -> None:
    """The guide takes a logarithm: it cannot be run on what lies outside the support, nor on NaN."""
    x = 0.1 + X.abs()[:, 0]
    x[0], x[1], x[2], x[5] = torch.nan, -1.0, -2.0, -0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x.log(), 0.5**0.5))

    estimate = pv.log_evidence(pv.Program(model, guide), x, method=GUIDE, num_particles=10)
    good = [3, 4, 6, 7, 8]
    exact = dist.LogNormal(0.0, 2.0**0.5).log_prob(x[good]).double()  # and the guide is the posterior
    torch.testing.assert_close(estimate.log_p[good], exact, rtol=1e-5, atol=1e-5)
    assert estimate.log_p[0].isnan()
    assert estimate.log_p[[1, 2, 5]].tolist() == [-torch.inf] * 3
    for bad in (x[[1, 2, 5]], x[:1]):
        alone = pv.log_evidence(pv.Program(model, guide), bad, method=GUIDE, num_particles=10)
        assert not torch.isfinite(alone.log_p).any()


def test_a_program_that_cannot_be_run_at_all_is_refused_behind_bad_rows() -> None:
    parts = Parts()
    x = X[:, :3].clone()
    x[:4] = torch.nan
    with pytest.raises(ValueError, match=r"The guide cannot be run on 3 rows of x, shape \(3, 3\)"):
        pv.log_evidence(pv.Program(parts.model, parts.guide), x)


def test_a_partial_method_without_particles_is_named(known: LinearGaussian) -> None:
    method = functools.partial(pv.evidence.exact)
    with pytest.raises(ValueError, match="num_particles=7: the method exact draws no particles, leave it out"):
        pv.log_evidence(known.program(), known.draw(2), method=method, num_particles=7)

    class Method:
        def __call__(self, program: pv.Program, x: object, *, seed: object) -> None: ...

    with pytest.raises(ValueError, match="the method Method draws no particles"):
        pv.log_evidence(known.program(), known.draw(2), method=Method(), num_particles=7)  # type: ignore[arg-type]
