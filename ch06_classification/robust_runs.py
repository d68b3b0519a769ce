"""Attack spam filters by their spelling, and record which of them still recognise the spam.

    python robust_runs.py                      everything that the record lacks, about an hour of one core
    python robust_runs.py --seed 0             only one seed
    python robust_runs.py --model plain FGM    only some models

A filter learns from the training split of the bundled messages and stops by the validation split. Then an attacker
changes each spam message of the test split, step by step, asking the filter about eight ways each time, until it is
called ham or 64 questions are spent (`attack`). Ham is not attacked. Each row of `robust.csv` holds, message by message
of the test split, whether the filter was right: on the messages as they are (family "clean") or under one family of
attacks.

Families: letters exchanged within a word, look-alike letters, marks put into words, words of ham appended. Everything
that an attacker puts in (letters, marks, words) comes from tables that no training saw.

Models: counts of words and letters, and tales-3m with a head, trained whole; the same with two disguised copies of each
training message, ham and spam alike, made by three of the four families, so that each family is once the one that was
held out; and tales-3m trained against shifts of its embeddings (FGM, PGD). "cleaned" and "folded" are the plain model
behind the cleaning of chapter 2, and behind a folding of letters. Epsilon was chosen on validation messages with seed 9
(role "choice"). A run replaces the row of the same model, family, role and seed. One thread is used.
"""

import argparse
import random
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from sklearn.pipeline import Pipeline

from shared.data.corpus import load_sms
from shared.finetuning.adversarial import (
    Edit,
    adversarial_loss,
    append_words,
    attack,
    insert_marks,
    look_alikes,
    swap_letters,
)
from shared.finetuning.augmentation import WORD
from shared.finetuning.classification import encode_texts
from shared.finetuning.tuning import (
    GPTClassifier,
    fine_tune,
    label_logits,
    learning_rate_groups,
    set_trainable,
    summed_label_loss,
)
from shared.notebook.records import load_script, read_rows, replace_row
from shared.pretraining.processes import cpu_name
from shared.text.cleaning import clean
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "robust.csv"
COLUMNS = [
    "model",
    "family",
    "role",
    "seed",
    "cpu_seconds",
    "queries",
    "edits",
    "n",
    "correct",
    "right",
    "hardware",
    "torch",
]
KEY = ("model", "family", "role", "seed")
SEEDS, CHOICE_SEED = (0, 1, 2), 9
BASE, RATE, N_EPOCHS = "tales-3m", 3e-4, 6
N_COPIES, MOST_EDITS, BUDGET, WIDTH = 2, 8, 64, 8
EPSILON = {"FGM": 2.0, "PGD": 2.0}
Score = Callable[[Sequence[str]], np.ndarray]

# --- what an attacker puts in: one table for training, another for attacks


def letters_named(*ways: str) -> dict[str, str]:
    """Return for each letter the characters whose Unicode name is one of some ways to write it."""
    table = {}
    for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        case = "SMALL" if letter.islower() else "CAPITAL"
        found = [f"{way.format(case=case, letter=letter.upper())}" for way in ways]
        table[letter] = "".join(filter(None, (character_named(name) for name in found)))
    return {letter: others for letter, others in table.items() if others}


def character_named(name: str) -> str:
    """Return the character of a Unicode name, or "" if there is none."""
    try:
        return unicodedata.lookup(name)
    except KeyError:
        return ""


def joined(*tables: dict[str, str]) -> dict[str, str]:
    """Return the ways of all tables."""
    return {c: "".join(t.get(c, "") for t in tables) for c in sorted(set().union(*tables))}


CYRILLIC = dict(zip("aceopxyiABEKMHOPCTX", "асеорхуіАВЕКМНОРСТХ", strict=True))
GREEK = dict(zip("aeinoptuvxABEZHIKMNOPTYX", "αειηορτυνχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", strict=True))
LATIN = "LATIN {case} LETTER {letter} WITH "
LOOK_ALIKES = {
    "train": joined(
        CYRILLIC,
        dict(zip("aeiost", "431057", strict=True)),
        letters_named(LATIN + "GRAVE", LATIN + "DIAERESIS"),
    ),
    "attack": joined(
        GREEK,
        dict(zip("abegls", "@86|!$", strict=True)),
        letters_named(LATIN + "ACUTE", LATIN + "DOT BELOW", "FULLWIDTH LATIN {case} LETTER {letter}"),
    ),
}
MARKS = {"train": ("-", ".", "_"), "attack": (" ", "*", "\u200b", "\u00b7")}
FAMILIES = ("swap", "look-alike", "marks", "append")


@cache
def ham_words(part: str) -> tuple[str, ...]:
    """Return words that speak for ham in the training messages: every second one for training, the others to attack."""
    seen: dict[str, Counter[str]] = {"ham": Counter(), "spam": Counter()}
    for message in load_sms("train"):
        seen[message.label].update({found.group().lower() for found in WORD.finditer(message.text)})
    often = [word for word in sorted(seen["ham"]) if seen["ham"][word] >= 8]
    lead = sorted(often, key=lambda word: seen["spam"][word] - seen["ham"][word])[:80]
    return tuple(lead[part == "attack" :: 2])


def edits(part: str) -> dict[str, Edit]:
    """Return the edit of each family, with the tables of "train" or of "attack"."""
    return {
        "swap": swap_letters,
        "look-alike": look_alikes(LOOK_ALIKES[part]),
        "marks": insert_marks(MARKS[part]),
        "append": append_words(ham_words(part)),
    }


def disguised(texts: Sequence[str], families: Sequence[str], seed: int) -> list[str]:
    """Return a copy of each text with one to eight edits of one of some families, drawn by the seed."""
    made, rng = edits("train"), random.Random(f"disguise {seed}")
    copies = []
    for text in texts:
        edit = made[rng.choice(families)]
        for _ in range(rng.randint(1, MOST_EDITS)):
            text = edit(text, rng)
        copies.append(text)
    return copies


def fold(text: str) -> str:
    """Return a text with each character in its plainest form: without accents, widths and what cannot be seen."""
    parts = unicodedata.normalize("NFKD", clean(text))
    return "".join(c for c in parts if not unicodedata.combining(c))


# --- the models


def split(name: str) -> tuple[list[str], np.ndarray]:
    """Return the texts of a split, and 1 for spam, 0 for ham."""
    messages = load_sms(name)
    return [m.text for m in messages], np.array([int(m.label == "spam") for m in messages])


def enlarged(families: Sequence[str], seed: int) -> tuple[list[str], np.ndarray]:
    """Return the training messages, and with families the disguised copies of each, ham and spam alike."""
    texts, targets = split("train")
    copies = [
        copy for k in range(N_COPIES if families else 0) for copy in disguised(texts, families, 10 * seed + k)
    ]
    return texts + copies, np.tile(targets, 1 + len(copies) // len(texts))


def counting(families: Sequence[str], seed: int) -> Score:
    """The strong baseline of chapter 6: words, pairs of words and pieces of letters."""
    spam_runs = load_script(HERE / "spam_runs.py")
    model: Pipeline = spam_runs.counting_model(letters=True)
    model.fit(*enlarged(families, seed))
    return lambda texts: model.predict_proba(list(texts))[:, 1]


def network(
    families: Sequence[str],
    seed: int,
    *,
    epsilon: float | None = None,
    n_steps: int = 1,
    reading: Callable = str,
) -> Score:
    """tales-3m with a head, trained whole; with `epsilon` against shifts of its embeddings."""
    torch.manual_seed(seed)
    body, tokenizer = load_pretrained(BASE), load_tokenizer(BASE)

    def rows(texts: Sequence[str]) -> list[list[int]]:
        # What is left of a text may be nothing.
        return encode_texts(
            tokenizer, [reading(t).strip() or "." for t in texts], body.config.context_length
        )[0]

    classifier = GPTClassifier(body, 2)
    set_trainable(classifier, "all")
    optimizer = torch.optim.AdamW(learning_rate_groups(classifier, RATE, 1e-2), weight_decay=0.05)
    texts, targets = enlarged(families, seed)
    watched, watched_targets = split("validation")
    loss = summed_label_loss
    if epsilon is not None:
        loss = adversarial_loss(summed_label_loss, epsilon=epsilon, n_steps=n_steps)
    fine_tune(
        classifier,
        rows(texts),
        targets,
        (rows(watched), watched_targets),
        optimizer,
        n_epochs=N_EPOCHS // 2 if families else N_EPOCHS,
        seed=seed,
        loss=loss,
    )
    return lambda texts: label_logits(classifier, rows(texts)).softmax(1)[:, 1].numpy()


def without(family: str) -> tuple[str, ...]:
    """All families but one."""
    return tuple(name for name in FAMILIES if name != family)


MODELS: dict[str, Callable[[int], Score]] = {
    "counts": partial(counting, ()),
    **{f"counts, all but {f}": partial(counting, without(f)) for f in FAMILIES},
    "plain": partial(network, ()),
    **{f"copies, all but {f}": partial(network, without(f)) for f in FAMILIES},
    "FGM": partial(network, (), epsilon=EPSILON["FGM"]),
    "PGD": partial(network, (), epsilon=EPSILON["PGD"], n_steps=3),
    "cleaned": partial(network, (), reading=clean),
    "folded": partial(network, (), reading=fold),
}
CHOICES = [
    *((f"FGM {e:g}", partial(network, (), epsilon=e)) for e in (1.0, 4.0, 16.0)),
]

# --- what is run


def judge(
    score: Score, family: str, texts: Sequence[str], targets: np.ndarray, seed: int
) -> dict[str, object]:
    """Return what a model makes of messages, each spam among them attacked by a family, or none."""
    started, n_queries, n_edits = time.process_time(), 0, []
    scores = score(texts)
    right = (scores >= 0.5) == targets.astype(bool)
    if family != "clean":
        edit = edits("attack")[family]
        for i in np.flatnonzero(targets):
            rng = random.Random(f"attack {seed} {texts[i]}")
            found = attack(texts[i], edit, score, rng=rng, budget=BUDGET, width=WIDTH)
            right[i], n_queries = found.score >= 0.5, n_queries + found.n_queries
            if found.n_edits:
                n_edits.append(found.n_edits)
    marks = "".join("01"[int(value)] for value in right)
    return {
        "cpu_seconds": round(time.process_time() - started),
        "queries": n_queries,
        "edits": round(float(np.mean(n_edits)), 2) if n_edits else 0,
        "n": len(marks),
        "correct": marks.count("1"),
        "right": marks,
        "hardware": cpu_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--choices", action="store_true", help="only the trials of epsilon")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = [(name, make, "choice", CHOICE_SEED) for name, make in CHOICES]
    if not arguments.choices:
        plan = [(name, MODELS[name], "test", seed) for seed in arguments.seed for name in arguments.model]
    for name, make, role, seed in plan:
        done = {tuple(row[column] for column in KEY) for row in read_rows(RESULTS)}
        missing = [f for f in ("clean", *FAMILIES) if (name, f, role, str(seed)) not in done]
        if not missing:
            continue
        started = time.process_time()
        score = make(seed)
        trained = time.process_time() - started
        texts, targets = split("validation" if role == "choice" else "test")
        for family in missing:
            row = {"model": name, "family": family, "role": role, "seed": seed}
            row |= judge(score, family, texts, targets, seed)
            replace_row(RESULTS, COLUMNS, row, KEY)
            print(
                f"{name:24} {family:10} {role:6} {seed} {row['correct'] / row['n']:.3f}", end="  ", flush=True
            )
        print(f"{trained:.0f} s", flush=True)


if __name__ == "__main__":
    main()
