"""How many threads a graph gets: its work is counted as one does with pencil and paper."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.graph import Graph
from pyro_vae.threads import one_thread, operations


def test_the_products_of_a_layer_and_its_gradients_are_counted() -> None:
    layer, x = nn.Linear(30, 20), torch.randn(7, 30)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))

    # Forward and the gradient of the weight; x needs none.
    assert operations(make_fx(step)(x)) == 2 * (2 * 7 * 30 * 20)
    assert operations(make_fx(torch.exp)(x)) == 0


def test_convolutions_are_counted() -> None:
    layer, x = nn.Conv2d(3, 5, 3, bias=False), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert operations(make_fx(layer)(x)) == 2 * 2 * 5 * 6 * 6 * 3 * 3 * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_as_before(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with one_thread(active=False):
            assert torch.get_num_threads() == threads
        with one_thread(active=True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "threads"), [(10, 1), (300, 2)])
def test_a_small_graph_runs_on_one_thread_and_a_large_one_on_all(width: int, threads: int) -> None:
    seen, weight = [], torch.randn(width, width)

    def product(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x @ weight,)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        graph = Graph(product, (torch.randn(width, width),), compiled=False)
        inner, graph._run = graph._run, lambda *given: seen.append(torch.get_num_threads()) or inner(*given)
        x = torch.randn(width, width)
        torch.testing.assert_close(graph(x)[0], x @ weight)
        assert seen == [threads]  # 2 width^3 operations: 2,000 and 54 million
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
