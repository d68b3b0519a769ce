"""How the running time of the functions that read text from outside grows with its length.

    python -m tests.benchmarks.long_inputs [--name PART] [--repeats 3]

Each case is an input that was, or could be, a trap: it doubles three times, and the table shows the processor time of
each length and the growth of the last doubling. Work in proportion to the length doubles (2.0), n log n is a little
above, the square would be 4.0. Times below a few milliseconds hold more noise than work.
"""

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from shared.data.corpus import load_stories
from shared.text import cleaning
from shared.text.simple_tokenizer import SimpleTokenizer
from shared.text.tokenizer import BPETokenizer

WORDS = re.findall(r"\w+", "the sea was white and the keeper of the light had not slept for two nights")


@dataclass(frozen=True)
class Case:
    """A function and an input for each length; `start` is the shortest length that is measured."""

    function: Callable[[object], object]
    make: Callable[[int], object]
    start: int


@cache
def bpe() -> BPETokenizer:
    """Return a tokenizer of 2,048 tokens, trained on the stories."""
    return BPETokenizer.train([story.text for story in load_stories()], 2048)


@cache
def words() -> SimpleTokenizer:
    """Return a tokenizer of the stories' words."""
    return SimpleTokenizer.train("\n".join(story.text for story in load_stories()))


def letters(n: int) -> str:
    """Return one word of n letters drawn at random, the same for each call."""
    return "".join(random.Random(0).choices("etaoinshrdlu", k=n))


def prose(n: int, seed: int = 0) -> str:
    """Return n words drawn at random."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def near_copies(n: int) -> list[str]:
    """Return n documents of 60 words, each with one other word than the first."""
    story = prose(60).split()
    return [" ".join([*story[: i % 60], f"other{i}", *story[i % 60 + 1 :]]) for i in range(n)]


def repeated(text: str) -> Callable[[int], str]:
    """Return a function that repeats a text n times."""
    return lambda n: text * n


CASES = {
    # byte pair encoding
    "encode keeper...": Case(lambda text: bpe().encode(text), repeated("keeper"), 2_500),
    "encode random letters": Case(lambda text: bpe().encode(text), letters, 10_000),
    "encode spaces": Case(lambda text: bpe().encode(text), repeated(" "), 20_000),
    "encode prose": Case(lambda text: bpe().encode(text), prose, 10_000),
    "encode_iterable letters": Case(
        lambda text: list(bpe().encode_iterable(text)), lambda n: list(letters(n)), 10_000
    ),
    "encode special tokens": Case(
        lambda text: bpe().encode(text, allowed_special="all"), repeated("<|endoftext|>"), 2_500
    ),
    "encode half a special token": Case(lambda text: bpe().encode(text), repeated("<|endof"), 2_500),
    "decode": Case(lambda ids: bpe().decode(ids), lambda n: [300] * n, 50_000),
    "train aaaa...": Case(lambda text: BPETokenizer.train(text, 300), repeated("a"), 10_000),
    "train keeper...": Case(lambda text: BPETokenizer.train(text, 300), repeated("keeper"), 2_500),
    "train random letters": Case(lambda text: BPETokenizer.train(text, 400), letters, 5_000),
    "train distinct words": Case(
        lambda text: BPETokenizer.train(text, 400), lambda n: " ".join(map(str, range(n))), 2_500
    ),
    # words and marks
    "SimpleTokenizer digits": Case(lambda text: words().encode(text), repeated("1"), 100_000),
    "SimpleTokenizer 1.1.1.": Case(lambda text: words().encode(text), repeated("1."), 50_000),
    "SimpleTokenizer hyphens": Case(lambda text: words().encode(text), repeated("- "), 20_000),
    "SimpleTokenizer don't't": Case(lambda text: words().encode(text), repeated("n't"), 50_000),
    "SimpleTokenizer decode": Case(lambda ids: words().decode(ids), lambda n: [5] * n, 20_000),
    # cleaning: one text
    "clean prose": Case(cleaning.clean, prose, 10_000),
    "fix_mojibake": Case(cleaning.fix_mojibake, repeated("Ã©"), 10_000),
    "fix_mojibake, no mojibake": Case(cleaning.fix_mojibake, repeated("Ã"), 20_000),
    "clean <!--": Case(cleaning.clean, repeated("<!--"), 2_500),
    "clean <script>": Case(cleaning.clean, repeated("<script>"), 2_500),
    "clean <script ": Case(cleaning.clean, repeated("<script "), 2_500),
    "clean <!doctype ": Case(cleaning.clean, repeated("<!doctype "), 2_500),
    "clean </script": Case(cleaning.clean, lambda n: "<script>" + "</script " * n, 2_500),
    "clean <a ": Case(cleaning.clean, repeated("<a "), 2_500),
    "clean <a b=": Case(cleaning.clean, repeated("<a b="), 2_500),
    "clean one endless tag": Case(cleaning.clean, lambda n: "<a" + " b='c'" * n, 2_500),
    "clean one endless value": Case(cleaning.clean, lambda n: "<a b=" + "c" * n, 20_000),
    "clean quotes": Case(cleaning.clean, repeated("""<a b="<a b='"""), 2_500),
    "clean <br": Case(cleaning.clean, lambda n: "<br" + " " * n, 20_000),
    "clean &amp": Case(cleaning.clean, repeated("&amp"), 10_000),
    "clean & and letters": Case(cleaning.clean, lambda n: "&" + "a" * n, 20_000),
    "clean closed tags": Case(cleaning.clean, repeated("<b>a</b>"), 2_500),
    "clean spaces, a letter": Case(cleaning.clean, lambda n: " " * n + "x", 20_000),
    "clean spaced letters": Case(cleaning.clean, repeated("x   "), 5_000),
    "clean line breaks": Case(cleaning.clean, repeated("\n"), 20_000),
    "clean line breaks, a letter": Case(cleaning.clean, repeated("\n\nx"), 5_000),
    "clean CR": Case(cleaning.clean, repeated("\r"), 20_000),
    "clean accents": Case(cleaning.clean, lambda n: "a" + "\u0301\u0316" * n, 2_500),
    "drop_repeated_lines blank": Case(cleaning.drop_repeated_lines, repeated("\n"), 10_000),
    "drop_repeated_lines equal": Case(cleaning.drop_repeated_lines, repeated("a b c d e\n\n"), 5_000),
    "quality_report": Case(cleaning.quality_report, prose, 5_000),
    "quality_report don't't": Case(cleaning.quality_report, repeated("n't"), 10_000),
    # cleaning: collections
    "remove_boilerplate": Case(cleaning.remove_boilerplate, lambda n: ["a 1\nb\nc 2"] * n, 1_000),
    "remove_boilerplate, one document": Case(cleaning.remove_boilerplate, lambda n: ["a\n" * n], 10_000),
    "shingles": Case(cleaning.shingles, prose, 5_000),
    "minhash_signature": Case(cleaning.minhash_signature, lambda n: [str(i) for i in range(n)], 2_500),
    "deduplicate exact copies": Case(cleaning.deduplicate, lambda n: [prose(60)] * n, 100),
    "deduplicate near copies": Case(cleaning.deduplicate, near_copies, 100),
    "deduplicate other texts": Case(
        cleaning.deduplicate, lambda n: [f"{letters(9)} {i} " * 9 for i in range(n)], 100
    ),
    "contaminated": Case(lambda documents: cleaning.contaminated(documents, documents), near_copies, 200),
}


def seconds(case: Case, n: int, repeats: int) -> float:
    """Return the least processor time of several runs; the input is made outside of it."""
    value = case.make(n)
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        case.function(value)
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description="Show how running times grow with the length of an input.")
    parser.add_argument("--name", default="", help="only cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{'milliseconds for':<34}{'n':>9}{'1 n':>9}{'2 n':>9}{'4 n':>9}{'8 n':>9}{'last doubling':>15}")
    for name, case in CASES.items():
        if options.name in name:
            times = [seconds(case, case.start * factor, options.repeats) for factor in (1, 2, 4, 8)]
            shown = "".join(f"{1000 * value:9.1f}" for value in times)
            print(f"{name:<34}{case.start:>9,}{shown}{times[-1] / times[-2]:>15.1f}", flush=True)


if __name__ == "__main__":
    main()
