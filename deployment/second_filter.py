"""The second content filter: lessons by nine authors, a tuned SmolLM2, and one look at texts that nobody has seen.

    python second_filter.py adapter   tune SmolLM2 by an adapter, checkpoints/filter-lora; half an hour of one core
    python second_filter.py fit       fit the filter, ship it, and score the fresh texts; some minutes

Roles of the texts, none of which has two:
- the lessons (`filter_lessons.tsv`) teach the linear classifier and the adapter;
- the training half of `filter_texts.tsv` says when the adapter's training ends: nothing else, since the rules were
  written on it;
- the test half of the first filter, which the rules have not seen, fits the mix of the signals and the threshold: the
  lowest one at which 95 % of what is blocked is rightly blocked, with scores out of ten folds;
- the fresh texts are scored once.

`filter_fresh.csv` has a row for each text that was scored, in the order of the file: scores, and whether each system
blocks it. Rows of the split `test` hold scores out of the folds.
"""

import argparse
import csv
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from shared.data.corpus import FilterText, load_filter_lessons, load_filter_texts
from shared.finetuning.lora_classifier import train_lora_classifier
from shared.notebook.records import load_script
from shared.safety.filters import SHIPPED, SIGNALS, ContentFilter, adapter_scorer, readable, save_filter
from shared.safety.spelling import Speller, count_words
from shared.weights.pretrained import CHECKPOINTS

HERE = Path(__file__).resolve().parent
first = load_script(HERE / "train_filter.py")
RESULTS = HERE / "filter_fresh.csv"

ADAPTER, BASE = "filter-lora", "smollm2-135m-instruct"
PROMPT = ("Text: ", "\nShould a school's assistant allow or block this text? Answer:")
# As for the messages of the appendix on LoRA.
N_FROZEN, RANK, RATE, HEAD_RATE, N_EPOCHS = 16, 8, 1e-3, 1e-5, 4
SEED = 0


def tune_adapter() -> None:
    """Tune SmolLM2 on the lessons, a quarter of them as the speller writes them, and ship the adapter."""
    started, lessons = time.process_time(), load_filter_lessons()
    speller = Speller(count_words(first.plain_texts(lessons)))
    watched = [row for row in load_filter_texts("train") if not first.is_disguised(row)]
    draw = random.Random(SEED)
    texts = [
        speller.undisguise(row.text) if draw.random() < 0.25 else row.text for row in (*lessons, *watched)
    ]
    n, labels = len(lessons), [row.label for row in watched]
    made = train_lora_classifier(
        texts[:n],
        [row.label for row in lessons],
        base=BASE,
        prompt=PROMPT,
        n_frozen=N_FROZEN,
        rank=RANK,
        learning_rate=RATE,
        head_learning_rate=HEAD_RATE,
        n_epochs=N_EPOCHS,
        watched=(texts[n:], labels),
        seed=SEED,
    )
    minutes = (time.process_time() - started) / 60
    right = sum(map(str.__eq__, made.predict(texts[n:]), labels))
    recipe = {"script": "deployment/second_filter.py", "seed": SEED, "minutes": round(minutes, 1)}
    result = f"{right} of {len(labels)} of the training half of filter_texts.tsv"
    made.save(CHECKPOINTS / ADAPTER, replace=True, dtype=torch.bfloat16, recipe=recipe, result=result)
    print(f"{minutes:.0f} minutes, {result}")


class Signals:
    """What the signals say of texts; see `ContentFilter`."""

    def __init__(self, texts: Sequence[FilterText], speller: Speller, linear: LogisticRegression) -> None:
        plain = [speller.undisguise(row.text) or "?" for row in texts]
        self.verdicts = [first.fixed_verdicts(row.text, speller) for row in texts]
        self.linear = linear.decision_function(first.hashed(plain))
        self.adapter = np.array(
            adapter_scorer(ADAPTER)(
                [readable(row.text, words) for row, words in zip(texts, plain, strict=True)]
            )
        )
        self.columns = {
            "classifier": self.linear[:, None],
            "adapter": self.adapter[:, None],
            "filter": np.column_stack([first.rule_signals(plain), self.linear]),
        }
        self.columns["filter+adapter"] = np.column_stack([self.columns["filter"], self.adapter])


def fit() -> None:
    """Fit what weighs the signals, ship the filter, and score the fresh texts."""
    lessons, every = load_filter_lessons(), load_filter_texts()
    counts = count_words(first.plain_texts(lessons))
    speller = Speller(counts)
    linear = first.fit(
        first.hashed([speller.undisguise(row.text) or "?" for row in lessons]),
        np.array([row.label == "block" for row in lessons]),
        first.PENALTY,
    )
    # The test half of the first filter weighs the signals and sets the threshold, by texts that are not disguised.
    weighed = [row for row in every if row.split == "test" and not first.is_disguised(row)]
    fresh = [row for row in every if row.split == "fresh"]
    blocked = np.array([row.label == "block" for row in weighed])
    known, new = Signals(weighed, speller, linear), Signals(fresh, speller, linear)
    scores, thresholds, mixes = {}, {}, {}
    for name, columns in known.columns.items():
        mixes[name] = first.fit(columns, blocked, 1.0)
        folds = StratifiedKFold(first.N_FOLDS, shuffle=True, random_state=0)
        out = cross_val_predict(mixes[name], columns, blocked, cv=folds, method="decision_function")
        thresholds[name] = first.threshold_for(out, blocked)
        scores[name] = np.concatenate([out, mixes[name].decision_function(new.columns[name])])
        caught = (out > thresholds[name])[blocked].mean()
        print(f"{name:14} threshold {thresholds[name]:6.2f}: {caught:.0%} out of folds", flush=True)
    ship(speller, counts, linear, mixes, thresholds)
    record([*weighed, *fresh], [*known.verdicts, *new.verdicts], scores, thresholds)


def ship(
    speller: Speller,
    counts: dict[str, int],
    linear: LogisticRegression,
    mixes: dict[str, LogisticRegression],
    thresholds: dict[str, float],
) -> None:
    """Write the filter that ships; the classifier's constant goes into that of each mix."""
    weights = []
    for name in ("filter", "filter+adapter"):
        mix = mixes[name]
        factors, n = mix.coef_[0].tolist(), len(SIGNALS)
        constant = mix.intercept_[0] + factors[n - 1] * linear.intercept_[0]
        weights.append([*factors[:n], float(constant), *factors[n:]])
    made = ContentFilter(speller, linear.coef_[0].astype(np.float32), weights[0], thresholds["filter"])
    shutil.rmtree(SHIPPED, ignore_errors=True)
    save_filter(
        made,
        SHIPPED,
        counts,
        with_scorer={"mix": weights[1], "threshold": thresholds["filter+adapter"]},
        recipe={
            "script": "deployment/second_filter.py",
            "penalty": first.PENALTY,
            "precision": first.PRECISION,
        },
    )


def record(
    rows: Sequence[FilterText],
    verdicts: Sequence[dict[str, bool]],
    scores: dict[str, np.ndarray],
    thresholds: dict[str, float],
) -> None:
    """Write `filter_fresh.csv`."""
    columns = ["split", "label", "category", "kind", "origin", *verdicts[0], *scores]
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *(f"{name} score" for name in scores)], lineterminator="\n")
        writer.writeheader()
        for place, row in enumerate(rows):
            found = {name: getattr(row, name) for name in columns[:5]}
            found |= {name: int(value) for name, value in verdicts[place].items()}
            found |= {name: int(values[place] > thresholds[name]) for name, values in scores.items()}
            found |= {f"{name} score": f"{values[place]:.4f}" for name, values in scores.items()}
            writer.writerow(found)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("adapter", "fit"))
    torch.set_num_threads(1)
    {"adapter": tune_adapter, "fit": fit}[parser.parse_args().command]()


if __name__ == "__main__":
    main()
