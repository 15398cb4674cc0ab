"""Claim: what pyro_vae does on a CPU it does on a GPU, without the host waiting, and as fast as the hardware allows.

    python experiments/gpu_check.py [--device cuda] [--quick]

does everything that a machine without a GPU leaves open (about ten minutes; --quick: one), and answers yes or no to each:

* same: a fit with compile=True has the losses of one without, for Adam in the graph, SGD outside of it, BatchNorm, dropout;
* graphs: TorchInductor made CUDA graphs of the step (it counts what it skips; the profiler sees them launched);
* waits: between two readings of the loss the host waits for the device not once (`torch.cuda.set_sync_debug_mode`);
* speed: milliseconds a step in turns, medians of rounds: Pyro, PyTorch by hand, eager and compiled, ours; for two sizes;
* precision: what TF32 and bfloat16 do to the ELBO, and to a step;
* memory: the most that is allocated in a step, against PyTorch by hand;
* evidence: log p(x) on the device is that on the CPU;
* ranks: `torchrun` on all GPUs, if there are several.

Results go to experiments/results/gpu_check.json and .png. Without a GPU it says so and ends with code 2; `--device cpu`
takes the same way on the processor, leaves out what makes no sense there, and writes nothing but to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from gpu_steps import SIZES, Bench, captured, contestants, images, vae_of

import pyro_vae as pv
from pyro_vae.learning.precision import NAMES

RESULTS = Path(__file__).parent / "results" / "gpu_check.json"


def check_same(bench: Bench) -> dict[str, Any]:
    """Largest relative difference of the losses of compiled and eager fits."""
    size, found = SIZES[1], {}
    cases: dict[str, dict[str, Any]] = {
        "Adam": {},
        "SGD": {"optimiser": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)},
        "IWAE, clipped": {"objective": pv.objectives.IWAE(4), "clip_norm": 10.0},
        "Trace_ELBO": {"objective": pyro.infer.Trace_ELBO()},
        "BatchNorm and dropout": {"noisy": True},
    }
    for name, case in cases.items():
        settings = dict(case)
        noisy, fits = settings.pop("noisy", False), []
        for mode in (False, True):
            vae, x = vae_of(size, noisy=noisy), images(1000, size)
            fits.append(
                pv.fit(vae, x, epochs=2, batch_size=64, compile=mode, device=bench.device, progress=False, **settings)
            )
        worst = max(abs(a - b) / abs(a) for a, b in zip(fits[0].loss, fits[1].loss, strict=True))
        compiled = fits[1].compiled_from is not None
        found[name] = {
            "difference": worst,
            "compiled": compiled,
            "why": fits[1].why_eager,
            "holds": compiled and worst < 1e-4,
        }
    return found


def check_graphs(bench: Bench) -> dict[str, Any]:
    """Whether the compiled step is one launch of a CUDA graph."""
    from torch._dynamo.utils import counters

    counters["inductor"].clear()
    rows = images(64, SIZES[1], bench.device)
    found: dict[str, Any] = {}
    for name, optimiser in (("Adam", None), ("SGD", lambda leaves: torch.optim.SGD(leaves, lr=1e-3))):
        step = captured(vae_of(SIZES[1]), rows, optimiser=optimiser)
        for number in range(1, 6):  # one to warm up, one to record
            step.take((rows,), number)
        skips = counters["inductor"]["cudagraph_skips"]
        if not bench.on_cuda:
            found[name] = {"skips": skips, "holds": skips == 0}
            continue
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for number in range(10):
                step.take((rows,), number)
            bench.wait()
        launched = sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")
        kernels = sum(event.count for event in profile.key_averages() if event.key == "cudaLaunchKernel")
        found[name] = {"skips": skips, "launches": launched, "kernels": kernels, "holds": skips == 0 and launched == 10}
        counters["inductor"].clear()
    return found


@contextlib.contextmanager
def never_waiting(bench: Bench) -> Iterator[None]:
    """On a GPU: whatever makes the host wait raises."""
    if not bench.on_cuda:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_waits(bench: Bench) -> dict[str, Any]:
    """Fifty steps and one reading."""
    rows = images(1000, SIZES[1], bench.device)
    index = torch.arange(64, device=bench.device)
    found = {}
    for name, optimiser in (("Adam", None), ("SGD", lambda leaves: torch.optim.SGD(leaves, lr=1e-3))):
        step = captured(vae_of(SIZES[1]), rows[:64], optimiser=optimiser)
        step.interval = 50
        for number in range(1, 4):
            step.take((rows.index_select(0, index),), number)
        try:
            with never_waiting(bench):
                for number in range(4, 54):
                    step.take((rows.index_select(0, index),), number)
            why = ""
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        found[name] = {"why": why, "steps": step.read().steps, "holds": not why}
    return found


def check_speed(bench: Bench) -> dict[str, Any]:
    """Milliseconds a step."""
    found: dict[str, Any] = {}
    for size in bench.sizes:
        runs = contestants(size, bench)
        for run in runs.values():
            run(5)
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(bench.rounds):
            for name in list(runs)[:: 1 if number % 2 else -1]:
                bench.wait()
                start = time.perf_counter()
                runs[name](bench.steps)
                bench.wait()
                spent[name].append(1e3 * (time.perf_counter() - start) / bench.steps)
        found[str(size)] = {name: {"ms": statistics.median(each), "rounds": each} for name, each in spent.items()}
    return found


def check_precision(bench: Bench) -> dict[str, Any]:
    """Validation ELBO (always judged in full precision) and the gap of a fit in each precision, nats a row."""
    size, found = bench.sizes[0], {}
    for name in NAMES:
        history = pv.fit(
            vae_of(size), images(2000, size), images(2400, size)[2000:], epochs=3, compile=True, precision=name,
            device=bench.device, progress=False,
        )  # fmt: skip
        found[name] = {"valid_elbo": history.valid_elbo[-1], "gap": history.precision_gap, "why": history.why_eager}
    return found


def check_memory(bench: Bench) -> dict[str, Any]:
    """MiB allocated at most during steps of the first size, each beside nothing else."""
    if not bench.on_cuda:
        return {}
    found, size = {}, bench.sizes[0]
    for name in ("PyTorch eager", "pyro_vae, full"):
        run = contestants(size, bench)[name]
        run(3)
        bench.wait()
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        run(20)
        found[name] = (torch.cuda.max_memory_allocated(bench.device) - before) / 2**20
    return found


def check_evidence(bench: Bench) -> dict[str, Any]:
    """log p(x) of the same rows on both: with the error of the difference, which draws of other generators have."""
    vae, found = vae_of(SIZES[1]), {}
    x = images(bench.rows, SIZES[1])
    pv.fit(vae, images(2000, SIZES[1]), epochs=3, device="cpu", progress=False)
    for name in ("from_guide", "laplace"):
        values = []
        for device in ("cpu", bench.device):
            method = getattr(pv.posterior, name)
            values.append(
                pv.log_evidence(vae.to(device), x.to(device), method=method, num_particles=bench.particles, seed=3)
            )
        here, there = (each.log_p.double().cpu() for each in values)
        error = sum(each.standard_error.double().cpu() ** 2 for each in values) ** 0.5
        z = (there - here) / (error + 1e-4)
        found[name] = {"largest_z": z.abs().max().item(), "holds": bool((z.abs() < 6.0).all())}
    return found


def check_ranks(bench: Bench) -> dict[str, Any]:
    """A fit of the digits by `torchrun` with one rank a GPU."""
    count = torch.cuda.device_count() if bench.on_cuda else 0
    if count < 2:
        return {"gpus": count}
    with tempfile.TemporaryDirectory() as folder:
        fit = ["-m", "pyro_vae", "fit", "digits", "--latent", "4", "--epochs", "2", "--out", f"{folder}/run"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *fit]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return {"gpus": count, "told": done.stderr.strip().splitlines()[-1:], "holds": done.returncode == 0}


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "same": check_same, "graphs": check_graphs, "waits": check_waits, "speed": check_speed, "precision": check_precision,
    "memory": check_memory, "evidence": check_evidence, "ranks": check_ranks,
}  # fmt: skip


def failures(found: Any, at: str = "") -> list[str]:
    """Where something does not hold."""
    if not isinstance(found, dict):
        return []
    own = [at] if found.get("holds") is False else []
    return own + [where for name, part in found.items() for where in failures(part, f"{at}/{name}".strip("/"))]


def draw(speed: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds a step, one panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(speed), figsize=(5 * len(speed), 3.5), layout="constrained", squeeze=False)
    for ax, (size, rows) in zip(axes[0], speed.items(), strict=True):
        ax.barh(list(rows), [row["ms"] for row in rows.values()], color="#0072B2")
        ax.set(title=size, xlabel="ms a step")
        ax.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    """All checks, or those named; 0 if all hold, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, the small size alone")
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, separated by commas")
    parser.add_argument("--out", type=Path, help="the JSON file; the figure goes beside it")
    options = parser.parse_args()
    if strange := [name for name in options.only.split(",") if name not in CHECKS]:
        parser.error(f"no check {strange[0]!r}: {', '.join(CHECKS)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "There is no GPU here that torch can use, so nothing was checked; --device cpu tries the way on the processor."
        )
        return 2
    bench = Bench(torch.device(options.device), quick=options.quick)
    what = torch.cuda.get_device_name(bench.device) if bench.on_cuda else platform.processor()
    result: dict[str, Any] = {"device": f"{bench.device}, {what}", "torch": torch.__version__}
    for name in options.only.split(","):
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                result[name] = CHECKS[name](bench)
            result[name]["warnings"] = sorted({str(each.message) for each in told if each.category is RuntimeWarning})
        except Exception as error:
            result[name] = {"holds": False, "error": f"{type(error).__name__}: {error}"}
        print(name, json.dumps(result[name], indent=1), flush=True)
    path = options.out or (RESULTS if bench.on_cuda else None)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
        if "speed" in result and "error" not in result["speed"]:
            draw({size: rows for size, rows in result["speed"].items() if isinstance(rows, dict)}, path.with_suffix(".png"))
    broken = failures(result)
    print(f"{'All' if not broken else 'Not all'} of it holds{': ' * bool(broken)}{', '.join(broken)}.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
