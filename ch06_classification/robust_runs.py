"""Attack spam filters by spelling, defend them in several ways, and record what came of it in `robust.csv`.

    python robust_runs.py                       everything that the record lacks
    python robust_runs.py --model "counts" ...  only some models
    python robust_runs.py --role choice         the trials of the radius, on validation messages

An attack changes a spam message, change by change, until the filter takes it for ham: of eight changed texts the one
with the lowest score is kept, and after 64 questions to the filter it gives up. Each filter is attacked by all four
families of changes, and each attack asks the filter that it attacks. What a filter learned to stand is made with other
tables (look-alikes, marks, words) than the attacks use; `left_out` is a family of which it has seen nothing.

Counting filters are judged by five folds of the training and validation messages (seeds 0, 1, 2) and on the test split;
the network, tales-3m tuned whole, on the test split with three seeds: there it learns from the training split and stops
by the validation split. The radius of FGM was chosen on validation messages with another seed, in trials of four
epochs; those rows have the role "choice".

A row for the family "none" has a mark for each message, right or not. The row "ham" says for each ham message how many
of three copies with four random changes (swap, look-alike, mark) are still taken for ham. The other rows have a number
for each spam message: after how many questions it passed (0: without a change), or -1 if it never did. A run replaces
the row of the same key, so the script goes on where it was stopped. One thread is used.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from shared.data.corpus import load_sms
from shared.finetuning.adversarial import (
    Change,
    adversarial_loss,
    append_word,
    attack,
    change_often,
    insert_mark,
    replace_letter,
    swap_letters,
)
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
from shared.safety.spelling import Speller, count_words
from shared.text.cleaning import clean
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "robust.csv"
COLUMNS = ["model", "left_out", "detail", "family", "role", "seed", "cpu_seconds", "n", "outcome"]
COLUMNS += ["changes", "hardware", "torch"]
KEY = ("model", "left_out", "detail", "family", "role", "seed")
SEEDS, CHOICE_SEED = (0, 1, 2), 9

spam_runs = load_script(HERE / "spam_runs.py")

# What copies for training are made with, and what attacks use: no character is in both.
TRAINING_LOOKS = {"a": "а4", "c": "с", "e": "е3", "i": "і", "o": "о0", "p": "р", "s": "ѕ", "x": "х", "y": "у"}
ATTACK_LOOKS = {
    "a": "α@á",
    "c": "ϲç",
    "e": "ε€é",
    "i": "ι1í",
    "l": "ł|",
    "n": "η",
    "o": "ο°ö",
    "s": "$5",
    "t": "τ7",
    "u": "υü",
    "w": "ω",
}
TRAINING_MARKS, ATTACK_MARKS = "._*", " -\u200b"
FAMILIES = ("swap", "look-alike", "mark", "word")
SPELLED = FAMILIES[:3]
ROWS = ("none", "ham", *FAMILIES)
RADIUS, N_STEPS, N_COPIES = 0.5, 2, 2
N_QUERIES, WIDTH, MOST_CHANGES = 64, 8, 8


def ham_words(texts: Sequence[str], targets: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return words of three letters or more that stand in ham only: those for training, and those for attacks."""
    found: tuple[set[str], set[str]] = set(), set()
    for text, target in zip(texts, targets, strict=True):
        found[int(target)].update(re.findall(r"[a-z]{3,}", text.lower()))
    words = sorted(found[0] - found[1])
    random.Random(0).shuffle(words)
    return words[::2], words[1::2]


def changes(texts: Sequence[str], targets: Sequence[int], *, training: bool) -> dict[str, Change]:
    """Return the four families of changes with the tables of training, or with those of attacks."""
    words = ham_words(texts, targets)[0 if training else 1]
    return {
        "swap": swap_letters,
        "look-alike": partial(replace_letter, table=TRAINING_LOOKS if training else ATTACK_LOOKS),
        "mark": partial(insert_mark, marks=TRAINING_MARKS if training else ATTACK_MARKS),
        "word": partial(append_word, words=words),
    }


def with_copies(
    texts: Sequence[str], targets: Sequence[int], known: Mapping[str, Change], seed: int
) -> tuple[list[str], list[int]]:
    """Return the texts with changed copies of each, spam and ham alike: 1 to 8 changes of one family."""
    families, copies, labels = sorted(known), [], []
    for text, target in zip(texts, targets, strict=True):
        rng = random.Random(f"{seed} {text}")
        for _ in range(N_COPIES):
            copies.append(change_often(text, known[rng.choice(families)], rng.randint(1, MOST_CHANGES), rng))
            labels.append(int(target))
    return [*texts, *copies], [*map(int, targets), *labels]


# --- filters: texts in, the probability of spam out


def counting_filter(
    texts: Sequence[str], targets: Sequence[int], prepare: Callable[[str], str]
) -> Callable[[list[str]], np.ndarray]:
    """Return the scores of chapter 6's counts of words and letters."""
    model = spam_runs.counting_model(letters=True)
    model.fit([prepare(text) for text in texts], targets)
    return lambda judged: model.predict_proba([prepare(text) for text in judged])[:, 1]


def network_filter(
    texts: Sequence[str],
    targets: Sequence[int],
    prepare: Callable[[str], str],
    watched: tuple[Sequence[str], Sequence[int]],
    seed: int,
    *,
    radius: float = 0.0,
    n_steps: int = 1,
    n_epochs: int = 6,
) -> Callable[[list[str]], np.ndarray]:
    """Return the scores of tales-3m, tuned whole; with a radius, also on embeddings shifted for the worst."""
    encoding = load_tokenizer(spam_runs.SMALL)
    torch.manual_seed(seed)
    classifier = GPTClassifier(load_pretrained(spam_runs.SMALL), 2)
    set_trainable(classifier, "all")

    def rows(texts: Sequence[str]) -> list[list[int]]:
        length = classifier.body.config.context_length
        return encode_texts(encoding, [prepare(text).strip() or "." for text in texts], length)[0]

    loss = partial(adversarial_loss, radius=radius, n_steps=n_steps) if radius else summed_label_loss
    optimizer = torch.optim.AdamW(learning_rate_groups(classifier, 3e-4, 1e-2), weight_decay=0.05)
    validation = rows(watched[0]), watched[1]
    fine_tune(
        classifier, rows(texts), targets, validation, optimizer, n_epochs=n_epochs, seed=seed, loss=loss
    )
    return lambda judged: label_logits(classifier, rows(judged), 64).softmax(dim=1)[:, 1].numpy()


# name -> (kind, cleaning, learns from copies, steps of the worst shift)
MODELS: dict[str, tuple[str, str, bool, int]] = {
    "counts": ("counts", "none", False, 0),
    "counts, cleaned": ("counts", "chapter 2", False, 0),
    "counts, undisguised": ("counts", "undisguise", False, 0),
    "counts, copies": ("counts", "none", True, 0),
    "network": ("network", "none", False, 0),
    "network, undisguised": ("network", "undisguise", False, 0),
    "network, copies": ("network", "none", True, 0),
    "network, FGM": ("network", "none", False, 1),
    "network, PGD": ("network", "none", False, N_STEPS),
    "network, undisguised, FGM": ("network", "undisguise", False, 1),
    "network, undisguised, copies, FGM": ("network", "undisguise", True, 1),
}
ONE_SEED = {"network, PGD"}  # it is only asked whether a second step matters
NETWORK_LEFT_OUT = "swap"  # the family that no cleaning here knows
RADII = (0.5, 1.0)


def build(
    name: str,
    left_out: str,
    learned: tuple[Sequence[str], Sequence[int]],
    watched: tuple[Sequence[str], Sequence[int]],
    seed: int,
    **options: object,
) -> Callable[[list[str]], np.ndarray]:
    """Return the scores of a model of `MODELS`, trained."""
    kind, cleaning, copies, n_steps = MODELS[name]
    texts, targets = learned
    prepare = {"none": str, "chapter 2": clean}.get(cleaning) or Speller(count_words(texts)).undisguise
    if copies:
        known = changes(texts, targets, training=True)
        known.pop(left_out)
        texts, targets = with_copies(texts, targets, known, seed)
    if kind == "counts":
        return counting_filter(texts, targets, prepare)
    # With copies an epoch has three times as many steps.
    usual = {"radius": RADIUS if n_steps else 0.0, "n_steps": max(n_steps, 1), "n_epochs": 3 if copies else 6}
    return network_filter(texts, targets, prepare, watched, seed, **usual | options)


def harmless(
    texts: Sequence[str], tricks: Mapping[str, Change], score: Callable[[list[str]], np.ndarray]
) -> list[int]:
    """Return how many of three changed copies of each ham are still taken for ham: four changes of one family each.

    Honest people have typing errors, accents and hyphens, too.
    """
    copies = [
        change_often(text, tricks[family], 4, random.Random(f"ham {family} {text}"))
        for text in texts
        for family in SPELLED
    ]
    return (np.asarray(score(copies)) < 0.5).reshape(-1, len(SPELLED)).sum(axis=1).tolist()


# --- what is run


def parts(data: object, role: str, seed: int, kind: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (learned, watched, judged) places: five folds, or the test split, or the validation split for choices."""
    train, validation, test = (np.flatnonzero(data.splits == s) for s in ("train", "validation", "test"))
    if role == "folds":
        return [(learned, learned[:0], judged) for learned, judged in spam_runs.folds(data, seed)]
    if role == "choice":
        return [(train, validation, validation)]
    learned = train if kind == "network" else np.concatenate([train, validation])
    return [(learned, validation, test)]


def judge(
    data: object, name: str, left_out: str, role: str, seed: int, wanted: Sequence[str], **options: object
) -> None:
    """Train a model as the role wants it, attack it by the wanted families, and record a row for each."""
    kind, done = MODELS[name][0], {family: ([], [], 0.0) for family in wanted}
    for learned, watched, judged in parts(data, role, seed, kind):
        started = time.process_time()
        pair = list(data.texts[learned]), data.targets[learned]
        score = build(
            name, left_out, pair, (list(data.texts[watched]), data.targets[watched]), seed, **options
        )
        right = (np.asarray(score(list(data.texts[judged]))) >= 0.5) == data.targets[judged]
        spent = {"none": time.process_time() - started}
        tricks = changes(*pair, training=False)
        if "none" in wanted:
            done["none"][0].extend(zip(judged, right.astype(int), strict=True))
        if "ham" in wanted:
            ham = judged[data.targets[judged] == 0]
            done["ham"][0].extend(zip(ham, harmless(data.texts[ham], tricks, score), strict=True))
        # Each family asks this very filter.
        spam = judged[data.targets[judged] == 1]
        for family in [name for name in FAMILIES if name in wanted]:
            started, change = time.process_time(), tricks[family]
            found = attack(list(data.texts[spam]), score, change, n_queries=N_QUERIES, width=WIDTH, seed=seed)
            passed = [one.n_queries if one.score < 0.5 else -1 for one in found]
            done[family][0].extend(zip(spam, passed, strict=True))
            done[family][1].extend(one.n_changes for one in found if one.score < 0.5 and one.n_changes)
            spent[family] = time.process_time() - started
        done = {f: (o, c, seconds + spent.get(f, 0.0)) for f, (o, c, seconds) in done.items()}
    detail = " ".join(f"{key}={value}" for key, value in options.items())
    for family, (outcome, n_changes, seconds) in done.items():
        values = [int(value) for _, value in sorted(outcome)]
        row = {"model": name, "left_out": left_out, "detail": detail, "family": family, "role": role}
        row |= {"seed": seed, "cpu_seconds": round(seconds), "n": len(values)}
        row["outcome"] = ("" if family in ("none", "ham") else " ").join(map(str, values))
        row["changes"] = round(float(np.mean(n_changes)), 1) if n_changes else ""
        replace_row(RESULTS, COLUMNS, row | {"hardware": cpu_name(), "torch": torch.__version__}, KEY)
    print(f"{name:36} {left_out:11} {detail:10} {role:7} {seed}", *summary(done), flush=True)


def summary(done: Mapping[str, tuple[list, list, float]]) -> list[str]:
    """Return for each family the share that held, as text."""
    best = {"none": 1, "ham": len(SPELLED)}
    shares = {
        family: np.mean([value == best.get(family, -1) for _, value in outcome])
        for family, (outcome, *_) in done.items()
    }
    return [f"{family} {share:.3f}" for family, share in shares.items()]


def jobs() -> list[tuple[str, str, str, int, dict[str, object]]]:
    """All runs, as (model, left out, role, seed, options)."""
    trials = [("network", {}), *(("network, FGM", {"radius": radius}) for radius in RADII)]
    found = [(name, "", "choice", CHOICE_SEED, changed | {"n_epochs": 4}) for name, changed in trials]
    for name, (kind, _, copies, _) in MODELS.items():
        roles = ("folds", "test") if kind == "counts" else ("test",)
        for role in roles:
            # On the test split nothing of a counting model is random but its copies and the attack.
            for seed in SEEDS[:1] if name in ONE_SEED else SEEDS:
                left_out = [""] if not copies else FAMILIES if kind == "counts" else [NETWORK_LEFT_OUT]
                found += [(name, family, role, seed, {}) for family in left_out]
    # All seeds of one model are less use than one seed of each.
    return sorted(found, key=lambda job: (job[2] != "choice", MODELS[job[0]][0] == "network", job[3]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--role", nargs="+", choices=("choice", "folds", "test"), default=["choice", "folds", "test"]
    )
    parser.add_argument("--seed", nargs="+", type=int, default=[*SEEDS, CHOICE_SEED])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = spam_runs.Texts("bundled", load_sms())
    recorded = {tuple(row[name] for name in KEY) for row in read_rows(RESULTS)} if RESULTS.exists() else set()
    for name, left_out, role, seed, options in jobs():
        if name not in arguments.model or role not in arguments.role or seed not in arguments.seed:
            continue
        detail = " ".join(f"{key}={value}" for key, value in options.items())
        wanted = [family for family in ROWS if role != "choice" or family != "ham"]
        rows = [
            family for family in wanted if (name, left_out, detail, family, role, str(seed)) not in recorded
        ]
        if rows:
            judge(data, name, left_out, role, seed, rows, **options)


if __name__ == "__main__":
    main()
