"""The first content filter: fit it on the training half of its texts, and score it on the test half.

    python train_filter.py              about five minutes of one core

Fitted are the linear classifier and the mix of signals, on the undisguised training texts and on lessons by the author
of the rules (origin `rules` of `shared/data/filter_lessons.tsv`). Thresholds are fixed by ten folds of the training
half, in which a text and its disguised twin stay together: the lowest one at which 95 % of what is blocked is rightly
blocked. Beside the filter stand two stronger readers, each with logistic regression: sentence vectors of MiniLM, and
chapter 6's recipe, the mean features of SmolLM2's block 20. What ships is the second filter, `second_filter.py`.

`filter_scores.csv` has a row for each of the 1,560 texts, in the order of the file: scores out of the folds for
training texts, scores of the fitted systems for test and fresh texts; and whether each system blocks it.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from shared.data.corpus import (
    FilterLesson,
    FilterText,
    load_filter_lessons,
    load_filter_texts,
    load_instructions,
    load_languages,
    load_questions,
    load_reviews,
    load_sms,
    stories_text,
)
from shared.safety.filters import N_BUCKETS, SIGNALS, ContentFilter, hashed_features, read_rules
from shared.safety.spelling import Speller, count_words, fold, key_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "filter_scores.csv"
PRECISION, N_FOLDS, PENALTY, MODEL_PENALTY = 0.95, 10, 10.0, 3.0
RULES = read_rules()
DISGUISED = ("lookalike", "spaced")
SYSTEMS = (
    "words",
    "words undisguised",
    "patterns",
    "classifier",
    "filter",
    "minilm",
    "filter+minilm",
    "smollm2",
)


def plain_texts(lessons: Sequence[FilterLesson]) -> list[str]:
    """Return the bundled texts from which the speller learns words; those of the filter's set are not among them."""
    texts = [stories_text(), *(row.text for row in (*load_sms("train"), *load_reviews("train")))]
    texts += [
        " ".join((entry.instruction, entry.input, entry.output)) for entry in load_instructions("train")
    ]
    texts += [paragraph.text for paragraph in load_languages("en")]
    texts += [" ".join((question.question, *question.answers)) for question in load_questions()]
    return [*texts, *(lesson.text for lesson in lessons)]


def is_disguised(row: FilterText) -> bool:
    """Return whether a text's spelling was disguised."""
    return row.kind in DISGUISED


def hashed(texts: Sequence[str]) -> np.ndarray:
    """Return the features of undisguised texts as a matrix (texts, buckets)."""
    table = np.zeros((len(texts), N_BUCKETS), dtype=np.float32)
    for row, text in zip(table, texts, strict=True):
        for bucket, value in hashed_features(text).items():
            row[bucket] = value
    return table


def rule_signals(texts: Sequence[str]) -> np.ndarray:
    """Return the signals that need no fitting, for undisguised texts: all but the last of `SIGNALS`."""
    blank = ContentFilter(Speller({"a": 1}), np.zeros(1, dtype=np.float32), [0.0] * (len(SIGNALS) + 1), 0.0)
    return np.array([blank.signals(text)[:-1] for text in texts])


def fit(features: np.ndarray, blocked: np.ndarray, penalty: float) -> LogisticRegression:
    """Fit a logistic regression."""
    return LogisticRegression(C=penalty, max_iter=3000).fit(features, blocked)


def threshold_for(scores: np.ndarray, blocked: np.ndarray, precision: float = PRECISION) -> float:
    """Return the lowest threshold above which the share of the rightly blocked is at least `precision`."""
    order = np.argsort(-scores, kind="stable")
    right = np.cumsum(blocked[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(right >= precision)
    if not len(good):
        return float(scores.max())
    last = good[-1]
    below = scores[order[last + 1]] if last + 1 < len(order) else scores[order[last]] - 1
    return float((scores[order[last]] + below) / 2)


def model_features(name: str, texts: Sequence[str]) -> np.ndarray:
    """Return what a published model computes of texts, one vector each."""
    if name == "minilm":
        from shared.finetuning.embeddings import load_embedder

        return load_embedder().embed(texts).numpy()
    import torch

    from shared.finetuning.features import pooled_features
    from shared.weights.pretrained import load_pretrained, load_tokenizer

    model = load_pretrained("smollm2-135m-instruct", dtype=torch.float32)
    encoding = load_tokenizer("smollm2-135m-instruct")
    features = pooled_features(model, [encoding.encode_ordinary(text) for text in texts], 20)
    return (features / features.norm(dim=1, keepdim=True)).numpy() * 10


class Fitted:
    """The systems that are fitted, from lessons and some of the training texts."""

    def __init__(self, tables: dict[str, np.ndarray], places: np.ndarray, blocked: np.ndarray) -> None:
        self.models = {
            name: fit(table[places], blocked[places], PENALTY if name == "classifier" else MODEL_PENALTY)
            for name, table in tables.items()
            if name != "rules"
        }
        # The mix sees scores of folds: on what it has learned itself a classifier is surer than on anything new.
        inner = {name: np.zeros(len(places)) for name in ("classifier", "minilm") if name in self.models}
        for name, scores in inner.items():
            penalty = PENALTY if name == "classifier" else MODEL_PENALTY
            for fold_number in range(5):
                out = np.arange(len(places)) % 5 == fold_number
                part = fit(tables[name][places[~out]], blocked[places[~out]], penalty)
                scores[out] = part.decision_function(tables[name][places[out]])
        self.mixes = {
            name: fit(
                np.column_stack([tables["rules"][places], *(inner[part] for part in parts)]),
                blocked[places],
                1.0,
            )
            for name, parts in MIXES.items()
            if all(part in inner for part in parts)
        }

    def scores(self, tables: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
        """Return the score of each system for texts."""
        found = {name: model.decision_function(tables[name][places]) for name, model in self.models.items()}
        for name, mix in self.mixes.items():
            parts = [tables["rules"][places], *(found[part] for part in MIXES[name])]
            found[name] = mix.decision_function(np.column_stack(parts))
        return found


MIXES = {"filter": ("classifier",), "filter+minilm": ("classifier", "minilm")}


def tables_of(speller: Speller, texts: Sequence[str], models: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the features of texts for all systems."""
    plain = [speller.undisguise(text) or "?" for text in texts]
    tables = {"rules": rule_signals(plain), "classifier": hashed(plain)}
    return tables | {name: model_features(name, plain) for name in models}


def fixed_verdicts(text: str, speller: Speller) -> dict[str, bool]:
    """Return what the systems without numbers say of a text."""
    plain, rules = speller.undisguise(text), RULES
    return {
        "words": bool(rules.word_hits(text.lower())),
        "words undisguised": bool(rules.word_hits(plain)),
        "patterns": rules.pattern_hits(plain).category is not None,
    }


def main() -> None:
    """Fit, score and record."""
    models = ("minilm", "smollm2")
    rows, lessons = load_filter_texts(), [row for row in load_filter_lessons() if row.origin == "rules"]
    base = count_words(plain_texts(lessons))
    is_train = np.array([row.split == "train" for row in rows])
    is_learned = np.array([row.split == "train" and not is_disguised(row) for row in rows])
    counts = count_words(
        [*plain_texts(lessons), *(row.text for row, learned in zip(rows, is_learned, strict=True) if learned)]
    )
    texts = [*(row.text for row in rows), *(lesson.text for lesson in lessons)]
    blocked = np.array([row.label == "block" for row in (*rows, *lessons)])
    lesson_places = np.arange(len(rows), len(texts))

    # Folds: the speller does not know the words of the training texts either, and twins stay together.
    speller = Speller(base)
    train = np.flatnonzero(is_train)
    tables = tables_of(speller, texts, models)
    groups = [key_of(fold(rows[place].text)) for place in train]
    numbers = {key: number for number, key in enumerate(sorted(set(groups)))}
    folds = GroupKFold(N_FOLDS, shuffle=True, random_state=0)
    scores: dict[str, np.ndarray] = {}
    for inside, outside in folds.split(train, groups=[numbers[key] for key in groups]):
        learned = np.array([place for place in train[inside] if is_learned[place]])
        found = Fitted(tables, np.concatenate([learned, lesson_places]), blocked).scores(
            tables, train[outside]
        )
        for name, values in found.items():
            scores.setdefault(name, np.zeros(len(rows)))[train[outside]] = values
    thresholds = {
        name: threshold_for(values[is_learned], blocked[: len(rows)][is_learned])
        for name, values in scores.items()
    }
    for name, threshold in thresholds.items():
        caught = (scores[name] > threshold)[is_learned & blocked[: len(rows)]].mean()
        print(
            f"{name:14} threshold {threshold:6.2f}: {caught:.0%} of the plain training texts, out of folds",
            flush=True,
        )

    # All training texts; the others are scored once.
    speller = Speller(counts)
    tables = tables_of(speller, texts, models)
    everything = np.concatenate([np.flatnonzero(is_learned), lesson_places])
    fitted = Fitted(tables, everything, blocked)
    test = np.flatnonzero(~is_train)
    for name, values in fitted.scores(tables, test).items():
        scores[name][test] = values
    record(rows, scores, thresholds, speller)


def record(
    rows: Sequence[FilterText], scores: dict[str, np.ndarray], thresholds: dict[str, float], speller: Speller
) -> None:
    """Write `filter_scores.csv`."""
    names = [name for name in SYSTEMS if name in scores]
    columns = [
        "number",
        "split",
        "label",
        "category",
        "kind",
        "origin",
        *SYSTEMS,
        *(f"{name} score" for name in names),
    ]
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for number, row in enumerate(rows):
            about = {name: getattr(row, name) for name in ("split", "label", "category", "kind", "origin")}
            verdicts = {name: int(value) for name, value in fixed_verdicts(row.text, speller).items()}
            verdicts |= {name: int(scores[name][number] > thresholds[name]) for name in names}
            values = {f"{name} score": f"{scores[name][number]:.4f}" for name in names}
            writer.writerow({"number": number, **about, **verdicts, **values})


if __name__ == "__main__":
    main()
