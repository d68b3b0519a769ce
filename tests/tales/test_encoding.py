"""The tokenizer of the tales that ships: reproducible, and fit for the models that will use it."""

from shared.tales.encoding import (
    TALE_TOKENIZER_FILE,
    VOCAB_SIZE,
    tale_encoding,
    tale_tokenizer,
    train_tale_tokenizer,
)
from shared.tales.generator import SEPARATOR, TaleGenerator


def test_training_again_gives_the_shipped_file(tmp_path):
    train_tale_tokenizer().save(tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == TALE_TOKENIZER_FILE.read_bytes()


def test_both_forms_give_the_same_ids_and_lose_nothing():
    text = SEPARATOR.join(story.text for story in TaleGenerator(1).stories(200))
    ids = tale_encoding().encode(text)
    assert tale_tokenizer().encode(text) == ids
    assert tale_encoding().decode(ids) == text


def test_size_and_end_of_text():
    assert tale_tokenizer().n_vocab == tale_encoding().n_vocab == VOCAB_SIZE
    assert tale_encoding().eot_token == tale_tokenizer().eot_token == VOCAB_SIZE - 1


def test_every_story_fits_into_256_tokens():
    lengths = [len(tale_encoding().encode(story.text)) for story in TaleGenerator(2).stories(2_000)]
    assert max(lengths) < 250
    assert sum(lengths) / len(lengths) < 190
