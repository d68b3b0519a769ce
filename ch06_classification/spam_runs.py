"""Compare the ways to tell spam from ham on the bundled messages, and record what came of it.

    python spam_runs.py                        everything that the record lacks
    python spam_runs.py --method features      only some methods
    python spam_runs.py --uci                  the quick methods on the UCI collection (fetched, or from LLM_DATA_DIR)
    python spam_runs.py --ship                 make shared/checkpoints/spam: the filter, and the messages' features

Each method is judged by five-fold cross-validation of the training and validation messages together, with folds and
first weights of seeds 0, 1 and 2 (side experiments: seed 0), and on the test split. There the networks learn from the
training split and stop by the validation split; the other methods learn from both. Every row of `spam.csv` holds,
message by message, whether the method was right, so that methods can be compared in pairs. Learning rates, depths and
penalties were tried on folds of another seed (the first fold where a run is slow); those runs stand in the record
with the role "choice". The values used were set before by short trials, and none of the others is better there by
more than chance. A run replaces the row of the same method, detail, role and seed, so the script goes on where it was
stopped. One thread is used.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline, make_union
from torch import Tensor

from shared.data.corpus import LabeledText, load_sms
from shared.data.download import fetch
from shared.finetuning.classification import best_threshold, encode_texts, fit_head, train_classifier
from shared.finetuning.features import (
    POOLINGS,
    batches_by_length,
    cached_features,
    features_of,
    lower_part,
    pad_inputs,
    pool_states,
    row_key,
    save_features,
    token_states,
    upper_part,
)
from shared.finetuning.tuning import (
    GPTClassifier,
    fine_tune,
    label_logits,
    learning_rate_groups,
    prompted_logits,
    set_trainable,
)
from shared.model.gpt import GPTModel
from shared.model.inspection import residual_stream
from shared.notebook.records import read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "spam.csv"
COLUMNS = [
    "data",
    "method",
    "detail",
    "role",
    "seed",
    "trained",
    "cpu_seconds",
    "n",
    "correct",
    "right",
    "hardware",
    "torch",
]
KEY = ("data", "method", "detail", "role", "seed")
SEEDS, CHOICE_SEED, N_FOLDS = (0, 1, 2), 9, 5

SMALL, LARGE = "tales-3m", "smollm2-135m-instruct"
N_BLOCKS, N_FROZEN = 20, 16  # of SmolLM2's 30: where features are read, and below which nothing is trained
PENALTY = 0.03

Fit = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, int]]


class Texts:
    """Labelled texts, and what the models read of them, computed once."""

    def __init__(self, name: str, rows: Sequence[LabeledText]) -> None:
        self.name, self.rows = name, rows
        self.texts = np.array([row.text for row in rows], dtype=object)
        self.targets = np.array([int(row.label == "spam") for row in rows])
        self.splits = np.array([row.split for row in rows])
        self._ids: dict[str, list[list[int]]] = {}
        self.known: dict[tuple[int, str, str], Tensor] = {}
        self._states: list[Tensor] = []

    def ids(self, model: str) -> list[list[int]]:
        """The texts as a model's tokens, cut to its context."""
        if model not in self._ids:
            length = load_pretrained(model).config.context_length
            self._ids[model] = encode_texts(load_tokenizer(model), list(self.texts), length)[0]
        return self._ids[model]

    def features(self, n_blocks: int = N_BLOCKS, pooling: str = "mean", model: str = LARGE) -> Tensor:
        """One vector of a frozen model for each text."""
        key = (n_blocks, pooling, model)
        if key not in self.known:
            frozen = load_pretrained(model, dtype=torch.float32)
            self.known[key] = cached_features(frozen, self.ids(model), n_blocks, pooling)
        return self.known[key]

    def every_block(self) -> None:
        """Compute SmolLM2's features after each block and with each pooling, in one pass."""
        model, rows = load_pretrained(LARGE, dtype=torch.float32).eval(), self.ids(LARGE)
        found = {
            (n, pooling, LARGE): torch.empty(len(rows), model.config.emb_dim)
            for n in range(len(model.blocks) + 1)
            for pooling in POOLINGS
        }
        for places in batches_by_length(rows, 16):
            tokens, mask = pad_inputs([rows[i] for i in places])
            for n, states in enumerate(residual_stream(model, tokens)):
                for pooling in POOLINGS:
                    found[n, pooling, LARGE][places] = pool_states(states, mask, pooling)
        self.known |= found

    def states(self) -> list[Tensor]:
        """What leaves SmolLM2's block `N_FROZEN`, for each token of each text, in half precision."""
        if not self._states:
            self._states = [torch.empty(0)] * len(self.rows)
            frozen = load_pretrained(LARGE, dtype=torch.float32)
            for i, states in token_states(frozen, self.ids(LARGE), N_FROZEN):
                self._states[i] = states.half()
        return self._states


# --- the methods: fit(train places, judged places, seed) -> (predicted labels, numbers trained)


def majority(data: Texts, train: np.ndarray, judged: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Always the more frequent label."""
    return np.full(len(judged), int(data.targets[train].mean() > 0.5)), 0


def counting_model(*, letters: bool) -> Pipeline:
    """Return TF-IDF of words and pairs of words, and of pieces of 1 to 5 letters, with logistic regression."""
    parts = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)]
    if letters:
        parts.append(TfidfVectorizer(analyzer="char", ngram_range=(1, 5), sublinear_tf=True))
    return make_pipeline(make_union(*parts), LogisticRegression(C=10, max_iter=1000))


def counts(
    data: Texts, train: np.ndarray, judged: np.ndarray, seed: int, *, letters: bool
) -> tuple[np.ndarray, int]:
    """The labels by `counting_model`."""
    model = counting_model(letters=letters)
    model.fit(data.texts[train], data.targets[train])
    return model.predict(data.texts[judged]), model[-1].coef_.size + 1


def on_features(
    data: Texts,
    train: np.ndarray,
    judged: np.ndarray,
    seed: int,
    *,
    penalty: float = PENALTY,
    **where: object,
) -> tuple[np.ndarray, int]:
    """Logistic regression on the features of a frozen model."""
    features, targets = data.features(**where), torch.as_tensor(data.targets)
    head = fit_head(features[train], targets[train], 2, penalty=penalty)
    with torch.no_grad():
        return head(features[judged]).argmax(1).numpy(), sum(p.numel() for p in head.parameters())


def tuned(
    data: Texts,
    train: np.ndarray,
    judged: np.ndarray,
    seed: int,
    *,
    start: str = "pretrained",
    part: str = "all",
    pooling: str = "mean",
    learning_rate: float = 3e-4,
    n_epochs: int = 6,
) -> tuple[np.ndarray, int]:
    """The small GPT with a head, trained whole or in part, from its trained weights or from random ones."""
    torch.manual_seed(seed)
    body = load_pretrained(SMALL)
    if start == "random":
        body = GPTModel(body.config)
    classifier = GPTClassifier(body, 2, pooling)
    n_trained = set_trainable(classifier, part)
    optimizer = torch.optim.AdamW(learning_rate_groups(classifier, learning_rate, 1e-2), weight_decay=0.05)
    return fitted(data, classifier, data.ids(SMALL), optimizer, train, judged, seed, n_epochs), n_trained


def last_blocks(
    data: Texts,
    train: np.ndarray,
    judged: np.ndarray,
    seed: int,
    *,
    learning_rate: float = 1e-4,
    n_epochs: int = 3,
) -> tuple[np.ndarray, int]:
    """SmolLM2's blocks 17 to 20 trained on the cached states below them; the head begins as logistic regression.

    That head has seen the messages that early stopping watches, which can make it stop too early, never too late.
    """
    torch.manual_seed(seed)
    body = upper_part(lower_part(load_pretrained(LARGE, dtype=torch.float32), N_BLOCKS), N_FROZEN)
    classifier = GPTClassifier(body, 2, "mean")
    classifier.requires_grad_(False)
    body.blocks.requires_grad_(True)
    # First the best head for the blocks as they are, then both together (Kumar et al., 2022).
    features, targets = data.features(), torch.as_tensor(data.targets)
    classifier.head = fit_head(features[train], targets[train], 2, penalty=PENALTY)
    n_trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(
        learning_rate_groups(classifier, learning_rate, learning_rate), weight_decay=0.05
    )
    rows = [states.float() for states in data.states()]
    return fitted(data, classifier, rows, optimizer, train, judged, seed, n_epochs), n_trained


def fitted(
    data: Texts,
    classifier: GPTClassifier,
    rows: Sequence,
    optimizer: torch.optim.Optimizer,
    train: np.ndarray,
    judged: np.ndarray,
    seed: int,
    n_epochs: int,
) -> np.ndarray:
    """Fine-tune with early stopping and return the predicted labels of the judged texts."""
    targets = data.targets
    # The test split has its own validation split; a fold takes a tenth of its training texts.
    if set(data.splits[judged]) == {"test"}:
        learned = [i for i in train if data.splits[i] == "train"]
        watched = [i for i in train if data.splits[i] == "validation"]
    else:
        learned, watched = train_test_split(train, test_size=0.1, random_state=seed, stratify=targets[train])
    fine_tune(
        classifier,
        [rows[i] for i in learned],
        targets[learned],
        ([rows[i] for i in watched], targets[watched]),
        optimizer,
        n_epochs=n_epochs,
        seed=seed,
    )
    return label_logits(classifier, [rows[i] for i in judged]).argmax(1).numpy()


def question(data: Texts, examples: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The tokens before a message, after it, and those of the two answers " ham" and " spam"."""
    encoding = load_tokenizer(LARGE)
    shown = "".join(f'Message: "{data.texts[i]}"\nAnswer: {data.rows[i].label}\n\n' for i in examples)
    before = (
        "Decide for each text message whether it is spam (advertising or fraud that nobody asked for) or ham "
        f'(a message that the reader wants).\n\n{shown}Message: "'
    )
    answers = [encoding.encode_ordinary(f" {label}")[0] for label in LABELS]
    return encoding.encode_ordinary(before), encoding.encode_ordinary('"\nAnswer:'), answers


def asked(
    data: Texts, train: np.ndarray, judged: np.ndarray, seed: int, *, n_examples: int, n_shift: int = 0
) -> tuple[np.ndarray, int]:
    """SmolLM2 asked in words: the more probable of the two answers, after examples of both labels.

    With `n_shift` the line between the answers is moved to where it is best for so many other training messages: a
    model may prefer one answer whatever it is asked (Zhao et al., 2021).
    """
    rng = np.random.default_rng(seed)
    examples = [
        i
        for label in (0, 1)
        for i in rng.choice(train[data.targets[train] == label], n_examples // 2, replace=False)
    ]
    before, after, answers = question(data, rng.permutation(examples).astype(int).tolist())
    others = rng.choice(np.setdiff1d(train, examples), n_shift, replace=False)
    rows = [[*data.ids(LARGE)[i], *after] for i in (*others, *judged)]
    logits = prompted_logits(load_pretrained(LARGE, dtype=torch.float32), before, rows, answers)
    lead = logits[:, 1] - logits[:, 0]
    line = 0.0
    if n_shift:
        line = best_threshold(lead[:n_shift], torch.as_tensor(data.targets[others]), 1, 1)
    return (lead[n_shift:] >= line).int().numpy(), int(n_shift > 0)


# --- what is run

METHODS: dict[str, tuple[Callable, dict[str, object]]] = {
    "majority": (majority, {}),
    "words": (counts, {"letters": False}),
    "words and letters": (counts, {"letters": True}),
    "features": (on_features, {}),
    "small features": (on_features, {"model": SMALL, "n_blocks": 4}),
    "small, random start": (tuned, {"start": "random", "learning_rate": 1e-3}),
    "small": (tuned, {}),
    "small, last block": (tuned, {"part": "last_block"}),
    "small, head": (tuned, {"part": "head"}),
    "small, last token": (tuned, {"pooling": "last"}),
    "small, first token": (tuned, {"pooling": "first"}),
    "last blocks": (last_blocks, {}),
    "asked": (asked, {"n_examples": 0}),
    "asked, 8 examples": (asked, {"n_examples": 8}),
    "asked, 8 examples, line moved": (asked, {"n_examples": 8, "n_shift": 100}),
}
QUICK = ("majority", "words", "words and letters", "features")
# One seed: it is only asked whether the pooling matters; or nothing is random.
ONE_SEED = {"small, last token", "small, first token", "asked"}
CHOICES: list[tuple[str, str, Sequence[object]]] = [
    ("features", "penalty", (0.003, 0.01, 0.03, 0.1, 0.3)),
    ("features", "n_blocks", (2, 6, 10, 14, 18, 22, 26, 30)),
    ("features", "pooling", ("last", "first")),
    ("small", "learning_rate", (1e-4, 3e-4, 1e-3)),
    ("small, random start", "learning_rate", (3e-4, 1e-3, 3e-3)),
    ("last blocks", "learning_rate", (3e-5, 1e-4, 3e-4)),
]
LABELS = ("ham", "spam")


def folds(data: Texts, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Five times the places of training and of judged texts, none of them of the test split.

    Equal texts fall into the same fold, so that no method is asked what it was told; UCI's collection has many.
    """
    places = np.flatnonzero(data.splits != "test")
    cutter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    groups = np.unique(data.texts[places].astype(str), return_inverse=True)[1]
    return [
        (places[train], places[judged])
        for train, judged in cutter.split(places, data.targets[places], groups)
    ]


def uci(balanced: bool) -> Texts:
    """The UCI SMS Spam Collection (Almeida et al., 2011), whole, or its 747 spam with as many ham drawn once."""
    lines = fetch("SMSSpamCollection").read_text(encoding="utf-8").split("\n")
    pairs = [line.split("\t", 1) for line in lines if line]
    rows = [LabeledText(text, label, "plain", "train") for label, text in pairs]
    if balanced:
        spam, ham = ([row for row in rows if row.label == label] for label in ("spam", "ham"))
        chosen = np.random.default_rng(123).choice(len(ham), len(spam), replace=False)
        rows = spam + [ham[i] for i in sorted(chosen)]
    return Texts("uci balanced" if balanced else "uci", rows)


def run(data: Texts, method: str, role: str, seed: int, **options: object) -> dict[str, object]:
    """Run a method and return its row."""
    fit, usual = METHODS[method]
    detail = " ".join(f"{name}={value}" for name, value in options.items())
    n_folds = 1 if role == "choice" and method not in QUICK else N_FOLDS
    return judged_row(data, method, detail, role, seed, partial(fit, **{**usual, **options}), n_folds)


def judged_row(
    data: Texts, method: str, detail: str, role: str, seed: int, fit: Callable, n_folds: int = N_FOLDS
) -> dict[str, object]:
    """Fit and judge on so many of the folds, or on the test split, and return the row of the record."""
    pairs = folds(data, seed)[:n_folds]
    if role == "test":
        pairs = [(np.flatnonzero(data.splits != "test"), np.flatnonzero(data.splits == "test"))]
    started, right, trained = time.process_time(), np.zeros(len(data.rows), dtype=bool), 0
    for train, judged in pairs:
        predicted, trained = fit(data, train, judged, seed)
        right[judged] = predicted == data.targets[judged]
    marks = "".join("01"[int(right[i])] for i in np.sort(np.concatenate([judged for _, judged in pairs])))
    return {
        "data": data.name,
        "method": method,
        "detail": detail,
        "role": role,
        "seed": seed,
        "trained": trained,
        "cpu_seconds": round(time.process_time() - started),
        "n": len(marks),
        "correct": marks.count("1"),
        "right": marks,
        "hardware": cpu_name(),
        "torch": torch.__version__,
    }


def jobs(methods: Sequence[str]) -> list[tuple[str, str, int, dict[str, object]]]:
    """All runs of some methods as (method, role, seed, options), choices first."""
    found = []
    for method in methods:
        for chosen_for, name, values in CHOICES:
            if chosen_for == method:
                found += [(method, "choice", CHOICE_SEED, {name: value}) for value in values]
        seeds = SEEDS[:1] if method in ONE_SEED else SEEDS
        found += [(method, role, seed, {}) for role in ("folds", "test") for seed in seeds]
    return found


def ship() -> None:
    """Write the filter that `load_classifier("spam")` returns, and the features of all messages in half precision."""
    data, folder = Texts("bundled", load_sms()), CHECKPOINTS / "spam"
    learned = np.flatnonzero(data.splits != "test")
    labels = [data.rows[i].label for i in learned]
    spam_filter = train_classifier(
        list(data.texts[learned]), labels, base=LARGE, n_blocks=N_BLOCKS, penalty=PENALTY
    )
    (folder / "features.safetensors").unlink(missing_ok=True)
    recipe = (
        "spam_runs.py --ship: train_classifier on the training and validation messages of shared/data/sms.tsv"
    )
    spam_filter.save(folder, replace=True, recipe=recipe, torch=torch.__version__, hardware=cpu_name())
    features = zip(map(row_key, data.ids(LARGE)), data.features().half(), strict=True)
    about = features_of(load_pretrained(LARGE, dtype=torch.float32), N_BLOCKS, "mean")
    save_features(folder / "features.safetensors", dict(features), about)
    judged = data.splits == "test"
    predicted = np.array(spam_filter.predict(list(data.texts[judged]))) == "spam"
    print(
        f"{(predicted == data.targets[judged].astype(bool)).sum()} of {judged.sum()} test messages; {folder}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--role", nargs="+", choices=("choice", "folds", "test"), default=["choice", "folds", "test"]
    )
    parser.add_argument("--uci", action="store_true", help="the quick methods on the UCI collection instead")
    parser.add_argument(
        "--ship", action="store_true", help="make the filter of shared/checkpoints/spam and nothing else"
    )
    parser.add_argument("--again", action="store_true", help="also what the record has already")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.ship:
        return ship()
    if arguments.uci:
        quick = [method for method in arguments.method if method in QUICK]
        both = uci(True), uci(False)
        plan = [(data, method, "folds", seed, {}) for data in both for method in quick for seed in SEEDS]
    else:
        data = Texts("bundled", load_sms())
        plan = [(data, *job) for job in jobs(arguments.method) if job[1] in arguments.role]
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)} if RESULTS.exists() else set()
    for data, method, role, seed, options in plan:
        detail = " ".join(f"{name}={value}" for name, value in options.items())
        if not arguments.again and (data.name, method, detail, role, str(seed)) in done:
            continue
        if method == "features" and role == "choice" and (1, "mean", LARGE) not in data.known:
            data.every_block()
        row = run(data, method, role, seed, **options)
        replace_row(RESULTS, COLUMNS, row, KEY)
        accuracy = f"{row['correct'] / row['n']:.3f}"
        print(
            f"{data.name:12} {method:20} {detail:22} {role:7} {seed} {accuracy} {row['cpu_seconds']:5} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
