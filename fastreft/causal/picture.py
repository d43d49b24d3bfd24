"""A sweep as a picture: IIA over places and positions. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import staged

Maps = Mapping[str, Sequence[Mapping[str, Any]]]


def heat_maps(maps: Maps, path: str | os.PathLike, chance: float = 0.5) -> None:
    """What :func:`draw` draws, as PNG. ``ImportError`` without matplotlib."""
    from matplotlib.figure import Figure

    path = Path(path)
    most = max(len({cell["place"] for cell in cells}) for cells in maps.values())
    figure = Figure(figsize=(1.4 + 2.6 * len(maps), 1.6 + 0.26 * most), layout="constrained")
    draw(maps, figure, chance)
    with staged(path.parent, last=path.name) as staging:
        figure.savefig(staging / path.name, dpi=110, metadata={"Software": None})


def draw(maps: Maps, figure: Any, chance: float = 0.5) -> None:
    """The cells of one or several sweeps, by title, side by side on a figure of matplotlib's; the first place at the bottom, as
    layers are stacked. Colours run from ``chance``, what an exchange without effect scores, to 1."""
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for each, (title, cells) in zip(axes, maps.items(), strict=True):
        places = list(dict.fromkeys(cell["place"] for cell in cells))
        positions = list(dict.fromkeys(cell["position"] for cell in cells))
        values = {(cell["place"], cell["position"]): cell["iia"] for cell in cells}
        grid = [[values.get((place, position), float("nan")) for position in positions] for place in places]
        drawn = each.imshow(grid, cmap="viridis", aspect="auto", origin="lower", vmin=chance, vmax=1.0)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                colour = "black" if value > (1 + chance) / 2 else "white"
                each.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        each.set_xticks(range(len(positions)), positions, rotation=40, ha="right", fontsize=8)
        each.set_yticks(range(len(places)), places, fontsize=8)
        each.set_title(title, fontsize=9)
    axes[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.02).set_label("IIA")
