"""Coarser arithmetic for the training steps; whatever judges a fit (validation ELBO, evidence) is in full precision.

* "tf32": matrix products of float32 with 10 bits of mantissa where the hardware has it (`set_float32_matmul_precision`).
* "bf16": autocast; matrix products in bfloat16, 7 bits of mantissa. Draws and likelihoods see network outputs as coarse.

Parameters stay as they are. What it costs is measured: `History.precision_gap`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

NAMES = ("full", "tf32", "bf16")


class Precision:
    """The arithmetic of one fit.

    Args:
        name: "full", "tf32" or "bf16".
        device: where the fit runs.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in NAMES:
            raise ValueError(f"precision={name!r} is none of {', '.join(map(repr, NAMES))}.")
        self.name, self._device = name, device

    @property
    def rounding(self) -> float:
        """Relative deviation of a loss that rounding explains: a compiled graph rounds in other places than eager steps."""
        return {"full": 1e-4, "tf32": 1e-3, "bf16": 1e-2}[self.name]

    @property
    def gradient_rounding(self) -> float:
        """Likewise of the gradient of a parameter, relative to its norm."""
        return {"full": 1e-2, "tf32": 3e-2, "bf16": 2e-1}[self.name]

    def writing(self) -> AbstractContextManager[Any]:
        """Around Python that computes: an eager step, or the capture of one."""
        if self.name == "bf16":
            # Without a cache of casts, which would outlive the capture.
            return torch.autocast(self._device.type, dtype=torch.bfloat16, cache_enabled=False)
        return self.running()

    def running(self) -> AbstractContextManager[Any]:
        """Around a captured graph, whose casts are written down in it."""
        return _coarse_products() if self.name == "tf32" else nullcontext()


@contextmanager
def _coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
