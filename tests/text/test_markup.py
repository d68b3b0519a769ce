"""`shared.text.markup`: what is HTML goes, what only looks like it stays; in time proportional to the length."""

import html
import re
from html.entities import html5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.text.markup import BLOCK_ELEMENTS, INLINE_ELEMENTS, remove_invisible_html, unescape_html


def test_every_named_reference_agrees_with_the_standard_library():
    names = [f"&{name}" for name in html5 if name.endswith(";")]
    numbers = [f"&#{number};" for number in (0, 9, 38, 128, 159, 0xD800, 0x10FFFF, 0x110000)]
    assert [unescape_html(text) for text in names + numbers] == [html.unescape(t) for t in names + numbers]


@pytest.mark.parametrize(
    "text",
    [
        "x < y and y > z",
        "a<b and b>c",
        "List<String>",
        "I <3 you",
        "AT&T",
        "?a=1&copy=2",
        "&nothing;",
        "<>",
        "< p >",
        "vector<i> v;",
        "vector<p> v;",
        "std::map<a, b>",
        "Optional<Button> and List<Object>",
        "if (a<b && c>d)",
        "for (i = 0; i<s; i++) x<u>y",
        "cp <source> <output>",
        "x <a and b> y",
        "<!-- no end",
        "<script>no end",
        "<!doctype html",
        '<img alt="a < b">',
    ],
)
def test_what_only_looks_like_html_stays(text):
    assert unescape_html(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<a href="x?a=1" class=b>link</a>', "link"),
        ("<P>one</P>", "\n\none\n\n"),
        ("one<br>two<BR />three", "one\ntwo\nthree"),
        ("<script type='a'>if (a < b) {}</script>text<style>p {}</style>", "text"),
        ("<!DOCTYPE html><!-- no > text -->yes", "yes"),
        ("&lt;b&gt;", "<b>"),
        ("&amp;lt;", "&lt;"),
        ("<main>text</main>", "\n\ntext\n\n"),
        ("the <main>", "the \n\n"),
        ("<input disabled>a<input required type=text>", "a"),
        ("<details open>a</details>", "\n\na\n\n"),
        ("<INPUT CHECKED/>", ""),
        ('<video controls src="a.mp4" data-x muted></video>', ""),
        ('<br clear="all">a</br>b', "\na\nb"),
        ("a<hr>b<wbr>c", "a\n\nbc"),
        ("H<sub>2</sub>O and x<i >y</i\n>", "H2O and xy"),
        ("<p>one<p>two</p>", "\n\none\n\ntwo\n\n"),
        ("<custom-tag>a</custom-tag>", "<custom-tag>a</custom-tag>"),
        ("<style>a</style><script>b</script >c", "c"),
        ("<script>a<!--</script>b<!--c-->d", "bd"),
        ("<!--<script>-->a</script>", "a</script>"),
    ],
)
def test_html_is_removed(text, expected):
    assert unescape_html(text) == expected


@pytest.mark.parametrize("name", sorted(BLOCK_ELEMENTS | INLINE_ELEMENTS))
def test_every_element_of_html_is_a_tag(name):
    space = "\n\n" if name in BLOCK_ELEMENTS else ""
    assert unescape_html(f"<{name}>x</{name}>") == f"{space}x{space}"
    assert unescape_html(f"<{name.upper()} class='a' id=b hidden>x") == f"{space}x"
    assert unescape_html(f"<{name}s>x") == f"<{name}s>x"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a <b>bold word", "a <b>bold word"),  # a page cut off before its closing tag
        ("vector<i> and <i>more</i>", "vector and more"),  # a type, and its name as a closed element
        ("git log <section>", "git log \n\n"),  # a placeholder named like a block
        ('<img alt="a < b">', '<img alt="a < b">'),  # < inside an attribute
    ],
)
def test_the_limits_that_the_chapter_names(text, found):
    assert unescape_html(text) == found


def slow_without_invisible(text: str) -> str:
    """The same in one pattern that reads to the end of the text at each place."""
    pattern = r"(?is)<!--.*?-->|<!doctype[^<>]*>|<(script|style)\b[^<>]*>.*?</\1\s*>"
    return re.sub(pattern, "", text)


PARTS = [
    "<!--",
    "-->",
    "->",
    "<script",
    "<script>",
    "</script >",
    "<style a>",
    "</STYLE>",
    "<!doctype",
    ">",
    "<",
    "a ",
    "\n",
]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join))
def test_invisible_html_goes_as_by_one_slow_pattern(text):
    assert remove_invisible_html(text) == slow_without_invisible(text)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<", ">", "a", "<b>", "</b>", "<p ", "x=", "'", '"', " ", "i", "&lt;", "1"])
    ).map("".join)
)
def test_letters_and_digits_outside_of_angle_brackets_stay(text):
    outside = re.sub(r"<[^<>]*>", "", text).replace("&lt;", "")
    kept = iter(unescape_html(text))
    assert all(letter in kept for letter in outside if letter.isalnum())
