"""Tune the shipped BERT and a GPT of its size on the bundled messages, and record what came of it.

    python bert_messages.py                     everything that the record lacks; twenty minutes of one thread
    python bert_messages.py --model bert gpt --seed 0

The folds of the training and validation messages, the epochs, the early stopping and the head's rate are those of
`ch06_classification/spam_runs.py`. Each body's learning rate, and for BERT the way in which an input becomes one
vector, are chosen on two folds of another seed (role "choice"); of equally good ones the first is taken. Then come five
folds of three seeds (role "folds"), and once the test split (role "test"). "bert, random start" and "gpt, random start"
are the same networks with fresh weights: what is left is the work of the pretraining.

A row of `bert_messages.csv` is one fold and holds, message by message, whether the answer was right.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.data.corpus import load_sms
from shared.finetuning.encoders import BERTClassifier
from shared.finetuning.tuning import GPTClassifier
from shared.model.bert import BERTModel
from shared.model.gpt import GPTModel
from shared.notebook.records import load_script, read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.weights.bert import load_bert, load_bert_tokenizer
from shared.weights.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "bert_messages.csv"
SCRIPT = HERE.parent / "ch06_classification" / "spam_runs.py"
COLUMNS = [
    "model",
    "role",
    "learning_rate",
    "pooling",
    "seed",
    "fold",
    "n",
    "correct",
    "right",
    "cpu_seconds",
]
COLUMNS += ["hardware", "torch"]
KEY = ("model", "role", "learning_rate", "pooling", "seed", "fold")
BERT, GPT = "tales-bert", "tales-1m"
SEEDS, CHOICE_SEED, N_FOLDS, N_CHOICE_FOLDS, N_EPOCHS = (0, 1, 2), 9, 5, 2, 6
MODELS = ("bert", "bert, random start", "gpt", "gpt, random start")
RATES = (1e-3, 3e-4, 3e-3)


spam_runs = load_script(SCRIPT)
Job = tuple[str, str, float, str, int, int]  # model, role, learning rate, pooling, seed, fold


def choices(model: str) -> list[Job]:
    """The runs that choose a model's learning rate and pooling."""
    poolings = ("mean", "pooler") if model.startswith("bert") else ("mean",)
    settings = [(rate, pooling) for pooling in poolings for rate in RATES]
    return [
        (model, "choice", *setting, CHOICE_SEED, fold)
        for setting in settings
        for fold in range(N_CHOICE_FOLDS)
    ]


def chosen(model: str) -> tuple[float, str]:
    """Return the learning rate and the pooling with the most right answers in the model's choices."""
    right = {(rate, pooling): 0 for _, _, rate, pooling, _, _ in choices(model)}
    for row in read_rows(RESULTS):
        if (row["model"], row["role"]) == (model, "choice"):
            right[float(row["learning_rate"]), row["pooling"]] += int(row["correct"])
    return max(right, key=right.get)


def jobs(model: str, seeds: list[int]) -> list[Job]:
    """The runs that are compared."""
    setting = chosen(model)
    found = [(model, "folds", *setting, seed, fold) for seed in seeds for fold in range(N_FOLDS)]
    return [*found, (model, "test", *setting, SEEDS[0], 0)]


def new_classifier(model: str, pooling: str) -> nn.Module:
    """The network that a run begins with."""
    kind, _, random_start = model.partition(", ")
    if kind == "gpt":
        body = load_pretrained(GPT)
        return GPTClassifier(GPTModel(body.config) if random_start else body, 2, pooling)
    body = load_bert(BERT)
    return BERTClassifier(BERTModel(body.config) if random_start else body, 2, pooling)


def encoded(model: str, data: Any) -> list[list[int]]:
    """The messages as the model's ids."""
    if model.startswith("gpt"):
        return data.ids(GPT)
    tokenizer, length = load_bert_tokenizer(BERT), load_bert(BERT).config.context_length
    return [
        tokenizer.build_input(tokenizer.encode_ordinary(text), max_length=length)[0] for text in data.texts
    ]


def run(
    data: Any,
    model: str,
    role: str,
    learning_rate: float,
    pooling: str,
    seed: int,
    fold: int,
    n_epochs: int = N_EPOCHS,
) -> dict[str, object]:
    """Tune on one fold, or for the test split, and return the row."""
    train, judged = np.flatnonzero(data.splits != "test"), np.flatnonzero(data.splits == "test")
    if role != "test":
        train, judged = spam_runs.folds(data, seed)[fold]
    started = time.process_time()
    torch.manual_seed(seed)
    classifier = new_classifier(model, pooling)
    groups = [
        {"params": list(classifier.body.parameters()), "lr": learning_rate},
        {"params": list(classifier.head.parameters()), "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    predicted = spam_runs.fitted(
        data, classifier, encoded(model, data), optimizer, train, judged, seed, n_epochs
    )
    marks = "".join("01"[int(right)] for right in predicted == data.targets[judged])
    return {
        "model": model,
        "role": role,
        "learning_rate": learning_rate,
        "pooling": pooling,
        "seed": seed,
        "fold": fold,
        "n": len(marks),
        "correct": marks.count("1"),
        "right": marks,
        "cpu_seconds": round(time.process_time() - started),
        "hardware": cpu_name(),
        "torch": torch.__version__,
    }


def recorded(data: Any, model: str) -> dict[tuple[int, int], bool]:
    """Return by seed and message whether a model's folds were right."""
    cut, setting = {seed: spam_runs.folds(data, seed) for seed in SEEDS}, chosen(model)
    found: dict[tuple[int, int], bool] = {}
    for row in read_rows(RESULTS):
        of_it = (row["model"], row["role"]) == (model, "folds")
        if of_it and (float(row["learning_rate"]), row["pooling"]) == setting:
            seed = int(row["seed"])
            places = cut[seed][int(row["fold"])][1].tolist()
            found |= {(seed, place): mark == "1" for place, mark in zip(places, row["right"], strict=True)}
    return found


def run_all(planned: list[Job], data: Any) -> None:
    """Run what the record lacks; each row is written as soon as it is there."""
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}
    for job in planned:
        if tuple(map(str, job)) not in done:
            row = run(data, *job)
            replace_row(RESULTS, COLUMNS, row, KEY)
            print(*(row[name] for name in KEY), row["correct"], row["cpu_seconds"], flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = spam_runs.Texts("bundled", load_sms())
    for model in arguments.model:
        run_all(choices(model), data)
        run_all(jobs(model, arguments.seed), data)


if __name__ == "__main__":
    main()
