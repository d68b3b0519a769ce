"""Tune tales-3m on instructions about the tales, score what came of it family by family, and record it.

    python tune_instructions.py                     the runs of three seeds, as far as the record lacks them
    python tune_instructions.py --runs everything   learn the questions too; "random start": without the base's weights
    python tune_instructions.py --seeds 1 --ship    one run; its weights become shared/checkpoints/tales-3m-instruct

A run learns from lessons, conversations of several questions about one story (`TaskGenerator.lesson`), each seen once.
It is scored on tasks of other seeds: single questions, a second question after the model's own first answer, and a
family that no lesson has (`HELD_OUT`). Prompts that also stand in a lesson are taken out before (`overlapping`). The
learning rate was chosen by runs of another seed on tasks of another seed, recorded with the role "choice"; their
lessons still asked each kind of question alike often.

The stories of the test tasks (seed 1) are among those that the base model had read, once each and without questions. On
tasks of the seeds 7001 and 7002, which nobody had read, the shipped model is right in 72 and 74 % instead of 76 %.

`tune_instructions.csv` has a row for each run and family; rows of step 0 are the model before. A run replaces its own
rows, so the script goes on with the run that it was stopped in. One thread is used.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from shared.finetuning.conversations import overlapping
from shared.finetuning.differences import save_difference
from shared.finetuning.instruction import (
    answer_loss,
    answers,
    chat_batches,
    chat_tokenizer,
    encode_conversations,
    extend_model,
    tune,
)
from shared.model.gpt import GPTModel
from shared.notebook.records import read_rows, replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding, tale_tokenizer
from shared.tales.generator import TaleGenerator
from shared.tales.instructions import FAMILIES, HELD_OUT, Task, TaskGenerator
from shared.text.chat_format import ChatFormat
from shared.training.batches import document_row
from shared.training.loop import Record
from shared.training.losses import loss_per_document
from shared.weights.pretrained import CHECKPOINTS, load_pretrained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "tune_instructions.csv"
SHIPPED = "tales-3m-instruct"
SEEDS, CHOICE_SEED, TEST_SEED = (1, 2, 3), 9, 1
CHOICES = (7e-4, 1.5e-3, 3e-3)

CONTEXT_LENGTH, BATCH_SIZE, LEARNING_RATE = 640, 8, 3e-3
N_STEPS, N_CHOICE_STEPS = 1000, 300
N_TEST, N_STORIES = 200, 200

FORMAT, TOKENIZER = ChatFormat(), chat_tokenizer(tale_tokenizer())


def lessons(seed: int, n: int) -> list[Sequence[dict[str, str]]]:
    """The conversations that the run of a seed learns from."""
    generator = TaskGenerator(1000 + seed)
    return [generator.lesson() for _ in range(n)]


def test_tasks(seed: int, n: int = N_TEST) -> list[Task]:
    """As many tasks of each family, the held-out one included."""
    return [task for family in (*FAMILIES, HELD_OUT) for task in TaskGenerator(seed).tasks(n, family)]


def replies(model: GPTModel, tasks: Sequence[Task]) -> list[str]:
    """The model's answer to the last question of each task, after its own answers to the questions before."""
    said: list[list[str]] = [[] for _ in tasks]
    for turn in range(3):
        open_ = [i for i, task in enumerate(tasks) if len(task.messages) // 2 > turn]
        prompts = []
        for i in open_:
            asked = [dict(message) for message in tasks[i].messages[: 2 * turn + 1]]
            for message, reply in zip(asked[1::2], said[i], strict=True):
                message["content"] = reply or "?"
            prompts.append(asked)
        for i, reply in zip(
            open_, answers(model, TOKENIZER, FORMAT, prompts, 48) if prompts else (), strict=True
        ):
            said[i].append(reply)
    return [texts[-1] for texts in said]


def story_loss(model: GPTModel) -> float:
    """Nats per story, on the stories that the README of the checkpoints measures with."""
    return loss_per_document(
        model, [document_row(story.text, tale_encoding()) for story in TaleGenerator(0).stories(N_STORIES)]
    )


def scores(model: GPTModel, tasks: Sequence[Task]) -> list[dict[str, object]]:
    """Exact matches of each family, and the loss on stories."""
    written = replies(model, tasks)
    rows: list[dict[str, object]] = []
    for family in (*FAMILIES, HELD_OUT):
        marks = [
            reply == task.answer for task, reply in zip(tasks, written, strict=True) if task.family == family
        ]
        rows.append({"family": family, "n": len(marks), "correct": sum(marks), "loss": ""})
    return [*rows, {"family": "stories", "n": N_STORIES, "correct": "", "loss": round(story_loss(model), 3)}]


def untuned() -> GPTModel:
    """The base model with the two tokens of the chat format and a longer context."""
    return extend_model(load_pretrained("tales-3m"), 2, CONTEXT_LENGTH)


def run(
    name: str,
    role: str,
    seed: int,
    tasks: Sequence[Task],
    *,
    learning_rate: float = LEARNING_RATE,
    n_steps: int = N_STEPS,
) -> tuple[GPTModel, list[dict[str, object]]]:
    """Train one model; return it and its rows of the record.

    `name` is "answers" or "everything", what is learned of a conversation, or "random start".
    """
    started = time.process_time()
    model = untuned()
    if name == "random start":
        torch.manual_seed(seed)
        model = GPTModel(model.config)
    train_on = "everything" if name == "everything" else "answers"
    taught = lessons(seed, n_steps * BATCH_SIZE)
    examples, n_cut = encode_conversations(
        FORMAT, TOKENIZER, taught, train_on=train_on, context_length=CONTEXT_LENGTH
    )
    print(f"{name}, seed {seed}, rate {learning_rate}: {len(examples)} lessons, {n_cut} cut", flush=True)

    def report(record: Record) -> None:
        if record.step % 100 == 0:
            minutes = (time.process_time() - started) / 60
            print(f"  step {record.step}: loss {record.loss:.3f}, {minutes:.1f} minutes", flush=True)

    tune(
        model,
        chat_batches(examples, BATCH_SIZE, seed=seed, epochs=1),
        n_steps=n_steps,
        learning_rate=learning_rate,
        n_frozen_rows=0 if name == "random start" else tale_encoding().n_vocab,
        loss=answer_loss,
        autocast=torch.bfloat16,
        on_step=report,
    )
    minutes = round((time.process_time() - started) / 60, 1)
    # What stands word for word in a lesson proves nothing.
    seen = set(overlapping(beginnings(taught), [list(task.messages) for task in tasks]))
    kept = [task for place, task in enumerate(tasks) if place not in seen]
    about = about_run(name, role, seed, learning_rate, n_steps, minutes)
    return model, [about | row for row in scores(model.eval(), kept)]


def beginnings(taught: Iterable[Sequence[dict[str, str]]]) -> Iterator[Sequence[dict[str, str]]]:
    """What a task could repeat: up to three turns from a lesson's start, and each turn alone."""
    for lesson in taught:
        for end in range(2, len(lesson) + 1, 2):
            yield lesson[end - 2 : end]
            if end in (4, 6):
                yield lesson[:end]


def about_run(
    name: str, role: str, seed: int, learning_rate: float | str, n_steps: int, minutes: float
) -> dict[str, object]:
    """The columns that all rows of a run share."""
    return {
        "run": name,
        "role": role,
        "seed": seed,
        "learning_rate": learning_rate,
        "step": n_steps,
        "minutes": minutes,
        "hardware": cpu_name(),
        "torch": torch.__version__,
    }


COLUMNS = [
    *("run", "role", "seed", "learning_rate", "step", "minutes"),
    *("family", "n", "correct", "loss", "hardware", "torch"),
]


def key(row: dict[str, object]) -> tuple[str, ...]:
    """What tells runs apart."""
    return tuple(str(row[name]) for name in ("role", "run", "seed", "learning_rate"))


def is_recorded(name: str, role: str, seed: int, learning_rate: float | str) -> bool:
    """Whether the record has this run."""
    return (role, name, str(seed), str(learning_rate)) in map(key, read_rows(RESULTS))


def ship(model: GPTModel, rows: list[dict[str, object]]) -> None:
    """Make the tuned model a checkpoint of the course."""
    recipe = {
        "script": "ch07_instruction/tune_instructions.py",
        "seed": rows[0]["seed"],
        "n_steps": N_STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
    }
    results = {
        str(row["family"]): row["loss"] if row["correct"] == "" else f"{row['correct']} of {row['n']}"
        for row in rows
    }
    save_difference(
        "tales-3m",
        model,
        CHECKPOINTS / SHIPPED,
        chat_format=FORMAT,
        replace=True,
        recipe=recipe,
        results=results | {"minutes": rows[0]["minutes"]},
    )


def seeds_of(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """What is only compared has one seed."""
    return seeds if name == "answers" else seeds[:1]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--runs", nargs="+", default=["answers"], help="answers, everything, random start")
    parser.add_argument("--choose", action="store_true", help="only the runs that choose the learning rate")
    parser.add_argument("--ship", action="store_true", help="make the run of the first seed a checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    # The learning rate, on other lessons and other tasks.
    if arguments.choose:
        for rate in CHOICES:
            if not is_recorded("answers", "choice", CHOICE_SEED, rate):
                tasks = test_tasks(CHOICE_SEED, 50)
                replace_rows(
                    RESULTS,
                    COLUMNS,
                    run("answers", "choice", CHOICE_SEED, tasks, learning_rate=rate, n_steps=N_CHOICE_STEPS)[
                        1
                    ],
                    key,
                )
        return

    # The model before, then the runs.
    tasks = test_tasks(TEST_SEED)
    if not is_recorded("before", "test", 0, ""):
        about = about_run("before", "test", 0, "", 0, 0)
        replace_rows(RESULTS, COLUMNS, [about | row for row in scores(untuned().eval(), tasks)], key)
    for name, seed in [(run_, seed) for run_ in arguments.runs for seed in seeds_of(run_, arguments.seeds)]:
        is_shipped = arguments.ship and (name, seed) == ("answers", arguments.seeds[0])
        is_missing = is_shipped and not (CHECKPOINTS / SHIPPED).exists()
        if is_missing or not is_recorded(name, "test", seed, LEARNING_RATE):
            model, rows = run(name, "test", seed, tasks)
            replace_rows(RESULTS, COLUMNS, rows, key)
            if is_shipped:
                ship(model, rows)


if __name__ == "__main__":
    main()
