"""What all figures share: the Axes, the look of each engine, and the way to the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyro_vae.learning.history import BLUE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREEN, ORANGE, PURPLE, SKY = "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
"""More of Okabe & Ito (2008)."""


class Look(NamedTuple):
    """How an engine looks in every figure: its colour, and what tells it apart without colours."""

    colour: str
    hatch: str
    dash: Any
    marker: str


LOOKS = {
    "guide": Look(BLUE, "", "-", "o"),
    "laplace": Look(VERMILION, "///", "--", "s"),
    "annealed": Look(GREEN, "xxx", "-.", "^"),
    "prior": Look(ORANGE, "...", ":", "D"),
}
OTHERS = (Look(PURPLE, "\\\\\\", (0, (5, 1)), "v"), Look(SKY, "ooo", (0, (1, 1)), "P"))


COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "v", "D", "P")


def curve_look(number: int) -> Look:
    """The look of the curve of that number, from 0, where curves are no engines; 36 of them differ."""
    turn = (number + number // len(COLOURS)) % len(DASHES)
    return Look(COLOURS[number % len(COLOURS)], "", DASHES[turn], MARKERS[turn])


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, once, in the order of the cascade: an engine's own, or the next of two others."""
    unique = [str(name) for name in dict.fromkeys(names)]
    strange = [name for name in unique if name not in LOOKS]
    mine = {name: LOOKS.get(name) or OTHERS[strange.index(name) % len(OTHERS)] for name in unique}
    return {name: mine[name] for name in [*(name for name in LOOKS if name in mine), *strange]}


def counted(count: int, noun: str) -> str:
    """The count and its noun: "1 row", "1,000 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def require(result: object, kinds: str, maker: str) -> None:
    """Refuse what is no result of those classes; they are named, because to import them takes seconds.

    Raises:
        TypeError: names what was given, and what makes what is needed.
    """
    if not {kind.__name__ for kind in type(result).__mro__} & set(kinds.split(" or ")):
        raise TypeError(f"This figure draws the {kinds} that {maker} returns, and was given: {type(result).__name__}.")


def axes(ax: Axes | None) -> Axes:
    """`ax`, or those of a new figure."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(layout="constrained")[1]


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure of `ax` to a PNG file in one atomic step, and close it."""
    import io

    from matplotlib import pyplot as plt

    from pyro_vae.files import write_bytes

    buffer = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    write_bytes(Path(path), buffer.getvalue())
