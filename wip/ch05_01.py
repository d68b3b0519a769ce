# %% [markdown]
# # The training loop: from likelihood to a model that writes
#
# You will write the loop that every language model in this course is trained with, prove its loss, its optimiser and its steps against
# trusted ones, and see the same loop do two different things: learn a text by heart, and learn how texts of a kind are made.
#
# | | |
# |---|---|
# | You will build | `next_token_loss`, bits per byte, batches of documents, AdamW by hand, `evaluate`, `train` |
# | You need | [sampling](../ch02_text_data/03_sampling.ipynb), [the GPT](../ch04_gpt/02_gpt.ipynb), [generation](../ch04_gpt/03_generation_engine.ipynb) |
# | Running time on 2 CPU cores | about 2 minutes |
# | Promotes to | [`shared/training.py`](../shared/training.py) |
#
# **Notation.** A text is a sequence of tokens $x_1, \dots, x_n$ from a vocabulary of size $V$. The model gives $p(x_t \mid x_{<t})$, the
# probability of each token after the ones before it. $B$ rows of $T$ tokens make a batch $(B, T)$; its logits are $(B, T, V)$. Logarithms are
# natural and losses are in **nats**; one nat is $1 / \ln 2 \approx 1.44$ bits.
#
# ```mermaid
# flowchart LR
#   batch["batch: inputs, targets"] --> forward["forward: logits"] --> loss["loss"] --> backward["backward: gradients"] --> update["update: AdamW"] --> batch
#   update -.-> evaluate["now and then: evaluation, sample text, log"]
# ```

# %%
import json
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from shared.corpus import DATA, load_reviews, load_stories
from shared.dataset import create_dataloader
from shared.download import fetch_or_none, gpt2_encoding, or_none
from shared.generation import generate
from shared.gpt import GPTConfig, GPTModel
from shared.plotting import BLUE, GREEN, GREY, ORANGE, RED, heat_map, label_line, use_style
from shared.proof import compare
from shared.results import record
from shared.tale_scoring import score
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator, entropy, lexicon
from shared.tokenizer import BPETokenizer

use_style()

# %% [markdown] tags=["promote:training"]
# The training loop of every language model here: documents to batches, the loss, its units, evaluation, the loop and its log.
#
# A batch is a pair (inputs, targets) of int64 ids (batch, tokens); a target of `IGNORE` counts for nothing. Losses are in nats, the natural
# logarithm's unit. The loss of a step is the mean over its targets, however they are spread over rows and accumulated batches.
#
# Left out: optimisers of our own and schedules (shared.optimizers, shared.schedules), loss scaling for float16, saving and resuming
# (shared.checkpoint), several processes (ch05_pretraining/pretrain.py).
#
# Follows Radford et al. (2019, "Language Models are Unsupervised Multitask Learners") for the objective, Pascanu et al. (2013, "On the
# difficulty of training recurrent neural networks") for clipping the gradient's norm.

# %% [markdown]
# ## Likelihood, cross-entropy and perplexity on three tokens
#
# A language model is judged by one number: how probable it finds a text that it did not write. Take a vocabulary of four words and the text
# *the keeper lit*. Before each word, the model below spreads a probability of 1 over the vocabulary. We read off what it gave the word that
# came.

# %%
vocabulary = ["the", "keeper", "lit", "lamp"]
text = ["the", "keeper", "lit"]
predictions = [  # a row for each position: the probabilities of the four words
    [1 / 2, 1 / 4, 1 / 8, 1 / 8],
    [1 / 8, 1 / 4, 1 / 2, 1 / 8],
    [1 / 2, 1 / 4, 1 / 8, 1 / 8],
]
given = [row[vocabulary.index(word)] for row, word in zip(predictions, text, strict=True)]
likelihood = math.prod(given)
losses_by_hand = [-math.log(p) for p in given]
mean_by_hand = sum(losses_by_hand) / len(losses_by_hand)
print("probability of each word", given)
print(f"likelihood of the text    {likelihood} = 1/{1 / likelihood:.0f}")
print(f"loss of each word, nats   {[round(loss, 3) for loss in losses_by_hand]}")
print(f"mean loss                 {mean_by_hand:.3f} nats per token")
print(f"perplexity                {math.exp(mean_by_hand):.3f}")

# %% [markdown]
# The **likelihood** of the text is the product of the three numbers. Its logarithm is a sum, and minus that sum, divided by the number of
# tokens, is the **cross-entropy** loss. The exponential of the loss is the **perplexity**: this model finds the text as hard as if each word
# had to be guessed among 4 equally probable ones.
#
# The logarithm is more than a habit. The likelihood of a longer text is too small for a floating-point number; the sum of logarithms is not.

# %%
print("likelihood of 1,000 tokens at 1/4 each:", 0.25**1000)
print(f"its logarithm: {1000 * math.log(0.25):.1f}")

# %% [markdown]
# A network gives logits, not probabilities. Softmax turns the ones into the others, so the loss of a target $y$ with logits $z$ is
#
# $$ -\log \frac{e^{z_y}}{\sum_v e^{z_v}} = \log \sum_v e^{z_v} - z_y . $$
#
# Its gradient by the logits is the softmax with 1 subtracted at the target: push the right token up, all others down in proportion to their
# probability.

# %%
logits = torch.tensor([predictions]).log() + 3.0  # (1, 3, 4); a constant added to all logits changes nothing
targets = torch.tensor([[vocabulary.index(word) for word in text]])  # (1, 3)
logits.requires_grad_()

losses = logits.logsumexp(dim=-1) - logits.gather(-1, targets[..., None]).squeeze(-1)  # (1, 3)
expected_gradient = (logits.softmax(dim=-1) - F.one_hot(targets, len(vocabulary))) / targets.numel()

library = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
(gradient,) = torch.autograd.grad(library, logits)
compare("losses of the three tokens", losses[0], losses_by_hand)
compare("mean loss, torch's cross_entropy", library, mean_by_hand)
compare("gradient of the logits", expected_gradient, gradient)

# %% [markdown]
# The finished function adds two things. Targets of `IGNORE` count for nothing: rows of different lengths need padding, and later chapters leave
# out the tokens of a question. And it accepts only logits and targets that belong together.

# %% tags=["promote:training"]
IGNORE = -100  # the target that counts for nothing, as in torch.nn.functional.cross_entropy

Batch = tuple[Tensor, Tensor]


def next_token_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORE, reduction: str = "mean"
) -> Tensor:
    """Return -log p(target) in nats.

    Args:
        logits: (batch, tokens, vocab_size); position t holds the prediction of targets[:, t].
        targets: int64 ids (batch, tokens).
        ignore_index: Targets of this value count for nothing.
        reduction: "mean" over the targets (NaN where there are none), "sum", or "none" for (batch, tokens) with zeros
            where ignored.

    Raises:
        ValueError: The shapes do not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"logits must be (batch, tokens, vocab_size) with targets (batch, tokens), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()  # 8 or 11 bits are too few for a sum over the vocabulary
    # One row a target: with the vocabulary in the middle, (batch, vocab_size, tokens), torch is five times slower.
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return losses.view_as(targets) if reduction == "none" else losses

# %% [markdown]
# A model that has learnt nothing gives each of $V$ tokens the same probability. It loses $\ln V$ nats per token and has a perplexity of $V$:
# the first loss of any training run should be near it.

# %%
for V in (256, 2048, 50257):
    ids = torch.arange(10)[None]
    loss = next_token_loss(torch.zeros(1, 10, V), ids).item()
    print(f"V = {V:6,}: {loss:6.3f} nats per token, perplexity {math.exp(loss):,.0f}")
half = torch.tensor([[0, IGNORE, 2]])
assert next_token_loss(logits, half).item() == (losses[0, 0] + losses[0, 2]).item() / 2

# %% [markdown]
# ## Bits per byte: the fair unit
#
# Nats per token compare two models only if they share a tokenizer. To see it, take the simplest model there is, which predicts each token by
# how often it occurred in the training stories, and give it two tokenizers: single bytes, and the byte pairs of our tales.

# %% tags=["promote:training"]
def perplexity(loss: float) -> float:
    """Return e to the mean loss in nats per token: the number of equally probable tokens that are as hard to guess."""
    return math.exp(loss)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Return the loss of a whole text, in nats, as bits for each of its UTF-8 bytes; ValueError if it has none."""
    if n_bytes < 1:
        raise ValueError(f"n_bytes must be at least 1, got {n_bytes}")
    return nats / math.log(2) / n_bytes

# %%
def unigram_nats(train_ids: list[int], ids: list[int], vocab_size: int) -> float:
    """Total loss of a model that knows only how frequent each token is (every count is raised by one)."""
    counts = Counter(train_ids)
    return sum(-math.log((counts[id] + 1) / (len(train_ids) + vocab_size)) for id in ids)


train_stories = "\n\n\n\n".join(story.text for story in load_stories("train"))
validation_story = load_stories("validation")[0].text
n_bytes = len(validation_story.encode())
tokenizers = {
    "bytes": (256, lambda text: list(text.encode())),
    "byte pairs": (2048, tale_encoding().encode_ordinary),
}
rows = []
for name, (V, encode) in tokenizers.items():
    ids = encode(validation_story)
    nats = unigram_nats(encode(train_stories), ids, V)
    per_token, bits = nats / len(ids), bits_per_byte(nats, n_bytes)
    rows.append((name, len(ids), per_token, perplexity(per_token), nats, bits))
columns = ["tokens are", "tokens", "nats per token", "perplexity", "nats, whole text", "bits per byte"]
units = pd.DataFrame(rows, columns=columns).set_index("tokens are")
assert units["nats per token"].idxmin() == "bytes" and units["bits per byte"].idxmin() == "byte pairs"
units.round(3)

# %% [markdown]
# By nats per token, or by perplexity, the bytes seem far better. But a byte is a small piece, and there are more of them: for the whole
# text the byte model needs more nats. The number of bytes belongs to the text and not to the tokenizer. So we divide the total by it:
#
# $$ \text{bits per byte} = \frac{-\log p(\text{text})}{\ln 2 \cdot \text{bytes}} . $$
#
# It is also what a compressor that uses this model would need for the text (Shannon, 1948): raw bytes need 8. One reservation: the same text
# can often be cut into tokens in several ways, and we count only the way that the tokenizer takes. So the figure is an upper bound, in
# practice a close one.
#
# ## Self-supervised and supervised, on the same text
#
# Where do the targets come from? In **supervised** learning somebody wrote a label for each text. In **self-supervised** learning the text is
# its own label: every token is the target of all tokens before it. Here is one of our reviews, read both ways.

# %%
encoding = tale_encoding()
review = next(review for review in load_reviews("train") if len(review.text) < 80)
ids = encoding.encode_ordinary(review.text)
print(f"supervised: {review.text!r} -> {review.label!r}\n")
print("self-supervised:")
for t in range(1, 6):
    print(f"  {encoding.decode(ids[:t])!r} -> {encoding.decode(ids[t : t + 1])!r}")
print(f"  ... {len(ids) - 1} pairs in all")

# %% [markdown]
# The same network serves both. Only the last matrix differs: one row of it for each token, or one for each class. The loss is the same function.

# %%
torch.manual_seed(0)
network = GPTModel(GPTConfig.preset("tales-1m", emb_dim=64, n_layers=2))
class_head = nn.Linear(64, 2)
tokens = torch.tensor([ids])  # (1, T)
hidden = network.hidden_states(tokens)  # (1, T, 64)

token_logits = network.output_head(hidden[:, :-1])  # (1, T - 1, 2048): one prediction for each next token
class_logits = class_head(hidden[:, -1:])  # (1, 1, 2): one prediction, after the last token
label = torch.tensor([[int(review.label == "positive")]])
print(f"self-supervised {tuple(token_logits.shape)}: {next_token_loss(token_logits, tokens[:, 1:]):.3f} nats")
print(f"supervised      {tuple(class_logits.shape)}: {next_token_loss(class_logits, label):.3f} nats")

reviews = load_reviews()
n_targets = sum(len(encoding.encode_ordinary(review.text)) - 1 for review in reviews)
print(f"all reviews: {len(reviews):,} labels, {n_targets:,} next tokens")

# %% [markdown]
# The labels cost somebody's work and there is one for a text; the next tokens are free and many. That is why pretraining is
# self-supervised, and why chapter 6 needs only a few labels afterwards: it keeps the network and changes the last matrix.
#
# ## Documents to batches
#
# A story becomes a row `[end] + ids + [end]`. The first end token gives the model something to read before the first word, so that the first
# word is a target too; the last one teaches it to stop. With both, the loss of a row is $-\log p(\text{story})$ in full, which is what
# makes it comparable with the entropy of the tales. Rows of a batch are padded on the right; there the targets are `IGNORE`.

# %% tags=["promote:training"]
def document_row(text: str, encoding: tiktoken.Encoding) -> list[int]:
    """Return [end] + ids + [end]: the model reads the first end token and predicts everything after it."""
    return [encoding.eot_token, *encoding.encode_ordinary(text), encoding.eot_token]


def pad_rows(rows: Sequence[Sequence[int]]) -> Batch:
    """Return rows of ids as one batch, padded on the right to the longest.

    Args:
        rows: At least one, each of at least two ids.

    Returns:
        inputs: int64 (rows, longest - 1), each row less its last id. The padding repeats id 0: under a causal mask no
            real token sees it.
        targets: int64 (rows, longest - 1), each row less its first id, padded with `IGNORE`.

    Raises:
        ValueError: There is no row, or one has fewer than two ids.
    """
    shortest = min(map(len, rows), default=0)
    if shortest < 2:
        raise ValueError(f"rows must be at least one, each of at least two ids, got {len(rows)} with {shortest}")
    longest = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.int64)
        inputs[i, : len(row) - 1] = ids[:-1]
        targets[i, : len(row) - 1] = ids[1:]
    return inputs, targets


def row_batches(
    rows: Iterable[Sequence[int]], batch_size: int, *, seed: int = 0, pool: int = 8
) -> Iterator[Batch]:
    """Yield batches of rows of similar length, so that little is padding. Every row is used exactly once.

    `pool` batches at a time are read from `rows`, which may be endless, sorted by length, cut, and yielded in random
    order. The last batch may be smaller. Raises ValueError if `batch_size` or `pool` is below 1.
    """
    if batch_size < 1 or pool < 1:
        raise ValueError(f"batch_size and pool must be at least 1, got {batch_size} and {pool}")
    return _row_batches(iter(rows), batch_size, np.random.default_rng(seed), pool)


def _row_batches(
    rows: Iterator[Sequence[int]], batch_size: int, rng: np.random.Generator, pool: int
) -> Iterator[Batch]:
    while read := list(islice(rows, pool * batch_size)):
        read.sort(key=len)
        batches = [read[i : i + batch_size] for i in range(0, len(read), batch_size)]
        for i in rng.permutation(len(batches)):
            yield pad_rows(batches[i])


def shuffled_rows(
    rows: Sequence[Sequence[int]], *, seed: int = 0, epochs: int | None = None
) -> Iterator[Sequence[int]]:
    """Yield all rows, in a new random order in each epoch; without end if `epochs` is None."""
    epoch = 0
    while rows and (epochs is None or epoch < epochs):
        for i in np.random.default_rng([seed, epoch]).permutation(len(rows)):
            yield rows[i]
        epoch += 1

# %%
inputs, targets = pad_rows([[9, 1, 2, 3, 9], [9, 4, 9]])
print("inputs ", inputs.tolist())
print("targets", targets.tolist())

# %% [markdown]
# Padding costs time and teaches nothing. Rows of similar length waste little: `row_batches` sorts a pool of a few batches by length before it cuts
# them, and yields the batches in random order.

# %%
def padding_share(batches: Iterable[Batch]) -> float:
    targets = [targets for _, targets in batches]
    return sum((t == IGNORE).sum().item() for t in targets) / sum(t.numel() for t in targets)


generator = TaleGenerator(seed=7)
rows = [document_row(story.text, encoding) for story in generator.stories(512)]
for pool in (1, 8):
    print(f"pool of {pool} batches: {padding_share(row_batches(rows, 12, pool=pool)):.1%} padding")
assert padding_share(row_batches(rows, 12)) < 0.5 * padding_share(row_batches(rows, 12, pool=1))

# %% [markdown]
# ## AdamW by hand
#
# The gradient $g$ says in which direction the loss falls, but not how far to go. Adam (Kingma and Ba, 2015) keeps two running averages for each parameter, of
# the gradient and of its square, corrects both for having started at zero, and divides one by the root of the other:
#
# $$ m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
# \theta \leftarrow \theta - \eta \, \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon} $$
#
# in step $k$. AdamW (Loshchilov and Hutter, 2019) also shrinks the parameter, $\theta \leftarrow (1 - \eta \lambda)\, \theta$, beside that step and not
# through the gradient: so the decay is not divided by $\sqrt{v}$. First one parameter, with gradients that we choose.

# %%
lr, beta1, beta2, eps = 0.1, 0.9, 0.999, 1e-8
theta, m, v = 1.0, 0.0, 0.0
print("step  gradient  average  root of v   moved by  parameter")
for k, g in enumerate([0.002, 0.002, 0.002, -0.004], 1):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    average, size = m / (1 - beta1**k), math.sqrt(v / (1 - beta2**k))
    step = lr * average / (size + eps)
    theta -= step
    print(f"{k:4} {g:9.3f} {average:8.4f} {size:10.4f} {-step:10.4f} {theta:10.4f}")

# %% [markdown]
# The first steps are as long as the learning rate, 0.1, though the gradient is only 0.002: what counts is how steady a gradient is, not how large.
# When it turns around, the average is near zero and the step short. Now the same for a list of tensors:

# %%
class NaiveAdamW:
    """AdamW as in the formulas, one parameter tensor after the other."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]
        self.k = 0

    @torch.no_grad()
    def step(self):
        self.k += 1
        beta1, beta2 = self.betas
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            p *= 1 - self.lr * self.weight_decay
            m += (1 - beta1) * (p.grad - m)  # the same as beta1 * m + (1 - beta1) * gradient
            v += (1 - beta2) * (p.grad**2 - v)
            p -= self.lr * (m / (1 - beta1**self.k)) / ((v / (1 - beta2**self.k)).sqrt() + self.eps)

# %% [markdown]
# ### Proof: equal to torch.optim.AdamW, step by step
#
# Two copies of a small GPT see the same batches, one updated by ours, the other by torch's. After each of 40 steps every parameter is compared.

# %%
def small_pair() -> tuple[GPTModel, GPTModel]:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "context_length": 16, "emb_dim": 24, "n_heads": 4, "n_layers": 2, "dropout": 0.0}
    model = GPTModel(GPTConfig(**shape)).double()
    return model, deepcopy(model)


ours, reference = small_pair()
options = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
by_hand = NaiveAdamW(ours.parameters(), **options)
library = torch.optim.AdamW(reference.parameters(), **options)
differences, losses = [], []
for _ in range(40):
    ids = torch.randint(50, (4, 17))
    for model in (ours, reference):
        model.zero_grad()
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
    by_hand.step()
    library.step()
    pairs = zip(ours.parameters(), reference.parameters(), strict=True)
    differences.append(max((a - b).abs().max().item() for a, b in pairs))
compare("largest difference of a parameter after each of 40 steps", differences, [0.0] * 40, 1e-10)

# %% [markdown]
# In the runs below we take torch's, which is the same and faster.
#
# ## The loop
#
# ### The naive loop
#
# Four lines do the work. Everything else that a loop needs is there to see what happens.

# %%
train_ids = [encoding.encode_ordinary(train_stories)[:2000]]
ids = torch.tensor(train_ids[0][:1025]).unfold(0, 129, 128)  # (8, 129): eight windows
inputs, targets = ids[:, :-1], ids[:, 1:]  # (8, 128) each
torch.manual_seed(0)
model = GPTModel(GPTConfig.preset("tales-1m", emb_dim=64, n_layers=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(21):
    loss = next_token_loss(model(inputs), targets)  # forward
    optimizer.zero_grad()
    loss.backward()  # backward
    optimizer.step()  # update
    if step % 5 == 0:
        print(f"step {step:2}: {loss.item():.2f}")

# %% [markdown]
# It starts near $\ln 2048 = 7.62$ and falls.
#
# ### Evaluation
#
# The training loss is measured on text that the model is being fitted to. What we want to know is the loss on other text: the **validation loss**. It
# is measured without dropout and without gradients, over all targets alike. For stories we also take the loss per document.

# %% tags=["promote:training"]
@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a text: `loss` in nats per token, `nats` of all tokens together, number of `tokens`."""

    loss: float
    nats: float
    tokens: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], autocast: torch.dtype | None = None) -> Evaluation:
    """Return the loss of `model` on all `batches`, each target counted once.

    The model runs without dropout and is in its former mode afterwards. Raises ValueError if there is no target.
    """
    nats, n_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for inputs, targets in _on_device(batches, model):
            with _precision(inputs.device, autocast):
                losses = next_token_loss(model(inputs), targets, reduction="none")
            nats += losses.double().sum().item()
            n_tokens += int((targets != IGNORE).sum())
    finally:
        model.train(was_training)
    if not n_tokens:
        raise ValueError("batches hold no target to evaluate")
    return Evaluation(nats / n_tokens, nats, n_tokens)


def loss_per_document(model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int = 32) -> float:
    """Return the mean over the rows of -log p(row), in nats per row, each read from its first token.

    For tales this is the loss whose lowest possible value is known: `shared.tales.entropy()`.
    Raises ValueError if there is no row, or as `pad_rows` does.
    """
    ordered = sorted(rows, key=len)
    batches = (pad_rows(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))
    return evaluate(model, batches).nats / len(ordered)


def choose_device() -> torch.device:
    """Return the device that `LLM_DEVICE` names; "auto", the default, is a GPU if there is one, else the CPU."""
    name = os.environ.get("LLM_DEVICE", "auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def _on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    device = next(model.parameters()).device
    return ((inputs.to(device), targets.to(device)) for inputs, targets in batches)


def _precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

# %%
class Uniform(nn.Module):
    """A model that gives every token the same probability, whatever it reads."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


found = evaluate(Uniform(2048), [pad_rows(rows[:8])])
print(f"{found.tokens} tokens, {found.loss:.3f} nats per token; ln 2048 = {math.log(2048):.3f}")
print(f"{loss_per_document(Uniform(2048), rows[:8]):.1f} nats per story")
assert math.isclose(found.nats / 8, loss_per_document(Uniform(2048), rows[:8]), rel_tol=1e-6)

# %% [markdown]
# ### The finished loop
#
# `train` adds to the four lines what any run needs: several optimisers at once (notebook 03 uses two), a schedule of the learning rate, a limit on the
# length of the gradient, batches that are accumulated where memory is short, a progress bar with loss, tokens per second and time left, calls for
# evaluation and sample texts, and a log. It stops with an error where a loss is no longer a number, before that reaches the weights.

# %% tags=["promote:training"]
@dataclass(frozen=True)
class Record:
    """One line of the log of `train`, after `step` updates; None where there is no value.

    `tokens` counts the targets seen so far; `loss` is the mean over the targets of this step, measured before its
    update; `validation_loss` is what `on_evaluate` returned after it; `learning_rate` is that of the first group of the
    first optimizer; `grad_norm` is the norm before clipping.
    """

    step: int
    tokens: int
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    n_steps: int,
    start_step: int = 0,
    schedule: Callable[[int], float] | None = None,
    max_grad_norm: float | None = 1.0,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None = None,
    evaluate_every: int | None = None,
    on_evaluate: Callable[[int], float | None] | None = None,
) -> list[Record]:
    """Train `model` and return the log: one record for each step, and one for step `start_step` before any update.

    Args:
        model: Called as model(inputs), it returns logits (batch, tokens, vocab_size). It ends in its former mode.
        batches: (inputs, targets) of ids; a list or a loader is read again when it ends, an iterator must last.
        optimizers: One, or several that share the parameters among them.
        n_steps: Number of the last step; updates are numbered start_step + 1 to n_steps.
        start_step: Updates done earlier, when a run is resumed.
        schedule: schedule(k), k from 0, is the factor on each group's initial learning rate ("initial_lr" of the
            group, set from "lr" where missing) in update k + 1; without it the rates stay as they are.
        max_grad_norm: Longer gradients of all parameters together are shortened to this norm; None leaves them.
        accumulation: Batches of one update; their gradients add up to that of one large batch.
        autocast: torch.bfloat16 computes most matrix products in it; weights and updates keep their type.
        auxiliary_loss: auxiliary_loss(model) is added to the loss after each forward pass, but not to the log: for
            mixtures of experts.
        evaluate_every: Steps between two calls of `on_evaluate`.
        on_evaluate: Called as on_evaluate(step) before the first step, every `evaluate_every` steps and after the
            last, with the model in evaluation mode; the validation loss it may return goes to the log.

    Raises:
        ValueError: An argument is out of range, the batches end, or one holds no target.
        FloatingPointError: Loss or gradient is not finite; the update of this step has not been made.
    """
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    _check_training(optimizers, n_steps, start_step, max_grad_norm, accumulation, autocast, evaluate_every)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, source = model.training, _on_device(_lasting(batches), model)
    n_tokens, seconds = 0, 0.0

    def validation(step: int) -> float | None:
        due = step in (start_step, n_steps) or (evaluate_every and step % evaluate_every == 0)
        if on_evaluate is None or not due:
            return None
        model.eval()
        result = on_evaluate(step)
        model.train()
        return result

    log = [Record(start_step, 0, validation_loss=validation(start_step))]
    model.train()
    try:
        with tqdm(total=n_steps, initial=start_step, unit="step") as bar:
            for step in range(start_step + 1, n_steps + 1):
                started = time.perf_counter()
                if schedule is not None:
                    for group in groups:
                        group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(step - 1)
                step_batches = list(islice(source, accumulation))
                n_targets = sum(int((targets != IGNORE).sum()) for _, targets in step_batches)
                if not n_targets:
                    raise ValueError(f"the batches of step {step} hold no target")
                model.zero_grad()
                loss = _accumulate(model, step_batches, n_targets, autocast, auxiliary_loss)
                norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; a lower learning rate, warm-up or "
                        "clipping may help"
                    )
                for optimizer in optimizers:
                    optimizer.step()
                n_tokens += n_targets
                seconds += time.perf_counter() - started
                bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / seconds:,.0f} tokens/s", refresh=False)
                bar.update()
                log.append(Record(step, n_tokens, loss, validation(step), groups[0]["lr"], norm))
    finally:
        model.train(was_training)
    return log


def _accumulate(
    model: nn.Module,
    batches: Sequence[Batch],
    n_targets: int,
    autocast: torch.dtype | None,
    auxiliary_loss: Callable[[nn.Module], Tensor] | None,
) -> float:
    """Add the gradients of the mean loss over all `n_targets` targets of `batches` and return that loss."""
    total = 0.0
    for inputs, targets in batches:
        with _precision(inputs.device, autocast):
            loss = next_token_loss(model(inputs), targets, reduction="sum") / n_targets
        total += loss.item()
        if auxiliary_loss is not None:
            loss = loss + auxiliary_loss(model) / len(batches)
        loss.backward()
    return total


def _lasting(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        n_read = 0
        for batch in batches:
            n_read += 1
            yield batch
        if not n_read:
            raise ValueError("batches ended before the last step")


def _check_training(
    optimizers: Sequence[torch.optim.Optimizer],
    n_steps: int,
    start_step: int,
    max_grad_norm: float | None,
    accumulation: int,
    autocast: torch.dtype | None,
    evaluate_every: int | None,
) -> None:
    for name, value, holds, allowed in (
        ("optimizers", optimizers, len(optimizers) > 0, "at least one"),
        ("start_step", start_step, start_step >= 0, "at least 0"),
        ("n_steps", n_steps, n_steps > start_step, f"above start_step={start_step}"),
        ("accumulation", accumulation, accumulation >= 1, "at least 1"),
        ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0, "above 0, or None"),
        ("evaluate_every", evaluate_every, evaluate_every is None or evaluate_every >= 1, "at least 1, or None"),
        ("autocast", autocast, autocast in (None, torch.bfloat16), "torch.bfloat16 or None"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {value}")

# %% [markdown]
# ### Proof: equal to transformers and torch
#
# The peer is a plain loop around transformers' GPT-2, which computes its own loss from `labels`, with torch's clipping and plain
# gradient descent with momentum (AdamW has had its proof). Both start with the same weights and see the same five batches. Losses and all final
# parameters must agree. The model is in float64; transformers computes the loss in float32, hence the tolerance.

# %%
class Logits(nn.Module):
    """transformers' model as `train` calls a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits

# %%
torch.manual_seed(0)
shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_head": 4, "n_layer": 2}
off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
theirs = GPT2LMHeadModel(GPT2Config(**shape, **off)).double()
theirs.loss_type = "ForCausalLM"  # else it says on stderr that it takes this one
ours = Logits(deepcopy(theirs))
data = [torch.randint(50, (4, 16)) for _ in range(5)]

optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
their_losses = []
for ids in data:
    loss = theirs(ids, labels=ids).loss  # shifted inside
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    their_losses.append(loss.item())

# %%
log = train(
    ours,
    [(ids[:, :-1], ids[:, 1:]) for ids in data],
    torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9),
    n_steps=5,
)
compare("losses of five steps", [line.loss for line in log[1:]], their_losses)
flat = nn.utils.parameters_to_vector
compare("all parameters afterwards", flat(ours.parameters()), flat(theirs.parameters()))

# %% [markdown]
# And what a run that explodes looks like: plain gradient descent with an absurd learning rate.

# %%
exploding, _ = small_pair()
batch = [(ids[:, :-1], ids[:, 1:])]
try:
    train(exploding, batch, torch.optim.SGD(exploding.parameters(), lr=1e5), n_steps=100, max_grad_norm=None)
except FloatingPointError as error:
    print(error)
assert all(parameter.isfinite().all() for parameter in exploding.parameters())

# %% [markdown]
# ## First run: learning a text by heart
#
# Two of our short stories to train on, and a third one to validate. They get a tokenizer of their own, trained on the two. The model has far more parameters than the text has tokens. Windows start at every sixteenth token, so that the
# model meets each place with little context before it and with much.

# %%
two = "\n\n\n\n".join(story.text for story in load_stories("train")[:2])
story_encoding = BPETokenizer.train(two, 1024).to_tiktoken("stories")
train_ids = story_encoding.encode_ordinary(two)
validation_ids = story_encoding.encode_ordinary(validation_story)

C = 128
train_loader = create_dataloader(train_ids, 8, C, stride=16, seed=0)
windows = {"shuffle": False, "drop_last": False}
train_windows = list(create_dataloader(train_ids, 8, C, **windows))
validation_windows = list(create_dataloader(validation_ids, 8, C, **windows))
shape = {"vocab_size": story_encoding.n_vocab, "context_length": C, "n_layers": 2}
torch.manual_seed(0)
memoriser = GPTModel(GPTConfig.preset("tales-1m", **shape))
print(f"{len(two.encode()) / 1000:.0f} KB, {len(train_ids):,} tokens to train on, {len(validation_ids):,} to validate")
tokens_per_step = 8 * C
print(f"{memoriser.n_parameters:,} parameters")
print(f"{len(train_ids) / tokens_per_step:.1f} steps read as many tokens as the text has")

# %%
N_STEPS = 270
curve = []


def measure(step: int) -> float:
    losses = evaluate(memoriser, train_windows).loss, evaluate(memoriser, validation_windows).loss
    curve.append((step, *losses))
    return losses[1]


def warm_up_and_decay(n_steps: int) -> Callable[[int], float]:
    """A rate that rises over 20 steps and then falls to zero along a straight line; notebook 03 has better ones."""
    return lambda k: min((k + 1) / 20, 1 - k / n_steps)


# %%
log = train(
    memoriser,
    train_loader,
    torch.optim.AdamW(memoriser.parameters(), lr=7e-3, betas=(0.9, 0.95), weight_decay=0.1),
    n_steps=N_STEPS,
    schedule=warm_up_and_decay(N_STEPS),
    evaluate_every=20,
    on_evaluate=measure,
)
curve = pd.DataFrame(curve, columns=["step", "training", "validation"])
best = curve.loc[curve["validation"].idxmin()]
last = curve.iloc[-1]
print(f"at the start: training {curve['training'][0]:.1f}, validation {curve['validation'][0]:.1f}")
print(f"at the end:   training {last['training']:.1f}, validation {last['validation']:.1f}")
print(f"the validation loss was lowest, {best['validation']:.1f}, before half of the run was over")
assert last["training"] < 0.3 and last["validation"] > best["validation"] + 1.5 and best["step"] < N_STEPS / 2

# %% [markdown]
# The figure shows both losses over the passes. Up to its lowest point the validation loss falls with the training loss: the model learns
# which words there are and what follows what. From there on it learns *these* stories, and becomes too sure of itself on any other.

# %%
figure, axes = plt.subplots()
passes = curve["step"] * tokens_per_step / len(train_ids)
axes.plot(passes, curve["training"], color=BLUE, marker="o", markersize=4)
axes.plot(passes, curve["validation"], color=RED, marker="o", markersize=4)
label_line(axes, "training", passes.iloc[-1], last["training"] + 0.15, BLUE)
label_line(axes, "validation", passes.iloc[-1], last["validation"], RED)
lowest = best["step"] * tokens_per_step / len(train_ids), best["validation"]
axes.plot(*lowest, "o", color=RED, markersize=11, fillstyle="none")
axes.annotate("lowest", lowest, (0, 12),
              textcoords="offset points", color=RED, ha="center")  # fmt: skip
axes.set(xlabel="passes over the text", ylabel="loss (nats per token)", ylim=(0, None), xlim=(0, 1.2 * passes.iloc[-1]))
axes.set_title("Two stories by heart: one loss falls to nothing, the other rises")
plt.show()

# %% [markdown]
# ### How much is recalled verbatim?
#
# We give the model 16 tokens from a place in the text and let it write the next 32 greedily. How many come out right before the first error? The same places
# in the validation story are the baseline: there, a right token is a guess.

# %%
def recalled(ids: list[int], n_prompts: int = 40, n_read: int = 16, n_write: int = 32) -> list[int]:
    """Tokens reproduced before the first error, from places spread evenly over the text."""
    starts = np.linspace(0, len(ids) - n_read - n_write, n_prompts).astype(int)
    written = generate(memoriser, [ids[s : s + n_read] for s in starts], n_write)
    true = [ids[s + n_read : s + n_read + n_write] for s in starts]
    return [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), n_write)
        for pair in zip(written, true, strict=True)
    ]


recall = {"training": np.array(recalled(train_ids)), "validation": np.array(recalled(validation_ids))}
assert (recall["training"] == 32).sum() >= 30 and recall["validation"].mean() < 2
print("from the training text, most prompts are continued word for word over all 32 tokens;")
print("from the validation story, the first or second token is already another")

# %% tags=["nbval-ignore-output"]
record(
    "stories, tokens recalled verbatim of 32",
    round(float(recall["training"].mean()), 1),
    "",
    f"validation text {recall['validation'].mean():.1f}",
)
start = 3000
prompt, true = train_ids[start : start + 16], train_ids[start + 16 : start + 48]
for name, ids in (("prompt", prompt), ("written", generate(memoriser, [prompt], 32)[0]), ("in the text", true)):
    print(f"{name + ':':13}{story_encoding.decode(ids)!r}")
prompt = validation_ids[1000:1016]
for name, ids in (("prompt", prompt), ("written", generate(memoriser, [prompt], 32)[0])):
    print(f"{name + ':':13}{story_encoding.decode(ids)!r}")

# %% [markdown]
# The model is a copy of the text with a strange index. That is not a defect of the loop: with so few tokens and so many passes, learning by heart is the best way to lower
# the training loss. Large models recall
# passages too, the more often they stood in the training text (Carlini et al., 2023). It is why they are trained on more text than they can see twice, and
# why duplicates are removed from it.
#
# ## Second run: learning how stories are made
#
# The tales come from a grammar and never run out. The model sees each story once, so there is nothing to memorise: to lower the loss it must find what the
# stories have in common. And we know where that ends. No model can have a lower loss per story than the entropy of the grammar.

# %%
validation_stories = list(TaleGenerator(seed=1_000_000).stories(60))
validation_rows = [document_row(story.text, encoding) for story in validation_stories]
floor = sum(-story.log_probability for story in validation_stories) / len(validation_stories)
n_targets = sum(len(row) - 1 for row in validation_rows) / len(validation_rows)
print(f"entropy of the grammar              {entropy():.3f} nats per story")
print(f"the floor for these 60 stories      {floor:.3f} nats per story, {n_targets:.0f} tokens each")
print(f"that is                             {floor / n_targets:.3f} nats per token")

# %% [markdown]
# A few tenths of a nat per token: most tokens of a tale follow from what came before, if one has understood the grammar.
#
# ### Simple baselines
#
# What do counts alone reach? A model of order $n$ looks at the last $n - 1$ tokens and predicts what followed them in training. Where it has seen little, it leans on the
# next shorter context: $p_n = \frac{\text{count} + p_{n-1}}{\text{total} + 1}$. It learns from as many stories as the network will see.

# %%
class CountModel:
    """Predicts a token from the n - 1 tokens before it, n from 1 to `order`, by counts."""

    def __init__(self, rows: Iterable[list[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.counts = defaultdict(Counter)
        for row in rows:
            for i in range(1, len(row)):
                for n in range(min(order, i + 1)):
                    self.counts[tuple(row[i - n : i])][row[i]] += 1
        self.totals = {context: sum(counter.values()) for context, counter in self.counts.items()}

    def nats(self, row: list[int], order: int) -> float:
        """The loss of a whole row, with contexts of up to order - 1 tokens."""
        total = 0.0
        for i in range(1, len(row)):
            p = 1 / self.vocab_size
            for n in range(min(order, i + 1)):
                context = tuple(row[i - n : i])
                if context in self.totals:
                    p = (self.counts[context][row[i]] + p) / (self.totals[context] + 1)
            total -= math.log(p)
        return total

# %%
N_STORIES = 7200
BATCH = 12
generator = TaleGenerator(seed=1)
training_rows = [document_row(story.text, encoding) for story in generator.stories(N_STORIES)]
counted = CountModel(training_rows, order=3, vocab_size=2048)
baselines = {
    name: sum(counted.nats(row, order) for row in validation_rows) / len(validation_rows)
    for order, name in enumerate(("single tokens", "pairs", "triples"), 1)
}
for name, nats in baselines.items():
    print(f"counts of {name:14} {nats:6.1f} nats per story")

# %% [markdown]
# ### The run
#
# A model of two layers and 64 dimensions, small enough for a minute of one core. Its first weights are larger than GPT-2's 0.02, which is made for
# wide layers: a matrix with 64 inputs hardly passes anything on with weights that small. Before, halfway and after, it writes 24 stories at temperature 1: it
# draws each token with the probability it gives it. We keep them for grading.

# %%
def write_stories(model: nn.Module, n: int = 24, seed: int = 0) -> list[str]:
    """Stories drawn at temperature 1, each from the end token to the next end token or the end of the context."""
    end = encoding.eot_token
    n_new = model.config.context_length - 1
    written = generate(model, [[end]] * n, n_new, temperature=1.0, stop_tokens=[end], seed=seed)
    return [encoding.decode(ids) for ids in written]


N_STEPS = N_STORIES // BATCH
torch.manual_seed(0)
network = GPTModel(GPTConfig.preset("tales-1m", emb_dim=64, n_layers=2, init_std=0.09))
samples = {}


def watch(step: int) -> float:
    if step in (0, N_STEPS // 2, N_STEPS):
        samples[step] = write_stories(network)
    return loss_per_document(network, validation_rows)


log = train(
    network,
    row_batches(training_rows, BATCH),
    torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    n_steps=N_STEPS,
    schedule=warm_up_and_decay(N_STEPS),
    evaluate_every=50,
    on_evaluate=watch,
)
values = [line.validation_loss for line in log if line.validation_loss is not None]
final = values[-1]
print(f"validation: {values[0]:.0f} nats per story before, {final:.0f} after; the floor is {floor:.0f}")
print("counts of triples are beaten:", final < 0.8 * baselines["triples"])
assert floor < final < 0.8 * baselines["triples"]

# %% [markdown]
# How do training and validation loss compare? The training loss of a step is measured before its update, on stories the model has not seen yet.
# So here the two are the same thing, up to chance:

# %%
recent = np.mean([line.loss for line in log[-50:]]) * n_targets
print(f"training loss of the last 50 steps over validation loss: {recent / final:.1f}")
assert 0.85 < recent / final < 1.2

# %% [markdown]
# ### The shipped model beside it
#
# A minute is short. `tales-1m`, which ships with the course, has four layers of 128 dimensions and was trained much longer by the script
# `pretrain.py`. It shows where the same loop leads. (Notebook 04 has a general `load_pretrained`; these six lines are enough here.)

# %%
def load_shipped(name: str) -> GPTModel:
    """A model of shared/checkpoints; its head is the token embedding, so it is not in the file."""
    folder = DATA.parent / "checkpoints" / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = GPTModel(GPTConfig(**config["model"]))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert missing == ["output_head.weight"] and not unexpected
    return model.eval()


shipped = load_shipped("tales-1m")
shipped_loss = loss_per_document(shipped, validation_rows)
print(f"tales-1m: {shipped_loss:.1f} nats per story, {shipped_loss / floor - 1:.0%} above the floor")
assert floor < shipped_loss < final
record("tales-1m, loss per story", round(shipped_loss, 1), "nats", f"floor {floor:.1f}; 1 minute of training {final:.0f}")

# %% [markdown]
# The curve on a logarithmic scale: the network falls past the counts of single tokens, pairs and triples, to about twice the
# floor; `tales-1m` lies just above it.

# %%
figure, axes = plt.subplots(figsize=(7.2, 4.2))
seen = [line.tokens / 1000 for line in log if line.validation_loss is not None]
axes.plot(seen, values, color=BLUE, marker="o", markersize=4)
axes.text(seen[-1], values[-1] * 0.86, "this run", color=BLUE, ha="right", va="top")
right = seen[-1] * 1.02
for name, nats in baselines.items():
    axes.axhline(nats, color=GREY, linestyle=":", linewidth=1.2)
    axes.text(right, nats * 1.03, f"counts of {name}", color=GREY, ha="right", va="bottom", fontsize=9.5)
for name, nats, color in (("tales-1m", shipped_loss, ORANGE), ("floor", floor, GREEN)):
    axes.axhline(nats, color=color, linewidth=1.5)
    shift = 1.03 if nats > floor else 0.97
    axes.text(5, nats * shift, name, color=color, va="bottom" if nats > floor else "top")
axes.set_yscale("log")
axes.set_yticks([50, 100, 200, 500, 1000], ["50", "100", "200", "500", "1000"])
axes.minorticks_off()
axes.set(xlabel="training tokens (thousands)", ylabel="validation loss (nats per story)", ylim=(42, 1600), xlim=(0, right))
axes.set_title("The network beats counting; longer training comes close to the floor")
plt.show()

# %% [markdown]
# ### What it writes: start, middle, end
#
# Loss is one side; the other is what comes out. `score` grades a text by the grammar: the share of sentences that belong to it, and of pronouns, names,
# objects and consequences that agree with what the story said before. Real tales get 1 everywhere.

# %%
def grade(texts: list[str]) -> dict[str, float]:
    """Mean grades; a text in which there was nothing to judge does not count."""
    scores = [score(text) for text in texts]
    means = {"whole stories": np.mean([s.story for s in scores])}
    for kind in ("sentences", "pronouns", "names", "objects", "consequences"):
        judged = [value for s in scores if (value := getattr(s, kind)) is not None]
        means[kind] = np.mean(judged) if judged else math.nan
    return means


samples["tales-1m"] = write_stories(shipped)
grades = {f"step {key}" if isinstance(key, int) else key: grade(texts) for key, texts in samples.items()}
grades["real tales"] = grade([story.text for story in validation_stories])
grades = pd.DataFrame(grades).T
sentences = grades["sentences"].to_list()
assert sentences[0] < 0.02 and sentences[0] < sentences[2] < 0.5 < sentences[3]
assert (grades.loc["real tales"] == 1).all()
print("sentences of the grammar: none at the start, some at the end of the run, most from tales-1m")

# %% tags=["nbval-ignore-output"]
for key, texts in samples.items():
    print(f"--- {'step ' + str(key) if isinstance(key, int) else key}: {texts[0][:330]}\n")
grades.style.format("{:.2f}", na_rep="-")

# %% [markdown]
# First noise, then words and the shapes of sentences, then sentences that belong to the grammar but forget who lost what: what a token needs from
# nearby is learnt before what it needs from far away. The longer training of `tales-1m` is what closes that gap.
#
# Is that memorising after all? A story that the model writes could be one that it has read:

# %%
known = {story.text for story in TaleGenerator(seed=1).stories(N_STORIES)}
written = {text.strip() for text in samples["tales-1m"]}
print(f"of {len(written)} different stories by tales-1m, {len(written & known)} stand among {len(known):,} tales")
assert len(written) == 24 and not written & known

# %% [markdown]
# ## Where attention looks when it writes a pronoun
#
# *She* or *he*? The answer stands far back in the text, where a name was mentioned. Attention is the only way for a token to learn about earlier
# ones, so we look at the weights of all heads of `tales-1m` just before it writes a pronoun. A hook runs each attention layer a second time with
# `need_weights=True`.

# %%
@torch.no_grad()
def attention_weights(model: nn.Module, row: list[int]) -> Tensor:
    """Weights of every head on one row, (layers, heads, queries, keys)."""
    collected = []

    def again(module: nn.Module, args: tuple, options: dict, output: Tensor) -> None:
        collected.append(module.forward(*args, **{**options, "need_weights": True})[1][0])

    hooks = [block.attention.register_forward_hook(again, with_kwargs=True) for block in model.blocks]
    model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return torch.stack(collected)


weights = attention_weights(shipped, validation_rows[0][:-1])
print("layers, heads, queries, keys:", tuple(weights.shape[:2]), "and equal:", weights.shape[2] == weights.shape[3])
compare("each query's weights add up to 1", weights.sum(dim=-1), torch.ones(weights.shape[:3]))

# %% [markdown]
# We take every pronoun of the 60 stories that comes after at least one name of its own sex and one of the other, so that there is something to
# decide, and sort the earlier tokens into kinds.

# %%
SEX = {name: sex for sex in ("girl", "boy") for name in lexicon(sex)}
SEX |= dict.fromkeys(("she", "her", "herself"), "girl") | dict.fromkeys(("he", "him", "his", "himself"), "boy")
PRONOUNS = sorted(word for word in SEX if word.islower())
KINDS = ["names that fit", "other names", "pronouns that fit", "other words"]


def words_of(row: list[int]) -> list[str]:
    """For each token of a row the whole word it is a part of, without punctuation."""
    pieces = ["", *(encoding.decode([id]) for id in row[1:-1])]
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = [(found.start(), found.end(), found.group()) for found in re.finditer(r"\w+", "".join(pieces))]
    return [next((word for a, b, word in spans if a < end <= b), "") for end in ends]


def kinds_of(words: list[str], sex: str) -> Tensor:
    """For each word its kind, an index into KINDS, as seen from a pronoun of this sex."""
    is_name = torch.tensor([word in SEX and word not in PRONOUNS for word in words])
    fits = torch.tensor([SEX.get(word, SEX.get(word.lower())) == sex for word in words])
    return torch.where(is_name, torch.where(fits, 0, 1), torch.where(fits, 2, 3))

# %%
looked_at = [(row, words_of(row)) for row in validation_rows]
places = []  # (number of the row, position of the pronoun, its sex, kinds of all tokens)
for r, (_, words) in enumerate(looked_at):
    for t, word in enumerate(words):
        if word in PRONOUNS:
            kinds = kinds_of(words, SEX[word])
            if {0, 1} <= set(kinds[:t].tolist()):
                places.append((r, t, SEX[word], kinds))

looked, even = torch.zeros(4, 4, len(KINDS)), torch.zeros(len(KINDS))
all_weights = [attention_weights(shipped, row[:-1]) for row, _ in looked_at]
for r, t, _, kinds in places:
    one_hot = F.one_hot(kinds[:t], len(KINDS)).float()  # (t, kinds)
    looked += all_weights[r][:, :, t - 1, :t] @ one_hot / len(places)
    even += one_hot.mean(dim=0) / len(places)
print(f"{len(places)} pronouns; shares of the tokens before them:")
print(", ".join(f"{kind} {share:.1%}" for kind, share in zip(KINDS, even.tolist(), strict=True)))

# %% [markdown]
# The figure shows, for each of the 16 heads, how its attention is spread over the kinds of earlier tokens when the next token is a pronoun. The
# lowest row is the spread of a head that looks evenly at everything.

# %%
figure, axes = plt.subplots(figsize=(7.2, 5.6))
table = torch.cat([looked.flatten(0, 1), even[None]]).tolist()
names = [f"layer {i}, head {j}" for i in range(1, 5) for j in range(1, 5)] + ["evenly"]
heat_map(axes, table, names, KINDS, "Just before a pronoun, a few heads look at people, most do not", numbers=".2f", vmin=0, vmax=1)
axes.tick_params(axis="x", rotation=0)
for label in axes.get_xticklabels():
    label.set_ha("center")
plt.show()

# %%
on_people = looked[:, :, :3].sum(dim=-1)  # names of both kinds, and pronouns
layer, head = divmod(int(on_people.argmax()), 4)
ratio = on_people.max().item() / even[:3].sum().item()
print("the head that looks at people most does so more than 5 times as much as an even spread:", ratio > 5)
assert ratio > 5

# %% [markdown]
# That head in one story, token by token, at the pronoun where it looks most clearly at a name or pronoun that fits. The darker a word, the more weight it gets
# just before the framed pronoun is written.

# %%
def draw_attention(axes: plt.Axes, row: list[int], weights: Tensor, t: int, width: int = 88) -> None:
    """Write the row up to the pronoun at `t`, each token shaded by its weight."""
    x = y = 0
    for i, id in enumerate(row[: t + 1]):
        piece = "[end]" if i == 0 else encoding.decode([id])
        if x + len(piece) > width:
            x, y = 0, y - 1
        shade = min(1.0, weights[i].item() / weights.max().item()) if i < t else 0.0
        style = {"facecolor": ORANGE, "alpha": 0.85 * shade, "edgecolor": "none"}
        if i == t:
            style = {"facecolor": "none", "edgecolor": RED, "linewidth": 1.5}
        axes.add_patch(plt.Rectangle((x, y - 0.4), len(piece), 0.8, **style))
        axes.text(x, y, piece, family="monospace", fontsize=11, va="center")
        x += len(piece)
    axes.set(xlim=(0, width), ylim=(y - 0.7, 0.7))
    axes.set_axis_off()


# %%
def weight_that_fits(place: tuple[int, int, str, Tensor]) -> float:
    r, t, _, kinds = place
    return all_weights[r][layer, head, t - 1, :t][(kinds[:t] == 0) | (kinds[:t] == 2)].sum().item()


r, t, _, _ = max((place for place in places if 60 < place[1] < 120), key=weight_that_fits)
row = looked_at[r][0]
weights = all_weights[r][layer, head, t - 1, :t]
figure, axes = plt.subplots(figsize=(8.6, 1.9))
draw_attention(axes, row, weights, t)
axes.set_title("What one head reads before it writes a pronoun", fontsize=11)
plt.show()

# %% [markdown]
# ### What the weights do not show
#
# A weight says that a value was *read*. It does not say that what was read decided anything, nor where it came from: after the first layer, a token
# holds what it has gathered from others. A name can reach the pronoun through a comma. To learn what matters one must interfere. We hide some earlier
# tokens from all later ones, in all layers, and see whether the model still gives the right sex more probability than the wrong one.

# %%
def first_ids(sex: str) -> list[int]:
    return [encoding.encode_ordinary(" " + word)[0] for word in PRONOUNS if SEX[word] == sex]


@torch.no_grad()
def right_sex(hidden_kinds: Sequence[int], control: bool = False) -> float:
    """Share of the pronouns for which the right sex is more probable, with the tokens of some kinds hidden.

    With `control`, as many other words are hidden in their place, drawn at random.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [looked_at[r][0] for r, *_ in places]
    inputs, _ = pad_rows(rows)
    seen = torch.ones_like(inputs, dtype=torch.bool)
    for i, (_, _, _, kinds) in enumerate(places):
        hide = torch.isin(kinds, torch.tensor(hidden_kinds, dtype=torch.int64))
        if control:
            others = (kinds == 3).nonzero()[1:, 0]  # all but the end token
            drawn = others[torch.randperm(len(others), generator=generator)[: int(hide.sum())]]
            hide = torch.zeros_like(hide).index_fill(0, drawn, True)
        seen[i, : len(kinds)] = ~hide
    right = 0
    for start in range(0, len(places), 64):  # some places at a time, to save memory
        chosen = slice(start, start + 64)
        hidden = shipped.hidden_states(inputs[chosen], key_padding_mask=seen[chosen])
        for i, (_, t, sex, _) in enumerate(places[chosen]):
            p = shipped.output_head(hidden[i, t - 1]).softmax(dim=-1)
            girl, boy = p[first_ids("girl")].sum(), p[first_ids("boy")].sum()
            right += int((girl > boy) == (sex == "girl"))
    return right / len(places)


# %%
hidings = {
    "nothing": ((), False),
    "names that fit": ((0,), False),
    "other names": ((1,), False),
    "pronouns that fit": ((2,), False),
    "all three": ((0, 1, 2), False),
    "as many other words": ((0, 1, 2), True),
}
found = {name: right_sex(*hiding) for name, hiding in hidings.items()}
for name, share in found.items():
    print(f"hidden: {name:20} right sex in {share:.2f} of the places")
assert min(found["nothing"], found["as many other words"]) > 0.9 > 0.65 > found["all three"]

# %% [markdown]
# With nothing hidden the model is practically always right. Hide one kind, and it mostly finds the answer elsewhere: a pronoun repeats what the name said, and
# where two people differ in sex, the name of one tells about the other. Only without all three it is down to guessing, while as many other words, hidden at
# random, hardly matter. So what is read from names and pronouns does decide, but no single kind of them, whatever weight it gets. The heat
# map alone would not have told us. Jain and Wallace (2019) discuss this at length.
#
# ## With a network
#
# *The Verdict* by Edith Wharton, the text that Raschka's book trains on, with the book's settings: GPT-2's smallest shape with a context of 256 tokens, an untied head
# and no query-key-value biases, batches of 2, 10 epochs, AdamW with a rate of 0.0004, no schedule, no clipping. Expect a training loss of about 0.5 and
# a validation loss of about 6.2 to 6.4: on 20 KB of text, the first run again, only larger. 90 steps of a model of 163 million parameters take long on a CPU, so it
# runs only if the environment variable `LLM_VERDICT` is `full`; with `short` a small model takes the same way for two epochs.

# %% tags=["nbval-ignore-output"]
LLM_VERDICT = os.environ.get("LLM_VERDICT", "")
gpt2 = or_none(gpt2_encoding, "GPT-2's tokenizer", "our own stories, above")
verdict = fetch_or_none("the-verdict.txt", instead="our own stories, above") if gpt2 else None
if verdict:
    text = verdict.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    parts = [gpt2.encode_ordinary(part) for part in (text[:cut], text[cut:])]
    print(f"The Verdict: {len(parts[0]):,} tokens to train on, {len(parts[1]):,} to validate")
    if LLM_VERDICT not in ("full", "short"):
        print("Training skipped: start Jupyter with LLM_VERDICT=full (or short) to run it.")

# %%
def train_on_verdict(full: bool) -> list[Record]:
    shape = {} if full else {"emb_dim": 64, "n_heads": 4, "n_layers": 2}
    torch.manual_seed(123)
    config = GPTConfig.preset("gpt2-small", context_length=256, qkv_bias=False, tie_weights=False, **shape)
    model = GPTModel(config).to(choose_device())
    loader = create_dataloader(parts[0], 2, 256, seed=123)
    held_out = list(create_dataloader(parts[1], 2, 256, shuffle=False, drop_last=False))

    def watch(step: int) -> float:
        ids = gpt2.encode_ordinary("Every effort moves you")
        print(f"step {step:3}: {gpt2.decode(ids + generate(model, [ids], 30)[0])!r}")
        return evaluate(model, held_out).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    n_steps = (10 if full else 2) * len(loader)
    options = {"evaluate_every": 2 * len(loader), "on_evaluate": watch, "max_grad_norm": None}
    return train(model, loader, optimizer, n_steps=n_steps, **options)

# %% tags=["nbval-ignore-output"]
if verdict and LLM_VERDICT in ("full", "short"):
    for line in train_on_verdict(LLM_VERDICT == "full"):
        if line.validation_loss is not None and line.step:
            print(f"step {line.step:3}: training {line.loss:.3f}, validation {line.validation_loss:.3f}")
else:
    print("No training on The Verdict in this run.")

# %% [markdown]
# ## What you built
#
# [`shared/training.py`](../shared/training.py): the loss and its units, rows and batches of documents, evaluation, and one loop with its log, proven against a plain loop
# around transformers' GPT-2. AdamW is yours too, equal to torch's in every step. You have seen the loop learn by heart and learn a grammar, and you
# can tell the two apart by the validation loss.
#
# Next: how to choose tokens well when writing (notebook 02), and everything that makes training larger, faster and steadier (notebook 03).
#
# ## What can go wrong
#
# - **Targets not moved by one place.** The loss falls to almost nothing within a few hundred steps, and the model writes the same token for ever.
# - **A mean of means.** Averaging the losses of batches with different numbers of targets weighs short batches too much. `evaluate` and `train` divide by the
#   number of targets once.
# - **`zero_grad` forgotten.** Gradients add up over the steps; the loss falls at first and then goes wild.
# - **Validation text that is also in training.** Its loss falls with the training loss, and nothing warns you. Split by documents, and look for duplicates.
# - **Losses of different tokenizers side by side.** Convert them to bits per byte.
# - **A loss that is NaN.** `train` stops in that step. A lower rate, warm-up or clipping helps most often; notebook 05 is about finding the cause.
# - **The wrong floor.** A loss on windows that begin in the middle of a story cannot be compared with the entropy: the model has not seen the beginning.
#
# ## Exercises
#
# **1.** One model reports a perplexity of 20 with 4.2 bytes per token, another a perplexity of 9 with 2.9 bytes per token. Which one is better?

# %% tags=["solution"] jupyter={"source_hidden": true}
for perplexity_given, bytes_per_token in ((20, 4.2), (9, 2.9)):
    bits = math.log2(perplexity_given) / bytes_per_token
    print(f"perplexity {perplexity_given:2}: {bits:.3f} bits per byte")
print("the first, though its perplexity is twice as high")

# %% [markdown]
# **2.** Adam with an L2 penalty adds $\lambda \theta$ to the gradient; AdamW shrinks $\theta$ beside the step. Give both two parameters of value 1, one with gradients
# that alternate between 1 and -1, one with 0.01 and -0.01. How much is left of each after 300 steps?

# %% tags=["solution"] jupyter={"source_hidden": true}
for kind in (torch.optim.Adam, torch.optim.AdamW):
    theta = nn.Parameter(torch.ones(2))
    optimizer = kind([theta], lr=0.01, weight_decay=0.1)
    for step in range(300):
        theta.grad = torch.tensor([1.0, 0.01]) * (-1) ** step
        optimizer.step()
    print(f"{kind.__name__:6}: {theta[0].item():.2f} and {theta[1].item():.2f}")
print("the penalty in Adam is divided by the size of the gradients, the decay of AdamW is not")

# %% [markdown]
# **3.** How far can counting go? Extend the counts to longer contexts, trained on the first 2,000 stories.

# %% tags=["solution"] jupyter={"source_hidden": true}
longer = CountModel(training_rows[:2000], order=7, vocab_size=2048)
by_order = [np.mean([longer.nats(row, n) for row in validation_rows[:20]]) for n in range(1, 8)]
print("order 1 to 7:", [round(float(nats), 1) for nats in by_order], "nats per story")
assert int(np.argmin(by_order)) + 1 in (3, 4, 5)
print("longer contexts soon become so rare that counting fails; the names that matter stand much further back")

# %% [markdown]
# **4.** Most tokens of a tale are easy. Which share of the loss of `tales-1m` falls on the hardest fifth of the tokens?

# %% tags=["solution"] jupyter={"source_hidden": true}
inputs, targets = pad_rows(validation_rows)
with torch.no_grad():
    losses = next_token_loss(shipped(inputs), targets, reduction="none")[targets != IGNORE]
hardest = losses.sort(descending=True).values[: len(losses) // 5].sum() / losses.sum()
assert hardest > 0.7
print("more than 70 % of it: where the grammar chooses a name, a thing, a plot; the rest follows almost surely")

# %% [markdown]
# ## References
#
# - Shannon, C. E. (1948). *A Mathematical Theory of Communication*. Bell System Technical Journal.
# - Pascanu, R., Mikolov, T., Bengio, Y. (2013). *On the difficulty of training recurrent neural networks*. ICML.
# - Kingma, D. P., Ba, J. (2015). *Adam: A Method for Stochastic Optimization*. ICLR.
# - Loshchilov, I., Hutter, F. (2019). *Decoupled Weight Decay Regularization*. ICLR.
# - Radford, A., et al. (2019). *Language Models are Unsupervised Multitask Learners*. OpenAI.
# - Jain, S., Wallace, B. C. (2019). *Attention is not Explanation*. NAACL.
# - Carlini, N., et al. (2023). *Quantifying Memorization Across Neural Language Models*. ICLR.
# - Raschka, S. (2024). *Build a Large Language Model (From Scratch)*. Manning.
