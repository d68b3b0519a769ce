# %% [markdown]
# # Troubleshooting: four failures, produced on purpose, diagnosed and cured
#
# You will break a training run in every classic way, learn which measurement tells each cause from the others, and cure it step by step
# with the effect of each step measured.
#
# | | |
# |---|---|
# | You will build | first-aid checks for a model and its batches, `diagnose`, a profile by operator, early stopping |
# | You need | [the training loop](01_training_loop.ipynb), [decoding](02_decoding.ipynb), [training at scale](03_training_at_scale.ipynb) |
# | Running time on 2 CPU cores | about 2 minutes |
# | Promotes to | [`shared/diagnosis.py`](../shared/diagnosis.py) |
#
# A training run that fails seldom says why. The loss is a number, and four very different mistakes give the same number. So this notebook is
# about looking: at the batch, at the first loss, at gradients and updates, at the clock, at the text.
#
# **Notation.** $V$ is the size of the vocabulary, $\ln V$ the loss of a model that guesses evenly. Losses are in **nats**. `IGNORE` marks a target
# that counts for nothing. A **tale** is a story of a grammar whose entropy is known (chapter 2), so that for tales we know the lowest possible loss.

# %%
import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import sweep_troubleshooting as sweep
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from shared.download import fetch_or_none
from shared.gpt import GPTConfig, GPTModel
from shared.plotting import BLACK, BLUE, COLORS, GREEN, GREY, ORANGE, RED, SKY, heat_map, label_line, use_style
from shared.proof import compare
from shared.results import record
from shared.sampling import TopP
from shared.schedules import linear
from shared.tale_scoring import score
from shared.tale_tokenizer import tale_encoding
from shared.tales import derivations, plans
from shared.training import IGNORE, Batch, evaluate, loss_per_document, next_token_loss, pad_rows, train

use_style()

# %% [markdown] tags=["promote:diagnosis"]
# First aid for a training run: measurements that tell one cause of failure from another, each with the range in which a healthy run lies.
#
# `diagnose` looks at a new model and the batches it is about to read, before any time is spent on training. The ranges are
# rules of thumb for small Transformers trained with Adam and its relatives, not laws.
#
# Left out: memory, several processes, anything that only a finished run can tell.
#
# Follows Karpathy (2019, "A Recipe for Training Neural Networks") for the first loss and the one batch, Prechelt (1998,
# "Early Stopping - But When?") for stopping.

# %% [markdown]
# ## 1. The loss does not converge
#
# ### A healthy run
#
# First a run that works, as a measure. Tales of four plans, the first 64 tokens of each, a model of two blocks and 32 dimensions, 100 steps: two seconds
# of training. Each fault that we will put in is one argument of `attempt`.

# %%
stories = sweep.tales(0, 800, n_plans=4)
rows = sweep.tale_rows(stories, n_tokens=64)
validation = [pad_rows(sweep.tale_rows(sweep.tales(1, 64, n_plans=4), n_tokens=64))]
healthy_batches = [pad_rows(rows[i : i + 8]) for i in range(0, len(rows), 8)]
V = tale_encoding().n_vocab
inputs, targets = healthy_batches[0]
print(f"{len(healthy_batches)} batches of {tuple(inputs.shape)}, V = {V}, ln V = {math.log(V):.3f}")


# %%
@dataclass(frozen=True)
class Attempt:
    """One run: what is fed, how it starts, how it steps; and the losses that came out."""

    batches: list[Batch]
    learning_rate: float = 1e-2
    init_std: float = 0.02
    max_grad_norm: float | None = 1.0

    def model(self, seed: int = 0) -> GPTModel:
        torch.manual_seed(seed)
        return GPTModel(replace(sweep.small_config(32), init_std=self.init_std))

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)

    def run(self, seed: int = 0) -> tuple[list[float], float]:
        """Return the training losses and the validation loss at the end, both in nats per token."""
        model, n = self.model(seed), len(self.batches)
        log = train(
            model,
            self.batches,
            self.optimizer(model.parameters()),
            n_steps=n,
            schedule=lambda step: linear(step + 1, n + 1, 10),
            max_grad_norm=self.max_grad_norm,
        )
        return [entry.loss for entry in log[1:]], evaluate(model, validation).loss


healthy = Attempt(healthy_batches)
SEEDS = (0, 1, 2)
outcomes = {"healthy": [healthy.run(seed) for seed in SEEDS]}
print("validation loss of three seeds:", [round(loss, 2) for _, loss in outcomes["healthy"]])

# %% [markdown]
# From 7.6 to about 2 nats per token. (The output head shares the embedding's weights, the rate warms up for 10 steps and falls in a line; that is all
# there is to it.)
#
# ### Five faults
#
# - **Rate too low** and **rate too high**: a hundredth and thirty times of the healthy one.
# - **Sorted data**: all stories of one plan, then all of the next. A file that was written plan by plan and read in order.
# - **Unshifted targets**: the targets are the inputs themselves. The loop runs, nothing complains.
# - **Wrong initialisation**: first weights of standard deviation 1, which is torch's default for an embedding, in place of 0.02.

# %%
by_plan = [row for _, row in sorted(zip(stories, rows, strict=True), key=lambda pair: pair[0].plan)]
sorted_batches = [pad_rows(by_plan[i : i + 8]) for i in range(0, len(by_plan), 8)]


def unshifted(batches: Sequence[Batch]) -> list[Batch]:
    """Make every target the token that the model reads at the same place: the mistake, on purpose."""
    return [(ids, torch.where(wanted == IGNORE, IGNORE, ids)) for ids, wanted in batches]


faults = {
    "rate too low": replace(healthy, learning_rate=1e-4),
    "rate too high": replace(healthy, learning_rate=0.3),
    "sorted data": replace(healthy, batches=sorted_batches),
    "unshifted targets": replace(healthy, batches=unshifted(healthy_batches)),
    "initial weights of 1": replace(healthy, init_std=1.0),
}
for name, fault in faults.items():
    outcomes[name] = [fault.run(seed) for seed in SEEDS]
    print(f"{name:22s} validation loss", [round(loss, 1) for _, loss in outcomes[name]])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9))
for color, (name, runs) in zip((BLACK, *COLORS), outcomes.items(), strict=False):
    for losses, _ in runs:
        left.plot(pd.Series(losses).rolling(10, min_periods=1).mean(), color=color, linewidth=1.2)
    right.plot([final for _, final in runs], [name] * len(runs), "o", color=color)
for set_scale, line in ((left.set_yscale, left.axhline), (right.set_xscale, right.axvline)):
    set_scale("log")
    line(math.log(V), color=GREY, linestyle=":")
left.set(xlabel="step", ylabel="training loss, nats per token", title="Six runs while they train ...")
right.set(xlabel="validation loss, nats per token", title="... and what they have learnt")
right.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
right.set_xticks([], minor=True)
left.set_yticks([0.05, 0.2, 1, 2, 4, 8, 16], ["0.05", "0.2", "1", "2", "4", "8", "16"])
right.invert_yaxis()
plt.show()

# %% [markdown]
# *Left: training loss of six runs with three seeds each, in the colours of the right panel; right: their validation losses; dotted: guessing evenly.* Four curves
# are plainly bad, and nothing in them says why. The fifth fault is worse: with unshifted targets the training loss is by far the best of all, and the model is the worst,
# worse than one that guesses evenly. **A loss that looks too good is a symptom.** The three seeds of a run are close together, so one seed is enough to look at from here on.

# %%
final = {name: [loss for _, loss in runs] for name, runs in outcomes.items()}
last_training = {name: sum(runs[0][0][-10:]) / 10 for name, runs in outcomes.items()}
for name in faults:
    assert min(final[name]) > max(final["healthy"]) + 1.5, name
assert last_training["unshifted targets"] < 0.5 * last_training["healthy"]
assert min(final["unshifted targets"]) > math.log(V)
print("every fault costs more than 1.5 nats per token, whatever the seed")

# %% [markdown]
# ### First aid: what to measure
#
# A check is a measured number, and the range in which a healthy run lies.

# %% tags=["promote:diagnosis"]
@dataclass(frozen=True)
class Check:
    """A measured `value`, the range `low` to `high` of healthy runs, and what to suspect outside of it."""

    name: str
    value: float
    low: float
    high: float
    suspect: str

    @property
    def passed(self) -> bool:
        """Whether the value lies in its range; NaN lies in none."""
        return self.low <= self.value <= self.high


# %% [markdown]
# **Look at the batch.** A training target at place $t$ is the input at place $t+1$. Which shift fits the targets best can be computed: 1 is right, 0 means the
# model is asked for what it reads, 2 that a shift was made twice, in the loader and in the loss.

# %% tags=["promote:diagnosis"]
def target_offset(inputs: Tensor, targets: Tensor, largest: int = 3) -> tuple[int, float]:
    """Return (k, share): targets[:, t] equals inputs[:, t + k] for this share of the targets, the largest of any k.

    Args:
        inputs, targets: int64 ids (batch, tokens). Padding counts for nothing.
        largest: k is tried from -largest to largest.

    Raises:
        ValueError: The shapes differ, or `largest` is below 0.
    """
    if inputs.shape != targets.shape or inputs.dim() != 2:
        raise ValueError(
            f"inputs and targets must be (batch, tokens), got {tuple(inputs.shape)}, {tuple(targets.shape)}"
        )
    if largest < 0:
        raise ValueError(f"largest must be at least 0, got {largest}")
    real, n, shares = targets != IGNORE, inputs.shape[1], {}
    for k in sorted(range(-min(largest, n - 1), min(largest, n - 1) + 1), key=abs):
        here, there = slice(max(0, -k), n - max(0, k)), slice(max(0, k), n - max(0, -k))
        both = real[:, here] & real[:, there]
        equal = (targets[:, here] == inputs[:, there])[both]
        shares[k] = equal.double().mean().item() if len(equal) else 0.0
    best = max(shares, key=shares.get)
    return best, shares[best]


# %%
print("as loaded ", target_offset(*healthy_batches[0]))
print("unshifted ", target_offset(*unshifted(healthy_batches)[0]))
twice = inputs[:, :-1], targets[:, 1:]
print("twice     ", target_offset(*twice))

# %% [markdown]
# **Look at the order.** In shuffled data each batch is a fair sample. We compare the token frequencies of each batch with those of all batches together, by half the sum of
# the absolute differences (the total variation distance), and divide by the same number for the same rows in a random order. Shuffled rows give
# about 1. (A value above 1 is no proof of a mistake: batches of rows of similar length give it too.)

# %% tags=["promote:diagnosis"]
def order_drift(batches: Sequence[Batch], seed: int = 0) -> float:
    """Return how far batches differ from all of them together, in proportion to the same rows in random order.

    The difference is the total variation distance between the frequencies of the targets. About 1 for shuffled rows.

    Raises:
        ValueError: There are fewer than two batches, or all of them hold the same tokens.
    """
    if len(batches) < 2:
        raise ValueError(f"batches must be at least two, got {len(batches)}")
    rows = [row[row != IGNORE] for _, targets in batches for row in targets]
    vocab_size = max(int(row.max()) for row in rows if len(row)) + 1
    counts = torch.stack([torch.bincount(row, minlength=vocab_size) for row in rows]).double()
    sizes = [len(targets) for _, targets in batches]

    def distance(counts: Tensor) -> float:
        parts = torch.stack([part.sum(0) for part in counts.split(sizes)])
        shares, overall = parts / parts.sum(1, keepdim=True), counts.sum(0) / counts.sum()
        return (shares - overall).abs().sum(1).mean().item() / 2

    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(rows), generator=generator) for _ in range(5))
    by_chance = sum(distance(counts[order]) for order in orders) / 5
    if by_chance < 1e-12:
        raise ValueError("batches all hold the same tokens, so their order means nothing")
    return distance(counts) / by_chance


# %%
print(f"as loaded {order_drift(healthy_batches):.2f}, sorted by plan {order_drift(sorted_batches):.2f}")

# %% [markdown]
# **Look at the gradients**, part by part. In a sound start no block receives a hundred times more than another.

# %% tags=["promote:diagnosis"]
def gradient_norms(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the norm of the mean loss's gradient for each part of `model`, each block being a part of its own.

    The `.grad` of the parameters stays as it is.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    loss = next_token_loss(model(inputs), targets)
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    squares: dict[str, float] = defaultdict(float)
    for (name, _), gradient in zip(named, gradients, strict=True):
        first, *rest = name.split(".")
        part = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
        squares[part] += 0.0 if gradient is None else gradient.double().square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


# %%
for name, attempt in {"healthy": healthy, "initial weights of 1": faults["initial weights of 1"]}.items():
    norms = gradient_norms(attempt.model(), inputs, targets)
    print(f"{name:21s}", {part: round(norm, 2) for part, norm in norms.items()})

# %% [markdown]
# **Look at the updates.** The learning rate means nothing by itself. What counts is how much a step changes a weight matrix in proportion to the matrix.
# If one step changes it by 0.3 of its size, three steps overwrite it; if by 0.0003, thousands of steps will hardly move it. So there are two limits: one for the
# single step, one for all planned steps together.

# %% tags=["promote:diagnosis"]
def update_ratios(model: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Call `step`, which updates the weights once, and return for each matrix the size of its change over its own size.

    Sizes are root mean squares, the matrix's own taken before the step. A matrix of zeros gives infinity, or NaN
    where nothing changed.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
    before = {name: p.detach().clone() for name, p in matrices.items()}
    step()
    return {name: ((p.detach() - before[name]).norm() / before[name].norm()).item() for name, p in matrices.items()}


# %% [markdown]
# **Learn one batch by heart.** The oldest test of all: a model that cannot bring the loss of a single small batch near zero has a mistake in it, and more data or more
# hours will not help. It is the net below the other checks, since it fails for nearly every reason.

# %% tags=["promote:diagnosis"]
def overfit(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, n_steps: int = 40) -> list[float]:
    """Train `model` on one batch again and again and return the loss before each step and after the last."""
    inputs, targets = batch
    losses = []
    for _ in range(n_steps):
        loss = next_token_loss(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [*losses, next_token_loss(model(inputs), targets).item()]


# %% [markdown]
# `diagnose` takes what a run takes, and does all of this in the order in which causes hide each other: first the data, then the start, then the steps. It works on copies,
# so that the run afterwards is the one it would have been.

# %% tags=["promote:diagnosis"]
def diagnose(
    model: nn.Module,
    batches: Sequence[Batch],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    n_steps: int,
) -> list[Check]:
    """Examine a new model and the first batches of its training; model, gradients and random numbers stay as they are.

    Args:
        model: Untrained; it maps ids (batch, tokens) to logits (batch, tokens, vocab_size).
        batches: At least two, in the order in which training reads them; the more, the surer is the order's check.
        make_optimizer: Called with parameters it returns the optimizer of the run, at its peak learning rate.
        n_steps: Planned number of updates.

    Returns:
        The checks, causes that hide others first: the first one that has not passed is the one to look into.
    """
    with torch.random.fork_rng():
        inputs, targets = batches[0]
        with torch.no_grad():
            logits = model(inputs)
        first = next_token_loss(logits, targets).item() / math.log(logits.shape[-1])
        offset, share = target_offset(inputs, targets)
        norms = gradient_norms(model, inputs, targets)
        blocks = [norm for part, norm in norms.items() if part[-1].isdigit()] or list(norms.values())
        one_row = targets[:1] != IGNORE
        pupil = copy.deepcopy(model)
        optimizer = make_optimizer(pupil.parameters())
        ratios = update_ratios(pupil, lambda: overfit(pupil, batches[0], optimizer, n_steps=1))
        pupil = copy.deepcopy(model)
        small = inputs[:1, : one_row.sum()], targets[:1, : one_row.sum()]
        learnt = overfit(pupil, small, make_optimizer(pupil.parameters()))
        largest = max(ratios.values())
        return [
            Check("places that targets are ahead", offset if share > 0.99 else math.nan, 1, 1, "shift of the targets"),
            Check("order of the batches", order_drift(batches), 0, 1.3, "data not shuffled"),
            Check("first loss / ln V", first, 0.9, 1.1, "initial weights; targets"),
            Check("gradient, largest / smallest block", max(blocks) / max(min(blocks), 1e-30), 1, 30, "initial weights"),
            Check("largest update / weight", largest, 0, 2.0, "learning rate too high, no warm-up"),
            Check("updates of the run / weight", largest * n_steps, 5, math.inf, "learning rate too low"),
            Check("one row learnt, loss after / before", learnt[-1] / learnt[0], 0, 0.1, "anything above; model; loss"),
        ]


# %%
def examine(attempt: Attempt) -> list[Check]:
    return diagnose(attempt.model(), attempt.batches, attempt.optimizer, len(attempt.batches))


findings = {name: examine(attempt) for name, attempt in {"healthy": healthy, **faults}.items()}
passed = torch.tensor([[float(check.passed) for check in checks] for checks in findings.values()]).T
names, labels = list(findings), [check.name for check in findings["healthy"]]
figure, axes = plt.subplots(figsize=(9.2, 3.6))
heat_map(axes, passed, labels, names, "Each fault trips a check of its own", numbers="", cmap="RdBu", vmin=-0.6, vmax=1.6)
for column, checks in enumerate(findings.values()):
    for row, check in enumerate(checks):
        mark = "" if check.passed else "  ✗"
        axes.text(column, row, f"{check.value:.2g}{mark}", ha="center", va="center", fontsize=9)
plt.show()

# %% [markdown]
# *The checks (rows) on the healthy run and the five faults (columns); the number is the measurement, a cross and red mark one outside its range.* All of it was measured before
# training, in under a second for each run. Read each column from above: the first cross names the fault. The last row shows why the order matters: learning one row by heart works with
# unshifted targets (copying is easy) and with sorted data (there is no order in one row), so it cannot be the only check.

# %%
first_cross = {name: next((c.suspect for c in checks if not c.passed), None) for name, checks in findings.items()}
for name, suspect in first_cross.items():
    print(f"{name:22s} -> {suspect}")
assert list(first_cross.values()) == [
    None,
    "learning rate too low",
    "learning rate too high, no warm-up",
    "data not shuffled",
    "shift of the targets",
    "initial weights",
]

# %% [markdown]
# ### The cure, one step at a time
#
# Now a patient with four faults at once: targets not shifted, data sorted, first weights of 1, rate too high. We do what `diagnose` says first, and nothing else, then ask again.

# %%
patient = Attempt(unshifted(sorted_batches), learning_rate=0.3, init_std=1.0)
cures = {
    "shift of the targets": lambda a: replace(a, batches=sorted_batches),
    "data not shuffled": lambda a: replace(a, batches=healthy_batches),
    "initial weights": lambda a: replace(a, init_std=0.02),
    "learning rate too high, no warm-up": lambda a: replace(a, learning_rate=1e-2),
}
steps, name = [], "as found"
while True:
    losses, loss = patient.run()
    steps.append((name, losses, loss))
    crosses = [check.suspect for check in examine(patient) if not check.passed]
    print(f"{name:36s} validation loss {loss:6.2f}; next: {crosses[0] if crosses else 'nothing'}")
    if not crosses:
        break
    name, patient = crosses[0], cures[crosses[0]](patient)
assert [name for name, *_ in steps[1:]] == list(cures)
assert steps[-1][2] == min(loss for *_, loss in steps) and steps[-1][2] < steps[0][2] - 4

# %%
figure, axes = plt.subplots(figsize=(8.6, 3.8))
for color, (name, losses, loss) in zip((BLACK, *COLORS), steps, strict=False):
    label = name if name == "as found" else f"cured: {name.split(',')[0]}"
    axes.plot(pd.Series(losses).rolling(10, min_periods=1).mean(), color=color, label=f"{label} (validation {loss:.1f})")
axes.axhline(math.log(V), color=GREY, linestyle=":")
axes.set(xlabel="step", ylabel="training loss, nats per token", yscale="log", title="Four faults, cured in the order of the checks")
axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# *Training loss of the patient after each cure; dotted: guessing evenly.* The validation loss in the legend is what counts. Had we begun with the learning rate,
# we would have tuned a model that copies its input.
#
# **What does not cure a rate that is too high.** Clipping shortens long gradients. But Adam divides the gradient by its own size, so the length of its steps does not
# depend on the length of the gradient, and clipping cannot help; it helps against single outliers, not against a rate.

# %%
print(f"rate 0.3, clipped to 1    validation loss {final['rate too high'][0]:.1f}")
for label, limit in (("not clipped", None), ("clipped to 0.01", 0.01)):
    loss = replace(faults["rate too high"], max_grad_norm=limit).run()[1]
    print(f"rate 0.3, {label:15s} validation loss {loss:.1f}")
    assert loss > max(final["healthy"]) + 1

# %% [markdown]
# **How to find the rate.** In a range test (Smith, 2017) the rate grows from tiny to absurd within one short run. The loss first stays, then falls, then climbs. A rate somewhat
# below the one of the lowest loss is a good start.

# %%
model, n = healthy.model(), 90
low, high = 1e-5, 1.0
sweep_optimizer = torch.optim.AdamW(model.parameters(), low, betas=(0.9, 0.95))
grow = lambda step: (high / low) ** (step / (n - 1))
log = train(model, healthy_batches, sweep_optimizer, n_steps=n, schedule=grow)[1:]
rates = [entry.learning_rate for entry in log]
smooth = pd.Series([entry.loss for entry in log]).rolling(5, min_periods=1).mean()
chosen = rates[int(smooth.idxmin())] / 3
figure, axes = plt.subplots()
axes.semilogx(rates, smooth, color=BLUE)
axes.axvline(chosen, color=GREEN)
label_line(axes, "a third of the best", chosen, 7.4, GREEN)
for rate, name in ((1e-4, "too low"), (0.3, "too high")):
    axes.axvline(rate, color=RED, linestyle=":")
    label_line(axes, name, rate, 6.4, RED)
axes.set(xlabel="learning rate", ylabel="nats per token", title="One short run shows which learning rates work")
plt.show()
assert 3e-3 < chosen < 5e-2
loss = replace(healthy, learning_rate=chosen).run()[1]
assert loss < max(final["healthy"]) + 0.7
print("a rate between 0.003 and 0.05, and with it the run converges")

# %% [markdown]
# *The loss while the rate grows exponentially from 0.00001 to 1 in 90 steps; green: a third of the best rate; red: the two faulty ones.*
#
# **Wrong first weights, in steps.** How far down must the standard deviation go?

# %%
by_std = {1.0: outcomes["initial weights of 1"][0], 0.02: outcomes["healthy"][0]}
by_std |= {std: replace(healthy, init_std=std).run() for std in (0.3, 0.1)}
for std, (losses, loss) in sorted(by_std.items(), reverse=True):
    print(f"init_std {std:<4}  first loss {losses[0]:5.2f}  validation loss at the end {loss:.2f}")
print(f"ln V          {math.log(V):13.2f}")

# %% [markdown]
# The first loss falls to $\ln V$, the loss at the end with it. The larger the first weights, the longer Adam needs to move them by their own size.
#
# ## 2. Overfitting
#
# Now the bundled prose, `stories.txt`. Two of its stories make 100 windows of 64 tokens. A model of 64 dimensions sees each of them 24 times in 300 steps; another story, which it never
# reads, tells what it has learnt of the language. The runs of this section are those of [`sweep_troubleshooting.py`](sweep_troubleshooting.py); the record holds three seeds of each variant,
# and the first runs live.

# %%
pd.DataFrame(sweep.OVERFITTING.values(), index=list(sweep.OVERFITTING))

# %%
model, curve = sweep.train_on_prose(sweep.OVERFITTING["2 stories"], seed=0)
live = pd.DataFrame(curve).set_index("step")
best = int(live.validation.idxmin())
figure, axes = plt.subplots()
axes.plot(live.training, color=BLUE)
axes.plot(live.validation, color=RED)
axes.axvline(best, color=GREY, linestyle=":")
label_line(axes, "training", 300, live.training.iloc[-1], BLUE)
label_line(axes, "validation", 300, live.validation.iloc[-1], RED)
axes.set(xlim=(0, 345), xlabel="step", ylabel="nats per token", title="From the dotted line on the model only learns by heart")
plt.show()
assert live.training.iloc[-1] < 0.3 * live.training[best] and live.validation.iloc[-1] > live.validation[best] + 1
print(f"best validation loss {live.validation[best]:.2f} at step {best}, at the end {live.validation.iloc[-1]:.1f}")

# %% [markdown]
# *Training and validation loss of a model trained on two stories.* This is the picture of overfitting: the curves part, one falls towards 0, the other climbs above where it was. All checks of
# section 1 pass on such a run: nothing is wrong with the code. What helps is to measure the validation loss often, and one of the following.
#
# ### Early stopping
#
# Stop when the validation loss has not improved for some evaluations, and keep the best weights. It costs nothing and saves time.

# %% tags=["promote:diagnosis"]
def early_stop(losses: Sequence[float], patience: int) -> tuple[int, bool]:
    """Return the position of the lowest loss so far, and whether `patience` later ones have not been lower.

    NaN is never the lowest. Raises ValueError if there is no loss, or patience is below 1.
    """
    if not losses or patience < 1:
        raise ValueError(f"losses must not be empty and patience at least 1, got {len(losses)} and {patience}")
    best = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
    return best, len(losses) - 1 - best >= patience


# %%
for last in range(1, len(live) + 1):
    position, stop = early_stop(list(live.validation[:last]), patience=2)
    if stop:
        break
stopped_at, kept = live.index[last - 1], live.index[position]
print(f"stopped at step {stopped_at}, weights of step {kept} kept: {stopped_at / 300:.0%} of the time")
assert kept == best and stopped_at < 300

# %% [markdown]
# ### What each cure is worth
#
# More data (5 or 10 stories), dropout, weight decay, a smaller model, and the best two together. First: does the record agree with the run above?

# %%
curves = pd.read_csv("sweep_troubleshooting_overfitting.csv")
recorded = curves.query("variant == '2 stories' and seed == 0").set_index("step")
compare("live run and record, validation loss", live.validation[:best], recorded.validation[:best], 0.02)

# %%
grouped = curves.groupby(["variant", "seed"])
summary = pd.DataFrame(
    {
        "best validation": grouped.validation.min(),
        "validation at the end": grouped.validation.last(),
        "training at the end": grouped.training.last(),
    }
)
spread = summary.groupby("variant").agg(["mean", "std"]).round(2)
spread.loc[[*sweep.OVERFITTING]].sort_values(("best validation", "mean"))

# %%
figure, axes = plt.subplots(2, 3, figsize=(10, 4.8), sharex=True, sharey=True)
mean = curves.groupby(["variant", "step"]).validation.agg(["mean", "min", "max"])
for a, name in zip(axes.flat, list(sweep.OVERFITTING)[1:], strict=True):
    for variant, color in (("2 stories", GREY), (name, BLUE)):
        part = mean.loc[variant]
        a.plot(part["mean"], color=color)
        a.fill_between(part.index, part["min"], part["max"], color=color, alpha=0.3)
    a.set_title(name, fontsize=10)
axes[0, 0].set_ylim(4.2, 8)
figure.supxlabel("step", fontsize=11)
figure.supylabel("validation loss", fontsize=11)
figure.suptitle("More data lowers the best loss; the other cures mostly keep it from rising", x=0.02, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# *Validation loss with each cure (blue) and without (grey); bands from the lowest to the highest of three seeds.* Two things are to be told apart. **The end of the curve**: dropout, weight decay and a smaller model all
# slow the learning by heart. **Its lowest point**: early stopping reaches that without any of them, and only more data lowers it clearly. So on little data: stop early first, get more text second,
# and tune dropout last.

# %%
lowest = summary["best validation"].unstack()
at_end = summary["validation at the end"].unstack()
for name in [*sweep.OVERFITTING][1:]:
    assert (at_end.loc[name] < at_end.loc["2 stories"]).all(), name  # each cure, each seed
assert lowest.loc["5 stories"].max() < lowest.loc["2 stories"].min() - 0.2
assert lowest.loc["10 stories"].max() < lowest.loc["5 stories"].min()
stopping = (at_end - lowest).loc["2 stories"]
print("early stopping alone saves", [round(x, 1) for x in stopping], "nats per token in three seeds")
record("prose, best validation loss, 10 stories", round(lowest.loc["10 stories"].mean(), 2), "nats", f"2 stories: {lowest.loc['2 stories'].mean():.2f}")

# %% [markdown]
# ## 3. Slow training
#
# A training step that is ten times slower than it should be looks like any other: the loss falls, only late. We begin with a step written as the formulas are: attention by a loop over heads and positions, one row
# at a time, the loss from probabilities, AdamW parameter by parameter. It is correct. The model has the size of `tales-1m`, 4 blocks of 128.

# %%
class LoopAttention(nn.Module):
    """The attention of a trained module with the same weights, computed head by head and position by position."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.fast = attention

    def forward(self, x: Tensor, positions: Tensor, **_: object) -> Tensor:
        fast = self.fast
        queries, keys, values = fast.qkv(x).unflatten(-1, (3, fast.n_heads, fast.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys = fast.rotary(queries, positions), fast.rotary(keys, positions)
        heads = []
        for q, k, v in zip(queries[0], keys[0], values[0], strict=True):  # a batch of one; (tokens, head_dim)
            outputs = []
            for t in range(len(q)):
                weights = (k[: t + 1] @ q[t] / math.sqrt(fast.head_dim)).softmax(dim=0)  # (t + 1,)
                outputs.append(weights @ v[: t + 1])
            heads.append(torch.stack(outputs))
        return fast.output(torch.cat(heads, dim=-1)[None])


class MatrixAttention(nn.Module):
    """The same as a few matrix products over all heads and positions, with the matrix of weights written out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.fast = attention

    def forward(self, x: Tensor, positions: Tensor, **_: object) -> Tensor:
        return self.fast(x, positions=positions, need_weights=True)[0]


# %%
def loss_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log p from probabilities: softmax, then the logarithm, then the choice of the target."""
    real = targets != IGNORE
    return -logits.softmax(dim=-1)[real].log().gather(-1, targets[real][:, None]).sum()


@dataclass(frozen=True)
class Rung:
    """How a training step is computed."""

    attention: type[nn.Module] | None = LoopAttention  # None: the fused one of GPTModel
    batch: bool = False  # all rows in one pass, or one after the other
    fused: bool = False  # the loss and the optimizer as one kernel each
    precision: torch.dtype | None = None
    width: int = 128
    layers: int = 4

    def build(self, rows: list[list[int]]) -> Callable[[], float]:
        """Return a training step on `rows`; each call updates the weights and returns the loss before."""
        torch.manual_seed(0)
        model = GPTModel(GPTConfig.preset("tales-1m", emb_dim=self.width, n_layers=self.layers))
        for block in model.blocks if self.attention else ():
            block.attention = self.attention(block.attention)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=self.fused, foreach=False)
        batches = [pad_rows(rows)] if self.batch else [pad_rows([row]) for row in rows]
        return partial(self.step, model, optimizer, batches)

    def step(self, model: GPTModel, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
        optimizer.zero_grad()
        n_targets = sum(int((wanted != IGNORE).sum()) for _, wanted in batches)
        summed = partial(next_token_loss, reduction="sum") if self.fused else loss_by_hand
        total = 0.0
        for ids, wanted in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision is not None):
                logits = model(ids)
            loss = summed(logits, wanted) / n_targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total


texts = rows[:8]
n_targets = sum(len(row) - 1 for row in texts)
print(f"8 rows, {n_targets} targets")

# %% [markdown]
# ### Where does the time go?
#
# `torch.profiler` records every operator that runs and the time spent in it alone, without the operators that it calls. Summed up by operator, that is all we need for a picture.

# %% tags=["promote:diagnosis"]
def operator_times(step: Callable[[], object], n_steps: int = 1) -> tuple[dict[str, float], dict[str, int], float]:
    """Profile `step` on the CPU, after one call that is not counted.

    Returns:
        For each operator the seconds of a step spent in it alone, longest first; for each operator its calls in a step;
        and the seconds of the whole step under the profiler, which is slower than without. What no operator accounts
        for, Python above all, is called "outside operators".

    Raises:
        ValueError: n_steps is below 1.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    step()
    label = "outside operators"
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(label):
        for _ in range(n_steps):
            step()
    events = [event for event in profiler.key_averages() if event.self_cpu_time_total > 0]
    events.sort(key=lambda event: -event.self_cpu_time_total)
    times = {event.key: event.self_cpu_time_total / 1e6 / n_steps for event in events}
    calls = {event.key: event.count // n_steps for event in events if event.key != label}
    total = next(event.cpu_time_total for event in events if event.key == label) / 1e6 / n_steps
    return times, calls, total


# %%
def draw_profile(axes: plt.Axes, step: Callable[[], float], title: str) -> int:
    """Draw the eight operators that take most of a step's time; return the number of operator calls."""
    times, calls, total = operator_times(step)
    top = list(times.items())[:8]
    names = [name.replace("aten::", "").replace("autograd::engine::evaluate_function: ", "") for name, _ in top]
    axes.barh([name[:26] for name in names], [100 * seconds / total for _, seconds in top], color=SKY)
    axes.invert_yaxis()
    axes.set(xlabel="share of the step's time, %", title=title)
    return sum(calls.values())


figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6))
slow = draw_profile(left, Rung().build(texts[:1]), "Loops: thousands of tiny operators")
quick = draw_profile(right, Rung(None, batch=True, fused=True).build(texts), "Fused, in one batch: matrix products")
plt.show()

# %% [markdown]
# *Share of the time of a training step by operator, by torch's profiler. Left: the loops, on one row of 64 tokens. Right: the last float32 form below, on eight.* On the left, the time goes into picking rows, stacking, and Python itself ("outside operators"); the matrix
# products, the only real work, are hard to find. On the right they lead. The count of operators says the same and does not vary from run to run:

# %%
print(f"operators: loops, one row, more than {slow // 10_000 * 10_000:,}")
print(f"operators: fused, eight rows, fewer than {quick // 1000 * 1000 + 1000:,}")
assert slow > 20 * quick

# %% [markdown]
# ### The ladder
#
# Six steps from the loops down, each changing one thing. That the first four compute the same is not to be believed but checked: the loss before the update, and the loss after it,
# which depends on every gradient and on the optimizer.

# %%
ladder = {
    "loops": Rung(),
    "vectorised attention": Rung(MatrixAttention),
    "rows in one batch": Rung(MatrixAttention, batch=True),
    "fused kernels": Rung(None, batch=True, fused=True),
    "bfloat16": Rung(None, batch=True, fused=True, precision=torch.bfloat16),
    "smaller model": Rung(None, batch=True, fused=True, width=64, layers=2),
}
built = {name: rung.build(texts) for name, rung in ladder.items()}
two_losses = {name: [step(), step()] for name, step in built.items()}
for name in list(ladder)[1:4]:
    compare(f"loops and {name}, losses of two steps", two_losses[name], two_losses["loops"], 2e-5)
drift = max(abs(a - b) for a, b in zip(two_losses["bfloat16"], two_losses["fused kernels"], strict=True))
assert 0 < drift < 0.05
print("bfloat16: losses within 0.05 nats, but not equal")

# %% tags=["nbval-ignore-output"]
def seconds(step: Callable[[], float], n: int) -> float:
    """The shortest processor time of `n` calls."""
    measured = []
    for _ in range(n):
        started = time.process_time()
        step()
        measured.append(time.process_time() - started)
    return min(measured)


speed = {name: n_targets / seconds(step, 1 if name == "loops" else 3) for name, step in built.items()}
timing = pd.DataFrame({"tokens per second": speed})
timing["times the step before"] = (timing["tokens per second"] / timing["tokens per second"].shift()).round(2)
timing["times the loops"] = (timing["tokens per second"] / speed["loops"]).round(1)
timing.round({"tokens per second": 0})

# %%
figure, axes = plt.subplots(figsize=(7.6, 3.2))
axes.barh(list(speed), list(speed.values()), color=[GREY, *[BLUE] * 3, ORANGE, GREEN])
for name, value in speed.items():
    axes.text(value * 1.08, name, f"{value / speed['loops']:.0f} ×", va="center")
axes.invert_yaxis()
axes.set(xscale="log", xlabel="tokens per second, one thread", title="What each step gains on the loops")
axes.set_xlim(right=max(speed.values()) * 2.5)
plt.show()

# %% [markdown]
# *Training speed at each step of the ladder, one thread; blue: the same numbers computed faster; orange: lower precision; green: another model.* The blue steps are free. Vectorising gives by far the most. Whether **bfloat16** gains depends on
# the machine: GPUs and recent server processors have units for it, on others it is slower than float32, and small matrices hide the gain behind the conversions. Measure before you use it. **A smaller model** computes something else, and section 4 shows its price.
# (`torch.compile` fuses further, but needs a C++ compiler and compile time: [training at scale](03_training_at_scale.ipynb).)
#
# ## 4. Poor text
#
# The loss fell, the speed is fine, and the text is bad. For tales, "bad" can be measured: `shared.tale_scoring.score` tells which sentences belong to the grammar and whether pronouns, names, objects and consequences agree; `derivations` whether the whole text is
# a story. Tales of two plans now, whole. We train for 50 steps, on purpose too short.

# %%
poor, _ = sweep.train_on_tales(sweep.TEXT["960 stories"], seed=0, n_steps=50)
held_out = sweep.tales(1, 50)
# Stories of two of the plans: the choice among all plans is not theirs.
choice = math.log(len(plans()) / sweep.TALE_PLANS)
floor = sum(-story.log_probability for story in held_out) / len(held_out) - choice
loss = loss_per_document(poor, sweep.tale_rows(held_out))
print(f"loss {loss:.0f} nats per story; the lowest possible for these stories {floor:.1f}")
assert loss > 2 * floor
sample = sweep.write_tales(poor, n=1, seed=1, temperature=1.0)[0]
grades = score(sample)
print(f"sentences of the grammar: {grades.sentences:.0%}; derivations of the whole: {len(derivations(sample))}")

# %% tags=["nbval-ignore-output"]
print(sample)

# %% [markdown]
# The first check is the loss per story against the floor: here it is more than twice as high, so no decoding can make it good. But decoding is the cheapest to try.
#
# ### Cure 1: decoding
#
# The same model, 48 texts for each way of choosing a token:

# %%
ways = {
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"temperature": 1.0, "processors": [TopP(0.9)]},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.3": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
}
by_way = {name: sweep.grade(sweep.write_tales(poor, **options)) for name, options in ways.items()}
figure, axes = plt.subplots()
for kind, color in (("sentences", BLUE), ("agreements", ORANGE), ("different", GREY), ("stories", GREEN)):
    values = [100 * grades[kind] for grades in by_way.values()]
    axes.plot(list(ways), values, "o-", color=color)
    label_line(axes, kind, len(ways) - 1, values[-1], color)
axes.set(ylabel="% right, or different", xlim=(-0.3, 6.2), title="Careful decoding repairs sentences, not the story")
axes.tick_params(axis="x", rotation=20)
plt.show()
assert by_way["temperature 0.3"]["sentences"] > by_way["temperature 1"]["sentences"] + 0.2
assert by_way["greedy"]["different"] == 1 / sweep.N_TEXTS
assert all(grades["stories"] < 0.2 for grades in by_way.values())

# %% [markdown]
# *Sentences of the grammar, agreements, different texts among 48, and whole stories, for six ways of decoding.* Lower temperatures choose what the model is sure of: most sentences become right. What the model does not know, who owns what and who is *he*, no way of
# choosing can add, so hardly any story is right as a whole. And the price is variety: greedy decoding writes one text, 48 times.
#
# ### Cure 2: more data
#
# The same number of steps, 120, on 20, 100 or 960 different stories. From the record, three seeds:

# %%
text_runs = pd.read_csv("sweep_troubleshooting_text.csv")
columns = ["training", "validation", "sentences", "agreements", "stories", "recited"]
data_names = ["20 stories", "100 stories", "960 stories"]
by_data = text_runs.query("temperature == 0.5 and variant in @data_names").groupby("variant")[columns]
by_data.mean().loc[data_names].round(2)

# %% [markdown]
# `training` and `validation` are nats per story; the rest are shares at temperature 0.5. Look at the first row: on 20 stories the model writes the best text of all. Its validation loss says what is wrong, and the last column why: **it recites**. `recited` is the
# share of the sequences of 30 tokens that stand in the training stories word for word. A score of the text alone likes the worst model best, as the training loss did in section 1. So always measure both.

# %%
per_seed = text_runs.query("temperature == 0.5").pivot(index="seed", columns="variant")
for seed in SEEDS:
    validation_loss, copied = per_seed.validation.loc[seed], per_seed.recited.loc[seed]
    assert validation_loss["20 stories"] > validation_loss["100 stories"] > validation_loss["960 stories"]
    assert copied["20 stories"] > 0.5 > copied["960 stories"]
print("in each of three seeds: more data, lower validation loss, less recited")

# %% [markdown]
# ### Cure 3: a larger model
#
# All 960 stories, 120 steps, width 16, 32 and 64:

# %%
size_names = ["960 stories, width 16", "960 stories, width 32", "960 stories"]
by_size = text_runs.query("temperature == 0.5 and variant in @size_names")
by_size.groupby("variant")[["parameters", *columns]].mean().loc[size_names].round(2)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for a, shown, key, label in (
    (axes[0], data_names, "n_stories", "different training stories"),
    (axes[1], size_names, "emb_dim", "width of the model"),
):
    runs = text_runs[(text_runs.temperature == 0.5) & text_runs.variant.isin(shown)]
    a.semilogx(runs[key], runs.validation, "o", color=BLUE, alpha=0.6, base=2)
    a.plot(runs.groupby(key).validation.mean(), color=BLUE)
    a.axhline(floor, color=GREEN, linestyle=":")
    a.set_xticks(sorted(runs[key].unique()), [f"{value:,}" for value in sorted(runs[key].unique())])
    a.set_xticks([], minor=True)
    a.set_xlabel(label)
label_line(axes[0], "lowest possible", 20, floor + 25, GREEN)
axes[0].set(ylabel="validation loss, nats per story", title="More data, and a larger model, lower the loss")
plt.show()
for seed in SEEDS:
    assert per_seed.validation.loc[seed, size_names].is_monotonic_decreasing
print("in each of three seeds: the wider the model, the lower the loss after the same 120 steps")

# %% [markdown]
# *Validation loss per story against the number of different training stories (left) and the width of the model (right), three seeds; dotted: the floor.* Both cures lower the loss, where decoding could not touch it.

# %% [markdown]
# ## Proof
#
# The gradient norms of `gradient_norms` together are the norm that torch computes for clipping; and a share of `update_ratios` is what plain gradient descent must give: rate times gradient over weight.

# %%
model = healthy.model()
norms = gradient_norms(model, inputs, targets)
next_token_loss(model(inputs), targets).backward()
total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
compare("gradient norms by part and torch's total", math.hypot(*norms.values()), total, 1e-6)

matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
expected = [(0.1 * p.grad.norm() / p.norm()).item() for p in matrices.values()]
ratios = update_ratios(model, torch.optim.SGD(model.parameters(), lr=0.1).step)
compare("update ratios and rate × gradient / weight", list(ratios.values()), expected, 1e-6)

# %% [markdown]
# The first loss of `diagnose` equals $-\ln$ of the mean probability computed by hand, and examining a model changes nothing: weights, gradients, random numbers.

# %%
model = GPTModel(sweep.small_config(32, dropout=0.1))
before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
checks = diagnose(model, healthy_batches, healthy.optimizer, n_steps=100)
assert torch.equal(torch.get_rng_state(), state)
assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
assert all(p.grad is None for p in model.parameters())
print("examined; nothing has changed")

# %% [markdown]
# The profiler's account is complete: the times that operators spend in themselves, and what is outside of them, add up to the whole step.

# %%
times, calls, whole = operator_times(Rung(None, batch=True, fused=True).build(texts))
assert abs(sum(times.values()) / whole - 1) < 0.01
print("the parts add up to the whole step, within 1 %")

# %% [markdown]
# And vectorised attention equals the loops in value and gradient, on one story:

# %%
torch.manual_seed(0)
attention = GPTModel(sweep.small_config(32)).blocks[0].attention
positions, results = torch.arange(20), []
x = torch.randn(1, 20, 32, requires_grad=True)
for form in (LoopAttention(attention), MatrixAttention(attention), attention):
    output = form(x, positions=positions)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    results.append((output, gradient))
for name, (output, gradient) in zip(("matrices", "fused"), results[1:], strict=True):
    compare(f"loops and {name}, output", output, results[0][0], 1e-6)
    compare(f"loops and {name}, gradient", gradient, results[0][1], 1e-6)

# %% [markdown]
# ## The decision table
#
# | Symptom | First check | Likely cause | Cure | Where |
# |---|---|---|---|---|
# | Loss far below what is possible, text is nonsense | `target_offset` is not 1 | targets not moved, or moved twice | build batches by `pad_rows`; move once | 1 |
# | Loss rises and falls with the position in the file | `order_drift` above 1.3 | data not shuffled | shuffle rows | 1 |
# | First loss far above $\ln V$ | first loss / $\ln V$ | initial weights too large | `init_std` of 0.02 or so | 1 |
# | Loss hardly moves | updates of the run / weight below 5 | rate too low, or run too short | range test; rate up | 1 |
# | Loss falls to a plateau, or jumps | largest update / weight above 2 | rate too high, no warm-up | range test; rate down, warm-up | 1 |
# | One row cannot be learnt | `overfit` | a mistake in model or loss | the checks above it; gradients by part | 1 |
# | Training falls, validation rises | validation loss every few steps | too little data for the model | early stopping, then more data; dropout, decay | 2 |
# | Fewer tokens per second than expected | `operator_times`, number of operators | loops, single rows, unfused parts | vectorise, batch, fuse; then precision | 3 |
# | Right sentences, wrong story | loss per story against the floor | model too small or trained too little | more data, larger model | 4 |
# | Wrong words here and there | the same at temperature 0.5 | sampling from the tail | lower temperature, top-p | 4 |
# | Always the same text | share of different texts | greedy, or temperature too low | raise the temperature | 4 |
# | Text too good | `recited`, validation loss | training text learnt by heart | more data; section 2 | 4 |
#
# ## With a network
#
# The same first aid for another text and another tokenizer: tiny Shakespeare as bytes, before any training.

# %% tags=["nbval-ignore-output"]
path = fetch_or_none("tinyshakespeare.txt", instead="tales, above")
if path:
    data = list(path.read_bytes()[: 64 * 8 * 40 + 1])
    windows = [data[i : i + 65] for i in range(0, len(data) - 65, 64)]
    model = GPTModel(GPTConfig.preset("bytes-tiny", dropout=0.0))
    shakespeare = [pad_rows(windows[i : i + 8]) for i in range(0, len(windows) - 7, 8)]
    for check in diagnose(model, shakespeare, healthy.optimizer, n_steps=100):
        print(f"{'ok' if check.passed else 'LOOK'}  {check.name}: {check.value:.2g}")

# %% [markdown]
# ## What you built
#
# [`shared/diagnosis.py`](../shared/diagnosis.py): `diagnose` with the checks it is made of, `early_stop` and `operator_times`. The longer runs are in [`sweep_troubleshooting.py`](sweep_troubleshooting.py).
#
# ## What can go wrong
#
# - **Two faults at once.** A cure that changes nothing may still be right: another fault hides its effect. Change one thing, and ask again.
# - **A check outside its range in a healthy run.** The ranges are for small Transformers and Adam. Muon's updates are meant to be large; a batch sorted by length drifts. Record the numbers of a run that worked and compare with those.
# - **Validation text in the training text.** Then nothing overfits, ever, on paper. Split by whole documents and measure the overlap (chapter 2).
# - **The fastest step that computes something else.** Compare losses of two steps before you compare times.
# - **A profile of the first step.** It holds one-time costs. `operator_times` leaves one step out.
#
# ## Exercises
#
# **1.** Targets moved by two places (a shift in the loader and one in the loss) train without an error. Which check finds it, and how bad is the model?

# %% tags=["solution"] jupyter={"source_hidden": true}
doubled = [(ids[:, :-1], wanted[:, 1:]) for ids, wanted in healthy_batches]
fault = replace(healthy, batches=doubled)
print([check.suspect for check in examine(fault) if not check.passed])
loss = fault.run()[1]
print(f"validation loss {loss:.1f}; healthy {final['healthy'][0]:.1f}")
assert loss > final["healthy"][0] + 1

# %% [markdown]
# **2.** Weights can also be too small at the start. Try `init_std` of 1e-6: what is the first loss, and which check fails?

# %% tags=["solution"] jupyter={"source_hidden": true}
# The first loss is exactly ln V, as all logits are equal. One step of Adam changes such weights many times over.
tiny = replace(healthy, init_std=1e-6)
crosses = [check.name for check in examine(tiny) if not check.passed]
print(f"first loss {evaluate(tiny.model(), validation).loss:.3f}, ln V {math.log(V):.3f};", crosses)
assert "largest update / weight" in crosses

# %% [markdown]
# **3.** A patience of 1 stops at the first evaluation that is not better. On the recorded curves of section 2: how much does it lose against a patience of 3, in the worst case?

# %% tags=["solution"] jupyter={"source_hidden": true}
def reached(losses: list[float], patience: int) -> float:
    for last in range(1, len(losses) + 1):
        best, stop = early_stop(losses[:last], patience)
        if stop:
            break
    return losses[best]


lost = grouped.validation.apply(lambda part: reached(list(part), 1) - reached(list(part), 3))
print(f"largest loss {lost.max():.2f} nats per token, in {int((lost > 0.005).sum())} of {len(lost)} runs")
assert (lost >= 0).all()

# %% [markdown]
# **4.** Is a batch with twice as many stories twice as slow? Count the operators of both, without a clock.

# %% tags=["solution"] jupyter={"source_hidden": true}
quick = Rung(None, batch=True, fused=True)
counts = [sum(operator_times(quick.build(texts[:n]))[1].values()) for n in (4, 8)]
# The number of operators is the same, so all their fixed costs are shared by more tokens.
print("same number of operators:", counts[0] == counts[1])
assert counts[0] == counts[1]

# %% [markdown]
# ## References
#
# - Karpathy, A. (2019). *A Recipe for Training Neural Networks*. Blog post.
# - Prechelt, L. (1998). *Early Stopping - But When?* In: Neural Networks: Tricks of the Trade. Springer.
# - Smith, L. N. (2017). *Cyclical Learning Rates for Training Neural Networks*. WACV. (The range test.)
# - Srivastava, N., Hinton, G., Krizhevsky, A., Sutskever, I., Salakhutdinov, R. (2014). *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*. JMLR.
# - Loshchilov, I., Hutter, F. (2019). *Decoupled Weight Decay Regularization*. ICLR.
# - Dao, T., Fu, D. Y., Ermon, S., Rudra, A., Ré, C. (2022). *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*. NeurIPS.
# - Carlini, N., et al. (2023). *Quantifying Memorization Across Neural Language Models*. ICLR.
