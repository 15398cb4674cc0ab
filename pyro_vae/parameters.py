"""Where Pyro users keep their parameters: in modules that the callables can reach, or in the param store.

A plain function may close over its networks, find them among its globals, be a `functools.partial`, a bound method or
an effect handler around any of these. `find_modules` looks there, by name and in a fixed order, so that the names are
the same in every process (a checkpoint depends on it).
"""

from __future__ import annotations

import dis
import functools
import threading
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from torch import Tensor, nn

from pyro_vae.rows import Rows

_DEPTH = 5


def find_modules(callables: Mapping[str, Callable[..., Any]]) -> dict[str, nn.Module]:
    """Every outermost `nn.Module` that the callables can reach, by a name unique among them.

    Args:
        callables: names ("model", "guide") to Pyro callables.
    """
    found: dict[str, nn.Module] = {}
    seen: dict[int, int] = {}
    for start, function in callables.items():
        # Of a module, or of another object that can be called, also what its code finds among the globals.
        body = "forward" if isinstance(function, nn.Module) else "__call__"
        for item in (function, getattr(type(function), body)):
            for name, module in _walk(start, item, seen, _DEPTH):
                unique = name
                while unique in found:
                    unique += "'"
                found[unique] = module
    return found


def _walk(name: str, item: Any, seen: dict[int, int], depth: int) -> Iterator[tuple[str, nn.Module]]:
    """`seen` has the depth that was left when an item was met: from nearer by, more of what it holds is in reach."""
    known = seen.get(id(item), -1)
    if depth <= known or isinstance(item, (Tensor, type, types.ModuleType, str, bytes, int, float)):
        return
    seen[id(item)] = depth
    if isinstance(item, nn.Module):
        if known < 0:
            yield name, item
        return
    for child_name, child in _children(name, item):
        yield from _walk(child_name, child, seen, depth - 1)


def _children(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, functools.partial):
        yield name, item.func
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(item.args))
        yield from item.keywords.items()
    elif isinstance(item, types.MethodType):
        yield name, item.__self__
        yield name, item.__func__
    elif isinstance(item, types.FunctionType):
        yield from _function_children(item)
    elif isinstance(item, Mapping):
        yield from ((f"{name}[{key}]", value) for key, value in item.items())
    elif isinstance(item, (list, tuple)):
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(item))
    elif hasattr(item, "__dict__"):
        yield from vars(item).items()


def _function_children(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield variable, cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            continue
    for variable in _names_used(code):
        value = function.__globals__.get(variable)
        # Other files' functions are libraries, as a rule: following them would collect what is not the user's.
        if not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__:
            yield variable, value
    for i, value in enumerate(function.__defaults__ or ()):
        yield f"{function.__name__}[{i}]", value
    yield from (function.__kwdefaults__ or {}).items()


@functools.lru_cache(maxsize=1024)
def _names_used(code: types.CodeType) -> tuple[str, ...]:
    """The globals that `code` loads, each once (`code.co_names` has attributes too, which may bear a global's name)."""
    names = {step.argval: None for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_names_used(constant))
    return tuple(names)


def used_leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaf tensors that require a gradient and that `loss` was computed from, in the order of its graph."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            yield variable
        stack.extend(next_node for next_node, _ in reversed(node.next_functions))


def name_leaves(modules: Mapping[str, nn.Module], store: Mapping[str, Tensor], total: Tensor) -> dict[str, Tensor]:
    """The leaf tensors with a gradient, each once: of the modules, of the param store, and what else `total` is made of."""
    leaves: dict[str, Tensor] = {
        f"{at}.{name}": leaf for at, module in modules.items() for name, leaf in module.named_parameters()
    }
    leaves.update(store)
    leaves.update({f"leaf{i}": leaf for i, leaf in enumerate(used_leaves(total))})
    first_name = {id(leaf): name for name, leaf in reversed(leaves.items())}
    return {name: leaf for name, leaf in leaves.items() if leaf.requires_grad and first_name[id(leaf)] == name}


def versions(modules: Mapping[str, nn.Module]) -> tuple[Hashable, ...]:
    """Changes whenever a module, a parameter or a buffer is replaced or trained, the param store's among them."""
    each = [m for outer in modules.values() for m in outer.modules()]
    leaves = [leaf for outer in modules.values() for leaf in (*outer.parameters(), *outer.buffers())]
    leaves += [leaf for _, leaf in pyro.get_param_store().named_parameters()]
    # Tensors made in inference mode do not count their versions.
    counted = ((id(leaf), 0 if leaf.is_inference() else leaf._version) for leaf in leaves)
    return (*map(id, each), *counted)


@contextmanager
def evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The modules in `eval()`; each as it was on leaving, and so its frozen parameters, which a `PyroModule` unfreezes."""
    each = [m for outer in modules.values() for m in outer.modules()]
    training = [m.training for m in each]
    frozen = [leaf for outer in modules.values() for leaf in outer.parameters() if not leaf.requires_grad]
    try:
        for module in each:
            module.training = False
        yield
    finally:
        for module, mode in zip(each, training, strict=True):
            module.training = mode
        for leaf in frozen:
            leaf.requires_grad = False


class _Judged(threading.local):
    """The judgements that this thread has open, innermost last."""

    def __init__(self) -> None:
        self.open: list[tuple[Hashable, ...]] = []


_judged = _Judged()


@contextmanager
def judging(modules: Mapping[str, nn.Module], *, validate: bool = False) -> Iterator[None]:
    """For the time of a judgement: modules in `eval()`, no new entry left in the param store, validation as asked.

    All of it as before on leaving; inside another judgement of the same modules there is nothing to do. Pyro's validation
    would end the run of all rows for the sake of one, so programs are checked with it and evaluated without; a value
    outside its support costs its own row, see `_Densities`.
    """
    key = (validate, *map(id, modules.values()))
    if _judged.open[-1:] == [key]:  # inside a judgement of the same program, which has seen to all of it
        yield
        return
    store = pyro.get_param_store()
    known = set(store.keys())
    _judged.open.append(key)
    try:
        with evaluating(modules), pyro.validation_enabled(validate):
            yield
    finally:
        _judged.open.pop()
        if not known.issuperset(store.keys()):
            forget(set(store.keys()) - known)


def forget(names: Iterable[str]) -> None:
    """Take entries out of the param store. Not by `del store[name]`: that fails on a tensor that has two names."""
    store, gone = pyro.get_param_store(), set(names)
    state = store.get_state()
    for part in (state["params"], state["constraints"]):
        for name in gone & part.keys():
            del part[name]
    store.clear()
    store.set_state(state)


def require_place(modules: Mapping[str, nn.Module], rows: Rows) -> None:
    """Refuse rows on another device, or of another precision, than the parameters of the modules.

    Raises:
        ValueError: names both and the mend.
    """
    x = rows[0]
    for module in modules.values():
        for leaf in module.parameters():
            if leaf.device != x.device:
                raise ValueError(
                    f"x is on {x.device}, the parameters on {leaf.device}: give x.to({str(leaf.device)!r}), "
                    "or move the modules."
                )
            if leaf.dtype.is_floating_point and leaf.dtype != x.dtype:
                raise ValueError(
                    f"x has dtype {x.dtype}, the parameters {leaf.dtype}: give x.to({leaf.dtype}), or convert the modules."
                )


def register(name: str, module: nn.Module) -> None:
    """`pyro.module(name, module)`, after a look that no entry stands for a parameter that the module had before."""
    store = pyro.get_param_store()
    for inner, parameter in module.named_parameters():
        entry = f"{name}$$${inner}"
        if entry in store and store[entry] is not parameter:
            del store[entry]
    pyro.module(name, module)
