"""`shared.text.cleaning`: each step on the case it fixes and the case it must not break, against trusted libraries."""

import math
import re
import unicodedata
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.corpus import load_languages, load_stories
from shared.text import cleaning
from shared.text.cleaning import (
    DEFAULT_STEPS,
    QUALITY_LIMITS,
    candidate_probability,
    clean,
    collapse_blank,
    contaminated,
    deduplicate,
    drop_repeated_lines,
    jaccard,
    minhash_signature,
    near_duplicates,
    normalize_newlines,
    normalize_unicode,
    quality_problems,
    quality_report,
    remove_boilerplate,
    remove_control_characters,
    rows_per_band,
    shingles,
)

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates and control characters too
PROSE = [paragraph.text for paragraph in load_languages() if paragraph.language != "code"]
STORIES = [story.text for story in load_stories()]


def misread(text: str) -> str:
    """Return UTF-8 text as a reader of Windows-1252 sees it."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode("utf-8"))


def test_newlines_of_every_kind():
    assert normalize_newlines("a\r\nb\rc\nd\x0be\x0cf\x85g\u2028h\u2029i") == "\n".join("abcdefghi")
    assert normalize_newlines("a\r\n\r\nb\r\rc") == "a\n\nb\n\nc"


@given(ANY_TEXT)
def test_control_characters_are_gone_and_the_rest_is_utf8(text):
    cleaned = remove_control_characters(text)
    assert {c for c in cleaned if unicodedata.category(c) == "Cc"} <= {"\n", "\t"}
    cleaned.encode("utf-8")


def test_joiners_and_direction_marks_stay():
    text = "क्\u200dष می\u200cخواهم 👩\u200d🚀 \u200fא"
    assert remove_control_characters(text) == text
    assert remove_control_characters("a\u200b\ufeff\xad\u2060b\ud800") == "ab\ufffd"


@given(ANY_TEXT)
def test_unicode_form_is_nfc(text):
    assert normalize_unicode(text) == unicodedata.normalize("NFC", text)


def test_compatibility_characters_are_kept_apart():
    assert normalize_unicode("x² ½ ﬁ e\u0301") == "x² ½ ﬁ é"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four five\n" * 3 + "six", "one two three four five\nsix"),
        ("one two three four five\n\none two three four five\n\nsix", "one two three four five\n\nsix"),
        ("Never.\nNever.", "Never.\nNever."),
        (
            "one two three four five\nno\none two three four five",
            "one two three four five\nno\none two three four five",
        ),
        ("\n\n", "\n\n"),
        ("", ""),
    ],
)
def test_repeated_lines(text, expected):
    assert drop_repeated_lines(text) == expected


def test_minimum_length_of_a_repeated_line():
    assert drop_repeated_lines("No.\nNo.", minimum_words=1) == "No."


def test_blank_space():
    assert collapse_blank("\n a  b\t\tc\xa0d \n\n\n\n    e\n") == " a b c d\n\n    e"


def test_headers_and_footers_go_and_inner_lines_stay():
    bodies = ["Dear Bette,\nfirst\nDear Bette,\nsecond", "third\n\nfourth", "fifth"]
    pages = [f"Gannet - Page {n}\n{body}\nfor private use" for n, body in enumerate(bodies, 9)]
    assert remove_boilerplate(pages) == bodies


def test_two_documents_are_too_few_for_a_header():
    assert remove_boilerplate(["same\na", "same\nb"]) == ["same\na", "same\nb"]
    assert remove_boilerplate([]) == []
    assert remove_boilerplate(["", "", ""]) == ["", "", ""]


@pytest.mark.parametrize("text", STORIES + PROSE, ids=range(len(STORIES) + len(PROSE)))
def test_clean_prose_is_left_alone(text):
    assert clean(text) == text


def test_clean_applies_the_steps_in_order():
    assert clean("abc", steps=[str.upper, lambda text: text + "d"]) == "ABCd"
    assert clean("a\x00  b", steps=()) == "a\x00  b"
    assert clean("\ufeff<p>caf\u00c3\u00a9</p>\r\n&shy;") == "café"


@given(ANY_TEXT)
@settings(max_examples=200)
def test_clean_takes_any_string(text):
    clean(text).encode("utf-8")


def test_mojibake_must_come_first():
    closing = misread("“Hi”")
    assert clean(closing) == "“Hi”"
    assert clean(closing, steps=(remove_control_characters, *DEFAULT_STEPS)) != "“Hi”"


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_jaccard_by_its_definition(first, second):
    first, second = set(map(str, first)), set(map(str, second))
    expected = len(first & second) / len(first | second) if first | second else 1
    assert jaccard(first, second) == jaccard(second, first) == expected


def test_shingles_by_hand():
    assert shingles("The sea, the SEA!", n=2) == {"the sea", "sea the"}
    assert shingles("one two", n=5) == {"one two"}
    assert shingles("...", n=5) == set()


@pytest.mark.parametrize("shared_items", [0, 20, 50, 80, 100])
def test_minhash_estimates_jaccard_within_its_standard_error(shared_items):
    first = {f"a{i}" for i in range(100)}
    second = {f"a{i}" for i in range(100 - shared_items, 200 - shared_items)}
    exact, places = jaccard(first, second), 4096
    agree = (minhash_signature(first, places) == minhash_signature(second, places)).mean()
    assert abs(agree - exact) <= 4 * math.sqrt(exact * (1 - exact) / places)


def test_signature_does_not_depend_on_order_but_on_the_seed():
    items = [f"item {i}" for i in range(30)]
    assert np.array_equal(minhash_signature(items), minhash_signature(reversed(items)))
    assert not np.array_equal(minhash_signature(items), minhash_signature(items, seed=1))
    assert minhash_signature(items, permutations=7).shape == (7,)
    assert len(set(minhash_signature([]).tolist())) == 1


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9])
def test_bands_find_pairs_at_the_threshold(threshold):
    rows = rows_per_band(threshold, 128)
    assert 128 % rows == 0
    assert candidate_probability(threshold, rows, 128 // rows) >= 0.99
    assert candidate_probability(threshold, 2 * rows, 64 // rows) < 0.99


def test_candidate_probability_at_its_ends():
    assert candidate_probability(0, 4, 32) == 0
    assert candidate_probability(1, 4, 32) == 1
    assert candidate_probability(0.5, 1, 1) == 0.5


@pytest.fixture(scope="module")
def pages_with_copies():
    pages = [page for story in STORIES[:4] for page in story.split("\n\n") if len(page.split()) > 60]
    copies = [" ".join([*page.split()[:-2], "quite", "other"]) for page in pages[::3]]
    return [*pages, *copies, pages[0]]


def test_near_duplicates_equal_those_of_all_pairs(pages_with_copies):
    sets = [shingles(page) for page in pages_with_copies]
    pairs = [(i, j, jaccard(sets[i], sets[j])) for i, j in combinations(range(len(sets)), 2)]
    assert near_duplicates(pages_with_copies) == [pair for pair in pairs if pair[2] >= 0.8]


def test_deduplicate_keeps_one_of_each_group(pages_with_copies):
    kept = deduplicate(pages_with_copies)
    dropped = set(range(len(pages_with_copies))) - set(kept)
    pairs = {(i, j) for i, j, _ in near_duplicates(pages_with_copies)}
    assert dropped
    assert not any(i in kept and j in kept for i, j in pairs)
    assert all(any((i, j) in pairs for i in kept) for j in dropped)


def test_duplicates_in_small_collections():
    assert near_duplicates([]) == [] and deduplicate([]) == []
    assert near_duplicates(["", ""]) == [(0, 1, 1.0)]
    assert deduplicate(["same old words", "Same, old words!", "others"]) == [0, 2]


def test_quality_by_hand():
    report = quality_report("The cat and the cat and the cat. #")
    assert report["words"] == 8
    assert report["mean_word_length"] == 3
    assert report["symbol_share"] == pytest.approx(1 / 34)
    assert report["stop_word_share"] == 5 / 8
    assert report["repetition"] == pytest.approx(3 / 6)
    assert quality_report("") == dict.fromkeys(QUALITY_LIMITS, 0)


def test_stories_pass_and_rubbish_falls():
    assert all(quality_problems(story) == [] for story in STORIES)
    assert set(quality_problems("buy lamp oil " * 40)) == {"stop_word_share", "repetition"}
    assert "symbol_share" in quality_problems("| > | » " * 40)
    assert quality_problems("short", limits={"words": (1, 5)}) == []


def test_contamination_by_hand():
    words = [f"w{i}" for i in range(40)]
    leak = " ".join(words[:20])
    shares = contaminated(
        [" ".join(words), " ".join(words[20:]), "too short"], ["some text", leak.upper() + "!"]
    )
    assert shares[0] == pytest.approx(8 / 28)
    assert shares[1] == 0
    assert math.isnan(shares[2])
    assert contaminated([leak], [leak.replace("w10", "x")], n=13) == [0]
    assert contaminated([leak], [leak.replace("w10", "x")], n=8) == [pytest.approx(5 / 13)]
    assert contaminated([], []) == []


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: clean(None), TypeError, "NoneType"),
        (lambda: clean(b"bytes"), TypeError, "bytes"),
        (lambda: remove_boilerplate("one text"), TypeError, "documents"),
        (lambda: remove_boilerplate(["a", 1]), TypeError, r"documents\[1\] must be a str, got int 1"),
        (
            lambda: remove_boilerplate(["a"], minimum_share=0),
            ValueError,
            "minimum_share must be above 0 and at most 1, got 0",
        ),
        (lambda: remove_boilerplate(["a"], edge=0), ValueError, "edge must be at least 1, got 0"),
        (lambda: shingles("a", n=0), ValueError, "n must be at least 1, got 0"),
        (
            lambda: minhash_signature(["a"], permutations=0),
            ValueError,
            "permutations must be at least 1, got 0",
        ),
        (
            lambda: near_duplicates(["a"], threshold=1.5),
            ValueError,
            "threshold must be above 0 and at most 1, got 1.5",
        ),
        (lambda: near_duplicates("text"), TypeError, "documents"),
        (
            lambda: deduplicate(["a"], threshold=0),
            ValueError,
            "threshold must be above 0 and at most 1, got 0",
        ),
        (lambda: contaminated(["a"], ["a"], n=0), ValueError, "n must be at least 1, got 0"),
        (lambda: contaminated("a", ["a"]), TypeError, "documents"),
        (lambda: contaminated(["a"], "a"), TypeError, "documents"),
        (lambda: quality_problems("a", limits={"beauty": (0, 1)}), ValueError, "beauty"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


# The slow, obvious versions of what is written to be fast.


def slow_drop_repeated_lines(text: str, minimum_words: int = 5) -> str:
    kept = []
    for line in text.split("\n"):
        previous = next((earlier for earlier in reversed(kept) if earlier.strip()), None)
        if line == previous and len(line.split()) >= minimum_words:
            while not kept[-1].strip():
                kept.pop()
        else:
            kept.append(line)
    return "\n".join(kept)


def slow_collapse_blank(text: str) -> str:
    lines = [re.sub(r"(?<=\S)[ \t]+", " ", line) for line in text.replace("\xa0", " ").split("\n")]
    text = "\n".join(line.rstrip(" \t") for line in lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n")


LINES = st.lists(
    st.sampled_from(["", " ", "a b c d e", "a b c d e ", "a b", "\t", "  x", "\u3000"]), max_size=12
)


@settings(max_examples=500, deadline=None)
@given(LINES.map("\n".join), st.integers(0, 6))
def test_repeated_lines_go_as_by_the_slow_version(text, minimum_words):
    assert drop_repeated_lines(text, minimum_words) == slow_drop_repeated_lines(text, minimum_words)


@settings(max_examples=500, deadline=None)
@given(st.text(" \t\n\xa0\u3000a", max_size=30))
def test_blank_space_collapses_as_by_the_slow_version(text):
    assert collapse_blank(text) == slow_collapse_blank(text)


# Marks that sort before others, that compose, that decompose into two, and one that sorts nowhere.
MARKS = "\u0301\u0316\u0323\u0308\u0344\u0345\u0f71\u0f73\u093e\u0327"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "é", "ệ", "क", *MARKS, MARKS * 4, "\u0301\u0316" * 20]), max_size=12))
def test_long_runs_of_marks_have_the_form_nfc(parts):
    text = "".join(parts)
    assert normalize_unicode(text) == unicodedata.normalize("NFC", text)


def slow_deduplicate(documents: list[str], threshold: float) -> list[int]:
    kept = []
    for number, document in enumerate(documents):
        if not any(jaccard(shingles(document), shingles(documents[other])) >= threshold for other in kept):
            kept.append(number)
    return kept


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a b c d e f", "a b c d e f g", "A b, c d e f!", "", "...", "x y", "g a b c d e f"])
    )
)
def test_duplicates_equal_those_of_all_pairs(documents):
    threshold = 0.6
    sets = [shingles(document) for document in documents]
    pairs = [(i, j, jaccard(sets[i], sets[j])) for i, j in combinations(range(len(sets)), 2)]
    assert near_duplicates(documents, threshold) == [pair for pair in pairs if pair[2] >= threshold]
    assert deduplicate(documents, threshold) == slow_deduplicate(documents, threshold)


def test_hundreds_of_copies_are_compared_with_the_kept_ones_only(monkeypatch):
    page = " ".join(f"word{i}" for i in range(100))
    near = [page.replace(f"word{i} ", "other ") for i in range(1, 90)]
    comparisons = []
    monkeypatch.setattr(cleaning, "jaccard", lambda one, two: comparisons.append(1) or jaccard(one, two))
    assert deduplicate([page] * 800) == [0] and not comparisons
    assert deduplicate([page, *near, *[page] * 300, *near]) == [0]
    assert len(comparisons) == len(near)
    # Pairs are made of all copies, since that is what was asked for, but each pair of sets is compared once.
    del comparisons[:]
    assert len(near_duplicates([page] * 30 + [near[0]] * 20)) == 50 * 49 // 2
    assert len(comparisons) == 1


def test_documents_may_come_from_a_generator():
    texts = ["header\na b c d e f", "header\nother words", "header\na b c d e f"]
    assert remove_boilerplate(text for text in texts) == remove_boilerplate(texts)
    assert near_duplicates(text for text in texts) == near_duplicates(texts) != []
    assert deduplicate(text for text in texts) == deduplicate(texts) == [0, 1]
    shares = contaminated((text for text in texts), (text for text in texts), n=3)
    assert shares == contaminated(texts, texts, n=3) == [1, 1, 1]


def test_the_signature_of_a_long_document_is_made_in_blocks():
    items = [f"item {i}" for i in range(10_000)]
    signature = minhash_signature(items)
    blocks = [minhash_signature(items[i : i + 1000]) for i in range(0, len(items), 1000)]
    assert np.array_equal(signature, np.min(blocks, axis=0))


def test_the_module_is_short():
    with open(cleaning.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) < 300


def test_documents_may_come_from_an_iterator():
    page = "Page {}\nthe keeper lit the lamp and went up the stairs {}\nthe end"
    documents = [page.format(i, i) for i in (0, 1, 2, 3, 4, 0)]
    for function in (remove_boilerplate, near_duplicates, deduplicate):
        assert function(iter(documents)) == function(documents) != []
    # Runs of five words of the first two pages, among all of them.
    assert contaminated(iter(documents[:2]), iter(documents), n=5) == contaminated(
        documents[:2], documents, n=5
    )
