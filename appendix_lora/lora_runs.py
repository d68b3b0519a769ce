"""Compare LoRA and its relatives with full fine-tuning on the bundled messages, and record what came of it.

    python lora_runs.py                        everything that the record lacks, on this machine's processor
    python lora_runs.py --device cuda --processes 12
    python lora_runs.py --method full "LoRA, rank 4" --seed 0 --minutes 10

`tales-3m` with a classification head is trained as in `ch06_classification/spam_runs.py`: the same five folds of the
training and validation messages, the same epochs, early stopping and head. Each row of `lora_runs.csv` is one fold and
holds, message by message, whether the method was right, and the loss on stories (which the model was trained on
before) before and after the training.

First each method's learning rate is chosen: by the answers on folds of another seed (role "choice"); of equally good
ones the smallest is taken. These runs were made on a GPU, and the record holds how many answers were right, not which.
Then come seeds 0, 1 and 2 with the chosen rate (role "folds"), on one core of a processor, a minute or two each. Full
fine-tuning and the head alone are in chapter 6's record; full fine-tuning is repeated here on some folds for its loss
on stories.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.data.corpus import load_sms
from shared.finetuning.lora import attach_lora, lora_groups
from shared.finetuning.tuning import GPTClassifier, learning_rate_groups, set_trainable
from shared.model.gpt import GPTModel
from shared.notebook.records import load_script, read_rows, replace_row
from shared.notebook.tale_runs import story_rows
from shared.pretraining.processes import cpu_name
from shared.training.losses import next_token_loss
from shared.weights.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "lora_runs.csv"
CHAPTER_6 = HERE.parent / "ch06_classification" / "spam.csv"


spam_runs = load_script(CHAPTER_6.with_name("spam_runs.py"))
COLUMNS = [
    "method",
    "role",
    "learning_rate",
    "seed",
    "fold",
    "trained",
    "cpu_seconds",
    "n",
    "correct",
    "right",
    "tales_before",
    "tales_after",
    "hardware",
    "torch",
]
KEY = ("method", "role", "learning_rate", "seed", "fold")
SEEDS, CHOICE_SEED, N_STORIES, STORY_SEED = (0, 1, 2), 9, 32, 20_000
EVERYWHERE = {"targets": "all-linear", "alpha": 16.0}

# Method -> (options of `attach_lora`, or what `set_trainable` trains; how much faster B learns; rates to choose from).
METHODS: dict[str, tuple[dict[str, object] | str, float, tuple[float, ...]]] = {
    "full": ("all", 1.0, (1e-4, 3e-4, 1e-3)),
    "LoRA, rank 1": ({**EVERYWHERE, "rank": 1}, 1.0, (3e-4, 1e-3, 3e-3)),
    "LoRA, rank 4": ({**EVERYWHERE, "rank": 4}, 1.0, (3e-4, 1e-3, 3e-3)),
    "LoRA, rank 16": ({**EVERYWHERE, "rank": 16}, 1.0, (3e-4, 1e-3, 3e-3)),
    "LoRA, rank 4, query and value": (
        {"targets": ("query", "value"), "alpha": 16.0, "rank": 4},
        1.0,
        (3e-4, 1e-3, 3e-3),
    ),
    "rsLoRA, rank 16": ({**EVERYWHERE, "rank": 16, "rank_stabilized": True}, 1.0, (3e-4, 1e-3, 3e-3)),
    "DoRA, rank 4": ({**EVERYWHERE, "rank": 4, "dora": True}, 1.0, (3e-4, 1e-3, 3e-3)),
    "LoRA+, rank 4": ({**EVERYWHERE, "rank": 4}, 16.0, (3e-5, 1e-4, 3e-4)),
    "last block": ("last_block", 1.0, (1e-4, 3e-4, 1e-3)),
    "head": ("head", 1.0, (3e-4,)),
}
N_FOLDS = 5


@torch.no_grad()
def tales_loss(model: GPTModel, n: int = N_STORIES) -> float:
    """Return the loss on stories that no model was trained on, in nats a token."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    for row in story_rows(STORY_SEED, n)[0]:
        tokens = torch.tensor([row[: model.config.context_length + 1]], device=device)
        loss: Tensor = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:], reduction="sum")
        total, count = total + loss.item(), count + tokens.shape[1] - 1
    return total / count


def run(
    data: Any,
    method: str,
    role: str,
    learning_rate: float,
    seed: int,
    fold: int,
    n_epochs: int = 6,
    device: str = "cpu",
) -> dict[str, object]:
    """Train on one fold and return its row."""
    how, b_ratio, _ = METHODS[method]
    train, judged = spam_runs.folds(data, seed)[fold]
    started = time.process_time()
    torch.manual_seed(seed)
    body = load_pretrained(spam_runs.SMALL, device=device)
    before = tales_loss(body)
    classifier = GPTClassifier(body, 2, "mean").to(device)
    if isinstance(how, str):
        set_trainable(classifier, how)
        groups = learning_rate_groups(classifier, learning_rate, 1e-2)
    else:
        attach_lora(body, **how)
        groups = lora_groups(classifier, learning_rate, b_ratio=b_ratio, other_learning_rate=1e-2)
    trained = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    predicted = spam_runs.fitted(
        data, classifier, data.ids(spam_runs.SMALL), optimizer, train, judged, seed, n_epochs
    )
    marks = "".join("01"[int(right)] for right in predicted == data.targets[judged])
    return {
        "method": method,
        "role": role,
        "learning_rate": learning_rate,
        "seed": seed,
        "fold": fold,
        "trained": trained,
        "cpu_seconds": round(time.process_time() - started),
        "n": len(marks),
        "correct": marks.count("1"),
        "right": marks,
        "tales_before": round(before, 4),
        "tales_after": round(tales_loss(body), 4),
        "hardware": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


Job = tuple[str, str, float, int, int]  # method, role, learning rate, seed, fold


def choices(methods: list[str], numbers: list[int]) -> list[Job]:
    """The runs that choose the learning rates; a method with one rate has nothing to choose."""
    several = [method for method in methods if len(METHODS[method][2]) > 1]
    return [(m, "choice", rate, CHOICE_SEED, n) for n in numbers for m in several for rate in METHODS[m][2]]


def chosen_rate(method: str) -> float:
    """Return the learning rate with the most right answers among the method's choices on record; the first if none."""
    right: dict[float, int] = dict.fromkeys(METHODS[method][2], 0)
    for row in read_rows(RESULTS):
        if (row["method"], row["role"]) == (method, "choice"):
            right[float(row["learning_rate"])] += int(row["correct"])
    return max(right, key=lambda rate: (right[rate], -rate))


def jobs(methods: list[str], seeds: list[int], numbers: list[int]) -> list[Job]:
    """The runs that are compared, fold by fold, each method once, with the chosen rates."""
    rates = {method: chosen_rate(method) for method in methods}
    return [(m, "folds", rates[m], seed, n) for seed in seeds for n in numbers for m in methods]


def recorded(data: Any) -> dict[str, dict[tuple[int, int], tuple[bool, bool]]]:
    """Return by method, seed and message whether the method was right, and whether full fine-tuning was.

    Full fine-tuning and the head alone are those of chapter 6's record, where the folds are the same.
    """
    places = np.flatnonzero(data.splits != "test")  # chapter 6's rows hold one mark for each of these
    chapter = {
        (row["method"], int(row["seed"])): dict(zip(places.tolist(), row["right"], strict=True))
        for row in read_rows(CHAPTER_6)
        if (row["data"], row["role"], row["detail"]) == ("bundled", "folds", "")
    }
    found: dict[str, dict[tuple[int, int], tuple[bool, bool]]] = {}
    for method, name in {"full": "small", "head": "small, head"}.items():
        for seed in SEEDS:
            for place, mark in chapter.get((name, seed), {}).items():
                found.setdefault(method, {})[seed, place] = mark == "1", chapter["small", seed][place] == "1"
    cut = {seed: spam_runs.folds(data, seed) for seed in SEEDS}
    for row in read_rows(RESULTS):
        method, seed = row["method"], int(row["seed"])
        if row["role"] == "folds" and method != "full" and float(row["learning_rate"]) == chosen_rate(method):
            judged = cut[seed][int(row["fold"])][1].tolist()
            for place, mark in zip(judged, row["right"], strict=True):
                found.setdefault(method, {})[seed, place] = mark == "1", chapter["small", seed][place] == "1"
    return found


def run_all(planned: list[Job], device: str, n_processes: int, minutes: float) -> None:
    """Run what the record lacks, several runs at a time; each row is written as soon as it is there."""
    done, begun = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}, time.monotonic()
    missing = [job for job in planned if tuple(map(str, job)) not in done]

    def keep(row: dict[str, object]) -> None:
        replace_row(RESULTS, COLUMNS, row, KEY)
        print(*(row[name] for name in KEY), row["correct"], row["tales_after"], flush=True)

    if n_processes == 1:
        data = spam_runs.Texts("bundled", load_sms())
        for job in missing:
            if time.monotonic() - begun > 60 * minutes:
                break
            keep(run(data, *job, device=device))
        return
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        for done_one in as_completed([pool.submit(run_alone, job, device) for job in missing]):
            keep(done_one.result())


def run_alone(job: Job, device: str) -> dict[str, object]:
    """A run in a process of its own."""
    torch.set_num_threads(1)
    return run(spam_runs.Texts("bundled", load_sms()), *job, device=device)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--fold", nargs="+", type=int, choices=range(N_FOLDS), default=list(range(N_FOLDS)))
    parser.add_argument("--role", nargs="+", choices=("choice", "folds"), default=["choice", "folds"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = arguments.device, arguments.processes, arguments.minutes
    if "choice" in arguments.role:
        run_all(choices(arguments.method, arguments.fold), *options)
    if "folds" in arguments.role:
        run_all(jobs(arguments.method, arguments.seed, arguments.fold), *options)


if __name__ == "__main__":
    main()
