"""Teach `tales-3m-instruct` to say "Nobody knows.", with few or many such lessons, and record what it costs.

    python refusal_runs.py              everything that the record lacks; about 50 minutes of one core

The tuned model of chapter 7 goes on learning for 150 steps. A share of its lessons (`SHARES`) asks one story for things
and persons that may not occur in it (`refusal_lesson`): of each form, half of the questions have an answer. The other
lessons are those of chapter 7. Share 0 learns as long without a refusal: what changes there is not the refusals' doing.
Share "one-sided" is one half, with lessons in which four of the six questions of these forms have no answer.

Scored are, on stories of a seed that nothing was trained on:
- `thing`, `person`: questions about what does not occur; right is the refusal, letter for letter.
- `word`: a kind of refusal that no lesson has, how often a word stands in a story that does not have it.
- the families of chapter 7, `owner` to `follow_up`, and `possession`, which has the form of `person` and an answer:
  right is the answer; a refusal there is an over-refusal.
`refusal_runs.csv` has a row for each run and kind. Share "before" is the model before.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from shared.finetuning.differences import load_difference
from shared.finetuning.instruction import answer_loss, answers, chat_batches, encode_conversations, tune
from shared.model.gpt import GPTModel
from shared.notebook.records import load_script, read_rows, replace_rows
from shared.pretraining.processes import cpu_name
from shared.tales.encoding import tale_encoding
from shared.tales.generator import Story, TaleGenerator, lexicon
from shared.tales.instructions import (
    FAMILIES,
    HELD_OUT,
    Task,
    TaskGenerator,
    conversation,
    count_turns,
    first_place,
    owner_turns,
    pick,
    possession_turns,
    shuffled,
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "refusal_runs.csv"
chapter_7 = load_script(HERE.parent / "ch07_instruction" / "tune_instructions.py")

REFUSAL = "Nobody knows."  # three tokens that its tales have: others could not be learned, see the notebook
SHARES, SEEDS, TEST_SEED = (0.5, 0.2, 0.05, 0.0, "one-sided"), (1, 2, 3), 7300
N_STEPS, BATCH_SIZE, LEARNING_RATE, N_TEST = 150, 8, 2e-3, 60
UNANSWERABLE = ("thing", "person", "word")
COLUMNS = ["share", "seed", "steps", "minutes", "kind", "n", "right", "refused", "hardware", "torch"]
Draw = Callable[[], float]
Turn = tuple[str, str, str]


def absent(story: Story, pool: str, draw: Draw) -> str:
    """Draw a single word of a lexicon (`person`, `object`) that the story does not have."""
    words = [
        word for word in lexicon(pool) if " " not in word and first_place(word, story.text) == len(story.text)
    ]
    return pick(words, draw)


def absent_thing(story: Story, draw: Draw) -> list[Turn]:
    """Ask who has a thing that does not occur."""
    thing = absent(story, "object", draw)
    forms = (f"Who has the {thing} at the end?", f"To whom does the {thing} belong at the end?")
    return [(f"{story.text}\n{pick(forms, draw)}", REFUSAL, REFUSAL)]


def absent_person(story: Story, draw: Draw) -> list[Turn]:
    """Ask what somebody has who does not occur."""
    person = absent(story, "person", draw)
    forms = (f"What does {person} have at the end?", f"What belongs to {person} at the end?")
    return [(f"{story.text}\n{pick(forms, draw)}", REFUSAL, REFUSAL)]


def absent_word(story: Story, draw: Draw) -> list[Turn]:
    """Ask how often a word stands in the story that does not occur: a kind of question that no lesson refuses."""
    word = absent(story, pick(("person", "object"), draw), draw)
    forms = (
        f"How many times does the word {word} stand in the story?",
        f"How often is the word {word} in the story?",
    )
    return [(f"{story.text}\n{pick(forms, draw)}", REFUSAL, REFUSAL)]


ASKS = {"thing": absent_thing, "person": absent_person, "word": absent_word}


# A form alone never tells whether to refuse; or it nearly does.
EVEN = (absent_thing, absent_person, owner_turns, possession_turns) * 2
ONE_SIDED = (*(absent_thing, absent_person) * 2, owner_turns, possession_turns, count_turns, count_turns)


def refusal_lesson(
    tales: TaleGenerator, draw: Draw, kinds: Sequence[Callable] = EVEN
) -> tuple[dict[str, str], ...]:
    """Return a conversation about one story: four questions without an answer, four with one, in random order."""
    while True:
        story = tales.sample()
        asks = shuffled(kinds, draw)
        turns = [turn for ask in asks for turn in ask(story, draw)]
        n_asked = len({question for question, _, _ in turns})
        n_answered = len({answer for _, answer, _ in turns if answer != REFUSAL})
        if (n_asked, n_answered) == (len(asks), len(asks) // 2):
            break
    bare = [question.removeprefix(f"{story.text}\n") for question, _, _ in turns]
    return conversation([(turns[0][0] if not i else bare[i], *turn[1:]) for i, turn in enumerate(turns)])


def lessons(share: float | str, seed: int, n: int) -> list[tuple[dict[str, str], ...]]:
    """Return `n` lessons, of which exactly a share are refusal lessons, in random order."""
    share, kinds = (0.5, ONE_SIDED) if share == "one-sided" else (float(share), EVEN)
    generator, tales = TaskGenerator(2000 + seed), TaleGenerator(3000 + seed)
    draw = random.Random(f"refusals {seed}").random
    n_refusals = round(share * n)
    found = [refusal_lesson(tales, draw, kinds) for _ in range(n_refusals)]
    return shuffled([*found, *(generator.lesson() for _ in range(n - n_refusals))], draw)


def test_tasks(n: int = N_TEST, seed: int = TEST_SEED) -> list[Task]:
    """Return `n` tasks of each kind: with an answer, then without."""
    tasks = [task for family in (*FAMILIES, HELD_OUT) for task in TaskGenerator(seed).tasks(n, family)]
    draw = random.Random(f"absent {seed}").random
    for kind, ask in ASKS.items():
        for story in TaleGenerator(seed + 1).stories(n):
            tasks.append(Task(kind, conversation(ask(story, draw)), REFUSAL))
    return tasks


def scores(model: GPTModel, tasks: Sequence[Task]) -> list[dict[str, object]]:
    """Return for each kind of task how many answers are right, and how many are refusals."""
    # The earlier turns of a task hold the right answers, so that each is one question to the model.
    written = answers(model, chapter_7.TOKENIZER, chapter_7.FORMAT, [task.prompt for task in tasks], 48)
    rows = []
    for kind in dict.fromkeys(task.family for task in tasks):
        pairs = [(task, said) for task, said in zip(tasks, written, strict=True) if task.family == kind]
        rows.append(
            {
                "kind": kind,
                "n": len(pairs),
                "right": sum(said == task.answer for task, said in pairs),
                "refused": sum(said == REFUSAL for _, said in pairs),
            }
        )
    return rows


def run(
    share: float | str, seed: int, tasks: Sequence[Task], n_steps: int = N_STEPS
) -> list[dict[str, object]]:
    """Tune one model, or take that of before, and return its rows."""
    started = time.process_time()
    model, tokenizer, chat_format = load_difference("tales-3m-instruct")
    if share == "before":
        n_steps = 0
    else:
        taught = lessons(share, seed, n_steps * BATCH_SIZE)
        examples, _ = encode_conversations(
            chat_format, tokenizer, taught, context_length=chapter_7.CONTEXT_LENGTH
        )
        torch.manual_seed(seed)
        tune(
            model,
            chat_batches(examples, BATCH_SIZE, seed=seed, epochs=1),
            n_steps=n_steps,
            learning_rate=LEARNING_RATE,
            n_frozen_rows=tale_encoding().n_vocab,
            loss=answer_loss,
            autocast=torch.bfloat16,
        )
    about = {
        "share": share,
        "seed": seed,
        "steps": n_steps,
        "minutes": round((time.process_time() - started) / 60, 1),
        "hardware": cpu_name(),
        "torch": torch.__version__,
    }
    return [about | row for row in scores(model.eval(), tasks)]


def key(row: dict[str, object]) -> tuple[str, str]:
    """What tells runs apart."""
    return str(row["share"]), str(row["seed"])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = test_tasks()
    jobs: list[tuple[float | str, int]] = [("before", 0)]
    jobs += [(share, seed) for seed in arguments.seeds for share in SHARES]
    for share, seed in jobs:
        if (str(share), str(seed)) not in map(key, read_rows(RESULTS)):
            rows = run(share, seed, tasks)
            replace_rows(RESULTS, COLUMNS, rows, key)
            print(
                share,
                seed,
                rows[0]["minutes"],
                [(r["kind"], r["right"], r["refused"]) for r in rows],
                flush=True,
            )


if __name__ == "__main__":
    main()
