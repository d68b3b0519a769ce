"""Adapt SmolLM2 (135 million numbers) with LoRA: to messages, to reviews, to a domain, and over a base in four bits.

    python adapt_smollm2.py classify               spam and sentiment: the choices, then five folds and the test split
    python adapt_smollm2.py memory                 a step over the base in float32 and in four bits, each in a process
    python adapt_smollm2.py ship                   the runs that make shared/checkpoints/spam-lora and sentiment-lora

Each command runs what the record `adapt_smollm2.csv` lacks, on one thread; every run fits a laptop's processor in well
under an hour, and its row says how long it took. `--device cuda --processes 4` makes it quicker.

**classify.** The text is put between two parts of a prompt (`PROMPTS`) and the next word is the label: the head begins
as the model's own rows for the labels' words, and an adapter in the upper blocks learns (`fit_adapter`). What leaves
the frozen blocks below is computed once for each text. How many are frozen, and the learning rate, were chosen on folds
of another seed (role "choice"); so was the block whose mean states, with logistic regression, serve as the baseline
("features"). "asked" is the model before any training. Each row holds, text by text, what was right; the features'
choices were made on a GPU, and only their numbers are recorded.
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedGroupKFold, train_test_split
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.data.corpus import LabeledText, load_reviews, load_sms
from shared.data.models import model_file
from shared.finetuning.classification import fit_head, fit_temperature
from shared.finetuning.features import token_states, upper_part
from shared.finetuning.lora import attach_lora, lora_groups
from shared.finetuning.lora_classifier import (
    AdaptedClassifier,
    fit_adapter,
    head_of_words,
    prompted_rows,
    upper_targets,
)
from shared.finetuning.packed_base import load_packed
from shared.finetuning.tuning import GPTClassifier, label_logits
from shared.model.gpt import GPTModel
from shared.notebook.records import read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "adapt_smollm2.csv"
BASE = "smollm2-135m-instruct"
COLUMNS = ["task", "method", "detail", "role", "seed", "part", "trained", "minutes"]
COLUMNS += ["n", "correct", "right", "hardware", "torch"]
KEY = ("task", "method", "detail", "role", "seed", "part")
SEEDS, CHOICE_SEED, N_FOLDS = (0, 1, 2), 9, 5
Job = tuple[str, str, str, str, int, str]  # task, method, detail, role, seed, part: a fold, or "test"


def about(device: str, job: Job, trained: int, started: float) -> dict[str, object]:
    """The columns that every row has."""
    row = dict(zip(KEY, job, strict=True))
    row |= {"trained": trained, "minutes": round((time.monotonic() - started) / 60, 2)}
    name = cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    return row | {"hardware": name, "torch": torch.__version__}


def best_detail(task: str, method: str, details: Sequence[str]) -> str:
    """Return the detail with the most right answers among the choices on record; of equal ones the first."""
    right = dict.fromkeys(details, 0)
    for row in read_rows(RESULTS):
        if (row["task"], row["method"], row["role"]) == (task, method, "choice"):
            right[row["detail"]] += int(row["correct"])
    return max(right, key=lambda detail: (right[detail], -details.index(detail)))


# --- classify

TEXTS = {"spam": load_sms, "sentiment": load_reviews}
PROMPTS = {
    "spam": ("Message: ", "\nIs it spam or ham? It is"),
    "sentiment": ("Review: ", "\nSentiment:"),
}
RANK, N_EPOCHS, PENALTY = 8, 4, 0.03
FEATURE_BLOCKS = ("10", "14", "18", "20", "24", "28")
ADAPTERS = ("16 0.001", "10 0.0005")  # blocks that are frozen, learning rate


class Labeled:
    """The texts of a task as SmolLM2's ids, their labels, their splits, and the states below the adapters."""

    def __init__(self, task: str) -> None:
        self.rows: list[LabeledText] = TEXTS[task]()
        self.labels = tuple(sorted({row.label for row in self.rows}))
        self.targets = np.array([self.labels.index(row.label) for row in self.rows])
        self.splits = np.array([row.split for row in self.rows])
        self.prompt = PROMPTS[task]
        self._states: dict[tuple[int, bool], list[Tensor]] = {}

    def states(self, n_blocks: int, device: str, *, with_prompt: bool) -> list[Tensor]:
        """What leaves a block, for each token of each text."""
        key = n_blocks, with_prompt
        if key not in self._states:
            texts = [row.text for row in self.rows]
            rows = prompted_rows(load_tokenizer(BASE), texts, self.prompt if with_prompt else ("", ""), 2048)
            self._states[key] = [torch.empty(0)] * len(rows)
            for i, states in token_states(base(device), rows, n_blocks):
                self._states[key][i] = states
        return self._states[key]

    def parts(self, seed: int, part: str) -> tuple[list[int], list[int], list[int]]:
        """Places of texts that are learned from, watched for early stopping, and judged."""
        if part == "test":
            return tuple(np.flatnonzero(self.splits == s).tolist() for s in ("train", "validation", "test"))
        places = np.flatnonzero(self.splits != "test")
        # Equal texts fall into the same fold.
        texts = np.array([self.rows[i].text for i in places])
        groups = np.unique(texts, return_inverse=True)[1]
        cutter = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
        train_, judged = list(cutter.split(places, self.targets[places], groups))[int(part)]
        learned, watched = train_test_split(
            places[train_], test_size=0.15, random_state=seed, stratify=self.targets[places[train_]]
        )
        return learned.tolist(), watched.tolist(), places[judged].tolist()


@cache
def labeled(task: str) -> Labeled:
    """The texts of a task, read once in each process."""
    return Labeled(task)


@cache
def base(device: str) -> GPTModel:
    """The frozen model, once in each process; nobody attaches anything to it."""
    return load_pretrained(BASE, device=device, dtype=torch.float32).requires_grad_(False)


def classify(job: Job, device: str, *, is_shipped: bool = False) -> dict[str, object]:
    """One fold, or the test split, of the frozen features, of an adapter, or of the model as it is."""
    task, method, detail, _, seed, part = job
    started, data = time.monotonic(), labeled(task)
    learned, watched, judged = data.parts(seed, part)
    pick = lambda items, places: [items[i] for i in places]
    if method == "features":
        # Logistic regression stops by itself: it may learn from the watched texts, too.
        states = data.states(int(detail), device, with_prompt=False)
        features, places = torch.stack([one.mean(0) for one in states]), learned + watched
        head = fit_head(features[places], torch.tensor(data.targets[places]), 2, penalty=PENALTY)
        predicted, trained = head(features[judged]).argmax(1), sum(p.numel() for p in head.parameters())
    else:
        n_frozen, rate = detail.split()
        states = data.states(int(n_frozen), device, with_prompt=True)
        body, upper, trained = adapted_part(int(n_frozen), seed, device)
        classifier = GPTClassifier(upper, len(data.labels), "last").to(device)
        classifier.head = head_of_words(body, load_tokenizer(BASE), data.labels).to(device)
        if method == "LoRA":
            classifier = trained_on(data, upper, classifier.head, states, learned, watched, float(rate), seed)
        trained = 0 if method == "asked" else trained + sum(p.numel() for p in classifier.head.parameters())
        predicted = label_logits(classifier, pick(states, judged)).argmax(1)
    marks = "".join("01"[int(right)] for right in predicted.numpy() == data.targets[judged])
    row = about(device, job, trained, started) | {
        "n": len(marks),
        "correct": marks.count("1"),
        "right": marks,
    }
    if is_shipped:
        logits = label_logits(classifier, pick(states, watched))
        ship(data, body, classifier, fit_temperature(logits, torch.tensor(data.targets[watched])), row)
    return row


def ship(
    data: Labeled, body: GPTModel, classifier: GPTClassifier, temperature: float, row: dict[str, object]
) -> None:
    """Write an adapter of the course, with the row of the record that it belongs to."""
    labels, head = data.labels, classifier.head.cpu()
    made = AdaptedClassifier(
        body.cpu().eval(), load_tokenizer(BASE), head, labels, BASE, "last", temperature, True, data.prompt
    )
    recipe = {"script": "appendix_lora/adapt_smollm2.py", "detail": row["detail"], "seed": row["seed"]}
    result = f"{row['correct']} of {row['n']} of the test split"
    folder = CHECKPOINTS / f"{row['task']}-lora"
    made.save(folder, replace=True, dtype=torch.bfloat16, recipe=recipe, result=result)


def adapted_part(n_frozen: int, seed: int, device: str) -> tuple[GPTModel, GPTModel, int]:
    """Return the model with an adapter above the first blocks, that upper part, and how many numbers it trains."""
    body = load_pretrained(BASE, device=device, dtype=torch.float32)
    torch.manual_seed(seed)
    counts = attach_lora(body, upper_targets(body, "all-linear", n_frozen), rank=RANK, alpha=float(RANK))
    return body, upper_part(body, n_frozen), counts.trained


def trained_on(
    data: Labeled,
    upper: GPTModel,
    head: nn.Linear,
    states: list[Tensor],
    learned: list[int],
    watched: list[int],
    rate: float,
    seed: int,
) -> GPTClassifier:
    """Train adapter and head on the learned texts; the watched ones say when it is enough."""
    pick = lambda places: ([states[i] for i in places], data.targets[places])
    return fit_adapter(
        upper,
        pick(learned),
        pick(watched),
        len(data.labels),
        learning_rate=rate,
        head_learning_rate=1e-5,
        n_epochs=N_EPOCHS,
        pooling="last",
        head=head,
        seed=seed,
    )


def classify_choices() -> list[Job]:
    """The runs that choose the features' block, and an adapter's place and rate."""
    folds_of = {"spam": ("0", "1"), "sentiment": tuple(map(str, range(N_FOLDS)))}
    jobs: list[Job] = [
        (task, "features", detail, "choice", CHOICE_SEED, fold)
        for task in TEXTS
        for detail in FEATURE_BLOCKS
        for fold in folds_of[task]
    ]
    return jobs + [
        ("sentiment", "LoRA", detail, "choice", CHOICE_SEED, fold) for detail in ADAPTERS for fold in "0"
    ]


def classify_jobs() -> list[Job]:
    """The runs that are compared, with what was chosen; an adapter's place and rate are chosen on reviews for both."""
    found: list[Job] = []
    lora = best_detail("sentiment", "LoRA", ADAPTERS)
    for seed in SEEDS:
        for task in TEXTS:
            details = {"LoRA": lora, "features": best_detail(task, "features", FEATURE_BLOCKS)}
            if seed == SEEDS[0]:
                details["asked"] = lora
            for part in ("test", *map(str, range(N_FOLDS))):
                role = "test" if part == "test" else "folds"
                found += [(task, method, detail, role, seed, part) for method, detail in details.items()]
    return found


# --- memory

N_MEMORY_STEPS = 3


def one_memory(kind: str) -> None:
    """Train a few steps of 4 x 128 tokens in this process; print its peak beyond torch itself, and a step's time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs = torch.randint(0, 49_000, (4, 129))
    # What torch itself takes for a step shall not count.
    tiny = nn.Sequential(nn.Linear(256, 256))
    checkpoint(tiny, torch.randn(64, 256), use_reentrant=False).sum().backward()
    torch.optim.AdamW(tiny.parameters()).step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = model_file(BASE)
    model = load_packed(path) if kind == "four bits" else load_pretrained(path, dtype=torch.float32)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attach_lora(model, "all-linear", rank=RANK, alpha=float(RANK))
    # Each block is computed again in the backward pass, in both: else the states between would be most of it.
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    head = nn.Linear(model.config.emb_dim, 2)
    optimizer = torch.optim.AdamW([*head.parameters(), *lora_groups(model, 1e-3)[0]["params"]], lr=1e-3)
    seconds = []
    for _ in range(N_MEMORY_STEPS):
        started = time.perf_counter()
        pooled = model.train().hidden_states(inputs[:, :-1]).mean(1)
        F.cross_entropy(head(pooled), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((loaded - before) // 1024, (peak - before) // 1024, round(float(np.median(seconds)), 2))


def memory() -> None:
    """Print the memory of both bases and what a step takes, each in a process of its own."""
    found = {}
    for kind in ("float32", "four bits"):
        call = [sys.executable, __file__, "memory", "--kind", kind]
        # Freed memory goes back at once; else the C library keeps hundreds of MiB of it, for both bases alike.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        written = subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout
        found[kind] = [float(number) for number in written.split()]
        loaded, peak, seconds = found[kind]
        print(f"{kind:10} loaded {loaded:.0f} MiB, peak of a step {peak:.0f} MiB, {seconds:.1f} s a step")
    ratios = [four / full for four, full in zip(found["four bits"], found["float32"], strict=True)]
    print("ratios     loaded {:.2f}, peak {:.2f}, time {:.2f}".format(*ratios))


def run_all(jobs: Sequence[Job], device: str, n_processes: int) -> None:
    """Run what the record lacks, several runs at a time; each row is written as soon as it is there."""
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}
    missing = [job for job in jobs if tuple(map(str, job)) not in done]

    def keep(row: dict[str, object]) -> None:
        replace_row(RESULTS, COLUMNS, row, KEY)
        print(*(row[name] for name in (*KEY, "minutes", "n", "correct")), flush=True)

    if n_processes == 1:
        for job in missing:
            keep(classify(job, device))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done_one in as_completed([pool.submit(classify, job, device) for job in missing]):
            keep(done_one.result())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("classify", "memory", "ship"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--kind", choices=("float32", "four bits"), help="of the base, for memory in this process"
    )
    parser.add_argument("--task", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--first", type=int, help="only so many runs")
    parser.add_argument("--role", nargs="+", choices=("choice", "compare"), default=["choice", "compare"])
    arguments = parser.parse_args()
    device, n_processes = arguments.device, arguments.processes
    torch.set_num_threads(1)
    if arguments.command == "memory":
        return memory() if arguments.kind is None else one_memory(arguments.kind)
    if arguments.command == "ship":
        for job in classify_jobs():
            if job[:2] in {(task, "LoRA") for task in arguments.task} and job[3:] == (
                "test",
                SEEDS[0],
                "test",
            ):
                row = classify(job, device, is_shipped=True)
                replace_row(RESULTS, COLUMNS, row, KEY)
                print(*job, row["correct"], row["n"])
        return None
    if "choice" in arguments.role:
        run_all(classify_choices()[: arguments.first], device, n_processes)
    if "compare" in arguments.role:
        run_all(classify_jobs()[: arguments.first], device, n_processes)
    return None


if __name__ == "__main__":
    main()
