"""WordPiece against Hugging Face's tokenizers, character by character and text by text; training; bad input."""

import json
import math
import random
import unicodedata

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from shared.data.corpus import load_languages, load_sms
from shared.data.models import has_model, model_file
from shared.text.wordpiece import (
    SPECIAL_TOKENS,
    WordPieceTokenizer,
    cut_word,
    join_pieces,
    likelihood_gain,
    normalize,
    split_words,
    train_pieces,
)
from shared.weights.bert import load_bert_tokenizer

needs_minilm = pytest.mark.skipif(not has_model("all-minilm-l6-v2"), reason="MiniLM is not installed")
# Characters that every table of Unicode has in the same class: that inside `tokenizers` is older than Python's.
OLD = [
    chr(i)
    for i in range(0x110000)
    if unicodedata.ucd_3_2_0.category(chr(i)) == unicodedata.category(chr(i)) not in ("Cn", "Cs")
]
PIECES = [*SPECIAL_TOKENS, "un", "##aff", "##able", "##a", "play", "##ing", ",", "!", "straße", "ß", "##ß"]


@pytest.fixture(scope="module")
def tiny() -> WordPieceTokenizer:
    return WordPieceTokenizer(PIECES)


@pytest.fixture(scope="module")
def minilm() -> tuple[WordPieceTokenizer, Tokenizer]:
    theirs = Tokenizer.from_file(str(model_file("all-minilm-l6-v2").parent / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    return load_bert_tokenizer("all-minilm-l6-v2"), theirs


def hugging_face(tokenizer: WordPieceTokenizer) -> Tokenizer:
    """The same vocabulary in Hugging Face's classes."""
    theirs = Tokenizer(WordPiece(tokenizer.ids, unk_token="[UNK]", max_input_chars_per_word=100))
    theirs.normalizer = BertNormalizer(lowercase=tokenizer.lowercase)
    theirs.pre_tokenizer = BertPreTokenizer()
    return theirs


def strange_text(rng: random.Random, words: list[str]) -> str:
    """A text of ordinary words, accents, Chinese, any characters at all, long words, white space of every kind."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.randrange(8)
        if kind < 3:
            parts.append(rng.choice(words))
        elif kind == 3:
            parts.append("".join(rng.choice("àéîöüñçßøåšžőÅÉÎİıǅﬁ") for _ in range(rng.randint(1, 8))))
        elif kind == 4:
            parts.append("".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 5))))
        elif kind == 5:
            parts.append("".join(rng.choice(OLD) for _ in range(rng.randint(1, 6))))
        elif kind == 6:
            parts.append(
                rng.choice(["a", "ab", "é", "字", "x-"]) * rng.choice([30, 49, 50, 51, 99, 100, 101, 300])
            )
        else:
            parts.append(
                rng.choice([" ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "\u0301", "'", "...", "$", "\x00"])
            )
        parts.append(rng.choice(["", " ", " "]))
    return "".join(parts)


@needs_minilm
def test_10000_strange_texts_are_cut_as_minilms_own_file_cuts_them(minilm: tuple) -> None:
    ours, theirs = minilm
    rng = random.Random(0)
    words = [word for paragraph in load_languages() for word in paragraph.text.split()]
    texts = [strange_text(rng, words) for _ in range(10_000)]
    expected = [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]
    assert not wrong, wrong[:3]


@needs_minilm
def test_every_character_of_unicode_3_2_inside_a_word(minilm: tuple) -> None:
    ours, theirs = minilm
    texts = [f"ab{character}cd" for character in OLD[::7]]
    expected = [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)]
    wrong = [text for text, ids in zip(texts, expected, strict=True) if ours.encode_ordinary(text) != ids]
    assert not wrong, wrong[:3]


@needs_minilm
def test_pairs_are_built_as_minilms_file_builds_them(minilm: tuple) -> None:
    ours, theirs = minilm
    first, second = "How are you?", "Fine, thanks. [MASK]"
    expected = theirs.encode(first, second)
    ids, segments = ours.build_input(ours.encode(first), ours.encode(second))
    assert (ids, segments) == (expected.ids, expected.type_ids)
    alone = theirs.encode(first)
    assert ours.build_input(ours.encode(first)) == (alone.ids, alone.type_ids)


@needs_minilm
def test_the_vocabulary_of_both_files_is_the_same(minilm: tuple) -> None:
    folder = model_file("all-minilm-l6-v2").parent
    assert WordPieceTokenizer.load(folder / "vocab.txt").pieces == minilm[0].pieces


@pytest.mark.parametrize("lowercase", [True, False])
def test_our_own_vocabulary_in_hugging_faces_classes(lowercase: bool) -> None:
    texts = [row.text for row in load_sms("train")]
    ours = WordPieceTokenizer.train(texts, 700, alphabet="äöü", lowercase=lowercase)
    theirs, rng = hugging_face(ours), random.Random(1)
    words = [word for text in texts for word in text.split()]
    for text in [*texts, *(strange_text(rng, words) for _ in range(1000))]:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, text


def test_a_word_is_cut_from_the_left_into_the_longest_pieces(tiny: WordPieceTokenizer) -> None:
    assert cut_word("unaffable", tiny.ids) == ["un", "##aff", "##able"]
    assert cut_word("unaffably", tiny.ids) is None
    assert tiny.encode_ordinary("Unaffable, unaffably playing!") == [5, 6, 7, 11, 1, 9, 10, 12]


def test_normalize_and_split_by_hand() -> None:
    assert normalize("Crème\tBrûlée\x00") == "creme brulee"
    assert normalize("Crème", lowercase=False) == "Crème"
    assert split_words(normalize("I don't, 你好!")) == ["i", "don", "'", "t", ",", "你", "好", "!"]
    assert normalize("ΟΔΟΣ") == "οδοσ"  # each letter by itself, no final sigma


def test_a_special_token_in_a_strangers_text_is_text(tiny: WordPieceTokenizer) -> None:
    assert tiny.mask_id not in tiny.encode_ordinary("play [MASK]")
    assert tiny.encode("play [MASK]") == [tiny.ids["play"], tiny.mask_id]
    assert tiny.mask_id not in tiny.encode("play [mask]")


def test_gain_of_a_pair_by_hand() -> None:
    # ab ab ab c: 3 a, 3 b, 1 c become 3 ab, 1 c.
    before = 3 * math.log(3 / 7) * 2 + math.log(1 / 7)
    after = 3 * math.log(3 / 4) + math.log(1 / 4)
    assert likelihood_gain(3, 3, 3, 7) == pytest.approx(after - before)
    # aaaa: 4 a become 2 aa; the corpus was certain before and is so afterwards.
    assert likelihood_gain(4, 4, 2, 4, same=True) == pytest.approx(0.0)


def test_training_joins_what_belongs_together() -> None:
    assert train_pieces({"hug": 10, "pug": 5, "hugs": 5}, 2)[0] == "##ug"
    assert train_pieces({"ab": 3, "c": 1}, 5) == ["ab"]
    assert train_pieces({"a": 3}, 5) == []
    assert join_pieces("##a", "##b") == "##ab"


def test_training_reads_the_same_from_any_order_and_keeps_every_character() -> None:
    texts = ["the cat sat on the mat", "the cat ate", "Ünïcode 字"]
    one, other = (WordPieceTokenizer.train(order, 40, alphabet="z!") for order in (texts, texts[::-1]))
    assert one.pieces == other.pieces
    assert {"z", "##z", "!", "字", "u"} <= set(one.pieces)
    assert one.unk_id not in one.encode_ordinary("unicode 字 zz!")


def test_decode_and_files(tiny: WordPieceTokenizer, tmp_path) -> None:
    assert tiny.decode(tiny.encode_ordinary("unaffable, playing")) == "unaffable , playing"
    tiny.save(tmp_path / "vocab.txt")
    assert WordPieceTokenizer.load(tmp_path / "vocab.txt").pieces == tiny.pieces
    with pytest.raises(ValueError, match=r"ids must be from 0 to 15, got 99"):
        tiny.decode([99])


def test_both_segments_are_cut_to_fit_the_longer_first(tiny: WordPieceTokenizer) -> None:
    ids, segments = tiny.build_input([5] * 10, [6] * 3, 10)
    assert ids == [2, 5, 5, 5, 5, 3, 6, 6, 6, 3]
    assert segments == [0] * 6 + [1] * 4
    with pytest.raises(ValueError, match="max_length must be at least 5, got 4"):
        tiny.build_input([5], [6], 4)


def test_bad_input(tiny: WordPieceTokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="without a piece that stands there twice"):
        WordPieceTokenizer([*PIECES, "un"])
    with pytest.raises(
        ValueError, match=r"vocabulary must be one with all special tokens, got 'one without \[MASK\]'"
    ):
        WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])
    with pytest.raises(TypeError, match="text must be a str"):
        tiny.encode_ordinary(b"play")
    with pytest.raises(TypeError, match="texts must be several texts"):
        WordPieceTokenizer.train("one text", 100)
    with pytest.raises(ValueError, match="texts must be texts with at least one word"):
        WordPieceTokenizer.train([" ", "\x00"], 100)
    with pytest.raises(ValueError, match="vocab_size must be at least 9, got 6"):
        WordPieceTokenizer.train(["ab"], 6)
    with pytest.raises(FileNotFoundError):
        WordPieceTokenizer.load(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE"}},
        {"model": {"max_input_chars_per_word": 50}},
        {"normalizer": {"clean_text": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"vocab": {"[PAD]": 0, "[UNK]": 2}}},
    ],
)
def test_a_tokenizer_file_that_asks_for_something_else_is_refused(change: dict, tmp_path) -> None:
    content = json.loads(hugging_face(WordPieceTokenizer(PIECES)).to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert WordPieceTokenizer.load(path).pieces == PIECES
    for name, values in change.items():
        content[name] |= values
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="must be"):
        WordPieceTokenizer.load(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a vocabulary of WordPiece"):
        WordPieceTokenizer.load(path)
