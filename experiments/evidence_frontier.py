"""Claim: log p(x) by the cascade is right where it says so, and cheaper than importance sampling through the encoder.

    PYRO_VAE_DATA=... python experiments/evidence_frontier.py [--parts linear mnist ...] [--models FOLDER]

Fits the two VAEs of MNIST that the claims are about (784-200-200-z: Gaussian with learned s and z = 10; Bernoulli and
z = 50; 25 epochs each) unless `--models` names a folder that holds them, and writes one part of experiments/results/
evidence_frontier.json after another, and a figure of nats against seconds. Compare seconds within a run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from linear_gaussian import LinearGaussian

RESULTS = Path(__file__).parent / "results"
KINDS = {"gaussian": 10, "bernoulli": 50}


def models(folder: Path, kind: str) -> tuple[pv.VAE, Tensor]:
    """The VAE of this kind, fitted where the folder lacks it, and the test images as it sees them."""
    data = pv.data.load("mnist").split(valid=1 / 6, seed=0)
    view = (lambda x, seed: pv.data.binarise(x, seed=seed)) if kind == "bernoulli" else (lambda x, seed: x)
    path = folder / kind
    if not path.with_suffix(".safetensors").exists():
        torch.manual_seed(0)
        decoder = pv.nets.MLP(KINDS[kind], 784, hidden=(200, 200))
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(KINDS[kind]),
            likelihood=pv.likelihoods.Bernoulli(decoder)
            if kind == "bernoulli"
            else pv.likelihoods.Normal(decoder, scale=pv.likelihoods.Learned()),
            guide=pv.guides.DiagonalNormal(pv.nets.MLP(784, hidden=(200, 200)), latent_dim=KINDS[kind]),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*columns of x are constant")
            transform = pv.data.binarise if kind == "bernoulli" else None
            pv.fit(vae, data.train.x, view(data.valid.x, 1), epochs=25, batch_size=128, lr=1e-3, transform=transform)
        vae.save(path)
    return pv.load(path), view(data.test.x, 2).clone()


def timed(*args: Any, **kwargs: Any) -> tuple[pv.Estimate, float]:
    """`pv.log_evidence` and its seconds."""
    start = time.perf_counter()
    estimate = pv.log_evidence(*args, **kwargs)
    return estimate, time.perf_counter() - start


def facts(estimate: pv.Estimate, seconds: float) -> dict[str, Any]:
    """What is reported of an estimate."""
    return {
        "seconds": seconds,
        "log_p": estimate.mean,
        "standard_error_of_mean": estimate.mean_standard_error,
        "mean_bias": float(estimate.bias.mean()),
        "reliable": float(estimate.reliable.double().mean()),
        "engines": dict(Counter(estimate.engine)),
        "evaluations_per_row": float(estimate.evaluations.double().mean()),
        "unreliable_because": dict(Counter(filter(None, estimate.reasons))),
    }


def against(estimate: pv.Estimate, truth: Tensor) -> dict[str, Any]:
    """Errors of an estimate whose rows are known."""
    error, sure = estimate.log_p - truth, estimate.reliable
    low, high = estimate.interval(0.95)
    inside = (low <= truth) & (truth <= high)
    within = error.abs() <= 3.0 * estimate.standard_error + estimate.bias.abs()
    return {
        "largest_error": float(error.abs().max()),
        "mean_error": float(error.mean()),
        "mean_within_3_errors": bool(abs(error.mean()) <= 3.0 * estimate.mean_standard_error + abs(estimate.bias.mean())),
        "rows_within_3_errors_and_bias": float(within.double().mean()),
        "reliable": float(sure.double().mean()),
        "covered_of_reliable": float(inside[sure].double().mean()) if bool(sure.any()) else math.nan,
        "largest_error_of_reliable": float(error[sure].abs().max()) if bool(sure.any()) else math.nan,
        "reliable_wrong_by_half_a_nat": int((error[sure].abs() > 0.5).sum()),
    }


def linear() -> dict[str, Any]:
    """Linear-Gaussian models, 1,000 rows, against the closed form; 2,000 rows for the coverage of the cascade."""
    methods = {
        "exact": (pv.evidence.exact, None),
        "laplace": (pv.posterior.laplace, 4000),
        "annealed": (pv.posterior.annealed, 64),
    }
    out: dict[str, Any] = {}
    for latent_dim in (2, 10, 50):
        known = LinearGaussian(dim=60, latent_dim=latent_dim)
        program = known.program(inflate=2.0, shift=1.0)
        x = known.draw(1000)
        for name, (method, count) in methods.items():
            estimate, seconds = timed(program, x, method=method, num_particles=count, seed=1)
            out[f"D={latent_dim} {name}"] = {"seconds": seconds, **against(estimate, known.log_p(x))}
        many = known.draw(2000, seed=5)
        estimate, seconds = timed(program, many, seed=2)
        out[f"D={latent_dim} cascade, 2,000 rows"] = {"seconds": seconds, **against(estimate, known.log_p(many))}
    return out


def planar(name: str) -> tuple[pv.Program, Tensor]:
    """A program with one or two latent dimensions whose posterior no Gaussian fits, and 200 rows drawn from it."""
    dtype, torch_scale = torch.float64, 0.3
    plane = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    exponential = dist.Exponential(torch.tensor(0.7, dtype=dtype))
    prior, likelihood = {
        "four modes": (plane, lambda z: dist.Normal(z.abs(), torch_scale).to_event(1)),
        "two modes": (
            plane,
            lambda z: dist.Normal(torch.stack([z[..., 0].abs(), z[..., 1] + 0.3 * z[..., 0]], -1), torch_scale).to_event(1),
        ),
        "ring": (plane, lambda z: dist.Normal(z.square().sum(-1), torch_scale)),
        "bent": (
            plane,
            lambda z: dist.Normal(
                torch.stack([z[..., 0] * z[..., 1], z[..., 0].square() - z[..., 1]], -1), torch_scale
            ).to_event(1),
        ),
        "exponential prior, Student t": (exponential, lambda z: dist.StudentT(3.0, z, 0.5)),
    }[name]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = likelihood(prior.sample((200,))).sample()
    return pv.Program(model, guide), x


def multimodal() -> dict[str, Any]:
    """The cascade with target 0.005 nats against quadrature, beside Laplace from one start."""
    out = {}
    for name in ("four modes", "two modes", "ring", "bent", "exponential prior, Student t"):
        program, x = planar(name)
        truth, quadrature = timed(program, x, method=pv.evidence.exact)
        estimate, seconds = timed(program, x, target=0.005, seed=1)
        one, _ = timed(program, x, method=pv.posterior.Laplace(num_starts=1), seed=1)
        out[name] = {
            "seconds": seconds,
            "seconds_of_quadrature": quadrature,
            "largest_error_of_one_start": float((one.log_p - truth.log_p).abs().max()),
            **against(estimate, truth.log_p),
            "engines": dict(Counter(estimate.engine)),
        }
    return out


def mnist(vae: pv.VAE, x: Tensor) -> dict[str, Any]:
    """All test images by the cascade, and by the guide with 5,000 particles."""
    cascade, seconds = timed(vae, x, seed=1)
    guide, guide_seconds = timed(vae, x, method=pv.posterior.from_guide, num_particles=5000, seed=1)
    return {"cascade": facts(cascade, seconds), "guide, K=5,000": facts(guide, guide_seconds)}


def missed(vae: pv.VAE, x: Tensor) -> dict[str, Any]:
    """Reliable rows in which the cascade has missed mass that `laplace` with 64 starts finds, in 6 runs on 2,048 images."""
    few = x[:2048]
    best = pv.log_evidence(vae, few, method=pv.posterior.Laplace(num_starts=64), num_particles=1000, seed=77)
    runs = [pv.log_evidence(vae, few, seed=seed) for seed in range(20, 26)]
    low = [(best.log_p - run.log_p)[run.reliable] for run in runs]
    return {
        "reliable": sum(map(len, low)),
        "reliable_more_than_0.3_nats_low": sum(int((part > 0.3).sum()) for part in low),
        "reliable_more_than_0.3_nats_high": sum(int((part < -0.3).sum()) for part in low),
        "largest": max(float(part.max()) for part in low),
        "mean_low": float(torch.cat(low).mean()),
        "standard_error": sum(run.mean_standard_error for run in runs) / len(runs),
    }


def bounds(vae: pv.VAE, x: Tensor) -> dict[str, Any]:
    """Sandwiches on 1,000 simulated and 1,000 real rows; the cascade on the simulated ones judged by theirs."""
    out: dict[str, Any] = {}
    boxes = {}
    for kind, rows in (("simulated", None), ("real", x[:1000])):
        start = time.perf_counter()
        box = pv.evidence.sandwich(vae, rows, num_simulated=1000 if rows is None else None, seed=3)
        width = box.width[torch.isfinite(box.width)]
        out[kind] = {
            "seconds": time.perf_counter() - start,
            "mean_width": box.mean_width,
            "standard_error": box.mean_width_standard_error,
            "largest_width": float(width.max()),
            "rows_wider_than_1_nat": int((width > 1.0).sum()),
            "rows_without_a_side": len(box) - len(width),
        }
        boxes[kind] = box
    simulated = boxes["simulated"]
    estimate, seconds = timed(vae, simulated.x, seed=4)
    sure = estimate.reliable
    low = (simulated.upper - estimate.log_p > 0.5) & sure
    high = (estimate.log_p - simulated.lower > 0.5 + 3.0 * simulated.lower_standard_error) & sure
    out["cascade on simulated rows"] = {
        **facts(estimate, seconds),
        "reliable_more_than_half_a_nat_below_upper": int(low.sum()),
        "reliable_more_than_half_a_nat_above_lower": int(high.sum()),
    }
    return out


def baseline(vae: pv.VAE) -> dict[str, Any]:
    """What two-sided AIS with a linear schedule from the prior, 500 temperatures, 16 chains, leaves on 50 rows."""
    linear_schedule = pv.posterior.Annealed(
        start=pv.posterior.at_prior, num_leapfrog=10, first_steps=500, most_steps=500, power=1.0
    )
    start = time.perf_counter()
    box = pv.evidence.sandwich(vae, num_simulated=50, method=linear_schedule, num_particles=16, seed=5)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    ours = pv.evidence.sandwich(vae, num_simulated=50, seed=5)
    return {
        "linear schedule": {"seconds": seconds, "mean_width": box.mean_width},
        "ours": {"seconds": time.perf_counter() - start, "mean_width": ours.mean_width},
    }


def frontier(vae: pv.VAE, x: Tensor) -> dict[str, Any]:
    """Nats and seconds of each engine at several sizes, on 500 images."""
    few = x[:500]
    out = {}
    for name, method, counts in (
        ("prior", pv.posterior.from_prior, (100, 1000, 5000)),
        ("guide", pv.posterior.from_guide, (50, 500, 5000)),
        ("laplace", pv.posterior.laplace, (25, 100, 400)),
        ("annealed from the guide", pv.posterior.Annealed(start=pv.posterior.at_guide, most_steps=64), (16,)),
    ):
        for count in counts:
            estimate, seconds = timed(vae, few, method=method, num_particles=count, seed=6)
            out[f"{name}, K={count}"] = facts(estimate, seconds)
    estimate, seconds = timed(vae, few, seed=6)
    out["cascade"] = facts(estimate, seconds)
    return out


def draw(found: dict[str, Any], path: Path) -> None:
    """Nats below the cascade against seconds, a panel a model."""
    from matplotlib import pyplot as plt

    panels = [kind for kind in KINDS if f"frontier {kind}" in found]
    axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), layout="constrained", squeeze=False)[1][0]
    styles = {
        "prior": ("#999999", "s"),
        "guide": ("#D55E00", "o"),
        "laplace": ("#0072B2", "^"),
        "annealed": ("#009E73", "D"),
    }
    for ax, kind in zip(axes, panels, strict=True):
        entries = found[f"frontier {kind}"]
        best = entries["cascade"]["log_p"]
        for word, (colour, marker) in styles.items():
            mine = [(e["seconds"], best - e["log_p"]) for name, e in entries.items() if name.startswith(word)]
            ax.plot(*zip(*mine, strict=True), color=colour, marker=marker, label=word)
        ax.plot(entries["cascade"]["seconds"], 0.0, color="black", marker="*", markersize=12, linestyle="", label="cascade")
        ax.set(
            xscale="log", xlabel="seconds for 500 images", ylabel="nats below the cascade", title=f"{kind}, D={KINDS[kind]}"
        )
        ax.set_yscale("symlog", linthresh=0.01)
        ax.invert_yaxis()
    axes[0].legend()
    pv.plots.save(axes[0], path)


def main() -> None:
    """Run the parts that were asked for, and keep the results of the others."""
    every = ["linear", "multimodal", "frontier", "sandwich", "baseline", "mnist", "missed"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--models", type=Path, default=RESULTS.parent / "models")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "evidence_frontier.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(name: str, result: dict[str, Any]) -> None:
        found[name] = result
        found["about"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(name, json.dumps(result, indent=2), flush=True)

    for name, part in (("linear", linear), ("multimodal", multimodal)):
        if name in options.parts:
            keep(name, part())
    for name, on_rows in (("frontier", frontier), ("sandwich", bounds), ("mnist", mnist), ("missed", missed)):
        for kind in KINDS if name in options.parts else ():
            keep(f"{name} {kind}", on_rows(*models(options.models, kind)))
    if "baseline" in options.parts:
        keep("baseline", baseline(models(options.models, "bernoulli")[0]))
    if "frontier gaussian" in found:
        draw(found, RESULTS / "evidence_frontier.png")


if __name__ == "__main__":
    main()
