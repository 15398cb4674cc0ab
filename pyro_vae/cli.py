"""The command line: pyro-vae fit | evaluate | generate | demo.

Commands import what they need when they run, so that --help answers at once. A user's mistake ends with exit code 2 and one
line; `--debug` before the command shows the traceback instead.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from pyro_vae import __version__
from pyro_vae.launch import Place, place

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(min=1)
STOPPED = 130
"""Exit code after Ctrl-C, the shell's for SIGINT."""
HINTS = {
    "pv.data.binarise": "--transform binarise or --transform threshold",
    "pv.data.dequantise": "--transform dequantise or --scale learned",
    "missing=True": "--missing",
    "levels= and top=": "--likelihood normal",
}
"""What the library calls something in its messages -> the options for it."""


class Sizes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Widths such as 400 or 200,200."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """'200,200' -> (200, 200)."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} must be whole numbers of at least 1 with commas between, such as 200,200.", param, ctx)
        return sizes


class Finite(click.FloatRange):
    """Numbers in a range, NaN and infinity not among them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """'0.5' -> 0.5."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        return number


POSITIVE = Finite(min=0, min_open=True)

# Names that `runs.parts` knows, written out so that --help need not import torch (tests/test_cli.py compares).
PRIORS = ["standard", "normal", "mixture", "vamp", "flow", "laplace", "student"]
LIKELIHOODS = [
    "normal", "low-rank", "student", "laplace", "log-normal", "beta", "bernoulli", "continuous-bernoulli", "logistic",
    "logistic-mixture", "poisson", "negative-binomial", "zero-inflated",
]  # fmt: skip
GUIDES = ["diagonal", "full", "low-rank", "autoregressive", "spline", "mixture"]
OBJECTIVES = ["elbo", "iwae", "stl", "dreg", "wake-sleep"]


@click.group(context_settings=CONTEXT)
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def app(*, debug: bool) -> None:
    """Variational auto-encoders as Pyro programs: fit them, and say how likely data are.

    \b
    Examples:
      pyro-vae demo
      pyro-vae fit digits --latent 8 --transform dequantise --out runs/a
      pyro-vae evaluate runs/a
      pyro-vae generate runs/a -n 64 --out samples.png
    """  # noqa: D301 - click reads the \b


@app.command()
@click.argument("data")
@click.option("--out", type=FOLDER, required=True, help="Folder of the run. The same command again resumes it.")
@click.option("--latent", type=COUNT, default=20, help="Latent dimensions.")
@click.option("--prior", type=click.Choice(PRIORS), default="standard", help="p(z).")
@click.option("--likelihood", type=click.Choice(LIKELIHOODS), default="normal", help="p(x | z).")
@click.option(
    "--scale",
    help="Of normal, student, laplace, log-normal: learned (unless told), per-dimension, network or a number; of normal "
    "optimal, too.",
)
@click.option("--guide", type=click.Choice(GUIDES), default="diagonal", help="q(z | x).")
@click.option("--missing", is_flag=True, help="NaN in DATA is a missing value; not along with --transform.")
@click.option("--hidden", type=Sizes(), default="400", help="Hidden layers of the encoder; the decoder mirrors them.")
@click.option(
    "--transform",
    type=click.Choice(["none", "binarise", "threshold", "dequantise"]),
    default="none",
    help="Of each batch: draw or cut to 0 and 1, or spread grey levels uniformly.",
)
@click.option("--objective", type=click.Choice(OBJECTIVES), default="elbo", help="What is maximised.")
@click.option("--beta", type=Finite(min=0), default=1.0, help="Weight of the KL in the elbo.")
@click.option(
    "--free-bits", type=Finite(min=0), default=0.0, help="Nats of each latent dimension that the elbo leaves free."
)
@click.option("--particles", type=COUNT, help="Of the objective, a row; by default the objective's own number.")
@click.option("--epochs", type=COUNT, default=40, help="Passes over the training rows.")
@click.option("--batch-size", type=COUNT, default=128, help="Rows a step.")
@click.option("--lr", type=POSITIVE, default=1e-3, help="Learning rate of Adam.")
@click.option("--clip-norm", type=POSITIVE, help="Largest norm of the gradient.")
@click.option("--patience", type=COUNT, help="Stop after so many epochs without a better validation ELBO.")
@click.option("--valid", default=0.1, help="Fraction of the rows for validation.")
@click.option("--test", default=0.1, help="Fraction held out; data with a test set of their own use that.")
@click.option("--seed", default=0, help="Of the split, the weights, the order and the noise.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--compile", "compiling", type=click.Choice(["auto", "yes", "no"]), default="auto", help="Steps as a compiled graph."
)
@click.option("--precision", type=click.Choice(["full", "tf32", "bf16"]), default="full", help="Of the training steps.")
@click.option("--log-dir", type=FOLDER, help="Write TensorBoard scalars here.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def fit(
    *, out: Path, device: str, compiling: str, precision: str, log_dir: Path | None, as_json: bool, **options: Any
) -> None:
    """Fit a VAE to DATA: digits, mnist, fashion-mnist, a folder of IDX files, or a .npy, .npz, .csv or .parquet file.

    \b
    Examples:
      pyro-vae fit digits --latent 8 --transform dequantise --epochs 100 --out runs/digits
      pyro-vae fit mnist --likelihood bernoulli --transform binarise --hidden 200,200 --out runs/binary
      pyro-vae fit table.csv --latent 3 --scale per-dimension --guide full --out runs/table
      pyro-vae fit digits --latent 8 --prior vamp --likelihood logistic --objective iwae --out runs/levels
    """  # noqa: D301 - click reads the \b
    from pyro_vae.learning.fit import fit as run_fit
    from pyro_vae.report import plots
    from pyro_vae.runs import Arguments, Run

    arguments = Arguments(**options)
    # Data, model and objective first: a mistake in them leaves no folder behind.
    data, splits = arguments.read()
    vae = arguments.build(data)
    objective = arguments.aim(vae)
    run = Run.begin(out, arguments, data, write=not place().rank)
    history = run_fit(
        vae,
        splits.train.x,
        splits.valid.x,
        objective=objective,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        seed=arguments.seed,
        device=device,
        compile={"yes": True, "no": False}.get(compiling, "auto"),
        precision=precision,
        clip_norm=arguments.clip_norm,
        transform=run.transform(),
        patience=arguments.patience,
        checkpoint=out,
        log_dir=log_dir,
    )
    if not place().rank:
        run.finish(vae, history)
        plots.save(plots.learning_curve(history), out / "learning_curve.png")
    _say(as_json, {"out": str(out), **history.to_dict()}, f"{history}\nsaved in {out}")


@app.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--method",
    type=click.Choice(["cascade", "guide", "laplace", "annealed", "prior", "exact"]),
    default="cascade",
    help="How; the cascade takes for each row the cheapest of them that serves it.",
)
@click.option("--particles", type=COUNT, help="Of a --method, a row; by default the method's own number.")
@click.option("--target", type=POSITIVE, help="Of the cascade: largest standard error of a row, in nats.  [default: 0.05]")
@click.option(
    "--bounds",
    type=click.IntRange(min=0),
    help="The first so many rows get an upper and a lower bound.  [default: 200 with the cascade, else 0]",
)
@click.option("--seed", default=0, help="Of the draws.")
@click.option("--rows", type=COUNT, help="Only the first so many held-out rows.")
@click.option("--figures/--no-figures", default=True, help="Draw convergence, k-hat and bounds.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(*, run: Path, rows: int | None, figures: bool, as_json: bool, **options: Any) -> None:
    """Estimate log p(x) of the held-out rows of RUN; writes RUN/evidence.csv and figures.

    Ctrl-C stops early and keeps what is finished.

    \b
    Examples:
      pyro-vae evaluate runs/a
      pyro-vae evaluate runs/a --target 0.01 --bounds 500
      pyro-vae evaluate runs/a --method guide --particles 5000 --json
    """  # noqa: D301 - click reads the \b
    from pyro_vae.report import bars, evaluation
    from pyro_vae.runs import Run
    from pyro_vae.team import joined

    asked, opened = evaluation.Asked(**options), Run.open(run)
    vae, x = opened.fitted(), opened.view(opened.data()[1].test.x)[:rows]
    found: evaluation.Evaluation | None = None
    try:
        with joined() as team, bars.on_stderr(show=team.leads) as progress:
            found = evaluation.run(vae, x, asked, run, figures=figures, progress=progress, team=team)
    except KeyboardInterrupt:
        if found is None:  # else it came when all was done
            _fail(STOPPED, f"stopped before any rows were finished; {run / evaluation.CSV} was not written.")
    drawn = f", figures in {', '.join(found.figures)}" if found.figures else ""
    _say(as_json, {"run": str(run), **found.to_dict()}, f"{found}\nrows are in {run / evaluation.CSV}{drawn}")
    if found.interrupted:
        _fail(STOPPED, f"stopped; the rows that were finished are in {run / evaluation.CSV}.")


@app.command()
@click.argument("run", type=FOLDER)
@click.option("-n", "count", type=COUNT, default=64, help="Number of rows.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="A .png, .npy or .csv file.")
@click.option("--seed", default=0, help="Of the draws.")
@click.option("--mean", is_flag=True, help="Draw E[x | z] instead of x ~ p(x | z).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def generate(*, run: Path, count: int, out: Path, seed: int, mean: bool, as_json: bool) -> None:
    """Draw rows from the VAE of RUN.

    \b
    Examples:
      pyro-vae generate runs/a -n 64 --out samples.png
      pyro-vae generate runs/a -n 1000 --out samples.npy
    """  # noqa: D301 - click reads the \b
    import io

    import numpy as np

    from pyro_vae.files import write_bytes
    from pyro_vae.report import plots
    from pyro_vae.runs import Run

    if out.suffix not in (".png", ".npy", ".csv"):
        raise ValueError(f"--out {out} must end in .png, .npy or .csv.")
    opened = Run.open(run)
    shape = opened.about.shape
    if out.suffix == ".png" and len(shape) < 2:
        raise ValueError(f"Rows of shape {shape} are no pictures: give --out a .npy or .csv file.")
    rows = opened.fitted().generate(count, seed=seed, noise=not mean)
    if out.suffix == ".png":
        plots.save(plots.images(rows, shape, title="Samples"), out)
    else:
        buffer = io.BytesIO()
        if out.suffix == ".npy":
            np.save(buffer, rows.numpy(), allow_pickle=False)
        else:
            np.savetxt(buffer, rows.flatten(1).numpy(), delimiter=",")
        write_bytes(out, buffer.getvalue())
    _say(as_json, {"out": str(out), "rows": count}, f"{count} rows are in {out}")


@app.command()
@click.option("--out", type=FOLDER, default=Path("runs/demo"), help="Folder for the model, the history and the figures.")
@click.option("--epochs", type=COUNT, default=100, help="Passes over the training rows.")
@click.option("--seed", default=0, help="Of everything.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON as well.")
def demo(*, out: Path, epochs: int, seed: int, as_json: bool) -> None:
    """Fit a Gaussian VAE with learned s to scikit-learn's digits and say how likely held-out digits are.

    \b
    Examples:
      pyro-vae demo
      pyro-vae demo --epochs 30 --out runs/short
    """  # noqa: D301 - click reads the \b
    from pyro_vae.report.demo import run

    result = run(out, seed=seed, epochs=epochs)
    if as_json:
        click.echo(json.dumps(_strict(result)))


def _say(as_json: bool, about: dict[str, Any], text: str) -> None:  # noqa: FBT001 - the flag of every command
    if not place().rank:
        click.echo(json.dumps(_strict(about)) if as_json else text)


def _strict(value: Any) -> Any:
    """NaN and infinities as null: strict JSON has neither."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (a fit that failed), 2 (a mistake), 130 or 143 (stopped by a signal)."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        app.main(words, prog_name="pyro-vae", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
    except click.ClickException as error:
        _fail(2, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _fail(STOPPED, "stopped; where a run was begun, the same command resumes it.")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if "--debug" in words:
            raise
        _fail(1 if isinstance(error, (FloatingPointError, ConnectionError)) else 2, _hinted(str(error)))


def _hinted(message: str) -> str:
    """A message of the library, with the options for what it names."""
    options = next((options for name, options in HINTS.items() if name in message), None)
    return message if options is None else f"{message} On the command line: {options}."


def _fail(code: int, message: str) -> NoReturn:
    try:
        here = place()
    except ValueError:  # which is what there is to tell
        here = Place()
    if not (code == STOPPED and here.rank):  # all were stopped: one says so
        who = f" {here}:" if here.size > 1 else ""
        click.echo(f"pyro-vae:{who} {' '.join(message.split())}", err=True)
    raise SystemExit(code)
