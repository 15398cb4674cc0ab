"""How the steps of a run are taken: eagerly, or by a captured graph where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch

from pyro_vae.graph import Compile
from pyro_vae.learning.capture import CapturedStep
from pyro_vae.learning.steps import Stepper
from pyro_vae.learning.updates import Spent, Update
from pyro_vae.rows import Rows
from pyro_vae.tracing import CannotCapture, Untouched
from pyro_vae.warn import warn

FIRST = 100
"""Steps that "auto" takes eagerly whatever is to come, so that a mistake shows at once."""

WORTH = 8_000
"""Steps left from which a compilation pays: it takes as long as the Python of so many steps."""

CHECK = 2_000
"""Steps after which the graph is compared with the eager step again, at the next start of an epoch."""


class EagerStep:
    """Steps as Pyro takes them: Python runs model and guide each time."""

    interval = 1

    def __init__(self, stepper: Stepper, update: Update) -> None:
        self._stepper, self._update, self._spent = stepper, update, Spent()

    def take(self, rows: Rows, steps_taken: int) -> None:
        """One step; nothing moves if its loss is not finite."""
        loss, elbo = self._stepper.gradients(rows, steps_taken)
        loss, elbo, count = self._update.over_ranks(loss, elbo, len(rows[0]))
        if math.isfinite(elbo) and (math.isfinite(loss) or self._stepper.finite_gradients()):
            self._update()
            self._spent = self._spent.plus(loss, elbo, count)
        else:
            self._spent = self._spent._replace(failed=True)

    def read(self) -> Spent:
        """What was counted since the last reading."""
        spent, self._spent = self._spent, Spent()
        return spent


class Engine:
    """Takes the steps of a run.

    Args:
        stepper: program, objective and parameters.
        update: what is done with the gradients.
        mode: "auto", True or False, see `fit`.
        count: rows of a whole batch; only these are captured, so that a short one never waits for a compilation.
        usable: whether the rows lie where the program can be evaluated: a graph does not look.
        why_eager: why this run gave up before its checkpoint was written, or ""; "auto" then does not try again.

    Attributes:
        why_eager: why a graph was given up, or "".
    """

    def __init__(
        self,
        stepper: Stepper,
        update: Update,
        mode: Compile,
        count: int,
        usable: Callable[[], bool] = lambda: True,
        why_eager: str = "",
    ) -> None:
        self._stepper, self._update, self._mode, self._count, self._usable = stepper, update, mode, count, usable
        self._eager = EagerStep(stepper, update)
        self._captured: CapturedStep | None = None
        self._last: EagerStep | CapturedStep = self._eager
        self._spent, self._checked, self._doubts = Spent(), 0, 0
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.why_eager = why_eager if mode == "auto" else ""

    @property
    def compiled(self) -> bool:
        """Whether whole batches go through a graph."""
        return self._captured is not None

    @property
    def interval(self) -> int:
        """Steps after which `read` is due."""
        return self._eager.interval if self._captured is None else self._captured.interval

    def pays(self, steps_taken: int, steps_left: int, *, before: bool) -> bool:
        """Whether it is time to capture: counted in steps, so that a resumed run decides alike.

        Args:
            steps_taken: so far, in all.
            steps_left: to the last epoch.
            before: whether the run was compiled when its checkpoint was written.
        """
        if self._captured is not None or self.why_eager or self._mode is False:
            return False
        # One eager step comes first in any case: it makes the optimiser's state.
        return steps_taken >= 1 and (before or self._mode is True or (steps_taken >= FIRST and steps_left >= WORTH))

    def capture(self, rows: Rows, steps_taken: int) -> None:
        """Go over to a graph, or say once why not; with a short batch, wait for a whole one."""
        if len(rows[0]) != self._count:
            return
        try:
            self._require_usable()
            self._captured = CapturedStep(self._stepper, self._update, rows, steps_taken)
            self._checked, self._shapes = steps_taken, _shapes(rows)
        except CannotCapture as reason:
            self._give_up(str(reason))

    def _require_usable(self) -> None:
        state = pyro.util.get_rng_state()  # of Python and NumPy too: a program may draw from these
        try:
            with Untouched():
                usable = self._usable()
        except ValueError as error:
            raise CannotCapture(str(error)) from error
        finally:
            pyro.util.set_rng_state(state)
        if not usable:
            raise CannotCapture("some rows lie outside the support, which only an eager step tells")

    def check(self, rows: Rows, steps_taken: int, *, now: bool) -> None:
        """Between two epochs: compare the graph with the eager step if it is time, or `now`."""
        if self._captured is None:
            return
        if self._captured.stale:  # a callback has given the optimiser another state
            self._captured = None
            return self.capture(rows, steps_taken)
        if not (now or steps_taken - self._checked >= CHECK):
            return
        self._captured.refresh()
        since, self._checked = self._checked, steps_taken
        if (wrong := self._captured.agrees(rows, steps_taken)) is None:
            return
        self._captured, self._doubts = None, self._doubts + 1
        if self._doubts > 1:
            return self._give_up(f"{wrong}: the program reads something that changes while it trains and is no tensor")
        if not now:  # else a callback has just changed it
            warn(
                f"Somewhere in steps {since} to {steps_taken} the program changed and the captured step did not ({wrong}): "
                "it is captured anew. Make what changes a tensor that is changed in place, or a schedule of the objective.",
                RuntimeWarning,
            )
        self.capture(rows, steps_taken)

    def take(self, rows: Rows, steps_taken: int) -> None:
        """One step."""
        way = self._captured if self._captured is not None and _shapes(rows) == self._shapes else self._eager
        if way is not self._last:
            self._spent, self._last = self._spent.and_(self._last.read()), way
            if isinstance(way, CapturedStep):
                way.refresh()
        if not self._spent.failed:  # an eager step would go on from where a captured one refused to move
            way.take(rows, steps_taken)

    def read(self) -> Spent:
        """What the steps since the last reading came to."""
        found = self._last.read()
        if self._spent.steps or self._spent.failed:  # before the way was changed
            found, self._spent = self._spent.and_(found), Spent()
        return found

    def _give_up(self, reason: str) -> None:
        self.why_eager = reason
        warn(f"Training goes on without compilation: {reason.rstrip('.')}.", RuntimeWarning)


def _shapes(rows: Rows) -> list[tuple[torch.Size, torch.dtype]]:
    return [(part.shape, part.dtype) for part in rows]
