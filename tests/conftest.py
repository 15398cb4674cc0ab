"""Fixtures for every test: a clean Pyro, fixed random numbers, and a check that no global setting was left changed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # tests are small; more threads only wait for each other on a busy machine


def _global_settings() -> dict[str, Any]:
    return {
        **pyro.settings.get(),  # among them Pyro's and torch's validation of arguments
        "torch: default dtype": torch.get_default_dtype(),
        "torch: default device": torch.get_default_device(),
        "torch: validation": torch.distributions.Distribution._validate_args,
        "torch: gradients enabled": torch.is_grad_enabled(),
        "torch: deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch: threads": torch.get_num_threads(),
    }


def _restore(settings: dict[str, Any]) -> None:
    pyro.settings.set(**{name: value for name, value in settings.items() if not name.startswith("torch: ")})
    torch.set_default_dtype(settings["torch: default dtype"])
    torch.distributions.Distribution.set_default_validate_args(settings["torch: validation"])
    torch.set_grad_enabled(settings["torch: gradients enabled"])
    torch.use_deterministic_algorithms(settings["torch: deterministic algorithms"])
    torch.set_num_threads(settings["torch: threads"])


@pytest.fixture(autouse=True)
def _clean_globals() -> Iterator[None]:
    """Start with an empty parameter store and seed 0; afterwards put everything back and compare the settings."""
    random_state = pyro.util.get_rng_state()
    before = _global_settings()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    after = _global_settings()
    pyro.clear_param_store()
    pyro.util.set_rng_state(random_state)
    _restore(before)
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test left global settings changed (before, after): {changed}"


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_interrupts() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C from birth; here it is Python's KeyboardInterrupt, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder of MNIST's IDX files, ``$PYRO_VAE_DATA/mnist``; skips where there is none."""
    root = Path(os.environ.get("PYRO_VAE_DATA", "data")) / "mnist"
    if not root.is_dir():
        pytest.skip(f"needs MNIST: set PYRO_VAE_DATA to the folder that holds mnist/ (looked for {root})")
    return root.resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
