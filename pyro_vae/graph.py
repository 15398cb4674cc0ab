"""A function of tensors as one compiled graph.

`make_fx` runs the function once and writes down every operation that reaches a tensor, those of autograd among them, so
that gradients taken inside the function are part of the graph. Pyro's effect handlers, distributions and loops are Python:
they run at the capture and never again. TorchInductor then compiles what is left.

What the function reads besides its arguments (parameters of modules or of the param store, buffers, what it closes over) is
found by identity and becomes an input of the graph: a change in place is seen, and the graph may change it in place itself.
Python numbers and tensors that are replaced by others are not seen; whoever owns a graph compares it now and then with
the function (see `pyro_vae.learning.capture`).

Draws stay in the graph and come from torch's generators, in the function's own order: for the same random state a graph and
its function meet the same noise.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx

TensorFunction = Callable[..., Sequence[Tensor]]
"""Tensors -> a sequence of tensors."""

_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, __file__))


class CannotCapture(Exception):
    """A function cannot become a graph; the message says why, as the end of a sentence."""


class Graph:
    """A function of tensors, captured for the shapes of `examples` and compiled.

    Args:
        function: tensors -> a sequence of tensors. It is run once, in the ambient random state, and may change tensors in
            place: the caller restores both.
        examples: arguments of the shapes, dtypes and devices that later calls have.
        compiled: hand the graph to TorchInductor; else it is run operation by operation, for tests.

    Attributes:
        held: what the function reads besides its arguments.

    Raises:
        CannotCapture: it needs a number out of a tensor, an operation has no graph form, or there is no compiler.
    """

    def __init__(self, function: TensorFunction, examples: Sequence[Tensor], *, compiled: bool = True) -> None:
        graph = _trace(function, examples)
        self.held = _lift(graph)
        self.refresh()
        self._run = _compile(graph, [*examples, *self._inputs]) if compiled else graph

    def refresh(self) -> None:
        """Look again at the tensors that the graph holds: needed when their `.data` was exchanged."""
        self._inputs = [tensor.detach() for tensor in self.held]

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """The function's results for arguments of the captured shapes; no gradients flow out of a graph."""
        return self._run(*arguments, *self._inputs)


def restored(tensors: Iterable[Tensor]) -> Restored:
    """Give tensors back their values on leaving."""
    return Restored(tensors)


class Restored:
    """A context in which tensors may be changed in place; on leaving they have their values again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)

    def __enter__(self) -> None:
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


def _trace(function: TensorFunction, examples: Sequence[Tensor]) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    # Validation of arguments asks for truth values; the backward pass must run where the tracer looks.
    with pyro.validation_enabled(is_validate=False), torch.autograd.set_multithreading_enabled(False):
        try:
            return make_fx(function)(*examples)
        except CannotCapture:
            raise
        except Exception as error:  # whatever a user's program or torch's tracer raises: there is always the eager way
            raise CannotCapture(_why(error)) from error


def _why(error: Exception) -> str:
    met = traceback.extract_tb(error.__traceback__)
    frames = [f for f in met if not f.filename.startswith((*_LIBRARIES, "<"))]
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    if "get value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
        return f"it asks for the value of a tensor, as .item(), float() or `if` do{where}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def _lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds, each once; literals that were made on the way stay constants."""
    held: dict[int, tuple[Tensor, fx.Node]] = {}
    lifted: set[str] = set()
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, str(node.target))
        if all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            continue
        if id(tensor) not in held:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(str(node.target))
            held[id(tensor)] = tensor, last
        node.replace_all_uses_with(held[id(tensor)][1])
        graph.graph.erase_node(node)
        lifted.add(str(node.target))
    for name in lifted:
        delattr(graph, name)  # else the compiler takes it for one more input, of the same memory
    graph.graph.lint()
    graph.recompile()
    return [tensor for tensor, _ in held.values()]


def _compile(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    import torch._inductor

    on_cuda = any(example.is_cuda for example in examples)
    # Draws as torch makes them, so that a graph repeats its function. Shapes are checked once, at the capture.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "triton.cudagraphs": on_cuda}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor speaks to its developers
            run = torch._inductor.compile(graph, list(examples), options=options)
            assert callable(run)
            with restored(examples), torch.random.fork_rng(devices=_cuda_of(examples)):
                run(*examples)  # Inductor is lazy: the first call compiles
            return run
    except Exception as error:
        raise CannotCapture(_why_not_compiled(error)) from error


def _cuda_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


def _why_not_compiled(error: Exception) -> str:
    name, text = type(error).__name__, " ".join(str(error).split())
    if "InvalidCxxCompiler" in name + text or "No working C++ compiler" in text:
        return "no working C++ compiler was found (install g++ or clang, or name one in the variable CXX)"
    return f"TorchInductor failed, {name}: {text[:200]}"
