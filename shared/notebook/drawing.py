"""Pictures of ideas by a few primitives: vectors, matrices, boxes, arrows, braces, tokens and stacks of layers.

A canvas is measured in cells, x to the right and y downwards, as one reads. What is drawn returns its `Area`, whose
`left`, `right`, `top` and `bottom` are where arrows begin and end. Colours are those of `plotting`; what differs in
colour also differs in number, hatching or width, so that print and colour-blind readers lose nothing. `show` puts a
picture into a notebook as SVG with live text, on a light ground of its own, for dark themes too. A PNG beside it is for
notebooks that JupyterLab does not trust yet: it shows no SVG there.

No font is bundled: one with Chinese weighs several megabytes. Live text is drawn by the reader's browser, which is
given a list of fonts, Chinese ones among them (`lettering`). Where no installed font has a label's characters, the PNG
is left out. Left out too: curves of data (see `plotting`), formulas, animation.
"""

import base64
import io
import itertools
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path
from PIL import Image

from shared.notebook.lettering import (
    FONT,
    INK,
    LARGE,
    NORMAL,
    PAPER,
    SMALL,
    UNIT,
    Area,
    Label,
    Point,
    faults_of,
    fonts_for,
    mix,
    readable,
    text_size,
    tidy_svg,
)
from shared.notebook.plotting import BLUE, GRAY, SKY

MAX_WIDTH = 19  # cells; a wider picture would be shrunk by the page
STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": False,
    "figure.autolayout": False,
}  # every place is given


class Canvas:
    """An empty picture of `width` by `height` cells, with what you see as its title above it.

    Raises ValueError if a size is not positive, the width is above `MAX_WIDTH` or the title is wider than the picture.
    """

    def __init__(self, width: float, height: float, title: str = "") -> None:
        if not (0 < width <= MAX_WIDTH and height > 0):
            raise ValueError(
                f"width must be above 0 and at most {MAX_WIDTH}, height above 0, got {width, height}"
            )
        self.width, self.height, self.labels = width, height, list[Label]()
        self.head = 1.0 if title else 0.0
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(width * UNIT, (height + self.head) * UNIT), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, -self.head))
        self.axes.set_axis_off()
        if title:
            if text_size(title, LARGE)[0] > width - 0.2:
                raise ValueError(f"title must fit into {width} cells, got {title!r}")
            self.text(0.1, -0.5, title, size=LARGE, align="left")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = NORMAL,
        color: str = INK,
        weight: str = "normal",
        align: str = "center",
        ground: str = PAPER,
        paper: bool = False,
    ) -> Area:
        """Write a text with its middle (or its left or right end, by `align`) at a point; `\\n` begins a new line.

        With `paper` it stands on a piece of paper, and arrows run behind it.

        Raises ValueError if the text is empty, smaller than `SMALL` or `align` is unknown.
        """
        if not text.strip() or size < SMALL:
            raise ValueError(
                f"text must not be empty and its size at least {SMALL}, got {text!r}, size {size}"
            )
        if align not in ("left", "center", "right"):
            raise ValueError(f"align must be left, center or right, got {align!r}")
        width, height = text_size(text, size, weight)
        start = x - width * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
        area, color = Area(start, y - height / 2, width, height), readable(color, ground)
        self.labels.append(Label(text, area, size, color, ground))
        if paper:
            self.axes.add_patch(
                Rectangle((area.x - 0.08, area.y), width + 0.16, height, fc=PAPER, ec="none", zorder=4)
            )
        options: dict[str, Any] = {
            "fontsize": size,
            "color": color,
            "weight": weight,
            "ha": align,
            "va": "center_baseline",
        }
        for number, line in enumerate(lines := text.split("\n")):
            middle = y + (number - (len(lines) - 1) / 2) * height / len(lines)
            self.axes.text(
                x, middle, line, family=fonts_for(text) or FONT, parse_math=False, zorder=5, **options
            )
        return area

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        detail: str = "",
        color: str = SKY,
    ) -> Area:
        """Draw a rounded box, with a text and, smaller below it, a detail.

        Raises ValueError if a size is not positive or a text does not fit.
        """
        if width <= 0 or height <= 0:
            raise ValueError(f"width and height must be above 0, got {width}, {height}")
        fill, area = mix(color, 0.35), Area(x, y, width, height)
        corners = f"round,pad=0,rounding_size={min(0.2, width / 4, height / 4)}"
        shape = FancyBboxPatch((x, y), width, height, corners, facecolor=fill, edgecolor=INK, lw=0.9)
        self.axes.add_patch(shape)
        middle = y + height / 2
        if text:
            self._inside(area, x + width / 2, middle - (0.24 if detail else 0), text, NORMAL, fill)
        if detail:
            self._inside(area, x + width / 2, middle + 0.26, detail, SMALL, fill)
        return area

    def matrix(
        self,
        x: float,
        y: float,
        values: Sequence[Sequence[float]],
        *,
        color: str = BLUE,
        numbers: str | None = ".1f",
        rows: Sequence[str] = (),
        columns: Sequence[str] = (),
        name: str = "",
        blocked: Sequence[Sequence[bool]] | None = None,
        cell: tuple[float, float] = (1.0, 1.0),
    ) -> Area:
        """Draw a matrix as cells: the stronger the colour, the farther a number is from 0; names stand outside.

        Args:
            x, y: The upper left corner.
            values: Numbers (rows, columns), as nested sequences, array or tensor.
            color: Of the cells.
            numbers: Format of the numbers in the cells; None writes none.
            rows, columns: Names at the left and above, or none.
            name: Written below.
            blocked: True where a cell is hatched and holds no number.
            cell: Width and height of a cell.

        Raises:
            ValueError: The rows differ in length, there are none, names or `blocked` do not fit them, a number does
                not fit its cell.
        """
        # Check that everything fits.
        table = [[float(value) for value in row] for row in values]
        n_rows, n_columns = len(table), len(table[0]) if table else 0
        wide, high = cell
        if not n_columns or any(len(row) != n_columns for row in table):
            raise ValueError(f"values must be rows of one length, got lengths {[len(row) for row in table]}")
        for what, names, size in (("rows", rows, n_rows), ("columns", columns, n_columns)):
            if len(names) not in (0, size):
                raise ValueError(f"{what} must be {size} names or none, got {len(names)}")
        if blocked is not None and [len(row) for row in blocked] != [n_columns] * n_rows:
            raise ValueError(f"blocked must have {n_rows} rows of {n_columns}")
        # Draw the cells, then the names around them.
        largest = max(1.0, *(abs(value) for row in table for value in row))
        for i, j in itertools.product(range(n_rows), range(n_columns)):
            hidden = blocked is not None and bool(blocked[i][j])
            place = Area(x + j * wide, y + i * high, wide, high)
            fill = "#EEEEEE" if hidden else mix(color, 0.04 + 0.9 * abs(table[i][j]) / largest)
            self._cell(place, fill, hatched=hidden)
            if numbers is not None and not hidden:
                self._inside(
                    place, *place.centre, format(table[i][j], numbers).replace("-", "−"), SMALL, fill
                )
        area = Area(x, y, n_columns * wide, n_rows * high)
        for i, text in enumerate(rows):
            self.text(x - 0.2, y + (i + 0.5) * high, text, size=SMALL, align="right")
        for j, text in enumerate(columns):
            self.text(x + (j + 0.5) * wide, y - 0.35, text, size=SMALL)
        if name:
            self.text(x + area.width / 2, y + area.height + 0.45, name)
        return area

    def vector(self, x: float, y: float, values: Sequence[float], *, name: str = "", **options: Any) -> Area:
        """Draw a vector as a row of cells with its name at the left; the other options are those of `matrix`.

        Raises ValueError as `matrix` does.
        """
        return self.matrix(x, y, [list(values)], rows=[name] if name else (), **options)

    def tokens(
        self,
        x: float,
        y: float,
        words: Sequence[str],
        *,
        width: float = 2.0,
        strong: Sequence[int] = (),
        color: str = BLUE,
    ) -> list[Area]:
        """Draw a row of tokens, one box each; those at the places in `strong` are filled.

        Raises ValueError if there is no word, one does not fit its box or a place in `strong` holds no word.
        """
        if not words or not all(0 <= place < len(words) for place in strong):
            raise ValueError(
                f"words must not be empty and strong lie in it, got {list(words)}, {list(strong)}"
            )
        areas = []
        for place, word in enumerate(words):
            area = Area(x + place * width + 0.08, y, width - 0.16, 0.9)
            fill = mix(color, 1.0 if place in strong else 0.08)
            self._cell(area, fill)
            self._inside(area, *area.centre, word, NORMAL, fill, "bold" if place in strong else "normal")
            areas.append(area)
        return areas

    def layers(
        self,
        x: float,
        y: float,
        names: Sequence[str],
        *,
        width: float = 4.0,
        height: float = 0.9,
        color: str = SKY,
    ) -> list[Area]:
        """Draw a stack of layers, the first at the bottom, with arrows upwards; `y` is the top of the stack.

        Raises ValueError if there is no name or one does not fit its box.
        """
        if not names:
            raise ValueError("names must not be empty")
        step = height + 0.5
        areas = [
            self.box(x, y + (len(names) - 1 - place) * step, width, height, name, color=color)
            for place, name in enumerate(names)
        ]
        for below, above in itertools.pairwise(areas):
            self.arrow(below.top, above.bottom)
        return areas

    def arrow(
        self,
        start: Point,
        end: Point,
        label: str = "",
        *,
        share: float | None = None,
        color: str = GRAY,
        bend: float = 0.0,
    ) -> None:
        """Draw an arrow; its width may show a share, and it bows upwards by `bend` times half its length.

        Raises ValueError if the arrow has no length or the share is not between 0 and 1.
        """
        if start == end or not 0 <= (share or 0) <= 1:
            raise ValueError(f"an arrow needs two points and a share in 0 to 1, got {start}, {end}, {share}")
        rad = -bend if end[0] >= start[0] else bend
        width = 1.3 if share is None else 0.6 + 9 * share
        style = f"-|>,head_length={0.35 + width / 24:.3f},head_width={0.16 + width / 24:.3f}"
        patch = FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={rad}", arrowstyle=style, mutation_scale=14, lw=width,
            color=color, shrinkA=2, shrinkB=2, zorder=2, capstyle="butt", joinstyle="miter",
        )  # fmt: skip
        self.axes.add_patch(patch)
        if label:
            # The middle of the curve: half of the way from the chord to its control point.
            across, down = end[0] - start[0], end[1] - start[1]
            x, y = (start[0] + end[0] - rad * down) / 2, (start[1] + end[1] + rad * across) / 2
            self.text(x, y, label, size=SMALL, paper=True)

    def brace(self, start: Point, end: Point, label: str = "", *, side: str = "below") -> None:
        """Draw a brace along a horizontal or vertical line, opening away from its label.

        Raises ValueError if the line is neither, has no length or `side` does not go with it.
        """
        sides = {"below": (0, 1), "above": (0, -1), "left": (-1, 0), "right": (1, 0)}
        across, down = sides.get(side, (0, 0))
        if side not in sides or (start[1] != end[1] if down else start[0] != end[0]) or start == end:
            raise ValueError(f"brace needs a line and a side that goes with it, got {start}, {end}, {side!r}")
        # Along the line and away from it: two arms that curve in, and a tip.
        first, last = sorted((start, end))
        length, r = abs(last[0] - first[0]) + abs(last[1] - first[1]), 0.16
        r = min(r, length / 4)
        outline = [(0, 0), (0, r), (r, r), (length / 2 - r, r), (length / 2, r), (length / 2, 2 * r)]
        outline += [(length - a, b) for a, b in outline[-2::-1]]
        points = [
            (first[0] + a + across * b, first[1] + down * b)
            if down
            else (first[0] + across * b, first[1] + a)
            for a, b in outline
        ]
        curve, line = Path.CURVE3, Path.LINETO
        codes = [Path.MOVETO, curve, curve, line, curve, curve, curve, curve, line, curve, curve]
        self.axes.add_patch(PathPatch(Path(points, codes), fill=False, edgecolor=INK, lw=1.1))
        if label:
            tip, (width, height) = points[5], text_size(label, SMALL)
            self.text(
                tip[0] + across * (width / 2 + 0.12), tip[1] + down * (height / 2 + 0.05), label, size=SMALL
            )

    def svg(self, alt: str) -> str:
        """Return the picture as an SVG element with live text; `alt` says in words what it shows."""
        buffer = io.StringIO()
        for patch in self.axes.patches:
            patch.set_clip_on(False)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with (
            matplotlib.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": "drawing"}),
            warnings.catch_warnings(),
        ):
            # The reader's browser has the Chinese characters that the font for measuring lacks.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(buffer, format="svg", metadata=nothing)
        head = f'<svg role="img" aria-label="{escape(alt)}" style="max-width: 100%; height: auto" '
        opened, closed = tidy_svg(buffer.getvalue()).replace("<svg ", head, 1).split(">", 1)
        return f"{opened}>\n <title>{escape(alt)}</title>{closed}"

    def png(self) -> bytes | None:
        """Return the picture as PNG, or None where no installed font has the characters of its labels."""
        if any(fonts_for(label.text) is None for label in self.labels):
            return None
        buffer, smaller = io.BytesIO(), io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="png", dpi=110)
        # Few colours are enough, and a third of the bytes.
        Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            smaller, "PNG", optimize=True
        )
        return smaller.getvalue()

    def _cell(self, area: Area, fill: str, hatched: bool = False) -> None:
        hatch: dict[str, Any] = {"hatch": "////", "edgecolor": GRAY} if hatched else {"edgecolor": INK}
        self.axes.add_patch(
            Rectangle((area.x, area.y), area.width, area.height, facecolor=fill, lw=0.8, **hatch)
        )

    def _inside(
        self, area: Area, x: float, y: float, text: str, size: float, fill: str, weight: str = "normal"
    ) -> None:
        """Write a text that must fit into an area."""
        if max(text_size(text, size, weight)[0] - area.width, text_size(text, size)[1] - area.height) > 0:
            raise ValueError(f"{text!r} must fit into {area.width:g} by {area.height:g} cells")
        self.text(x, y, text, size=size, weight=weight, ground=fill)


def faults(canvas: Canvas) -> list[str]:
    """Return what is wrong with the labels of a picture: two that overlap, one that leaves the picture."""
    return faults_of(canvas.labels, Area(0, -canvas.head, canvas.width, canvas.height + canvas.head))


def show(canvas: Canvas, alt: str) -> None:
    """Show a picture in a notebook; `alt` says in words what it shows, for those who do not see it.

    Raises ValueError if `alt` is empty, labels overlap or one leaves the picture.
    """
    if not alt.strip():
        raise ValueError("alt must say in words what the picture shows")
    if found := faults(canvas):
        raise ValueError(f"labels must stand free: {'; '.join(found)}")
    data, metadata = {"image/svg+xml": canvas.svg(alt), "text/plain": alt}, {}
    if (png := canvas.png()) is not None:
        data["image/png"] = base64.b64encode(png).decode()
        metadata = {"image/png": {"alt": alt}}
    display(data, metadata=metadata, raw=True)
