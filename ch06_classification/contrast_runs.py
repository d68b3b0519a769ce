"""Train sentence vectors by contrast (SimCSE) on SmolLM2's states, and record what they are good for, and what not.

    python contrast_runs.py                  everything that the record lacks, about seventy minutes of one core
    python contrast_runs.py --role choice    only the trials of settings, or only what is compared
    python contrast_runs.py --vectors        make contrast_vectors.safetensors: vectors of forty texts, for drawing

A text's vector is the mean of the states that leave block 20, without the first token's: that one is about a hundred
times as long as the others and nearly the same in all texts ("frozen, every token" shows what it does to cosines).
Blocks 17 to 20 are trained on the cached states of the frozen blocks below, as in `spam_runs.py`. "SimCSE, dropout"
passes each text twice through different dropout masks; "SimCSE, pairs" has a training review and its rewriting by
SmolLM2 (those that `sentiment_runs.near_enough` keeps, which asks MiniLM); "pairs, shuffled" has the same reviews with
rewritings of other ones. In a variant, "centred" behind the name, the mean vector of the frozen model is taken from
all vectors, in training too; variants and shuffled pairs have the settings of their originals, without trials.

Learned from are texts of the training splits of reviews, messages and instructions, and the general-knowledge
questions; of the stories, of sentence_pairs.tsv and of validation and test splits nothing. Among them are the messages
and reviews from which the few labelled ones are drawn, without their labels.

Every row of `contrast.csv` has the role "compared" (seeds 0, 1 and 2 where something is random) or "choice" (seed 9).
A choice is made by the lowest contrastive loss on the rewritings of 64 training reviews that these runs do not learn
from. The rewritings of the validation reviews, by which the compared are judged, took no part in it. Columns:

- spearman: of cosines (`cosines`) and scores of sentence_pairs.tsv;
- recall_1, recall_3: whether a right passage of the stories is the first, or among three (`found_1`, `found_3`);
- pair_recall: whether a rewriting of a held-out review is nearest to its own review of the held-out ones
  (`pair_right`); pair_recall_all: of all 460 reviews;
- pair_loss: the contrastive loss on these pairs at the temperature 0.05, whatever it was in training;
- alignment, uniformity: of Wang and Isola (2020), on these pairs and on the held-out reviews;
- mean_cosine: of two different texts among the messages and reviews outside the training splits;
- sms, reviews: accuracy of logistic regression that sees 8 texts of each label, the mean over 20 draws
  (`sms_draws`, `reviews_draws`); its penalty is chosen for each row by other draws among the training texts;
- cpu_seconds: of training alone; the cached states, a few minutes, are the same for all.

A run replaces the row of the same method, role, seed and settings. One thread is used.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from shared.data.corpus import LabeledText, load_instructions, load_questions, load_reviews, load_sms
from shared.finetuning.classification import encode_texts, fit_head
from shared.finetuning.contrastive import contrastive_loss, pair_logits
from shared.finetuning.embeddings import load_embedder
from shared.finetuning.evaluation import spearman
from shared.finetuning.features import (
    batches_by_length,
    lower_part,
    pad_inputs,
    pool_states,
    token_states,
    upper_part,
)
from shared.finetuning.retrieval import BM25, recall_at
from shared.generation.engine import evaluating
from shared.model.gpt import GPTModel
from shared.notebook.records import load_script, read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.training.loop import train
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS, VECTORS = HERE / "contrast.csv", HERE / "contrast_vectors.safetensors"
SENTENCE_PAIRS = HERE.parent / "appendix_vit_bert" / "sentence_pairs.tsv"
sentiment_runs = load_script(HERE / "sentiment_runs.py")
sentence_runs = load_script(HERE.parent / "appendix_vit_bert" / "sentence_runs.py")

SETTINGS = ("learning_rate", "temperature", "dropout", "n_steps")
PAIRED = ("cosines", "found_1", "found_3", "pair_right", "sms_draws", "reviews_draws")
MEASURES = (
    "spearman",
    "recall_1",
    "recall_3",
    "pair_recall",
    "pair_recall_all",
    "pair_loss",
    "alignment",
    "uniformity",
    "mean_cosine",
    "sms",
    "reviews",
    "sms_penalty",
    "reviews_penalty",
)
KEY = ("method", "role", "seed", *SETTINGS)
COLUMNS = [*KEY, "trained", "cpu_seconds", *MEASURES, *PAIRED, "hardware", "torch"]

LARGE = sentiment_runs.LARGE
N_BLOCKS, N_FROZEN = 20, 16
SEEDS, CHOICE_SEED = sentiment_runs.SEEDS, sentiment_runs.CHOICE_SEED
BATCH_SIZE, MAX_TOKENS = 32, 32  # of a text that is learned from, as in SimCSE; judged are whole texts
N_WARMUP, WEIGHT_DECAY = 5, 0.05
N_WATCHED = 64
N_WHITENED = 256  # directions that are kept, as in Su et al. (2021)
JUDGED_TEMPERATURE = 0.05  # of pair_loss, for all methods alike
N_EACH, N_DRAWS, N_CHOICE_DRAWS = 8, 20, 5
PENALTIES = (0.03, 0.3, 3.0, 30.0)

Row = dict[str, object]


# --- texts


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that is parted by tabs."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@cache
def rewritten(split: str) -> list[tuple[str, str]]:
    """Return (review, its rewriting) for the reviews of a split; a review may have two rewritings."""
    reviews = load_reviews()
    copies, places = sentiment_runs.copies_of("paraphrase")
    pairs = zip(places.tolist(), copies, strict=True)
    return [(reviews[place].text, copy) for place, copy in pairs if reviews[place].split == split]


@cache
def watched() -> frozenset[str]:
    """Return the training reviews by whose rewritings settings are chosen; the trials do not learn from them."""
    there = sorted({review for review, _ in rewritten("train")})
    chosen = np.random.default_rng(CHOICE_SEED).choice(len(there), N_WATCHED, replace=False)
    return frozenset(there[i] for i in chosen)


@cache
def judged_texts() -> tuple[str, ...]:
    """Return all texts that the compared vectors are judged by, each once."""
    texts = [row.text for row in (*load_sms(), *load_reviews())]
    texts += [text for pair in rewritten("validation") for text in pair]
    texts += [text for row in read_table(SENTENCE_PAIRS) for text in (row["first"], row["second"])]
    texts += sentence_runs.story_passages()[0] + [q["question"] for q in sentence_runs.read_questions()]
    return tuple(dict.fromkeys(texts))


@cache
def plain_texts() -> tuple[str, ...]:
    """Return the texts that are learned from without a partner; none of them is one that is kept for judging."""
    texts = [row.text for row in (*load_reviews("train"), *load_sms("train"))]
    texts += [" ".join(filter(None, (row.instruction, row.input))) for row in load_instructions("train")]
    texts += [question.question for question in load_questions()]
    kept = {row.text for row in (*load_reviews(), *load_sms()) if row.split != "train"}
    return tuple(text for text in dict.fromkeys(texts) if text not in kept)


def base_of(method: str) -> str:
    """Return the method whose pairs a variant has."""
    return method.removesuffix(", centred")


def training_pairs(method: str, role: str, seed: int) -> list[tuple[str, str]]:
    """Return the pairs that a method learns from; those of a trial leave the watched reviews out."""
    out = watched() if role == "choice" else frozenset()
    if base_of(method) == "SimCSE, dropout":
        # The partner is the text itself, through another dropout mask.
        return [(text, text) for text in plain_texts() if text not in out]
    pairs = [pair for pair in rewritten("train") if pair[0] not in out]
    if method == "pairs, shuffled":
        # Each review has the rewriting of another one: the reviews in a random order, each gets the next one's.
        numbers = {review: i for i, review in enumerate(dict.fromkeys(review for review, _ in pairs))}
        order = np.random.default_rng([seed, 1]).permutation(len(numbers))
        following = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
        names, copies = list(numbers), {}
        for review, copy in pairs:
            copies.setdefault(review, []).append(copy)
        pairs = [(review, copy) for review in names for copy in copies[names[following[numbers[review]]]]]
    return pairs


# --- vectors

_states: dict[str, Tensor] = {}


def states_of(texts: Sequence[str]) -> list[Tensor]:
    """Return what leaves SmolLM2's block `N_FROZEN` for the tokens of each text, computed once, in half precision."""
    missing = [text for text in dict.fromkeys(texts) if text not in _states]
    if missing:
        frozen = load_pretrained(LARGE, dtype=torch.float32)
        rows, _ = encode_texts(load_tokenizer(LARGE), missing, frozen.config.context_length)
        for i, states in token_states(frozen, rows, N_FROZEN):
            _states[missing[i]] = states.half()
    return [_states[text] for text in texts]


def new_body() -> GPTModel:
    """Return SmolLM2's blocks 17 to 20 as they were released; only they may be trained."""
    body = upper_part(lower_part(load_pretrained(LARGE, dtype=torch.float32), N_BLOCKS), N_FROZEN)
    body.requires_grad_(False)
    body.blocks.requires_grad_(True)
    return body


def pooled(states: Tensor, mask: Tensor, *, every_token: bool = False) -> Tensor:
    """Return the mean over a text's states, (batch, emb_dim): without the first token's, unless it is the only one."""
    mask = mask.clone()
    if not every_token:
        mask[:, 0] = mask.sum(1) == 1
    return pool_states(states, mask, "mean")


@torch.no_grad()
def mean_vectors(body: GPTModel, texts: Sequence[str], *, every_token: bool = False) -> Tensor:
    """Return the vectors of texts, (texts, emb_dim), without dropout."""
    rows, found = states_of(texts), torch.empty(len(texts), body.config.emb_dim)
    with evaluating(body):
        for places in batches_by_length(rows, BATCH_SIZE):
            states, mask = pad_inputs([rows[i].float() for i in places])
            found[places] = pooled(body.hidden_states(states), mask, every_token=every_token)
    return found


def set_dropout(body: GPTModel, p: float) -> None:
    """Let a model drop numbers of its input, attention weights, and numbers at the end of each branch."""
    body.dropout = nn.Dropout(p)
    for block in body.blocks:
        block.dropout.p = block.attention.dropout = p


def pair_batches(
    pairs: Sequence[tuple[str, str]], batch_size: int, *, seed: int
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield ((states, mask), number of each pair's first text) without end; the partners are the second half."""
    numbers: dict[str, int] = {}
    for first, _ in pairs:
        numbers.setdefault(first, len(numbers))
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(pairs))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = [pairs[i] for i in order[start : start + batch_size]]
            texts = [first for first, _ in chosen] + [second for _, second in chosen]
            rows = [states[:MAX_TOKENS].float() for states in states_of(texts)]
            yield pad_inputs(rows), torch.tensor([numbers[first] for first, _ in chosen])


def summed_pair_loss(
    body: GPTModel,
    inputs: tuple[Tensor, Tensor],
    numbers: Tensor,
    *,
    temperature: float,
    shift: Tensor | float,
) -> Tensor:
    """Return the contrastive loss times the pairs of the batch; partners of one and the same text are not negatives."""
    states, mask = inputs
    first, second = (pooled(body.hidden_states(states), mask) - shift).chunk(2)
    same = numbers[:, None] == numbers
    return contrastive_loss(pair_logits(first, second, 1 / temperature), same) * len(numbers)


def train_body(
    method: str,
    role: str,
    seed: int,
    on_evaluate: Callable[[GPTModel, int], None] | None = None,
    *,
    learning_rate: float,
    temperature: float,
    dropout: float,
    n_steps: int,
    evaluate_every: int | None = None,
) -> GPTModel:
    """Train the upper blocks by contrast. After a short warm-up the learning rate stays, so every step is an end."""
    body = new_body()
    pairs = training_pairs(method, role, seed)
    states_of([text for pair in pairs for text in pair])
    torch.manual_seed(seed)
    set_dropout(body, dropout)
    body.train()
    trained = [parameter for parameter in body.parameters() if parameter.requires_grad]
    train(
        body,
        pair_batches(pairs, BATCH_SIZE, seed=seed),
        torch.optim.AdamW(trained, learning_rate, weight_decay=WEIGHT_DECAY),
        n_steps=n_steps,
        loss=partial(summed_pair_loss, temperature=temperature, shift=shift_of(method)),
        schedule=lambda k: min(1.0, (k + 1) / N_WARMUP),
        evaluate_every=evaluate_every,
        on_evaluate=None if on_evaluate is None else lambda step: on_evaluate(body, step),
    )
    return body


# --- what is measured; vectors are of length 1


def of_pairs(vectors: dict[str, Tensor], pairs: Sequence[tuple[str, str]], others: Sequence[str] = ()) -> Row:
    """Judge by held-out reviews and their rewritings: is the own review found, and how do the vectors lie?"""
    reviews = list(dict.fromkeys(review for review, _ in pairs))
    candidates = list(dict.fromkeys([*reviews, *others]))
    first, second = (torch.stack([vectors[text] for text in side]) for side in zip(*pairs, strict=True))
    # Which review is nearest to each rewriting?
    nearest = (second @ torch.stack([vectors[text] for text in candidates]).T).argmax(1).tolist()
    right = [candidates[place] == review for place, (review, _) in zip(nearest, pairs, strict=True)]
    # One review may have two rewritings: they are not each other's negatives.
    same = torch.tensor([[one == other for other, _ in pairs] for one, _ in pairs])
    loss = contrastive_loss(pair_logits(first, second, 1 / JUDGED_TEMPERATURE), same)
    distinct = torch.stack([vectors[text] for text in candidates])
    return {
        "pair_recall": round(float(np.mean(right)), 4),
        "pair_right": "".join("01"[hit] for hit in right),
        "pair_loss": round(float(loss), 4),
        "alignment": round(float((first - second).square().sum(1).mean()), 4),
        "uniformity": round(float(torch.pdist(distinct).square().mul(-2).exp().mean().log()), 4),
    }


def of_search(ranked: Sequence[Sequence[int]]) -> Row:
    """Judge the order in which the passages of the stories were found for each question."""
    questions, (passages, titles) = sentence_runs.read_questions(), sentence_runs.story_passages()
    right = [sentence_runs.right_places(question, passages, titles) for question in questions]
    found: Row = {}
    for k in (1, 3):
        found[f"recall_{k}"] = round(recall_at(ranked, right, k), 4)
        hits = (set(places[:k]) & set(wanted) for places, wanted in zip(ranked, right, strict=True))
        found[f"found_{k}"] = "".join("01"[bool(hit)] for hit in hits)
    return found


def few_labels(
    vectors: Tensor, targets: np.ndarray, pool: np.ndarray, judged: np.ndarray, draw: list[int]
) -> Callable[[float], float]:
    """Return a function of the penalty: the accuracy on the judged places after `N_EACH` of each label of the pool."""
    order = np.random.default_rng(draw).permutation(pool)
    chosen = np.concatenate([order[targets[order] == label][:N_EACH] for label in (0, 1)])
    judged = np.setdiff1d(judged, chosen)

    def accuracy(penalty: float) -> float:
        head = fit_head(vectors[chosen], torch.as_tensor(targets[chosen]), 2, penalty=penalty)
        with torch.no_grad():
            return float((head(vectors[judged]).argmax(1).numpy() == targets[judged]).mean())

    return accuracy


def of_labels(name: str, vectors: dict[str, Tensor], rows: Sequence[LabeledText], positive: str) -> Row:
    """Judge by logistic regression that sees few labels of the training split, on what is outside it."""
    matrix = torch.stack([vectors[row.text] for row in rows])
    targets = np.array([int(row.label == positive) for row in rows])
    splits = np.array([row.split for row in rows])
    pool, judged = np.flatnonzero(splits == "train"), np.flatnonzero(splits != "train")
    # The penalty by other draws, judged on the rest of the training split.
    draws = [few_labels(matrix, targets, pool, pool, [CHOICE_SEED, k]) for k in range(N_CHOICE_DRAWS)]
    means = [np.mean([accuracy(penalty) for accuracy in draws]) for penalty in PENALTIES]
    penalty = PENALTIES[int(np.argmax(means))]
    # The same draws for every method.
    draws = [few_labels(matrix, targets, pool, judged, [0, k]) for k in range(N_DRAWS)]
    accuracies = [accuracy(penalty) for accuracy in draws]
    return {
        name: round(float(np.mean(accuracies)), 4),
        f"{name}_penalty": penalty,
        f"{name}_draws": " ".join(f"{accuracy:.4f}" for accuracy in accuracies),
    }


def measures(vectors: dict[str, Tensor]) -> Row:
    """Return all that is measured of the vectors of `judged_texts`."""
    vectors = {text: F.normalize(vector.float(), dim=0) for text, vector in vectors.items()}
    sms, reviews = load_sms(), load_reviews()
    # Cosines of pairs of sentences against the scores that they were written for.
    table = read_table(SENTENCE_PAIRS)
    cosines = [float(vectors[row["first"]].double() @ vectors[row["second"]].double()) for row in table]
    found: Row = {
        "spearman": round(spearman(cosines, [float(row["score"]) for row in table]), 4),
        "cosines": " ".join(f"{cosine:.7f}" for cosine in cosines),
    }
    # Passages for questions.
    passages = torch.stack([vectors[text] for text in sentence_runs.story_passages()[0]])
    questions = torch.stack([vectors[q["question"]] for q in sentence_runs.read_questions()])
    found |= of_search((questions @ passages.T).argsort(1, descending=True).tolist())
    # Reviews for their rewritings: among all held-out reviews, and among all reviews.
    pairs = rewritten("validation")
    found |= of_pairs(vectors, pairs, [row.text for row in reviews if row.split == "validation"])
    found["pair_recall_all"] = of_pairs(vectors, pairs, [row.text for row in reviews])["pair_recall"]
    # Two texts that have nothing to do with each other.
    matrix = torch.stack([vectors[row.text] for row in (*sms, *reviews) if row.split != "train"])
    n = len(matrix)
    found["mean_cosine"] = round(float(((matrix @ matrix.T).sum() - n) / (n * (n - 1))), 4)
    # Few labels.
    found |= of_labels("sms", vectors, sms, "spam")
    return found | of_labels("reviews", vectors, reviews, "positive")


# --- what is compared


def by_text(matrix: Tensor) -> dict[str, Tensor]:
    """Return the vectors of `judged_texts` by their texts."""
    return dict(zip(judged_texts(), matrix, strict=True))


@cache
def frozen_vectors() -> tuple[Tensor, Tensor]:
    """Return SmolLM2's own vectors, of the judged texts and of those that are learned from."""
    body = new_body()
    return mean_vectors(body, judged_texts()), mean_vectors(body, plain_texts())


def shift_of(method: str) -> Tensor | float:
    """Return what is taken from all vectors of a trained method: the frozen model's mean vector, or nothing."""
    return frozen_vectors()[1].mean(0) if method.endswith(", centred") else 0.0


def whitened(judged: Tensor, known: Tensor) -> Tensor:
    """Return vectors turned and stretched so that those known have no correlations, in `N_WHITENED` directions."""
    mean = known.double().mean(0)
    _, deviations, directions = torch.linalg.svd(known.double() - mean, full_matrices=False)
    kept = min(N_WHITENED, len(deviations))
    return ((judged.double() - mean) @ directions[:kept].T / deviations[:kept]).float()


def fixed_vectors(method: str) -> dict[str, Tensor]:
    """Return the vectors of a method that is not trained here."""
    if method == "counts":
        # Rarity is counted over all judged texts together; no label is used.
        matrix = TfidfVectorizer(sublinear_tf=True).fit_transform(judged_texts())
        return by_text(torch.tensor(matrix.toarray(), dtype=torch.float32))
    if method == "MiniLM":
        return by_text(load_embedder().embed(judged_texts()))
    if method == "frozen, every token":
        return by_text(mean_vectors(new_body(), judged_texts(), every_token=True))
    judged, known = frozen_vectors()
    if method == "centred":
        judged = judged - known.mean(0)
    return by_text(whitened(judged, known) if method == "whitened" else judged)


@cache
def trained_vectors(method: str, seed: int, settings: tuple[tuple[str, float], ...]) -> dict[str, Tensor]:
    """Return the vectors of a method that is trained, and under the key "seconds" what that cost."""
    shift_of(method)
    states_of([text for pair in training_pairs(method, "compared", seed) for text in pair])
    started = time.process_time()
    body = train_body(method, "compared", seed, **dict(settings))
    seconds = time.process_time() - started
    vectors = mean_vectors(body, judged_texts()) - shift_of(method)
    return by_text(vectors) | {"seconds": torch.tensor(seconds)}


REFERENCES = ("frozen, every token", "frozen", "centred", "whitened", "counts", "MiniLM", "BM25")
TRAINED = (
    "SimCSE, dropout",
    "SimCSE, pairs",
    "pairs, shuffled",
    "SimCSE, dropout, centred",
    "SimCSE, pairs, centred",
)
METHODS = (*REFERENCES, *TRAINED)

USUAL = {"learning_rate": 3e-4, "temperature": 0.05, "dropout": 0.1, "n_steps": 48}
EVERY = 16  # steps after which a trial is judged: each is a trial of so many steps
# Each changes one setting of `USUAL`; the last of each list were added when the others were known.
TRIALS: dict[str, list[dict[str, float]]] = {
    "SimCSE, dropout": [
        {},
        *({"learning_rate": rate} for rate in (3e-5, 1e-4, 1e-3)),
        {"temperature": 0.1},
        {"dropout": 0.2},
        {"dropout": 0.05},
    ],
    "SimCSE, pairs": [
        {},
        *({"learning_rate": rate} for rate in (1e-4, 1e-3)),
        {"temperature": 0.1},
        {"dropout": 0.0},
        {"dropout": 0.0, "learning_rate": 1e-3},
    ],
}


def chosen(method: str) -> dict[str, float]:
    """Return the settings of the trial with the lowest loss on held-out pairs; control and variants had no trials."""
    name = "SimCSE, pairs" if method == "pairs, shuffled" else base_of(method)
    tried = [row for row in read_rows(RESULTS) if row["role"] == "choice" and row["method"] == name]
    tried = [row for row in tried if row["n_steps"] != "0"]
    best = min(tried, key=lambda row: float(row["pair_loss"]))
    return {setting: (int if setting == "n_steps" else float)(best[setting]) for setting in SETTINGS}


def recorded(method: str, role: str, seed: int, settings: Row, found: Row) -> None:
    """Write a row of the record, and say what is in it."""
    row = dict.fromkeys(SETTINGS, "") | {"method": method, "role": role, "seed": seed} | settings | found
    replace_row(RESULTS, COLUMNS, row | {"hardware": cpu_name(), "torch": torch.__version__}, KEY)
    shown = {name: row[name] for name in (*SETTINGS, "cpu_seconds", *MEASURES) if row.get(name, "") != ""}
    print(method, role, seed, *(f"{name}={value}" for name, value in shown.items()), flush=True)


def run_trial(method: str, changed: dict[str, float]) -> None:
    """Train with one setting changed, and record the loss on the watched pairs every few steps."""
    settings = USUAL | changed
    pairs = [pair for pair in rewritten("train") if pair[0] in watched()]
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    states_of([text for pair in training_pairs(method, "choice", CHOICE_SEED) for text in pair] + texts)
    started, judging = time.process_time(), 0.0

    def judge(body: GPTModel, step: int) -> None:
        nonlocal judging
        if step == 0 and changed:
            return  # nothing has been trained yet: as in the trial of the usual settings
        began = time.process_time()
        matrix = F.normalize(mean_vectors(body, texts), dim=1)
        found = of_pairs(dict(zip(texts, matrix, strict=True)), pairs)
        found |= {"trained": n_trained(), "cpu_seconds": round(began - started - judging)}
        recorded(method, "choice", CHOICE_SEED, settings | {"n_steps": step}, found)
        judging += time.process_time() - began

    train_body(method, "choice", CHOICE_SEED, judge, evaluate_every=EVERY, **settings)


@cache
def n_trained() -> int:
    """Return how many numbers are trained."""
    return sum(parameter.numel() for parameter in new_body().parameters() if parameter.requires_grad)


def run_compared(method: str, seed: int) -> None:
    """Judge a method, and record its row."""
    if method == "BM25":
        search = BM25(sentence_runs.story_passages()[0])
        scores = [search.scores(question["question"]) for question in sentence_runs.read_questions()]
        found = of_search([np.argsort(-score, kind="stable").tolist() for score in scores])
        return recorded(method, "compared", seed, {}, found | {"trained": 0, "cpu_seconds": 0})
    if method not in TRAINED:
        found = measures(fixed_vectors(method)) | {"trained": 0, "cpu_seconds": 0}
        return recorded(method, "compared", seed, {}, found)
    settings = chosen(method)
    vectors = dict(trained_vectors(method, seed, tuple(settings.items())))
    seconds = round(float(vectors.pop("seconds")))
    return recorded(
        method,
        "compared",
        seed,
        settings,
        measures(vectors) | {"trained": n_trained(), "cpu_seconds": seconds},
    )


# --- a file for drawing

DRAWN = ("frozen", "centred", "SimCSE, dropout", "SimCSE, pairs")
N_DRAWN = 20


def drawn_pairs() -> list[tuple[str, str]]:
    """Return the first validation reviews that have a rewriting, each with its first one."""
    first: dict[str, str] = {}
    for review, copy in rewritten("validation"):
        first.setdefault(review, copy)
    return list(first.items())[:N_DRAWN]


def write_vectors() -> None:
    """Write the vectors of the reviews of `drawn_pairs`, then of their rewritings, of length 1, by method."""
    texts = [text for side in zip(*drawn_pairs(), strict=True) for text in side]
    tensors = {}
    for method in DRAWN:
        if method in TRAINED:
            vectors = trained_vectors(method, SEEDS[0], tuple(chosen(method).items()))
        else:
            vectors = fixed_vectors(method)
        tensors[method] = F.normalize(torch.stack([vectors[text] for text in texts]), dim=1).half()
    numbers = {row.text: i for i, row in enumerate(load_reviews())}
    lines = {row["text"]: i for i, row in reversed([*enumerate(read_table(sentiment_runs.PARAPHRASES))])}
    about = {
        "reviews": " ".join(str(numbers[review]) for review, _ in drawn_pairs()),
        "rewritings": " ".join(str(lines[copy]) for _, copy in drawn_pairs()),
        "order": "reviews (places in load_reviews()), then their rewritings (rows of sentiment_paraphrases.tsv)",
        "torch": torch.__version__,
        "hardware": cpu_name(),
    }
    save_file(tensors, VECTORS, metadata=about)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--role", nargs="+", choices=("choice", "compared"), default=["choice", "compared"])
    parser.add_argument("--again", action="store_true", help="also what the record has already")
    parser.add_argument("--vectors", action="store_true", help=f"make {VECTORS.name}, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.vectors:
        return write_vectors()
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}
    # First all trials: what is compared depends on them.
    for method in TRIALS if "choice" in arguments.role else ():
        for changed in TRIALS[method] if method in arguments.method else ():
            values = [str((USUAL | changed)[name]) for name in SETTINGS]
            if arguments.again or (method, "choice", str(CHOICE_SEED), *values) not in done:
                run_trial(method, changed)
    for method in arguments.method if "compared" in arguments.role else ():
        for seed in SEEDS if method in TRAINED else SEEDS[:1]:
            settings = chosen(method) if method in TRAINED else {}
            values = [str(settings.get(name, "")) for name in SETTINGS]
            if arguments.again or (method, "compared", str(seed), *values) not in done:
                run_compared(method, seed)


if __name__ == "__main__":
    main()
