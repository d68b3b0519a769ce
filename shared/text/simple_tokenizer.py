"""Words and punctuation marks as tokens: text to token ids and back.

`SimpleTokenizer` knows whole words and punctuation marks, and replaces each word it has not seen by one
unknown token. It leaves out subwords and bytes.

Explained and proven in ch02_text_data/02_words_and_tokens.ipynb; written from there by `make promote`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import index

from shared.checks import check_sizes, check_text


class SimpleTokenizer:
    """Words, numbers and punctuation marks as tokens; what is not in the vocabulary is `<|unk|>`.

    Lost by `decode(encode(text))`: unknown words, line breaks, repeated spaces, unusual spacing around marks, and
    the direction of a straight mark that stands alone, as in "weeks' leave". A lone surrogate counts as U+FFFD.

    The vocabulary maps each token to its id: 0 to its size less 1, both special tokens among them.

    Raises:
        ValueError: The vocabulary is empty, misses a special token, or its ids have gaps.
        TypeError: It is no mapping from strings to integers.
    """

    UNKNOWN, END_OF_TEXT = "<|unk|>", "<|endoftext|>"
    PATTERN = r"\d+(?:[.,:]\d+)+|\w+(?:['’]\w+)*|-{2,}|[^\w\s]"
    STRAIGHT_MARKS = frozenset("'\"")
    NO_SPACE_BEFORE = frozenset(".,;:!?)]}%…’”-/—")
    NO_SPACE_AFTER = frozenset("([{‘“$£€#@-/—")

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        if not isinstance(vocabulary, Mapping):
            raise TypeError(f"vocabulary must be a mapping, got {type(vocabulary).__name__}")
        for token, number in vocabulary.items():
            if not isinstance(token, str) or type(number) is not int:
                raise TypeError(f"vocabulary must map str to int, got {token!r}: {number!r}")
        if not vocabulary:
            raise ValueError("vocabulary is empty")
        if missing := {self.UNKNOWN, self.END_OF_TEXT} - vocabulary.keys():
            raise ValueError(f"vocabulary misses the special token {min(missing)!r}")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary must number its {len(vocabulary)} tokens from 0 without gaps")
        self.vocabulary = dict(vocabulary)
        self.tokens = sorted(vocabulary, key=vocabulary.__getitem__)  # id -> token

    @classmethod
    def train(cls, text: str, minimum_count: int = 1) -> "SimpleTokenizer":
        """Return a tokenizer of the tokens that occur `minimum_count` times or more, in sorted order."""
        check_sizes(minimum_count=minimum_count)
        tokens = sorted(token for token, n in Counter(cls.split(text)).items() if n >= minimum_count)
        return cls({token: i for i, token in enumerate([*tokens, cls.UNKNOWN, cls.END_OF_TEXT])})

    @classmethod
    def split(cls, text: str, allow_special: bool = False) -> list[str]:
        """Return the tokens of a text as strings; white space only separates them."""
        check_text("text", text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        special = f"{re.escape(cls.UNKNOWN)}|{re.escape(cls.END_OF_TEXT)}|" if allow_special else ""
        return re.findall(special + cls.PATTERN, text)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the token ids; only with `allow_special` does `<|endoftext|>` in the text mean the token."""
        unknown = self.vocabulary[self.UNKNOWN]
        return [self.vocabulary.get(token, unknown) for token in self.split(text, allow_special)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text in usual English spacing. Raises ValueError for an id that no token has."""
        text, glue, open_marks = "", True, set()
        for number in map(index, ids):
            if not 0 <= number < len(self):
                raise ValueError(f"ids must be from 0 to {len(self) - 1}, got {number}")
            token = self.tokens[number]
            closes = token in open_marks
            dash = text[-1:] == token[:1] == "-"  # two hyphens side by side would read as one dash
            sticks = (glue or closes or token in self.NO_SPACE_BEFORE) and not dash
            text += token if sticks else " " + token
            glue = token in self.NO_SPACE_AFTER or (token in self.STRAIGHT_MARKS and not closes)
            if token in self.STRAIGHT_MARKS:  # a straight mark opens, the next one of its kind closes
                open_marks ^= {token}
            elif token == self.END_OF_TEXT:
                open_marks.clear()
        return text
