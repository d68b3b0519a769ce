"""Write build/gallery/index.html: every primitive of `shared.notebook.drawing`, on light and dark, whole and half.

python -m tests.tools.gallery [FOLDER]
"""

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

from shared.notebook.drawing import Canvas
from shared.notebook.plotting import GREEN, ORANGE, PURPLE, RED
from tests.tools.architecture import ROOT

STYLE = """
body { font: 16px sans-serif; margin: 0; color: #222 }
section { padding: 1em 2em; display: flex; gap: 2em; align-items: center }
section.dark { background: #111; color: #eee }
.half svg { width: 50%; height: auto }
"""


def vectors() -> Canvas:
    """Vectors with names, a sign, another colour and no numbers."""
    canvas = Canvas(13, 4.6, "A vector is a row of cells: the farther from 0, the stronger")
    canvas.vector(
        3,
        0.6,
        [0.1, 0.5, 1.0, -0.7],
        name="with signs",
        columns=["light", "person", "dark", "old"],
        cell=(1.3, 1),
    )
    canvas.vector(3, 2.1, [0.25, 0.75], name="two digits", numbers=".2f", color=RED)
    canvas.vector(3, 3.4, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0], name="colour only", numbers=None, color=GREEN)
    return canvas


def matrices() -> Canvas:
    """A named matrix, and one whose forbidden cells are hatched."""
    canvas = Canvas(15, 5.4, "A forbidden cell is hatched, so it needs no colour")
    canvas.matrix(
        1.8,
        0.9,
        [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]],
        rows=["a", "b", "c"],
        columns=["x", "y"],
        name="weights",
    )
    blocked = [[j > i for j in range(4)] for i in range(4)]
    ones = [[0.5] * 4 for _ in range(4)]
    canvas.matrix(8.5, 0.6, ones, blocked=blocked, color=ORANGE, name="a causal mask")
    return canvas


def boxes_and_arrows() -> Canvas:
    """Boxes, plain and bowed arrows, arrows whose width is a share."""
    canvas = Canvas(16, 5.2, "An arrow may carry a label, and its width a share")
    first = canvas.box(0.5, 1.6, 4, 1.6, "encoder", detail="reads the sentence")
    second = canvas.box(10.5, 1.6, 4.5, 1.6, "decoder", detail="writes another", color=PURPLE)
    canvas.arrow(first.right, second.left, "one vector")
    canvas.arrow(first.top, second.top, "bowed upwards", bend=0.25, color=RED)
    for number, share in enumerate((0.05, 0.3, 1.0)):
        x = 2.5 + 4.5 * number
        canvas.arrow((x, 4.5), (x + 3, 4.5), share=share, color=ORANGE)
        canvas.text(x - 0.9, 4.5, f"{share:.2f}")
    return canvas


def tokens_and_braces() -> Canvas:
    """A row of tokens with two of them filled, under braces on all sides."""
    canvas = Canvas(16, 5.0, "A brace says what belongs together")
    words = canvas.tokens(2.2, 1.9, ["the", "dog", "limps", "because", "it", "fell"], strong=[1, 4])
    canvas.brace((2.3, 1.7), (words[2].right[0], 1.7), "the reason", side="above")
    canvas.brace((2.3, 3.0), (words[5].right[0], 3.0), "six tokens")
    canvas.brace((2.0, 1.9), (2.0, 2.8), "row", side="left")
    canvas.brace((14.5, 1.9), (14.5, 2.8), "row", side="right")
    return canvas


def stack() -> Canvas:
    """A stack of layers with a brace beside it."""
    canvas = Canvas(11, 6.0, "Layers are read from the bottom upwards")
    layers = canvas.layers(1, 0.4, ["embedding", "block 1", "block 2", "output"])
    canvas.brace((5.3, layers[2].y), (5.3, layers[1].bottom[1]), "the same twice", side="right")
    return canvas


def chinese() -> Canvas:
    """Labels in Chinese: live text, drawn with a font of the reader."""
    canvas = Canvas(13, 4.4, "中文标签 beside English ones")
    words = canvas.tokens(0.5, 0.6, ["狗", "瘸了", "因为", "它", "摔倒了"], strong=[0, 3])
    canvas.arrow(words[3].bottom, words[0].bottom, "指代", bend=-0.4, share=0.2, color=ORANGE)
    return canvas


PICTURES: dict[str, Callable[[], Canvas]] = {
    "vector": vectors,
    "matrix": matrices,
    "box, arrow": boxes_and_arrows,
    "tokens, brace": tokens_and_braces,
    "layers": stack,
    "Chinese": chinese,
}


def write(folder: Path) -> Path:
    """Write the page and a PNG of each picture that has one; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, draw in PICTURES.items():
        canvas, alt = draw(), " ".join((draw.__doc__ or "").split())
        svg = canvas.svg(alt)
        sections.append(f"<section><h2>{escape(name)}</h2>{svg}</section>")
        sections.append(f'<section class="dark">{svg}<div class="half">{svg}</div></section>')
        if (png := canvas.png()) is not None:
            (folder / f"{name.replace(', ', '_')}.png").write_bytes(png)
    page = folder / "index.html"
    text = "\n".join(sections)
    page.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Drawings</title><style>{STYLE}</style>\n'
        f"<h1>The primitives of shared/notebook/drawing.py</h1>\n{text}\n</html>\n",
        encoding="utf-8",
        newline="\n",
    )
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) > 1:
        print("usage: python -m tests.tools.gallery [FOLDER]", file=sys.stderr)
        return 2
    print(write(Path(arguments[0]) if arguments else ROOT / "build" / "gallery"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
