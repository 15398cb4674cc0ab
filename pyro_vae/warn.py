"""Warnings that name the line of the user, however deep in the package they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

PACKAGE, BETWEEN = "pyro_vae", ("pyro_vae", "pyro", "torch")


def warn(text: str, category: type[Warning] = UserWarning, *, again: bool = False) -> None:
    """Warn at the line that called the package, or Pyro or torch which called the package.

    Args:
        text: what to say.
        category: of the warning.
        again: also where the same text has been said of the same line: whoever asks counts himself.
    """
    caller = _caller(sys._getframe(1))
    registry = {} if again else caller.f_globals.setdefault("__warningregistry__", {})
    module = caller.f_globals.get("__name__")
    warnings.warn_explicit(text, category, caller.f_code.co_filename, caller.f_lineno, module=module, registry=registry)


def _caller(frame: FrameType) -> FrameType:
    """The first frame beyond the outermost one of the package that is the user's."""
    stack = [frame]
    while (above := stack[-1].f_back) is not None:
        stack.append(above)
    outermost = max(level for level, one in enumerate(stack) if level == 0 or _package(one) == PACKAGE)
    return next((one for one in stack[outermost + 1 :] if _package(one) not in BETWEEN), stack[outermost])


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
