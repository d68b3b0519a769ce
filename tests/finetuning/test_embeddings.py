"""Texts to vectors: the mean over real tokens, batches, long and strange texts, MiniLM against transformers."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.models import has_model, model_file
from shared.finetuning.embeddings import TextEmbedder, cosine_similarity, cut_pieces, load_embedder
from shared.finetuning.features import pool_states
from shared.model.bert import BERTConfig, BERTModel
from shared.text.wordpiece import SPECIAL_TOKENS, WordPieceTokenizer
from tests.timing import seconds

needs_minilm = pytest.mark.skipif(not has_model("all-minilm-l6-v2"), reason="MiniLM is not installed")


@pytest.fixture(scope="module")
def tiny() -> TextEmbedder:
    """An embedder of few random numbers that reads letters."""
    torch.manual_seed(0)
    letters = [chr(97 + i) for i in range(26)]
    tokenizer = WordPieceTokenizer([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), "."])
    config = BERTConfig(tokenizer.vocab_size, 12, 2, 32, 4, 2, dropout=0.5, init_std=0.3)
    return TextEmbedder(BERTModel(config), tokenizer, max_length=12, name="tiny")


# --- the cosine


def test_cosines_by_hand() -> None:
    first = torch.tensor([[3.0, 4.0]])
    second = torch.tensor([[4.0, 3.0], [30.0, 40.0], [-4.0, 3.0], [-3.0, -4.0]])
    torch.testing.assert_close(cosine_similarity(first, second), torch.tensor([[0.96, 1.0, 0.0, -1.0]]))


def test_cosines_are_those_of_torch() -> None:
    first, second = torch.randn(5, 7), torch.randn(3, 7)
    wanted = F.cosine_similarity(first[:, None], second[None], dim=-1)
    torch.testing.assert_close(cosine_similarity(first, second), wanted, atol=1e-6, rtol=1e-5)


def test_what_has_no_direction_or_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="second must be rows that have a direction, got 'a row of zeros'"):
        cosine_similarity(torch.ones(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="second must be rows of one width"):
        cosine_similarity(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="first must be rows of one width"):
        cosine_similarity(torch.ones(2), torch.ones(1, 2))


# --- the mean


def test_pads_do_not_go_into_the_mean() -> None:
    """The case of sentence-transformers #2569: rows [1, 0], [1, 0] and pads [0, 2], [0, 2] give [1, 0]."""
    states = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    mask = torch.tensor([[True, True, False, False]])
    assert pool_states(states, mask, "mean").tolist() == [[1.0, 0.0]]


def test_an_embedding_is_the_mean_over_a_texts_own_tokens(tiny: TextEmbedder) -> None:
    ids = tiny.tokenizer.build_input(tiny.tokenizer.encode_ordinary("a cat"))[0]
    with torch.no_grad():
        mean = tiny.model.eval()(torch.tensor([ids]))[0].mean(dim=0)
    tiny.model.train()
    torch.testing.assert_close(tiny.embed(["a cat"])[0], F.normalize(mean, dim=0), atol=1e-6, rtol=1e-5)


@given(st.lists(st.text("abc ", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=9))
@settings(max_examples=25, deadline=None)
def test_a_text_alone_is_the_text_in_a_batch(tiny: TextEmbedder, texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = tiny.embed(texts, batch_size=4)
        alone = torch.cat([tiny.embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))


def test_it_computes_in_evaluation_and_leaves_the_model_as_it_was(tiny: TextEmbedder) -> None:
    tiny.model.train()
    assert torch.equal(tiny.embed(["abc"]), tiny.embed(["abc"]))
    assert tiny.model.training
    # The vectors can be trained on: they are no inference tensors.
    assert not tiny.embed(["abc"]).is_inference()


# --- long texts


@given(st.integers(1, 500), st.integers(1, 40))
def test_pieces_are_few_whole_and_nearly_equal(n: int, size: int) -> None:
    pieces = cut_pieces(range(n), size)
    assert [i for piece in pieces for i in piece] == list(range(n)) and len(pieces) == -(-n // size)
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1


def test_what_is_cut_is_counted(tiny: TextEmbedder) -> None:
    with pytest.warns(UserWarning, match="2 of 3 texts were cut to 12 tokens"):
        vectors = tiny.embed(["abcdefghij", "abcdefghijk", "abcdefghijxyz"])
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors[0], vectors[2], atol=1e-6, rtol=1e-5)


def test_pieces_are_weighted_by_their_length(tiny: TextEmbedder) -> None:
    text = "abcdefghijklmnopqrstu"  # 21 tokens: 7, 7, 7, each with [CLS] and [SEP]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tiny.embed([text, "abc"], long="pieces", batch_size=1)
    ids = tiny.tokenizer.encode_ordinary(text)
    sums = torch.zeros(32)
    with torch.no_grad():
        tiny.model.eval()
        for piece in cut_pieces(ids, 10):
            sums += tiny.model(torch.tensor([tiny.tokenizer.build_input(piece)[0]]))[0].sum(dim=0)
    torch.testing.assert_close(found[0], F.normalize(sums, dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], tiny.embed(["abc"])[0], atol=1e-5, rtol=1e-5)


def test_time_does_not_grow_with_the_square_of_the_length(tiny: TextEmbedder) -> None:
    def embed(text: str) -> None:
        tiny.tokenizer._known.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.embed([text], long="pieces")
            tiny.embed([text])

    for unit in ("abc ", "abc", ".", "\u0301 a"):
        short, long = (seconds(partial(embed, unit * n)) for n in (2_000, 16_000))
        assert long < 32 * short, unit  # eight times as long: a square would be 64


# --- strange texts


def test_one_long_word_is_an_unknown_word_and_said_so(tiny: TextEmbedder) -> None:
    with pytest.warns(UserWarning, match="2 of 3 texts hold no word that the vocabulary knows"):
        vectors = tiny.embed(["x" * 100_000, "\u4e16", "abc"])
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-6, rtol=1e-5)


def test_a_batch_of_nothing_gives_no_vector(tiny: TextEmbedder) -> None:
    assert tiny.embed([]).shape == (0, 32)


@pytest.mark.parametrize("empty", ["", " \n\t", "\u200b"])
def test_an_empty_text_is_refused_with_its_place(tiny: TextEmbedder, empty: str) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\] must be a text that is not empty"):
        tiny.embed(["abc", empty])


def test_bad_arguments(tiny: TextEmbedder) -> None:
    with pytest.raises(TypeError, match="texts must be several texts"):
        tiny.embed("abc")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got int"):
        tiny.embed(["abc", 3])
    with pytest.raises(ValueError, match="long must be one of cut, pieces, got 'fold'"):
        tiny.embed(["abc"], long="fold")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        tiny.embed(["abc"], batch_size=0)
    for length in (2, 13):
        with pytest.raises(ValueError, match=f"max_length must be from 3 to 12, got {length}"):
            TextEmbedder(tiny.model, tiny.tokenizer, max_length=length)
    other = WordPieceTokenizer([*SPECIAL_TOKENS, "a"])
    with pytest.raises(ValueError, match="tokenizer must be of the model's size, 58, got 6"):
        TextEmbedder(tiny.model, other, max_length=12)
    with pytest.raises(ValueError, match="name_or_path must be one of"):
        load_embedder("minilm")


def test_it_says_what_its_vectors_depend_on(tiny: TextEmbedder) -> None:
    about = tiny.about()
    assert about["embedder"] == "tiny" and about["max_length"] == "12" and len(about["weights"]) == 64
    other = TextEmbedder(BERTModel(tiny.model.config), tiny.tokenizer, max_length=12, name="tiny")
    assert other.about()["weights"] != about["weights"]


# --- the real ones


def test_the_shipped_bert_is_loaded_with_its_own_context() -> None:
    tales = load_embedder("tales-bert")
    assert tales.max_length == tales.model.config.context_length == 232 and tales.width == 128
    assert load_embedder("tales-bert", max_length=50).max_length == 50


@needs_minilm
def test_minilm_is_the_reference_computation() -> None:
    """Mean over the real tokens of transformers' states, then the division by the length: the model card's recipe."""
    transformers = pytest.importorskip("transformers")
    folder = model_file("all-minilm-l6-v2").parent
    reference = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A keeper lit the lamp.", "Was it dark?", "word " * 400, "Crème brûlée, 世界!", "x"]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = reference(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].float()
    wanted = F.normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)
    with pytest.warns(UserWarning, match="1 of 5 texts were cut to 256 tokens"):
        found = load_embedder().embed(texts, batch_size=2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@needs_minilm
def test_minilm_puts_meaning_above_words() -> None:
    query, cat, bank = load_embedder().embed(
        ["The kitten is asleep.", "A little cat takes a nap.", "The bank is closed."]
    )
    assert query @ cat > query @ bank + 0.3
