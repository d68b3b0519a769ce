"""`shared/notebook/drawing.py` and `lettering.py`: what is given is drawn, labels stand free and can be read."""

import base64
import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from matplotlib import rc_context

from shared.notebook import drawing
from shared.notebook.drawing import Canvas, faults, show
from shared.notebook.lettering import (
    CHINESE_FONTS,
    INK,
    PAPER,
    SMALL,
    Area,
    contrast,
    fonts_for,
    mix,
    readable,
    text_size,
)
from shared.notebook.plotting import COLORS
from tests.tools import gallery
from tests.tools.architecture import notebooks

SVG = "{http://www.w3.org/2000/svg}"
PICTURES = list(gallery.PICTURES.items())


def texts(canvas: Canvas) -> list[str]:
    """Return the live text of a picture's SVG, a line each."""
    root = ET.fromstring(canvas.svg("a picture"))
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


def canvas() -> Canvas:
    return Canvas(16, 8)


# --- Primitives draw what they are given


def test_a_vector_shows_its_numbers_and_names():
    picture = canvas()
    area = picture.vector(2, 1, [0.5, -0.25], name="it", columns=["up", "down"], numbers=".2f")
    assert sorted(texts(picture)) == sorted(["0.50", "−0.25", "it", "up", "down"])
    assert (area.width, area.height) == (2, 1)
    assert area.left == (2, 1.5) and area.right == (4, 1.5) and area.bottom == (3, 2) and area.top == (3, 1)


def test_a_matrix_takes_tensors_and_hides_blocked_cells():
    picture = canvas()
    blocked = torch.ones(3, 3, dtype=torch.bool).triu(1)
    area = picture.matrix(
        1, 1, torch.eye(3), blocked=blocked, rows="abc", columns="xyz", name="m", cell=(1.5, 1)
    )
    assert sorted(texts(picture)) == sorted([*"abcxyz", "m", "1.0", "1.0", "1.0", "0.0", "0.0", "0.0"])
    assert (area.width, area.height) == (4.5, 3)
    assert picture.svg("m").count("url(#h") == 3  # hatched


def test_stronger_numbers_have_darker_cells():
    picture = canvas()
    picture.vector(1, 1, [0.0, 0.3, 0.6, 0.9], numbers=None)
    shades = [sum(patch.get_facecolor()[:3]) for patch in picture.axes.patches]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == 4


def test_boxes_tokens_layers_and_braces_carry_their_words():
    picture = Canvas(16, 12, "A title")
    picture.box(1, 1, 4, 2, "encoder", detail="reads")
    areas = picture.tokens(1, 4, ["the", "dog"], strong=[1])
    stack = picture.layers(8, 1, ["first", "second"])
    picture.brace((1, 6), (5, 6), "all of it")
    assert texts(picture) == ["A title", "encoder", "reads", "the", "dog", "first", "second", "all of it"]
    assert areas[0].right[0] < areas[1].left[0]
    assert stack[0].y > stack[1].y  # the first layer is at the bottom


@pytest.mark.parametrize("side", ["below", "above", "left", "right"])
def test_the_label_of_a_brace_is_on_its_side(side):
    picture = canvas()
    ends = ((4, 4), (8, 4)) if side in ("below", "above") else ((4, 2), (4, 6))
    picture.brace(*ends, "label", side=side)
    x, y = picture.labels[0].area.centre
    assert {"below": y > 4, "above": y < 4, "left": x < 4, "right": x > 4}[side]


def test_the_width_of_an_arrow_is_its_share_and_its_label_lies_on_it():
    picture = canvas()
    for share in (0.0, 0.5, 1.0):
        picture.arrow((1, 1), (6, 1), share=share)
    widths = [patch.get_linewidth() for patch in picture.axes.patches]
    assert widths[1] - widths[0] == pytest.approx(widths[2] - widths[1])
    assert widths[2] > widths[0] > 0
    picture.arrow((1, 5), (9, 5), "flat")
    picture.arrow((9, 5), (1, 5), "bowed", bend=0.5)
    flat, bowed = (label.area.centre for label in picture.labels)
    assert flat == pytest.approx((5, 5)) and bowed == pytest.approx((5, 3))


def test_a_text_on_paper_hides_the_arrow_behind_it():
    picture = canvas()
    picture.arrow((1, 1), (9, 1))
    area = picture.text(5, 1, "word", paper=True)
    arrow, paper = picture.axes.patches
    assert arrow.get_zorder() < paper.get_zorder() < picture.axes.texts[-1].get_zorder()
    assert paper.get_x() < area.x and paper.get_x() + paper.get_width() > area.x + area.width
    picture.text(5, 3, "word")
    assert len(picture.axes.patches) == 2


# --- Labels stand free


@pytest.mark.parametrize(("name", "draw"), PICTURES, ids=[name for name, _ in PICTURES])
def test_no_label_of_the_gallery_overlaps_or_leaves_the_picture(name, draw):
    assert faults(draw()) == []


def test_faults_finds_overlapping_labels_and_those_outside():
    picture = canvas()
    picture.text(4, 4, "the first label")
    picture.text(5, 4.2, "the second")
    picture.text(0, 7, "half outside")
    assert faults(picture) == ["'the first label' overlaps 'the second'", "'half outside' leaves the picture"]
    with pytest.raises(ValueError, match="overlaps"):
        show(picture, "two labels")


def test_labels_that_nearly_touch_count_as_overlapping():
    assert Area(0, 0, 1, 1).meets(Area(1.05, 0, 1, 1))
    assert not Area(0, 0, 1, 1).meets(Area(1.2, 0, 1, 1))
    assert not Area(0, 0, 1, 1).meets(Area(0, 1, 1, 1))


# --- Legible: size, contrast, light and dark


@pytest.mark.parametrize(("name", "draw"), PICTURES, ids=[name for name, _ in PICTURES])
def test_the_smallest_text_is_legible_at_half_width_and_every_text_has_contrast(name, draw):
    for label in draw().labels:
        assert label.size / 2 >= 5
        assert contrast(label.color, label.ground) >= 4.5


@pytest.mark.parametrize(("name", "draw"), PICTURES, ids=[name for name, _ in PICTURES])
def test_a_picture_has_a_light_ground_of_its_own_so_that_dark_pages_do_not_matter(name, draw):
    picture = draw()
    first = next(ET.fromstring(picture.svg("ground")).iter(f"{SVG}path"))
    assert first.get("style") == "fill: #ffffff"
    corners = [float(number) for number in re.findall(r"[\d.]+", first.get("d"))]
    view = [float(number) for number in ET.fromstring(picture.svg("ground")).get("viewBox").split()]
    assert max(corners) == max(view)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("share", [0.04, 0.35, 0.6, 0.94])
def test_text_in_a_cell_of_any_colour_can_be_read(color, share):
    ground = mix(color, share)
    assert contrast(readable(INK, ground), ground) >= 4.5
    assert contrast(readable(color), PAPER) >= 4.5


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


# --- SVG, PNG, alt text


@pytest.mark.parametrize(("name", "draw"), PICTURES, ids=[name for name, _ in PICTURES])
def test_a_second_run_gives_the_same_bytes_whatever_the_style(name, draw, recwarn):
    picture = draw()
    once = picture.svg("same"), picture.png()
    with rc_context({"font.size": 20, "svg.fonttype": "path", "figure.constrained_layout.use": True}):
        picture = draw()
        assert (picture.svg("same"), picture.png()) == once
    assert not recwarn


def test_svg_has_live_text_a_role_and_a_description():
    picture = canvas()
    picture.text(4, 4, "a < b & c")
    root = ET.fromstring(picture.svg('what "it" sees: a < b'))
    assert root.get("role") == "img" and root.get("aria-label") == 'what "it" sees: a < b'
    assert root.find(f"{SVG}title").text == 'what "it" sees: a < b'
    assert texts(picture) == ["a < b & c"]
    assert "date" not in picture.svg("x").lower() and "matplotlib" not in picture.svg("x").lower()


def test_show_displays_svg_png_and_the_description(monkeypatch):
    shown = []
    monkeypatch.setattr(drawing, "display", lambda data, **options: shown.append((data, options)))
    picture = canvas()
    picture.text(4, 4, "a word")
    show(picture, "A word alone.")
    data, options = shown[0]
    assert data["text/plain"] == "A word alone." and data["image/svg+xml"] == picture.svg("A word alone.")
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "A word alone."}}}


def test_chinese_counts_one_em_and_needs_a_font_for_png_only(recwarn):
    assert text_size("因为", 12)[0] == pytest.approx(2 * text_size("因", 12)[0])
    assert text_size("因a", 12)[0] == pytest.approx(text_size("因", 12)[0] + text_size("a", 12)[0])
    picture = canvas()
    picture.text(4, 4, "因为")
    svg = picture.svg("a word")
    assert "因为" in svg and all(font in svg for font in (*CHINESE_FONTS, "sans-serif"))
    assert (picture.png() is None) == (fonts_for("因为") is None)
    assert not recwarn


# --- Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: Canvas(0, 3), "width must be"),
        (lambda c: Canvas(3, -1), "height"),
        (lambda c: Canvas(20, 3), "at most 19"),
        (lambda c: Canvas(3, 3, "a title that is much too long"), "title must fit"),
        (lambda c: c.text(1, 1, " "), "text must not be empty"),
        (lambda c: c.text(1, 1, "tiny", size=SMALL - 1), "at least"),
        (lambda c: c.text(1, 1, "word", align="middle"), "align must be"),
        (lambda c: c.box(1, 1, 0, 1, "box"), "above 0"),
        (lambda c: c.box(1, 1, 1, 1, "a long word"), "'a long word' must fit"),
        (lambda c: c.box(1, 1, 2, 1, "box", detail="with a long detail"), "must fit"),
        (lambda c: c.vector(1, 1, []), "values must be"),
        (lambda c: c.matrix(1, 1, []), "values must be"),
        (lambda c: c.matrix(1, 1, [[1.0], [1.0, 2.0]]), r"lengths \[1, 2\]"),
        (lambda c: c.matrix(1, 1, [[1.0]], rows=["a", "b"]), "rows must be 1"),
        (lambda c: c.matrix(1, 1, [[1.0]], columns=["a", "b"]), "columns must be 1"),
        (lambda c: c.matrix(1, 1, [[1.0]], blocked=[[True, False]]), "blocked must have"),
        (lambda c: c.matrix(1, 1, [[1.0]], numbers=".9f"), "must fit"),
        (lambda c: c.tokens(1, 1, []), "words must not be empty"),
        (lambda c: c.tokens(1, 1, ["a"], strong=[1]), "strong"),
        (lambda c: c.tokens(1, 1, ["incomprehensibilities"]), "must fit"),
        (lambda c: c.layers(1, 1, []), "names must not be empty"),
        (lambda c: c.arrow((1, 1), (1, 1)), "two points"),
        (lambda c: c.arrow((1, 1), (2, 1), share=1.5), "1.5"),
        (lambda c: c.brace((1, 1), (2, 2)), "brace needs"),
        (lambda c: c.brace((1, 1), (1, 1)), "brace needs"),
        (lambda c: c.brace((1, 1), (4, 1), side="left"), "brace needs"),
        (lambda c: c.brace((1, 1), (4, 1), side="under"), "'under'"),
        (lambda c: show(c, " "), "alt must say"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(canvas())


# --- The gallery, and what notebooks have stored


def test_the_gallery_builds(tmp_path, capsys):
    assert gallery.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 3 * len(PICTURES)
    assert gallery.main(["one", "two"]) == 2


def test_every_stored_drawing_has_live_text_and_its_description():
    for path in notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                svg = "".join(output.get("data", {}).get("image/svg+xml", ""))
                if svg:
                    root = ET.fromstring(svg)
                    assert root.find(f"{SVG}title").text == "".join(output["data"]["text/plain"]), path.name
                    assert list(root.iter(f"{SVG}text")), path.name
