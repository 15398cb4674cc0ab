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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_vae.threads import SMALL, one_thread, operations

TensorFunction = Callable[..., Sequence[Tensor]]
"""Tensors -> a sequence of tensors."""

_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, __file__))


Compile = bool | Literal["auto"]
"""Whether something is captured and compiled; "auto": if the work that is left pays for it."""


class CannotCapture(Exception):
    """A function cannot become a graph; the message says why, as the end of a sentence."""


class _Unseen(Exception):
    """A number that a graph would keep for good; the message says which, as `CannotCapture`'s."""


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
        graph = _trace(function, examples)
        self._small = operations(graph) < SMALL and not any(each.is_cuda for each in examples)
        self.held = _lift(graph)
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
        with one_thread(active=self._small):
            return self._run(*(each.contiguous() for each in arguments), *self._inputs)


def _told(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} {dtype} on {device}"


class restored:
    """A context in which tensors may be changed in place; on leaving they have their values again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)

    def __enter__(self) -> None:
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


class Untouched(TorchDispatchMode):
    """A context in which Python may change tensors in place; on leaving they have their values again, whoever owns them.

    It sees operations that say what they change: not BatchNorm's, and none of a compiled graph; for these see `restored`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Keep the values of what `func` is about to change."""
        if func._schema.is_mutable:
            self._keep(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _keep(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        given = {**dict(zip((each.name for each in func._schema.arguments), args, strict=False)), **kwargs}
        written = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        known = {id(tensor) for tensor, _ in self._saved}
        with disable_proxy_modes_tracing(), torch.no_grad():
            for tensor in tree_leaves([given.get(name) for name in written]):
                if isinstance(tensor, Tensor) and id(tensor) not in known:
                    self._saved.append((tensor, tensor.detach().clone()))

    def __exit__(self, *error: Any) -> None:
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        super().__exit__(*error)
        with disable_proxy_modes_tracing(), torch.no_grad():
            for tensor, value in reversed(self._saved):  # views of one another: the oldest value last
                tensor.detach().copy_(value)


class _Static(TorchDispatchMode):
    """Refuses what a graph would keep though it may change: numbers, and shapes that depend on numbers, out of tensors.

    `make_fx` itself lets them pass where they come straight from a parameter or a buffer. Literals are free.
    """

    def __init__(self) -> None:
        super().__init__()
        self._literals = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run `func`, or raise `_Unseen`."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        literal = bool(given) and all(tensor in self._literals for tensor in given)
        if not literal and torch.Tag.data_dependent_output in func.tags:
            raise _Unseen("it asks for the value of a tensor, as .item(), float() or `if` do")
        if not literal and torch.Tag.dynamic_output_shape in func.tags and not self._by_number(func, args):
            raise _Unseen("the shape of a result depends on values, as with x[mask] or nonzero()")
        result = func(*args, **(kwargs or {}))
        made = func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                if made or (literal and torch.Tag.nondeterministic_seeded not in func.tags):
                    self._literals[tensor] = True
                else:
                    self._literals.pop(tensor, None)
        return result

    def _by_number(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether it is an indexing by whole numbers, whose shape is that of the numbers, or by a literal mask."""
        if func is not torch.ops.aten.index.Tensor:
            return False
        masks = [each for each in args[1] if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)]
        return all(mask in self._literals for mask in masks)


def _trace(function: TensorFunction, examples: Sequence[Tensor]) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    def watched(*arguments: Tensor) -> Sequence[Tensor]:
        with Untouched(), _Static():
            return function(*arguments)

    # Validation of arguments asks for truth values; the backward pass must run where the tracer looks.
    with pyro.validation_enabled(is_validate=False), torch.autograd.set_multithreading_enabled(False):
        try:
            return make_fx(watched)(*examples)
        except CannotCapture:
            raise
        except Exception as error:  # whatever a user's program or torch's tracer raises: there is always the eager way
            raise CannotCapture(_why(error)) from error


def _why(error: Exception) -> str:
    met = traceback.extract_tb(error.__traceback__)
    frames = [f for f in met if not f.filename.startswith((*_LIBRARIES, "<"))]
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    if isinstance(error, _Unseen):
        return f"{error}{where}"
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
        if not isinstance(tensor, Tensor):
            own = "draws from a torch.Generator of its own" if isinstance(tensor, torch.Generator) else "needs an object"
            raise CannotCapture(f"it {own}, which a graph cannot")
        if all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
            if not any(user.users for user in node.users):
                _erase(graph, node)  # pyro.plate leaves such, on the CPU whatever the device
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


def _erase(graph: fx.GraphModule, literal: fx.Node) -> None:
    for node in [*literal.users, literal]:
        graph.graph.erase_node(node)
    if not any(node.target == literal.target for node in graph.graph.nodes if node.op == "get_attr"):
        delattr(graph, str(literal.target))


def compile_mode(value: Any) -> Compile:
    """`value` as it is.

    Raises:
        ValueError: it is none of "auto", True and False.
    """
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError(f"compile={value!r} is none of 'auto', True and False.")


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

    constants = len(list(graph.buffers()))  # literals, which become inputs before the others

    def inner(inner_graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        # A graph that changes its inputs becomes a CUDA graph only if they stay where they are.
        if len(inputs) == constants + len(examples):  # else some share memory, and torch has arranged them otherwise
            settings["static_input_idxs"] = [*range(constants), *range(len(inputs) - num_held, len(inputs))]
        return compile_fx_inner(inner_graph, inputs, **settings)

    for node in graph.graph.nodes:
        node.meta.clear()  # fake tensors of many modes, which the compiler cannot reconcile
    on_cuda = any(example.is_cuda for example in examples)
    # Draws as torch makes them, so that a graph repeats its function; `Graph` itself looks at shapes.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "triton.cudagraphs": on_cuda}
    ways = [options]
    if small:
        _part_from_biases(graph)
        ways.insert(0, {**options, "cpp_wrapper": True, "pattern_matcher": False})
    for last, way in zip((False, True)[-len(ways) :], ways, strict=True):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Inductor speaks to its developers
                run: Any = compile_fx(graph, list(examples), inner_compile=inner, config_patches=way)
                with restored(examples), torch.random.fork_rng(devices=_cuda_of(examples)):
                    run(*examples)  # Inductor is lazy: the first call compiles
                return run
        except Exception as error:
            if last:
                raise CannotCapture(_why_not_compiled(error)) from error
    raise AssertionError


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
