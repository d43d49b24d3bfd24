"""Pictures as data URIs, one for a light page and one for a dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure


class Palette(NamedTuple):
    """The colours of a page."""

    text: str
    faint: str
    lines: tuple[str, ...]
    low: str
    high: str


LIGHT = Palette("#1f2328", "#d5d9de", ("#2f6db3", "#c2632b", "#3f8f5b"), "#f3f6fa", "#123f73")
DARK = Palette("#e6e8eb", "#3c434c", ("#79b0ee", "#eba274", "#7fcf9b"), "#22272e", "#a9d2ff")
Picture = tuple[str, str]  # light, dark


def _drawn(width: float, height: float, paint: Callable[[Any, Palette], None]) -> Picture:
    uris = []
    for palette in (LIGHT, DARK):
        styled: Any = {
            "text.color": palette.text, "axes.labelcolor": palette.text, "xtick.color": palette.text,
            "ytick.color": palette.text, "axes.edgecolor": palette.faint, "grid.color": palette.faint, "font.size": 9,
            "svg.hashsalt": "fastreft", "axes.spines.top": False, "axes.spines.right": False,
        }  # fmt: skip
        with matplotlib.rc_context(styled):
            figure = Figure(figsize=(width, height), layout="constrained")
            paint(figure.subplots(), palette)
            held = io.BytesIO()
            figure.savefig(held, format="svg", transparent=True, metadata={"Date": None})
        uris.append("data:image/svg+xml;base64," + base64.b64encode(held.getvalue()).decode())
    return uris[0], uris[1]


def curves(
    lines: dict[str, Sequence[tuple[float, float]]], ylabel: str, *, xlabel: str = "step", log: bool = False
) -> Picture:
    """Values against steps, or against something else."""

    def paint(axes: Any, palette: Palette) -> None:
        for (name, points), colour in zip(lines.items(), palette.lines, strict=False):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, label=name, marker="o" if len(points) < 25 else None, markersize=3)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False)

    return _drawn(4.6, 2.8, paint)


def heat(values: Any, across: Sequence[str], down: Sequence[str], what: str, xlabel: str, ylabel: str) -> Picture:
    """A table of numbers as colours, the first row at the bottom as layers are stacked."""
    values = np.asarray(values)

    def paint(axes: Any, palette: Palette) -> None:
        colours = LinearSegmentedColormap.from_list("heat", [palette.low, palette.high])
        drawn = axes.imshow(values, cmap=colours, aspect="auto", origin="lower", interpolation="nearest", vmin=0)
        axes.set_xticks(*_ticks(across, 60), rotation=90, fontsize=7)
        axes.set_yticks(*_ticks(down, 16), fontsize=7)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label(what)
        bar.outline.set_visible(False)

    return _drawn(max(4.6, min(9.2, 1.6 + 0.17 * len(across))), max(2.2, min(5.0, 1.5 + 0.13 * len(down))), paint)


def _ticks(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Where to write which labels, so that they do not run into one another."""
    step = -(-len(labels) // most)
    where = list(range(0, len(labels), step))
    return where, [labels[i] for i in where]
