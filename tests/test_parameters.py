"""Parameters: every one is found, once, wherever Pyro users keep them, by names that do not change."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import programs
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Curved, Decoders, Learned, every_kind_of_parameter, names_of_every_kind, weights
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import Program
from pyro_vae.parameters import evaluating, find_modules, judging, used_leaves

X = weights(6, 3, seed=7)


def same_objects(found: dict[str, Tensor], expected: Any) -> bool:
    return sorted(map(id, found.values())) == sorted(map(id, expected))


# trainable


def test_every_kind_is_found_once() -> None:
    program, leaves = every_kind_of_parameter()
    found = program.trainable(X)
    store = dict(pyro.get_param_store().named_parameters())
    expected = [*leaves.values(), store["prior loc"], store["guide scale"]]
    assert same_objects(found, expected)
    assert len(found) == 16


def test_names_are_the_same_in_two_programs_and_two_processes() -> None:
    names = names_of_every_kind()
    pyro.clear_param_store()
    assert names_of_every_kind() == names
    code = "import sys; sys.path = sys.argv[1:]; import programs; print(*programs.names_of_every_kind(), sep='\\n')"
    command = [sys.executable, "-c", code, *sys.path]
    for hash_seed in ("1", "2"):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": hash_seed})
        assert done.stdout.splitlines() == names


def test_names_say_where_a_parameter_is_kept() -> None:
    names = names_of_every_kind()
    for part in ("stages[0].weight", "stages[1].bias", "learned.linear.weight", "global_shift.weight", "prior loc"):
        assert part in names
    assert "learned.scale_unconstrained" in names
    assert not any("decode." in name or "frozen" in name for name in names)


def test_the_param_store_gives_unconstrained_values() -> None:
    program, _ = every_kind_of_parameter()
    scale = program.trainable(X)["guide scale"]
    assert scale.is_leaf
    torch.testing.assert_close(scale.detach(), torch.tensor([0.5, 0.7]).log())


def test_what_is_found_has_the_gradient_of_the_density() -> None:
    program, _ = every_kind_of_parameter()
    leaves = program.trainable(X)
    z, _ = program.sample(X, 2)
    with torch.enable_grad():
        total = program.log_joint(X).of_sites(z).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
    of_the_guide = [name for name in leaves if name.startswith(("guide", "registered"))]
    assert len(of_the_guide) == 5
    assert [name for name, gradient in gradients.items() if gradient is None] == of_the_guide
    for name, gradient in gradients.items():
        assert name in of_the_guide or (gradient.isfinite().all() and gradient.abs().max() > 0), name


def test_frozen_parameters_are_not_trainable() -> None:
    program, leaves = every_kind_of_parameter()
    learned = next(module for module in program.modules_found().values() if isinstance(module, Learned))
    learned.linear.requires_grad_(requires_grad=False)
    found = program.trainable(X)
    assert len(found) == 14
    assert not {id(p) for p in learned.linear.parameters()} & {id(leaf) for leaf in found.values()}
    assert leaves["learned.scale_unconstrained"] is found["learned.scale_unconstrained"]


def test_frozen_parameters_stay_frozen() -> None:
    """Pyro's store would set requires_grad on what a PyroModule puts there."""
    program, _ = every_kind_of_parameter()
    learned = next(module for module in program.modules_found().values() if isinstance(module, Learned))
    learned.linear.requires_grad_(requires_grad=False)
    program.log_weights(X, 2)
    program.simulate(X)
    assert [p.requires_grad for p in learned.linear.parameters()] == [False, False]
    assert learned.scale_unconstrained.requires_grad


def test_a_module_under_two_names_is_found_once() -> None:
    net = nn.Linear(3, 2)
    curved = Curved()

    def model(x: Tensor) -> None:
        pyro.module("one", net)
        curved.model(x)

    def guide(x: Tensor) -> None:
        pyro.module("another", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    assert same_objects(Program(model, guide).trainable(X), net.parameters())


def test_tied_weights_are_found_once() -> None:
    encoder, tied, decoder = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 3)
    tied.weight = encoder.weight
    networks = programs.Networks(decoder, nn.ModuleList([encoder, tied]), 2)
    networks.encoder.forward = lambda x: encoder(x) + tied(x)  # type: ignore[method-assign]
    found = networks.program.trainable(X)
    assert same_objects(found, [encoder.weight, encoder.bias, tied.bias, decoder.weight, decoder.bias])


def test_names_that_collide_lose_no_parameter() -> None:
    """A module called net and the store's "net.weight"."""
    net = nn.Linear(3, 2)
    curved = Curved()

    def guide(x: Tensor) -> None:
        shift = pyro.param("net.weight", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x) + shift, 1.0).to_event(1))

    found = Program(curved.model, guide).trainable(X)
    store = dict(pyro.get_param_store().named_parameters())
    assert same_objects(found, [*net.parameters(), store["net.weight"]])


def test_a_program_without_parameters_has_none() -> None:
    assert Curved().program.trainable(X) == {}


def test_trainable_is_reachable_without_gradients_enabled() -> None:
    networks = programs.Networks(nn.Linear(2, 3), nn.Linear(3, 2), 2)
    with torch.no_grad():
        assert len(networks.program.trainable(X)) == 4


# find_modules


class Holder:
    """An object with a method, a call and a module inside a dictionary inside a list."""

    def __init__(self, net: nn.Module) -> None:
        self.inside = [{"net": net}]

    def method(self, x: Tensor) -> Tensor:
        return self.inside[0]["net"](x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x)


class UsesGlobal:
    def __call__(self, x: Tensor) -> Tensor:
        return a_global(x)


class ModuleThatUsesGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return a_global(x)


a_global = nn.Linear(2, 2)
unused = nn.Linear(2, 2)


def calls_global(x: Tensor) -> Tensor:
    return a_global(x)


def calls_a_function_that_calls_global(x: Tensor) -> Tensor:
    def inner() -> Tensor:
        return calls_global(x)

    return inner()


def reads_an_attribute(x: Holder) -> object:
    return x.unused  # type: ignore[attr-defined]


def with_defaults(x: Tensor, net: nn.Module = a_global, *, other: nn.Module = unused) -> Tensor:
    return net(other(x))


def test_places_of_modules() -> None:
    net = nn.Linear(2, 2)
    holder = Holder(net)

    def closure(x: Tensor) -> Tensor:
        return net(x)

    def recursive(x: Tensor) -> Tensor:
        return recursive(net(x)) if x.sum() > 0 else x

    one = {"closure": closure, "recursive": recursive, "method": holder.method, "callable": holder, "module": net}
    one |= {"lambda": lambda x: net(x), "partial": functools.partial(lambda n, x: n(x), net)}
    one |= {"keyword": functools.partial(lambda x, n: n(x), n=net), "scaled": poutine.scale(closure, 0.1)}
    one |= {"conditioned": poutine.condition(poutine.mask(closure, mask=True), data={})}
    for name, function in one.items():
        assert [m is net for m in find_modules({"model": function}).values()] == [True], name
    for function in (calls_global, calls_a_function_that_calls_global, UsesGlobal()):
        assert list(find_modules({"model": function}).values()) == [a_global]
    module = ModuleThatUsesGlobal()
    assert list(find_modules({"model": module}).values()) == [module, a_global]
    assert list(find_modules({"model": with_defaults}).values()) == [a_global, unused]
    assert find_modules({"model": reads_an_attribute}) == {}
    assert find_modules({"model": print}) == {}


def test_a_variable_that_is_not_assigned_yet() -> None:
    def early(x: Tensor) -> Tensor:
        return later(x)

    assert find_modules({"model": early}) == {}
    later = nn.Linear(2, 2)
    assert find_modules({"model": early}) == {"later": later}


def test_outermost_modules_have_unique_names() -> None:
    first, second = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)

    def make(net: nn.Module) -> Any:
        return lambda x: net(x)

    assert find_modules({"model": make(first), "guide": make(second)}) == {"net": first, "net'": second}
    assert find_modules({"model": make(first), "guide": make(first)}) == {"net": first}


def test_a_module_is_found_by_its_shorter_way_too() -> None:
    """Met first where the search ends, a list must be entered when it is met again nearer by."""
    net = nn.Linear(2, 2)
    nets = [net]
    deep: Any = nets
    for _ in range(4):
        deep = [deep]
    assert list(find_modules({"model": functools.partial(print, deep, nets)}).values()) == [net]


def test_objects_that_hold_each_other() -> None:
    a, b = Decoders(), Decoders()
    a.other, b.other = b, a  # type: ignore[attr-defined]
    assert len(find_modules({"model": a.decode})) == 6


# used_leaves, evaluating, judging


def test_used_leaves() -> None:
    a, b, c, d = (torch.ones(2, requires_grad=flag) for flag in (True, True, False, True))
    assert {id(leaf) for leaf in used_leaves((a * c).sum() + (b * b).exp().sum() + a.sum())} == {id(a), id(b)}
    assert list(used_leaves(torch.zeros(()))) == []
    assert not any(leaf is d for leaf in used_leaves((a + d.detach()).sum()))


def test_evaluating_gives_each_module_its_own_mode_back() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    net[1][0].eval()
    before = [m.training for m in net.modules()]
    assert len(set(before)) == 2

    def fail() -> None:
        with evaluating({"net": net, "part": net[1]}):
            assert not any(m.training for m in net.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in net.modules()] == before


@pytest.mark.parametrize("validate", [True, False])
def test_judging_leaves_no_new_parameter(validate: bool) -> None:
    store, net = pyro.get_param_store(), nn.Linear(2, 2)
    pyro.param("known", torch.tensor(2.0), constraint=constraints.positive)
    pyro.module("net", net)
    known = dict(store.named_parameters())
    before = torch.distributions.Distribution._validate_args
    with judging({"net": net}, validate=validate):
        assert torch.distributions.Distribution._validate_args is validate
        pyro.param("new", torch.tensor(1.0))
        pyro.module("net under another name", net)  # the same tensors: the store knows a tensor by one name only
        assert len(store) == 6
    assert torch.distributions.Distribution._validate_args is before
    assert {name: id(value) for name, value in store.named_parameters()} == {n: id(v) for n, v in known.items()}
    assert [store.param_name(value) for value in known.values()] == list(known)
    assert store["known"].item() == pytest.approx(2.0)
