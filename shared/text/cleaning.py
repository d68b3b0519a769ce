"""Clean raw text: repair it, strip what is no text, drop what is there twice, and judge what is left.

Small functions from text to text, which `clean` applies in order, and functions on collections: headers,
near-duplicates by MinHash and banding (Broder, 1997; Indyk and Motwani, 1998), quality rules (Rae and
others, 2021), overlap of test and training text (Brown and others, 2020). Left out: guessing the encoding
of bytes, parsing HTML, recognising languages, anything learned, and anything larger than memory.

Explained and proven in ch02_text_data/01_cleaning.ipynb; written from there by `make promote`.
"""

import html
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from html.entities import html5
from itertools import combinations

import numpy as np

from shared.checks import check_choice, check_several, check_sizes, check_text, require

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


_BLOCK = "p|div|hr|li|ul|ol|tr|table|h[1-6]|blockquote|section|article|header|footer|title|body|head|html"
_INLINE = "a|b|i|u|s|em|strong|span|small|sub|sup|code|img|td|th|font|meta|link|input|button|label"
_ATTRIBUTES = r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+))*\s*/?"""
INVISIBLE_HTML = re.compile(r"(?is)<!--.*?-->|<!doctype[^>]*>|<(script|style)\b[^>]*>.*?</\1\s*>")
LINE_BREAK = re.compile(r"(?i)<br\s*/?>\n?")
BLOCK_TAG = re.compile(rf"(?i)</?(?:{_BLOCK}){_ATTRIBUTES}>")
INLINE_TAG = re.compile(rf"(?i)</?(?:{_INLINE}){_ATTRIBUTES}>")
CHARACTER_REFERENCE = re.compile(r"&([A-Za-z][A-Za-z0-9]*;|#[0-9]{1,7};|#[xX][0-9A-Fa-f]{1,6};)")


def unescape_html(text: str) -> str:
    """Remove HTML tags and comments, then replace character references such as `&eacute;`, once.

    Only known elements are tags, and only references that end in a semicolon are replaced, by the table of the
    standard library. A block element leaves an empty line. This is no parser.
    """
    for pattern, instead in ((INVISIBLE_HTML, ""), (LINE_BREAK, "\n"), (BLOCK_TAG, "\n\n"), (INLINE_TAG, "")):
        text = pattern.sub(instead, text)
    return CHARACTER_REFERENCE.sub(
        lambda found: html.unescape(found[0]) if "#" in found[0] else html5.get(found[1], found[0]), text
    )


INVISIBLE = dict.fromkeys(
    [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
    + [0x00AD, 0x200B, 0x2060, 0xFEFF]  # soft hyphen, zero-width space, word joiner, byte order mark
) | dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")


def normalize_newlines(text: str) -> str:
    """Turn every kind of line end (CR LF, CR, form feed, NEL, Unicode's separators) into one LF."""
    return re.sub("\r\n|[\r\v\f\x85\u2028\u2029]", "\n", text)


def remove_control_characters(text: str) -> str:
    """Remove control characters except LF and tab, and invisible characters that carry no meaning.

    Joiners and direction marks stay: Hindi, Persian, Arabic and emoji need them. A lone surrogate, which UTF-8
    cannot express, becomes U+FFFD.
    """
    return text.translate(INVISIBLE)


def normalize_unicode(text: str) -> str:
    """Return the text in Unicode's form NFC (UAX 15): a letter and its marks as one character where one exists."""
    return unicodedata.normalize("NFC", text)


def drop_repeated_lines(text: str, minimum_words: int = 5) -> str:
    """Drop a line that equals the last non-empty line before it, if it has at least `minimum_words` words."""
    kept: list[str] = []
    for line in text.split("\n"):
        previous = next((earlier for earlier in reversed(kept) if earlier.strip()), None)
        if line == previous and len(line.split()) >= minimum_words:
            while not kept[-1].strip():  # the empty lines between the two go as well
                kept.pop()
        else:
            kept.append(line)
    return "\n".join(kept)


def collapse_blank(text: str) -> str:
    """Leave one space within a line, none at its end, and at most one empty line; indentation stays."""
    text = text.replace("\xa0", " ")
    text = re.sub(r"(?<=\S)[ \t]+", " ", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def remove_boilerplate(documents: Sequence[str], minimum_share: float = 0.3, edge: int = 3) -> list[str]:
    """Remove headers and footers: lines at the edge of a document that stand at the edges of many others.

    Many means three, and at least `minimum_share` of the documents; digits count as equal ("Page 7"). An edge is
    the first and the last `edge` non-empty lines. Raises ValueError for a share not in (0, 1] or an edge below 1.
    """
    documents = _checked(documents)
    _check_share("minimum_share", minimum_share)
    check_sizes(edge=edge)
    counts: Counter[str] = Counter()
    split = []  # for each document its lines, and what those at its edges look like
    for lines in (document.split("\n") for document in documents):
        filled = [number for number, line in enumerate(lines) if line.strip()]
        edges = {i: re.sub(r"\d+", "0", lines[i].strip()) for i in filled[:edge] + filled[-edge:]}
        counts.update(set(edges.values()))
        split.append((lines, edges))
    common = {line for line, count in counts.items() if count >= max(3, minimum_share * len(split))}
    kept = ([x for i, x in enumerate(lines) if edges.get(i) not in common] for lines, edges in split)
    return ["\n".join(lines).strip("\n") for lines in kept]


def _checked(documents: Iterable[str]) -> list[str]:
    check_several("documents", documents)
    for number, document in enumerate(documents := list(documents)):  # an iterator is read only once
        check_text(f"documents[{number}]", document)
    return documents


def _check_share(name: str, share: float) -> None:
    require(name, share, 0 < share <= 1, "above 0 and at most 1")


# Mojibake first: its repair needs the control characters and spaces that later steps change. Invisible characters
# go before HTML, which they break, and once more after it, as references can stand for them.
# fmt: off
DEFAULT_STEPS = (
    fix_mojibake, normalize_newlines, remove_control_characters, unescape_html, remove_control_characters,
    normalize_unicode, collapse_blank, drop_repeated_lines,
)
# fmt: on


def clean(text: str, steps: Iterable[Callable[[str], str]] = DEFAULT_STEPS) -> str:
    """Return one document after all the steps, in their order. Raises TypeError where `text` is no string."""
    check_text("text", text)
    for step in steps:
        text = step(text)
    return text


def shingles(text: str, n: int = 5) -> set[str]:
    """Return the set of runs of `n` lower-case words; a shorter text is one run, an empty one has none."""
    check_sizes(n=n)
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(first: set[str], second: set[str]) -> float:
    """Return the size of the intersection over that of the union; 1 for two empty sets."""
    return len(first & second) / len(first | second) if first or second else 1.0


def minhash_signature(items: Iterable[str], permutations: int = 128, seed: int = 0) -> np.ndarray:
    """Return the smallest hash of the items under each of many hash functions (Broder, 1997).

    Two signatures made with one seed agree in a share of places that estimates the Jaccard similarity. The shape
    is (permutations,), the type uint64; without items every place holds the prime.
    """
    check_sizes(permutations=permutations)
    prime = 2**31 - 1  # small enough that a product of two residues fits into 64 bits
    generator = np.random.default_rng(seed)
    factor, offset = generator.integers(1, prime, (2, permutations, 1), dtype=np.uint64)
    digests = [blake2b(item.encode("utf-8", "surrogatepass"), digest_size=8).digest() for item in items]
    hashes = np.array([int.from_bytes(digest) % prime for digest in digests], dtype=np.uint64)
    permuted = (factor * hashes + offset) % np.uint64(prime)  # (permutations, items)
    return permuted.min(axis=1, initial=prime)


def candidate_probability(similarity: float, rows: int, bands: int) -> float:
    """Return how likely two signatures agree in all `rows` of at least one of `bands` bands."""
    return 1 - (1 - similarity**rows) ** bands


def rows_per_band(threshold: float, permutations: int, recall: float = 0.99) -> int:
    """Return the most rows a band can have while pairs at the threshold are found with this probability."""
    divisors = [rows for rows in range(1, permutations + 1) if permutations % rows == 0]
    return max(
        r for r in divisors if r == 1 or candidate_probability(threshold, r, permutations // r) >= recall
    )


def near_duplicates(documents: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """Return pairs of documents whose sets of five-word shingles have a Jaccard similarity of `threshold` or more.

    Bands of MinHash signatures propose the pairs, and the exact similarity decides. A pair at the threshold is
    missed in at most 1 of 100 cases, a more similar one less often; below a threshold of 0.04 more are missed.
    Raises ValueError for a threshold not in (0, 1], TypeError for documents that are no strings.
    """
    documents = _checked(documents)
    _check_share("threshold", threshold)
    sets = [shingles(document) for document in documents]
    buckets = defaultdict(list)
    for number, items in enumerate(sets):
        bands = minhash_signature(items).reshape(-1, rows_per_band(threshold, 128))  # (bands, rows)
        for position, band in enumerate(bands):
            buckets[position, band.tobytes()].append(number)
    candidates = {pair for members in buckets.values() for pair in combinations(members, 2)}
    scored = [(i, j, jaccard(sets[i], sets[j])) for i, j in sorted(candidates)]
    return [pair for pair in scored if pair[2] >= threshold]


def deduplicate(documents: Sequence[str], threshold: float = 0.8) -> list[int]:
    """Return the numbers of the documents to keep: each that is no near-duplicate of one kept before it."""
    documents = _checked(documents)
    dropped: set[int] = set()
    # In the order of i, so whether i is kept is settled.
    for i, j, _ in near_duplicates(documents, threshold):
        if i not in dropped:
            dropped.add(j)
    return [number for number in range(len(documents)) if number not in dropped]


STOP_WORDS = frozenset(
    re.findall(r"\w+", "a and as at be but for had he her i in is it of on she that the to was")
)
# Lowest and highest allowed value of each measure, after the rules of Gopher (Rae and others, 2021).
QUALITY_LIMITS: Mapping[str, tuple[float, float]] = {
    "words": (50, 100_000),
    "mean_word_length": (3, 10),
    "symbol_share": (0, 0.1),
    "stop_word_share": (0.1, 1),
    "repetition": (0, 0.3),
}


def quality_report(text: str) -> dict[str, float]:
    """Return the five measures of `QUALITY_LIMITS`; `repetition` counts runs of three words seen before."""
    words = re.findall(r"\w+(?:['’]\w+)*", text.lower())
    runs = list(zip(words, words[1:], words[2:], strict=False))
    symbols = sum(not (char.isalnum() or char.isspace() or char in ".,;:!?'\"()-‘’“”–—…") for char in text)
    return {
        "words": len(words),
        "mean_word_length": sum(map(len, words)) / max(1, len(words)),
        "symbol_share": symbols / max(1, len(text)),
        "stop_word_share": sum(word in STOP_WORDS for word in words) / max(1, len(words)),
        "repetition": 1 - len(set(runs)) / max(1, len(runs)) if runs else 0.0,
    }


def quality_problems(text: str, limits: Mapping[str, tuple[float, float]] = QUALITY_LIMITS) -> list[str]:
    """Return the measures outside their limits, none for a good text. Raises ValueError for unknown names."""
    report = quality_report(text)
    for name in limits:
        check_choice("a name in limits", name, report)
    return [name for name, (low, high) in limits.items() if not low <= report[name] <= high]


def contaminated(test_documents: list[str], training_documents: list[str], n: int = 13) -> list[float]:
    """Return for each test document the share of its runs of `n` words that stand in the training documents.

    Case and punctuation are ignored, as for GPT-3 (Brown and others, 2020, appendix C). A document of fewer than
    `n` words cannot be judged: its share is nan. Raises ValueError for `n` below 1, TypeError for no strings.
    """
    test_documents, training_documents = _checked(test_documents), _checked(training_documents)
    runs = [{run for run in shingles(text, n) if run.count(" ") == n - 1} for text in test_documents]
    wanted, found = set().union(*runs), set()
    for document in training_documents:
        found |= wanted & shingles(document, n)
    return [len(own & found) / len(own) if own else math.nan for own in runs]
