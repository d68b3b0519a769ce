"""Clean raw text: repair it, strip what is no text, drop what is there twice, and judge what is left.

Small functions from text to text, which `clean` applies in order, and functions on collections: headers,
near-duplicates by MinHash and banding (Broder, 1997; Indyk and Motwani, 1998), quality rules (Rae and
others, 2021), overlap of test and training text (Brown and others, 2020). Left out: guessing the encoding
of bytes, parsing HTML, recognising languages, anything learned, and anything larger than memory.

Explained and proven in ch02_text_data/01_cleaning.ipynb; written from there by `make promote`.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from itertools import combinations, groupby, product

import numpy as np
import regex

from shared.checks import check_choice, check_several, check_sizes, check_text, require
from shared.text.markup import unescape_html
from shared.text.mojibake import fix_mojibake

INVISIBLE = dict.fromkeys(
    [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
    + [0x00AD, 0x200B, 0x2060, 0xFEFF]  # soft hyphen, zero-width space, word joiner, byte order mark
) | dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
MANY_MARKS = regex.compile(r"\p{M}{32,}+")  # no language writes so many on one letter


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
    return unicodedata.normalize("NFC", MANY_MARKS.sub(_in_order, text))


def _in_order(marks: re.Match[str]) -> str:
    """Decompose and sort a long run of marks as the standard asks; Python's own sort of them is quadratic."""
    decomposed = "".join(unicodedata.normalize("NFD", mark) for mark in marks[0])
    runs = groupby(decomposed, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(run, key=unicodedata.combining)) for _, run in runs)


def drop_repeated_lines(text: str, minimum_words: int = 5) -> str:
    """Drop a line that equals the last non-empty line before it, if it has at least `minimum_words` words."""
    kept: list[str] = []
    filled = None  # the place of the last non-empty line
    for line in text.split("\n"):
        if filled is not None and line == kept[filled] and len(line.split()) >= minimum_words:
            del kept[filled + 1 :]  # the empty lines between the two go as well
            continue
        if line.strip():
            filled = len(kept)
        kept.append(line)
    return "\n".join(kept)


def collapse_blank(text: str) -> str:
    """Leave one space within a line, none at its end, and at most one empty line; indentation stays."""
    text = text.replace("\xa0", " ")
    text = re.sub(r"(?<=\S)[ \t]+", " ", text)
    text = re.sub(r"(?<![ \t])[ \t]++$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def remove_boilerplate(documents: Sequence[str], minimum_share: float = 0.3, edge: int = 3) -> list[str]:
    """Remove headers and footers: lines at the edge of a document that stand at the edges of many others.

    Many means three, and at least `minimum_share` of the documents; digits count as equal ("Page 7"). An edge is
    the first and the last `edge` non-empty lines. Raises ValueError for a share not in (0, 1] or an edge below 1.
    """
    documents = _check_documents(documents)
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


def _check_documents(documents: Iterable[str]) -> list[str]:
    check_several("documents", documents)
    documents = list(documents)
    for number, document in enumerate(documents):
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


def jaccard(first: Set[str], second: Set[str]) -> float:
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
    signature = np.full(permutations, prime, dtype=np.uint64)
    for start in range(0, len(hashes), 4096):  # in blocks, as a long document would need much memory
        permuted = (factor * hashes[start : start + 4096] + offset) % np.uint64(
            prime
        )  # (permutations, items)
        signature = np.minimum(signature, permuted.min(axis=1))
    return signature


def candidate_probability(similarity: float, rows: int, bands: int) -> float:
    """Return how likely two signatures agree in all `rows` of at least one of `bands` bands."""
    return 1 - (1 - similarity**rows) ** bands


def rows_per_band(threshold: float, permutations: int, recall: float = 0.99) -> int:
    """Return the most rows a band can have while pairs at the threshold are found with this probability."""
    divisors = [rows for rows in range(1, permutations + 1) if permutations % rows == 0]
    return max(
        r for r in divisors if r == 1 or candidate_probability(threshold, r, permutations // r) >= recall
    )


def _bands(items: Set[str], threshold: float) -> list[tuple[int, bytes]]:
    """Return the buckets of a set: the number and the content of each band of its signature."""
    bands = minhash_signature(items).reshape(-1, rows_per_band(threshold, 128))  # (bands, rows)
    return [(number, band.tobytes()) for number, band in enumerate(bands)]


def near_duplicates(documents: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """Return pairs of documents whose sets of five-word shingles have a Jaccard similarity of `threshold` or more.

    Bands of MinHash signatures propose the pairs, and the exact similarity decides. A pair at the threshold is
    missed in at most 1 of 100 cases, a more similar one less often; below a threshold of 0.04 more are missed. The
    answer has a row for each pair: k copies of one text make k (k - 1) / 2, which `deduplicate` avoids.
    Raises ValueError for a threshold not in (0, 1], TypeError for documents that are no strings.
    """
    documents = _check_documents(documents)
    _check_share("threshold", threshold)
    # Documents with equal shingles are one set, which is compared once.
    copies, buckets = defaultdict(list), defaultdict(list)
    for number, document in enumerate(documents):
        copies[frozenset(shingles(document))].append(number)
    for items in copies:
        for band in _bands(items, threshold):
            buckets[band].append(items)
    pairs = [(i, j, 1.0) for numbers in copies.values() for i, j in combinations(numbers, 2)]
    for one, two in {pair for members in buckets.values() for pair in combinations(members, 2)}:
        if (similarity := jaccard(one, two)) >= threshold:
            pairs += [(min(i, j), max(i, j), similarity) for i, j in product(copies[one], copies[two])]
    return sorted(pairs)


def deduplicate(documents: Sequence[str], threshold: float = 0.8) -> list[int]:
    """Return the numbers of the documents to keep: each that is no near-duplicate of one kept before it.

    Each is compared with kept ones only, so that copies of one text, exact or near, cost no more than other texts.
    Texts whose similarity is a little below the threshold are all kept, and compared with each other.
    """
    documents = _check_documents(documents)
    _check_share("threshold", threshold)
    seen, kept, buckets = set(), {}, defaultdict(list)  # kept: from number to shingles
    for number, document in enumerate(documents):
        items = frozenset(shingles(document))
        if items in seen:
            continue
        seen.add(items)
        bands = _bands(items, threshold)
        candidates = {other for band in bands for other in buckets.get(band, ())}
        if not any(jaccard(items, kept[other]) >= threshold for other in candidates):
            kept[number] = items
            for band in bands:
                buckets[band].append(number)
    return list(kept)


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
    test_documents, training_documents = map(_check_documents, (test_documents, training_documents))
    runs = [{run for run in shingles(text, n) if run.count(" ") == n - 1} for text in test_documents]
    wanted, found = set().union(*runs), set()
    for document in training_documents:
        found |= wanted & shingles(document, n)
    return [len(own & found) / len(own) if own else math.nan for own in runs]
