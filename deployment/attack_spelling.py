"""Two ways of disguising the spelling of a text, for testing a filter.

Neither knows which word matters: one to all words are hit, long ones more often.
"""

import random
import re
import unicodedata

LEET = {
    "a": "4@",
    "b": "8",
    "e": "3",
    "g": "9",
    "i": "1!",
    "l": "1|",
    "o": "0",
    "s": "5$",
    "t": "7+",
    "z": "2",
}
CYRILLIC = {
    "a": "\u0430",
    "c": "\u0441",
    "e": "\u0435",
    "i": "\u0456",
    "j": "\u0458",
    "o": "\u043e",
    "p": "\u0440",
    "s": "\u0455",
    "x": "\u0445",
    "y": "\u0443",
    "A": "\u0410",
    "B": "\u0412",
    "C": "\u0421",
    "E": "\u0415",
    "H": "\u041d",
    "K": "\u041a",
    "M": "\u041c",
    "O": "\u041e",
    "P": "\u0420",
    "T": "\u0422",
}
GREEK = {
    "a": "\u03b1",
    "e": "\u03b5",
    "i": "\u03b9",
    "k": "\u03ba",
    "n": "\u03b7",
    "o": "\u03bf",
    "p": "\u03c1",
    "t": "\u03c4",
    "u": "\u03c5",
    "v": "\u03bd",
    "w": "\u03c9",
    "x": "\u03c7",
    "y": "\u03b3",
    "A": "\u0391",
    "E": "\u0395",
    "I": "\u0399",
    "N": "\u039d",
    "O": "\u039f",
    "T": "\u03a4",
    "Y": "\u03a5",
}
MATH_STARTS = (0x1D400, 0x1D468, 0x1D4D0, 0x1D56C, 0x1D5A0, 0x1D5D4, 0x1D670)
MARKS = "\u0300\u0301\u0302\u0303\u0308\u030a\u0323\u0331"
STYLES = ("leet", "cyrillic", "greek", "wide", "math", "accent", "mixed")
SEPARATORS = (" ", ".", "-", "_", "*", "\u200b", "\u200c", "\u200d", "\u2060", "\u00b7")
WORD = re.compile(r"[^\W\d_]+")


def _pick(words: list[re.Match[str]], rng: random.Random) -> list[re.Match[str]]:
    """Draw one to all of the words, long ones more often, in the order of the text."""
    count = len(words) if rng.random() < 0.25 else rng.randint(1, len(words))
    keys = [rng.random() ** (1.0 / len(w.group()) ** 1.5) for w in words]
    order = sorted(range(len(words)), key=lambda i: -keys[i])
    return [words[i] for i in sorted(order[:count])]


def _swap(char: str, style: str, rng: random.Random) -> str:
    """Return a look-alike of an ASCII letter, or the letter where the style has none."""
    if style == "mixed":
        style = rng.choice(STYLES[:-1])
    if style == "leet":
        return rng.choice(LEET.get(char.lower(), char))
    if style in ("cyrillic", "greek"):
        return (CYRILLIC if style == "cyrillic" else GREEK).get(char, char)
    if style == "wide":
        return chr(ord(char) + 0xFEE0)
    if style == "math":
        index = ord(char) - 65 if char.isupper() else ord(char) - 71
        return chr(rng.choice(MATH_STARTS) + index)
    return unicodedata.normalize("NFC", char + rng.choice(MARKS))


def lookalike(text: str, rng: random.Random) -> str:
    """Replace 15 to 60 % of the letters (at least one) of some words by look-alikes."""
    words = [w for w in WORD.finditer(text) if any(c.isascii() for c in w.group())]
    if not words:
        return text
    style, share, chars = rng.choice(STYLES), rng.uniform(0.15, 0.6), list(text)
    for word in _pick(words, rng):
        places = [i for i in range(*word.span()) if text[i].isascii()]
        able = [i for i in places if _swap(text[i], style, rng) != text[i]]
        for i in rng.sample(able, min(len(able), max(1, round(share * len(places))))):
            chars[i] = _swap(text[i], style, rng)
    return "".join(chars) if chars != list(text) else lookalike(text, rng)


def spaced(text: str, rng: random.Random) -> str:
    """Pull the letters of some or all words apart with separators, or double letters."""
    words = [w for w in WORD.finditer(text) if len(w.group()) > 1]
    if not words:
        return text
    everything, doubling = rng.random() < 0.25, rng.random() < 0.2
    density = 1.0 if rng.random() < 0.6 else rng.uniform(0.3, 0.8)
    signs = [rng.choice(SEPARATORS)] if rng.random() < 0.8 else rng.sample(SEPARATORS, 3)
    chars = list(text)
    for word in words if everything else _pick(words, rng):
        gaps = list(range(word.start(), word.end() - 1))
        for i in rng.sample(gaps, max(1, round(density * len(gaps)))):
            chars[i] += text[i] * rng.randint(1, 2) if doubling else rng.choice(signs)
    if everything and not doubling and signs == [" "] and rng.random() < 0.7:
        chars = [c * 3 if c == " " else c for c in chars]
    return "".join(chars)
