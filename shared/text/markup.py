"""Take HTML out of a text that may also hold code, comparisons and arrows: the words stay, tags and
references go.

`unescape_html` knows the elements of HTML and the form of a tag, and keeps what is more likely text. Its
work is proportional to the length of the text, whatever stands in it. Left out: parsing, the content of
pages made by scripts, and character references without a semicolon.

Explained and proven in ch02_text_data/01_cleaning.ipynb; written from there by `make promote`.
"""

import html
import re
from html.entities import html5

# The elements of HTML, those of former editions too; br, script and style have rules of their own.
BLOCK_ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "address article aside blockquote body caption center col colgroup dd details dialog dir div dl dt "
        "fieldset figcaption figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li "
        "main menu nav noscript ol optgroup option p pre search section summary table tbody template tfoot thead title "
        "tr ul",
    )
)
INLINE_ELEMENTS = frozenset(
    re.findall(
        r"\w+",
        "a abbr acronym applet area audio b base bdi bdo big button canvas cite code data datalist del dfn em embed "
        "font frame i iframe img input ins kbd label link map mark meta meter noframes object output param picture "
        "progress q rp rt ruby s samp select slot small source span strike strong sub sup svg td textarea th time "
        "track tt u var video wbr",
    )
)
# Possessive repetition, `++` and `*+`, never gives back what it took: no place is read twice.
_ALONE = (  # attributes without a value
    "allowfullscreen|async|autofocus|autoplay|checked|compact|controls|crossorigin|default|defer|disabled|download|"
    "formnovalidate|hidden|inert|ismap|itemscope|loop|multiple|muted|nohref|nomodule|noresize|noshade|novalidate|"
    r"nowrap|open|playsinline|readonly|required|reversed|selected|data-[\w.-]+"
)
_VALUE = r"""(?:"[^"<]*+"|'[^'<]*+'|[^\s"'<>]++)"""
_ATTRIBUTES = rf"(?:\s++(?:[\w:.@-]++\s*+=\s*+{_VALUE}|(?:{_ALONE})(?=[\s/>])))*+\s*+/?"
INVISIBLE_HTML = re.compile(r"(?i)<!(--)|<(script|style)\b[^<>]*+>|<!doctype[^<>]*+>")
INVISIBLE_ENDS = {
    "--": re.compile("-->"),
    "script": re.compile(r"(?i)</script\s*+>"),
    "style": re.compile(r"(?i)</style\s*+>"),
}
LINE_BREAK = re.compile(rf"(?i)</?br{_ATTRIBUTES}>\n?")
TAG = re.compile(rf"(?i)<(/?)([a-z][a-z0-9]*+)({_ATTRIBUTES})>")
CLOSING_TAG = re.compile(r"(?i)</([a-z][a-z0-9]*+)\s*+>")
CHARACTER_REFERENCE = re.compile(r"&([A-Za-z][A-Za-z0-9]*;|#[0-9]{1,7};|#[xX][0-9A-Fa-f]{1,6};)")


def unescape_html(text: str) -> str:
    """Remove HTML tags and comments, then replace character references such as `&eacute;`, once.

    A tag has the name of an HTML element and attributes that HTML allows, without `<` inside. A bare opening tag that
    the text nowhere closes stays if it follows a letter or digit (`vector<p>`) or is inline (`cp <source>`). Only
    references that end in a semicolon are replaced. A block element leaves an empty line. This is no parser.
    """
    text = LINE_BREAK.sub("\n", remove_invisible_html(text))
    closed = {name.lower() for name in CLOSING_TAG.findall(text)}

    def instead(tag: re.Match[str]) -> str:
        name, is_block = tag[2].lower(), tag[2].lower() in BLOCK_ELEMENTS
        if not is_block and name not in INLINE_ELEMENTS:
            return tag[0]
        doubtful = not (tag[1] or tag[3].strip() or name in closed or name in ("hr", "wbr"))
        if doubtful and (not is_block or text[max(0, tag.start() - 1) : tag.start()].isalnum()):
            return tag[0]
        return "\n\n" if is_block else ""

    return CHARACTER_REFERENCE.sub(
        lambda found: html.unescape(found[0]) if "#" in found[0] else html5.get(found[1], found[0]),
        TAG.sub(instead, text),
    )


def remove_invisible_html(text: str) -> str:
    """Remove comments, scripts and styles with what they hold, and document types; what has no end stays."""
    kept, position, endless = [], 0, set()  # the kinds of which no end follows
    for opening in INVISIBLE_HTML.finditer(text):
        kind = (opening[1] or opening[2] or "").lower()
        if opening.start() < position or kind in endless:
            continue
        end = INVISIBLE_ENDS[kind].search(text, opening.end()) if kind else opening
        if end is None:
            endless.add(kind)
        else:
            kept.append(text[position : opening.start()])
            position = end.end()
    return "".join(kept) + text[position:]
