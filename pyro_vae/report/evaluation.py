"""What `pyro-vae evaluate` does: log p(x) of held-out rows by the cascade or one method, its files and its summary.

    evidence.csv                row, log_p, standard_error, ..., engine, reliable, reason; bounds of the first rows
    evidence_convergence.png    the estimate against the number of particles
    evidence_pareto_k.png       k-hat of the rows
    evidence_sandwich.png       both bounds of the first rows

Ctrl-C ends the work and keeps what is finished.

The ranks of a team share the rows. Then rank 0 bounds, writes and draws, and the last rank computes the curves of
convergence meanwhile.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box as boxes
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from pyro_vae import evidence, posterior
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.files import write_bytes
from pyro_vae.posterior.engine import Engine
from pyro_vae.program import Program
from pyro_vae.report import growth, plots
from pyro_vae.report.bars import Bars
from pyro_vae.report.interrupts import Watch, watched
from pyro_vae.report.plots.figure import looks
from pyro_vae.report.tables import text_of
from pyro_vae.seeds import derive
from pyro_vae.team import ALONE, Team, held

if TYPE_CHECKING:
    import pandas as pd

CASCADE = "cascade"
METHODS: dict[str, Any] = {
    "guide": posterior.from_guide,
    "laplace": posterior.laplace,
    "annealed": posterior.annealed,
    "prior": posterior.from_prior,
    "exact": evidence.exact,
}
"""What --method calls them, besides the cascade."""

BOUNDED = 200
"""Rows that the cascade gives two-sided bounds, unless told."""

BOUNDING = posterior.Laplace(num_starts=16)
"""Draws for the bounds of the cascade: with the starts that serve nearly all of its rows."""

DRAWN = 200
"""Rows of the figure of convergence."""

CSV, CONVERGENCE, PARETO_K, SANDWICH = (
    "evidence.csv",
    "evidence_convergence.png",
    "evidence_pareto_k.png",
    "evidence_sandwich.png",
)

BOUNDS, GROWTH = 1, 2
"""Sub-streams of the seed."""


@dataclass(frozen=True)
class Asked:
    """The options of `pyro-vae evaluate` that say how; each None is a default.

    Raises:
        ValueError: options that do not go together, by the names that the command line gives them.
    """

    method: str = CASCADE
    particles: int | None = None
    target: float | None = None
    bounds: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what the method does not take, before any work."""
        if self.method == CASCADE and self.particles is not None:
            raise ValueError(
                f"--particles {self.particles} needs --method guide, laplace, annealed or prior: the cascade chooses the "
                "number for each row; give --target for its accuracy."
            )
        if self.method != CASCADE and self.target is not None:
            raise ValueError(f"--target {self.target:g} is for the cascade: leave it out, or --method {self.method}.")
        if self.method == "exact" and self.particles is not None:
            raise ValueError(f"--particles {self.particles}: --method exact draws none, leave it out.")
        if self.method == "exact" and self.bounds:
            raise ValueError(f"--bounds {self.bounds}: --method exact needs no bounds, leave it out.")

    @property
    def bounded(self) -> int:
        """Rows that get two-sided bounds, at most."""
        return (BOUNDED if self.method == CASCADE else 0) if self.bounds is None else self.bounds

    @property
    def bounding(self) -> Engine:
        """The engine of the bounds."""
        engine: Engine = BOUNDING if self.method == CASCADE else METHODS[self.method]
        return engine


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        asked: how.
        estimate: log p(x) of N rows.
        box: bounds of the first of them, or None.
        interrupted: whether Ctrl-C ended it.
        figures: names of the files that were drawn.
    """

    asked: Asked
    estimate: Estimate
    box: evidence.Sandwich | None
    interrupted: bool
    figures: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        """The estimate's own table; where rows have two-sided bounds, lower and upper are these, with their errors."""
        frame = self.estimate.to_dataframe()
        names = ["lower", "upper", "lower_standard_error", "upper_standard_error"]
        frame[names[2:]] = math.nan
        if self.box is not None:
            frame.loc[: len(self.box) - 1, names] = self.box.to_dataframe()[names].to_numpy()
        return frame

    def engines(self) -> dict[str, dict[str, Any]]:
        """For each engine: rows it answered, their mean evaluations, median standard error (nats), how many reliable."""
        names, found = self.estimate.engine, {}
        for name in looks(names):
            mine = [i for i, engine in enumerate(names) if engine == name]
            part = self.estimate.take(torch.tensor(mine, device=self.estimate.log_p.device))
            found[name] = {
                "rows": len(part),
                "mean_evaluations": float(part.evaluations.double().mean()),
                "median_standard_error": float(part.standard_error.median()),
                "reliable": int(part.reliable.sum()),
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """The summary, for JSON; means in nats a row."""
        estimate = self.estimate
        return {
            "method": self.asked.method,
            "rows": len(estimate),
            "mean": estimate.mean,
            "mean_standard_error": estimate.mean_standard_error,
            "data_standard_error": estimate.data_standard_error,
            "mean_bias": float(estimate.bias.mean()),
            **({"bits_per_dimension": estimate.mean_bits_per_dimension} if estimate.discrete else {}),
            "reliable": int(estimate.reliable.sum()),
            "interrupted": self.interrupted,
            "engines": self.engines(),
            "sandwich": None if self.box is None else _means(self.box),
            "figures": list(self.figures),
        }

    def __str__(self) -> str:
        """The table of engines, the estimate and the bounds."""
        table = Table(box=boxes.SIMPLE_HEAD, padding=(0, 1))
        for head in ("engine", "rows", "evaluations a row", "standard error, nats", "reliable"):
            table.add_column(head, justify="left" if head == "engine" else "right", no_wrap=True)
        for name, told in self.engines().items():
            table.add_row(
                "not reached" if name == "none" else name,
                f"{told['rows']:,}",
                f"{told['mean_evaluations']:,.0f}",
                f"{told['median_standard_error']:.2g}",
                f"{told['reliable']:,} of {told['rows']:,}",
            )
        return "\n".join([text_of(table), "", str(self.estimate), *([str(self.box)] if self.box is not None else [])])


def run(
    program: Program,
    x: Tensor,
    asked: Asked,
    folder: Path,
    *,
    figures: bool = True,
    progress: Progress | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Estimate, bound, write evidence.csv, draw.

    Args:
        program: a `VAE` or any `Program`.
        x: rows, (N, ...).
        asked: how.
        folder: where the files go; the figures of an earlier evaluation are removed from it.
        figures: whether to draw.
        progress: shows bars, one for each engine at work; None for none.
        team: processes that share the work, all given the same arguments.

    Returns:
        what was found, after Ctrl-C what was finished by then; without bounds and figures on other ranks than 0.

    Raises:
        KeyboardInterrupt: nothing was finished; no file was touched.
        Lost: another rank has ended.
    """
    method = None if asked.method == CASCADE else METHODS[asked.method]
    bars, box, drawn = Bars(progress or Progress(disable=True), asked.method if method else None, len(x)), None, []
    with watched() as watch:
        estimate = evidence.log_evidence(
            program,
            x,
            method=method,
            num_particles=asked.particles,
            target=asked.target,
            seed=asked.seed,
            on_block=bars.on_block,
            team=team,
        )
        with watch.kept(), held():
            bars.close(filled=False)
        came = _anywhere(watch, team)
        if came:
            watch.came = True
        curves = functools.partial(_curves, program, x, asked)
        # By what all agreed on, and not by the watch, which may have changed here since.
        shared = team.size > 1 and figures and asked.method != "exact" and not came
        if not team.leads:
            if shared:
                _from_last(curves, watch, team)
            return Evaluation(asked, estimate, None, watch.came)
        with watch.kept():
            if asked.bounded and not watch.came:
                some = x[: asked.bounded]
                bars.begin(f"bounds by {asked.bounding.name}", len(some))
                box = evidence.sandwich(program, some, method=asked.bounding, seed=derive(asked.seed, BOUNDS))
                bars.close()
        with watch.kept(), held():
            _write(Evaluation(asked, estimate, box, watch.came), folder)
        received = _from_last(curves, watch, team) if shared else None
        with watch.kept():
            if figures and not watch.came:
                bars.begin("figures", None)
                found = Evaluation(asked, estimate, box, interrupted=False)
                for name in _draw(found, folder, (lambda: received) if shared else curves):
                    drawn.append(name)
                bars.close()
    return Evaluation(asked, estimate, box, watch.came, tuple(drawn))


def _means(box: evidence.Sandwich) -> dict[str, Any]:
    """Mean bounds and mean width in nats, of the rows that have both sides."""
    both = box.width.isfinite()
    return {
        "rows": len(box),
        "rows_with_both": int(both.sum()),
        "lower": float(box.lower[both].mean()),
        "upper": float(box.upper[both].mean()),
        "mean_width": box.mean_width,
        "mean_width_standard_error": box.mean_width_standard_error,
        "median_width": box.median_width,
        "kind": box.kind,
        "engine": box.engine,
    }


def _write(found: Evaluation, folder: Path) -> None:
    """evidence.csv; what an earlier evaluation has drawn would contradict it and goes."""
    write_bytes(folder / CSV, found.to_dataframe().to_csv(index=False).encode())
    for name in (CONVERGENCE, PARETO_K, SANDWICH):
        (folder / name).unlink(missing_ok=True)


def _anywhere(watch: Watch, team: Team) -> bool:
    """Whether Ctrl-C came to any rank before this call: the same answer on all of them."""
    came = False
    with watch.kept(), held():
        came = bool(team.add(torch.tensor([float(watch.came)])))
    return came


def _curves(program: Program, x: Tensor, asked: Asked) -> growth.Convergence:
    """How the estimate of the first rows grows with the number of particles."""
    return growth.convergence(program, x[:DRAWN], seed=derive(asked.seed, GROWTH), **_compared(asked))


def _from_last(curves: Callable[[], growth.Convergence], watch: Watch, team: Team) -> growth.Convergence | None:
    """The curves, computed by the last rank while rank 0 was busy; None if Ctrl-C came there."""
    content, received = b"", None
    with watch.kept():
        if team.rank == team.size - 1:
            found = curves()
            lists = {name: [column.tolist() for column in curve] for name, curve in found.curves.items()}
            content = json.dumps({"curves": lists, "num_rows": found.num_rows}).encode()
    everyone = [b""]
    with watch.kept(), held():
        everyone = team.gather(content)
    with watch.kept():
        if everyone[-1]:
            received = _read_curves(everyone[-1])
    return received


def _read_curves(content: bytes) -> growth.Convergence:
    """What the last rank has sent."""
    told = json.loads(content)
    made = {
        name: growth.Curve(torch.tensor(k), *(torch.tensor(values, dtype=torch.float64) for values in rest))
        for name, (k, *rest) in told["curves"].items()
    }
    return growth.Convergence(made, told["num_rows"])


def _draw(found: Evaluation, folder: Path, curves: Callable[[], growth.Convergence | None]) -> Iterator[str]:
    """The figures that there is something to draw for, and the name of each once it is there."""
    asked, estimate, box = found.asked, found.estimate, found.box
    if bool(estimate.pareto_k.isfinite().any()):
        plots.save(plots.pareto_k(estimate), folder / PARETO_K)
        yield PARETO_K
    if box is not None and bool(box.width.isfinite().any()):
        plots.save(plots.sandwich(box), folder / SANDWICH)
        yield SANDWICH
    if asked.method != "exact" and (found_curves := curves()) is not None:
        # The mean of one method is no truth to hold that method against.
        truth = estimate.rows(DRAWN) if asked.method == CASCADE else None
        plots.save(plots.convergence(found_curves, truth=truth), folder / CONVERGENCE)
        yield CONVERGENCE


def _compared(asked: Asked) -> dict[str, Any]:
    """The engines whose convergence is drawn, and up to which number of particles."""
    if asked.method == CASCADE:
        return {}
    engine: Engine = METHODS[asked.method]
    most = asked.particles or min(engine.default_particles, growth.NUMBERS[-1])
    return {"methods": {asked.method: engine}, "ks": [*(k for k in growth.NUMBERS if k < most), most]}
