"""A graph is its function, held tensors and all; what cannot be one is refused, and a capture leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_vae.graph import Graph, compile_mode
from pyro_vae.tracing import CannotCapture, Untouched, restored

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def graph(function: Callable[..., Sequence[Tensor]], *examples: Tensor) -> Graph:
    return Graph(function, examples or (X,), compiled=False)


def test_values_gradients_and_draws_are_those_of_the_function() -> None:
    layer = nn.Linear(3, 2)

    def function(x: Tensor) -> Sequence[Tensor]:
        loss = (layer(x) * torch.randn(len(x), 2)).tanh().sum()
        return loss.detach(), *torch.autograd.grad(loss, list(layer.parameters()))

    made = graph(function)
    for x in (X, 2.0 * X):
        torch.manual_seed(7)
        expected = function(x)
        torch.manual_seed(7)
        found = made(x)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0)
            assert not mine.requires_grad
    assert not torch.equal(made(X)[0], made(X)[0])  # fresh draws


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_held_is_seen_and_changed_in_place(compiled: bool) -> None:
    weight, count, constant = nn.Parameter(torch.ones(3)), torch.zeros(3), torch.arange(3.0)

    def function(x: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            count.add_(1.0)
        return ((x * weight + constant + count + torch.tensor([0.5, 0.25, 0.125])).sum(0),)

    made = Graph(function, (X,), compiled=compiled)
    assert {id(tensor) for tensor in made.held} == {id(weight), id(count), id(constant)}
    assert torch.equal(count, torch.zeros(3))  # the capture and its trial leave no trace
    with torch.no_grad():
        weight.mul_(2.0)
    expected = X.sum(0) * 2.0 + 5.0 * (torch.arange(3.0) + torch.tensor([0.5, 0.25, 0.125]))
    torch.testing.assert_close(made(X)[0], expected + 5.0)
    torch.testing.assert_close(made(X)[0], expected + 10.0)
    assert torch.equal(count, torch.full((3,), 2.0))
    weight.data = torch.zeros(3)  # another piece of memory
    made.refresh()
    torch.testing.assert_close(made(X)[0], 5.0 * (torch.arange(3.0) + torch.tensor([0.5, 0.25, 0.125])) + 15.0)


BASE = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
ONE, OTHER, TURNED = BASE[:5], BASE[3:], BASE[:3].t()
SHARING: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "a result twice": lambda x: [y := x * ONE, y],
    "its argument and what it holds": lambda x: [x, ONE, x + 1.0],
    "what it changes": lambda x: [ONE.add_(x), ONE * 2.0],
    "views of what it changes": lambda x: [ONE[0].add_(x[0]), ONE.t()],
    "tensors that share memory": lambda x: [ONE.add_(1.0) + OTHER],
    "a view of what it changes, turned": lambda x: [TURNED.mul_(2.0), x @ TURNED, ONE + 0.0],
    "its argument changed": lambda x: [x.add_(ONE), x * 2.0],
    "a literal": lambda x: [ONE.mul_(torch.tensor([1.0, 2.0, 3.0])) + x],
}


@pytest.mark.parametrize("what", SHARING)
def test_compiled_code_does_as_its_function_however_memory_is_shared(what: str) -> None:
    """Small graphs are called without the layer that torch puts around compiled code for such cases."""
    function, start = SHARING[what], BASE.clone()
    made = Graph(function, (X.clone(),))
    assert torch.equal(BASE, start)
    try:
        for _ in range(2):
            mine, theirs, before = X.clone(), X.clone(), BASE.clone()
            expected, after = [each.clone() for each in function(theirs)], BASE.clone()
            BASE.copy_(before)
            found = [each.clone() for each in made(mine)]
            torch.testing.assert_close([*found, mine, BASE], [*expected, theirs, after])
    finally:
        BASE.copy_(start)


def test_one_tensor_of_two_names_is_held_once_and_views_share_memory() -> None:
    weight = nn.Parameter(torch.ones(3))
    again, part = [weight, weight], weight.data[:2]
    made = graph(lambda x: ((x * again[0] * again[1]).sum() + part.sum(),))
    assert len(made.held) == 2
    with torch.no_grad():
        weight.fill_(3.0)
    torch.testing.assert_close(made(X)[0], 9.0 * X.sum() + 6.0)


def test_without_a_gradient_mode_it_is_the_same() -> None:
    layer = nn.Linear(3, 2)
    made = graph(lambda x: (layer(x).sum(),))
    with torch.no_grad():
        inside = made(X)[0]
    assert torch.equal(inside, made(X)[0])


parameter, closure, own = nn.Parameter(torch.tensor(0.7)), torch.tensor(2.0), torch.Generator()


def asks_for_a_value(x: Tensor) -> Sequence[Tensor]:
    return (x if x.mean() > 0 else 2 * x,)


def asks_a_parameter(x: Tensor) -> Sequence[Tensor]:
    return (x * parameter.detach().item(),)


def asks_a_parameter_itself(x: Tensor) -> Sequence[Tensor]:
    return (x * float(parameter.data),)


def asks_a_parameter_times_a_literal(x: Tensor) -> Sequence[Tensor]:
    return (x * (torch.tensor(2.0) * parameter.data).item(),)


def asks_a_closure(x: Tensor) -> Sequence[Tensor]:
    return (x * int(closure),)


def takes_by_mask(x: Tensor) -> Sequence[Tensor]:
    return (x[x > 0].sum(),)


def counts_nonzero(x: Tensor) -> Sequence[Tensor]:
    return (x.flatten().nonzero().sum(),)


def has_a_generator(x: Tensor) -> Sequence[Tensor]:
    return (x + torch.randn(3, generator=own),)


def fails(x: Tensor) -> Sequence[Tensor]:
    raise KeyError("no such thing")


def refuses(x: Tensor) -> Sequence[Tensor]:
    raise CannotCapture("it says so itself")


VALUE, SHAPE = (
    "it asks for the value of a tensor, as .item(), float() or `if` do",
    "the shape of a result depends on values",
)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (asks_for_a_value, VALUE),
        (asks_a_parameter, VALUE),
        (asks_a_parameter_itself, VALUE),
        (asks_a_parameter_times_a_literal, VALUE),
        (asks_a_closure, VALUE),
        (takes_by_mask, SHAPE),
        (counts_nonzero, SHAPE),
        (has_a_generator, "it draws from a torch.Generator of its own, which a graph cannot"),
        (fails, "KeyError: 'no such thing'"),
        (refuses, "it says so itself"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_a_graph_says_why_and_where(function: Any, why: str) -> None:
    with pytest.raises(CannotCapture) as caught:
        graph(function)
    message = str(caught.value)
    assert message.startswith(why)
    if function not in (has_a_generator, refuses):
        line = Path(__file__).read_text().splitlines()[function.__code__.co_firstlineno]
        assert message.endswith(f"(at test_graph.py:{function.__code__.co_firstlineno + 1}: {line.strip()})")


def test_numbers_of_literals_are_free() -> None:
    def function(x: Tensor) -> Sequence[Tensor]:
        factor = float(torch.tensor(2.0) * 3.0) if torch.tensor(3.0) > 2.0 else 0.0
        return (x[torch.tensor([True, False, True, True, False])].sum() * factor + x[torch.tensor([0, 1])].sum(),)

    torch.testing.assert_close(graph(function)(2.0 * X), function(2.0 * X))


def test_a_literal_that_takes_in_a_parameter_is_none() -> None:
    def function(x: Tensor) -> Sequence[Tensor]:
        return (x * torch.tensor(2.0).mul_(parameter.data).item(),)

    with pytest.raises(CannotCapture, match="value of a tensor"):
        graph(function)


def test_a_capture_that_fails_leaves_no_trace_either() -> None:
    count = torch.zeros(3)

    def function(x: Tensor) -> Sequence[Tensor]:
        count[1:].add_(1.0)
        count.mul_(5.0)
        return (x * count.sum().item(),)

    with pytest.raises(CannotCapture):
        graph(function)
    assert torch.equal(count, torch.zeros(3))


def test_untouched_gives_back_what_was_changed_through_views_and_lists() -> None:
    whole, others, out = torch.arange(6.0), [torch.ones(2), torch.ones(3)], torch.zeros(())
    with Untouched():
        whole[2].add_(1.0)
        whole.reshape(2, 3)[1].mul_(7.0)
        whole.neg_()
        torch._foreach_add_(others, 1.0)
        torch.sum(whole, dim=0, out=out)
    assert torch.equal(whole, torch.arange(6.0))
    assert torch.equal(others[0], torch.ones(2))
    assert torch.equal(others[1], torch.ones(3))
    assert out == 0.0


def test_restored_gives_back_after_an_error_too() -> None:
    leaf = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="on purpose"), restored([leaf]):  # noqa: PT012
        leaf.data.zero_()
        raise RuntimeError("on purpose")
    assert torch.equal(leaf, torch.ones(2))


def test_what_is_held_stays_where_it_is_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then does TorchInductor make CUDA graphs of a graph that changes its inputs."""
    from torch._inductor import compile_fx

    seen: list[tuple[list[int], int]] = []
    compile_fx_inner = compile_fx.compile_fx_inner

    def spy(inner: Any, inputs: Sequence[Any], **settings: Any) -> Any:
        seen.append((settings["static_input_idxs"], len(inputs)))
        return compile_fx_inner(inner, inputs, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    state = torch.zeros(3)

    def function(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        torch.tensor([])  # nobody needs it
        with torch.no_grad():
            state.add_(x.sum(0))
        return ((x + y) * state * torch.tensor([1.0, 2.0, 3.0]),)

    Graph(function, (X, X))
    assert seen == [([0, 3], 4)]  # the literal, two arguments, what is held


@pytest.mark.parametrize(
    "other",
    [torch.zeros(3, 4), torch.zeros(5, 4, 1), torch.zeros(5, 4).double()],
    ids=["rows", "dims", "dtype"],
)
def test_arguments_of_another_kind_than_the_examples_are_refused(other: torch.Tensor) -> None:
    graph = Graph(lambda x: (x.sum(),), (torch.ones(5, 4),), compiled=False)
    with pytest.raises(ValueError, match=r"The graph takes \(5, 4\) torch.float32 on cpu, not"):
        graph(other)
    assert graph(torch.ones(4, 5).T)[0] == 20.0


def test_compile_is_one_of_three_values() -> None:
    for value in (True, False, "auto"):
        assert compile_mode(value) is value
    for value in (0, 1, None, "yes"):
        with pytest.raises(ValueError, match=f"compile={value!r} is none of 'auto', True and False"):
            compile_mode(value)
