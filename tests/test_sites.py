"""Checks: the table of sites, and every refusal with the site, its shapes and the mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Curved, Networks, Several, weights, with_plate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vae as pv
from pyro_vae import Program

X = weights(8, 4)
ZERO = torch.zeros(2)


def net(x: Tensor, *shape: int) -> Tensor:
    """Numbers of shape (..., *shape) that depend on each row of x."""
    return x.mean(-1).reshape(*x.shape[:-1], *(1 for _ in shape)).expand(*x.shape[:-1], *shape)


def normal_guide(x: Tensor, name: str = "z", size: int = 2) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample(name, dist.Normal(net(x, size), 1.0).to_event(1))


def observe(x: Tensor, z: Tensor) -> None:
    loc = z.sum(-1, keepdim=True).expand(*z.shape[:-1], x.shape[-1])
    pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def normal_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        observe(x, pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1)))


# The table


def test_the_table_of_several_latents() -> None:
    table = str(Several().program.check(weights(6, 4)))
    assert table.splitlines() == [
        "checked on 6 rows of plate 'rows'",
        "role      site     model      guide      event shape  support",
        "latent    z1       Normal     Normal     ()           Real",
        "latent    z2       Normal     Normal     (2,)         Real",
        "latent    rate     Gamma      LogNormal  ()           GreaterThanEq(lower_bound=0.0)",
        "latent    share    Beta       Beta       ()           Interval(lower_bound=0.0, upper_bound=1.0)",
        "latent    simplex  Dirichlet  Dirichlet  (3,)         Simplex",
        "observed  x        Normal                (4,)         Real",
    ]


def test_the_table_as_data() -> None:
    table = pv.check(Curved().program, weights(6, 3))
    assert table.num_rows == 6
    assert table.rows() == [
        ("latent", "z", "Normal", "Normal", "(2,)", "Real"),
        ("observed", "x", "Normal", "", "(3,)", "Real"),
    ]
    assert table.model["x"].event_shape == (3,)
    assert [plate.name for plate in table.guide["z"].plates] == ["data"]


def test_the_table_of_a_conditional_model() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("people", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=(z + y)[..., None].expand(*z.shape, 4)).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("people", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) - y, 1.0))

    table = pv.check(Program(model, guide), ((X > 0).float(), torch.arange(8)))
    assert "checked on 8 rows of plate 'people'" in str(table)
    assert "observed  x     Bernoulli          (4,)         Boolean" in str(table)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_any_number_of_rows_is_checked(rows: int) -> None:
    assert f"checked on {rows} rows" in str(Program(normal_model, normal_guide).check(weights(rows, 4)))


def test_families_are_told_without_their_wrappers() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).mask(torch.tensor(True)).to_event(1))
            observe(x, z)

    assert Program(model, normal_guide).check(X).model["z"].family == "Normal"


@pytest.mark.parametrize(
    "plate",
    [
        lambda x: pyro.plate("data", 60000, subsample_size=len(x)),
        lambda x: pyro.plate("data", 60000, subsample=x),
        lambda x: pyro.plate("data", x.shape[0], dim=-1),
        lambda x: pyro.plate("data", len(x), subsample_size=len(x)),
    ],
)
def test_plates_over_exactly_the_rows_pass(plate: Callable[[Tensor], Any]) -> None:
    assert "checked on 6 rows" in str(with_plate(plate).check(weights(6, 3)))


# Refusals. Each entry: the program's two functions, and the whole message.


def refused(x: Any, model: Any, guide: Any) -> str:
    """The message with which `check` refuses; the same by way of `log_weights`."""
    messages = []
    for use in (lambda p: p.check(x), lambda p: p.log_weights(x, 2)):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011, the callers compare the message
            use(Program(model, guide))
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]
    return messages[0]


def test_no_plate() -> None:
    def model(x: Tensor) -> None:
        observe(x, pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)))

    assert refused(X, model, normal_guide) == (
        "The model's latent 'z' (batch shape (3,), event shape (2,)) lies outside every plate: "
        "sample it inside `with pyro.plate('data', len(x)):`, so that every row has its own."
    )


def test_a_guide_without_a_plate() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(net(x, 2), 1.0).to_event(1))

    assert refused(X, normal_model, guide) == (
        "The guide's latent 'z' (batch shape (3,), event shape (2,)) lies outside every plate: "
        "sample it inside `with pyro.plate('data', len(x)):`, so that every row has its own."
    )


def test_a_latent_outside_the_plate() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            observe(x, z)

    assert "model's latent 'z' (batch shape (3,), event shape (2,)) lies outside every plate" in refused(
        X, model, normal_guide
    )


def test_data_outside_the_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        observe(x, z)

    assert (
        "The model's observed site 'x' (batch shape (3,), event shape (4,)) lies outside every plate: sample it"
        in refused(X, model, normal_guide)
    )


@pytest.mark.parametrize("in_guide", [True, False])
def test_a_global_latent(in_guide: bool) -> None:
    def model(x: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(ZERO, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            observe(x, pyro.sample("z", dist.Normal(slope, 1.0).to_event(1)))

    def guide(x: Tensor) -> None:
        if in_guide:
            pyro.sample("slope", dist.Normal(ZERO, 1.0).to_event(1))
        normal_guide(x)

    assert refused(X, model, guide) == (
        "The model's latent 'slope' (batch shape (), event shape (2,)) would be shared by all rows (a global latent): "
        "sample it inside `with pyro.plate('data', len(x)):`, so that every row has its own."
    )


@pytest.mark.parametrize("enumerated", [True, False])
@pytest.mark.parametrize(
    ("family", "name"),
    [(dist.Categorical(torch.ones(2)), "Categorical"), (dist.Poisson(3.0), "Poisson"), (dist.Bernoulli(0.3), "Bernoulli")],
)
def test_a_discrete_latent(family: Any, name: str, enumerated: bool) -> None:
    """Also where it is not in the guide, because it was to be enumerated: adding it there would be no mend."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
            kind = pyro.sample("kind", family, infer={"enumerate": "parallel"} if enumerated else {})
            observe(x, z + kind[..., None])

    def guide(x: Tensor) -> None:
        normal_guide(x)
        if not enumerated:
            with pyro.plate("more data", len(x)):
                pyro.sample("kind", family)

    assert refused(X, model, guide) == (
        f"The model's latent 'kind' (batch shape (3,), event shape ()) is discrete ({name}): "
        "sum it out in the model, or replace it by a continuous relaxation."
    )


WRAPPERS: dict[str, Callable[[Tensor], Any]] = {
    "event_dim": lambda v: dist.Delta(v, event_dim=1),
    "independent": lambda v: dist.Delta(v).to_event(1),
    "masked": lambda v: dist.Delta(v, event_dim=1).mask(torch.tensor(True)),
    "masked inside": lambda v: dist.Delta(v).mask(torch.tensor(True)).to_event(1),
    "expanded": lambda v: dist.ExpandedDistribution(dist.Delta(v, event_dim=1), v.shape[:1]),
    "transformed": lambda v: dist.TransformedDistribution(dist.Delta(v), [dist.transforms.ExpTransform()]).to_event(1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_latent_without_a_density(where: str, wrapper: str) -> None:
    point = WRAPPERS[wrapper]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = point(torch.zeros(len(x), 2)) if where == "model" else dist.Normal(ZERO, 1.0).to_event(1)
            observe(x, pyro.sample("z", prior))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", point(net(x, 2)))

    assert refused(X, model, normal_guide if where == "model" else guide) == (
        f"The {where}'s latent 'z' (batch shape (3,), event shape (2,)) is a Delta, which has no density: give it a scale, "
        "as dist.Normal(value, scale) has one, or make it no latent and compute it in the model."
    )


def test_expanded_families_are_told_by_what_is_expanded() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(x, pyro.sample("z", dist.ExpandedDistribution(dist.Normal(ZERO, 1.0).to_event(1), (len(x),))))

    assert Program(model, normal_guide).check(X).model["z"].family == "Normal"


def test_a_relaxed_latent_is_none_of_these() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=torch.tensor(0.3)))
            observe(x, z[..., None])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=x.mean(-1)))

    assert "latent    z" in str(Program(model, guide).check(X))


def test_an_autoguide() -> None:
    guide = AutoNormal(normal_model)
    assert refused(X, normal_model, guide) == (
        "The guide is an AutoNormal, whose parameters belong to the rows it was set up with: "
        "write an amortised guide(x) that samples the latents from a network of x."
    )


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_subsampled_plate(size: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as index:
            observe(x[index], pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1)))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as index:
            pyro.sample("z", dist.Normal(net(x[index], 2), 1.0).to_event(1))

    plate, rows = ("Plate 'data'", 3) if size == 2 else ("A plate", 2 if size == 3 else 3)
    where = "model" if size == 2 else "guide"
    assert refused(X, model, guide) == (
        f"{plate} runs over {size} rows, but the {where} was called with {rows}: a subsampled plate or one of fixed "
        "size cannot be judged row by row, make it pyro.plate('data', len(x))."
    )


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_plate_of_fixed_size(where: str, size: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", size if where == "model" else len(x)):
            observe(x, pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1)))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", size if where == "guide" else len(x)):
            pyro.sample("z", dist.Normal(net(x, 2), 1.0).to_event(1))

    message = refused(X[:size], model, guide)  # the size is that of the data, and still not that of other data
    rows = 2 if size == 3 else 3
    assert message == (
        f"Plate 'data' runs over {size} rows, but the {where} was called with {rows}: a subsampled plate or one of fixed "
        "size cannot be judged row by row, make it pyro.plate('data', len(x))."
    )


def missing_to_event(site: str, where: str, extra: str, count: int = 1) -> str:
    return (
        f"The {where}'s site {site!r} keeps {extra} as independent batch dimensions inside the plate over the rows, "
        f"which has room for the rows alone: add .to_event({count}) to its distribution."
    )


@pytest.mark.parametrize("rows", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [2, 3, 4, 5])
def test_data_without_to_event(rows: int, columns: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, x.shape[-1]), 0.5), obs=x)

    assert refused(weights(rows, columns), model, normal_guide) == missing_to_event("x", "model", f"({columns},)")


def test_images_without_to_event() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1)[..., None, None].expand(-1, 5, 7), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        normal_guide(x.flatten(1))

    assert refused(weights(8, 5, 7), model, guide) == missing_to_event("x", "model", "(5, 7)", 2)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("expanded", [True, False])
def test_a_latent_without_to_event(size: int, expanded: bool) -> None:
    """Also in the coincidence that there are as many rows as latent dimensions, and each row seems to have one."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(*([len(x)] if expanded else []), size), 1.0))
            observe(x, z.reshape(-1, size)[..., :1].expand(len(x), 1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x, size), 1.0).to_event(1))

    message = missing_to_event("z", "model", f"({size},)")
    if size == 3 and not expanded:
        message = (
            "Latent 'z' has event shape () in the model and (3,) in the guide: give both the same, by their sizes and "
            "by .to_event()."
        )
    assert refused(weights(size, size), model, guide) == message


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_guide_without_to_event(size: int) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(x, pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1)))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x, size), 1.0))

    assert refused(weights(size, size), model, guide) == missing_to_event("z", "guide", f"({size},)")


def test_a_latent_that_the_guide_lacks() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            observe(x, pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1)) + offset[..., None])

    assert refused(X, model, normal_guide) == (
        "The model's latent 'offset' (batch shape (3,), event shape ()) is not in the guide, which samples ['z']: "
        "add pyro.sample('offset', ...) to the guide, or observe it with obs=."
    )


def test_a_guide_that_samples_nothing() -> None:
    assert "is not in the guide, which samples nothing: add pyro.sample('z', ...)" in refused(
        X, normal_model, lambda x: None
    )


def test_a_latent_that_the_model_lacks() -> None:
    def guide(x: Tensor) -> None:
        normal_guide(x)
        with pyro.plate("data again", len(x)):
            pyro.sample("zz", dist.Normal(net(x, 5), 1.0).to_event(1))

    assert refused(X, normal_model, guide) == (
        "The guide samples 'zz' (batch shape (3,), event shape (5,)), which is no latent of the model (those are ['z']): "
        "use the same name in both."
    )


@pytest.mark.parametrize("size", [1, 3, 5])
def test_event_shapes_that_differ(size: int) -> None:
    """The decoder would fail on the guide's draws, and a message about matrices would help nobody."""
    decoder = nn.Linear(2, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    assert refused(X, model, lambda x: normal_guide(x, size=size)) == (
        f"Latent 'z' has event shape (2,) in the model and ({size},) in the guide: give both the same, by their sizes and "
        "by .to_event()."
    )


def test_a_guide_outside_the_support() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(x, pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1)))

    assert refused(X, model, lambda x: normal_guide(x - 5.0, "rate")) == (
        "The guide's latent 'rate' (Normal) was drawn outside the support of the model's Gamma "
        "(GreaterThanEq(lower_bound=0.0)): give the guide a distribution with that support."
    )


@pytest.mark.parametrize("where", ["model", "guide"])
def test_nested_plates(where: str) -> None:
    def nested(x: Tensor, *, observed: bool) -> None:
        with pyro.plate("columns", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(net(x), 1.0))
        if observed:
            with pyro.plate("data again", len(x)):
                observe(x, z.mT)

    model = (lambda x: nested(x, observed=True)) if where == "model" else normal_model
    guide = (lambda x: nested(x, observed=False)) if where == "guide" else normal_guide
    assert refused(X, model, guide) == (
        f"The {where}'s latent 'z' (batch shape (2, 3), event shape ()) lies inside 2 plates ('columns', 'data'): "
        "keep the one over the rows and make the others event dimensions with .to_event()."
    )


def test_a_plate_at_another_dimension() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0))
            pyro.sample("x", dist.Normal(z[:, :1].expand(-1, 4), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(net(x, 2), 1.0))

    assert refused(X, model, guide) == (
        "The model's latent 'z' (batch shape (3, 2), event shape ()) lies in plate 'data' at dim=-2: leave `dim` out, "
        "so that it is -1, and make the dimensions on its right event dimensions with .to_event()."
    )


def test_nothing_observed() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1))

    message = "The model observes nothing (its sites are ['x', 'z']): give its data site obs=x, as in "
    assert refused(X, model, normal_guide) == message + "pyro.sample('x', ..., obs=x)."


def test_no_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(x, torch.zeros(len(x), 1))

    assert refused(X, model, normal_guide) == (
        "The model has no latent site (its sites are ['x']): sample z in it with pyro.sample('z', ...), and in the guide."
    )


def test_an_auxiliary_site() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(net(x), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a[..., None] * torch.ones(2), 1.0).to_event(1))

    assert refused(X, normal_model, guide) == (
        "The guide's site 'a' (batch shape (3,), event shape ()) is auxiliary, so that q(z|x) has no density in "
        "closed form: leave it out, or make it a latent of the model."
    )


class Network(nn.Module):
    """A guide as a module, whose signature is that of forward()."""

    def forward(self, x: Tensor) -> None:
        normal_guide(x)


@pytest.mark.parametrize("guide", [normal_guide, Network(), pyro.poutine.scale(lambda x: normal_guide(x), 0.5)])
def test_a_wrong_number_of_arguments(guide: Any) -> None:
    def takes_one(x: Tensor) -> None:
        guide(x)

    message = refused((X, X, X, X), normal_model, takes_one)
    assert message == (
        "The guide cannot be called with the 4 tensor(s) of x (too many positional arguments): "
        "give x as a tuple of what model and guide both take."
    )
    assert "The guide cannot be " in refused((X, X, X, X), normal_model, guide)


def test_a_model_that_wants_more_arguments() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        normal_model(x + y)

    assert refused(X, model, normal_guide) == (
        "The model cannot be called with the 1 tensor(s) of x (missing a required argument: 'y'): "
        "give x as a tuple of what model and guide both take."
    )


def test_a_wrong_number_of_columns() -> None:
    networks = Networks(nn.Linear(2, 4), nn.Linear(4, 2), 2)
    message = refused(weights(8, 5), networks.model, networks.guide)
    assert message.startswith("The guide cannot be run on 3 rows of x, shape (3, 5) (mat1 and mat2 shapes cannot be ")
    assert message.endswith("give x the shape and the values that it was written for.")


@pytest.mark.parametrize("columns", [1, 5])
def test_a_wrong_number_of_columns_in_the_model_alone(columns: int) -> None:
    """One column would be spread over all that the decoder makes, without a word."""
    networks = Networks(nn.Linear(2, 4), nn.Linear(4, 2), 2)
    assert refused(weights(8, columns), networks.model, normal_guide) == (
        "The model's observed site 'x' (batch shape (3,), event shape (4,)) is given a value of "
        f"shape (3, {columns}) on 3 rows: give it one of shape (3, 4), or a distribution of the value's shape."
    )


def test_rows_that_the_guide_cannot_read() -> None:
    x = X.clone()
    x[1, 1] = torch.nan
    message = refused(x, normal_model, normal_guide)
    assert message.startswith("The guide cannot be run on 3 rows of x, shape (3, 4) (Expected parameter loc ")


def test_a_support_that_depends_on_another_latent() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
            observe(x, pyro.sample("z", dist.Uniform(0.0, top))[..., None])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.LogNormal(3.0, 1.0).expand([len(x)]))
            pyro.sample("z", dist.Uniform(0.0, top))

    assert "latent    z" in str(Program(model, guide).check(X))


def test_supports_are_told_as_they_are() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
            observe(x, z)

    assert "latent    z     ImproperUniform  Normal  (2,)         Real" in str(Program(model, normal_guide).check(X))
