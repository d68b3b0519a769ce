"""Words and punctuation marks as tokens: text to token ids and back.

`SimpleTokenizer` knows whole words and punctuation marks, and replaces each word it has not seen by one
unknown token. It leaves out subwords and bytes.

Explained and proven in ch02_text_data/02_words_and_tokens.ipynb; written from there by `make promote`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from operator import index

from shared.checks import check_choice, check_sizes, check_text


class SimpleTokenizer:
    """Words, numbers and punctuation marks as tokens; what is not in the vocabulary is `<|unk|>`.

    Lost by `decode(encode(text))`: unknown words, line breaks, repeated spaces, unusual spacing around marks, and
    the direction of a straight mark that stands alone, as in "weeks' leave". A lone surrogate counts as U+FFFD.

    `vocab` maps each token to its id: 0 to its size less 1, both special tokens among them.

    Raises:
        ValueError: The vocabulary is empty, misses a special token, or its ids have gaps.
        TypeError: It is no mapping from strings to integers.
    """

    UNKNOWN, END_OF_TEXT = "<|unk|>", "<|endoftext|>"
    PATTERN = r"\d++(?:[.,:]\d++)++|\w++(?:['’]\w++)*+|-{2,}+|[^\w\s]"
    STRAIGHT_MARKS = frozenset("'\"")
    NO_SPACE_BEFORE = frozenset(".,;:!?)]}%…’”-/—")
    NO_SPACE_AFTER = frozenset("([{‘“$£€#@-/—")

    def __init__(self, vocab: Mapping[str, int]) -> None:
        if not isinstance(vocab, Mapping):
            raise TypeError(f"vocab must be a mapping, got {type(vocab).__name__}")
        for token, number in vocab.items():
            if not isinstance(token, str) or type(number) is not int:
                raise TypeError(f"vocab must map str to int, got {token!r}: {number!r}")
        if not vocab:
            raise ValueError("vocab is empty")
        if missing := {self.UNKNOWN, self.END_OF_TEXT} - vocab.keys():
            raise ValueError(f"vocab misses the special token {min(missing)!r}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"vocab must number its {len(vocab)} tokens from 0 without gaps")
        self.vocab = dict(vocab)
        self.tokens = sorted(vocab, key=vocab.__getitem__)  # id -> token
        self.n_vocab, self.eot_token = len(vocab), vocab[self.END_OF_TEXT]

    @classmethod
    def train(cls, text: str, minimum_count: int = 1) -> "SimpleTokenizer":
        """Return a tokenizer of the tokens that occur `minimum_count` times or more, in sorted order."""
        check_sizes(minimum_count=minimum_count)
        tokens = sorted(token for token, n in Counter(cls.split(text)).items() if n >= minimum_count)
        return cls({token: i for i, token in enumerate([*tokens, cls.UNKNOWN, cls.END_OF_TEXT])})

    def __len__(self) -> int:
        return self.n_vocab

    @classmethod
    def split(cls, text: str, *, allowed_special: Collection[str] = ()) -> list[str]:
        """Return the tokens of a text as strings; white space only separates them."""
        check_text("text", text)
        names = (cls.UNKNOWN, cls.END_OF_TEXT)
        allowed = names if allowed_special == "all" else allowed_special
        if isinstance(allowed, str) or not isinstance(allowed, Collection):
            raise TypeError(f'allowed_special must be "all" or a collection of str, got {allowed!r}')
        for name in allowed:
            check_choice("an element of allowed_special", name, names)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return re.findall("|".join([*map(re.escape, allowed), cls.PATTERN]), text)

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the token ids; a special token in the text counts as one only if allowed, by name or with "all"."""
        unknown = self.vocab[self.UNKNOWN]
        return [self.vocab.get(token, unknown) for token in self.split(text, allowed_special=allowed_special)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text in usual English spacing. Raises ValueError for an id that no token has."""
        parts, last, glue, open_marks = [], "", True, set()
        for number in map(index, ids):
            if not 0 <= number < self.n_vocab:
                raise ValueError(f"ids must be from 0 to {self.n_vocab - 1}, got {number}")
            token = self.tokens[number]
            closes = token in open_marks
            dash = last == token[:1] == "-"  # two hyphens side by side would read as one dash
            sticks = (glue or closes or token in self.NO_SPACE_BEFORE) and not dash
            parts.append(token if sticks else " " + token)
            last = parts[-1][-1:] or last
            glue = token in self.NO_SPACE_AFTER or (token in self.STRAIGHT_MARKS and not closes)
            if token in self.STRAIGHT_MARKS:  # a straight mark opens, the next one of its kind closes
                open_marks ^= {token}
            elif token == self.END_OF_TEXT:
                open_marks.clear()
        return "".join(parts)
