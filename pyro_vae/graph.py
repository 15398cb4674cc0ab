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

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pyro_vae.threads import SMALL, one_thread, operations
from pyro_vae.tracing import CannotCapture, TensorFunction, lift, restored, trace

Compile = bool | Literal["auto"]
"""Whether something is captured and compiled; "auto": if the work that is left pays for it."""


def compile_mode(value: Any) -> Compile:
    """`value` as it is.

    Raises:
        ValueError: it is none of "auto", True and False.
    """
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError(f"compile={value!r} is none of 'auto', True and False.")


class Graph:
    """A function of tensors, captured for the shapes of `examples` and compiled.

    Args:
        function: tensors -> a sequence of tensors. It is run once, in the ambient random state, which the caller restores;
            what it changes in place has its values again.
        examples: arguments of the shapes, dtypes and devices that later calls have.
        compiled: hand the graph to TorchInductor; else it is run operation by operation, for tests.

    Attributes:
        held: what the function reads besides its arguments.

    Raises:
        CannotCapture: it needs a number out of a tensor, an operation has no graph form, or there is no compiler.
    """

    def __init__(self, function: TensorFunction, examples: Sequence[Tensor], *, compiled: bool = True) -> None:
        examples = [each.contiguous() for each in examples]
        self._like = [(each.shape, each.dtype, each.device) for each in examples]
        graph = trace(function, examples)
        self._small = operations(graph) < SMALL and not any(each.is_cuda for each in examples)
        self.held = lift(graph)
        self.refresh()
        with one_thread(active=self._small):
            inputs = [*examples, *self._inputs]
            self._run = _compile(graph, inputs, len(self.held), small=self._small) if compiled else graph

    def refresh(self) -> None:
        """Look again at the tensors that the graph holds: needed when their `.data` was exchanged."""
        self._inputs = [tensor.detach() for tensor in self.held]

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """The function's results for arguments of the captured shapes; no gradients flow out of a graph.

        Raises:
            ValueError: an argument of another shape, dtype or device than the example was: compiled code does not look.
        """
        for each, like in zip(arguments, self._like, strict=True):
            if (each.shape, each.dtype, each.device) != like:
                raise ValueError(f"The graph takes {_told(*like)}, not {_told(each.shape, each.dtype, each.device)}.")
        with torch.no_grad(), one_thread(active=self._small):
            return self._run(*(each.contiguous() for each in arguments), *self._inputs)


def _told(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} {dtype} on {device}"


def _compile(
    graph: fx.GraphModule, examples: list[Tensor], num_held: int, *, small: bool
) -> Callable[..., Sequence[Tensor]]:
    """The graph by TorchInductor.

    Args:
        graph: as lifted.
        examples: its inputs.
        num_held: so many of them, the last ones, are where they are now at each call.
        small: whether what surrounds the matrix products costs as much as they do.

    Raises:
        CannotCapture: it cannot be compiled; says why.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    constants = list(graph.buffers())  # literals, which become inputs before the others
    found: list[Any] = []

    def inner(inner_graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        # A graph that changes its inputs becomes a CUDA graph only if they stay where they are.
        if plain := len(inputs) == len(constants) + len(examples):  # else some share memory: torch arranges them otherwise
            settings["static_input_idxs"] = [*range(len(constants)), *range(len(inputs) - num_held, len(inputs))]
        compiled = compile_fx_inner(inner_graph, inputs, **settings)
        found.append(compiled if plain and _results(inner_graph) == _results(graph) else None)
        return compiled

    for node in graph.graph.nodes:
        node.meta.clear()  # fake tensors of many modes, which the compiler cannot reconcile
    on_cuda = any(example.is_cuda for example in examples)
    # Draws as torch makes them, so that a graph repeats its function; `Graph` itself looks at shapes.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "triton.cudagraphs": on_cuda}

    def compiled(**more: Any) -> Callable[..., Sequence[Tensor]]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor speaks to its developers
            run: Any = compile_fx(graph, list(examples), inner_compile=inner, config_patches={**options, **more})
            with restored(examples), torch.random.fork_rng(devices=_cuda_of(examples)):
                run(*examples)  # Inductor is lazy: the first call compiles
            return run  # type: ignore[no-any-return,unused-ignore]

    if small:
        _part_from_biases(graph)
        with suppress(Exception):  # C++ cannot call every operation; Python can
            run = compiled(cpp_wrapper=True, pattern_matcher=False)
            return _straight(found[-1], constants) if found[-1] is not None else run
    try:
        return compiled()
    except Exception as error:
        raise CannotCapture(_why_not_compiled(error)) from error


def _results(graph: fx.GraphModule) -> int:
    return len(tree_leaves(graph.graph.output_node().args))


def _straight(code: Callable[[list[Tensor]], Sequence[Tensor]], constants: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compiled code without what torch puts around it for gradients and for views of inputs, 10 microseconds a call."""
    return lambda *arguments: code([*constants, *arguments])


def _part_from_biases(graph: fx.GraphModule) -> None:
    """Products apart from the biases that are added to them: these then cost nothing, in the loop that comes next."""
    aten = torch.ops.aten
    for node in [node for node in graph.graph.nodes if node.target is aten.addmm.default and not node.kwargs]:
        bias, left, right = node.args
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(aten.mm.default, (left, right))
            node.replace_all_uses_with(graph.graph.call_function(aten.add.Tensor, (product, bias)))
        graph.graph.erase_node(node)
    graph.recompile()


def _cuda_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


def _why_not_compiled(error: Exception) -> str:
    name, text = type(error).__name__, " ".join(str(error).split())
    if "InvalidCxxCompiler" in name + text or "No working C++ compiler" in text:
        return "no working C++ compiler was found (install g++ or clang, or name one in the variable CXX)"
    return f"TorchInductor failed, {name}: {text[:200]}"
