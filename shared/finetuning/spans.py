"""Pieces of a text, as characters and as tokens, and windows over texts that are longer than a model reads.

Left out: tokenizers that change the text before they cut it, such as those that make all letters small.

Windows that overlap follow the program `run_squad.py` that was published with BERT (Devlin et al., 2019,
"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"); the paper does not
describe them.

Explained and proven in ch07_instruction/03_question_answering.ipynb; written from there by `make promote`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from shared.checks import check_text, require, whole_number
from shared.generation.streaming import Tokenizer

Span = tuple[int, int]  # where something begins, and the place after its end


def token_spans(encoding: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Return the ids of a text, and the characters of each: token i covers `text[start:end]`.

    A character of several bytes may be spread over several tokens; each covers all of it.

    Raises:
        ValueError: The tokens are not the bytes of the text, as where a tokenizer folds capitals.
        TypeError: `text` is no text.
    """
    check_text("text", text)
    ids = encoding.encode_ordinary(text)
    pieces = [encoding.decode_single_token_bytes(token) for token in ids]
    is_same = b"".join(pieces) == text.encode("utf-8")
    require("encoding", "another text", is_same, "one whose tokens are the bytes of the text")
    # Which character each byte belongs to.
    owner = [place for place, sign in enumerate(text) for _ in sign.encode("utf-8")]
    spans, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        spans.append((owner[start], owner[end - 1] + 1))
        start = end
    return ids, spans


def to_tokens(spans: Sequence[Span], start: int, end: int) -> Span:
    """Return the tokens that cover the characters from `start` up to `end`: the first, and the place after the last.

    Raises ValueError if the stretch is empty, or lies outside of what the tokens cover.
    """
    low, high = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    require("start, end", (start, end), low <= start < end <= high, f"characters between {low} and {high}")
    first = bisect_right(spans, start, key=lambda span: span[1])
    return first, bisect_left(spans, end, key=lambda span: span[0])


def to_characters(text: str, spans: Sequence[Span], first: int, stop: int) -> Span:
    """Return the characters of tokens `first` up to `stop`, trimmed; of white space alone, start is after end."""
    start, end = spans[first][0], spans[stop - 1][1]
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


@dataclass(frozen=True)
class Window:
    """What a model reads at once: a question, a piece of the passage, and a last token that means "no answer".

    Attributes:
        ids: All of it.
        offset: Where the piece begins in `ids`.
        start, stop: The piece has the tokens of the passage from `start` up to (not including) `stop`.
    """

    ids: tuple[int, ...]
    offset: int
    start: int
    stop: int

    @property
    def null(self) -> int:
        """The place that means "no answer"."""
        return len(self.ids) - 1

    def target(self, first: int, stop: int) -> Span:
        """Return the first and last place in `ids` of a span of the passage; twice `null` if not all of it is here."""
        if self.start <= first < stop <= self.stop:
            return first - self.start + self.offset, stop - 1 - self.start + self.offset
        return self.null, self.null


def cut_windows(
    question: Sequence[int], passage: Sequence[int], end: int, *, context_length: int, overlap: int = 64
) -> list[Window]:
    """Return windows over a passage: each has the whole question in front, and neighbours share `overlap` tokens.

    So every span of at most `overlap` + 1 tokens is whole in some window. A passage that fits has one window. Of
    the passage the windows read less than twice its tokens; the question is read again in each of them.

    Args:
        question, passage: Their ids, at least one each; the question with what separates the two.
        end: The last token.
        context_length: Most tokens of a window.
        overlap: At least 0.

    Raises:
        ValueError: Question or passage is empty, the overlap is negative or too wide for the context, or the question
            leaves no room for twice the overlap plus one token.
    """
    for name, ids in (("question", question), ("passage", passage)):
        require(name, "nothing", len(ids) > 0, "at least one token")
    overlap, size = whole_number("overlap", overlap, 0), context_length - len(question) - 1
    widest = (context_length - 3) // 2
    require("overlap", overlap, overlap <= widest, f"at most {widest} for windows of {context_length} tokens")
    longest = context_length - 2 - 2 * overlap
    require("question", f"{len(question)} tokens", size > 2 * overlap, f"at most {longest} tokens long")
    starts = [0]
    while starts[-1] + size < len(passage):
        starts.append(starts[-1] + size - overlap)
    pieces = [(start, passage[start : start + size]) for start in starts]
    return [
        Window((*question, *piece, end), len(question), start, start + len(piece)) for start, piece in pieces
    ]
