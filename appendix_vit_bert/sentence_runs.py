"""Record what takes too long for `02_sentence_embeddings.ipynb`: answers from found passages, and MiniLM's features.

    python sentence_runs.py --answers     all questions of story_questions.tsv, three times, to retrieval_answers.csv
    python sentence_runs.py --features    the bundled messages and reviews, to sentence_features.csv
    python sentence_runs.py --uci         the UCI collection (fetched, or from LLM_DATA_DIR), to sentence_features.csv

Answers: SmolLM2 is asked each question without a passage, with the first passage that MiniLM finds, and with the first
that holds the quotation of story_questions.tsv. It writes greedily, at most 24 tokens; the first line is the answer.
The wording was tried on three made-up questions about another text, never on these.

Features: logistic regression on the frozen vectors of MiniLM, with the folds, seeds and head of
`ch06_classification/spam_runs.py`, and on the reviews also that chapter's strong baseline and SmolLM2's features. The
penalty of MiniLM's head is chosen on folds of the bundled messages that are not compared (seed 9); those runs have
the role "choice". Every row holds, text by text, whether the method was right. One thread is used.
"""

import argparse
import csv
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch

from shared.data.corpus import load_reviews, load_sms, load_stories
from shared.data.models import model_file
from shared.finetuning.embeddings import TextEmbedder, load_embedder
from shared.finetuning.instruction import answers
from shared.finetuning.retrieval import SearchIndex, reading_prompt, split_passages
from shared.notebook.records import load_script, read_rows, replace_rows
from shared.text.chat_format import chat_format_of
from shared.weights.gguf import read_gguf
from shared.weights.pretrained import load_pretrained, load_tokenizer

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "story_questions.tsv"
ANSWERS, FEATURES = HERE / "retrieval_answers.csv", HERE / "sentence_features.csv"
ANSWER_COLUMNS = ["number", "passage", "place", "reply"]
READER, MAX_NEW_TOKENS = "smollm2-135m-instruct", 24


spam_runs = load_script(HERE.parent / "ch06_classification" / "spam_runs.py")
FEATURE_COLUMNS = [*spam_runs.COLUMNS, "penalty"]
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3)
KEY = ("data", "method", "detail", "role", "seed")


# --- answers


def story_passages() -> tuple[list[str], list[str]]:
    """Return the passages of all stories, and the title of each one's story."""
    passages, titles = [], []
    for story in load_stories():
        parts = split_passages(story.text)
        passages += parts
        titles += [story.title] * len(parts)
    return passages, titles


def read_questions() -> list[dict[str, str]]:
    """Return the rows of story_questions.tsv."""
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def right_places(question: dict[str, str], passages: list[str], titles: list[str]) -> list[int]:
    """Return the places of the passages that hold one of a question's quotations."""
    quotes = question["evidence"].split(" || ")
    return [
        i
        for i, (passage, title) in enumerate(zip(passages, titles, strict=True))
        if title == question["story"] and any(quote in passage for quote in quotes)
    ]


def record_answers() -> None:
    """Ask all questions in the three ways, and write the replies."""
    questions, (passages, titles) = read_questions(), story_passages()
    embedder = load_embedder()
    index = SearchIndex.build(embedder, passages)
    found = index.search(embedder.embed([q["question"] for q in questions]), 1)[1][:, 0].tolist()
    right = [right_places(question, passages, titles)[0] for question in questions]
    model, tokenizer = load_pretrained(READER, dtype=torch.float32), load_tokenizer(READER)
    chat_format = chat_format_of(read_gguf(model_file(READER)).metadata["tokenizer.chat_template"])
    rows = []
    for way, places in (("none", [None] * len(questions)), ("found", found), ("right", right)):
        prompts = [
            reading_prompt(question["question"], [] if place is None else [passages[place]])
            for question, place in zip(questions, places, strict=True)
        ]
        started = time.perf_counter()
        replies = answers(model, tokenizer, chat_format, prompts, MAX_NEW_TOKENS, batch_size=4)
        print(f"{way}: {time.perf_counter() - started:.0f} s", flush=True)
        for number, (place, reply) in enumerate(zip(places, replies, strict=True)):
            first = " ".join(reply.partition("\n")[0].split())
            rows.append(
                {"number": number, "passage": way, "place": "" if place is None else place, "reply": first}
            )
    replace_rows(ANSWERS, ANSWER_COLUMNS, rows, lambda row: (row["passage"], int(row["number"])))


# --- features


@cache
def embedder() -> TextEmbedder:
    """Return MiniLM, loaded once."""
    return load_embedder()


class EmbeddedTexts(spam_runs.Texts):
    """Labelled texts with MiniLM's vectors."""

    def features(self, **where: object) -> torch.Tensor:
        """Return MiniLM's vector of each text; those of chapter 6 if a block is asked for."""
        if where:
            return super().features(**where)
        if ("minilm",) not in self.known:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.known["minilm",] = embedder().embed(list(self.texts))
            print(self.name, *(str(warning.message) for warning in caught), sep="\n  ", flush=True)
        return self.known["minilm",]


def embedded_reviews() -> EmbeddedTexts:
    """Return the bundled reviews; label 1 is positive."""
    data = EmbeddedTexts("reviews", load_reviews())
    data.targets = np.array([int(row.label == "positive") for row in data.rows])
    return data


def run(data: EmbeddedTexts, method: str, role: str, seed: int, **options: object) -> dict[str, object]:
    """Run a method of chapter 6, or MiniLM's features, and return its row."""
    name = "features" if method == "MiniLM" else method
    row = spam_runs.run(data, name, role, seed, **options) | {"method": method, "detail": ""}
    row["penalty"] = options.get("penalty", "")
    if role == "choice":
        row["detail"] = f"penalty={options['penalty']}"
    replace_rows(FEATURES, FEATURE_COLUMNS, [row], lambda entry: tuple(str(entry[part]) for part in KEY))
    print(
        f"{data.name:12} {method:20} {row['detail']:14} {role:7} {seed} {row['correct'] / row['n']:.3f}",
        flush=True,
    )
    return row


def chosen_penalty() -> float:
    """Return the penalty that is best on the folds of the seed for choices; tried first if the record lacks it."""
    tried = [row for row in read_rows(FEATURES) if row["role"] == "choice"]
    if len(tried) < len(PENALTIES):
        data = EmbeddedTexts("bundled", load_sms())
        for penalty in PENALTIES:
            run(data, "MiniLM", "choice", spam_runs.CHOICE_SEED, penalty=penalty)
        tried = [row for row in read_rows(FEATURES) if row["role"] == "choice"]
    return float(max(tried, key=lambda row: int(row["correct"]))["penalty"])


def record_features(which: list[EmbeddedTexts]) -> None:
    """Judge MiniLM's features on the folds of each data set, and on the bundled sets' test split once."""
    penalty = chosen_penalty()
    for data in which:
        for seed in spam_runs.SEEDS:
            run(data, "MiniLM", "folds", seed, penalty=penalty)
        if not data.name.startswith("uci"):
            run(data, "MiniLM", "test", 0, penalty=penalty)
        if data.name == "reviews":
            for method in ("words and letters", "features"):
                options = {"n_blocks": spam_runs.N_BLOCKS} if method == "features" else {}
                for seed in spam_runs.SEEDS:
                    run(data, method, "folds", seed, **options)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("answers", "features", "uci"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.answers:
        record_answers()
    if arguments.features:
        record_features([EmbeddedTexts("bundled", load_sms()), embedded_reviews()])
    if arguments.uci:
        record_features([EmbeddedTexts(data.name, data.rows) for data in map(spam_runs.uci, (True, False))])


if __name__ == "__main__":
    main()
