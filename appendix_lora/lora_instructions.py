"""Compare LoRA with full fine-tuning on the instructions of chapter 7, and record what came of it.

    python lora_instructions.py                    everything that the record lacks, on this machine's processor
    python lora_instructions.py --device cuda --processes 8

`tales-3m` is tuned on the lessons of `ch07_instruction/tune_instructions.py`, with its batches, steps and scores: exact
matches in six families of questions and one held out, and the loss on stories in nats a story. With LoRA every linear
map of the blocks has an adapter, and the embedding's two new rows are trained as there. They are also trained beside
the last block and beside the head alone, which is untied from the embedding first.

Each run has 300 steps, where chapter 7 has 1,000: on one core of a processor 6 to 13 minutes in full, 8 to 18 with
adapters. Each method's learning rate is chosen on another seed's lessons and tasks (role "choice", mostly on a GPU).
The tasks of the test come from a seed that nothing was trained or chosen on. `lora_instructions.csv` has a row for each
run and family.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn

from shared.finetuning.instruction import answer_loss, chat_batches, encode_conversations, tune
from shared.finetuning.lora import attach_lora
from shared.model.gpt import GPTModel
from shared.notebook.records import load_script, read_rows, replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "lora_instructions.csv"
SCRIPT = HERE.parent / "ch07_instruction" / "tune_instructions.py"


chapter_7 = load_script(SCRIPT)
SEEDS, CHOICE_SEED, TEST_SEED = (1, 2, 3), 9, 7100
N_STEPS, N_TEST, N_CHOICE_TEST = 300, 200, 50

# Method -> (what is trained: everything, an adapter of that rank, or a part; rates to choose from).
METHODS: dict[str, tuple[str | int, tuple[float, ...]]] = {
    "full": ("all", (1e-3, 3e-3)),
    "LoRA, rank 16": (16, (3e-3, 1e-2, 2e-2)),
    "LoRA, rank 64": (64, (3e-3, 1e-2, 2e-2)),
    "LoRA, rank 4": (4, (3e-3, 1e-2, 2e-2)),
    "last block": ("last block", (1e-3, 3e-3, 1e-2)),
    "head": ("head", (1e-3, 3e-3, 1e-2)),
}
COLUMNS = ["method", "role", "learning_rate", "seed", "steps", "trained", "minutes"]
COLUMNS += ["family", "n", "correct", "loss", "hardware", "torch"]
Job = tuple[str, str, float, int]  # method, role, learning rate, seed


def key(row: dict[str, object]) -> tuple[str, ...]:
    """What tells runs apart."""
    return tuple(str(row[name]) for name in ("method", "role", "learning_rate", "seed"))


def choose_trained(model: GPTModel, part: str | int) -> None:
    """Let only that part of the model learn (see `METHODS`), and the token embedding, whose old rows `tune` freezes."""
    if isinstance(part, int):
        attach_lora(model, "all-linear", rank=part, alpha=16.0)
    elif part != "all":
        model.requires_grad_(False)
    if part == "last block":
        model.blocks[-1].requires_grad_(True)
        model.final_norm.requires_grad_(True)
    elif part == "head":  # tied to the embedding it could not learn alone
        model.output_head.weight = nn.Parameter(model.output_head.weight.detach().clone())
    model.token_embedding.weight.requires_grad_(True)


def run(
    method: str,
    role: str,
    learning_rate: float,
    seed: int,
    *,
    device: str = "cpu",
    n_steps: int | None = None,
    n_test: int | None = None,
) -> list[dict[str, object]]:
    """Tune one model and return its rows of the record."""
    torch.set_num_threads(1)
    started, is_choice = time.monotonic(), role == "choice"
    n_steps = n_steps or N_STEPS
    taught = chapter_7.lessons(seed, n_steps * chapter_7.BATCH_SIZE)
    examples, _ = encode_conversations(
        chapter_7.FORMAT, chapter_7.TOKENIZER, taught, context_length=chapter_7.CONTEXT_LENGTH
    )
    # The new rows of the embedding are trained in any case.
    model = chapter_7.untuned().to(device)
    torch.manual_seed(seed)
    choose_trained(model, METHODS[method][0])
    n_old, width = tale_encoding().n_vocab, model.config.emb_dim
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - n_old * width
    tune(
        model,
        chat_batches(examples, chapter_7.BATCH_SIZE, seed=seed, epochs=1),
        n_steps=n_steps,
        learning_rate=learning_rate,
        n_frozen_rows=n_old,
        loss=answer_loss,
        autocast=torch.bfloat16,
    )
    minutes = round((time.monotonic() - started) / 60, 1)
    # What stands word for word in a lesson proves nothing.
    tasks = chapter_7.test_tasks(
        CHOICE_SEED if is_choice else TEST_SEED, n_test or (N_CHOICE_TEST if is_choice else N_TEST)
    )
    messages = [list(task.messages) for task in tasks]
    seen = set(chapter_7.overlapping(chapter_7.beginnings(taught), messages))
    kept = [task for place, task in enumerate(tasks) if place not in seen]
    about = {
        "method": method,
        "role": role,
        "learning_rate": learning_rate,
        "seed": seed,
        "steps": n_steps,
        "trained": trained,
        "minutes": minutes,
        "hardware": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    return [about | row for row in chapter_7.scores(model.eval(), kept)]


def chosen_rate(method: str) -> float:
    """Return the learning rate with the most right answers among the method's choices on record; the first if none."""
    right: dict[float, int] = dict.fromkeys(METHODS[method][1], 0)
    for row in read_rows(RESULTS):
        trained_on = row["family"] not in ("stories", chapter_7.HELD_OUT)
        if (row["method"], row["role"], trained_on) == (method, "choice", True):
            right[float(row["learning_rate"])] += int(row["correct"])
    return max(right, key=lambda rate: (right[rate], -rate))


def run_all(jobs: list[Job], device: str, n_processes: int) -> None:
    """Run what the record lacks, several runs at a time; rows are written as soon as they are there."""
    done = set(map(key, read_rows(RESULTS)))
    missing = [job for job in jobs if tuple(map(str, job)) not in done]
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        for done_one in as_completed([pool.submit(run, *job, device=device) for job in missing]):
            rows = done_one.result()
            replace_rows(RESULTS, COLUMNS, rows, key)
            print(key(rows[0]), [row["correct"] for row in rows[:-1]], rows[-1]["loss"], flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    choices = [(m, "choice", rate, CHOICE_SEED) for m in arguments.method for rate in METHODS[m][1]]
    run_all(choices, arguments.device, arguments.processes)
    jobs = [(m, "test", chosen_rate(m), seed) for m in arguments.method for seed in arguments.seed]
    run_all(jobs, arguments.device, arguments.processes)


if __name__ == "__main__":
    main()
