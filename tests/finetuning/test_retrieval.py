"""Passages, search by meaning and by words, recall, and what a reader is given."""

import json
import math
from functools import partial
from pathlib import Path

import bm25s
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from shared.data.corpus import load_stories
from shared.finetuning.embeddings import TextEmbedder, load_embedder
from shared.finetuning.evaluation import rouge_words
from shared.finetuning.retrieval import (
    BM25,
    Hit,
    SearchIndex,
    combined_scores,
    reading_prompt,
    recall_at,
    split_passages,
)
from tests.timing import seconds

TEXTS = ["the lamp is lit", "a storm at sea", "the keeper sleeps"]


@pytest.fixture(scope="module")
def embedder() -> TextEmbedder:
    return load_embedder("tales-bert")


@pytest.fixture
def index(embedder: TextEmbedder) -> SearchIndex:
    return SearchIndex.build(embedder, TEXTS)


# --- passages


@given(st.text('ab.!" \n', max_size=300).filter(str.strip), st.integers(1, 12))
def test_passages_hold_every_word_once_and_are_short(text: str, max_words: int) -> None:
    passages = split_passages(text, max_words)
    assert " ".join(passages).split() == text.split()
    assert all(1 <= len(passage.split()) <= max_words for passage in passages)


def test_paragraphs_stay_whole_where_they_fit() -> None:
    text = "one two\n\nthree four\n\nfive six seven. eight nine. ten"
    assert split_passages(text, 4) == ["one two\n\nthree four", "five six seven.", "eight nine. ten"]
    assert split_passages("a b c d e", 2) == ["a b", "c d", "e"]
    assert split_passages('He said "No." Then he left.', 4) == ['He said "No."', "Then he left."]


def test_the_stories_have_passages_within_the_models_length() -> None:
    for story in load_stories():
        passages = split_passages(story.text)
        assert " ".join(passages).split() == story.text.split()
        assert max(len(passage.split()) for passage in passages) <= 150


def test_bad_texts_for_passages() -> None:
    with pytest.raises(ValueError, match="text must be a text that is not empty"):
        split_passages("\n\n ")
    with pytest.raises(ValueError, match="max_words must be at least 1"):
        split_passages("a", 0)
    with pytest.raises(TypeError, match="text must be a str"):
        split_passages(["a"])


def test_splitting_takes_linear_time() -> None:
    for unit in ('a "b". ', "a b\n\n", "a. ", "\n\n a"):
        short, long = (seconds(partial(split_passages, unit * n)) for n in (5_000, 40_000))
        assert long < 32 * short, unit  # eight times as long: a square would be 64


# --- search by words


def test_bm25_by_hand() -> None:
    texts = ["a b", "a", "c c c"]
    found = BM25(texts, k1=1.5, b=0.75).scores("a c")
    rarity = {"a": math.log(1 + 1.5 / 2.5), "c": math.log(1 + 2.5 / 1.5)}
    penalties = [1.5 * (0.25 + 0.75 * length / 2) for length in (2, 1, 3)]
    wanted = [
        rarity["a"] * 2.5 / (1 + penalties[0]),
        rarity["a"] * 2.5 / (1 + penalties[1]),
        rarity["c"] * 3 * 2.5 / (3 + penalties[2]),
    ]
    np.testing.assert_allclose(found, wanted)


def test_bm25_is_that_of_bm25s() -> None:
    passages = [passage for story in load_stories()[:3] for passage in split_passages(story.text)]
    theirs = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    theirs.index([rouge_words(passage) for passage in passages], show_progress=False)
    ours = BM25(passages)
    for query in ("bell lamp the", "piano", "Who lit the lamp on the bridge?"):
        # Lucene's form leaves out the factor k1 + 1, which is the same for all.
        expected = 2.5 * theirs.get_scores(rouge_words(query))
        assert ours.scores(query).max() > 1
        np.testing.assert_allclose(ours.scores(query), expected, atol=1e-5)


def test_bm25_knows_what_matters() -> None:
    bm25 = BM25(["the the the the", "the asbestos", "the cat on the mat and the dog under the table"])
    assert bm25.scores("the asbestos").argmax() == 1
    assert bm25.scores("nowhere").tolist() == [0, 0, 0] and bm25.scores("").tolist() == [0, 0, 0]
    assert BM25(["", "a"]).scores("a")[1] > 0  # a text without words is no harm


def test_bad_arguments_of_bm25() -> None:
    with pytest.raises(ValueError, match="texts must be at least one, got 0"):
        BM25([])
    with pytest.raises(TypeError, match="texts must be several texts"):
        BM25("a")
    with pytest.raises(ValueError, match="k1 must be at least 0"):
        BM25(["a"], k1=-1)
    with pytest.raises(ValueError, match="b must be between 0 and 1"):
        BM25(["a"], b=2)


def test_rare_cases_of_bm25() -> None:
    np.testing.assert_allclose(BM25(["x", "x", "y", "y"]).scores("x"), [math.log(2), math.log(2), 0, 0])
    np.testing.assert_allclose(BM25(["x", "x", "x"]).scores("x"), 0.1335, atol=5e-5)


# --- two searches together


def test_two_searches_together() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((5, 9)), 100 * rng.random((5, 9)) - 7
    for weight, alone in ((0, first), (1, second)):
        assert (combined_scores(first, second, weight).argsort(1) == alone.argsort(1)).all()
    half = combined_scores(first, second, 0.5)
    # The units play no part.
    np.testing.assert_allclose(half, combined_scores(10 * first + 3, second, 0.5))
    np.testing.assert_allclose(half.mean(axis=1), 0, atol=1e-12)
    # Where a search finds nothing, the other decides.
    np.testing.assert_allclose(
        combined_scores(np.zeros((1, 3)), np.array([[0.0, 1.0, 2.0]]), 0.5)[0, 1], 0, atol=1e-12
    )


def test_bad_searches_together() -> None:
    with pytest.raises(ValueError, match=r"second must be \(2, 3\) as first"):
        combined_scores(np.zeros((2, 3)), np.zeros((2, 4)), 0.5)
    with pytest.raises(ValueError, match="weight must be between 0 and 1"):
        combined_scores(np.zeros((2, 3)), np.zeros((2, 3)), 1.5)


# --- search by meaning


def test_search_is_exact(embedder: TextEmbedder) -> None:
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(700, 16), dim=1)
    index = SearchIndex([str(i) for i in range(700)], vectors)
    scores, places = index.search(vectors[:300], 5)
    assert places[:, 0].tolist() == list(range(300))
    wanted = (vectors[:300].double() @ vectors.T.double()).topk(5)
    torch.testing.assert_close(scores, wanted.values.float(), atol=1e-5, rtol=1e-5)


def test_every_text_finds_itself(index: SearchIndex, embedder: TextEmbedder) -> None:
    for place, text in enumerate(TEXTS):
        hits = index.find(embedder, text, k=3)
        assert hits[0].place == place and hits[0].text == text and abs(hits[0].score - 1) < 1e-5
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert isinstance(hits[0], Hit)


def test_no_query_has_no_result(index: SearchIndex) -> None:
    scores, places = index.search(torch.empty(0, 128), 2)
    assert scores.shape == places.shape == (0, 2)


def test_bad_searches(index: SearchIndex, embedder: TextEmbedder) -> None:
    with pytest.raises(ValueError, match="k must be at most 3, the number of texts, got 4"):
        index.search(torch.ones(1, 128), 4)
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.find(embedder, "lamp", 0)
    with pytest.raises(ValueError, match=r"queries must be \(queries, 128\), got \(1, 32\)"):
        index.search(torch.ones(1, 32), 1)
    with pytest.raises(ValueError, match="text that is not empty"):
        index.find(embedder, " ")
    with pytest.raises(TypeError, match="question must be a str"):
        index.find(embedder, ["lamp"])


def test_another_models_question_is_refused(index: SearchIndex, embedder: TextEmbedder) -> None:
    other = TextEmbedder(embedder.model, embedder.tokenizer, max_length=20, name="tales-bert")
    with pytest.raises(ValueError, match="embedder must be one with max_length 232"):
        index.find(other, "lamp")


def test_bad_parts_of_an_index() -> None:
    with pytest.raises(ValueError, match="texts must be at least one"):
        SearchIndex([], torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"vectors must be \(2, width\), got \(3, 3\)"):
        SearchIndex(["a", "b"], torch.eye(3))
    for bad in (2 * torch.eye(2), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="vectors must be of length 1"):
            SearchIndex(["a", "b"], bad)
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str"):
        SearchIndex(["a", 2], torch.eye(2))
    with pytest.raises(ValueError, match=r"vectors must be \(2, width\), got \(2,\)"):
        SearchIndex(["a", "b"], torch.ones(2))
    whole_numbers = SearchIndex(["a", "b"], torch.eye(2, dtype=torch.int64))
    assert whole_numbers.search(torch.eye(2), 1)[1].tolist() == [[0], [1]]


# --- kept in files


def test_saved_and_loaded_it_is_the_same(index: SearchIndex, embedder: TextEmbedder, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    again = SearchIndex.load(tmp_path / "index", embedder)
    assert torch.equal(again.vectors, index.vectors) and again.texts == TEXTS and again.about == index.about
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")
    index.save(tmp_path / "index", replace=True)


def test_a_damaged_index_is_refused(index: SearchIndex, embedder: TextEmbedder, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index.save(folder)
    about, weights = folder / "index.json", folder / "model.safetensors"
    good = about.read_text(encoding="utf-8"), weights.read_bytes()
    content = json.loads(good[0])
    bad_texts = [
        good[0][:-10],
        "[]",
        json.dumps(content | {"texts": TEXTS[:2]}),
        json.dumps({"texts": TEXTS}),
        json.dumps(content | {"texts": [1, 2, 3]}),
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    for bad in bad_texts:
        about.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        with pytest.raises(ValueError, match="must hold an index that is whole"):
            SearchIndex.load(folder, embedder)
    about.write_text(good[0], encoding="utf-8")
    for bad in (good[1][:-4], good[1][:5], b""):
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match="must hold an index that is whole"):
            SearchIndex.load(folder, embedder)
    save_file({"other": torch.eye(3)}, weights)
    with pytest.raises(ValueError, match="must hold an index that is whole"):
        SearchIndex.load(folder)
    save_file({"vectors": torch.eye(3)}, weights)
    with pytest.raises(ValueError, match="width must be the embedder's, 128, got 3"):
        SearchIndex.load(folder, embedder)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        SearchIndex.load(folder)


def test_an_index_of_another_model_is_refused(
    index: SearchIndex, embedder: TextEmbedder, tmp_path: Path
) -> None:
    changed = SearchIndex(TEXTS, index.vectors, index.about | {"weights": "0" * 64})
    changed.save(tmp_path / "index")
    with pytest.raises(ValueError, match="embedder must be one with weights 000000000000"):
        SearchIndex.load(tmp_path / "index", embedder)


# --- judged, and read


def test_recall_by_hand() -> None:
    ranked, right = [[7, 1, 2, 3], [5, 6, 0, 7], [1, 7, 2, 3]], [{7}, {7}, {7, 9}]
    assert [recall_at(ranked, right, k) for k in (1, 2, 3, 4)] == [1 / 3, 2 / 3, 2 / 3, 1.0]
    assert recall_at(torch.tensor(ranked), right, 4) == 1.0


def test_bad_recall() -> None:
    with pytest.raises(ValueError, match="right must be 1, one for each question, got 2"):
        recall_at([[1]], [{1}, {1}], 1)
    with pytest.raises(ValueError, match="right must be 1, one for each question, got 0"):
        recall_at([], [], 1)
    with pytest.raises(ValueError, match="k must be at most 2"):
        recall_at([[1, 2], [1, 2, 3]], [{1}, {1}], 3)
    with pytest.raises(ValueError, match="places of at least one passage each"):
        recall_at([[1]], [set()], 1)


def test_what_a_reader_is_given() -> None:
    (alone,) = reading_prompt("Who?")
    assert alone == {"role": "user", "content": "Question: Who?\nAnswer with a few words."}
    (with_text,) = reading_prompt("Who?", ["A", "B"])
    assert with_text["content"].startswith("Read this text.\n\nA\n\nB\n\nQuestion: Who?")
    with pytest.raises(TypeError, match="passages must be several texts"):
        reading_prompt("Who?", "A")
    with pytest.raises(TypeError, match="question must be a str"):
        reading_prompt(None)
