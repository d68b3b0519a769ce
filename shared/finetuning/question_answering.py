"""Answers that are spans of a text: two scores for each token, the best span of all windows, and silence
where there is no answer.

`load_reader("tales-reader")` answers questions about tales; `Reader.examples`, `span_batches` and
`span_loss` train one on questions of your own.

Left out: answers that join several places, yes and no, counting, and choosing among windows by a
probability over all of them.

Follows Rajpurkar et al. (2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text"), Rajpurkar,
Jia and Liang (2018, "Know What You Don't Know: Unanswerable Questions for SQuAD") and Devlin et al.
(2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding").

Explained and proven in ch07_instruction/03_question_answering.ipynb; written from there by `make promote`.
"""

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.checks import check_sizes, check_text, plain_number, require, whole_number
from shared.finetuning.differences import add_difference, difference_tensors
from shared.finetuning.features import batches_by_length, pad_inputs, weights_hash
from shared.finetuning.spans import Span, Window, cut_windows, to_characters, to_tokens, token_spans
from shared.generation.engine import evaluating
from shared.generation.streaming import Tokenizer
from shared.model.gpt import GPTModel
from shared.weights.files import write_folder
from shared.weights.pretrained import CHECKPOINTS, load_pretrained, load_tokenizer


def best_span(scores: Tensor, max_tokens: int) -> tuple[float, Span]:
    """Return the best sum of a score as first and a score as last, and that span of at most `max_tokens` tokens.

    Args:
        scores: (tokens, 2), of each token as the first and as the last. Of equal sums the shortest span counts.
    """
    first, last = scores.unbind(-1)
    best, span = -math.inf, (0, 1)
    for length in range(1, min(max_tokens, len(first)) + 1):
        sums = first[: len(first) - length + 1] + last[length - 1 :]  # of the span from each place on
        place = int(sums.argmax())
        if sums[place] > best:
            best, span = float(sums[place]), (place, place + length)
    return best, span


WindowBatch = tuple[Tensor, Tensor, Tensor]


def window_batch(windows: Sequence[Window]) -> WindowBatch:
    """Return windows as a batch: ids, which places are real, and where an answer may be, each (windows, longest)."""
    ids, mask = pad_inputs([window.ids for window in windows])
    allowed = torch.zeros_like(mask)
    for row, window in zip(allowed, windows, strict=True):
        row[window.offset : window.null + 1] = True
    return ids, mask, allowed


class SpanModel(nn.Module):
    """A GPT with two scores for each token in place of its output head: as the first of an answer, and as the last.

    Follows Devlin et al. (2019, "BERT"), sections 4.2 and 4.3. The head begins with zeros: allowed places are equal.

    Args:
        body: The GPT whose states (the vectors after its last block) the head reads.
        bidirectional: Whether tokens see those after them, too. If so, the attention of `body` itself is changed.
    """

    def __init__(self, body: GPTModel, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.body, self.bidirectional = body, bidirectional
        for block in body.blocks if bidirectional else ():
            block.attention.causal = False
        self.head = nn.Linear(body.config.emb_dim, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: WindowBatch) -> Tensor:
        """Return the scores (windows, tokens, 2), minus infinity at places where no answer may begin or end."""
        ids, mask, allowed = batch
        # Padding stands on the right, so without looking ahead no real token sees it and no mask is needed.
        options = {"key_padding_mask": mask} if self.bidirectional else {}
        scores = self.head(self.body.hidden_states(ids, **options)).float()
        return scores.masked_fill(~allowed[..., None], -math.inf)


def span_loss(model: SpanModel, batch: WindowBatch, targets: Tensor) -> Tensor:
    """Return the sum of -log p of all first and last places; `targets` are those of `Window.target`, (windows, 2)."""
    return F.cross_entropy(model(batch), targets, reduction="sum")


@dataclass(frozen=True)
class Answer:
    """What a reader found: `text` is `passage[start:end]`, or "" for no answer, and then `start` and `end` are 0.

    `margin` says by how much the score of the best span is above that of "no answer"; it is given for silence, too.
    """

    text: str
    start: int
    end: int
    margin: float


@dataclass
class Reader:
    """Question and passage in, a span of the passage out.

    Attributes:
        model: Gives the scores.
        encoding: The tokenizer of the model's body.
        threshold: An answer is given if its margin is at least this.
        overlap: How many tokens of the passage neighbouring windows share.
        max_tokens: How many tokens the longest answer may have.
    """

    model: SpanModel
    encoding: Tokenizer
    threshold: float = 0.0
    overlap: int = 48
    max_tokens: int = 16

    def __post_init__(self) -> None:
        """Refuse a threshold that is no number, a negative overlap, and answers of no token (ValueError, TypeError)."""
        number = plain_number(self.threshold)
        require("threshold", self.threshold, number is not None and not math.isnan(number), "a number")
        whole_number("overlap", self.overlap, 0)
        whole_number("max_tokens", self.max_tokens)

    def windows(self, question: str, passage: str) -> tuple[list[Window], list[Span]]:
        """Return what the model reads for one question, and the characters of the passage's tokens.

        Raises:
            ValueError: Question or passage is empty, or the question too long for the model.
            TypeError: One is no text.
        """
        for name, text in (("question", question), ("passage", passage)):
            check_text(name, text)
            require(name, text[:40], bool(text.strip()), "a text that is not empty")
        ids, spans = token_spans(self.encoding, passage)
        windows = cut_windows(
            self.encoding.encode_ordinary(f"{question.strip()}\n"),
            ids,
            self.encoding.eot_token,
            context_length=self.model.body.config.context_length,
            overlap=self.overlap,
        )
        return windows, spans

    def examples(self, question: str, passage: str, start: int, answer: str) -> list[tuple[Window, Span]]:
        """Return the windows of a question whose answer is known, each with its two right places.

        Args:
            start: Where the answer begins in the passage; any number if `answer` is "", for a question without one.

        Raises:
            ValueError: The passage does not have the answer at `start`; and as in `windows`.
            TypeError: As `windows`.
        """
        windows, spans = self.windows(question, passage)
        check_text("answer", answer)
        if not answer:
            return [(window, (window.null, window.null)) for window in windows]
        found = passage[start : start + len(answer)] if start >= 0 else ""
        require("answer", answer, found == answer, f"what the passage has at {start}, {found[:40]!r}")
        tokens = to_tokens(spans, start, start + len(answer))
        return [(window, window.target(*tokens)) for window in windows]

    @torch.no_grad()
    def answer_all(
        self, questions: Sequence[str], passages: Sequence[str], batch_size: int = 16
    ) -> list[Answer]:
        """Return the answer to each question from its own passage.

        Raises:
            ValueError: There are not as many passages as questions; and as in `windows`.
            TypeError: As `windows`.
        """
        n = len(questions)
        require("passages", len(passages), len(passages) == n, f"{n}, one for each question")
        found = [self.windows(*pair) for pair in zip(questions, passages, strict=True)]
        owners = [(number, window) for number, (windows, _) in enumerate(found) for window in windows]
        best, null = [(-math.inf, (0, 1))] * n, [math.inf] * n
        # The best span of all windows of a question, and the least of their scores for "no answer".
        with evaluating(self.model):
            for places in batches_by_length([window.ids for _, window in owners], batch_size):
                scores = self.model(window_batch([owners[i][1] for i in places]))
                for row, i in zip(scores, places, strict=True):
                    number, window = owners[i]
                    score, (first, stop) = best_span(row[window.offset : window.null], self.max_tokens)
                    null[number] = min(null[number], float(row[window.null].sum()))
                    if score > best[number][0]:
                        best[number] = score, (first + window.start, stop + window.start)
        # From tokens to characters, or to silence.
        answers = []
        for passage, (_, spans), (score, tokens), nothing in zip(passages, found, best, null, strict=True):
            start, end = to_characters(passage, spans, *tokens)
            margin = score - nothing
            given = margin >= self.threshold and start < end
            answers.append(
                Answer(passage[start:end] if given else "", *((start, end) if given else (0, 0)), margin)
            )
        return answers

    def answer(self, question: str, passage: str) -> Answer:
        """Return the answer to one question; errors as `answer_all`."""
        return self.answer_all([question], [passage])[0]

    def save(
        self, folder: str | os.PathLike[str], base: str, *, replace: bool = False, **details: object
    ) -> None:
        """Write a folder that `load_reader` reads: the head, and the body as its difference to a base, in bfloat16.

        Args:
            folder, replace: See `shared.weights.files.write_folder`, where the errors stand too.
            base: What `load_pretrained` calls the model that the body was before training.
            details: How the reader came about, for reader.json.

        Raises:
            ValueError: The body has another shape or other tensors than the base.
        """
        before, body = load_pretrained(base, dtype=torch.float32), self.model.body
        require("body", "another shape", body.config == before.config, f"of the shape of {base}")
        changes = difference_tensors(base, before, body)
        tensors = {f"body.{name}": change for name, change in changes.items()}
        tensors |= {f"head.{name}": p.detach() for name, p in self.model.head.named_parameters()}
        about = {"base": base, "base_sha256": weights_hash(before), "bidirectional": self.model.bidirectional}
        about |= {name: getattr(self, name) for name in _SETTINGS}
        write_folder(folder, {"reader.json": about | details}, tensors, replace=replace)


def span_batches(
    examples: Iterable[tuple[Window, Span]], batch_size: int, *, pool: int = 4, seed: int = 0
) -> Iterator[tuple[WindowBatch, Tensor]]:
    """Yield (batch, targets): examples for `pool` batches are read, sorted by length, and the batches shuffled.

    What does not fill a batch at the end of the source makes a smaller one. Raises ValueError if a number is
    below 1.
    """
    check_sizes(batch_size=batch_size, pool=pool)
    source, draw = iter(examples), random.Random(seed)
    while read := list(islice(source, pool * batch_size)):
        read.sort(key=lambda example: len(example[0].ids))
        batches = [read[i : i + batch_size] for i in range(0, len(read), batch_size)]
        draw.shuffle(batches)
        for batch in batches:
            yield window_batch([window for window, _ in batch]), torch.tensor([target for _, target in batch])


_SETTINGS = ("threshold", "overlap", "max_tokens")


def load_reader(name_or_folder: str | os.PathLike[str]) -> Reader:
    """Return a reader that comes with the course, such as "tales-reader", or from a folder that `Reader.save` wrote.

    Raises:
        ValueError: The name is unknown, a file is damaged or does not fit, or the base has other weights here.
        FileNotFoundError: The folder lacks a file.
    """
    known = sorted(path.parent.name for path in CHECKPOINTS.glob("*/reader.json"))
    folder = CHECKPOINTS / name_or_folder if name_or_folder in known else Path(name_or_folder)
    require("name_or_folder", os.fspath(name_or_folder), folder.is_dir(), f"{', '.join(known)} or a folder")
    text = (folder / "reader.json").read_text(encoding="utf-8")
    try:
        about = json.loads(text)
        settings = {name: about[name] for name in _SETTINGS}
        base, expected, bidirectional = about["base"], about["base_sha256"], bool(about["bidirectional"])
        tensors = load_file(folder / "model.safetensors")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no reader that can be read: {error!r}") from error
    body = load_pretrained(base, dtype=torch.float32)
    require(
        "folder", os.fspath(folder), weights_hash(body) == expected, f"made for the {base} of this machine"
    )
    # Base plus difference; the head has no base and is stored in full.
    model = SpanModel(body, bidirectional=bidirectional)
    parts = {
        part: {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
        for part in ("body.", "head.")
    }
    require(
        "folder", sorted(tensors), sum(map(len, parts.values())) == len(tensors), "of a body and a head alone"
    )
    add_difference(body, parts["body."], body, os.fspath(folder))
    try:
        model.head.load_state_dict(parts["head."])
    except RuntimeError as error:
        raise ValueError(f"{folder} holds no head of two scores: {error}") from error
    return Reader(model.eval(), load_tokenizer(base), **settings)


def fit_threshold(margins: Sequence[float], f1: Sequence[float], unanswerable: Sequence[bool]) -> float:
    """Return the margin from which on an answer should be given, so that the mean F1 is highest.

    Args:
        margins: Of each question, as in `Answer`.
        f1: What each answer is worth if it is given; for an unanswerable question it does not matter.
        unanswerable: Whether silence is right.

    Raises:
        ValueError: The numbers of questions differ or are 0, or a margin is not finite.
    """
    n = len(margins)
    require("margins", n, n > 0, "of at least one question")
    for name, values in (("f1", f1), ("unanswerable", unanswerable)):
        require(name, len(values), len(values) == n, f"{n}, one for each question")
    order = torch.tensor(margins, dtype=torch.float64).sort(descending=True, stable=True)
    require("margins", "others", bool(order.values.isfinite().all()), "finite")
    silent = torch.tensor(unanswerable, dtype=torch.float64)[order.indices]
    given = torch.tensor(f1, dtype=torch.float64)[order.indices] * (1 - silent)
    # What k answers are worth together with the silence on all others.
    zero = torch.zeros(1, dtype=torch.float64)
    worth = torch.cat([zero, given.cumsum(0)]) + silent.sum() - torch.cat([zero, silent.cumsum(0)])
    worth[1:-1][order.values[1:] == order.values[:-1]] = -1  # equal margins fall together
    k = int(worth.argmax())
    if k == 0:
        return math.nextafter(float(order.values[0]), math.inf)
    return float(order.values[k - 1]) if k == n else float(order.values[k - 1] + order.values[k]) / 2
