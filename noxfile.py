"""Tests on every Python that is supported, each in a new virtual environment: `nox`, or `nox -s tests-3.12 -- -m slow`.

Python 3.11 meets ArviZ 0.23, the others ArviZ 1.x, see constraints.txt. Interpreters that are missing are skipped.
"""

from __future__ import annotations

import nox

PYTHONS = ("3.11", "3.12", "3.13")

SMOKE = (
    "tests/report/test_inference_data.py",
    "tests/report/test_mixing.py",
    "tests/report/test_comparison.py",
    "tests/report/test_plots.py",
    "tests/posterior/test_chains.py",
    "tests/learning/test_history.py",
    "tests/test_program.py",
)
"""What another Python and another ArviZ are most likely to break: ArviZ, plots, files, effect handlers."""

ENVIRONMENT = {"MPLBACKEND": "Agg"}

nox.options.sessions = ["tests"]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite; arguments after -- go to pytest."""
    install(session)
    session.run("pytest", *session.posargs, env=ENVIRONMENT)


@nox.session(python="3.13")
def arviz(session: nox.Session) -> None:
    """ArviZ 1.x, plots and a smoke test, in a few minutes: `nox -s arviz`."""
    install(session)
    session.run("pytest", *SMOKE, *session.posargs, env=ENVIRONMENT)


def install(session: nox.Session) -> None:
    """The package with what its tests need, in the releases that it is tested with."""
    session.install("-c", "constraints.txt", ".[test]")
