"""`shared.text.markup`: what is HTML goes, what only looks like it stays; in time proportional to the length."""

import html
from html.entities import html5

import pytest

from shared.text.markup import unescape_html


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
    ],
)
def test_html_is_removed(text, expected):
    assert unescape_html(text) == expected
