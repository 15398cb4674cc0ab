"""Randomness that belongs to a call: seeded inside, given back unchanged outside.

A `Seed` is a whole number or a tuple of them. Tuples make keys: block 7 of a run with seed 3 draws from
``(3, 7)`` whoever computes it, in whatever order and process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch

Seed = int | tuple[int, ...]


def derive(seed: Seed, *key: int) -> int:
    """A 63-bit seed for the sub-stream `key` of `seed`, by BLAKE2b: different keys give unrelated streams."""
    parts = (seed if isinstance(seed, tuple) else (seed,)) + key
    if not all(type(part) is int for part in parts):  # asking for `Integral` first takes longer than all the rest
        if not all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts):
            raise ValueError(f"seed={seed!r} must be a whole number or a tuple of them.")
        parts = tuple(map(int, parts))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def start(number: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device` with a number; inside of `kept`, which gives them back."""
    # Not torch.manual_seed: that seeds the generators of all devices, and these alone are given back.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Torch's random state on the CPU and on `device` as before on leaving."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded(seed: Seed, device: torch.device, *key: int) -> Iterator[None]:
    """Torch's random state on the CPU and on `device` seeded with (seed, key); as before on leaving."""
    with kept(device):
        start(derive(seed, *key), device)
        yield
