"""The way to a comparison: refuse what does not compare, then estimate log p(x) of one program after the other."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_vae.evidence.blocks import INTERRUPTED, Method, log_evidence
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.memory import BUDGET
from pyro_vae.program import Program
from pyro_vae.report.comparable import remarks_on, require_comparable, require_programs, rows_of
from pyro_vae.report.comparison import Comparison
from pyro_vae.report.interrupts import watched
from pyro_vae.rows import Data
from pyro_vae.seeds import derive

MASKED = "{} masks part of x: log p(x) compares only where all programs mask the same."


def compare(
    programs: Mapping[str, Program],
    x: Data | Mapping[str, Data],
    *,
    method: Method | None = None,
    num_particles: int | None = None,
    target: float | None = None,
    seed: int = 0,
    memory: int = BUDGET,
) -> Comparison:
    """log p(x) of several programs on the same held-out rows, ranked, with paired differences and their errors.

    Args:
        programs: two or more by name, each a `VAE` or any `Program`.
        x: rows, (N, ...), or a tuple of tensors, for all programs; or such rows by name where programs take different
            tuples (a conditional model). What is modelled, the first tensor, must be the same in all; a remark says where
            the conditions are not, or are the row sums of x.
        method: as for `log_evidence`; None for the cascade.
        num_particles: K of a method; None for its default.
        target: of the cascade, the standard error of a row to reach, in nats; None for 0.05.
        seed: of all draws; those of the programs are independent.
        memory: byte budget.

    Returns:
        the comparison. After Ctrl-C (KeyboardInterrupt) of what is finished: its notes say what is not.

    Raises:
        ValueError: fewer than two programs, one that does not fit (see `check`) or refuses the rows; or what cannot be
            compared: other rows, a program that observes something else than x, a density against a mass function.
        KeyboardInterrupt: before anything was finished.
    """
    require_programs(programs)
    rows = rows_of(programs, x)
    seen = require_comparable(programs, rows)
    remarks = [*remarks_on(rows), *(MASKED.format(repr(name)) for name, site in seen.items() if site.masked)]
    estimates: dict[str, Estimate] = {}
    with watched() as watch:
        for position, (name, program) in enumerate(programs.items()):
            key, one = derive(seed, position), rows[name]
            try:
                if not watch.came:
                    estimates[name] = log_evidence(
                        program, one, method=method, num_particles=num_particles, target=target, seed=key, memory=memory
                    )
            except KeyboardInterrupt:
                watch.came = True
                if not estimates:
                    raise
            if name not in estimates:
                estimates[name] = Estimate.nothing([INTERRUPTED] * len(one[0]), one[0].device)
    if watch.came:
        remarks.insert(0, "Interrupted: what was finished by then is here, and nothing else.")
    return Comparison(estimates, tuple(remarks))
