"""Repair text whose UTF-8 bytes were read with an old one-byte encoding, and leave genuine letters alone.

`fix_mojibake` looks for sequences of characters that are the images of UTF-8 bytes in Windows-1252 or
Latin-1. Narrower than ftfy (Speer, 2019): no other encodings, no sequence that lost a byte.

Explained and proven in ch02_text_data/01_cleaning.ipynb; written from there by `make promote`.
"""

import re

# The byte behind each character that a wrong decoder made; Windows-1252 leaves five bytes to Latin-1.
BYTE_OF = {chr(byte): byte for byte in range(0x80, 0x100)} | {
    bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0xA0)
}
_REST = "[" + "".join(re.escape(char) for char, byte in BYTE_OF.items() if byte < 0xC0) + "]"
_TWO = f"[\xc2-\xc5\xce-\xd1\xd7-\xdb]{_REST}"  # Latin, Greek, Cyrillic, Hebrew, Arabic
_TWICE = "Æ’|Ë[†œ]"  # ƒ, ˆ and ˜, which a second wrong decoding meets
MOJIBAKE = re.compile(f"(?:{_TWICE}|{_TWO}|[\xe0-\xef]{_REST}{{2}}|\xf0{_REST}{{3}})+")
CLOSING_MARKS = frozenset("…’”“»›–—™®ªº·\xa0")


def fix_mojibake(text: str) -> str:
    """Repair UTF-8 that was decoded as Windows-1252 or Latin-1, up to three times over.

    A lone sequence that can be genuine stays: a letter at the end of a word, and closing marks, such as the
    last two of “MAÇÔ. Narrower than ftfy: no other encodings, no sequence that lost a byte.
    """
    for _ in range(3):
        text = MOJIBAKE.sub(_repair, text)
    return text


def _repair(match: re.Match[str]) -> str:
    broken, text = match[0], match.string
    try:
        repaired = bytes(BYTE_OF[char] for char in broken).decode("utf-8")
    except UnicodeDecodeError:
        return broken
    if len(repaired) > 1 or broken[0] == "Â" or not CLOSING_MARKS.issuperset(broken[1:]):
        return repaired  # no word of any language ends in Â
    before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
    if before.isalpha():
        return broken if before.isupper() == broken[0].isupper() else repaired
    # A letter by itself in quotation marks is genuine. Ð never stands alone; Ã with U+00A0 is à.
    return repaired if after.isalpha() or broken[0] == "Ð" or broken[1] == "\xa0" else broken
