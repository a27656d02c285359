"""The picture of the fit: the data over the bands of the best parameter sets."""

from pathlib import Path

import numpy as np
from flu import CONFINED_TO_BED, DAYS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, QUIET, BAND, LINE = "#1d2a33", "#77858d", "#2f7f8f", "#12505c"
DATA = "#d1495b"


def report(rows: list[dict], out_dir: str) -> list[str]:
    """Draw ``boarding_school_flu.png`` and say how good the best fit is.

    Parameters
    ----------
    rows
        ``{"param", "params", "aggregates"}`` per parameter set, best first.
    out_dir
        Folder for the picture.
    """
    best = rows[0]["aggregates"]
    path = Path(out_dir) / "boarding_school_flu.png"
    draw(rows[:4], path)
    return [
        f"best fit: {describe(rows[0])}",
        f"loss (CRPS, boys): {best['loss']:.1f}; always predicting the observed mean: {best['loss_of_mean']:.1f}",
        f"days on which the data lie in the 95% band: {best['days_covered']} of {DAYS}",
        f"picture: {path}",
    ]


def describe(row: dict) -> str:
    p = row["params"]
    ratio = p["transmission"] / p["recovery"]
    return f"transmission {p['transmission']:g}, recovery {p['recovery']:g} per day (R₀ = {ratio:.1f})"


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(11, 6.2), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, 2, width_ratios=[2.7, 1], left=0.065, right=0.98, bottom=0.095, top=0.84, wspace=0.1, hspace=0.38
    )
    top = 1.08 * max([max(row["aggregates"]["high95"]) for row in rows] + [CONFINED_TO_BED.max()])
    big = figure.add_subplot(grid[:, 0])
    panel(big, rows[0], top, small=False)
    for place, row in enumerate(rows[1:]):
        axes = figure.add_subplot(grid[place, 1])
        panel(axes, row, top, small=True)
        axes.set_title(
            f"{place + 2}.  R₀ {row['params']['transmission'] / row['params']['recovery']:.1f},"
            f"  loss {row['aggregates']['loss']:.1f}",
            loc="left", fontsize=9, color=INK, pad=4,
        )  # fmt: skip
    best = rows[0]["aggregates"]
    figure.text(0.065, 0.945, "Influenza in an English boarding school, January 1978", fontsize=16,
                weight="bold", color=INK)  # fmt: skip
    figure.text(0.065, 0.895, f"Best fit: {describe(rows[0])}. Loss {best['loss']:.1f} boys "
                f"(observed mean: {best['loss_of_mean']:.1f}), {best['days_covered']} of {DAYS} days covered.",
                fontsize=10.5, color=QUIET)  # fmt: skip
    figure.savefig(path, metadata={"Software": None})


def panel(axes, row: dict, top: float, *, small: bool) -> None:
    a, days = row["aggregates"], np.arange(1, DAYS + 1)
    axes.fill_between(days, a["low95"], a["high95"], color=BAND, alpha=0.18, lw=0, label="95% of outbreaks")
    axes.fill_between(days, a["low50"], a["high50"], color=BAND, alpha=0.42, lw=0, label="50% of outbreaks")
    axes.plot(days, a["median"], color=LINE, lw=1 if small else 1.8, label="median")
    axes.plot(days, CONFINED_TO_BED, "o", color=DATA, ms=2.6 if small else 6.5, mec="white",
              mew=0.3 if small else 1, label="observed", zorder=5)  # fmt: skip
    axes.set_xlim(0.7, DAYS + 0.3)
    axes.set_ylim(0, top)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.grid(axis="y", color="#e3e8ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=7 if small else 10, length=0)
    axes.set_xticks([1, 7, 14] if small else days)
    axes.set_yticks(range(0, int(top), 200 if small else 100))
    if not small:
        axes.set_xlabel("day", color=QUIET, fontsize=10)
        axes.set_title("boys confined to bed, of 763", loc="left", color=QUIET, fontsize=10)
        axes.legend(frameon=False, labelcolor=INK, fontsize=10, loc="upper right")
