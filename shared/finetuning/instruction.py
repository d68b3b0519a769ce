"""From a model that continues texts to one that answers: two new tokens, labels for replies only, batches,
training, replies.

`encode_conversation` knows what is a reply from where it wrote it; nothing is searched for in the ids.
`tune` is the one training loop of `shared.training.loop` with AdamW, and can leave the rows of old tokens
in the embedding as they are.

Left out: several replies to one prompt, weights for conversations, and adapters.

Follows Ouyang et al. (2022, "Training Language Models to Follow Instructions with Human Feedback") for
the supervised step, Hewitt (2021, "Initializing New Word Embeddings for Pretrained Language Models") for
the rows of new tokens.

Explained and proven in ch07_instruction/01_instruction_tuning.ipynb; written from there by `make promote`.
"""

import base64
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shared.checks import check_choice, check_sizes, require, whole_number
from shared.finetuning.conversations import check_conversation
from shared.finetuning.features import batches_by_length
from shared.generation.engine import generate
from shared.generation.streaming import forbid_unknown
from shared.model.gpt import GPTModel
from shared.text.chat_format import ChatFormat, Message
from shared.text.tokenizer import BPETokenizer
from shared.training.batches import IGNORE, Batch, pad_rows, shuffled_rows
from shared.training.loop import Record, StepLoss, summed_next_token_loss, train
from shared.training.schedules import build_schedule
from shared.weights.files import empty_model


def chat_tokenizer(
    tokenizer: BPETokenizer | tiktoken.Encoding, chat_format: ChatFormat | None = None
) -> BPETokenizer:
    """Return a tokenizer with two more tokens behind all others: the start and the end of a message.

    All other ids stay. An encoding of tiktoken is turned into our own class, whose special tokens a `ChatFormat` finds.
    Raises ValueError if the tokenizer has one of the two tokens already.
    """
    chat_format = chat_format or ChatFormat()
    new = (chat_format.start, chat_format.end)
    if isinstance(tokenizer, tiktoken.Encoding):
        tokenizer = _from_tiktoken(tokenizer)
    there = [token for token in new if token in tokenizer.special_ids]
    require("tokenizer", there, not there, f"one without {new[0]} and {new[1]}")
    return BPETokenizer(tokenizer.merges, (*tokenizer.special_tokens, *new), tokenizer.pattern)


def _from_tiktoken(encoding: tiktoken.Encoding) -> BPETokenizer:
    """Return the same tokenizer as our own class, by way of a file of its tokens in the order of their ids."""
    tokens = encoding.token_byte_values()
    by_id = {encoding.encode_single_token(token): token for token in tokens}
    lines = [f"{base64.b64encode(by_id[i]).decode()} {i}\n" for i in range(len(tokens))]
    specials = sorted(encoding.special_tokens_set, key=encoding.encode_single_token)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.tiktoken")
        path.write_text("".join(lines), encoding="utf-8")
        return BPETokenizer.load(path, specials, encoding._pat_str)


@torch.no_grad()
def extend_model(
    model: GPTModel, n_new_tokens: int, context_length: int | None = None, *, seed: int = 0
) -> GPTModel:
    """Return a copy of a model that knows more tokens and may read longer texts; what it knew is unchanged.

    The row of a new token in the embedding, and in an output head that is not tied to it, is the mean of all rows plus
    a little noise, a tenth of the rows' standard deviation, so that two new tokens differ. A new token then has about
    the mean of all logits and takes little probability from the others (Hewitt, 2021).

    Args:
        n_new_tokens: At least 0.
        context_length: Not below the model's own, which None keeps. A learned table of positions cannot grow.
        seed: Of the noise.

    Raises:
        ValueError: A number is out of range, or positions are learned and the context is to be another.
    """
    config, n_new_tokens = model.config, whole_number("n_new_tokens", n_new_tokens, 0)
    length = config.context_length if context_length is None else context_length
    require("context_length", length, length >= config.context_length, f"at least {config.context_length}")
    if config.positions == "learned":
        require("context_length", length, length == config.context_length, "kept where positions are learned")
    changes = {"vocab_size": config.vocab_size + n_new_tokens, "context_length": length}
    if config.rope_scaling != "none":  # what the frequencies were scaled for stays as it was
        changes["rope_original_length"] = config.rope_original_length or config.context_length
    parameter = model.token_embedding.weight
    larger = empty_model(replace(config, **changes), parameter.device, parameter.dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, new in larger.named_parameters():
        old = model.get_parameter(name)
        new[: len(old)] = old
        if len(new) > len(old):
            noise = torch.randn(len(new) - len(old), old.shape[1], generator=generator).to(old)
            new[len(old) :] = old.mean(0) + 0.1 * old.std(0) * noise
    return larger.train(model.training)


Example = tuple[list[int], list[int]]  # ids, and labels: the id where it is to be learned, IGNORE elsewhere
TRAIN_ON = ("answers", "everything")


def encode_conversation(
    chat_format: ChatFormat,
    tokenizer: BPETokenizer,
    messages: Sequence[Message],
    *,
    train_on: str = "answers",
    context_length: int | None = None,
    name: str = "messages",
) -> Example:
    """Return the ids of a conversation, and a label for each: the id itself if it is to be learned, else `IGNORE`.

    What is learned is each reply and its end token, known from the place where they are written, never from a search
    in the ids. A reply is encoded as it will be written: behind the ids that open it. The last id is the end token of
    the last reply.

    Args:
        train_on: "answers", or "everything" to learn all ids.
        context_length: What is longer is cut at its end, so that the model reads at most this many ids.
        name: What errors call the conversation.

    Raises:
        ValueError: As `check_conversation`; the tokenizer lacks the format's special tokens; or the conversation is cut
            before its first answer, so that there is nothing to learn.
    """
    check_choice("train_on", train_on, TRAIN_ON)
    missing = [token for token in (chat_format.start, chat_format.end) if token not in tokenizer.special_ids]
    require("tokenizer", missing, not missing, "one with the format's special tokens, see chat_tokenizer")
    opening, end = chat_format.generation_prompt(tokenizer), tokenizer.special_ids[chat_format.end]
    ids, labels = [], []
    for message in chat_format.complete(check_conversation(messages, name)):
        if message["role"] == "assistant":
            reply = [*tokenizer.encode_ordinary(message["content"]), end]
            ids += opening + reply
            labels += [IGNORE] * len(opening) + reply
            n_used = len(ids)
            closing = tokenizer.encode_ordinary("\n")
            ids += closing
            labels += [IGNORE] * len(closing)
        else:
            part = chat_format.encode_message(tokenizer, message)
            ids += part
            labels += [IGNORE] * len(part)
    # Nothing after the last reply is read; the last id that is left is only predicted.
    n_used = (
        n_used if context_length is None else min(n_used, whole_number("context_length", context_length) + 1)
    )
    if set(labels[1:n_used]) <= {IGNORE}:
        raise ValueError(
            f"{name} must have an answer that begins within {context_length} tokens, got a prompt of "
            f"{next(i for i, label in enumerate(labels) if label != IGNORE)}"
        )
    return ids[:n_used], (labels if train_on == "answers" else ids)[:n_used]


def encode_conversations(
    chat_format: ChatFormat,
    tokenizer: BPETokenizer,
    conversations: Iterable[Sequence[Message]],
    *,
    train_on: str = "answers",
    context_length: int | None = None,
) -> tuple[list[Example], int]:
    """Return `encode_conversation` of each, and how many had to be cut; errors name the place, "conversations[3]"."""
    examples, n_cut = [], 0
    for place, messages in enumerate(conversations):
        name = f"conversations[{place}]"
        example = encode_conversation(chat_format, tokenizer, messages, train_on=train_on, name=name)
        if context_length is not None and len(example[0]) > context_length + 1:
            n_cut += 1
            example = encode_conversation(
                chat_format, tokenizer, messages, train_on=train_on, context_length=context_length, name=name
            )
        examples.append(example)
    require("conversations", len(examples), bool(examples), "at least one")
    return examples, n_cut


def chat_batch(examples: Sequence[Example]) -> Batch:
    """Return examples as one batch, padded on the right to the longest.

    Returns:
        inputs: int64 (examples, longest - 1), the ids of each less the last; the padding repeats id 0, which no real
            token sees.
        targets: int64 (examples, longest - 1), the label of the id that follows, `IGNORE` for prompts and padding.

    Raises:
        ValueError: There is no example, or one has fewer than two ids.
    """
    inputs, _ = pad_rows([ids for ids, _ in examples])
    _, targets = pad_rows([labels for _, labels in examples])
    return inputs, targets


def chat_batches(
    examples: Sequence[Example], batch_size: int, *, seed: int = 0, epochs: int | None = None, pool: int = 8
) -> Iterator[Batch]:
    """Yield batches of examples of similar length, in a new order in each epoch; without end if `epochs` is None.

    `pool` batches at a time are sorted by length and cut, so that little is padding. Raises ValueError if there is no
    example, or a number is below 1.
    """
    require("examples", len(examples), len(examples) > 0, "at least one")
    check_sizes(batch_size=batch_size, pool=pool)
    rng = np.random.default_rng([seed, 1])
    source = shuffled_rows(examples, seed=seed, epochs=epochs)
    while read := list(islice(source, pool * batch_size)):
        read.sort(key=lambda example: len(example[0]))
        batches = [read[i : i + batch_size] for i in range(0, len(read), batch_size)]
        for i in rng.permutation(len(batches)):
            yield chat_batch(batches[i])


def freeze_rows(weight: nn.Parameter, n_rows: int) -> RemovableHandle:
    """Keep the first `n_rows` rows of a matrix as they are in training; `remove()` of what is returned ends it.

    Their gradient becomes zero. An optimizer must not shrink them either: give the matrix no weight decay.
    """
    is_new = (torch.arange(len(weight)) >= n_rows)[:, None].to(weight)
    return weight.register_hook(lambda gradient: gradient * is_new)


def tune(
    model: GPTModel,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    n_steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    n_frozen_rows: int = 0,
    n_warmup: int | None = None,
    loss: StepLoss = summed_next_token_loss,
    **options: Any,
) -> list[Record]:
    """Tune a model on batches of conversations with AdamW, on the loop of `shared.training.loop`; return its log.

    Args:
        batches: Of `chat_batches`; or of `packed_batches`, with `loss=packed_loss` of `shared.finetuning.packing`.
        learning_rate: The highest; it rises over `n_warmup` steps (None: a twentieth of all) and then sinks in a
            straight line to zero.
        weight_decay: On matrices; never on the embeddings.
        n_frozen_rows: That many rows of the token embedding stay as they are: those of the tokens of before.
        loss: As in `train`.
        options: Others of `train`, such as `on_step`, `autocast` and `evaluate_every`.

    Raises:
        ValueError: A number is out of range, or as `train`.
    """
    whole_number("n_steps", n_steps)
    n_warmup = max(1, n_steps // 20) if n_warmup is None else whole_number("n_warmup", n_warmup, 0)
    require("learning_rate", learning_rate, 0 < learning_rate < math.inf, "above 0")
    embedding = model.token_embedding.weight
    n_frozen_rows = whole_number("n_frozen_rows", n_frozen_rows, 0)
    require("n_frozen_rows", n_frozen_rows, n_frozen_rows <= len(embedding), f"at most {len(embedding)}")
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1 and p is not embedding]
    spared = [p for p in model.parameters() if p.requires_grad and (p.dim() < 2 or p is embedding)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.99))
    frozen = freeze_rows(embedding, n_frozen_rows) if n_frozen_rows and embedding.requires_grad else None
    try:
        schedule = build_schedule("linear", n_steps, min(n_warmup, n_steps - 1))
        return train(model, batches, optimizer, n_steps=n_steps, schedule=schedule, loss=loss, **options)
    finally:
        if frozen is not None:
            frozen.remove()


def answer_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the losses of all targets, in nats, as `summed_next_token_loss`, with less work.

    Logits are computed only where there is a target: for long prompts and short replies that spares most of the output
    head's work.
    """
    is_learned = targets != IGNORE
    logits = model.output_head(model.hidden_states(inputs)[is_learned])  # (targets, vocab_size)
    return F.cross_entropy(logits.float(), targets[is_learned], reduction="sum")


def answers(
    model: nn.Module,
    tokenizer: BPETokenizer,
    chat_format: ChatFormat,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
    *,
    batch_size: int = 32,
) -> list[str]:
    """Return the model's reply to each conversation, greedily, without white space around it.

    Prompts of similar length are answered together; the engine pads them on the left. A reply ends at any special
    token, or after `max_new_tokens`. Raises ValueError if a prompt is no conversation or has no room in the context.
    """
    rows = [chat_format.encode(tokenizer, messages) for messages in prompts]
    stops, processors = [*tokenizer.special_ids.values()], forbid_unknown(model, tokenizer)
    replies = [""] * len(rows)
    for places in batches_by_length(rows, batch_size):
        written = generate(
            model, [rows[i] for i in places], max_new_tokens, stop_tokens=stops, processors=processors
        )
        for place, ids in zip(places, written, strict=True):
            replies[place] = tokenizer.decode(ids).strip()
    return replies


def exact_matches(
    families: Sequence[str], replies: Sequence[str], references: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Return for each family how many replies are letter for letter the reference, and how many there are.

    White space at the ends does not count, all else does. Raises ValueError if the numbers differ.
    """
    n = len(families)
    require("replies", len(replies), len(replies) == n, f"{n}, one for each family")
    require("references", len(references), len(references) == n, f"{n}, one for each family")
    found = dict.fromkeys(families, (0, 0))
    for family, reply, reference in zip(families, replies, references, strict=True):
        correct, asked = found[family]
        found[family] = correct + (reply.strip() == reference.strip()), asked + 1
    return found
