"""Train readers that point at answers, and record what they are worth: on tales, and on the bundled stories.

    python reading_runs.py                   everything that the records lack, about two hours of one core
    python reading_runs.py --role tales      only some of it: choice, tales, pointing, asked
    python reading_runs.py --ship            and write the reader of seed 0 to shared/checkpoints/tales-reader

`questions.csv`: a reader on `tales-1m`, trained on questions of `TaleQuestionGenerator(1000 + seed)` in two of their
three wordings, each question once. The role "choice" (seed 9) has the trials of the learning rate and of attention in
both directions, each a quarter as long, judged on 300 questions of generator 1. A "tales" row (seeds 0, 1, 2) is judged
once, on 1,000 questions of generator 2. Columns: f1 and exact (percent, answered questions, an answer always given),
both again in the wording that was never trained; f1_all and f1_none are over all and over the unanswered questions,
with the threshold chosen on 1,000 questions of generator 1.

`reading_answers.csv`: what SmolLM2 says to the 252 questions on the bundled stories. "asked": it writes an answer, with
the passage in the prompt (`reading_prompt`; `pointing` 0, the right passage). "pointing": blocks 15 to 29 carry LoRA
adapters of rank 8 and were trained, with a head for first and last tokens, on 1,440 questions about tales in all three
wordings, seed 0; it reads the right passage (found = 0) and the first three that BM25 finds (found = 1, 2, 3). Nothing
was trained on the stories or their questions.

The adapters of "pointing" are kept in build/reading-pointing.safetensors, from which a later run goes on.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from shared.data.corpus import load_reading_questions, load_stories
from shared.data.models import model_file
from shared.finetuning.evaluation import exact_match, token_f1
from shared.finetuning.instruction import answers
from shared.finetuning.lora import attach_lora
from shared.finetuning.lora_classifier import upper_targets
from shared.finetuning.question_answering import (
    Answer,
    Reader,
    SpanModel,
    fit_threshold,
    span_batches,
    span_loss,
)
from shared.finetuning.retrieval import BM25, reading_prompt, split_passages
from shared.notebook.records import read_rows, replace_row, replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.questions import TaleQuestion, TaleQuestionGenerator
from shared.text.chat_format import chat_format_of
from shared.training.loop import train
from shared.training.schedules import build_schedule
from shared.weights.gguf import read_gguf
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS, ANSWERS = HERE / "questions.csv", HERE / "reading_answers.csv"
CACHE = HERE.parent / "build" / "reading-pointing.safetensors"
BASE, REAL = "tales-1m", "smollm2-135m-instruct"
N_STEPS, N_CHOICE_STEPS, BATCH_SIZE = 2400, 600, 16
CHOICE_SEED, SEEDS = 9, (0, 1, 2)
TRIALS = tuple((rate, attention) for attention in ("causal", "both directions") for rate in (1e-3, 2e-3))
KEY = ("role", "seed", "learning_rate", "attention", "n_steps")
MEASURES = ("f1", "exact", "f1_new_wording", "exact_new_wording", "threshold", "f1_all", "f1_none")
COLUMNS = (*KEY, *MEASURES, "cpu_seconds", "hardware", "torch")
ANSWER_COLUMNS = ("method", "found", "number", "place", "answer", "margin")


def examples(reader: Reader, seed: int, forms: tuple[int, ...] = (0, 1)) -> Iterator:
    """Yield the windows of questions about new tales, without end."""
    generator = TaleQuestionGenerator(seed)
    while True:
        asked = generator.sample(forms=forms)
        yield from reader.examples(asked.question, asked.passage, asked.start, asked.answer)


def scores(found: list[Answer], asked: list[TaleQuestion]) -> tuple[list[float], list[float]]:
    """Return F1 and exact match of each answer."""
    pairs = [(answer.text, question.answer) for answer, question in zip(found, asked, strict=True)]
    return [token_f1(*pair) for pair in pairs], [exact_match(*pair) for pair in pairs]


def read(reader: Reader, asked: list[TaleQuestion]) -> list[Answer]:
    """Return the reader's answers to questions about tales."""
    return reader.answer_all([q.question for q in asked], [q.passage for q in asked])


def trained_reader(seed: int, learning_rate: float, attention: str, n_steps: int) -> tuple[Reader, float]:
    """Return a reader of tales trained on its own questions, and the processor seconds that took."""
    torch.manual_seed(seed)
    body = load_pretrained(BASE, dtype=torch.float32)
    reader = Reader(SpanModel(body, bidirectional=attention != "causal"), load_tokenizer(BASE))
    optimizer = torch.optim.AdamW(
        reader.model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    start = time.process_time()
    train(
        reader.model,
        span_batches(examples(reader, 1000 + seed), BATCH_SIZE, seed=seed),
        optimizer,
        n_steps=n_steps,
        loss=span_loss,
        schedule=build_schedule("linear", n_steps, 20),
    )
    return reader, time.process_time() - start


def run_tales(role: str, seed: int, learning_rate: float, attention: str) -> Reader:
    """Train and judge a reader of tales, write its row, and return it."""
    n, generator, n_steps = (300, 1, N_CHOICE_STEPS) if role == "choice" else (1000, 2, N_STEPS)
    reader, seconds = trained_reader(seed, learning_rate, attention, n_steps)
    row = dict(zip(KEY, (role, seed, learning_rate, attention, n_steps), strict=True))
    # Pointing alone: an answer is always given.
    reader.threshold = -float("inf")
    for name, forms in (("", (0, 1)), ("_new_wording", (2,))):
        asked = list(TaleQuestionGenerator(generator).questions(n, answered=True, forms=forms))
        f1, exact = scores(read(reader, asked), asked)
        row |= {f"f1{name}": f"{100 * np.mean(f1):.1f}", f"exact{name}": f"{100 * np.mean(exact):.1f}"}
    # With silence, by a threshold from other questions.
    if role != "choice":
        asked = list(TaleQuestionGenerator(1).questions(1000))
        found = read(reader, asked)
        f1, _ = scores(found, asked)
        reader.threshold = fit_threshold([a.margin for a in found], f1, [not q.answer for q in asked])
        asked = list(TaleQuestionGenerator(generator).questions(n))
        f1, _ = scores(read(reader, asked), asked)
        none = [value for value, question in zip(f1, asked, strict=True) if not question.answer]
        row |= {
            "threshold": f"{reader.threshold:.3f}",
            "f1_all": f"{100 * np.mean(f1):.1f}",
            "f1_none": f"{100 * np.mean(none):.1f}",
        }
    row |= {"cpu_seconds": round(seconds), "hardware": cpu_name(), "torch": torch.__version__}
    replace_row(RESULTS, COLUMNS, row, KEY)
    print({name: row.get(name, "") for name in (*KEY, *MEASURES)}, flush=True)
    return reader


def chosen() -> tuple[float, str]:
    """Return the learning rate and attention of the best trial.

    Raises ValueError if a trial is missing.
    """
    trials = [row for row in read_rows(RESULTS) if row["role"] == "choice"]
    if len(trials) < len(TRIALS):
        raise ValueError(f"{RESULTS.name} must have {len(TRIALS)} trials, got {len(trials)}: --role choice")
    best = max(trials, key=lambda row: float(row["f1"]))
    return float(best["learning_rate"]), best["attention"]


def passages() -> tuple[list[str], list[str]]:
    """Return the passages of all stories, and the title of the story of each."""
    pairs = [(part, story.title) for story in load_stories() for part in split_passages(story.text)]
    return [part for part, _ in pairs], [title for _, title in pairs]


def right_places() -> list[int]:
    """Return for each question on the stories the place of the passage that holds its evidence."""
    parts, titles = passages()
    return [
        next(i for i, part in enumerate(parts) if titles[i] == q.story and q.evidence in part)
        for q in load_reading_questions()
    ]


def pointing_reader() -> Reader:
    """Return SmolLM2 as a reader: adapters and a head, from the cache or trained on questions about tales."""
    torch.manual_seed(0)
    body = load_pretrained(REAL, dtype=torch.float32)
    reader = Reader(SpanModel(body), load_tokenizer(REAL), threshold=-float("inf"))
    attach_lora(body, upper_targets(body, "all-linear", 15), rank=8, alpha=16)
    trained = {name: p for name, p in reader.model.named_parameters() if p.requires_grad}
    if CACHE.exists():
        reader.model.load_state_dict(load_file(CACHE), strict=False)
        return reader
    adapters = [p for name, p in trained.items() if not name.startswith("head")]
    groups = [{"params": adapters, "lr": 1e-3}, {"params": reader.model.head.parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    batches = span_batches(examples(reader, 70, forms=(0, 1, 2)), 8, pool=8, seed=0)
    schedule = build_schedule("linear", 180, 10)
    train(reader.model, batches, optimizer, n_steps=180, loss=span_loss, schedule=schedule)
    CACHE.parent.mkdir(exist_ok=True)
    save_file({name: p.detach() for name, p in trained.items()}, CACHE)
    return reader


def write_answers(method: str, found: int, places: list[int], said: list[tuple[str, float | str]]) -> None:
    """Write the answers of a method to all questions, which it gave from the passages at these places."""
    rows = [
        {
            "method": method,
            "found": found,
            "number": number,
            "place": place,
            "answer": " ".join(text.split()),
            "margin": f"{margin:.4f}" if isinstance(margin, float) else margin,
        }
        for number, (place, (text, margin)) in enumerate(zip(places, said, strict=True))
    ]
    replace_rows(ANSWERS, ANSWER_COLUMNS, rows, lambda row: tuple(str(row[k]) for k in ("method", "found")))


def run_pointing() -> None:
    """Let SmolLM2 point, in the right passages and in the first three that BM25 finds."""
    reader, (parts, _) = pointing_reader(), passages()
    asked = [question.question for question in load_reading_questions()]
    search = BM25(parts)
    order = [np.argsort(-search.scores(question), kind="stable")[:3].tolist() for question in asked]
    for found in range(4):
        places = right_places() if found == 0 else [best[found - 1] for best in order]
        said = reader.answer_all(asked, [parts[place] for place in places], batch_size=8)
        write_answers("pointing", found, places, [(answer.text, answer.margin) for answer in said])
        print("pointing", found, flush=True)


def run_asked() -> None:
    """Let SmolLM2 write its answers, with the right passages in the prompt."""
    model, tokenizer = load_pretrained(REAL, dtype=torch.float32), load_tokenizer(REAL)
    chat_format = chat_format_of(read_gguf(model_file(REAL)).metadata["tokenizer.chat_template"])
    (parts, _), places = passages(), right_places()
    prompts = [
        reading_prompt(question.question, [parts[place]])
        for question, place in zip(load_reading_questions(), places, strict=True)
    ]
    replies = answers(model, tokenizer, chat_format, prompts, 24, batch_size=8)
    write_answers("asked", 0, places, [(reply.partition("\n")[0].strip(), "") for reply in replies])


def main() -> None:
    """Run the command line."""
    roles = ("choice", "tales", "pointing", "asked")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", nargs="+", choices=roles, default=list(roles))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="also what the records have already")
    parser.add_argument(
        "--ship", action="store_true", help="write the reader of seed 0 to shared/checkpoints"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)}
    for learning_rate, attention in TRIALS if "choice" in arguments.role else ():
        key = ("choice", str(CHOICE_SEED), str(learning_rate), attention, str(N_CHOICE_STEPS))
        if arguments.again or key not in done:
            run_tales("choice", CHOICE_SEED, learning_rate, attention)
    for seed in arguments.seed if "tales" in arguments.role else ():
        learning_rate, attention = chosen()
        key = ("tales", str(seed), str(learning_rate), attention, str(N_STEPS))
        ship = arguments.ship and seed == 0
        if arguments.again or ship or key not in done:
            reader = run_tales("tales", seed, learning_rate, attention)
            if ship:
                reader.save(CHECKPOINTS / "tales-reader", BASE, replace=True, n_steps=N_STEPS, seed=seed)
    answered = {(row["method"], row["found"]) for row in read_rows(ANSWERS)}
    if "pointing" in arguments.role and (arguments.again or ("pointing", "3") not in answered):
        run_pointing()
    if "asked" in arguments.role and (arguments.again or ("asked", "0") not in answered):
        run_asked()


if __name__ == "__main__":
    main()
