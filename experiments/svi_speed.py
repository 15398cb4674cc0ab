"""Claim: stochastic variational inference at the speed of the hardware, for a model that is nothing but Pyro.

    PYRO_VAE_DATA=... python experiments/svi_speed.py [--quick] [--parts steps,quality,growth,run,memory]

needs the extra `peers` (NumPyro, pythae); a peer that is not installed is reported as such. One VAE (svi_vae.py) is trained
by every contestant (svi_peers.py, svi_ours.py):

* steps: milliseconds a step for two sizes, from drawing the batch to the optimiser's update. All contestants live in one
  process and take turns: in each round each of them runs one block of steps, in another order each round; a block in which
  other processes kept the machine busy is repeated, a few times at most. Medians of the rounds; ratios are medians of the
  rounds' ratios. The first block, with its compilation (TorchInductor's cache is empty at the start), is timed apart;
* quality: seconds to a fixed ELBO of validation rows of MNIST, also in turns, with compilation and without. Judging is not
  counted; between two judgements the time is interpolated;
* growth: steps a second against batch size, width and latent size;
* run: an epoch of `pv.fit`, whole, against the sum of its steps;
* memory: peak memory of `pv.fit` against PyTorch written by hand, each in a process of its own.

Threads are as torch and JAX choose them. What is measured goes into experiments/results/svi_speed.json, the parts not asked
for stay there as they are, and the figure svi_speed.png is drawn from all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from svi_clock import DISTURBED, Block, timed, turns, undisturbed, wait_for_quiet
from svi_figure import draw
from svi_ours import OURS
from svi_peers import FLOOR, PEERS, QUALITY_ALONE
from svi_runs import in_a_process
from svi_vae import Builder, Contestant, Size, mean_elbo
from torch import Tensor

import pyro_vae as pv

RESULTS = Path(__file__).parent / "results"
LARGE, SMALL = Size(), Size(pixels=64, hidden=64, latent=8, batch=64)
SVI, SCAN, UPDATE = "Pyro SVI.step, TraceMeanField_ELBO", "NumPyro lax.scan", "NumPyro jit(update)"
GROWING = (SVI, "PyTorch eager, fused Adam", SCAN, *OURS, FLOOR)
"""Whose growth is shown."""
CLAIMS = [
    (LARGE, "pyro_vae", SVI, 0.5),
    (LARGE, "pyro_vae", SCAN, 1.0),
    (LARGE, "pyro_vae", FLOOR, 1.5),
    (SMALL, "pyro_vae", SVI, 0.15),
    (SMALL, "pyro_vae", UPDATE, 0.9),
    (SMALL, "pyro_vae", SCAN, 1.2),
]
"""At most this times as long a step."""


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        rounds: blocks of steps each contestant runs.
        trials: how often a block is run at most, for a quiet one.
        large, small: steps a block for the two sizes.
        target: validation ELBO in nats, the quality to reach.
        repeats: times the quality is reached.
        epochs: of a whole run.
        axes: sizes that grow, one field at a time.
    """

    rounds: int = 9
    trials: int = 6
    large: int = 150
    small: int = 600
    target: float = -103.0
    repeats: int = 1
    epochs: int = 8
    batch: tuple[int, ...] = (16, 64, 128, 256, 1024)
    hidden: tuple[int, ...] = (25, 100, 200, 400, 1600)
    latent: tuple[int, ...] = (2, 10, 20, 50, 200)


QUICK = Budget(
    rounds=7,
    trials=2,
    large=50,
    small=200,
    target=-120.0,
    repeats=1,
    epochs=3,
    batch=(32, 256),
    hidden=(100, 800),
    latent=(5, 50),
)


def built(builders: Mapping[str, Builder], size: Size, rows: Tensor) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The contestants that can be built, and why the others cannot."""
    torch.compiler.reset()  # or it gives up compiling at the ninth size
    contestants, missing = {}, {}
    for name, build in builders.items():
        try:
            contestants[name] = build(size, rows)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return contestants, missing


def blocks(
    builders: Mapping[str, Builder], size: Size, rows: Tensor, steps: int, rounds: int, trials: int
) -> dict[str, Any]:
    """Milliseconds a step in each round, by contestant; the first block is apart."""
    contestants, missing = built(builders, size, rows)
    first = {name: timed(lambda run=each.run: run(steps)).seconds for name, each in contestants.items()}
    for each in contestants.values():  # once more, now that all have started their threads
        each.run(steps)
    seen: dict[str, list[Block]] = {name: [] for name in contestants}
    for order in turns(list(contestants), rounds):
        for name in order:
            seen[name].append(undisturbed(lambda run=contestants[name].run: run(steps), trials))
    found: dict[str, Any] = {name: {"missing": why} for name, why in missing.items()}
    for name, each in seen.items():
        ms = [1e3 * block.seconds / steps for block in each]
        found[name] = {
            "ms": statistics.median(ms),
            "least": min(ms),
            "most": max(ms),
            "rounds": ms,
            "processors": statistics.median(block.processors for block in each),
            "others": [round(block.others, 3) for block in each],
            "compile_seconds": max(0.0, first[name] - 1e-3 * steps * statistics.median(ms)),
        }
    return {name: found[name] for name in builders}


def measure_steps(budget: Budget) -> dict[str, Any]:
    """Both sizes."""
    found = {}
    for size, steps in ((LARGE, budget.large), (SMALL, budget.small)):
        rows = torch.rand(20_000, size.pixels).bernoulli()
        found[str(size)] = blocks({**PEERS, **OURS}, size, rows, steps, budget.rounds, budget.trials)
        print(f"\n{size}: ms a step (least, most); processors busy; seconds to compile; most of others")
        for name, row in found[str(size)].items():
            told = row.get("missing") or (
                f"{row['ms']:8.3f} ({row['least']:.3f}, {row['most']:.3f})"
                f" {row['processors']:6.2f} {row['compile_seconds']:6.1f} {max(row['others']):6.2f}"
            )
            print(f"  {name:38}{told}")
    return found


def measure_growth(budget: Budget) -> dict[str, Any]:
    """Milliseconds a step as one of batch size, width and latent size grows, the others as in 784-400-20, batch 128."""
    everyone = {**PEERS, **OURS}
    found: dict[str, Any] = {}
    for axis in ("batch", "hidden", "latent"):
        for value in getattr(budget, axis):
            size = replace(LARGE, **{axis: value})
            rows = torch.rand(max(4 * value, 4_000) if axis == "batch" else 4_000, size.pixels).bernoulli()
            steps = max(10, min(300, int(3e10 / size.flops)))
            row = blocks(
                {name: everyone[name] for name in GROWING}, size, rows, steps, min(budget.rounds, 5), budget.trials
            )
            found.setdefault(axis, {})[str(value)] = row
            told = ", ".join(f"{name} {1e3 / each['ms']:.0f}" for name, each in row.items() if "ms" in each)
            print(f"{size}: steps a second: {told}", flush=True)
    return found


def measure_quality(budget: Budget) -> dict[str, Any]:
    """Seconds to the target on MNIST, binarised once."""
    data = pv.data.load("mnist").split(valid=1 / 6, seed=0)
    train, valid = pv.data.binarise(data.train.x, seed=7), pv.data.binarise(data.valid.x, seed=8)[:5_000]
    builders = {name: build for name, build in {**PEERS, **QUALITY_ALONE, **OURS}.items() if name != FLOOR}
    found: dict[str, Any] = {name: {"seconds": [], "training_seconds": [], "steps": []} for name in builders}
    for _ in range(budget.repeats):
        contestants, missing = built(builders, LARGE, train)
        found.update({name: {"missing": why} for name, why in missing.items()})
        for name, (seconds, training, steps) in race(contestants, valid, budget.target).items():
            for kind, value in (("seconds", seconds), ("training_seconds", training), ("steps", steps)):
                found[name][kind].append(value)
    print(f"\nseconds to a validation ELBO of {budget.target} nats, medians: all in all, training alone, steps")
    for name, row in found.items():
        medians = [statistics.median(row[kind]) for kind in ("seconds", "training_seconds", "steps") if kind in row]
        print(f"  {name:38}" + (row.get("missing") or "{:8.1f} {:8.1f} {:8.0f}".format(*medians)))
    return {"target": budget.target, "size": str(LARGE), "contestants": found}


def race(contestants: Mapping[str, Contestant], valid: Tensor, target: float) -> dict[str, tuple[float, float, float]]:
    """Seconds with compilation, seconds without, and steps until each reaches the target; who has done so rests.

    A block of training cannot be repeated, so time is steps x the median block, of those in which the machine was quiet if
    there are three; what the first block took beyond that is compilation.
    """
    steps, most = 130, 10_000
    spent: dict[str, list[Block]] = {name: [] for name in contestants}
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for order in turns(list(contestants), most // steps):
        running = [name for name in order if not values[name] or values[name][-1] < target]
        if not running:
            break
        for name in running:
            spent[name].append(timed(lambda run=contestants[name].run: run(steps)))
            values[name].append(mean_elbo(LARGE, contestants[name].weights(), valid))
    found = {}
    for name, each in spent.items():
        if values[name][-1] < target:
            raise RuntimeError(f"{name} has not reached {target} nats in {most} steps, but {values[name][-1]:.2f}")
        quiet = [block.seconds for block in each[1:] if block.quiet]
        usual = statistics.median(quiet if len(quiet) > 2 else [block.seconds for block in each])
        before, after = values[name][-2:]
        needed = len(each) - 1 + (target - before) / (after - before)
        found[name] = (max(0.0, each[0].seconds - usual) + needed * usual, needed * usual, steps * needed)
    return found


def measure_run(budget: Budget) -> dict[str, Any]:
    """An epoch of `pv.fit` on MNIST, loading, validation and progress bar included, against the sum of its steps."""
    wait_for_quiet()
    run = in_a_process("fit", budget.epochs, "mnist")
    ratios = [whole / steps for whole, steps in zip(run["epochs"], run["steps"], strict=True)][1:]  # the first compiles
    print(f"\nan epoch of pv.fit takes {statistics.median(ratios):.3f} x the sum of its steps ({min(ratios):.3f} at least)")
    return {**run, "ratio": statistics.median(ratios)}


def measure_memory(budget: Budget) -> dict[str, Any]:
    """Peak resident memory of `pv.fit` against PyTorch written by hand, each in a process of its own."""
    found = {kind: in_a_process(kind, 2, "random") for kind in ("fit", "hand")}
    ratio = found["fit"]["mib"] / found["hand"]["mib"]
    print(f"\npeak memory of pv.fit: {found['fit']['mib']:.0f} MiB, {ratio:.2f} x that of PyTorch by hand")
    return {**found, "ratio": ratio}


PARTS: dict[str, Callable[[Budget], dict[str, Any]]] = {
    "steps": measure_steps,
    "quality": measure_quality,
    "growth": measure_growth,
    "run": measure_run,
    "memory": measure_memory,
}


def ratio(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, int]:
    """Median of the rounds' ratios, and how many rounds were quiet for both; only these count if there are three."""
    both = list(zip(mine["rounds"], theirs["rounds"], mine["others"], theirs["others"], strict=True))
    quiet = [row for row in both if max(row[2:]) < DISTURBED]
    used = quiet if len(quiet) > 2 else both
    return statistics.median(row[0] / row[1] for row in used), len(quiet)


def judge(steps: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each claim with what was found, and whether it holds."""
    found = []
    for size, mine, theirs, limit in CLAIMS:
        rows = steps.get(str(size), {})
        if all("rounds" in rows.get(name, {}) for name in (mine, theirs)):
            value, quiet = ratio(rows[mine], rows[theirs])
            told = {"size": str(size), "of": mine, "to": theirs, "limit": limit, "ratio": value, "quiet_rounds": quiet}
            found.append({**told, "holds": value <= limit})
            print(
                f"{size}: {mine} takes {value:.2f} x {theirs}, limit {limit}: {'holds' if value <= limit else 'FAILS'}"
                f" ({quiet} quiet rounds)"
            )
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on beside the programs."""
    versions = {}
    for name in ("torch", "pyro-ppl", "jax", "jaxlib", "numpyro", "pythae"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "jax_threads": "as many as processors (XLA's default)",
        "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "XLA_FLAGS") if name in os.environ},
        "load": os.getloadavg()[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, rows and sizes; writes to svi_speed_quick.*")
    parser.add_argument("--parts", default=",".join(PARTS))
    options = parser.parse_args()
    chosen = options.parts.split(",")
    if strange := set(chosen) - set(PARTS):
        parser.error(f"no part {sorted(strange)[0]!r}: {', '.join(PARTS)}")
    path = RESULTS / ("svi_speed_quick.json" if options.quick else "svi_speed.json")
    RESULTS.mkdir(exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in chosen:
            measured = PARTS[name](QUICK if options.quick else Budget())
            result[name] = {"machine": machine(), "found": measured}
            path.write_text(json.dumps(result, indent=1) + "\n")
    if "steps" in result:
        result["claims"] = judge(result["steps"]["found"])
        path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
