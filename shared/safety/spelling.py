"""Look-alike characters, spaced, doubled and replaced letters back to plain words.

`fold` works character by character. `Speller` finds the cheapest reading of a row of letters as known
words, by keys in which all spellings of a word agree; what it does not know stays. The time grows with
the length of a text.

Left out: other languages than English, missing and exchanged letters, and words that are pictures.

Follows Norvig (2009, "Natural Language Corpus Data") for cutting letters into words.

Explained and proven in deployment/05_content.ipynb; written from there by `make promote`.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping

from shared.checks import check_text, require

# Letters that look like Latin ones, and letters that Unicode does not take apart. Accents are gone before.
LOOKS = {
    "a": "аα",
    "b": "вьβ",
    "c": "сϲ",
    "d": "ԁđ",
    "e": "еєε",
    "g": "ɡ",
    "h": "һнħ",
    "i": "іιı",
    "j": "ј",
    "k": "кκ",
    "l": "ӏłɩ",
    "m": "м",
    "n": "ηпո",
    "o": "оοσøө",
    "p": "рρ",
    "q": "ԛ",
    "r": "г",
    "s": "ѕς",
    "t": "тτŧ",
    "u": "υцս",
    "v": "νѵ",
    "w": "ωѡшԝ",
    "x": "хχ",
    "y": "уүγ",
    "z": "ζ",
    "'": "’‘ʼ´`",
}
CONFUSABLES = str.maketrans({mark: letter for letter, marks in LOOKS.items() for mark in marks})
# Greek capitals that look like another letter than their small ones do.
CAPITALS = str.maketrans("ΝΗΥΒΜ", "NHYBM")
INVISIBLE = ("Mn", "Me", "Cf")  # accents, frames, and what has no width


def fold(text: str) -> str:
    """Return a text in lower case, without accents, wide or mathematical letters, look-alikes, invisible characters.

    Raises TypeError if it is no text.
    """
    check_text("text", text)
    parts = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).translate(CAPITALS).casefold())
    return "".join(char for char in parts if unicodedata.category(char) not in INVISIBLE).translate(
        CONFUSABLES
    )


# Digits and signs that stand for letters. What may be an i, an l or a 1 becomes an l, in words as in keys.
LEET = str.maketrans("@4837!|10$5+29", "aabetlllosstzg")
READ = LEET | str.maketrans("!1", "ii")  # in a word that nobody knows
DISGUISED = re.compile(r"[^a-z]|(.)\1\1|(.)\2.*(.)\3")
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
PIECE = re.compile(r"[a-z0-9'@$!|+]+")
ALONE = re.compile(r"[\d']+|[!@$|+]+")  # a number, or signs: no word
LONGEST, LONGEST_RUN = 40, 7  # symbols of one word, and equal ones in a row
RUN = re.compile(rf"(.)\1{{{LONGEST_RUN},}}")


def key_of(word: str) -> str:
    """Return what is left of a word's spelling: i and l are one letter, and doubled letters are single."""
    kept = ""
    for char in word.translate(LEET).replace("i", "l"):
        if char in LETTERS and not kept.endswith(char):
            kept += char
    return kept


def count_words(texts: Iterable[str]) -> dict[str, int]:
    """Return how often each word of plain texts occurs, in lower case, without apostrophes; words of a to z only."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"[a-z']+", fold(text)):
            bare = word.replace("'", "")
            if bare:
                counts[bare] = counts.get(bare, 0) + 1
    return counts


class Speller:
    """Finds the words in a text whose spelling is disguised.

    Args:
        counts: How often each word occurs, in lower case without apostrophes; from plain texts.

    Raises:
        ValueError: There is no word, or a word is not of the letters a to z, or a count is not above 0.
    """

    # What each choice costs, in nats: a border where no sign stands, a sign inside a word, another spelling than the
    # written one, a word that nobody knows, one that looks disguised besides, a letter by itself.
    BORDER, INSIDE, RESPELLED, UNKNOWN, ODD, LETTER = 5.0, 2.0, 5.0, 13.0, 12.0, 9.0

    def __init__(self, counts: Mapping[str, int]) -> None:
        require("counts", len(counts), bool(counts), "at least one word")
        for word, n in counts.items():
            require(
                f"counts[{word!r}]",
                n,
                LETTERS.issuperset(word) and n > 0,
                "a word of a to z and a count above 0",
            )
        total = sum(counts.values()) + len(counts)
        self.costs = {word: math.log(total / (n + 0.5)) for word, n in counts.items()}
        # Of the words with one key, the most frequent; and all beginnings of keys, so that a search ends early.
        self.words: dict[str, str] = {}
        for word in sorted(counts, key=lambda word: (-counts[word], word)):
            self.words.setdefault(key_of(word), word)
        self.beginnings = {key[:n] for key in self.words for n in range(1, len(key) + 1)}

    def undisguise(self, text: str) -> str:
        """Return the words of a text in lower case, without apostrophes, with spaces between and . , ? ! kept.

        The time grows with the length of the text, not faster. Raises TypeError if it is no text.
        """
        written: list[str] = []
        island: list[str] = []  # pieces that may belong together
        folded, end = RUN.sub(lambda run: run[0][:LONGEST_RUN], fold(text)), 0
        for match in PIECE.finditer(folded):
            between, piece = folded[end : match.start()], match[0]
            mark = next((char for char in between if char in ".,?;:"), "") if " " in between else ""
            # Two spaces, or a mark with a space, end a word for certain.
            if island and (mark or between.count(" ") > 1 or "\n" in between):
                written += [*self._words_of(island), *mark]
                island = []
            bare, end = piece.rstrip("!|+").strip("'"), match.end()
            if ALONE.fullmatch(piece) or not bare:
                written += [*self._words_of(island), piece]
                island = []
            else:
                island.append(bare.replace("'", ""))
                if len(bare) < len(piece.strip("'")):
                    written += [*self._words_of(island), "!"]
                    island = []
        written += self._words_of(island)
        if folded.rstrip()[-1:] in (".", "?"):
            written.append(folded.rstrip()[-1])
        return " ".join(written)

    def _words_of(self, pieces: list[str]) -> list[str]:
        """Return the cheapest way to read pieces, between which single signs stand, as words."""
        # Where all pieces are known words there is nothing to search.
        if all((len(piece) > 1 and piece in self.costs) or piece in ("a", "i") for piece in pieces):
            return pieces
        symbols = "".join(pieces)
        spelled = symbols.translate(LEET).replace("i", "l")
        starts, begin = {}, 0
        for piece in pieces:
            starts[begin] = piece
            begin += len(piece)
        best = [0.0] + [math.inf] * len(symbols)
        back: list[tuple[int, str]] = [(0, "")] * (len(symbols) + 1)

        def offer(begin: int, end: int, cost: float, word: str) -> None:
            cost += best[begin] + (0.0 if end in starts or end == len(symbols) else self.BORDER)
            if cost < best[end]:
                best[end], back[end] = cost, (begin, word)

        for begin in range(len(symbols)):
            # A piece as it stands, known or not; or its first letter alone.
            if piece := starts.get(begin):
                known = self.costs.get(piece)
                unknown = self.UNKNOWN + self.ODD * bool(DISGUISED.search(piece))
                offer(begin, begin + len(piece), unknown if known is None else known, piece.translate(READ))
            offer(begin, begin + 1, self.LETTER, symbols[begin].translate(READ))
            # All words whose key begins here.
            key, inside, same = "", 0, 0
            for end in range(begin + 1, min(begin + LONGEST, len(symbols)) + 1):
                char = spelled[end - 1]
                inside += end - 1 in starts and end - 1 > begin
                same = same + 1 if key.endswith(char) else 0
                if not same:
                    key += char
                if same > LONGEST_RUN or key not in self.beginnings:
                    break
                word = self.words.get(key)
                if word is not None:
                    respelled = self.RESPELLED * (symbols[begin:end] != word)
                    offer(begin, end, self.costs[word] + self.INSIDE * inside + respelled, word)
        words, end = [], len(symbols)
        while end:
            end, word = back[end]
            words.append(word)
        return words[::-1]
