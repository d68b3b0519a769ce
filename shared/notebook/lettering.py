"""Text in drawings: where it stands, how wide it is, which colours can be read, which fonts a browser is offered.

Widths are measured with DejaVu Sans, which comes with matplotlib and is wider than Arial or Helvetica, so what fits
here fits there. A wide character (Chinese, Japanese, Korean) counts as one em.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import to_hex, to_rgb
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.textpath import text_to_path

INK, PAPER = "#222222", "#FFFFFF"
UNIT = 0.45  # inches of a cell's side
SMALL, NORMAL, LARGE = 10.5, 12.0, 13.0  # points; at half width the smallest are above 5
FONT = "DejaVu Sans"
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei")
FAMILIES = (FONT, "Verdana", "Arial", *CHINESE_FONTS, "sans-serif")

Point = tuple[float, float]


@dataclass(frozen=True)
class Area:
    """Where something was drawn, in cells: upper left corner, width and height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        """The middle of the left side."""
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        """The middle of the right side."""
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        """The middle of the upper side."""
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        """The middle of the lower side."""
        return self.x + self.width / 2, self.y + self.height

    @property
    def centre(self) -> Point:
        """The middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    def meets(self, other: "Area", gap: float = 0.1) -> bool:
        """Return whether two areas overlap, or stand side by side with less than `gap` cells between them."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return across > -gap and down > 0.02


@dataclass(frozen=True)
class Label:
    """A piece of text of a picture: where it stands, its size in points, its colour and what lies behind it."""

    text: str
    area: Area
    size: float
    color: str
    ground: str


def text_size(text: str, size: float = NORMAL, weight: str = "normal") -> tuple[float, float]:
    """Return width and height of a text in cells; wide characters (Chinese, for example) count as one em."""
    font, lines = FontProperties(family=FONT, size=size, weight=weight), text.split("\n")
    widths = []
    for line in lines:
        narrow = "".join(c for c in line if not _is_wide(c))
        width = text_to_path.get_text_width_height_descent(narrow, font, ismath=False)[0] if narrow else 0.0
        widths.append(width + size * sum(map(_is_wide, line)))
    points = 72 * UNIT
    return max(widths) / points, size * 1.2 * len(lines) / points


def mix(color: str, share: float, ground: str = PAPER) -> str:
    """Return a colour laid over a ground with `share` from 0 (the ground) to 1 (the colour)."""
    red, green, blue = (
        share * a + (1 - share) * b for a, b in zip(to_rgb(color), to_rgb(ground), strict=True)
    )
    return to_hex((red, green, blue))


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, from 1 to 21 (Web Content Accessibility Guidelines 2.2)."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def readable(color: str, ground: str = PAPER) -> str:
    """Return a colour, darkened until text in it can be read on the ground, else ink, black or white."""
    darker = (mix(color, share, "#000000") for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    fitting = (found for found in darker if contrast(found, ground) >= 4.5) if color != INK else ()
    # Of black and white one has a contrast of at least 4.58 on any ground.
    last = max((PAPER, "#000000"), key=lambda c: contrast(c, ground))
    return next(iter(fitting), INK if contrast(INK, ground) >= 4.5 else last)


def _luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def faults_of(labels: Sequence[Label], room: Area) -> list[str]:
    """Return a line for each two labels that overlap and for each one that is not wholly in the room."""
    pairs = itertools.combinations(labels, 2)
    found = [f"{a.text!r} overlaps {b.text!r}" for a, b in pairs if a.area.meets(b.area)]
    for label in labels:
        area, slack = label.area, 0.02
        across = area.x >= room.x - slack and area.x + area.width <= room.x + room.width + slack
        down = area.y >= room.y - slack and area.y + area.height <= room.y + room.height + slack
        if not (across and down):
            found.append(f"{label.text!r} leaves the picture")
    return found


def has_wide(text: str) -> bool:
    """Return whether a text holds a character that DejaVu Sans lacks and that is one em wide."""
    return any(map(_is_wide, text))


def fonts_for(text: str) -> list[str] | None:
    """Return the installed fonts that a text can be drawn with, or None where there is none for its characters."""
    if not has_wide(text):
        return [FONT]
    installed = {font.name for font in fontManager.ttflist}
    found = [name for name in CHINESE_FONTS if name in installed]
    return [FONT, *found] if found else None


def tidy_svg(svg: str) -> str:
    """Return the SVG element of a file of matplotlib's, small, its live text with the whole list of fonts."""
    # An element a line, and nothing before the first.
    svg = re.sub(r"\s*\n(?!\s*<)", " ", svg[svg.index("<svg") :])
    families = ", ".join(f"'{family}'" if " " in family else family for family in FAMILIES)
    # matplotlib names its fonts at each text, alone or in the shorthand that also holds the size.
    svg = re.sub(rf" ?font-family: '{FONT}'[^;\"]*;?", "", svg)
    svg = re.sub(rf"(font: [^;\"]*?)'{FONT}'[^;\"]*", rf"\1{families}", svg)
    return svg.replace("<svg ", f'<svg font-family="{families}" ', 1)
