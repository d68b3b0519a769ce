"""Adapt SmolLM2 to a domain with LoRA: more text of the domain first, then its task; and what is forgotten.

    python domain_smollm2.py                       what the record lacks
    python domain_smollm2.py --seed 0

An adapter of rank 8 in all blocks continues pretraining on 400 stories of the tale world, then learns from 400 examples
the questions "Who has the ...?" of chapter 7; against an adapter that learns the questions at once. Measured are the
answers to 100 new questions (whole, letter for letter, and whether the right name is in them), the loss on new stories,
and, for what was forgotten, the loss on the bundled reviews and 200 questions of general knowledge with four answers
each. The learning rate was not chosen; it is that of the adapters in `adapt_smollm2.py`.

`domain_smollm2.csv` has a row for each run: 15 to 40 minutes on one core. The script goes on where it was stopped.
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.data.corpus import load_questions, load_reviews
from shared.data.models import model_file
from shared.finetuning.instruction import answer_loss, answers, chat_batches, encode_conversations
from shared.finetuning.likelihood import answer_likelihoods, choice_scores
from shared.finetuning.lora import attach_lora, lora_groups, merge_lora
from shared.model.gpt import GPTModel
from shared.notebook.records import read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.tales.generator import TaleGenerator
from shared.tales.instructions import Task, TaskGenerator
from shared.text.chat_format import ChatFormat, chat_format_of
from shared.text.tokenizer import BPETokenizer
from shared.training.batches import pad_rows
from shared.training.loop import train
from shared.training.losses import evaluate
from shared.training.schedules import build_schedule
from shared.weights.gguf import read_gguf
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "domain_smollm2.csv"
BASE = "smollm2-135m-instruct"
COLUMNS = ["method", "seed", "trained", "minutes", "n", "correct", "named", "right"]
COLUMNS += ["tales", "reviews", "knowledge", "hardware", "torch"]
KEY = ("method", "seed")
METHODS = ("before", "questions", "stories, then questions", "stories")
SEEDS, RANK, RATE = (0, 1, 2), 8, 1e-3

N_STORY_STEPS, N_TASK_STEPS, BATCH_SIZE, N_TASKS = 100, 100, 4, 100


@cache
def chat() -> tuple[BPETokenizer, ChatFormat]:
    """SmolLM2's tokenizer and the chat format of its file."""
    template = read_gguf(model_file(BASE)).metadata["tokenizer.chat_template"]
    return load_tokenizer(BASE), chat_format_of(str(template))


def story_rows(seed: int, n: int) -> list[list[int]]:
    """Stories as ids of SmolLM2, with the end of a text behind each."""
    encoding = load_tokenizer(BASE)
    return [
        [*encoding.encode_ordinary(story.text), encoding.eot_token]
        for story in TaleGenerator(seed).stories(n)
    ]


def tasks_of(seed: int, n: int) -> list[Task]:
    """Questions of one family, of stories that no other seed has."""
    return list(TaskGenerator(seed).tasks(n, "owner"))


def mean_loss(model: GPTModel, rows: Sequence[Sequence[int]]) -> float:
    """Return the mean loss in nats a token."""
    rows = sorted(rows, key=len)
    batches = [pad_rows(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    return evaluate(model, batches).loss


def measured(model: GPTModel) -> dict[str, object]:
    """Return the columns that say what a model knows: of the domain, and of everything else."""
    (encoding, form), tasks = chat(), tasks_of(33_000, N_TASKS)
    written = answers(model, encoding, form, [task.prompt for task in tasks], 16)
    marks = "".join("01"[reply == task.answer] for reply, task in zip(written, tasks, strict=True))
    questions = load_questions()
    prompts = [encoding.encode_ordinary(f"Question: {one.question}\nAnswer:") for one in questions]
    found = answer_likelihoods(
        model, encoding, prompts, [[f" {a}" for a in one.answers] for one in questions]
    )
    chosen = [int(np.argmax(choice_scores(of_one))) for of_one in found]
    reviews = [encoding.encode_ordinary(row.text) for row in load_reviews()[:200]]
    return {
        "n": len(marks),
        "correct": marks.count("1"),
        "named": sum(task.value in reply for reply, task in zip(written, tasks, strict=True)),
        "right": marks,
        "tales": round(mean_loss(model, story_rows(20_000, 64)), 4),
        "reviews": round(mean_loss(model, reviews), 4),
        "knowledge": sum(c == one.correct for c, one in zip(chosen, questions, strict=True)),
    }


def stage(name: str, seed: int) -> tuple[int, Iterable[tuple[Tensor, Tensor]]]:
    """Return the number of steps of "stories" or "questions", and its batches."""
    encoding, form = chat()
    if name == "stories":
        rows = story_rows(30_000 + seed, N_STORY_STEPS * BATCH_SIZE)
        examples = [(row, row) for row in rows]
        n_steps = N_STORY_STEPS
    else:
        lessons = [list(task.messages) for task in tasks_of(31_000 + seed, N_TASK_STEPS * BATCH_SIZE)]
        examples, _ = encode_conversations(form, encoding, lessons)
        n_steps = N_TASK_STEPS
    return n_steps, chat_batches(examples, BATCH_SIZE, seed=seed, epochs=1)


def run(method: str, seed: int) -> dict[str, object]:
    """One run, and its row."""
    started, trained = time.monotonic(), 0
    model = load_pretrained(BASE, dtype=torch.float32)
    if method != "before":
        torch.manual_seed(seed)
        trained = attach_lora(model, "all-linear", rank=RANK, alpha=float(RANK)).trained
        for name in method.split(", then "):
            n_steps, batches = stage(name, seed)
            train(
                model,
                batches,
                torch.optim.AdamW(lora_groups(model, RATE), weight_decay=0.0),
                n_steps=n_steps,
                loss=answer_loss,
                schedule=build_schedule("linear", n_steps, max(1, n_steps // 10)),
            )
    minutes = round((time.monotonic() - started) / 60, 1)
    if trained:
        merge_lora(model)
    row = {"method": method, "seed": seed, "trained": trained, "minutes": minutes}
    return row | measured(model.eval()) | {"hardware": cpu_name(), "torch": torch.__version__}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}
    jobs = [(method, seed) for seed in arguments.seed for method in arguments.method]
    jobs = [
        job for job in jobs if job[0] != "before" or job[1] == SEEDS[0]
    ]  # nothing there depends on a seed
    for method, seed in jobs:
        if (method, str(seed)) not in done:
            row = run(method, seed)
            replace_row(RESULTS, COLUMNS, row, KEY)
            print(*(row[name] for name in COLUMNS if name != "right"), flush=True)


if __name__ == "__main__":
    main()
