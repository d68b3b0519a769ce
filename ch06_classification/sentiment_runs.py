"""Compare the ways to tell whether somebody liked it, on English and Chinese reviews, and record what came of it.

    python sentiment_runs.py                    everything that the record lacks, a quarter of an hour of one core
    python sentiment_runs.py --part methods     only a part: methods, labels, augmentation, search
    python sentiment_runs.py --paraphrase       make sentiment_paraphrases.tsv with SmolLM2, about five minutes
    python sentiment_runs.py --ship             make shared/checkpoints/sentiment: the head, and the reviews' features

Folds, judging, and the meaning of a row of `sentiment.csv` are those of `spam_runs.py`: five folds of the training and
validation reviews together, seeds 0, 1 and 2, and the test split once. Block, pooling and penalty of the features were
chosen on folds of seed 9 (role "choice").

- labels: the same folds, where a method learns from 20, 40, 80 or 160 of a fold's training reviews, as many of each
  label, drawn by the seed.
- augmentation: the same, and each of these reviews has up to four changed copies (paraphrases: up to two). A paraphrase
  is left out that is nearly a copy, that MiniLM finds far from its review, or whose label a head doubts that was
  fitted to the reviews of the same training set alone.
- search (`sentiment_search.csv`): the training and validation reviews are cut into 184 to learn from, 92 to look at and
  92 that stay fresh, twenty times. Fifty settings are drawn; for each it is counted how many of the 92 and the 92 are
  right, and how many of the 184 by three folds.

A run replaces the row of the same data, method, detail, role and seed. One thread is used.
"""

import argparse
import csv
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit
from torch import Tensor

from shared.data.corpus import LabeledText, load_reviews, load_synonyms
from shared.finetuning.augmentation import augment, delete_words, replace_words, swap_words
from shared.finetuning.classification import encode_texts, fit_head, train_classifier
from shared.finetuning.embeddings import load_embedder
from shared.finetuning.features import cached_features, features_of, row_key, save_features
from shared.generation.batching import BatchEngine
from shared.generation.options import GenerationOptions
from shared.notebook.records import load_script, read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.serving.models import open_model
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS, SEARCH = HERE / "sentiment.csv", HERE / "sentiment_search.csv"
PARAPHRASES = HERE / "sentiment_paraphrases.tsv"
spam_runs = load_script(HERE / "spam_runs.py")

LARGE = spam_runs.LARGE
N_BLOCKS, POOLING, PENALTY = 18, "last", 0.3
SEEDS, CHOICE_SEED = spam_runs.SEEDS, spam_runs.CHOICE_SEED
SIZES = (20, 40, 80, 160)
N_COPIES, SHARE = 4, 0.15
N_REPEATS, N_SETTINGS = 20, 50


class Reviews(spam_runs.Texts):
    """The reviews of one language, and what SmolLM2 reads of them."""

    def __init__(self, language: str, rows: Sequence[LabeledText] | None = None) -> None:
        super().__init__(language, rows if rows is not None else load_reviews(language=language))
        self.targets = np.array([int(row.label == "positive") for row in self.rows])


# --- methods: fit(data, train places, judged places, seed) -> (predicted labels, numbers trained)

METHODS: dict[str, Callable] = {
    "majority": spam_runs.majority,
    "words": partial(spam_runs.counts, letters=False),
    "words and letters": partial(spam_runs.counts, letters=True),
    "features": partial(spam_runs.on_features, n_blocks=N_BLOCKS, pooling=POOLING, penalty=PENALTY),
}
CHOICES = [
    *({"n_blocks": n, "pooling": pooling} for pooling in ("mean", "last") for n in range(8, 31, 2)),
    *({"penalty": penalty} for penalty in (0.03, 0.1, 0.3, 1.0, 3.0)),
]
CURVES = ("words and letters", "features")


def of_size(data: Reviews, train: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return `n` of the training places, as many of each label; smaller sets are parts of larger ones."""
    order = np.random.default_rng([seed, 26]).permutation(train)
    return np.concatenate([order[data.targets[order] == label][: n // 2] for label in (0, 1)])


# --- augmentation

CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "deletion": lambda text, rng: delete_words(text, SHARE, rng),
    "swap": lambda text, rng: swap_words(text, SHARE, rng),
    "synonyms": lambda text, rng: replace_words(text, SHARE, rng, load_synonyms()),
}
TECHNIQUES = (*CHANGES, "paraphrase", "paraphrase, unfiltered")


@cache
def copies_of(technique: str) -> tuple[list[str], np.ndarray]:
    """Return all copies of the English reviews outside the test split, and the place of each one's review."""
    reviews = load_reviews()
    if technique.startswith("paraphrase"):
        with PARAPHRASES.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        keep = near_enough(reviews, rows) if technique == "paraphrase" else [True] * len(rows)
        rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
        return [row["text"] for row in rows], np.array([int(row["number"]) for row in rows])
    places = [i for i, row in enumerate(reviews) if row.split != "test"]
    copies, found = augment([reviews[i].text for i in places], CHANGES[technique], N_COPIES)
    return copies, np.array(places)[found]


def near_enough(reviews: Sequence[LabeledText], rows: Sequence[dict[str, str]]) -> list[bool]:
    """Say of each paraphrase whether MiniLM finds it near its review, and it is still in other words."""
    embedder = load_embedder()
    originals = [reviews[int(row["number"])].text for row in rows]
    cosines = (embedder.embed(originals) * embedder.embed([row["text"] for row in rows])).sum(1)
    kept = []
    for original, row, cosine in zip(originals, rows, cosines.tolist(), strict=True):
        words, new = (set(text.lower().split()) for text in (original, row["text"]))
        kept.append(cosine >= 0.6 and len(words & new) < 0.8 * len(words | new))
    return kept


@cache
def copied_features(technique: str) -> Tensor:
    """What SmolLM2 makes of the copies."""
    model, tokenizer = load_pretrained(LARGE, dtype=torch.float32), load_tokenizer(LARGE)
    rows, _ = encode_texts(tokenizer, copies_of(technique)[0], model.config.context_length)
    return cached_features(model, rows, N_BLOCKS, POOLING)


def augmented(
    data: Reviews, train: np.ndarray, judged: np.ndarray, seed: int, *, method: str, technique: str
) -> tuple[np.ndarray, int]:
    """Learn from the training reviews and their copies."""
    copies, places = copies_of(technique)
    chosen = np.flatnonzero(np.isin(places, train))
    targets = data.targets[places[chosen]]
    features = data.features(N_BLOCKS, POOLING)
    if technique == "paraphrase" and len(chosen):
        # A head that has seen these training reviews only: does it agree with the label?
        head = fit_head(features[train], torch.as_tensor(data.targets[train]), 2, penalty=PENALTY)
        with torch.no_grad():
            sure = head(copied_features(technique)[chosen]).softmax(1).numpy()
        agrees = sure[np.arange(len(chosen)), targets] > 0.5
        chosen, targets = chosen[agrees], targets[agrees]
    if method == "features":
        seen = torch.cat([features[train], copied_features(technique)[chosen]])
        both = torch.as_tensor(np.concatenate([data.targets[train], targets]))
        head = fit_head(seen, both, 2, penalty=PENALTY)
        with torch.no_grad():
            return head(features[judged]).argmax(1).numpy(), sum(p.numel() for p in head.parameters())
    # The copies as further texts of the same data; only their places are new.
    more = [LabeledText(copies[i], data.rows[places[i]].label, "copy", "train") for i in chosen]
    enlarged = Reviews(data.name, [*data.rows, *more])
    together = np.concatenate([train, len(data.rows) + np.arange(len(more))])
    return METHODS[method](enlarged, together, judged, seed)


# --- what is run


def fitted_to(n: int, fit: Callable) -> Callable:
    """Return a way to fit that sees only `n` of the training places."""
    return lambda data, train, judged, seed: fit(data, of_size(data, train, n, seed), judged, seed)


Job = tuple[str, str, str, str, int, Callable]


def jobs(part: str) -> list[Job]:
    """Return the runs of a part: language, method, detail, role, seed, and how to fit."""
    found: list[Job] = []
    if part == "methods":
        for options in CHOICES:
            detail = " ".join(f"{name}={value}" for name, value in options.items())
            fit = partial(METHODS["features"], **options)
            found += [(lang, "features", detail, "choice", CHOICE_SEED, fit) for lang in ("en", "zh")]
        for language in ("en", "zh"):
            for method, fit in METHODS.items():
                found += [(language, method, "", "folds", seed, fit) for seed in SEEDS]
                found.append((language, method, "", "test", 0, fit))
    for seed in SEEDS:
        for n in (*SIZES, None):
            for method in CURVES:
                if part == "labels" and n:
                    for lang in ("en", "zh"):
                        fit = fitted_to(n, METHODS[method])
                        found.append((lang, method, f"labels={n}", "folds", seed, fit))
                for technique in TECHNIQUES if part == "augmentation" else ():
                    fit = partial(augmented, method=method, technique=technique)
                    detail = f"labels={n or 'all'} copies={technique}"
                    found.append(("en", method, detail, "folds", seed, fitted_to(n, fit) if n else fit))
    return found


def settings(n: int = N_SETTINGS) -> list[tuple[int, str, float]]:
    """Return `n` settings of the features, drawn once: block, pooling, penalty."""
    rng = np.random.default_rng(50)
    return [
        (int(rng.integers(6, 31)), str(rng.choice(("mean", "last"))), float(10 ** rng.uniform(-3, 1)))
        for _ in range(n)
    ]


def search(repeat: int, data: Reviews) -> dict[str, object]:
    """Try all settings on one cut of the reviews, and return what was right of each part."""
    targets = torch.as_tensor(data.targets)
    places = np.flatnonzero(data.splits != "test")
    cut = partial(StratifiedShuffleSplit, 1, random_state=repeat)
    learn, rest = next(cut(test_size=0.5).split(places, targets[places]))
    looked, fresh = next(cut(test_size=0.5).split(rest, targets[places[rest]]))
    learn, looked, fresh = places[learn], places[rest[looked]], places[rest[fresh]]
    counts: dict[str, list[int]] = {"by_folds": [], "looked": [], "fresh": []}
    for n_blocks, pooling, penalty in settings():
        features = data.features(n_blocks, pooling)

        def right(train: np.ndarray, judged: np.ndarray, features=features, penalty=penalty) -> int:
            head = fit_head(features[train], targets[train], 2, penalty=penalty)
            with torch.no_grad():
                return int((head(features[judged]).argmax(1) == targets[judged]).sum())

        parts = StratifiedKFold(3, shuffle=True, random_state=repeat).split(learn, targets[learn])
        counts["by_folds"].append(sum(right(learn[a], learn[b]) for a, b in parts))
        counts["looked"].append(right(learn, looked))
        counts["fresh"].append(right(learn, fresh))
    sizes = {"n_learn": len(learn), "n_looked": len(looked), "n_fresh": len(fresh)}
    return {"repeat": repeat} | sizes | {name: " ".join(map(str, found)) for name, found in counts.items()}


# One of the tasks that SmolLM2 was tuned for; asked freely for "other words" it talks about the review instead.
REWRITE = (
    "You're an AI assistant for text re-writing. Rewrite the input text to make it more concise while preserving its "
    "core meaning."
)


def paraphrase(n_each: int = 2) -> None:
    """Let SmolLM2 say each review outside the test split in other words, and write what it said."""
    found = open_model(LARGE, dtype="float32")
    tokenizer, stops = found.needed_tokenizer(), [*found.needed_tokenizer().special_ids.values()]
    engine, requests = BatchEngine(found.model, max_batch_size=25, context_length=512), []
    for number, review in enumerate(load_reviews()):
        if review.split == "test":
            continue
        messages = [{"role": "system", "content": REWRITE}, {"role": "user", "content": review.text}]
        ids = found.chat_format.encode(tokenizer, messages)
        for k in range(n_each):
            options = GenerationOptions(temperature=0.7, top_p=0.9, seed=1000 * k + number)
            requests.append((number, engine.submit(ids, options, max_new_tokens=70, stop_ids=stops)))
    while engine.has_work:
        engine.step()
    with PARAPHRASES.open("w", encoding="utf-8", newline="\n") as file:
        file.write("number\ttext\n")
        for number, request in requests:
            said = " ".join(tokenizer.decode(request.generated).split())
            if request.finish_reason == "stop" and said:
                file.write(f"{number}\t{said}\n")


def ship() -> None:
    """Write the head that `load_classifier("sentiment")` returns, and the features of all reviews in half precision."""
    folder, features = CHECKPOINTS / "sentiment", {}
    for language in ("en", "zh"):
        data = Reviews(language)
        features |= zip(map(row_key, data.ids(LARGE)), data.features(N_BLOCKS, POOLING).half(), strict=True)
    data = Reviews("en")
    learned = np.flatnonzero(data.splits != "test")
    head = train_classifier(
        list(data.texts[learned]),
        [data.rows[i].label for i in learned],
        base=LARGE,
        n_blocks=N_BLOCKS,
        pooling=POOLING,
        penalty=PENALTY,
    )
    (folder / "features.safetensors").unlink(missing_ok=True)
    recipe = (
        "sentiment_runs.py --ship: train_classifier on the training and validation reviews of reviews.tsv"
    )
    head.save(folder, replace=True, recipe=recipe, torch=torch.__version__, hardware=cpu_name())
    about = features_of(load_pretrained(LARGE, dtype=torch.float32), N_BLOCKS, POOLING)
    save_features(folder / "features.safetensors", features, about)
    judged = data.splits == "test"
    right = np.array(head.predict(list(data.texts[judged]))) == [
        r.label for r in data.rows if r.split == "test"
    ]
    print(f"{right.sum()} of {judged.sum()} test reviews; {folder}")


PARTS = ("methods", "labels", "augmentation", "search")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--paraphrase", action="store_true", help="make sentiment_paraphrases.tsv, and nothing else"
    )
    parser.add_argument(
        "--ship", action="store_true", help="make shared/checkpoints/sentiment, and nothing else"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.paraphrase or arguments.ship:
        return paraphrase() if arguments.paraphrase else ship()
    reviews = {language: Reviews(language) for language in ("en", "zh")}
    done = {tuple(row[name] for name in spam_runs.KEY) for row in read_rows(RESULTS)}
    for part in arguments.part:
        for language, method, detail, role, seed, fit in jobs(part):
            data = reviews[language]
            if (language, method, detail, role, str(seed)) in done:
                continue
            if role == "choice" and (1, "mean", LARGE) not in data.known:
                data.every_block()
            row = spam_runs.judged_row(data, method, detail, role, seed, fit)
            replace_row(RESULTS, spam_runs.COLUMNS, row, spam_runs.KEY)
            accuracy = f"{row['correct'] / row['n']:.3f}"
            print(
                f"{language} {method:18} {detail:40} {role:7} {seed} {accuracy} {row['cpu_seconds']:4} s",
                flush=True,
            )
    if "search" in arguments.part:
        recorded = {row["repeat"] for row in read_rows(SEARCH)}
        data = reviews["en"]
        for repeat in range(N_REPEATS):
            if str(repeat) not in recorded:
                if (1, "mean", LARGE) not in data.known:
                    data.every_block()
                row = search(repeat, data) | {"hardware": cpu_name(), "torch": torch.__version__}
                replace_row(SEARCH, list(row), row, ("repeat",))
                print("search", repeat, flush=True)


if __name__ == "__main__":
    main()
