"""Blocks of rows dealt to the ranks of a team, and put together again.

The random numbers of a block belong to its number, so that it does not matter which rank works on it. All ranks end with
all blocks, and stop together when Ctrl-C comes to one of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.evidence.estimate import TENSORS, TEXTS, Estimate
from pyro_vae.team import Team, held


class Sharing:
    """The work of a team on blocks, one set of them after the other.

    Args:
        team: who works.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._late = False

    def turns(self, count: int) -> range:
        """Which of `count` blocks are this rank's."""
        return self._team.turns(count)

    def finished(self, blocks: Iterable[tuple[int, Estimate]], parts: Sequence[Tensor]) -> tuple[Tensor, Estimate, bool]:
        """All blocks that were finished when Ctrl-C came, or all there are.

        Args:
            blocks: those of this rank with their numbers, made one after the other.
            parts: which rows each block has, on all ranks the same.

        Returns:
            the rows that are finished (n,), their estimate, and whether Ctrl-C came.

        Raises:
            KeyboardInterrupt: it came before any rank had finished a block.
            Lost: another rank has ended.
        """
        own: dict[int, Estimate] = {}
        interrupted = False
        try:
            if self._late:
                raise KeyboardInterrupt
            for number, part in blocks:
                own[number] = part
        except KeyboardInterrupt:
            interrupted = True
        everyone, interrupted = self._gathered(own, parts[0].device, interrupted=interrupted)
        if not everyone:
            raise KeyboardInterrupt
        numbers = sorted(everyone)
        return torch.cat([parts[n] for n in numbers]), Estimate.cat([everyone[n] for n in numbers]), interrupted

    def _gathered(
        self, own: dict[int, Estimate], device: torch.device, *, interrupted: bool
    ) -> tuple[dict[int, Estimate], bool]:
        """What all ranks have, and whether Ctrl-C came to one of them."""
        if self._team.size == 1:
            return own, interrupted
        told = {"interrupted": interrupted, "blocks": {number: _listed(part) for number, part in own.items()}}
        everyone: list[bytes] = []
        try:
            with held():
                everyone = self._team.gather(json.dumps(told).encode())
        except KeyboardInterrupt:
            self._late = True  # the others have not heard of it: they do with the next blocks
        heard: list[dict[str, Any]] = [json.loads(content) for content in everyone]
        blocks = {int(number): _made(lists, device) for one in heard for number, lists in one["blocks"].items()}
        return blocks, any(one["interrupted"] for one in heard)


def _listed(estimate: Estimate) -> dict[str, list[Any]]:
    """Its fields as lists; every float64 comes back to the bit."""
    return {name: getattr(estimate, name).tolist() for name in TENSORS} | {n: list(getattr(estimate, n)) for n in TEXTS}


def _made(lists: dict[str, list[Any]], device: torch.device) -> Estimate:
    """The estimate of which these are the fields."""
    whole = ("evaluations", "dimensions")
    dtypes = {name: torch.int64 if name in whole else torch.float64 for name in TENSORS}
    tensors: dict[str, Any] = {name: torch.tensor(lists[name], dtype=dtypes[name], device=device) for name in TENSORS}
    texts: dict[str, Any] = {name: tuple(lists[name]) for name in TEXTS}
    return Estimate(**tensors, **texts)
