"""The look of the course's figures, and the few drawings that several notebooks need.

Light background, the colour-blind-safe palette of Okabe and Ito (2008, "Color Universal Design"), sizes that stay
legible in JupyterLab. Used by notebooks and scripts only.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK)
GRAY = "#6E6E6E"


def use_style() -> None:
    """Set matplotlib's defaults for a notebook: palette, font sizes, light grid, no upper and right frame."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "grid.alpha": 0.3,
            "font.size": 11,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "image.cmap": "viridis",
        }
    )


def label_line(axes: Axes, text: str, x: float, y: float, color: str, **options: Any) -> None:
    """Write a line's name beside it, in its colour: easier to read than a legend when lines are few."""
    axes.annotate(
        text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", color=color, **options
    )


def heat_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    numbers: str | None = None,
    **options: Any,
) -> None:
    """Draw a matrix with its row and column names.

    Args:
        axes: Where to draw.
        values: A matrix (rows, columns), as nested sequences, array or tensor.
        rows: A name for each row.
        columns: A name for each column.
        title: The finding the picture shows.
        numbers: A format such as `".2f"` writes each value into its cell.
        options: Passed on to `Axes.imshow`.
    """
    image = axes.imshow(values, aspect="auto", **options)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    axes.set_title(title)
    if numbers is None:
        axes.figure.colorbar(image, ax=axes, shrink=0.8)
        return
    # Light letters on dark cells, dark ones on light cells.
    shades = np.asarray(image.norm(np.asarray(values)))  # from 0, dark, to 1
    for i in range(len(rows)):
        for j in range(len(columns)):
            axes.text(
                j,
                i,
                format(float(values[i][j]), numbers),
                ha="center",
                va="center",
                color="white" if shades[i, j] < 0.6 else "black",
            )


def flow(steps: Sequence[tuple[str, str]], width: float = 1.9, color: str = SKY) -> Figure:
    """Draw boxes from left to right with arrows between them.

    Args:
        steps: For each box its name and a line below the name, for example a shape or an example.
        width: Width of one box in inches.
        color: Fill of the boxes.
    """
    figure, axes = plt.subplots(figsize=((width + 0.5) * len(steps), 1.5))
    axes.set_axis_off()
    axes.set_xlim(0, len(steps) * (width + 0.5))
    axes.set_ylim(0, 1.5)
    for position, (name, detail) in enumerate(steps):
        left = position * (width + 0.5) + 0.2
        box = FancyBboxPatch((left, 0.3), width, 0.9, boxstyle="round,pad=0.05", facecolor=color, alpha=0.35)
        axes.add_patch(box)
        axes.text(left + width / 2, 0.92, name, ha="center", va="center", weight="bold")
        axes.text(left + width / 2, 0.52, detail, ha="center", va="center", fontsize=9.5)
        if position:
            arrow = FancyArrowPatch(
                (left - 0.42, 0.75), (left - 0.06, 0.75), arrowstyle="-|>", mutation_scale=14
            )
            axes.add_patch(arrow)
    return figure
