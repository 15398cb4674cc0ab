"""The demo: a Gaussian VAE on scikit-learn's digits, from the data to log p(x), in about a minute.

The digits have 17 grey levels, some pixels always 0. A density fitted to such data has no bound, so the levels are spread
by uniform noise first (`data.dequantise`), for the training and for the held-out rows alike.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pyro_vae import evidence, posterior
from pyro_vae.data import Splits, dequantise, load
from pyro_vae.evidence.estimate import Estimate
from pyro_vae.files import write_bytes
from pyro_vae.learning.fit import fit
from pyro_vae.learning.history import History
from pyro_vae.learning.objectives import ELBO
from pyro_vae.model import guides, likelihoods, nets, priors
from pyro_vae.model.vae import VAE
from pyro_vae.report import plots
from pyro_vae.seeds import derive, seeded

LATENT_DIM = 8
METHODS: dict[str, tuple[Callable[..., Any] | None, int | None]] = {
    "prior": (posterior.from_prior, 10_000),
    "guide": (posterior.from_guide, 5_000),
    "laplace": (posterior.laplace, 500),
    "cascade": (None, None),
}
"""Name -> method and particles a row; the cascade is no method and chooses for each row."""


def run(out: Path, *, seed: int = 0, epochs: int = 100, progress: bool | None = None) -> dict[str, Any]:
    """Fit, evaluate and draw; everything goes to the folder `out`, files of an earlier demo are replaced.

    Args:
        out: made where it is missing.
        seed: of everything.
        epochs: passes over the training rows.
        progress: show the bar; None where the output is a terminal.

    Returns:
        what the table shows, for JSON.
    """
    console = Console()
    data = load("digits")
    levels = data.levels or 17
    splits = data.split(valid=0.1, test=0.2, seed=derive(seed, 0))
    train, valid, test = (dequantise(part.x, levels, seed=derive(seed, 1, i)) for i, part in enumerate(splits))
    with seeded(seed, torch.device("cpu"), 2):
        vae = VAE(
            prior=priors.StandardNormal(LATENT_DIM),
            likelihood=likelihoods.Normal(
                nets.MLP(LATENT_DIM, 64, hidden=(128, 128)), scale=likelihoods.Learned(initial=0.3)
            ),
            guide=guides.DiagonalNormal(nets.MLP(64, hidden=(128, 128)), latent_dim=LATENT_DIM),
        )
    console.print(f"{data}; {len(train)} to fit, {len(valid)} to validate, {len(test)} held out", soft_wrap=True)
    history = fit(vae, train, valid, epochs=epochs, batch_size=64, lr=2e-3, seed=seed, progress=progress)
    vae.save(out / "vae")
    write_bytes(out / "history.json", json.dumps(history.to_dict(), indent=2).encode())
    rows = _evaluate(vae, test, seed, out)
    console.print(_table(rows, len(test)))
    legend = (
        "Lower bounds in expectation, all of them. K: particles a row. ± MC: standard error of the draws; ± data: of the "
        "choice of rows. ESS: median effective particles. reliable: rows that pass every test of their weights."
    )
    console.print(legend, *(_told(row, len(test)) for row in rows if row["method"] == "cascade"))
    _draw(vae, history, splits, test, seed, out)
    console.print(f"model, history, evidence and figures are in {out}", soft_wrap=True)
    return {"out": str(out), "held_out_rows": len(test), "methods": rows}


def _evaluate(vae: VAE, test: torch.Tensor, seed: int, out: Path) -> list[dict[str, Any]]:
    """One entry a method, and a CSV file of each one's rows."""
    with torch.no_grad(), seeded(seed, test.device, 3):
        elbo = ELBO(num_particles=1).rows(vae.model, vae.guide, test).double()
    error = float(elbo.std() / len(elbo) ** 0.5)
    table = [{"method": "ELBO", "log_p": float(elbo.mean()), "data_error": error, "note": "a lower bound"}]
    for name, (method, count) in METHODS.items():
        start = time.perf_counter()
        estimate = evidence.log_evidence(vae, test, method=method, num_particles=count, seed=seed)
        write_bytes(out / f"evidence_{name}.csv", estimate.to_dataframe().to_csv(index=False).encode())
        table.append(_entry(name, estimate, count, time.perf_counter() - start))
    return table


def _entry(name: str, estimate: Estimate, count: int | None, seconds: float) -> dict[str, Any]:
    return {
        "method": name,
        "particles": count,
        "log_p": estimate.mean,
        "standard_error": estimate.mean_standard_error,
        "bias": float(estimate.bias.mean()),
        "data_error": estimate.data_standard_error,
        "median_ess": float(estimate.ess.median()),
        "reliable": int(estimate.reliable.sum()),
        "engines": dict(Counter(estimate.engine).most_common()),
        "seconds": seconds,
    }


def _told(row: dict[str, Any], count: int) -> str:
    """What the cascade did."""
    engines = ", ".join(f"{rows} by {name}" for name, rows in row["engines"].items())
    return (
        f"The cascade asks for each row the cheapest engine that passes these tests ({engines}), and says that "
        f"{row['reliable']} of {count} rows can be relied upon."
    )


def _table(rows: list[dict[str, Any]], count: int) -> Table:
    table = Table(title=f"log p(x) of {count} held-out rows, nats a row", box=box.SIMPLE_HEAD, padding=(0, 1))
    for head in ("method", "K", "log p(x)", "± MC", "bias", "± data", "ESS", "reliable", "s"):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in rows:
        if row["method"] == "ELBO":
            table.add_row("ELBO", "", f"{row['log_p']:.2f}", "", "", f"{row['data_error']:.2f}", "", "", "")
            continue
        table.add_row(
            row["method"],
            "chosen" if row["particles"] is None else f"{row['particles']:,}",
            f"{row['log_p']:.2f}",
            f"{row['standard_error']:.3f}",
            f"{row['bias']:.2f}",
            f"{row['data_error']:.2f}",
            f"{row['median_ess']:.0f}",
            f"{row['reliable']}/{count}",
            f"{row['seconds']:.1f}",
        )
    return table


def _draw(vae: VAE, history: History, splits: Splits, test: torch.Tensor, seed: int, out: Path) -> None:
    """The four figures."""
    shape = splits.test.shape
    plots.save(plots.learning_curve(history), out / "learning_curve.png")
    plots.save(plots.reconstructions(test[:20], vae.reconstruct(test[:20]), shape), out / "reconstructions.png")
    means = vae.generate(64, seed=seed, noise=False)
    plots.save(plots.images(means, shape, title="Samples: E[x | z] at z ~ p(z)"), out / "samples.png")
    plots.save(plots.latent_space(vae.encode(test).mean, splits.test.labels), out / "latent_space.png")
