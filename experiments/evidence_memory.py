"""Claim: log p(x) of 10,000 MNIST images with 5,000 particles each runs below 2.5 GiB of resident memory, whatever N and K.

    PYRO_VAE_DATA=... python experiments/evidence_memory.py [--rows 10000] [--particles 5000]

Fits a Gaussian VAE (784-200-200-10, 3 epochs: the memory does not depend on how good it is) unless `--model` names a saved
one, evaluates the test images, and writes the peak resident memory of the whole process, the time and the estimate to
experiments/results/evidence_memory.json, and a figure of resident memory against time beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

import pyro_vae as pv

RESULTS = Path(__file__).parent / "results"


def fitted(model: str | None, train: torch.Tensor) -> pv.VAE:
    """A saved VAE, or one fitted for three epochs."""
    if model is not None:
        return pv.load(model)
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(10),
        likelihood=pv.likelihoods.Normal(pv.nets.MLP(10, 784, hidden=(200, 200)), scale=pv.likelihoods.Learned()),
        guide=pv.guides.DiagonalNormal(pv.nets.MLP(784, hidden=(200, 200)), latent_dim=10),
    )
    pv.fit(vae, train, epochs=3)
    return vae


def peak() -> float:
    """Largest resident memory of this process so far, GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--particles", type=int, default=5_000)
    parser.add_argument("--model")
    options = parser.parse_args()
    data = pv.data.load("mnist").split(seed=0)
    vae = fitted(options.model, data.train.x)
    x = data.test.x[: options.rows].clone()
    del data
    before, start = peak(), time.perf_counter()
    seen: list[tuple[int, float, float]] = []
    estimate = pv.log_evidence(
        vae,
        x,
        method=pv.posterior.from_guide,
        num_particles=options.particles,
        on_block=lambda _, done, __: seen.append((done, time.perf_counter() - start, peak())),
    )
    result = {
        "rows": options.rows,
        "particles": options.particles,
        "peak_gib": peak(),
        "peak_before_gib": before,
        "seconds": time.perf_counter() - start,
        "mean": estimate.mean,
        "mean_standard_error": estimate.mean_standard_error,
        "reliable": int(estimate.reliable.sum()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evidence_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(seen, RESULTS / "evidence_memory.png")
    print(json.dumps(result, indent=2))


def draw(seen: list[tuple[int, float, float]], path: Path) -> None:
    """Peak memory so far against rows done."""
    from matplotlib import pyplot as plt

    rows, _, gib = zip(*seen, strict=True)
    ax = plt.subplots(layout="constrained")[1]
    ax.plot(rows, gib, color="#0072B2")
    ax.axhline(2.5, color="#D55E00", linestyle="--")
    ax.annotate("promised", (rows[0], 2.5), va="bottom")
    ax.set(xlabel="rows done", ylabel="peak resident memory so far (GiB)", ylim=(0, 3), title="Memory of log_evidence")
    pv.plots.save(ax, path)


if __name__ == "__main__":
    main()
