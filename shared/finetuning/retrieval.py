"""Search in texts, by meaning and by words, and what a reader is given of it.

`SearchIndex` compares a question with every vector; its folder names the model that made them. `BM25` is
the opponent that needs no model. `recall_at` judges both.

Left out: approximate search, changing an index in place, stemming and stop words, and models that read
question and passage together to sort what was found.

Follows Karpukhin et al. (2020, "Dense Passage Retrieval for Open-Domain Question Answering") and
Robertson and Zaragoza (2009, "The Probabilistic Relevance Framework: BM25 and Beyond").

Explained and proven in ch07_instruction/03_question_answering.ipynb and
appendix_vit_bert/02_sentence_embeddings.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.checks import check_between, check_path, check_several, check_text, require, whole_number
from shared.finetuning.embeddings import TextEmbedder
from shared.finetuning.evaluation import rouge_words
from shared.text.chat_format import Message
from shared.weights.files import write_folder


class BM25:
    """Search by words: the score of a text is a sum over the query's words that stand in it.

    A word counts more if fewer texts have it, and more the more often it stands in this text, though ever less so, and
    less in a long text.

    Args:
        texts: What is searched.
        k1: How slowly repetitions lose their value.
        b: How much the length counts, from 0 (not at all) to 1 (fully).

    Raises:
        ValueError: There is no text, `k1` is below 0, or `b` not between 0 and 1.
        TypeError: `texts` is one text, or holds something else.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        check_several("texts", texts)
        require("texts", len(texts), len(texts) > 0, "at least one")
        require("k1", k1, k1 >= 0, "at least 0")
        check_between("b", b, 0, 1)
        counts = [Counter(rouge_words(text)) for text in texts]
        lengths = np.array([count.total() for count in counts])
        penalty = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        self.n_texts = len(texts)
        # For each word the texts that have it, and what it adds to their scores.
        found: dict[str, list[tuple[int, float]]] = {}
        for place, count in enumerate(counts):
            for word, n in count.items():
                found.setdefault(word, []).append((place, n * (k1 + 1) / (n + penalty[place])))
        self.added: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, entries in found.items():
            rarity = math.log(1 + (len(texts) - len(entries) + 0.5) / (len(entries) + 0.5))
            places, gains = zip(*entries, strict=True)
            self.added[word] = np.array(places), rarity * np.array(gains)

    def scores(self, query: str) -> np.ndarray:
        """Return the score of each text, float64 (texts,); 0 where it has no word of the query."""
        total = np.zeros(self.n_texts)
        for word in rouge_words(query):
            if word in self.added:
                places, gains = self.added[word]
                total[places] += gains
        return total


def recall_at(ranked: Sequence[Sequence[int]], right: Sequence[Collection[int]], k: int) -> float:
    """Return the share of the questions that have a right passage among the first `k`.

    Args:
        ranked: For each question the places of passages, the best first, at least `k`.
        right: For each question the places of the passages that answer it, at least one.
        k: How many are looked at.

    Raises:
        ValueError: The numbers of questions differ or are 0, `k` is below 1 or above what was ranked, or a question has
            no right passage.
    """
    require(
        "right", len(right), 0 < len(right) == len(ranked), f"{max(1, len(ranked))}, one for each question"
    )
    shortest = min(len(places) for places in ranked)
    require("k", k, whole_number("k", k) <= shortest, f"at most {shortest}, the places that were ranked")
    require("right", "an empty one", all(right), "places of at least one passage each")
    hits = [
        any(int(place) in wanted for place in places[:k])
        for places, wanted in zip(ranked, right, strict=True)
    ]
    return sum(hits) / len(hits)


def combined_scores(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """Return two searches as one: (1 - weight) times the first plus weight times the second, on the same scale.

    The scores of each question are given the mean 0 and the standard deviation 1 over the texts; where all are equal
    they are 0.

    Args:
        first, second: Scores (questions, texts).
        weight: From 0, the first alone, to 1.

    Raises:
        ValueError: The shapes differ, or the weight is not between 0 and 1.
    """
    require(
        "second", second.shape, first.ndim == 2 and first.shape == second.shape, f"{first.shape} as first"
    )
    check_between("weight", weight, 0, 1)
    parts = []
    for scores in (first, second):
        spread = scores.std(axis=1, keepdims=True)
        parts.append((scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1))
    return (1 - weight) * parts[0] + weight * parts[1]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+")


def split_passages(text: str, max_words: int = 150) -> list[str]:
    """Return a text in passages of at most `max_words` words: whole paragraphs, as many as fit together.

    Paragraphs stand apart by empty lines. One that is too long is cut between sentences, and a sentence between words.

    Raises:
        ValueError: The text is empty, or `max_words` is below 1.
        TypeError: It is no text.
    """
    check_text("text", text)
    whole_number("max_words", max_words)
    require("text", text[:40], bool(text.strip()), "a text that is not empty")
    passages: list[list[str]] = []
    room = 0  # in the last passage
    for paragraph in text.split("\n\n"):
        # What cannot be parted any more: the paragraph, or else its sentences, or else so many words.
        parts = [paragraph.strip()]
        if len(paragraph.split()) > max_words:
            parts = [
                " ".join(words[start : start + max_words])
                for words in map(str.split, _SENTENCE_END.split(paragraph))
                for start in range(0, len(words), max_words)
            ]
        for number, part in enumerate(filter(None, parts)):
            n_words = len(part.split())
            if n_words > room:
                passages.append([part])
                room = max_words
            else:
                passages[-1] += [" " if number else "\n\n", part]
            room -= n_words
    return ["".join(passage) for passage in passages]


@dataclass(frozen=True)
class Hit:
    """A text that was found: its place in the index, the cosine with the question, and the text."""

    place: int
    score: float
    text: str


class SearchIndex:
    """Texts and their vectors, searched exactly: every vector is compared.

    Args:
        texts: At least one.
        vectors: float32 (texts, width), each of length 1.
        about: What the vectors depend on, as `TextEmbedder.about` says it.

    Raises:
        ValueError: There is no text, or the vectors do not fit or are not of length 1.
        TypeError: `texts` is one text, or holds something else.
    """

    def __init__(self, texts: Sequence[str], vectors: Tensor, about: Mapping[str, str] | None = None) -> None:
        check_several("texts", texts)
        for place, text in enumerate(texts):
            check_text(f"texts[{place}]", text)
        require("texts", len(texts), len(texts) > 0, "at least one")
        shape, vectors = tuple(vectors.shape), vectors.float().cpu()
        require("vectors", shape, len(shape) == 2 and shape[0] == len(texts), f"({len(texts)}, width)")
        lengths = vectors.norm(dim=1)
        require("vectors", "others", bool(((lengths - 1).abs() < 1e-3).all()), "of length 1")
        self.texts, self.vectors, self.about = list(texts), vectors, dict(about or {})

    @classmethod
    def build(cls, embedder: TextEmbedder, texts: Sequence[str], **options: Any) -> "SearchIndex":
        """Return the index of texts; `options` are those of `TextEmbedder.embed`, where the errors stand too."""
        return cls(texts, embedder.embed(texts, **options), embedder.about())

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the `k` best scores and places for each query, the best first, both (queries, k).

        Args:
            queries: (queries, width), each of length 1.
            k: At most the number of texts.

        Raises:
            ValueError: The width is not the index's, or `k` is below 1 or above the number of texts.
        """
        width, n = self.vectors.shape[1], len(self.texts)
        shape = tuple(queries.shape)
        require("queries", shape, queries.dim() == 2 and shape[1] == width, f"(queries, {width})")
        require("k", k, whole_number("k", k) <= n, f"at most {n}, the number of texts")
        # A few hundred at a time: all scores at once could be more than the memory holds.
        parts = [(some @ self.vectors.T).topk(k) for some in queries.float().cpu().split(256)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def find(self, embedder: TextEmbedder, question: str, k: int = 3) -> list[Hit]:
        """Return the `k` texts that are nearest to a question, the best first.

        It looks at all weights of the embedder; for many questions call `check` once, and then `search`.

        Raises:
            ValueError: The embedder is not the one that the index was made with, the question is empty, or `k` is not
                from 1 to the number of texts.
            TypeError: The question is no text.
        """
        check_text("question", question)
        self.check(embedder)
        scores, places = self.search(embedder.embed([question]), k)
        return [
            Hit(i, score, self.texts[i])
            for i, score in zip(places[0].tolist(), scores[0].tolist(), strict=True)
        ]

    def check(self, embedder: TextEmbedder) -> None:
        """Refuse an embedder whose vectors cannot be compared with the index's (ValueError)."""
        for name, value in embedder.about().items():
            stored = self.about.get(name, value)
            require(
                "embedder",
                f"{value:.12}",
                stored == value,
                f"one with {name} {stored:.12}, as the index has it",
            )

    def save(self, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Write a folder that `load` reads; see `shared.weights.files.write_folder`, where the errors stand too."""
        about = {"about": self.about, "texts": self.texts}
        write_folder(folder, {"index.json": about}, {"vectors": self.vectors}, replace=replace)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], embedder: TextEmbedder | None = None) -> "SearchIndex":
        """Return the index in a folder.

        Args:
            folder: What `save` wrote.
            embedder: If given, the vectors must be its own.

        Raises:
            ValueError: A file is damaged, the files do not fit together, or the index was made with another model.
            FileNotFoundError: A file is missing.
        """
        check_path("folder", folder)
        try:
            content = json.loads(Path(folder, "index.json").read_text(encoding="utf-8"))
            with safe_open(Path(folder, "model.safetensors"), "pt") as file:
                vectors = file.get_tensor("vectors")
            index = cls(content["texts"], vectors, content["about"])
        except (
            SafetensorError,
            UnicodeDecodeError,
            json.JSONDecodeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"{os.fspath(folder)} must hold an index that is whole: {error}") from error
        if embedder is not None:
            index.check(embedder)
            require(
                "width",
                vectors.shape[1],
                vectors.shape[1] == embedder.width,
                f"the embedder's, {embedder.width}",
            )
        return index


def reading_prompt(question: str, passages: Sequence[str] = ()) -> list[Message]:
    """Return the conversation that asks a chat model a question, with passages to read before it, or none.

    Raises TypeError if something is no text, or `passages` is one.
    """
    check_text("question", question)
    check_several("passages", passages)
    asked = f"Question: {question}\nAnswer with a few words."
    text = "\n\n".join(passages)
    if text:
        asked = f"Read this text.\n\n{text}\n\n{asked}\nUse only the text."
    return [{"role": "user", "content": asked}]
