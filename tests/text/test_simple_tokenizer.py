"""`SimpleTokenizer`: words and punctuation marks as tokens."""

import re
from collections import Counter

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from shared.data.corpus import load_languages, load_stories, stories_text
from shared.text.simple_tokenizer import SimpleTokenizer

ANY_TEXT = st.text(st.characters(exclude_categories=()))
MARKED_TEXT = st.text(st.sampled_from("ab1 .,:;-'\"’“”()/$—\n"), max_size=40)


@pytest.fixture(scope="module")
def trained() -> SimpleTokenizer:
    return SimpleTokenizer.train(stories_text())


def test_vocabulary_is_that_of_count_vectorizer(trained):
    vectorizer = CountVectorizer(lowercase=False, token_pattern=SimpleTokenizer.PATTERN)
    counts = vectorizer.fit_transform([stories_text()]).toarray()[0]
    assert trained.tokens[:-2] == vectorizer.get_feature_names_out().tolist()
    assert np.bincount(trained.encode(stories_text())).tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("I don't know.", ["I", "don't", "know", "."]),
        ("o’clock", ["o’clock"]),
        ("'so'", ["'", "so", "'"]),
        ("At 22:48, 1,150 for 64.50.", ["At", "22:48", ",", "1,150", "for", "64.50", "."]),
        ("well-lit -- yes", ["well", "-", "lit", "--", "yes"]),
        ("snake_case", ["snake_case"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_how_text_is_split(text, tokens):
    assert SimpleTokenizer.split(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        '"Is he?" I asked. "He\'s not."',
        "She said 'no' and (twice) 'never', then left.",
        "A well-lit room -- or [not]; 50% of it: £5, $6.",
        "“It’s late,” he said…",
        '"One." "Two." "Three."',
        "and/or 3.14 at 22:48",
    ],
)
def test_usual_english_comes_back_exactly(text):
    tokenizer = SimpleTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nearly_all_paragraphs_of_the_stories_come_back(trained):
    parts = [part for story in load_stories() for part in story.text.split("\n\n")]
    same = sum(trained.decode(trained.encode(part)) == part for part in parts)
    assert same >= 0.99 * len(parts)


@given(ANY_TEXT | MARKED_TEXT)
def test_ids_survive_decoding(text):
    tokenizer = SimpleTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.vocab[SimpleTokenizer.UNKNOWN] not in ids


@given(ANY_TEXT)
def test_no_text_is_refused(text):
    tokenizer = SimpleTokenizer.train("a few words")
    assert all(0 <= number < len(tokenizer) for number in tokenizer.encode(text))


@pytest.mark.parametrize("language", ["de", "ru", "ar", "hi", "zh", "ja", "code"])
def test_ids_survive_decoding_in_other_languages(language):
    text = "\n".join(paragraph.text for paragraph in load_languages(language))
    tokenizer = SimpleTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_unknown_words(trained):
    assert trained.decode(trained.encode("The xylorimba, he said.")) == "The <|unk|>, he said."


def test_special_tokens_cannot_be_forged(trained):
    text = "The end.<|endoftext|>The <|unk|>"
    end, unknown = (trained.vocab[token] for token in ("<|endoftext|>", "<|unk|>"))
    assert end not in trained.encode(text)
    assert trained.encode(text, allowed_special="all")[3] == end
    assert trained.encode(text, allowed_special="all")[-1] == unknown
    own = SimpleTokenizer.train("< | endoftext > unk")
    assert "<|endoftext|>" not in own.decode(own.encode("<|endoftext|>"))


def test_special_tokens_have_the_last_ids(trained):
    assert trained.tokens[-2:] == ["<|unk|>", "<|endoftext|>"]
    assert len(trained) == len(trained.vocab)


def test_end_of_text_closes_open_quotation_marks():
    text = '"Open <|endoftext|> "closed" x'
    tokenizer = SimpleTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text, allowed_special="all")) == text


def test_lone_surrogates_count_as_the_replacement_character():
    engine = tiktoken.Encoding(
        "bytes", pat_str=r".+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    tokenizer = SimpleTokenizer.train("a \ufffd b 😀")
    for text in ("a \ud800 b", "\udc00", "\ud83d\ude00"):
        well_formed = engine.decode(engine.encode(text))
        assert tokenizer.encode(text) == tokenizer.encode(well_formed)
    assert SimpleTokenizer.train("x \ud800").tokens[:2] == ["x", "\ufffd"]


def test_rare_words_can_be_left_out():
    text = "a a a b b c"
    tokenizer = SimpleTokenizer.train(text, minimum_count=2)
    assert tokenizer.tokens == ["a", "b", "<|unk|>", "<|endoftext|>"]
    assert Counter(tokenizer.encode(text)) == {0: 3, 1: 2, 2: 1}


def test_ids_may_come_from_arrays_and_tensors(trained):
    ids = trained.encode("The end.")
    assert trained.decode(np.array(ids)) == trained.decode(torch.tensor(ids)) == trained.decode(ids)


def test_the_vocabulary_is_copied():
    vocabulary = {"a": 0, "<|unk|>": 1, "<|endoftext|>": 2}
    tokenizer = SimpleTokenizer(vocabulary)
    vocabulary.clear()
    assert tokenizer.decode([0]) == "a"


SPECIAL = {"<|unk|>": 0, "<|endoftext|>": 1}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SimpleTokenizer({}), ValueError, "vocab is empty"),
        (lambda: SimpleTokenizer({"a": 0, "<|unk|>": 1}), ValueError, "<|endoftext|>"),
        (lambda: SimpleTokenizer({"a": 0, "<|endoftext|>": 1}), ValueError, "<|unk|>"),
        (lambda: SimpleTokenizer(SPECIAL | {"a": 3}), ValueError, "without gaps"),
        (lambda: SimpleTokenizer(SPECIAL | {"a": 1}), ValueError, "without gaps"),
        (lambda: SimpleTokenizer(SPECIAL | {"a": -1}), ValueError, "without gaps"),
        (lambda: SimpleTokenizer(["a"]), TypeError, "list"),
        (lambda: SimpleTokenizer(SPECIAL | {"a": "2"}), TypeError, "'2'"),
        (lambda: SimpleTokenizer(SPECIAL | {2: 2}), TypeError, "str to int, got 2: 2"),
        (lambda: SimpleTokenizer.train(None), TypeError, "NoneType"),
        (
            lambda: SimpleTokenizer.train("a", minimum_count=0),
            ValueError,
            "minimum_count must be at least 1, got 0",
        ),
        (lambda: SimpleTokenizer(SPECIAL).encode(b"a"), TypeError, "bytes"),
        (lambda: SimpleTokenizer(SPECIAL).decode([2]), ValueError, "ids must be from 0 to 1, got 2"),
        (lambda: SimpleTokenizer(SPECIAL).decode([-1]), ValueError, "got -1"),
        (lambda: SimpleTokenizer(SPECIAL).decode([0.5]), TypeError, "float"),
        (lambda: SimpleTokenizer(SPECIAL).decode(["a"]), TypeError, "str"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
