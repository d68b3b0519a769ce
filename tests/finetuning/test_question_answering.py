"""Answers that are spans: characters and tokens, windows, the search for a span, readers, thresholds, files."""

import itertools
import json
import math
import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shared.data.corpus import load_reading_questions, load_stories
from shared.finetuning.evaluation import exact_match, token_f1
from shared.finetuning.question_answering import (
    Reader,
    SpanModel,
    best_span,
    fit_threshold,
    load_reader,
    span_batches,
    span_loss,
    window_batch,
)
from shared.finetuning.retrieval import split_passages
from shared.finetuning.spans import cut_windows, to_characters, to_tokens, token_spans
from shared.model.gpt import GPTConfig, GPTModel
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.tales.questions import TaleQuestionGenerator
from shared.training.loop import train
from shared.weights.pretrained import CHECKPOINTS, load_pretrained
from tests.timing import seconds

TINY = GPTConfig(
    vocab_size=2048,
    context_length=64,
    emb_dim=16,
    n_heads=2,
    n_layers=1,
    dropout=0.0,
    qkv_bias=False,
    bias=False,
    norm="rmsnorm",
    feed_forward="swiglu",
    positions="rotary",
)


@pytest.fixture
def reader() -> Reader:
    torch.manual_seed(0)
    reader = Reader(SpanModel(GPTModel(TINY)), tale_encoding(), overlap=8, max_tokens=8)
    torch.nn.init.normal_(reader.model.head.weight)
    return reader


# --- characters and tokens


@pytest.mark.parametrize("encoding", [tale_encoding(), tale_tokenizer()], ids=["tiktoken", "ours"])
def test_tokens_cover_the_text(encoding: object) -> None:
    text = "At nine Léa ate 书 🍐.\n\nNaïve?"
    ids, spans = token_spans(encoding, text)
    assert ids == encoding.encode_ordinary(text) and len(spans) == len(ids)
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    # Neighbours touch, or share a character that both have bytes of.
    assert all(b[0] in (a[1], a[1] - 1) for a, b in itertools.pairwise(spans))
    assert token_spans(encoding, "") == ([], [])


@given(st.text(min_size=1), st.data())
def test_what_is_chosen_comes_back(text: str, data: st.DataObject) -> None:
    text = text.encode("utf-8", "ignore").decode()
    if not text:
        return
    _, spans = token_spans(tale_encoding(), text)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    first, stop = to_tokens(spans, start, end)
    assert spans[first][0] <= start < end <= spans[stop - 1][1]
    # No token at either end could be left out.
    assert spans[first][1] > start and spans[stop - 1][0] < end
    low, high = to_characters(text, spans, first, stop)
    assert text[low:high] == text[spans[first][0] : spans[stop - 1][1]].strip()


def test_every_answer_comes_back_from_every_bundled_passage() -> None:
    passages = {story.title: split_passages(story.text) for story in load_stories()}
    n = 0
    for question in load_reading_questions():
        for answer in question.answers:
            passage = next(p for p in passages[question.story] if question.evidence in p)
            start = passage.index(answer, passage.index(question.evidence))
            _, spans = token_spans(tale_encoding(), passage)
            low, high = to_characters(passage, spans, *to_tokens(spans, start, start + len(answer)))
            assert low <= start and start + len(answer) <= high and high - low <= len(answer) + 2
            assert token_f1(passage[low:high], answer) == 1
            n += 1
    assert n > 190


@pytest.mark.parametrize("place", [(0, 0), (3, 2), (-1, 2), (0, 9)])
def test_no_characters(place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="start, end must be characters between 0 and 8"):
        to_tokens(token_spans(tale_encoding(), "Ada came")[1], *place)
    with pytest.raises(ValueError, match="between 0 and 0"):
        to_tokens([], 0, 1)


def test_a_thing_that_is_no_text() -> None:
    with pytest.raises(TypeError, match="text must be a str"):
        token_spans(tale_encoding(), None)


class FoldsCapitals:
    """A tokenizer whose tokens are not the bytes of the text."""

    def encode_ordinary(self, text: str) -> list[int]:
        return tale_encoding().encode_ordinary(text.lower())

    def decode_single_token_bytes(self, token: int) -> bytes:
        return tale_encoding().decode_single_token_bytes(token)


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    assert len(token_spans(FoldsCapitals(), "ada came")[0]) == len(
        token_spans(tale_encoding(), "ada came")[0]
    )
    with pytest.raises(ValueError, match="encoding must be one whose tokens are the bytes of the text"):
        token_spans(FoldsCapitals(), "Ada came")


def test_time_grows_with_the_length() -> None:
    def there_and_back(n: int) -> None:
        text = "Ada came. " * n
        _, spans = token_spans(tale_encoding(), text)
        for start in range(0, len(text) - 10, 10):
            to_tokens(spans, start, start + 3)

    assert seconds(partial(there_and_back, 16_000)) < 32 * seconds(partial(there_and_back, 2_000))


# --- windows


@given(st.integers(1, 80), st.integers(0, 5), st.integers(1, 4))
def test_windows_hold_every_short_span(n_tokens: int, overlap: int, n_question: int) -> None:
    length = n_question + 2 * overlap + 2
    windows = cut_windows([7] * n_question, range(n_tokens), 99, context_length=length, overlap=overlap)
    assert all(len(w.ids) <= length and w.ids[-1] == 99 for w in windows)
    assert windows[0].start == 0 and windows[-1].stop == n_tokens
    assert all(a.stop - b.start == overlap for a, b in itertools.pairwise(windows))
    for first in range(n_tokens):
        for stop in range(first + 1, min(first + overlap + 1, n_tokens) + 1):
            found = [w.target(first, stop) for w in windows]
            whole = [(w, target) for w, target in zip(windows, found, strict=True) if target[0] != w.null]
            assert whole, "a span that is cut everywhere"
            for window, (low, high) in whole:
                assert window.ids[low : high + 1] == tuple(range(first, stop))
            assert all(t == (w.null, w.null) for w, t in zip(windows, found, strict=True) if t[0] == w.null)


def test_bad_windows() -> None:
    cut = partial(cut_windows, context_length=20, overlap=4)
    for name, arguments in (("question", ([], [1])), ("passage", ([1], []))):
        with pytest.raises(ValueError, match=f"{name} must be at least one token, got 'nothing'"):
            cut(*arguments, 99)
    with pytest.raises(ValueError, match="question must be at most 10 tokens long, got '11 tokens'"):
        cut([7] * 11, [1], 99)
    assert len(cut([7] * 10, [1], 99)) == 1
    with pytest.raises(ValueError, match="overlap must be at most 8 for windows of 20 tokens, got 9"):
        cut_windows([7], [1], 99, context_length=20, overlap=9)
    assert len(cut_windows([7], [1], 99, context_length=20, overlap=8)) == 1
    with pytest.raises(ValueError, match="overlap must be at least 0"):
        cut_windows([7], [1], 99, context_length=20, overlap=-1)


def test_windows_together_are_not_much_longer_than_the_passage() -> None:
    for n in (1_000, 10_000):
        windows = cut_windows([7] * 60, range(n), 99, context_length=256, overlap=64)
        assert sum(len(w.ids) for w in windows) < 2.5 * n


# --- the best span


@pytest.mark.parametrize("max_tokens", [1, 3, 50])
def test_best_span_is_that_of_all_pairs(max_tokens: int) -> None:
    torch.manual_seed(max_tokens)
    for n in (1, 2, 7, 40):
        scores = torch.randn(n, 2)
        pairs = [(i, j) for i in range(n) for j in range(i, min(i + max_tokens, n))]
        slow = max(pairs, key=lambda pair: float(scores[pair[0], 0] + scores[pair[1], 1]))
        assert best_span(scores, max_tokens)[1] == (slow[0], slow[1] + 1)


def test_the_last_token_never_stands_before_the_first() -> None:
    scores = torch.tensor([[0.0, 9.0], [9.0, 0.0], [0.0, 1.0]])
    assert best_span(scores, 3) == (10.0, (1, 3))
    assert best_span(scores, 1) == (9.0, (0, 1))


# --- the model


def test_before_training_all_allowed_places_are_equal() -> None:
    torch.manual_seed(0)
    model = SpanModel(GPTModel(TINY))
    windows = cut_windows([7, 8], range(20, 40), 99, context_length=16, overlap=3)
    batch = window_batch(windows)
    probability = model(batch).softmax(dim=1)
    for row, window in zip(probability, windows, strict=True):
        n = window.null + 1 - window.offset
        inside = row[window.offset : window.null + 1]
        assert torch.allclose(inside, torch.full_like(inside, 1 / n)) and row.sum().isclose(torch.tensor(2.0))
    targets = torch.tensor([window.target(0, 2) for window in windows])
    by_hand = 2 * sum(math.log(w.null + 1 - w.offset) for w in windows)
    assert span_loss(model, batch, targets).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(bidirectional: bool) -> None:
    torch.manual_seed(0)
    model = SpanModel(GPTModel(TINY), bidirectional=bidirectional).eval()
    torch.nn.init.normal_(model.head.weight)
    short, long = (cut_windows([7, 8], range(20, n), 99, context_length=60, overlap=3)[0] for n in (25, 60))
    alone = model(window_batch([short]))
    together = model(window_batch([short, long]))
    torch.testing.assert_close(together[0, : len(short.ids)], alone[0], atol=1e-5, rtol=1e-5)
    assert together[0, len(short.ids) :].isneginf().all()
    # With both directions, and only then, a token feels what comes after it.
    changed = window_batch([type(short)((*short.ids[:-2], 1000, 99), short.offset, short.start, short.stop)])
    first_allowed = short.offset
    same = torch.allclose(model(changed)[0, first_allowed], alone[0, first_allowed], atol=1e-5)
    assert same != bidirectional


# --- a reader


def test_answers_are_pieces_of_the_passage_and_never_of_the_question(reader: Reader) -> None:
    reader.threshold = -math.inf
    rng = random.Random(0)
    for _ in range(30):
        words = [
            rng.choice(["Ada", "the old key", "mill,", "Léa", "on Monday.", "书"])
            for _ in range(rng.randint(1, 60))
        ]
        passage = " ".join(words)
        answer = reader.answer("Who had the lamp in the bakery?", passage)
        assert answer.text == passage[answer.start : answer.end] != "" and answer.text == answer.text.strip()
        assert len(tale_encoding().encode_ordinary(answer.text)) <= reader.max_tokens + 2


@torch.no_grad()
def test_best_and_null_are_taken_over_all_windows(reader: Reader) -> None:
    reader.threshold = -math.inf
    question, passage = "Who came?", "Ada came to the mill on Monday. " * 12
    windows, spans = reader.windows(question, passage)
    assert len(windows) > 2
    best, null = [], []
    for window in windows:
        row = reader.model(window_batch([window]))[0]
        score, (first, stop) = best_span(row[window.offset : window.null], reader.max_tokens)
        best.append((score, to_characters(passage, spans, first + window.start, stop + window.start)))
        null.append(float(row[window.null].sum()))
    answer = reader.answer(question, passage)
    assert (answer.start, answer.end) == max(best)[1]
    assert answer.margin == pytest.approx(max(best)[0] - min(null), abs=1e-4)


def test_batches_change_nothing(reader: Reader) -> None:
    asked = [(q.question, q.passage) for q in TaleQuestionGenerator(0).questions(7)]
    together = reader.answer_all(*zip(*asked, strict=True), batch_size=3)
    for (question, passage), answer in zip(asked, together, strict=True):
        alone = reader.answer(question, passage)
        assert alone.text == answer.text and alone.margin == pytest.approx(answer.margin, abs=1e-4)
    assert reader.answer_all([], []) == []


def test_silence(reader: Reader) -> None:
    spoken = reader.answer("Who came?", "Ada came.")
    reader.threshold = spoken.margin + 1
    silent = reader.answer("Who came?", "Ada came.")
    assert (silent.text, silent.start, silent.end) == ("", 0, 0) and silent.margin == spoken.margin


def test_examples_hold_the_answer(reader: Reader) -> None:
    passage = "The mill stood near the river. " * 12 + "On Monday Ada came to the mill."
    start = passage.index("Ada")
    examples = reader.examples("Who came?", passage, start, "Ada")
    assert len(examples) > 1
    inside = [(w, t) for w, t in examples if t != (w.null, w.null)]
    assert inside
    for window, (first, last) in inside:
        assert tale_encoding().decode(window.ids[first : last + 1]).strip() == "Ada"
    for window, target in reader.examples("Who left?", passage, -1, ""):
        assert target == (window.null, window.null)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("threshold", math.nan, "threshold must be a number"),
        ("threshold", "1", "threshold must be a number"),
        ("overlap", -1, "overlap must be at least 0"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
    ],
)
def test_bad_settings(reader: Reader, setting: str, value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Reader(reader.model, reader.encoding, **{setting: value})
    silent = Reader(reader.model, reader.encoding, threshold=math.inf, overlap=8)
    assert silent.answer("Who?", "Ada came.").text == ""


def test_bad_examples(reader: Reader) -> None:
    for start in (-1, 1, 3, 100):
        with pytest.raises(ValueError, match=f"answer must be what the passage has at {start}"):
            reader.examples("Who came?", "Ada came.", start, "Ada")
    for question, passage, name in (("", "Ada", "question"), ("Who?", " \n", "passage")):
        with pytest.raises(ValueError, match=f"{name} must be a text that is not empty"):
            reader.answer(question, passage)
    with pytest.raises(TypeError, match="question must be a str"):
        reader.answer(None, "Ada")
    with pytest.raises(ValueError, match="question must be at most"):
        reader.answer("Who came? " * 40, "Ada came.")
    with pytest.raises(ValueError, match="passages must be 1, one for each question"):
        reader.answer_all(["Who?"], ["a", "b"])


def test_batches_of_examples(reader: Reader) -> None:
    examples = [
        e
        for q in TaleQuestionGenerator(0).questions(20)
        for e in reader.examples(q.question, q.passage, q.start, q.answer)
    ]
    batches = list(span_batches(iter(examples), 8, pool=2, seed=3))
    assert sum(len(targets) for _, targets in batches) == len(examples)
    again = list(span_batches(iter(examples), 8, pool=2, seed=3))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(batches, again, strict=True))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(span_batches(iter(examples), 0))


def test_a_reader_learns_to_point(reader: Reader) -> None:
    torch.manual_seed(0)
    words = ["key", "hat", "lamp", "drum", "coin", "doll"]
    rng = random.Random(1)

    def examples() -> object:
        while True:
            passage = " ".join(rng.sample(words, 4)) + " is red"
            yield from reader.examples("Which?", passage, passage.index(" is red") + 1, "is red")

    optimizer = torch.optim.AdamW(reader.model.parameters(), lr=1e-2)
    train(reader.model, span_batches(examples(), 16), optimizer, n_steps=60, loss=span_loss)
    answer = reader.answer("Which?", "hat key is red")
    assert answer.text == "is red" and answer.margin > 0


# --- silence, and measures


def test_threshold_by_all_places() -> None:
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 8)
        margins = [float(rng.randint(-3, 3)) for _ in range(n)]
        none = [rng.random() < 0.4 for _ in range(n)]
        f1 = [rng.choice([0.0, 0.5, 1.0]) for _ in range(n)]

        def worth(limit: float, margins=margins, none=none, f1=f1) -> float:
            return sum(
                (0 if silent else value) if margin >= limit else float(silent)
                for margin, silent, value in zip(margins, none, f1, strict=True)
            )

        best = max(worth(limit) for limit in [-10, *(m + d for m in margins for d in (0, 0.5))])
        assert worth(fit_threshold(margins, f1, none)) == pytest.approx(best)


def test_bad_thresholds() -> None:
    with pytest.raises(ValueError, match="margins must be of at least one question"):
        fit_threshold([], [], [])
    with pytest.raises(ValueError, match="f1 must be 1, one for each question"):
        fit_threshold([1.0], [], [True])
    with pytest.raises(ValueError, match="unanswerable must be 1"):
        fit_threshold([1.0], [1.0], [])
    with pytest.raises(ValueError, match="margins must be finite"):
        fit_threshold([math.nan], [1.0], [False])


def test_measures_of_silence_and_of_several_references() -> None:
    assert exact_match("", "") == token_f1("", "") == 1
    assert exact_match("x", "") == token_f1("x", "") == exact_match("", "x") == token_f1("", "x") == 0
    assert token_f1("old key", ["a hat", "key"]) == token_f1("old key", "key")
    # All other cases are compared with SQuAD's program in test_evaluation.


# --- files


def test_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = Reader(
        SpanModel(load_pretrained("tales-tiny", dtype=torch.float32)), tale_encoding(), threshold=1.5
    )
    with torch.no_grad():
        reader.model.head.weight.normal_()
        reader.model.body.blocks[0].feed_forward.down.weight.add_(0.01)
    reader.save(tmp_path / "reader", "tales-tiny", seed=3)
    again = load_reader(tmp_path / "reader")
    assert (again.threshold, again.overlap, again.max_tokens) == (1.5, reader.overlap, reader.max_tokens)
    q = TaleQuestionGenerator(0).sample()
    assert again.answer(q.question, q.passage).margin == pytest.approx(
        reader.answer(q.question, q.passage).margin, abs=0.05
    )
    assert json.loads((tmp_path / "reader" / "reader.json").read_text())["seed"] == 3
    # Only what changed is written.
    assert (tmp_path / "reader" / "model.safetensors").stat().st_size < 60_000


def test_bad_files(tmp_path: Path) -> None:
    reader = Reader(SpanModel(load_pretrained("tales-tiny", dtype=torch.float32)), tale_encoding())
    with pytest.raises(ValueError, match="body must be of the shape of tales-1m"):
        reader.save(tmp_path / "a", "tales-1m")
    with pytest.raises(ValueError, match=r"name_or_folder must be .*or a folder"):
        load_reader("nothing")
    reader.save(tmp_path / "b", "tales-tiny")
    about = json.loads((tmp_path / "b" / "reader.json").read_text())
    for change, match in (
        ({"base_sha256": "0"}, "made for the tales-tiny of this machine"),
        ({"base": "tales-1m"}, "made for the tales-1m of this machine"),
    ):
        (tmp_path / "b" / "reader.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=match):
            load_reader(tmp_path / "b")
    for text in ("{", "{}", "[]"):
        (tmp_path / "b" / "reader.json").write_text(text)
        with pytest.raises(ValueError, match="holds no reader that can be read"):
            load_reader(tmp_path / "b")
    (tmp_path / "b" / "reader.json").write_text(json.dumps(about))
    good = load_file(tmp_path / "b" / "model.safetensors")
    for change, match in (
        ({"head.weight": torch.zeros(3, 64)}, "holds no head of two scores"),
        ({"tail": torch.zeros(1)}, "folder must be of a body and a head alone"),
        ({"body.nothing": torch.zeros(1)}, "must be those of the model, and no others"),
        ({"body.final_norm.weight": torch.zeros(3)}, "final_norm.weight in "),
    ):
        save_file(good | change, tmp_path / "b" / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            load_reader(tmp_path / "b")
    save_file({"head.bias": torch.zeros(2)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no head of two scores"):
        load_reader(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="holds no reader that can be read"):
        load_reader(tmp_path / "b")


def test_the_reader_of_the_course() -> None:
    reader = load_reader("tales-reader")
    asked = list(TaleQuestionGenerator(6).questions(200))
    found = reader.answer_all([q.question for q in asked], [q.passage for q in asked])
    known = [token_f1(a.text, q.answer) for a, q in zip(found, asked, strict=True) if q.answer]
    assert sum(known) / len(known) > 0.9
    assert all(a.text in q.passage for a, q in zip(found, asked, strict=True))
    about = json.loads((CHECKPOINTS / "tales-reader" / "reader.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", about["base_sha256"])
