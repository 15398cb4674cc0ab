"""Writing down what a function does to tensors: the first half of a `Graph`.

`make_fx` runs a function once and notes every operation. What it would keep for good though it may change (numbers and
shapes out of tensors) is refused here, and what the run changes in place has its values again afterwards.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

TensorFunction = Callable[..., Sequence[Tensor]]
"""Tensors -> a sequence of tensors."""

_LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, __file__))


class CannotCapture(Exception):
    """A function cannot become a graph; the message says why, as the end of a sentence."""


class _Unseen(Exception):
    """A number that a graph would keep for good; the message says which, as `CannotCapture`'s."""


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


def trace(function: TensorFunction, examples: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of `function` on tensors like `examples`.

    Raises:
        CannotCapture: says why.
    """
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


def lift(graph: fx.GraphModule) -> list[Tensor]:
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
