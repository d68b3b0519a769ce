# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Decoding: from probabilities to a choice
#
# You will build every common way to choose the next token as a small part that fits the others, prove each against a trusted implementation, and
# measure on stories whose grammar is known what each way gains in correctness and what it loses in variety.
#
# | | |
# |---|---|
# | You will build | `Temperature`, `TopK`, `TopP`, `MinP`, `Typical`, `RepetitionPenalty`, `CountPenalty`, `NoRepeatNGram`, `beam_search` |
# | You need | [the generation engine](../ch04_gpt/03_generation_engine.ipynb), [the GPT](../ch04_gpt/02_gpt.ipynb); for the beam also [sequence to sequence](../ch03_attention/01_seq2seq.ipynb) |
# | Running time on 2 CPU cores | about 60 seconds |
# | Promotes to | [`shared/sampling.py`](../shared/sampling.py) |
#
# A model gives a probability to every token of its vocabulary. It does not say which one to take. Always the most probable one? A random one? A random
# one of the good ones? The answer decides how a text reads, and it needs no training.
#
# **Notation.** A **logit** $z_i$ is the model's number for token $i$ of a vocabulary of $V$; $p = \mathrm{softmax}(z)$ are the probabilities. A
# **processor** is a function of the tokens so far, `ids` (rows, tokens), and of `logits` (rows, vocab_size); it returns new logits. What must not be chosen
# gets $-\infty$. Probabilities of whole texts are given as natural logarithms, in nats.
#
# ```mermaid
# flowchart LR
#   model -- logits --> a[repetition penalty] --> b[temperature] --> c["top-k, top-p, min-p ..."] --> softmax --> draw --> token
#   token -. joins the tokens so far .-> model
# ```

# %%
import io
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import sweep_decoding
import torch
from IPython.display import Image, display
from safetensors.torch import load_file
from sweep_decoding import END, distinct_ngrams, load_tales
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as reference

from shared import seq2seq
from shared.download import fetch_model_file, gpt2_encoding, or_none
from shared.generation import Processor, check_prompts, evaluating, generate
from shared.gpt import GPTConfig, GPTModel
from shared.plotting import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, label_line, use_style
from shared.proof import compare
from shared.results import record
from shared.seq2seq import Hypothesis
from shared.tale_scoring import score
from shared.tale_tokenizer import tale_encoding
from shared.tales import TaleGenerator, entropy, lexicon, log_probability

use_style()

# %% [markdown] tags=["promote:sampling"]
# How the next token is chosen: processors that reshape the logits, and beam search.
#
# A processor is called as processor(ids, logits) and returns new logits; tokens that must not be chosen get minus infinity. The processors here are frozen
# dataclasses: they hold settings and no state, so one serves any number of texts. They follow three rules. Half precision becomes float32 first. Tokens
# that are exactly tied are treated alike, whatever order a sort would give them. A row with a finite logit keeps at least one.
#
# Left out: processors that need a second model or the logits of earlier steps (contrastive search, Mirostat), sampling within a beam, beams for several
# prompts at once. Drawing and stopping are the business of shared.generation.
#
# Follows Fan et al. (2018) for top-k, Holtzman et al. (2020) for top-p, Nguyen et al. (2024) for min-p, Meister et al. (2023) for typical sampling,
# Keskar et al. (2019) for the repetition penalty, Wu et al. (2016) for a beam search whose scores depend on length.

# %% [markdown]
# ## A place in a story
#
# `tales-1m` is a GPT with a million parameters that was trained on tales (the next notebook explains how). We stop it in the middle of a story and look at what it
# expects. The tales come from a grammar, so here, unlike in real life, we know the right answer: after *house near the* comes one of 32 places,
# each as probable as the others.

# %%
encoding = tale_encoding()
model = load_tales("tales-1m")
FLAT = "Tobias, an engineer, lived with a kitten in a black house near the"
PEAKED = f"{FLAT} valley. One night the dam leaked, and the kitten crept under the"
right = {
    FLAT: Counter(encoding.encode_ordinary(f" {place}")[0] for place in lexicon("landscape")),
    PEAKED: Counter(encoding.encode_ordinary(" bed")[:1]),
}


@torch.inference_mode()
def next_logits(model: GPTModel, text: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of a story's beginning (1, tokens), and the logits of the next one (1, vocab_size)."""
    ids = torch.tensor([[END, *encoding.encode_ordinary(text)]])
    return ids, model(ids, last_only=True)[:, -1]


def share_right(logits: Tensor, tokens: Counter) -> float:
    """Return the probability of the right tokens together."""
    return logits.softmax(dim=-1)[0, list(tokens)].sum().item()


for text, tokens in right.items():
    _, logits = next_logits(model, text)
    print(f"... {text[-24:]!r}: {len(tokens)} right tokens of {logits.shape[1]}")
    assert share_right(logits, tokens) > 0.9

# %% [markdown]
# ## Greedy, and why it goes round in circles
#
# The simplest choice is the most probable token. For a well trained model on short stories that is harmless, as we shall see. For a weak model it is a trap:
# once a phrase has been repeated, repeating it again is the most probable continuation. We train a small model for a moment, far too short, and let it write.

# %%
def undertrained(steps: int) -> GPTModel:
    """A small model after a few steps on tales, 16 whole stories each."""
    torch.manual_seed(0)
    weak = GPTModel(GPTConfig.preset("tales-1m", emb_dim=64, n_heads=2, n_layers=2))
    optimizer = torch.optim.AdamW(weak.parameters(), lr=5e-3)
    tales = TaleGenerator(0)
    for _ in tqdm(range(steps), desc="training", unit="step", leave=False):
        rows = [
            torch.tensor([END, *encoding.encode_ordinary(tale.text), END]) for tale in tales.stories(16)
        ]
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)  # (16, tokens)
        targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)
        loss = nn.functional.cross_entropy(weak(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weak.eval()


weak = undertrained(60)


def write(model: GPTModel, prompt: str, n_new: int = 80, **options: object) -> str:
    """Continue the beginning of a story and return what was added."""
    ids = [END, *encoding.encode_ordinary(prompt)]
    return encoding.decode(generate(model, [ids], n_new, stop_tokens=[END], **options)[0])


PROMPT = "Tobias, an engineer, lived"
greedy_text = write(weak, PROMPT, 150)
sampled_text = write(weak, PROMPT, 150, temperature=1.0, seed=0)
for name, text in (("greedy", greedy_text), ("drawn", sampled_text)):
    print(f"{name}: {PROMPT}{text}\n")

# %% [markdown]
# The weak model loops when it is greedy; when its tokens are drawn, nothing makes sense but nothing loops either. A number for this: of all sequences of four words
# in a text, which share are different ones?

# %%
for name, text in (("greedy", greedy_text), ("drawn", sampled_text)):
    print(f"{name}: {distinct_ngrams([text]):.0%} of the 4-grams are distinct")
assert distinct_ngrams([greedy_text]) < 0.5 < 0.9 < distinct_ngrams([sampled_text])

# %% [markdown]
# Between *always the best* and *anything goes* lies everything that follows.
#
# ## Processors
#
# A processor takes the tokens so far and the logits, and returns logits. That is the whole interface; `generate` applies any sequence of them. We add one function that
# applies a sequence and checks the shapes, and two helpers. Half precision becomes float32, since float16 ends at 65,504 and bfloat16 keeps
# 8 bits of a number.

# %% tags=["promote:sampling"]
def process(processors: Sequence[Processor], ids: Tensor, logits: Tensor) -> Tensor:
    """Return logits (rows, vocab_size) after all processors, the first one first.

    `ids` (rows, tokens), int64, are the tokens so far; a row needs at least one finite logit. Raises ValueError if a
    shape or type does not fit.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floats (rows, vocab_size), got {logits.dtype} {tuple(logits.shape)}")
    if ids.dim() != 2 or len(ids) != len(logits) or ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64 ({len(logits)}, tokens), got {ids.dtype} {tuple(ids.shape)}")
    for processor in processors:
        logits = processor(ids, logits)
    return logits


def _widen(logits: Tensor) -> Tensor:
    """Turn half precision into float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _check(name: str, value: float, low: float, high: float = math.inf, *, kind: type = float) -> None:
    """Raise ValueError unless `value` is a number from `low` to `high`, a whole one if `kind` is int."""
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise ValueError(f"{name} must be {noun} {limits}, got {value!r}")


# %% [markdown]
# Everything is tried first on five words whose probabilities are halves of each other, so that the results can be checked by hand. The last two are tied.

# %%
words = ["lamp", "boat", "ladder", "violin", "pie"]
toy_logits = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]]).log()
toy_ids = torch.tensor([[0, 2, 0]])  # the text so far: lamp ladder lamp


def show(**processors: Processor | Sequence[Processor]) -> pd.DataFrame:
    """A table of the toy probabilities after each of several processors."""
    rows = {"as they are": toy_logits.softmax(dim=-1)[0].tolist()}
    for name, chosen in processors.items():
        chosen = chosen if isinstance(chosen, tuple) else (chosen,)
        logits = process(chosen, toy_ids, toy_logits)
        rows[name.replace("_", " ")] = logits.softmax(dim=-1)[0].tolist()
    return pd.DataFrame(rows, index=words).T.round(4)


show()

# %% [markdown]
# ### Temperature
#
# Divide all logits by $\tau$: $p_i \propto e^{z_i/\tau}$. Every ratio of two probabilities is raised to the power $1/\tau$. At $\tau = 1/2$ the ratios are squared and the
# favourite gains; at $\tau = 2$ the roots are taken and the rest gains; towards 0 it becomes the greedy choice, towards infinity an even draw.

# %% tags=["promote:sampling"]
# Within these, no finite logit below 1e32 can become infinite.
SMALLEST, LARGEST = 1e-6, 1e6


@dataclass(frozen=True)
class Temperature:
    """Divide the logits by `temperature`: below 1 the distribution sharpens, above 1 it flattens.

    Raises ValueError outside 1e-6 to 1e6. The limit at 0 is the choice of the largest logit.
    """

    temperature: float

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        return _widen(logits) / self.temperature


# %%
show(cold=Temperature(0.5), hot=Temperature(2.0))

# %% [markdown]
# *Lamp* against *boat* is 2 : 1 as they are, 4 : 1 cold and 1.41 : 1 hot.
#
# ### Top-k
#
# Keep the $k$ most probable tokens. What about ties? With $k = 4$ the fourth and the fifth word are equal; to keep one of them only would be a choice by the order of the
# vocabulary. So all that equal the last one stay.

# %% tags=["promote:sampling"]
@dataclass(frozen=True)
class TopK:
    """Keep the `k` largest logits and those tied with the last of them (Fan et al., 2018).

    A `k` of 1 is greedy, a `k` of the vocabulary or more changes nothing. Raises ValueError if `k` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        _check("k", self.k, 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        last = logits.topk(min(self.k, logits.shape[-1])).values[:, -1:]  # (rows, 1)
        return logits.masked_fill(logits < last, -math.inf)


# %%
show(k_2=TopK(2), k_4_with_tie=TopK(4))

# %% [markdown]
# ### Top-p
#
# A fixed $k$ is too many where one word fits and too few where a hundred do. Top-p, or nucleus sampling, keeps the fewest most probable tokens that reach a probability of $p$ together:
# few where the model is sure, many where it is not.

# %% tags=["promote:sampling"]
def _keep_mass(logits: Tensor, order: Tensor, mass: float) -> Tensor:
    """Keep tokens in the order of `order`, smallest first, until their probability together reaches `mass`.

    Tokens tied in `order` with the last one kept are kept too: how a sort arranges equals makes no difference.
    """
    ordered, tokens = order.sort(dim=-1)
    reached = logits.softmax(dim=-1).gather(-1, tokens).cumsum(dim=-1)  # (rows, vocab_size)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(order > ordered.gather(-1, last), -math.inf)


@dataclass(frozen=True)
class TopP:
    """Keep the fewest most probable tokens whose probability reaches `p`, and ties (Holtzman et al., 2020).

    A `p` of 1 changes nothing. Raises ValueError outside 1e-6 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        _check("p", self.p, SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        # A sum that rounds to 1 too early must not cut the tail.
        return logits if self.p == 1 else _keep_mass(logits, -logits, self.p)


# %%
show(p_07=TopP(0.7), p_09=TopP(0.9))

# %% [markdown]
# For 0.7 two words suffice (0.5 + 0.25). For 0.9 four are needed (0.9375), and the fifth stays as it equals the fourth.
#
# ### Min-p
#
# Keep what has at least the share $p$ of the favourite's probability. In logits this is one comparison, $z_i \ge \max_j z_j + \ln p$: no softmax, no sort.

# %% tags=["promote:sampling"]
@dataclass(frozen=True)
class MinP:
    """Keep tokens at least `p` times as probable as the most probable one (Nguyen et al., 2024).

    0 changes nothing, 1 keeps the favourite and its equals. Raises ValueError outside 0 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        _check("p", self.p, 0, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if self.p == 0:
            return logits
        least = logits.amax(dim=-1, keepdim=True) + math.log(self.p)
        return logits.masked_fill(logits < least, -math.inf)


# %%
show(p_01=MinP(0.1), p_02=MinP(0.2), p_1=MinP(1))

# %% [markdown]
# *Violin* has an eighth of *lamp*'s probability: enough for 0.1, too little for 0.2.
#
# ### Typical
#
# A different thought: people do not say the most expected thing, but things about as surprising as expected. The surprise of a token is $-\ln p_i$, its mean is the entropy $H$. Typical sampling orders
# the tokens by $|{-\ln p_i} - H|$ and keeps them until they reach a probability. The function for that exists already.

# %% tags=["promote:sampling"]
@dataclass(frozen=True)
class Typical:
    """Keep the tokens whose surprise is nearest to the mean surprise, up to a probability of `mass`, and ties.

    Locally typical sampling (Meister et al., 2023). A `mass` of 1 changes nothing. Raises ValueError outside 1e-6 to 1.
    """

    mass: float

    def __post_init__(self) -> None:
        _check("mass", self.mass, SMALLEST, 1)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if self.mass == 1:
            return logits
        surprise = -logits.log_softmax(dim=-1)
        mean = torch.special.entr((-surprise).exp()).sum(dim=-1, keepdim=True)  # the entropy, (rows, 1)
        return _keep_mass(logits, (surprise - mean).abs(), self.mass)


# %%
probabilities = toy_logits.softmax(dim=-1)[0]
distance = (-probabilities.log() - torch.special.entr(probabilities).sum()).abs()
print("distance from the mean surprise:", ", ".join(f"{w} {d:.2f}" for w, d in zip(words, distance, strict=True)))
show(mass_02=Typical(0.2), mass_06=Typical(0.6))

# %% [markdown]
# With a mass of 0.2 only *boat* stays: it is the most typical word, and the most probable one is gone.
#
# ### Against repetition
#
# Three processors read `ids`. The **repetition penalty** divides the positive logits of tokens seen so far by a factor and multiplies the negative ones. The **count penalty**
# subtracts a constant for each token seen, and another for each time it was seen. The **n-gram ban** forbids a token that would complete a sequence of $n$ tokens that stands in the text already. It
# is the only one that could leave nothing to choose from; a row in which it would is left as it is.

# %% tags=["promote:sampling"]
@dataclass(frozen=True)
class RepetitionPenalty:
    """Make tokens seen so far less probable: positive logits / `penalty`, negative ones * `penalty`.

    Keskar et al. (2019). The prompt counts as seen. It depends on where the logits have their zero: adding a
    constant to all of them changes its effect. 1 does nothing, below 1 it rewards. Raises ValueError outside 1e-6 to
    1e6.
    """

    penalty: float

    def __post_init__(self) -> None:
        _check("penalty", self.penalty, SMALLEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
        punished = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(seen, punished, logits)


@dataclass(frozen=True)
class CountPenalty:
    """Subtract `presence` from the logits of tokens seen so far, and `frequency` once for each time they were seen.

    The prompt counts as seen. Negative values reward. Raises ValueError outside -1e6 to 1e6.
    """

    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        _check("presence", self.presence, -LARGEST, LARGEST)
        _check("frequency", self.frequency, -LARGEST, LARGEST)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        times = torch.zeros_like(logits).scatter_add_(1, ids, logits.new_ones(ids.shape))
        return logits - self.frequency * times - self.presence * (times > 0)


@dataclass(frozen=True)
class NoRepeatNGram:
    """Forbid tokens that would complete a sequence of `n` tokens that the row holds already.

    A row that would have nothing left stays as it is. Raises ValueError if `n` is below 1.
    """

    n: int

    def __post_init__(self) -> None:
        _check("n", self.n, 1, kind=int)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        logits = _widen(logits)
        if ids.shape[1] < self.n:
            return logits
        grams = ids.unfold(1, self.n, 1)  # (rows, tokens - n + 1, n)
        latest = ids[:, None, ids.shape[1] - self.n + 1 :]  # (rows, 1, n - 1)
        rows, places = (grams[..., :-1] == latest).all(dim=-1).nonzero(as_tuple=True)
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[rows, grams[rows, places, -1]] = True
        has_others = (logits > -math.inf).logical_and(~banned).any(dim=-1, keepdim=True)
        return logits.masked_fill(banned & has_others, -math.inf)


# %%
print("so far:", " ".join(words[token] for token in toy_ids[0]))
show(
    penalty_2=RepetitionPenalty(2.0),
    presence_ln2=CountPenalty(presence=math.log(2)),
    frequency_ln2=CountPenalty(frequency=math.log(2)),
    no_repeated_pair=NoRepeatNGram(2),
)

# %% [markdown]
# A presence of ln 2 halves *lamp* and *ladder* before all are normalised again; a frequency of ln 2 quarters *lamp*, which stands there twice. The last token was *lamp*, and *lamp ladder* stands
# in the text, so *ladder* is out.
#
# Nonsense is refused where it is built:

# %%
for build in (
    lambda: Temperature(0.0),
    lambda: TopK(0),
    lambda: TopP(1.5),
    lambda: MinP(-0.1),
    lambda: RepetitionPenalty(math.nan),
    lambda: NoRepeatNGram(2.5),
):
    try:
        build()
    except ValueError as error:
        print("ValueError:", error)

# %% [markdown]
# ## What each does to a real distribution
#
# The same processors after a real beginning: the model must now name what happened that night. The grammar draws one of many events, all equally probable, and counts them by their first token: most begin
# with *the* or *a*.

# %%
NIGHT = f"{FLAT} valley. One night"
right[NIGHT] = Counter(encoding.encode_ordinary(f" {event}")[0] for event in lexicon("storm"))
ids, logits = next_logits(model, NIGHT)
truth = torch.zeros_like(logits)
for token, count in right[NIGHT].items():
    truth[0, token] = count / right[NIGHT].total()
print(f"{right[NIGHT].total()} events begin with {len(right[NIGHT])} different tokens")
wrong_mass = (logits.softmax(dim=-1) - truth).abs().sum().item() / 2
print(f"model and grammar differ by {wrong_mass:.2f} (0: equal, 1: nothing in common)")
assert wrong_mass < 0.2
top = logits[0].topk(20).indices
acts = {
    "The model, against the grammar (dots)": (),
    "Temperature 0.5: the head gains": (Temperature(0.5),),
    "Temperature 2: the tail gains": (Temperature(2.0),),
    "Top-k 8: eight stay": (TopK(8),),
    "Top-p 0.7: seven tenths stay": (TopP(0.7),),
    "Min-p 0.1: a tenth of the first": (MinP(0.1),),
    "Typical 0.5: the first may go": (Typical(0.5),),
    "Repetition penalty 1.5: seen ones fall": (RepetitionPenalty(1.5),),
}
figure, grid = plt.subplots(4, 2, figsize=(10, 9.5), sharex=True, sharey=True)
for axes, (title, processors) in zip(grid.flat, acts.items(), strict=True):
    after = process(processors, ids, logits).softmax(dim=-1)[0, top]
    axes.bar(range(20), after, color=BLUE if processors else GREY, width=0.8)
    axes.step(range(20), logits.softmax(dim=-1)[0, top], where="mid", color=BLACK, linewidth=1)
    axes.set_title(title)
grid[0, 0].plot(range(20), truth[0, top], "o", color=ORANGE, markersize=5)
for axes in grid[:, 0]:
    axes.set_ylabel("probability")
for axes in grid[-1]:
    axes.set_xticks(range(20), [encoding.decode([token]).strip() for token in top], rotation=60, fontsize=9)
plt.show()

# %% [markdown]
# The figure has eight panels with the same twenty tokens. The thin black line is the model's own distribution, the bars are what is left of it. The first panel shows that the model has learnt the grammar's
# probabilities, not only which words are allowed. So every panel after the first changes something that was right. Look at the last: *the* and *a* occurred before and are punished, though a story needs them
# again and again.
#
# Then why cut at all? Because of the tail. Here are both places from the beginning, with all probabilities on a logarithmic scale, and what three settings keep of them:

# %%
CUTS = {"top-k 10": TopK(10), "top-p 0.9": TopP(0.9), "min-p 0.1": MinP(0.1)}
figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
titles = (f"Flat: {len(right[FLAT])} tokens are right", "Peaked: one token is right")
kept = {}
for axes, text, title in zip(panels, (FLAT, PEAKED), titles, strict=True):
    ids, logits = next_logits(model, text)
    values, order = logits.softmax(dim=-1)[0].sort(descending=True)
    is_right = torch.tensor([token in right[text] for token in order.tolist()])
    ranks = torch.arange(1, len(values) + 1)
    axes.scatter(ranks[~is_right], values[~is_right], s=8, color=RED)
    axes.scatter(ranks[is_right], values[is_right], s=28, color=GREEN, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="rank", title=title, ylim=(1e-9, 1.5))
    for (name, cut), height in zip(CUTS.items(), (1e-7, 1e-6, 1e-5), strict=True):
        n = int((cut(ids, logits) > -math.inf).sum())
        kept[name, text] = (n, int(is_right[:n].sum()))
        axes.plot([0.9, n], [height, height], color=PURPLE, linewidth=3, solid_capstyle="butt")
        label_line(axes, f"{name}: {n}", n, height, PURPLE)
panels[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# Green tokens are right, red ones wrong; the purple bars say how many tokens a setting keeps. A model that never saw a wrong word still gives each a little, and about two thousand of them add up.
# Counted:

# %%
for (name, text), (n, n_right) in kept.items():
    place = "flat" if text == FLAT else "peaked"
    print(f"{name}, {place} place: keeps {n_right} of {len(right[text])} right tokens and {n - n_right} wrong ones")
assert kept["top-k 10", FLAT] == (10, 10) and kept["top-k 10", PEAKED] == (10, 1)
assert kept["top-p 0.9", FLAT][1] < len(right[FLAT])
assert all(kept[name, PEAKED] == (1, 1) for name in ("top-p 0.9", "min-p 0.1"))

# %% [markdown]
# Top-k with ten throws two thirds of the right places away and lets nine wrong tokens in where only one is right. Top-p and min-p adapt. But top-p, too, loses some of the right places: in a flat row, the last
# tenth of the probability is made of good words.
#
# ## The order matters
#
# Processors are functions, and functions do not commute. Heat first and cut afterwards, or cut first and heat what is left? On the toy, with the number of words kept:

# %%
def n_kept(*processors: Processor) -> int:
    """How many of the five toy words are left."""
    return int((process(processors, toy_ids, toy_logits) > -math.inf).sum())


hot = Temperature(2.0)
rows = {
    name: (n_kept(hot, cut), n_kept(cut, hot))
    for name, cut in (("TopK(2)", TopK(2)), ("TopP(0.7)", TopP(0.7)), ("MinP(0.3)", MinP(0.3)))
}
pd.DataFrame(rows, index=["temperature 2, then the cut", "the cut, then temperature 2"]).T

# %% [markdown]
# Temperature keeps the order of tokens, so top-k does not mind. Top-p and min-p do: they look at probabilities, and heat has changed them. Cut first, and the cut judges by the model's own
# distribution; the later heat then varies only among what passed. The libraries mostly heat first.
#
# The repetition penalty has a second trap. Adding 3 to every logit changes no probability, yet it changes what the penalty does, because it treats the two sides of zero differently. The count penalty
# does not care:

# %%
shifted = toy_logits + 3
assert torch.allclose(shifted.softmax(dim=-1), toy_logits.softmax(dim=-1))
rows = {}
for name, penalty in (
    ("RepetitionPenalty(2)", RepetitionPenalty(2.0)),
    ("CountPenalty(1)", CountPenalty(1.0)),
):
    for kind, z in (("logits", toy_logits), ("logits + 3", shifted), ("log-probabilities", toy_logits.log_softmax(-1))):
        rows[f"{name}, {kind}"] = penalty(toy_ids, z).softmax(dim=-1)[0].tolist()
pd.DataFrame(rows, index=words).T.round(3)

# %% [markdown]
# One penalty of 2, three distributions. This is no subtlety: transformers applies the penalty to logits when it samples and to log-probabilities when it searches with beams.
#
# ## Proof: equal to transformers' processors
#
# Each of ours against theirs, 200 random cases each: vocabularies of 2 to 300 tokens, batches of 1 to 4 rows, settings at random. In every second case the logits are rounded to halves, so that they are full
# of ties. The same tokens must be left, with the same probabilities.

# %%
def random_case(tied: bool) -> tuple[Tensor, Tensor]:
    """Tokens so far and logits of a random size."""
    rows, vocab_size, tokens = (int(torch.randint(low, high, ())) for low, high in ((1, 5), (2, 301), (1, 20)))
    logits = 3 * torch.randn(rows, vocab_size)
    ids = torch.randint(min(vocab_size, 12), (rows, tokens))
    return ids, (2 * logits).round() / 2 if tied else logits


def check_pair(name: str, ours: Callable[..., Processor], theirs: Callable, draw: Callable[[], object], ties: bool) -> None:
    """Compare one pair of processors on 200 random cases; `draw` gives the setting."""
    pairs = []
    for case in range(200):
        setting = draw()
        ids, logits = random_case(tied=ties and case % 2 == 1)
        mine, other = ours(setting)(ids, logits), theirs(setting)(ids, logits.clone())
        empty = (other == -math.inf).all(dim=-1)  # rows in which theirs leaves nothing: ours leaves them as they are
        assert torch.equal(mine[empty], logits[empty]), (name, case)
        mine, other = mine[~empty], other[~empty]
        assert torch.equal(mine == -math.inf, other == -math.inf), (name, case)
        pairs.append((mine.softmax(dim=-1).flatten(), other.softmax(dim=-1).flatten()))
    compare(f"{name}, 200 cases", *(torch.cat(side) for side in zip(*pairs, strict=True)), 1e-6)


torch.manual_seed(0)
share = lambda: 0.02 + 0.96 * torch.rand(()).item()
factor = lambda: 0.3 + 2.7 * torch.rand(()).item()
number = lambda: int(torch.randint(1, 40, ()))
check_pair("Temperature", Temperature, reference.TemperatureLogitsWarper, factor, ties=True)
check_pair("TopK", TopK, reference.TopKLogitsWarper, number, ties=True)
check_pair("TopP", TopP, reference.TopPLogitsWarper, share, ties=False)
check_pair("MinP", MinP, reference.MinPLogitsWarper, share, ties=True)
check_pair("Typical", Typical, reference.TypicalLogitsWarper, share, ties=True)
check_pair("RepetitionPenalty", RepetitionPenalty, reference.RepetitionPenaltyLogitsProcessor, factor, ties=True)
check_pair("NoRepeatNGram", lambda n: NoRepeatNGram(n + 1), lambda n: reference.NoRepeatNGramLogitsProcessor(n + 1), lambda: number() % 3, ties=True)

# %% [markdown]
# For top-p the ties are left out above: theirs cuts a group of equal tokens wherever the sort happened to put the limit, ours keeps the group whole. So with ties ours must keep everything that theirs keeps,
# and what it keeps besides must equal the smallest logit that theirs keeps. And all in a chain, in the order in which transformers arranges them:

# %%
n_different = 0
for _ in range(200):
    p, (ids, logits) = share(), random_case(tied=True)
    mine = TopP(p)(ids, logits) > -math.inf
    other = reference.TopPLogitsWarper(p)(ids, logits) > -math.inf
    smallest = logits.masked_fill(~other, math.inf).amin(dim=-1, keepdim=True)
    assert torch.equal(mine, other | (logits == smallest))
    n_different += not torch.equal(mine, other)
print(f"TopP with ties, 200 cases: theirs splits a tie in {n_different}, otherwise equal")


def chain(setting: tuple) -> Callable[[Tensor, Tensor], Tensor]:
    penalty, temperature, k, p, min_p = setting
    steps = (RepetitionPenalty(penalty), Temperature(temperature), TopK(k), TopP(p), MinP(min_p))
    return lambda ids, logits: process(steps, ids, logits)


def their_chain(setting: tuple) -> Callable[[Tensor, Tensor], Tensor]:
    penalty, temperature, k, p, min_p = setting
    return reference.LogitsProcessorList(
        [
            reference.RepetitionPenaltyLogitsProcessor(penalty),
            reference.TemperatureLogitsWarper(temperature),
            reference.TopKLogitsWarper(k),
            reference.TopPLogitsWarper(p),
            reference.MinPLogitsWarper(min_p),
        ]
    )


check_pair("all in a chain", chain, their_chain, lambda: (factor(), factor(), number(), share(), share()), ties=False)
record("processors against transformers", "1,800 random cases agree", "", "same tokens kept, probabilities within 1e-6")

# %% [markdown]
# Half precision: given float16 or bfloat16, ours must do exactly what it does with the same numbers in float32. Computed in float16, a low temperature already overflows:

# %%
torch.manual_seed(1)
ids, logits = torch.zeros(1, 1, dtype=torch.int64), 5 * torch.randn(1, 2048)
steps = (Temperature(0.7), TopK(50), TopP(0.9), MinP(0.1), Typical(0.9), RepetitionPenalty(1.2), CountPenalty(0.5))
for half, step in itertools.product((logits.half(), logits.bfloat16()), steps):
    assert torch.equal(step(ids, half), step(ids, half.float()))
cold = 1e-4
ours = Temperature(cold)(ids, logits.half()).softmax(dim=-1)
theirs = reference.TemperatureLogitsWarper(cold)(ids, logits.half()).softmax(dim=-1)
finite = [bool(probabilities.isfinite().all()) for probabilities in (ours, theirs)]
print(f"temperature {cold} on float16 logits, probabilities are numbers: ours {finite[0]}, theirs {finite[1]}")

# %% [markdown]
# ## Beam search
#
# Greedy takes the best token and never looks back. The most probable *text* may begin with the second-best token. Beam search keeps the $b$ most probable beginnings, extends each by every token, and keeps
# the $b$ best of the results. Chapter 3 has a beam search for sequence-to-sequence models. For a GPT we write another, because it does three things that one does not:
#
# - **Finished texts leave the beam.** There, a finished sequence keeps its place among the $b$; here it moves to a list of its own and the beam stays full.
# - **Scores depend on length.** A sum of log-probabilities falls with every token, so it favours short texts. A text of $n$ new tokens, end token included, scores $\ln p / n^{\alpha}$; $\alpha$ is the length penalty, 0 leaves the sum, and 1
#   is the mean. (Wu et al., 2016, use another power of the length.)
# - **The cache is reordered, not copied by hand.** Beginnings that share a parent share its keys and values; `KeyValueCache.reorder` picks the rows.
#
# What a result is stays the same: the `Hypothesis` of chapter 3, with ids, log-probability, and whether it has ended.
#
# Two details decide whether the result is right. Of the candidates the best $2b$ are looked at: each of the $b$ beginnings has one extension by the end token, so at least $b$ others are left to go on with. And the search may stop early only
# when no beginning can still win: its log-probability only falls, so divided by the most favourable length still possible it bounds every score to come.

# %% tags=["promote:sampling"]
def beam_score(hypothesis: Hypothesis, length_penalty: float) -> float:
    """Return log-probability / length ** length_penalty, where the length counts the end token if there is one."""
    return hypothesis.log_probability / (len(hypothesis.ids) + hypothesis.finished) ** length_penalty


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    beam_size: int,
    end_token: int | None = None,
    length_penalty: float = 1.0,
    processors: Sequence[Processor] = (),
) -> list[Hypothesis]:
    """Return the up to `beam_size` best continuations of a prompt that a beam search finds, the best score first.

    A beam of 1 is greedy decoding; a beam that is never full is complete enumeration. Equal scores come in no
    particular order.

    Args:
        model: A decoder as `generate` needs it; it runs in evaluation mode.
        prompt: Ids of the tokens to continue.
        max_new_tokens: Most ids to add; what has not ended by then competes unfinished.
        beam_size: Unfinished continuations that are followed at a time.
        end_token: Ends a continuation; it is not part of the returned ids.
        length_penalty: The exponent of `beam_score`: above 0 it helps long continuations, below 0 short ones.
        processors: Applied to the logits; probabilities are those of the softmax after them.

    Raises:
        ValueError: An argument is out of range (it is named), or the context does not suffice.
    """
    _check("beam_size", beam_size, 1, kind=int)
    _check("length_penalty", length_penalty, -10, 10)
    if end_token is not None:
        _check("end_token", end_token, 0, model.config.vocab_size - 1, kind=int)
    [prompt] = check_prompts(model, [prompt], max_new_tokens)
    finished: list[Hypothesis] = []
    with evaluating(model):
        ids = torch.tensor([prompt], device=next(model.parameters()).device)
        caches = model.new_caches(len(prompt) + max_new_tokens)
        logits = model(ids, last_only=True, caches=caches)[:, -1]
        totals = torch.zeros(1, 1, device=ids.device)  # log-probabilities of the beam, (beam, 1)
        for length in range(1, max_new_tokens + 1):
            scores = totals + process(processors, ids, _widen(logits)).log_softmax(dim=-1)  # (beam, vocab_size)
            best = scores.flatten().topk(min(2 * beam_size, scores.numel()))
            rows, tokens = best.indices // scores.shape[1], best.indices % scores.shape[1]
            running = []
            for place, (total, token) in enumerate(zip(best.values.tolist(), tokens.tolist(), strict=True)):
                if total == -math.inf:
                    break
                ended = token == end_token
                if not ended and length < max_new_tokens:
                    running.append(place)
                elif place < beam_size:
                    new = [*ids[rows[place], len(prompt) :].tolist(), *([] if ended else [token])]
                    finished.append(Hypothesis(tuple(new), total, ended))
            finished.sort(key=lambda hypothesis: -beam_score(hypothesis, length_penalty))
            del finished[beam_size:]
            if not running:
                break
            most_favourable = max_new_tokens if length_penalty > 0 else length + 1
            bound = best.values[running[0]].item() / most_favourable**length_penalty
            if len(finished) == beam_size and bound <= beam_score(finished[-1], length_penalty):
                break
            kept = torch.tensor(running[:beam_size], device=ids.device)
            ids = torch.cat([ids[rows[kept]], tokens[kept, None]], dim=1)
            totals = best.values[kept, None]
            for cache in caches:
                cache.reorder(rows[kept])
            logits = model(ids[:, -1:], last_only=True, caches=caches)[:, -1]
    return finished


# %% [markdown]
# ### Proof: against every possible text
#
# With four tokens and five places there are few enough texts to list them all, a few hundred. One pass of the model over all 1,024 sequences gives every probability; what follows an end token is dropped. A beam that is never
# full must find exactly this list, and in this order, with every length penalty.

# %%
def random_gpt(vocab_size: int, seed: int, context_length: int = 24) -> GPTModel:
    """A tiny GPT whose weights are large enough to have opinions."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size, context_length=context_length, emb_dim=16, n_heads=2, n_layers=2, dropout=0.0)
    small = GPTModel(config).eval()
    for parameter in small.parameters():
        nn.init.normal_(parameter, std=0.5)
    return small


@torch.inference_mode()
def every_text(small: GPTModel, prompt: list[int], n_new: int, end: int, alpha: float) -> list[tuple[float, tuple]]:
    """All continuations with their scores, the best first: they end with `end`, or have `n_new` tokens."""
    V = small.config.vocab_size
    texts = torch.tensor(list(itertools.product(range(V), repeat=n_new)))  # (V ** n_new, n_new)
    ids = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    log_p = small(ids[:, :-1]).log_softmax(dim=-1)[:, len(prompt) - 1 :].gather(2, texts[:, :, None])[..., 0]
    found = {}
    for text, terms in zip(texts.tolist(), log_p, strict=True):
        n = text.index(end) + 1 if end in text else n_new
        found[tuple(text[:n])] = terms[:n].sum().item() / n**alpha
    return sorted(((value, text) for text, value in found.items()), reverse=True)


small = random_gpt(vocab_size=4, seed=0)
for alpha in (-0.5, 0.0, 0.6, 1.0):
    expected = every_text(small, [1, 2], 5, end=0, alpha=alpha)
    found = beam_search(small, [1, 2], 5, beam_size=1024, end_token=0, length_penalty=alpha)
    assert [h.ids + (0,) * h.finished for h in found] == [text for _, text in expected]
    scores = [beam_score(h, alpha) for h in found]
    compare(f"length penalty {alpha}, {len(found)} texts", scores, [value for value, _ in expected], 1e-4)

# %% [markdown]
# A narrow beam can miss the best. How often, over fifty random models with eight tokens?

# %%
hits = Counter()
for seed in range(50):
    small = random_gpt(vocab_size=8, seed=seed)
    _, best_text = every_text(small, [1], 4, end=0, alpha=0.0)[0]
    for size in (1, 2, 4, 8):
        first = beam_search(small, [1], 4, beam_size=size, end_token=0, length_penalty=0.0)[0]
        hits[size] += first.ids + (0,) * first.finished == best_text
for size, n in hits.items():
    print(f"beam of {size:2d}: finds the most probable text for {n} of 50 models")
assert hits[1] < hits[2] < hits[8]

# %% [markdown]
# ### Proof: equal to transformers
#
# The same weights in their GPT-2 and in ours, random sizes, beams of 2 to 5, several length penalties. Their default stops by a rule of thumb; `early_stopping="never"` asks for what we do. All returned texts and scores must agree.

# %%
RENAMED = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.ln_f": "final_norm",
    "transformer.h": "blocks",
    "ln_1": "attention_norm",
    "ln_2": "feed_forward_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.output",
    "mlp.c_fc": "feed_forward.up",
    "mlp.c_proj": "feed_forward.down",
}


def twin_of(ours: GPTModel) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of ours."""
    c = ours.config
    sizes = {"n_positions": c.context_length, "n_embd": c.emb_dim, "n_head": c.n_heads, "n_layer": c.n_layers}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, **sizes, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            transposed = ".c_" in name and name.endswith("weight")
            for old, new in RENAMED.items():
                name = name.replace(old, new)
            value = ours.get_parameter(name)
            parameter.copy_(value.T if transposed else value)
    return theirs.eval()


def their_beams(theirs: GPT2LMHeadModel, prompt: list[int], n_new: int, size: int, alpha: float, **options) -> list:
    """(ids with the end token 0, score) of each of their results."""
    out = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        max_new_tokens=n_new, num_beams=size, num_return_sequences=size, length_penalty=alpha, eos_token_id=0,
        pad_token_id=0, early_stopping="never", return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    rows = [row[len(prompt) :] for row in out.sequences.tolist()]
    return [
        (tuple(row[: row.index(0) + 1] if 0 in row else row), value)
        for row, value in zip(rows, out.sequences_scores.tolist(), strict=True)
    ]


ours_scores, their_scores = [], []
for seed in range(60):
    small = random_gpt(vocab_size=8 + seed % 13, seed=seed)
    prompt, size, alpha = [1 + seed % 5, 2], 2 + seed % 4, (-0.5, 0.0, 0.5, 1.0, 2.0)[seed % 5]
    expected = their_beams(twin_of(small), prompt, 12, size, alpha)
    found = beam_search(small, prompt, 12, beam_size=size, end_token=0, length_penalty=alpha)
    assert [h.ids + (0,) * h.finished for h in found] == [ids for ids, _ in expected], seed
    ours_scores += [beam_score(h, alpha) for h in found]
    their_scores += [value for _, value in expected]
compare(f"60 searches, {len(ours_scores)} texts: the texts are equal, scores", ours_scores, their_scores, 1e-4)
record("beam search against transformers", "60 searches give the same texts", "", "scores within 1e-4")

# %% [markdown]
# ### The most probable story is not a typical one
#
# Now on the trained model. We look for the most probable story with beams of growing width, and ask the grammar how probable the story really is.

# %%
rows = []
for size in (1, 2, 4, 8):
    best = beam_search(model, [END], 255, beam_size=size, end_token=END, length_penalty=0.0)[0]
    text = encoding.decode(best.ids)
    row = {"beam": size, "log p, model": best.log_probability, "log p, grammar": log_probability(text)}
    rows.append({**row, "tokens": len(best.ids), "whole story": score(text).story})
likeliest = pd.DataFrame(rows).set_index("beam").round(1)
print(f"a story drawn from the grammar has on average {-entropy():.1f}")
likeliest

# %%
print("the widest beam's story:\n" + text + "\n")
drawn = [story.log_probability for story in TaleGenerator(1).stories(2000)]
n_as_probable = sum(value >= best.log_probability for value in drawn)
print(f"of 2,000 stories drawn from the grammar, {n_as_probable} are as probable as the model makes this one")
assert best.log_probability >= likeliest["log p, model"].iloc[0] - 0.05 and n_as_probable < 1000

# %% [markdown]
# The widest beam finds a story that the model holds for more probable than a drawn one usually is. It is one text of very many. And most choices in this grammar are even, so what a beam can pick out are, besides a plan with few
# choices, the model's small errors: compare the two columns. Where the aim is *the* right answer, as in translation, a beam helps; where the aim is to write as the source writes, it gives a rarity. (In larger models the most probable
# text is often empty or repetitive: Stahlberg and Byrne, 2019; Holtzman et al., 2020.)
#
# Length penalties on the same search: above 0 longer stories win, below 0 shorter ones.

# %%
lengths = {}
for alpha in (-2.0, 0.0, 2.0):
    found = beam_search(model, [END], 255, beam_size=8, end_token=END, length_penalty=alpha)
    lengths[alpha] = len(found[0].ids)
    print(f"length penalty {alpha:4.1f}: the first of {len(found)} stories has {len(found[0].ids)} tokens")
assert lengths[-2.0] <= lengths[0.0] <= lengths[2.0]

# %% [markdown]
# ## Curing repetition, and the price
#
# Back to the weak model that went round in circles. Each of the three penalties breaks the loop:

# %%
cures = {
    "greedy": (),
    "RepetitionPenalty(1.5)": (RepetitionPenalty(1.5),),
    "CountPenalty(frequency=0.5)": (CountPenalty(frequency=0.5),),
    "NoRepeatNGram(4)": (NoRepeatNGram(4),),
}
distinct = {}
for name, processors in cures.items():
    text = write(weak, PROMPT, 150, processors=processors)
    distinct[name] = distinct_ngrams([text])
    print(f"{name}: {distinct[name]:.0%} of the 4-grams are distinct\n   {PROMPT}{text[:150]}\n")
assert all(distinct[name] > distinct["greedy"] + 0.2 for name in cures if name != "greedy")

# %% [markdown]
# More variety, no more sense: a penalty treats the symptom of a weak model. On the good model there is nothing to cure, and it does harm. A story that has introduced a person must say the name again, the
# same one; punished for repeating, the model changes it. Thirty-two stories each:

# %%
harm = {}
for penalty in (1.0, 1.2, 1.5):
    processors = () if penalty == 1 else (RepetitionPenalty(penalty),)
    rows = generate(model, [[END]] * 32, 255, temperature=1.0, processors=processors, stop_tokens=[END], seed=0)
    texts = [encoding.decode(row) for row in rows]
    harm[penalty] = sum(score(text).story for text in texts)
    print(f"penalty {penalty}: {texts[0][:300]} ...\n")
assert harm[1.0] > harm[1.5] + 5 and harm[1.0] > harm[1.2]
print("whole stories of the grammar become fewer with the penalty:", harm[1.0] > harm[1.2] >= harm[1.5])

# %% [markdown]
# ## Quality against variety
#
# Now the question from the beginning, measured. A setting is good if what it writes is right, and if it can still write everything. For tales both can be counted:
#
# - **Quality**: the share of sentences that the grammar has, and, stricter, the share of texts that are *whole stories* of the grammar from the first word to the last.
# - **Variety**: the share of distinct 4-grams over all texts; the **entropy** of the decoder, the mean surprise of its own choices summed over a story (the grammar's is known exactly); and **what is still possible**: of the
#   grammar's own stories, how many could this setting write at all? One token cut away makes a story impossible.
#
# `sweep_decoding.py` beside this notebook wrote stories with each of its settings and recorded the numbers in `sweep_decoding.csv`. In the table: *whole* stories of the grammar, the share of *sentences* of the grammar, the
# share of distinct *4-grams*, how many stories are *different*, the *entropy* in nats, and how many of the grammar's stories are still *possible*.

# %%
recorded = pd.read_csv("sweep_decoding.csv").set_index("setting")
assert list(recorded.index) == list(sweep_decoding.SETTINGS)
N, N_REAL = sweep_decoding.N_STORIES, sweep_decoding.N_REAL
assert (recorded["stories"] == N).all() and (recorded["real_stories"] == N_REAL).all()
columns = {
    "whole_stories": "whole",
    "sentences": "sentences",
    "distinct_4grams": "4-grams",
    "distinct_stories": "different",
    "entropy": "entropy",
    "still_possible": "possible",
}
print(f"{N} stories each, {N_REAL} of the grammar's; its entropy is {entropy():.1f} nats")
recorded[list(columns)].rename(columns=columns).round(3)

# %% [markdown]
# Is the record right? We write the first stories of three settings again and count. Another processor may round one choice the other way, and then a story differs; so the counts may differ by a few.

# %%
tolerance = 4
for name in ("temperature=1.0", "temperature=1.5", "top-p=0.9"):
    [stories] = sweep_decoding.write_batches(model, sweep_decoding.SETTINGS[name], sweep_decoding.BATCH)
    live = sum(score(encoding.decode(story)).story for story in stories)
    stored = recorded.loc[name, "whole_in_first_batch"]
    assert abs(live - stored) <= tolerance, (name, live, stored)
    print(f"{name}: as recorded, within {tolerance} of {sweep_decoding.BATCH} stories")

# %%
STYLES = {
    "temperature": (BLUE, "o"),
    "top-k": (GREEN, "s"),
    "top-p": (ORANGE, "D"),
    "min-p": (PURPLE, "^"),
    "repetition penalty": (RED, "v"),
    "typical": (SKY, "P"),
    "greedy": (GREY, "X"),
}


def frontier(axes: plt.Axes, x: str, y: str, scale: float) -> None:
    """Draw one line for each family of settings."""
    for family, (color, marker) in STYLES.items():
        rows = recorded.query("family == @family")
        if family == "temperature":
            rows = rows.loc[[f"temperature={t}" for t in (0.5, 0.7, 0.85, "1.0", 1.15, 1.3, 1.5)]]
        elif family in ("top-k", "top-p", "min-p", "repetition penalty"):
            rows = pd.concat([rows, recorded.loc[["temperature=1.0"]]])  # where the family does nothing
            rows = rows.sort_values(x)
        axes.plot(rows[x], scale * rows[y], color=color, marker=marker, markersize=6, linewidth=1.5, label=family)


figure, (left, right_panel) = plt.subplots(1, 2, figsize=(11, 4.6))
frontier(left, "distinct_4grams", "sentences", 100)
left.set(xlabel="distinct 4-grams (share)", ylabel="sentences of the grammar (%)", title="More variety costs correctness ...")
frontier(right_panel, "entropy", "whole_stories", 100 / N)
right_panel.axvline(entropy(), color=GREY, linestyle=":", linewidth=1.5)
right_panel.set(xlabel="entropy of the decoder (nats per story)", ylabel="whole stories of the grammar (%)")
right_panel.set_title("... and temperature 1 has the grammar's own variety")
left.legend(fontsize=9)
plt.show()

# %% [markdown]
# Left, the usual picture, with the usual measures; right, with exact ones, where the dotted line is the entropy of the grammar. Read from temperature 1 on the line: colder settings and cuts go up and to the left (more whole
# stories, fewer different ones), hotter ones and the repetition penalty go down.
#
# The last measure is the hardest on the cuts:

# %%
whole = recorded["whole_stories"] / N
possible = recorded["still_possible"] / N_REAL
figure, axes = plt.subplots(figsize=(9, 4))
shown = ["temperature=1.0", "min-p=0.01", "min-p=0.05", "top-p=0.99", "top-k=100", "top-p=0.95", "top-k=20", "top-p=0.9", "min-p=0.5"]
shown = sorted(shown, key=lambda name: possible[name])
axes.barh([y + 0.2 for y in range(len(shown))], 100 * whole[shown], height=0.38, color=GREEN)
axes.barh([y - 0.2 for y in range(len(shown))], 100 * possible[shown], height=0.38, color=BLUE)
axes.set_yticks(range(len(shown)), shown)
axes.set(xlabel="%", xlim=(0, 100), title="Cuts buy correct stories (green) with impossible ones (blue: still possible)")
plt.show()

# %%
assert possible["temperature=1.0"] == 1
assert whole["temperature=0.7"] >= whole["temperature=1.0"] > whole["temperature=1.3"] > whole["temperature=1.5"]
assert possible["top-k=20"] < 0.1 and possible["top-p=0.9"] < 0.5
assert abs(recorded.loc["temperature=1.0", "entropy"] - entropy()) < 8
assert recorded.loc["greedy", "distinct_stories"] == 1 and recorded.loc["greedy", "entropy"] == 0
cut = recorded.loc["top-p=0.9"]
record(
    "tales-1m, whole stories drawn at temperature 1",
    int(recorded.loc["temperature=1.0", "whole_stories"]),
    f"of {N}",
    f"top-p 0.9: {cut['whole_stories']}, but {cut['still_possible']} of {N_REAL} real stories possible",
)

# %% [markdown]
# This is worth a pause. For a model that has learnt its source, **temperature 1 without any cut is the right setting**: it draws from the distribution that the loss taught. What is wrong in its stories is
# the tail of wrong tokens, a little at each of some two hundred places. Every cut removes that tail, and with it the rare right tokens; after a whole story many of the real ones have lost a token somewhere. Truncation trades coverage for
# correctness.
#
# Why then does nearly every chat program cut or cool? Because its users want one good answer and not a fair sample, and because a model of all text is much further from its source than ours from the grammar, so that its tail holds more
# that is wrong. Min-p with a small share is the mildest of the cuts here: it removes only what is far less probable than the best.
#
# Heat and cut in both orders, from the same record:

# %%
hot_rows = recorded[recorded["family"].isin(["hot, then cut", "cut, then hot"])]
hot_rows.loc[:, ["whole_stories", "entropy", "still_possible"]].round(1)

# %%
assert (
    recorded.loc["min-p=0.1, temperature=1.5", "whole_stories"]
    >= recorded.loc["temperature=1.5, min-p=0.1", "whole_stories"]
)
assert recorded.loc["temperature=1.5", "whole_stories"] < hot_rows["whole_stories"].min() + 5

# %% [markdown]
# Cutting first judges by the model's own probabilities and lets less through than cutting what heat has levelled.
#
# ## A panel to play with
#
# In JupyterLab the panel below is live: move a slider and the distribution after the prompt and a sample of the text change. On GitHub you see a still picture of it. First the function behind it, which knows nothing of
# sliders and can be tested.

# %%
def chosen_processors(temperature: float, top_k: int, top_p: float, min_p: float, penalty: float) -> list[Processor]:
    """The processors for the panel's settings, those that do nothing left out."""
    return [
        *([RepetitionPenalty(penalty)] if penalty != 1 else []),
        *([Temperature(temperature)] if temperature not in (0, 1) else []),
        *([TopK(top_k)] if top_k else []),
        *([TopP(top_p)] if top_p < 1 else []),
        *([MinP(min_p)] if min_p else []),
    ]


def panel_view(
    prompt: str, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> tuple[bytes, str]:
    """Return a picture (PNG) of the next token's distribution, and the prompt continued. Temperature 0 is greedy."""
    processors = chosen_processors(temperature, top_k, top_p, min_p, penalty)
    ids, logits = next_logits(model, prompt)
    changed = process(processors, ids, logits)
    after = (changed if temperature else TopK(1)(ids, changed)).softmax(dim=-1)[0]
    before = logits.softmax(dim=-1)[0]
    top = before.topk(25).indices
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.bar(range(25), after[top], color=BLUE)
    axes.step(range(25), before[top], where="mid", color=BLACK, linewidth=1)
    axes.set_xticks(range(25), [repr(encoding.decode([token]))[1:-1] for token in top], rotation=60, fontsize=9)
    axes.set(ylabel="probability", title=f"{int((after > 0).sum())} of {len(after):,} tokens are left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    room = min(120, model.config.context_length - ids.shape[1])
    text = write(model, prompt, room, temperature=float(temperature > 0), processors=processors, seed=seed)
    return buffer.getvalue(), prompt + text


# %% [markdown]
# The panel itself: sliders, a picture, a text. Every change of a control calls the function above.

# %%
def build_panel(prompt: str) -> tuple[widgets.VBox, dict[str, widgets.Widget], widgets.Image, widgets.Textarea]:
    """Return the panel, its controls by name, its picture and its text."""
    late = {"continuous_update": False, "style": {"description_width": "90px"}}
    controls = {
        "prompt": widgets.Text(prompt, description="prompt", layout={"width": "95%"}, **late),
        "temperature": widgets.FloatSlider(1.0, min=0, max=3, step=0.05, description="temperature", **late),
        "top_k": widgets.IntSlider(0, min=0, max=100, description="top-k (0: off)", **late),
        "top_p": widgets.FloatSlider(1.0, min=0.05, max=1, step=0.01, description="top-p", **late),
        "min_p": widgets.FloatSlider(0.0, min=0, max=1, step=0.01, description="min-p", **late),
        "penalty": widgets.FloatSlider(1.0, min=1, max=2, step=0.05, description="rep. penalty", **late),
        "seed": widgets.IntSlider(0, min=0, max=20, description="seed", **late),
    }
    picture = widgets.Image(format="png")
    words = widgets.Textarea(disabled=True, layout={"width": "95%", "height": "120px"})

    def update(_: object = None) -> None:
        picture.value, words.value = panel_view(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(update, names="value")
    update()
    prompt_box, *sliders = controls.values()
    return widgets.VBox([prompt_box, widgets.HBox([widgets.VBox(sliders), picture]), words]), controls, picture, words


panel, controls, picture, panel_text = build_panel(NIGHT)
bundle = panel._repr_mimebundle_()
bundle["text/plain"] = "An interactive panel: open this notebook in JupyterLab and run it to move the sliders."
display(bundle, raw=True)

# %% [markdown]
# The same panel moved by program, as a reader would move it, and its still picture for those who read this without a kernel:

# %%
for name, value in (("seed", 1), ("temperature", 2.0), ("top_k", 12), ("min_p", 0.5), ("penalty", 1.5)):
    before = picture.value, panel_text.value
    controls[name].value = value
    changed = (picture.value != before[0], panel_text.value != before[1])
    print(f"{name} = {value}: picture changed {changed[0]}, text changed {changed[1]}")
    assert any(changed) and panel_text.value.startswith(NIGHT)
display(Image(data=bytes(picture.value)))

# %%
controls["temperature"].value = 0
assert panel_text.value == NIGHT + write(model, NIGHT, 120, processors=chosen_processors(0, 12, 1, 0.5, 1.5))
print("temperature 0 in the panel is greedy decoding")

# %% [markdown]
# ## With a network
#
# GPT-2 was trained on millions of web pages; its tail is long. How many of its 50,257 tokens does each cut keep, where it is sure and where it is not?

# %% tags=["nbval-ignore-output"]
def gpt2_small() -> tuple[GPT2LMHeadModel, object]:
    """GPT-2's smallest model, and its tokenizer."""
    commit = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    weights = fetch_model_file("openai-community/gpt2", "model.safetensors", commit)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.transformer.load_state_dict(load_file(weights), strict=False)
    return theirs, gpt2_encoding()


loaded = or_none(gpt2_small, "GPT-2's weights", "the tales above")
if loaded:
    gpt2, gpt2_tokens = loaded
    for text in ("The capital of France is the city of", "She opened the door and saw"):
        ids = torch.tensor([gpt2_tokens.encode(text)])
        with torch.inference_mode():
            logits = gpt2(ids).logits[:, -1]
        counts = {name: int((cut(ids, logits) > -math.inf).sum()) for name, cut in CUTS.items()}
        print(f"{text!r}: {counts}; first {gpt2_tokens.decode([logits.argmax().item()])!r}")

# %% [markdown]
# ## What you built
#
# [`shared/sampling.py`](../shared/sampling.py) holds eight processors and a beam search with cache, length penalty and end token, each proven against transformers or against a list of everything. They plug into `generate` of
# [`shared/generation.py`](../shared/generation.py). `sweep_decoding.py` measures any further setting: add an entry to it.
#
# ## What can go wrong
#
# - **The order.** `generate(..., temperature=0.7, processors=[TopP(0.9)])` cuts first and cools afterwards, as the engine's own temperature comes last. Put `Temperature` into the sequence to have it elsewhere.
# - **A penalty that eats the grammar.** The repetition penalty also falls on articles, full stops and names. Keep it near 1, or use a model that does not loop.
# - **The end token among the seen ones.** A prompt that begins with the end token, as ours do, makes a repetition penalty punish ending: texts run on.
# - **A penalty on log-probabilities.** They are all negative, so the same number acts differently than on logits. Do not reuse settings across the two.
# - **Everything cut.** If several bans leave nothing, softmax gives NaN. The processors here each keep a token of those they are given; one of your own must too.
# - **Beam search for stories.** A wider beam finds a more probable text, not a better one.
# - **Half precision.** In float16 a low temperature divides a logit beyond 65,504, and softmax gives NaN.
#
# ## Exercises
#
# **1.** Heat with temperature $\tau$, then cut with min-p $q$. Which min-p on the unheated logits keeps the same tokens? Prove it on random logits.

# %% tags=["solution"] jupyter={"source_hidden": true}
# (z_i - max z) / tau >= ln q  is  z_i - max z >= tau ln q = ln(q ** tau).
torch.manual_seed(2)
for _ in range(100):
    ids, logits = random_case(tied=False)
    tau, q = factor(), share()
    heated = process((Temperature(tau), MinP(q)), ids, logits) > -math.inf
    assert torch.equal(heated, MinP(q**tau)(ids, logits) > -math.inf)
print("100 cases: min-p q after temperature t keeps what min-p q ** t keeps before it")

# %% [markdown]
# **2.** Write a processor that forbids the end token until a text has a given number of tokens, and compare it with `MinLengthLogitsProcessor`.

# %% tags=["solution"] jupyter={"source_hidden": true}
@dataclass(frozen=True)
class MinLength:
    """Forbid `end_token` while a row has fewer than `length` tokens."""

    length: int
    end_token: int

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if ids.shape[1] >= self.length:
            return logits
        banned = torch.tensor([self.end_token], device=logits.device)
        return logits.index_fill(1, banned, -math.inf)


torch.manual_seed(3)
for _ in range(100):
    ids, logits = random_case(tied=False)
    expected = reference.MinLengthLogitsProcessor(10, 1, device="cpu")(ids, logits)
    assert torch.equal(MinLength(10, 1)(ids, logits), expected)
print("100 cases equal")

# %% [markdown]
# **3.** Drawing by noise: add $-\ln(-\ln u)$ with uniform $u$ to every logit and take the largest (the Gumbel-max trick). Check that it draws from the softmax. What does temperature become?

# %% tags=["solution"] jupyter={"source_hidden": true}
# z / tau + noise has its largest entry where z + tau * noise has it: temperature is the strength of the noise.
torch.manual_seed(4)
for tau in (0.5, 1.0, 2.0):
    noise = -(-torch.rand(40_000, 5).log()).log()
    drawn = (toy_logits + tau * noise).argmax(dim=-1).bincount(minlength=5) / 40_000
    compare(f"noise times {tau}", drawn, Temperature(tau)(toy_ids, toy_logits).softmax(dim=-1)[0], 0.02)

# %% [markdown]
# **4.** Chapter 3's `beam_search` asks a model for `encode` and `decode_step`. Write the few lines that make a GPT such a model, its caches included, and check that both searches agree where nothing ends.

# %% tags=["solution"] jupyter={"source_hidden": true}
class AsSequenceModel:
    """A GPT behind chapter 3's interface: the state is the number of each row, by which the caches are reordered."""

    def __init__(self, gpt: GPTModel) -> None:
        self.gpt = gpt

    def encode(self, source_ids: Tensor, source_mask: Tensor) -> dict[str, Tensor]:
        self.caches = self.gpt.new_caches()
        self.gpt(source_ids, caches=self.caches)
        return {"row": torch.zeros(1, dtype=torch.int64)}

    def decode_step(self, previous: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        for cache in self.caches:
            cache.reorder(state["row"])
        logits = self.gpt(previous[:, None], caches=self.caches)[:, -1]
        return logits, {"row": torch.arange(len(previous))}


for seed in range(20):
    small = random_gpt(vocab_size=11, seed=seed)
    prompt = torch.tensor([[3, 1, 4]])  # the last one is the start symbol there
    old = seq2seq.beam_search(AsSequenceModel(small), prompt[:, :-1], prompt[:, :-1] > 0, 4, -1, 10, beam_size=3)
    new = beam_search(small, prompt[0].tolist(), 10, beam_size=3, length_penalty=0.0)
    assert [h.ids for h in old] == [h.ids for h in new]
print("20 models: both searches return the same texts")

# %% [markdown]
# ## References
#
# - Fan, A., Lewis, M., Dauphin, Y. (2018). *Hierarchical Neural Story Generation*. ACL.
# - Holtzman, A., Buys, J., Du, L., Forbes, M., Choi, Y. (2020). *The Curious Case of Neural Text Degeneration*. ICLR.
# - Keskar, N. S., McCann, B., Varshney, L. R., Xiong, C., Socher, R. (2019). *CTRL: A Conditional Transformer Language Model for Controllable Generation*. arXiv:1909.05858.
# - Meister, C., Pimentel, T., Wiher, G., Cotterell, R. (2023). *Locally Typical Sampling*. TACL.
# - Nguyen, M. N., et al. (2024). *Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs*. arXiv:2407.01082.
# - Stahlberg, F., Byrne, B. (2019). *On NMT Search Errors and Model Errors: Cat Got Your Tongue?* EMNLP.
# - Wu, Y., et al. (2016). *Google's Neural Machine Translation System: Bridging the Gap between Human and Machine Translation*. arXiv:1609.08144.
# - Zhang, H., Duckworth, D., Ippolito, D., Neelakantan, A. (2021). *Trading Off Diversity and Quality in Natural Language Generation*. HumEval.
