"""WordPiece, BERT's tokenizer: texts to words, words to the longest pieces that a vocabulary has;
vocabularies learned and read from files.

`WordPieceTokenizer.encode_ordinary` is for any text, `encode` for texts of your own in which "[MASK]" and
the like stand for themselves. Results equal those of Hugging Face's `tokenizers` with BERT's settings,
but for characters that are younger than its tables of Unicode.

Left out: places in the text for each token, other normalizers than BERT's, and the trainer of
`tokenizers`, which joins by plain counts.

Follows Schuster and Nakajima (2012, "Japanese and Korean Voice Search") for what is learned, Wu et al.
(2016, "Google's Neural Machine Translation System") and the files of Devlin et al. (2019) for how it is
applied.

Explained and proven in appendix_vit_bert/01_bert.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shared.checks import check_path, check_several, check_text, require, whole_number

# Where Unicode keeps Chinese characters, and where Japanese and Korean ones of the same origin.
_CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def normalize(text: str, lowercase: bool = True) -> str:
    """Return the text as BERT's uncased models see it: no control characters, accents or capitals.

    Chinese characters get a space on both sides: each is a word of its own.
    """
    kept = (" " if c in "\t\n\r" or c.isspace() else c for c in text if not _is_control(c))
    text = _CHINESE.sub(r" \g<0> ", "".join(kept))
    if not lowercase:
        return text
    # An accented letter is taken apart, and the accent thrown away.
    letters = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in letters)  # one by one: a whole word would have its final sigma changed


def _is_control(character: str) -> bool:
    """Whether a character is thrown away: control and format signs, private ones, and what stands for a broken byte."""
    if character in "\t\n\r":
        return False
    return character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")


def split_words(text: str) -> list[str]:
    """Return the words of a normalized text; each punctuation mark is a word of its own."""
    words: list[str] = []
    for chunk in text.split():
        start = 0
        for place, character in enumerate(chunk):
            if _is_punctuation(character):
                if place > start:
                    words.append(chunk[start:place])
                words.append(character)
                start = place + 1
        if start < len(chunk):
            words.append(chunk[start:])
    return words


def _is_punctuation(character: str) -> bool:
    """Whether Unicode calls a character punctuation, or it is one of ASCII's signs, such as $ and ^."""
    if character < "\x80":
        return not character.isalnum() and character > " " and character != "\x7f"
    return unicodedata.category(character)[0] == "P"


CONTINUATION = "##"


def cut_word(word: str, vocabulary: Mapping[str, int]) -> list[str] | None:
    """Cut a word into pieces, from the left, each as long as possible; None if some rest is in no piece.

    Pieces that go on with a word are written with ## in front.
    """
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = CONTINUATION if start else ""
        for end in range(len(word), start, -1):
            if prefix + word[start:end] in vocabulary:
                break
        else:
            return None
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def _xlogx(x: float) -> float:
    return x * math.log(x) if x > 0 else 0.0


def likelihood_gain(left: int, right: int, both: int, total: int, same: bool = False) -> float:
    """Return by how many nats the corpus gets more probable when a pair of pieces becomes one piece.

    The corpus is read as pieces drawn one by one, each with its share of all pieces.

    Args:
        left, right: How often the two pieces stand in the corpus.
        both: How often they stand side by side.
        total: The number of all pieces.
        same: Whether both are the same piece.
    """
    before = _xlogx(left) + (0 if same else _xlogx(right)) - _xlogx(total)
    rest = _xlogx(left - 2 * both) if same else _xlogx(left - both) + _xlogx(right - both)
    return rest + _xlogx(both) - _xlogx(total - both) - before


def join_pieces(left: str, right: str) -> str:
    """Return what two pieces make together: "##ab" and "##c" make "##abc"."""
    return left + right.removeprefix(CONTINUATION)


def _joined(pieces: list[str], pair: tuple[str, str], new: str) -> list[str]:
    """Return the pieces of a word with each such pair replaced, from the left."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] = new
        else:
            result.append(piece)
    return result


def train_pieces(counts: Mapping[str, int], n_merges: int) -> list[str]:
    """Learn at most `n_merges` pieces from words and how often each occurs, the most useful first.

    Each step joins the pair of pieces that raises the likelihood of the corpus most (Schuster and Nakajima, 2012), ties
    by the alphabet; it ends early when no pair raises it.
    """
    words = [[word[0], *(CONTINUATION + c for c in word[1:])] for word in counts]
    occurrences = list(counts.values())
    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    words_with: dict[tuple[str, str], set[int]] = defaultdict(set)

    def count(place: int, sign: int) -> None:
        for piece in words[place]:
            singles[piece] += sign * occurrences[place]
        for pair in zip(words[place], words[place][1:], strict=False):
            pairs[pair] += sign * occurrences[place]
            words_with[pair].add(place)

    for place in range(len(words)):
        count(place, 1)
    learned: list[str] = []
    total = singles.total()
    while len(learned) < n_merges:
        # The pair that is worth most.
        best, gain = None, 0.0
        for pair, n in pairs.items():
            if n:
                worth = likelihood_gain(singles[pair[0]], singles[pair[1]], n, total, pair[0] == pair[1])
                if worth > gain or (worth == gain and best is not None and pair < best):
                    best, gain = pair, worth
        if best is None:
            break
        # Only the words that hold it change.
        new = join_pieces(*best)
        learned.append(new)
        for place in words_with.pop(best):
            count(place, -1)
            words[place] = _joined(words[place], best, new)
            count(place, 1)
        total = singles.total()
        del pairs[best]
        pairs = +pairs  # without those whose count is 0
    return learned


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MOST_CHARACTERS = 100  # of a word: longer ones are unknown, without a search


class WordPieceTokenizer:
    """BERT's tokenizer: words, and pieces of the words that the vocabulary lacks.

    Args:
        vocabulary: The pieces in the order of their ids; those of `SPECIAL_TOKENS` are among them.
        lowercase: Whether texts lose capitals and accents.

    Raises:
        ValueError: A piece stands there twice, or a special token is missing.
    """

    def __init__(self, vocabulary: Sequence[str], *, lowercase: bool = True) -> None:
        check_several("vocabulary", vocabulary)
        self.pieces = list(vocabulary)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        twice = sorted(piece for piece, n in Counter(self.pieces).items() if n > 1)
        require("vocabulary", twice[:3], not twice, "without a piece that stands there twice")
        missing = [token for token in SPECIAL_TOKENS if token not in self.ids]
        require("vocabulary", f"one without {', '.join(missing)}", not missing, "one with all special tokens")
        self.lowercase = lowercase
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self.ids[token] for token in SPECIAL_TOKENS
        )
        self._known: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of pieces, the special tokens included."""
        return len(self.pieces)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of `SPECIAL_TOKENS`, in their order."""
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text. "[MASK]" in it is three words like any others; see `encode`.

        Raises TypeError if the text is no str.
        """
        check_text("text", text)
        return [i for chunk in text.split(" ") for i in self._ids_of(chunk)]

    def _ids_of(self, chunk: str) -> tuple[int, ...]:
        """Return the ids of what stands between two spaces, from memory if it was met before."""
        if chunk not in self._known:
            ids: list[int] = []
            for word in split_words(normalize(chunk, self.lowercase)):
                pieces = cut_word(word, self.ids) if len(word) <= MOST_CHARACTERS else None
                ids += [self.unk_id] if pieces is None else [self.ids[piece] for piece in pieces]
            if len(self._known) >= 100_000:
                self._known.clear()
            self._known[chunk] = tuple(ids)
        return self._known[chunk]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text in which "[MASK]" and the other special tokens stand for themselves.

        Only for texts that you wrote: in a stranger's text they could end a segment. Raises TypeError if it is no str.
        """
        check_text("text", text)
        ids: list[int] = []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text):
            ids += [self.ids[part]] if part in SPECIAL_TOKENS else self.encode_ordinary(part)
        return ids

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, alphabet: str = "", lowercase: bool = True
    ) -> "WordPieceTokenizer":
        """Learn a vocabulary: the special tokens, every character (of the texts and of `alphabet`), then pieces.

        Raises:
            ValueError: `vocab_size` has no room for the characters, or the texts hold no word.
            TypeError: `texts` is one text.
        """
        check_several("texts", texts)
        chunks: Counter[str] = Counter()
        for text in texts:
            check_text("texts", text)
            chunks.update(text.split())
        counts: Counter[str] = Counter()
        for chunk, n in chunks.items():
            for word in split_words(normalize(chunk, lowercase)):
                counts[word] += n
        require("texts", len(counts), bool(counts), "texts with at least one word")
        # Every character, alone and inside a word; a mark of punctuation is never inside.
        characters = sorted({*"".join(counts), *"".join(split_words(normalize(alphabet, lowercase)))})
        inside = [CONTINUATION + c for c in characters if not _is_punctuation(c)]
        first = [*SPECIAL_TOKENS, *characters, *inside]
        whole_number("vocab_size", vocab_size)
        require("vocab_size", vocab_size, vocab_size >= len(first), f"at least {len(first)}")
        short = {word: n for word, n in counts.items() if len(word) <= MOST_CHARACTERS}
        return cls([*first, *train_pieces(short, vocab_size - len(first))], lowercase=lowercase)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the pieces as text, a space between two words; what the tokenizer threw away does not come back.

        Raises ValueError if an id is not in the vocabulary.
        """
        words: list[str] = []
        for i in ids:
            require("ids", i, 0 <= i < len(self.pieces), f"from 0 to {len(self.pieces) - 1}")
            piece = self.pieces[i]
            if piece.startswith(CONTINUATION) and words:
                words[-1] += piece[len(CONTINUATION) :]
            else:
                words.append(piece)
        return " ".join(words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one piece a line, as in BERT's vocab.txt. Raises OSError if it cannot be written."""
        check_path("path", path)
        Path(path).write_text("".join(f"{piece}\n" for piece in self.pieces), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lowercase: bool | None = None) -> "WordPieceTokenizer":
        """Read a vocab.txt, or a tokenizer.json of Hugging Face, which also says whether it is lowercase.

        Raises:
            ValueError: The file is no vocabulary of WordPiece, or asks for what this class does not do.
            FileNotFoundError: There is no such file.
        """
        check_path("path", path)
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix != ".json":
                return cls(text.removesuffix("\n").split("\n"), lowercase=lowercase is not False)
            pieces, found = _read_json(json.loads(text))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} must be a vocabulary of WordPiece in UTF-8: {error!r}") from error
        return cls(pieces, lowercase=found if lowercase is None else lowercase)

    def build_input(
        self, first: Sequence[int], second: Sequence[int] | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Return [CLS] first [SEP], or [CLS] first [SEP] second [SEP], and the segment of each token: 0, then 1.

        With `max_length` the longer of the two gives up its last token until all fits.

        Raises:
            ValueError: `max_length` has no room for the special tokens and a token of each segment.
        """
        parts = [list(first)] if second is None else [list(first), list(second)]
        if max_length is not None:
            room = whole_number("max_length", max_length) - len(parts) - 1
            require("max_length", max_length, room >= len(parts), f"at least {2 * len(parts) + 1}")
            while sum(map(len, parts)) > room:
                max(parts, key=len).pop()
        ids, segments = [self.cls_id], [0]
        for segment, part in enumerate(parts):
            ids += [*part, self.sep_id]
            segments += [segment] * (len(part) + 1)
        return ids, segments


def _read_json(content: Mapping) -> tuple[list[str], bool]:
    """Return the pieces and whether they are lowercase, from a tokenizer.json; ValueError if not ours."""
    model, normalizer = content["model"], content["normalizer"]
    lowercase = normalizer["lowercase"]
    for name, found, ours in (
        ("model", model.get("type", "WordPiece"), "WordPiece"),
        ("continuing_subword_prefix", model["continuing_subword_prefix"], CONTINUATION),
        ("unk_token", model["unk_token"], "[UNK]"),
        ("max_input_chars_per_word", model["max_input_chars_per_word"], MOST_CHARACTERS),
        ("normalizer", normalizer["type"], "BertNormalizer"),
        ("clean_text", normalizer["clean_text"], True),
        ("handle_chinese_chars", normalizer["handle_chinese_chars"], True),
        ("pre_tokenizer", content["pre_tokenizer"]["type"], "BertPreTokenizer"),
    ):
        require(name, found, found == ours, repr(ours))
    require(
        "strip_accents", normalizer["strip_accents"], normalizer["strip_accents"] in (None, lowercase), "null"
    )
    vocabulary = model["vocab"]
    require(
        "vocab",
        len(vocabulary),
        sorted(vocabulary.values()) == list(range(len(vocabulary))),
        "numbered from 0",
    )
    return sorted(vocabulary, key=vocabulary.get), lowercase
