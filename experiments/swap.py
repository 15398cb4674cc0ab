"""Claim: one assumption can be swapped at a time, and the swap is judged by held-out log p(x).

    PYRO_VAE_DATA=... python experiments/swap.py [--train 6400 --epochs 8 --rows 100] [--share 0/2]

Fits every prior x likelihood that suits MNIST, and other guides and objectives beside the standard normal prior, with one
network (784-200-10-200-784), one budget (50 Adam steps an epoch, lr 0.002) and three seeds, and estimates log p(x) of
held-out images by the cascade. What is finished stays in runs/swap, and the same command goes on from there; `--share 1/2`
does every second fit, so that two processes halve the time. The table, experiments/results/swap.json and a figure are made
of what there is. Where the prior is a flow, `laplace` alone judges: latents in the tails of a spline flow are hard rows, on
which the cascade would spend half a minute each.

Three kinds of data cannot be compared with each other: grey levels dequantised to densities, bits drawn from them, and the
8-bit levels themselves. A density p(y) of dequantised levels bounds their bits per dimension from above (see pv.data).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyro_vae as pv

RESULTS = Path(__file__).parent / "results"
D, HIDDEN, PIXELS, LEVELS = 10, (200,), 784, 256
SEEDS = (0, 1, 2)


def decoder(width: int = 1) -> pv.nets.MLP:
    """z -> `width` numbers a pixel."""
    return pv.nets.MLP(D, PIXELS * width, hidden=HIDDEN)


class Divided(nn.Module):
    """Levels 0 .. 255 as a binomial takes them, brought to [0, 1] for the encoder."""

    out_features = HIDDEN[-1]

    def __init__(self) -> None:
        super().__init__()
        self.net = pv.nets.MLP(PIXELS, hidden=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 784) -> (N, 200)."""
        return self.net(x / (LEVELS - 1))


PRIORS: dict[str, Callable[[Tensor], pv.priors.Prior]] = {
    "StandardNormal": lambda x: pv.priors.StandardNormal(D),
    "Normal": lambda x: pv.priors.Normal(D),
    "Mixture": lambda x: pv.priors.Mixture(D, num_components=10),
    "VampPrior": lambda x: pv.priors.VampPrior.from_rows(x, num_inputs=50, latent_dim=D),
    "Flow": lambda x: pv.priors.Flow(D, transforms=2, hidden=(32, 32)),
    "Laplace": lambda x: pv.priors.Laplace(D),
    "StudentT": lambda x: pv.priors.StudentT(D),
    "Product": lambda x: pv.priors.Product(pv.priors.StandardNormal(D // 2), pv.priors.Laplace(D // 2)),
}
# Kind of data, and p(x | z). Left out: FullNormal (784 x 784 for every step), Categorical (256 classes a pixel: 40 million
# weights), counts without an upper end.
LIKELIHOODS: dict[str, tuple[str, Callable[[], pv.likelihoods.Likelihood]]] = {
    "Normal, s = 1": ("density", lambda: pv.likelihoods.Normal(decoder(), scale=1.0)),
    "Normal, s learned": ("density", lambda: pv.likelihoods.Normal(decoder(), scale=pv.likelihoods.Learned(initial=0.3))),
    "Normal, s optimal": ("density", lambda: pv.likelihoods.Normal(decoder(), scale=pv.likelihoods.Optimal())),
    "Normal, s per pixel": (
        "density",
        lambda: pv.likelihoods.Normal(decoder(), scale=pv.likelihoods.Learned(PIXELS, initial=0.3)),
    ),
    "Normal, s(z)": (
        "density",
        lambda: pv.likelihoods.Normal(decoder(), scale=pv.likelihoods.FromNetwork(decoder())),
    ),
    "LowRankNormal": ("density", lambda: pv.likelihoods.LowRankNormal(decoder(), rank=10, initial=0.3)),
    "StudentT": ("density", lambda: pv.likelihoods.StudentT(decoder(), scale=pv.likelihoods.Learned(initial=0.3))),
    "Laplace": ("density", lambda: pv.likelihoods.Laplace(decoder(), scale=pv.likelihoods.Learned(initial=0.3))),
    "LogNormal": ("density", lambda: pv.likelihoods.LogNormal(decoder(), scale=pv.likelihoods.Learned(initial=0.3))),
    "Beta": ("density", lambda: pv.likelihoods.Beta(decoder(), concentration=pv.likelihoods.Learned(initial=3.0))),
    "ContinuousBernoulli": ("density", lambda: pv.likelihoods.ContinuousBernoulli(decoder())),
    "Bernoulli": ("bits", lambda: pv.likelihoods.Bernoulli(decoder())),
    "Binomial": ("levels", lambda: pv.likelihoods.Binomial(decoder(), total_count=LEVELS - 1)),
    "DiscretisedLogistic": (
        "levels",
        lambda: pv.likelihoods.DiscretisedLogistic(decoder(), scale=pv.likelihoods.Learned(initial=0.2)),
    ),
    "DiscretisedLogisticMixture": (
        "levels",
        lambda: pv.likelihoods.DiscretisedLogisticMixture(decoder(9), num_components=3),
    ),
}
GUIDES: dict[str, Callable[[nn.Module], pv.guides.Guide]] = {
    "DiagonalNormal": lambda encoder: pv.guides.DiagonalNormal(encoder, D),
    "FullNormal": lambda encoder: pv.guides.FullNormal(encoder, D),
    "InverseAutoregressive": lambda encoder: pv.guides.InverseAutoregressive(encoder, D),
}
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "ELBO": pv.objectives.ELBO,
    "IWAE": lambda: pv.objectives.IWAE(num_particles=8),
    "DReG": lambda: pv.objectives.DReG(num_particles=8),
    "STL": pv.objectives.STL,
}
ALSO = ("Normal, s learned", "Bernoulli", "DiscretisedLogistic")
"""Likelihoods whose guides and objectives are swapped as well."""


@dataclass(frozen=True)
class Fit:
    """One fit: what was assumed, and the seed."""

    likelihood: str
    prior: str = "StandardNormal"
    guide: str = "DiagonalNormal"
    objective: str = "ELBO"
    seed: int = 0

    @property
    def kind(self) -> str:
        """density, bits or levels."""
        return LIKELIHOODS[self.likelihood][0]

    @property
    def file(self) -> str:
        """Its name in the folder of runs."""
        told = f"{self.likelihood}-{self.prior}-{self.guide}-{self.objective}-{self.seed}"
        return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in told)


def everything() -> Iterator[Fit]:
    """All fits, seeds outermost, so that an interrupted run has every row before any row has three seeds."""
    for seed in SEEDS:
        for likelihood in LIKELIHOODS:
            yield from (Fit(likelihood, prior, seed=seed) for prior in PRIORS)
        for likelihood in ALSO:
            yield from (Fit(likelihood, guide=guide, seed=seed) for guide in list(GUIDES)[1:])
            yield from (Fit(likelihood, objective=objective, seed=seed) for objective in list(OBJECTIVES)[1:])


def seen(x: Tensor, kind: str) -> Tensor:
    """Rows as a kind of likelihood takes them; the noise is the same for every fit, so that differences are paired."""
    return {
        "density": lambda: pv.data.dequantise(x, LEVELS, seed=7),
        "bits": lambda: pv.data.binarise(x, seed=7),
        "levels": lambda: x,
    }[kind]()


def run(fit: Fit, train: Tensor, test: Tensor, epochs: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Fit and judge: a record, and log p(x) of each held-out row."""
    x, held_out = seen(train, fit.kind), seen(test, fit.kind)
    counts = fit.likelihood == "Binomial"
    if counts:
        x, held_out = (x * (LEVELS - 1)).round(), (held_out * (LEVELS - 1)).round()
    torch.manual_seed(fit.seed)
    encoder = Divided() if counts else pv.nets.MLP(PIXELS, hidden=HIDDEN)
    vae = pv.VAE(prior=PRIORS[fit.prior](x), likelihood=LIKELIHOODS[fit.likelihood][1](), guide=GUIDES[fit.guide](encoder))
    start = time.perf_counter()
    history = pv.fit(
        vae, x, held_out, objective=OBJECTIVES[fit.objective](), epochs=epochs, lr=2e-3, seed=fit.seed, progress=False
    )
    fitted = time.perf_counter()
    method = {"method": pv.posterior.Laplace(num_starts=8), "num_particles": 1000} if fit.prior == "Flow" else {}
    estimate = pv.log_evidence(vae, held_out, seed=1, **method)
    judged = time.perf_counter()
    usage = pv.diagnostics.latent_usage(vae, held_out, seed=1)
    record = {
        **asdict(fit),
        "kind": fit.kind,
        "log_p": estimate.mean,
        "monte_carlo_error": estimate.mean_standard_error,
        "data_error": estimate.data_standard_error,
        "reliable": int(estimate.reliable.sum()),
        "rows": len(estimate),
        "elbo": history.valid_elbo[-1],
        "bits_per_dimension": bits(estimate.mean, fit.kind),
        "active_units": int(usage.active.sum()),
        "seconds_fit": fitted - start,
        "seconds_judge": judged - fitted,
    }
    return record, estimate.log_p.numpy()


def bits(log_p: float, kind: str) -> float:
    """Bits per pixel of grey levels or bits; of a density of dequantised levels the upper bound."""
    return -log_p / (PIXELS * math.log(2.0)) + (math.log2(LEVELS) if kind == "density" else 0.0)


def collect(folder: Path) -> list[tuple[Fit, dict[str, Any], np.ndarray[Any, Any]]]:
    """What is finished, in the order of `everything`."""
    found = []
    for fit in everything():
        record = folder / f"{fit.file}.json"
        if record.exists():
            told = json.loads(record.read_text())
            found.append((fit, told, np.array(told.pop("rows_log_p"))))
    return found


def gains(found: list[tuple[Fit, dict[str, Any], np.ndarray[Any, Any]]]) -> list[dict[str, Any]]:
    """Every swap against StandardNormal, DiagonalNormal, ELBO with the same likelihood: paired over rows, mean of seeds."""
    values = {fit: log_p for fit, _, log_p in found}
    table: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for fit, log_p in values.items():
        base = Fit(fit.likelihood, seed=fit.seed)
        if fit == base or base not in values:
            continue
        differences = log_p - values[base]
        error = float(differences.std(ddof=1) / math.sqrt(len(differences)))
        what = next(
            (role, getattr(fit, role))
            for role in ("prior", "guide", "objective")
            if getattr(fit, role) != getattr(base, role)
        )
        table.setdefault((fit.likelihood, *what), []).append((float(differences.mean()), error))
    return [
        {
            "likelihood": likelihood,
            "swapped": role,
            "to": name,
            "seeds": len(pairs),
            "gain": float(np.mean([mean for mean, _ in pairs])),
            "data_error": float(np.mean([error for _, error in pairs])),
            "seed_spread": float(np.std([mean for mean, _ in pairs], ddof=1)) if len(pairs) > 1 else math.nan,
        }
        for (likelihood, role, name), pairs in table.items()
    ]


def report(folder: Path, budget: dict[str, int]) -> None:
    """Print the table, write JSON and figure."""
    found = collect(folder)
    heads = f"{'likelihood':28}{'prior':16}{'guide':23}{'objective':10}"
    print(f"{heads}{'log p(x), nats':>16}{'± MC':>9}{'± data':>8}{'seeds':>7}{'bits':>8}")
    groups: dict[Fit, list[dict[str, Any]]] = {}
    for fit, record, _ in found:
        groups.setdefault(Fit(fit.likelihood, fit.prior, fit.guide, fit.objective), []).append(record)
    for fit, records in groups.items():
        means = [record["log_p"] for record in records]
        print(
            f"{fit.likelihood:28}{fit.prior:16}{fit.guide:23}{fit.objective:10}{np.mean(means):16.2f}"
            f"{max(r['monte_carlo_error'] for r in records):9.3f}{np.mean([r['data_error'] for r in records]):8.1f}"
            f"{len(records):7}{('<' if fit.kind == 'density' else '')}{bits(float(np.mean(means)), fit.kind):7.3f}"
        )
    table = gains(found)
    RESULTS.mkdir(exist_ok=True)
    content = {"budget": budget, "fits": [record for _, record, _ in found], "gains": table}
    (RESULTS / "swap.json").write_text(json.dumps(content, indent=1) + "\n")
    values = {fit: record["log_p"] for fit, record, _ in found}
    both = [[Fit(f"Normal, s {s}", prior, seed=seed) for s in ("= 1", "learned")] for prior in PRIORS for seed in SEEDS]
    pairs = [values[b] - values[a] for a, b in both if a in values and b in values]
    if pairs:
        print(f"a learned shared s beats s = 1 by {min(pairs):.0f} to {max(pairs):.0f} nats ({len(pairs)} pairs)")
    draw(found, table)


def draw(found: list[tuple[Fit, dict[str, Any], np.ndarray[Any, Any]]], table: list[dict[str, Any]]) -> None:
    """Left: bits per pixel by likelihood; right: what each swap gains over the base, each likelihood a row of points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 10), layout="constrained", width_ratios=[1, 1.8])
    names = [name for name in LIKELIHOODS if any(fit.likelihood == name for fit, _, _ in found)]
    looks = {
        "density": ("#0072B2", "o", "8-bit levels, upper bound from a dequantised density"),
        "levels": ("#D55E00", "s", "8-bit levels"),
        "bits": ("#009E73", "D", "binarised pixels (other data)"),
    }
    for kind, (colour, marker, label) in looks.items():
        base = [
            (names.index(fit.likelihood), record["bits_per_dimension"])
            for fit, record, _ in found
            if fit.kind == kind and fit == Fit(fit.likelihood, seed=fit.seed)
        ]
        if base:
            rows, values = zip(*base, strict=True)
            left.scatter(values, rows, color=colour, marker=marker, label=label, alpha=0.8)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("bits per pixel of held-out images (lower is better)")
    left.set_title("Likelihoods, prior N(0, I)")
    left.legend(loc="best", fontsize=8)
    swaps = list(dict.fromkeys((row["swapped"], row["to"]) for row in table))
    markers = "osD^v<>Phd*X"
    colours = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"]
    for number, swap in enumerate(swaps):
        mine = [row for row in table if (row["swapped"], row["to"]) == swap]
        right.errorbar(
            [row["gain"] for row in mine],
            [names.index(row["likelihood"]) + (number - len(swaps) / 2) * 0.065 for row in mine],
            xerr=[1.96 * row["data_error"] for row in mine],
            fmt=markers[number % len(markers)],
            color=colours[number % len(colours)],
            markersize=4,
            linewidth=0.8,
            markerfacecolor="none" if swap[0] == "objective" else None,
            label=f"{swap[0]} {swap[1]}",
        )
    right.set_xscale("symlog", linthresh=1.0)
    right.axvline(0.0, color="0.6", linewidth=0.8)
    right.set_yticks(range(len(names)), [""] * len(names))
    right.set_ylim(left.get_ylim())
    right.set_xlabel("gain in held-out log p(x), nats an image (paired; bars: 1.96 data errors)")
    right.set_title("One part swapped, against N(0, I), DiagonalNormal, ELBO")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=6)
    figure.savefig(RESULTS / "swap.png", dpi=150)
    plt.close(figure)


def main() -> None:
    """Fit what is not finished, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=6_400)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--share", default="0/1", help="which of how many processes this is, such as 1/2")
    parser.add_argument("--report", action="store_true", help="fit nothing")
    options = parser.parse_args()
    mine, processes = map(int, options.share.split("/"))
    budget = {"train": options.train, "epochs": options.epochs, "rows": options.rows}
    folder = Path("runs/swap") / "-".join(map(str, budget.values()))
    folder.mkdir(parents=True, exist_ok=True)
    data = pv.data.load("mnist").split(valid=1 / 6, seed=0)
    train, test = data.train.x[: options.train].clone(), data.test.x[: options.rows].clone()
    for number, fit in enumerate(everything()):
        path = folder / f"{fit.file}.json"
        if options.report or number % processes != mine or path.exists():
            continue
        record, log_p = run(fit, train, test, options.epochs)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**record, "rows_log_p": log_p.tolist()}))
        fresh.replace(path)
        seconds = f"{record['seconds_fit']:.0f} + {record['seconds_judge']:.0f} s"
        print(
            f"{fit.file}: {record['log_p']:.2f} nats, {record['reliable']}/{record['rows']} reliable, {seconds}", flush=True
        )
    report(folder, budget)


if __name__ == "__main__":
    main()
