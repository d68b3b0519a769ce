# %% [markdown]
# # Training at scale: schedules, optimizers, precision, many machines
#
# You will build what stands between a loop that trains and a run that is worth its machines, prove each piece against a library or by counting, and plan a
# run of 70 billion parameters from formulas that were checked on two small processes.
#
# | | |
# |---|---|
# | You will build | learning-rate schedules, the optimizers Muon and Lion, a planner for memory, communication and time, checkpoints that survive a crash |
# | You need | [the GPT](../ch04_gpt/02_gpt.ipynb), [multi-head attention](../ch03_attention/03_multi_head_attention.ipynb), the training loop of notebook 01 |
# | Running time on 2 CPU cores | about 2 minutes |
# | Promotes to | [`shared/schedules.py`](../shared/schedules.py), [`shared/optimizers.py`](../shared/optimizers.py), [`shared/planning.py`](../shared/planning.py), [`shared/checkpoint.py`](../shared/checkpoint.py) |
#
# **Notation.** $N$ is a number of parameters, $D$ a number of tokens (in formulas about models, $D$ is the width, `emb_dim`), $L$ the number of blocks. Losses are in nats, per token or per
# story. A **step** is one update of the weights. A **rank** is one of several processes that train together.

# %%
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import distributed_demo
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import least_squares
from sweep_optimizers import IGNORED, SHORT_STEPS, collate, story_batches, story_loss, story_rows
from sweep_optimizers import run as run_optimizer
from sweep_scaling import config_of
from sweep_scaling import run as run_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import shared.checkpoint
from shared.attention import MultiHeadAttention
from shared.gpt import PRESETS, GPTConfig, GPTModel
from shared.plotting import BLACK, BLUE, COLORS, GREEN, GREY, ORANGE, RED, SKY, label_line, use_style
from shared.proof import compare
from shared.results import record

use_style()

# %% [markdown]
# ## A small model and real batches
#
# Everything below runs on tales, stories whose lowest possible loss is known ([`shared/tales.py`](../shared/tales.py)). The functions for
# batches and for the loss stand in the script [`sweep_optimizers.py`](sweep_optimizers.py) beside this notebook, which also made the recorded
# results further down. A batch is a pair of inputs and targets, both `(stories, tokens)`; targets of -100 are padding and do not count.

# %%
rows, _ = story_rows(seed=1, n=800)
batches = list(story_batches(rows, batch=8, seed=0))
tiny = GPTConfig.preset("tales-1m", emb_dim=32, n_layers=2, n_heads=2)


def new_model(config: GPTConfig = tiny, dtype: torch.dtype = torch.float32) -> GPTModel:
    """A model with the same first weights at every call."""
    torch.manual_seed(0)
    return GPTModel(config).to(dtype)


inputs, targets = batches[0]
print(f"{len(batches)} batches, the first {tuple(inputs.shape)}, of which {int((targets != IGNORED).sum())} targets count")
print(f"{new_model().n_parameters:,} parameters; untrained {story_loss(new_model(), inputs, targets):.3f} nats per token")

# %% [markdown]
# ## Schedules: how large a step, when
#
# A learning rate that is right in the middle of training is too large at its start and at its end. At the start the gradients are large and
# point the same way, and the averages inside the optimizer rest on a handful of batches: the rate is raised over some steps, the
# **warm-up**. At the end the noise of the batches keeps the weights from settling: the rate is lowered, the **decay**.
#
# A schedule is a function of the step that returns a factor for the learning rate. We write it as a product: warm-up × decay. The warm-up
# reaches 1 where the decay begins.

# %% [markdown] tags=["promote:schedules"]
# Learning-rate schedules: functions of the step that return a factor, 1.0 at the peak.
#
# A step counts finished updates, from 0. All schedules rise linearly from 0 in the first `n_warmup` steps and end at
# step `n_steps`, after which they stay where they are. As in transformers and torch, the first update of a warm-up has the
# factor 0; who does not want it calls the schedule with step + 1.
#
# Left out: schedules that watch the loss, warm-ups that are not straight.

# %% tags=["promote:schedules"]
def _phase(step: int, n_steps: int, n_warmup: int) -> tuple[float, float]:
    """Return the factor of the warm-up, and how far the step is between its end and `n_steps`, both in [0, 1]."""
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if not 0 <= n_warmup < n_steps:
        raise ValueError(f"n_warmup must be from 0 to below n_steps={n_steps}, got {n_warmup}")
    warm = min(1.0, step / n_warmup) if n_warmup else 1.0
    return warm, min(max(0.0, (step - n_warmup) / (n_steps - n_warmup)), 1.0)


def _check_final(final: float) -> None:
    if not 0 <= final <= 1:
        raise ValueError(f"final must be in [0, 1], got {final}")


def constant(step: int, n_steps: int, n_warmup: int = 0) -> float:
    """Stay at the peak after the warm-up."""
    return _phase(step, n_steps, n_warmup)[0]


def linear(step: int, n_steps: int, n_warmup: int = 0, *, final: float = 0.0) -> float:
    """Fall in a straight line from the peak to `final` at step `n_steps`."""
    _check_final(final)
    warm, progress = _phase(step, n_steps, n_warmup)
    return warm * (1 - (1 - final) * progress)


def cosine(step: int, n_steps: int, n_warmup: int = 0, *, final: float = 0.0) -> float:
    """Fall along half a cosine wave from the peak to `final` at step `n_steps` (Loshchilov and Hutter, 2017)."""
    _check_final(final)
    warm, progress = _phase(step, n_steps, n_warmup)
    return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def step_decay(
    step: int, n_steps: int, n_warmup: int = 0, *, drops: Sequence[float] = (0.5, 0.75), factor: float = 0.1
) -> float:
    """Multiply by `factor` at each of `drops`, given as shares of `n_steps`. ValueError if one is not in (0, 1]."""
    if not all(0 < drop <= 1 for drop in drops) or not 0 < factor <= 1:
        raise ValueError(f"drops and factor must be in (0, 1], got {tuple(drops)} and {factor}")
    warm, _ = _phase(step, n_steps, n_warmup)
    return warm * factor ** sum(step >= drop * n_steps for drop in drops)


def warm_restarts(
    step: int, n_steps: int, n_warmup: int = 0, *, n_cycles: int = 3, growth: float = 2.0, final: float = 0.0
) -> float:
    """Fall along half a cosine wave `n_cycles` times, each starting at the peak (SGDR, Loshchilov and Hutter, 2017).

    Each cycle is `growth` times as long as the one before; together they fill the steps after the warm-up.
    Raises ValueError if n_cycles is below 1 or growth not above 0.
    """
    _check_final(final)
    if n_cycles < 1 or not growth > 0:
        raise ValueError(f"n_cycles must be at least 1 and growth above 0, got {n_cycles} and {growth}")
    warm, progress = _phase(step, n_steps, n_warmup)
    total = sum(growth**i for i in range(n_cycles))
    position = progress * total  # measured in lengths of the first cycle
    for i in range(n_cycles):
        # Where a cycle ends on a whole step, rounding must not put that step into the cycle that is over.
        if position < growth**i - 1e-9 * total:
            return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * max(0.0, position) / growth**i)))
        position -= growth**i
    return warm * final


def warmup_stable_decay(
    step: int, n_steps: int, n_warmup: int = 0, *, decay: float = 0.2, shape: str = "linear", final: float = 0.0
) -> float:
    """Stay at the peak and fall to `final` in the last share `decay` of `n_steps` (Hu et al., 2024, MiniCPM).

    `shape` of the fall is "linear", "cosine" or "1-sqrt". Until the fall nothing depends on `n_steps`: one run can be
    continued, or ended at several lengths. Raises ValueError if the decay does not fit after the warm-up.
    """
    _check_final(final)
    warm, _ = _phase(step, n_steps, n_warmup)
    n_decay = round(decay * n_steps)
    if not 0 < decay <= 1 or not 1 <= n_decay <= n_steps - n_warmup:
        raise ValueError(f"decay must leave 1 to {n_steps - n_warmup} of {n_steps} steps, got {decay}")
    if shape not in FALLS:
        raise ValueError(f"shape must be one of {', '.join(FALLS)}, got {shape!r}")
    progress = min(max(0.0, (step - (n_steps - n_decay)) / n_decay), 1.0)
    return warm * (final + (1 - final) * FALLS[shape](progress))


FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}
SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step_decay,
    "restarts": warm_restarts,
    "wsd": warmup_stable_decay,
}


# %% tags=["promote:schedules"]
def build_schedule(name: str, n_steps: int, n_warmup: int = 0, **options: object) -> Callable[[int], float]:
    """Return the schedule `name` of `SCHEDULES` as a function of the step alone; it can be pickled.

    Raises ValueError for an unknown name or, already here, for options that the schedule refuses.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}, got {name!r}")
    schedule = partial(SCHEDULES[name], n_steps=n_steps, n_warmup=n_warmup, **options)
    schedule(0)
    return schedule

# %%
n_steps, n_warmup = 1000, 100
figure, panels = plt.subplots(2, 3, figsize=(9, 4.4), sharex=True, sharey=True)
for axes, name, color in zip(panels.flat, SCHEDULES, COLORS, strict=False):
    schedule = build_schedule(name, n_steps, n_warmup)
    axes.plot([schedule(step) for step in range(n_steps + 1)], color=color)
    axes.set_title(name, fontsize=11)
for axes in panels[1]:
    axes.set_xlabel("step")
for axes in panels[:, 0]:
    axes.set_ylabel("factor")
figure.suptitle("All six rise alike; they differ in when they come down", x=0.01, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# Six panels, each with the factor over 1,000 steps, warm-up 100. *constant* never comes down. *linear* and *cosine* need to know the last
# step from the start. *step* falls by a factor of ten at half and at three quarters. *restarts* returns to the peak, in cycles that double. *wsd*
# (warm-up, stable, decay) stays at the peak and falls in the last fifth: until then the run may still be made longer.
#
# ### Proof: the schedules of transformers and torch
#
# A real optimizer is stepped by the library's scheduler; its learning rate, started at 1, is the factor.

# %%
def library_factors(build: Callable[[Optimizer], object], n_steps: int) -> list[float]:
    """The learning rates that a library's scheduler sets, from a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build(optimizer)
    found = []
    for _ in range(n_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def our_factors(name: str, **options: object) -> list[float]:
    schedule = build_schedule(name, n_steps, n_warmup, **options)
    return [schedule(step) for step in range(n_steps)]


theirs = {
    "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, n_warmup),
    "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, n_warmup, n_steps),
    "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, n_warmup, n_steps),
    "wsd": lambda o: transformers.get_wsd_schedule(o, n_warmup, 200, n_steps, decay_type="linear"),
}
for name, build in theirs.items():
    compare(f"{name} against transformers", our_factors(name), library_factors(build, n_steps), 1e-12)

# %% [markdown]
# Steps and restarts are torch's, restarts of equal length transformers' as well. torch's have no warm-up of their own, so they run without.

# %%
scheduler = torch.optim.lr_scheduler
n_warmup = 0
steps = library_factors(lambda o: scheduler.MultiStepLR(o, [500, 750], gamma=0.1), n_steps)
compare("step against torch's MultiStepLR", our_factors("step"), steps, 1e-12)
n_steps = 700  # cycles of 100, 200 and 400 steps
restarts = library_factors(lambda o: scheduler.CosineAnnealingWarmRestarts(o, T_0=100, T_mult=2), n_steps)
compare("restarts against torch's CosineAnnealingWarmRestarts", our_factors("restarts"), restarts, 1e-12)
n_warmup = 100
equal = library_factors(
    lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, n_warmup, n_steps, 3), n_steps
)
compare("equal restarts against transformers", our_factors("restarts", growth=1.0), equal, 1e-12)
n_steps = 1000

# %% [markdown]
# ## Optimizers
#
# SGD follows the gradient, averaged over steps. Adam divides each number's average gradient by its usual size; AdamW does the same and keeps
# weight decay out of that division. Two newer ones have rules that fit into a few lines.

# %% [markdown] tags=["promote:optimizers"]
# Optimizers: Muon for the matrices of a Transformer, Lion, and one function that gives every parameter its optimizer.
#
# SGD, Adam and AdamW are torch's own. Muon follows Jordan et al. (2024, "Muon: An optimizer for hidden layers in neural
# networks"), Lion follows Chen et al. (2023, "Symbolic Discovery of Optimization Algorithms").
#
# Left out: spreading Muon's work over ranks (with sharded parameters every rank orthogonalises every matrix), closures,
# sparse gradients.

# %% [markdown]
# ### Muon: all directions of a matrix alike
#
# The update of a weight matrix is a matrix too, and usually nearly all of it is a few large singular directions. Muon sets all its singular values
# to about 1 and keeps the directions: $U S V^T$ becomes $U V^T$. No singular value decomposition is needed. A polynomial in the matrix, such as
# $aX + b(XX^T)X + c(XX^T)^2X$, leaves the directions as they are and puts each singular value $s$ through $as + bs^3 + cs^5$. Applied five times, it
# drives them all towards 1.

# %% tags=["promote:optimizers"]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at 0, so that small singular values grow fast


def orthogonalise(matrices: Tensor, n_steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by numbers near 1 and keep its singular vectors.

    A Newton-Schulz iteration of degree five (Jordan et al., 2024) after division by the Frobenius norm: five steps
    bring every singular value that is not tiny to between about 0.7 and 1.2. A zero matrix stays zero.

    Args:
        matrices: (..., rows, columns), all treated at once.
        n_steps: Number of steps.

    Raises:
        ValueError: matrices has fewer than two dimensions, or n_steps is below 1.
    """
    if matrices.dim() < 2 or n_steps < 1:
        shape = tuple(matrices.shape)
        raise ValueError(f"matrices must be (..., rows, columns) and n_steps at least 1, got {shape} and {n_steps}")
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the smaller Gram matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

# %%
torch.manual_seed(0)
update = torch.randn(64, 8) @ torch.randn(8, 32) + 0.2 * torch.randn(64, 32)  # eight large directions of 32
before = torch.linalg.svdvals(update) / torch.linalg.matrix_norm(update)
figure, axes = plt.subplots()
axes.plot(before, "o-", color=GREY, label="update, divided by its norm")
for n_steps_shown, color in ((1, ORANGE), (3, GREEN), (5, BLUE)):
    values = torch.linalg.svdvals(orthogonalise(update, n_steps_shown))
    axes.plot(values, "o-", color=color, label=f"after {n_steps_shown} step{'s' * (n_steps_shown > 1)}")
axes.set(xlabel="singular value, largest first", ylabel="size")
axes.legend(loc="upper right", fontsize=9)
axes.set_title("Five steps bring the weak directions up to the strong ones")
plt.show()
after = torch.linalg.svdvals(orthogonalise(update))
print(f"before: largest / smallest {before[0] / before[-1]:.0f}; after: between {after[-1]:.2f} and {after[0]:.2f}")
assert after[-1] > 0.3 and after[0] < 1.3

# %% [markdown]
# The singular values of a made-up update, before and after one, three and five steps. The optimizer itself is momentum, this function, and a factor
# for the shape. Matrices of equal shape go through it as one batch, as many small products cost more than one large one.

# %% tags=["promote:optimizers"]
class Muon(Optimizer):
    """Momentum whose every update is orthogonalised (Jordan et al., 2024), for matrices inside a network.

    Matrices of equal shape are orthogonalised together. An update is multiplied by max(1, rows / columns) ** 0.5, so
    that its effect on the layer's output has the same size whatever the shape. Weight decay is decoupled. Parameters
    sharded by FSDP2 (DTensor) are gathered for the orthogonalisation, and each rank keeps its own shard of the result.

    Args:
        params: Matrices (..., rows, columns), or groups of them. A group may have "split": sizes that cut the rows into
            parts with an update each, as queries, keys and values in one matrix.
        lr: Learning rate: about the change of each matrix in spectral norm per step.
        momentum, nesterov: Share of the old average kept at a step; whether the update looks one step ahead.
        weight_decay: A step multiplies the weights by 1 - lr * weight_decay.
        n_steps: Newton-Schulz steps.
        dtype: Type in which they are computed; the parameter's own if not given. bfloat16 is enough, and fast on GPUs.

    Raises:
        ValueError: A number is out of range, a parameter is no matrix, or a split does not add up to its rows.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        n_steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(lr=lr, weight_decay=weight_decay, betas=(momentum,))
        self.dtype = dtype
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "n_steps": n_steps, "split": None})
        for group in self.param_groups:
            for parameter in group["params"]:
                rows = parameter.shape[-2] if parameter.dim() > 1 else 0
                if not rows or sum(group["split"] or (rows,)) != rows:
                    shape = tuple(parameter.shape)
                    raise ValueError(f"params must be matrices with rows as in {group['split']=}, got {shape}")

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        work: list[tuple[Tensor, dict[str, object], int]] = []  # parameter, its group, number of its parts
        parts: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._average(parameter, group)
                split = update.split(group["split"] or update.shape[-2], dim=-2)
                work.append((parameter, group, len(split)))
                parts += split
        done = iter(self._orthogonalised(parts, [group for _, group, n in work for _ in range(n)]))
        for parameter, group, n_parts in work:
            update = torch.cat([next(done) for _ in range(n_parts)], dim=-2).to(parameter.dtype)
            if isinstance(parameter, DTensor):  # without communication: every rank has the whole matrix
                mesh, placements = parameter.device_mesh, parameter.placements
                update = distribute_tensor(update, mesh, placements, src_data_rank=None)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _average(self, parameter: Tensor, group: dict[str, object]) -> Tensor:
        """Take the gradient into the running average and return what is to be orthogonalised, as a whole matrix."""
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        return update.full_tensor() if isinstance(update, DTensor) else update

    def _orthogonalised(self, parts: list[Tensor], groups: list[dict[str, object]]) -> list[Tensor]:
        """Return the scaled updates of `parts`; those of equal shape are computed in one batch."""
        batches: dict[tuple, list[int]] = defaultdict(list)
        for i, (part, group) in enumerate(zip(parts, groups, strict=True)):
            batches[part.shape, part.dtype, part.device, group["n_steps"]].append(i)
        done: list[Tensor] = [None] * len(parts)
        for (shape, dtype, _, n_steps), indices in batches.items():
            batch = torch.stack([parts[i] for i in indices]).to(self.dtype or dtype)
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            for i, update in zip(indices, scale * orthogonalise(batch, n_steps), strict=True):
                done[i] = update
        return done

# %% [markdown]
# ### Lion: only the sign
#
# Lion was found by a search over programs. Each number of the weights moves by exactly the learning rate, in the direction of the sign of an
# average; a second average of the gradient is all it stores, half of Adam's state.

# %% tags=["promote:optimizers"]
class Lion(Optimizer):
    """Steps of equal size for every number, in the direction of the sign of an average (Chen et al., 2023).

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate; a third to a tenth of AdamW's is usual.
        betas: Share of the average in the direction of a step, and share of it that is kept afterwards.
        weight_decay: A step multiplies the weights by 1 - lr * weight_decay.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_options(lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                direction = state["average"].lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                state["average"].lerp_(parameter.grad, 1 - beta2)

# %% [markdown]
# ### Which parameter gets what
#
# Weight decay pulls towards zero, which is sensible for matrices and wrong for the scale of a norm. Muon is for matrices between hidden vectors: the
# embedding and the head have one axis that is the vocabulary, and go to AdamW.

# %% tags=["promote:optimizers"]
def check_options(*, lr: float, weight_decay: float, betas: Sequence[float]) -> None:
    """Refuse what no optimizer can work with; ValueError names the argument."""
    for name, value, holds, allowed in (
        ("lr", lr, 0 <= lr < math.inf, "at least 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
    ):
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {value}")


def build_optimizers(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    matrix_learning_rate: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> list[Optimizer]:
    """Return optimizers that together update every trained parameter of `model`, each exactly once.

    Weight decay acts on matrices only: norms and biases have none. "muon" is Muon for the matrices inside `blocks`,
    queries, keys and values each on their own, and AdamW for the embeddings, the head and all vectors.

    Args:
        model: For "muon" its blocks must be named `blocks`, as in `GPTModel`.
        name: "sgd" (momentum betas[0], Nesterov), "adam" (decay as part of the gradient), "adamw", "lion" or "muon".
        learning_rate: The peak, which `set_learning_rates` scales; kept in each group as "initial_lr".
        weight_decay: Strength of the decay.
        matrix_learning_rate: Muon's own learning rate.
        betas, eps: As in AdamW; Lion takes betas, SGD the first.

    Raises:
        ValueError: A name or number is not allowed, or "muon" finds no matrix inside `blocks`.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    for label, rate in (("learning_rate", learning_rate), ("matrix_learning_rate", matrix_learning_rate)):
        if not 0 < rate < math.inf:
            raise ValueError(f"{label} must be above 0, got {rate}")
    check_options(lr=learning_rate, weight_decay=weight_decay, betas=betas)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizers: list[Optimizer] = []
    if name == "muon":
        inside = [key for key, value in trained.items() if value.dim() > 1 and "blocks" in key.split(".")]
        if not inside:
            raise ValueError("name 'muon' needs a model with matrices inside `blocks`")
        splits = qkv_splits(model)
        groups: dict[tuple[int, ...] | None, list[Tensor]] = defaultdict(list)
        for key in inside:
            parameter = trained.pop(key)
            groups[splits.get(parameter)].append(parameter)
        matrices = [{"params": parameters, "split": split} for split, parameters in groups.items()]
        optimizers.append(Muon(matrices, matrix_learning_rate, weight_decay=weight_decay))
    decayed = [value for value in trained.values() if value.dim() > 1]
    kept = [value for value in trained.values() if value.dim() <= 1]
    pairs = ((decayed, weight_decay), (kept, 0.0))
    groups_of_rest = [{"params": values, "weight_decay": decay} for values, decay in pairs if values]
    if groups_of_rest:
        optimizers.append(OPTIMIZERS[name](groups_of_rest, learning_rate, betas, eps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def qkv_splits(model: nn.Module) -> dict[Tensor, tuple[int, int, int]]:
    """Return for each fused projection matrix of `model` its rows of queries, keys and values."""
    found = {}
    for module in model.modules():
        if isinstance(module, MultiHeadAttention) and module.kv_dim is None:
            queries, keys = module.n_heads * module.head_dim, module.n_kv_heads * module.head_dim
            found[module.qkv.weight] = (queries, keys, keys)
    return found


def set_learning_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every learning rate to its peak ("initial_lr" of the group) times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def _adamw(groups: list[dict[str, object]], lr: float, betas: tuple[float, float], eps: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr, betas, eps, fused=True)


# What updates everything but Muon's matrices.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda groups, lr, betas, eps: torch.optim.SGD(groups, lr, betas[0], nesterov=betas[0] > 0),
    "adam": lambda groups, lr, betas, eps: torch.optim.Adam(groups, lr, betas, eps, fused=True),
    "adamw": _adamw,
    "lion": lambda groups, lr, betas, eps: Lion(groups, lr, betas=betas),
    "muon": _adamw,
}

# %%
torch.manual_seed(0)
model = GPTModel(GPTConfig.preset("tales-1m"))
table = []
for name in OPTIMIZERS:
    for optimizer in build_optimizers(model, name, 3e-3):
        for group in optimizer.param_groups:
            numbers = sum(parameter.numel() for parameter in group["params"])
            shown = {"tensors": len(group["params"]), "numbers": numbers, "weight decay": group["weight_decay"]}
            table.append({"name": name, "optimizer": type(optimizer).__name__, **shown, "split": group.get("split") or ""})
pd.DataFrame(table).set_index("name")

# %% [markdown]
# In every row group the numbers add up to the whole model. Under *muon* the fused matrices of queries, keys and values stand in a group of
# their own, with the rows at which they are split.
#
# ### Proof: torch's Muon, and Lion's paper
#
# torch has a Muon. It rounds each update to bfloat16 before the Newton-Schulz steps, which hides small mistakes; with that rounding switched off
# for the comparison it must take our steps. Ours in bfloat16 is compared as well, as loosely as its three digits demand.

# %%
def train_matrices(build: Callable[[list[Tensor]], Optimizer], n_steps: int = 20) -> Tensor:
    """Let an optimizer fit three matrices to random targets; return all weights as one vector."""
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (24, 16), (10, 30))]
    targets = [torch.randn_like(weight) for weight in weights]
    optimizer = build(weights)
    for _ in range(n_steps):
        optimizer.zero_grad()
        sum(F.mse_loss(weight, target) for weight, target in zip(weights, targets, strict=True)).backward()
        optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in weights])


ours = train_matrices(lambda p: Muon(p, lr=0.02, weight_decay=0.1))
with mock.patch.object(Tensor, "bfloat16", Tensor.clone):  # torch's Muon calls update.bfloat16()
    theirs = train_matrices(lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1))
compare("Muon against torch's, 20 steps in float32", ours, theirs, 1e-5)
theirs = train_matrices(lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1))
ours = train_matrices(lambda p: Muon(p, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16))
compare("Muon against torch's, 20 steps in bfloat16", ours, theirs, 2e-2)

# %% [markdown]
# Lion has no counterpart in torch. Its paper's algorithm, written for one number at a time:

# %%
def lion_by_hand(gradients: list[list[float]], lr: float, decay: float) -> list[float]:
    weights, averages = [1.0, -2.0, 0.5], [0.0, 0.0, 0.0]
    for gradient in gradients:
        for i, g in enumerate(gradient):
            c = 0.9 * averages[i] + (1 - 0.9) * g
            weights[i] -= lr * (math.copysign(1.0, c) * (c != 0) + decay * weights[i])
            averages[i] = 0.99 * averages[i] + (1 - 0.99) * g
    return weights


gradients = torch.randn(50, 3, dtype=torch.float64)
weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
lion = Lion([weights], lr=0.01, weight_decay=0.1)
for gradient in gradients:
    weights.grad = gradient
    lion.step()
compare("Lion against the paper's algorithm", weights, lion_by_hand(gradients.tolist(), 0.01, 0.1), 1e-12)

# %% [markdown]
# ## Which learning rate? A range test
#
# The most important number of a run can be found in a hundred steps: raise the rate at each step by the same factor and watch the loss
# (Smith, 2017). Too small, and nothing moves; then the loss falls, fastest at a rate that is a good peak; at last it turns up.

# %%
def train_steps(
    model: nn.Module, optimizers: list[Optimizer], batches: Iterable[tuple[Tensor, Tensor]], clip: float = math.inf
) -> list[tuple[float, float]]:
    """Train on the batches; return for each step the loss and the norm of the gradient before clipping."""
    history = []
    for inputs, targets in batches:
        loss = story_loss(model, inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append((loss.item(), norm.item()))
    return history


model, rates, losses = new_model(), [10 ** (-4.5 + 4.5 * i / 99) for i in range(100)], []
optimizers = build_optimizers(model, "adamw", 1.0)
for rate, batch in zip(rates, batches, strict=True):
    set_learning_rates(optimizers, rate)
    losses.append(train_steps(model, optimizers, [batch])[0][0])

# %%
smooth = np.convolve(losses, np.ones(9) / 9, mode="valid")  # the mean of nine steps belongs to the fifth
middle = rates[4:-4]
fastest, turning = middle[int(np.gradient(smooth).argmin())], middle[int(smooth.argmin())]
figure, axes = plt.subplots()
axes.semilogx(rates, losses, color=GREY, alpha=0.5, linewidth=1)
axes.semilogx(middle, smooth, color=BLUE)
for rate, label, color in ((fastest, "falls fastest", GREEN), (turning, "turns up", RED)):
    axes.axvline(rate, color=color, linestyle=":")
    axes.text(rate / 1.1, 5.2, label, color=color, ha="right")
axes.set(xlabel="learning rate, raised at every step", ylabel="loss (nats per token)", ylim=(5, 8))
axes.set_title("The loss falls fastest well below the rate at which it turns up")
plt.show()
assert 5e-4 < fastest < 0.02 and turning > 5 * fastest

# %% [markdown]
# The loss at each step (grey) and the mean of nine steps (blue) over the learning rate of that step. Three runs of forty steps, each with a constant rate, check the advice.

# %%
for label, rate in (("a hundredth", fastest / 100), ("where the loss falls fastest", fastest), ("a hundred times that", 100 * fastest)):
    model = new_model()
    final = train_steps(model, build_optimizers(model, "adamw", rate), batches[:40])[-5:]
    print(f"{label:28} loss after 40 steps {sum(loss for loss, _ in final) / 5:.1f}")

# %% [markdown]
# ## Gradient clipping: an exploding run, tamed
#
# Once in a while a step goes wrong: a rare batch, a steep place, a rate that is a little too high. The gradient there is large, the step is large, and
# the next gradient is larger. **Clipping** looks at the norm of all gradients together; where it is above a limit, all are divided by the same number, so
# that the norm is the limit. The direction stays (Pascanu et al., 2013).

# %%
def clip_by_hand(parameters: Iterable[Tensor], limit: float) -> Tensor:
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))  # of all numbers as one vector
    if norm > limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm


ours, theirs = new_model(dtype=torch.float64), new_model(dtype=torch.float64)
for model in (ours, theirs):
    story_loss(model, inputs, targets).backward()
norms = clip_by_hand(ours.parameters(), 0.1), nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
print(f"norm before {norms[0]:.3f}")
gradients = lambda model: torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
compare("clipped gradients against torch's clip_grad_norm_", gradients(ours), gradients(theirs), 1e-7)

# %% [markdown]
# Now the same run twice, with SGD at a rate that is too high for it.

# %%
runs = {}
for label, clip in (("without clipping", math.inf), ("clipped at 0.1", 0.1)):
    model = new_model()
    optimizers = build_optimizers(model, "sgd", 3.0, weight_decay=0.0)
    runs[label] = train_steps(model, optimizers, batches[:60], clip)
    losses = [loss for loss, _ in runs[label]]
    last = sum(losses[-5:]) / 5
    print(f"{label:17} exploded: {not last < 2 * losses[0]}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
for (label, history), color in zip(runs.items(), (RED, BLUE), strict=True):
    losses, norms = zip(*history, strict=True)
    left.plot([min(loss, 1e4) if loss == loss else 1e4 for loss in losses], color=color, label=label)
    right.plot([min(norm, 1e4) if norm == norm else 1e4 for norm in norms], color=color)
for axes, label in ((left, "loss (nats per token)"), (right, "norm before clipping")):
    axes.set(xlabel="step", ylabel=label, yscale="log")
left.legend(loc="center right", fontsize=9)
figure.suptitle("One limit on the norm turns an explosion into training", x=0.01, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# Left the loss, right the norm of the gradient, both on logarithmic axes cut at 10,000; what is not a number is drawn there. Without a limit (red) the
# run is lost; with it (blue) the loss falls. Clipping is an insurance: it does not make a wrong rate right.
#
# ## Gradient accumulation: a large batch on a small machine
#
# Gradients add up. A batch that does not fit into memory is cut into micro-batches; `backward` is called for each, and the optimizer steps once. The
# result is the large batch's, on one condition: each loss must be the **sum** over its targets divided by the targets of the **whole** batch. The mean over each
# micro-batch, averaged, weighs the tokens of short micro-batches more. That mistake was in widely used libraries for years.
#
# ### Proof: accumulated gradients are the large batch's
#
# In float64, so that nothing hides behind rounding. Four micro-batches of two stories each; the targets of one of them are halved, so that their numbers differ.

# %%
targets_cut = targets.clone()
targets_cut[:2, 90:] = IGNORED
n_targets = (targets_cut != IGNORED).sum()
pairs = list(zip(inputs.split(2), targets_cut.split(2), strict=True))

large, right, wrong = (new_model(dtype=torch.float64) for _ in range(3))
story_loss(large, inputs, targets_cut).backward()
for pair in pairs:
    (story_loss(right, *pair, reduction="sum") / n_targets).backward()
    (story_loss(wrong, *pair) / len(pairs)).backward()
compare("sums divided by all targets", gradients(right), gradients(large), 1e-14)
error = (gradients(wrong) - gradients(large)).norm() / gradients(large).norm()
print(f"means of micro-batches averaged: the gradient is off by {error:.0%}")
assert error > 0.02

# %% [markdown]
# ## Mixed precision
#
# Sixteen bits instead of thirty-two halve the memory of activations, and accelerators multiply them many times faster. Two formats share the bits differently:

# %%
formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
table = {
    name: {
        "largest": f"{torch.finfo(dtype).max:.1e}",
        "smallest normal": f"{torch.finfo(dtype).smallest_normal:.1e}",
        "next after 1": f"1 + {torch.finfo(dtype).eps:.1e}",
    }
    for name, dtype in formats.items()
}
pd.DataFrame(table).T

# %% [markdown]
# bfloat16 has float32's range and two to three digits. float16 has one digit more and a small range: what is above 65,504 is infinite, what is below
# about $6 \cdot 10^{-8}$ is zero. **Mixed** precision (Micikevicius et al., 2018) keeps the weights in float32 and computes products of matrices in 16 bits; sums over
# many numbers, such as norms and the loss, stay in float32.
#
# ### Underflow, and loss scaling against it
#
# Gradients are small, most of all where the backward pass begins: the gradient of a logit is the probability given to that token, less 1 for the right one, divided by the number of
# targets. A model that has learnt something gives most tokens next to none. How many of these numbers would be lost in float16?

# %%
model = new_model()
train_steps(model, build_optimizers(model, "adamw", 1e-2), batches, clip=1.0)
logits = model(inputs)
logits.retain_grad()
F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
real = logits.grad[targets != IGNORED].double().flatten()
lost = {}
for dtype in (torch.bfloat16, torch.float16):
    for scale in (1, 2**16):
        lost[dtype, scale] = ((real * scale).to(dtype) == 0).double().mean().item()
        print(f"{dtype!s:15} gradient × {scale:<6} lost to zero: {lost[dtype, scale]:.0%}")
assert lost[torch.bfloat16, 1] == 0 and lost[torch.float16, 1] > 0.3
assert lost[torch.float16, 2**16] < 0.3 * lost[torch.float16, 1]

# %%
figure, axes = plt.subplots()
bins = np.arange(-14, 2, 0.25)
axes.hist(real.abs().log10().numpy(), bins=bins, color=BLUE, alpha=0.45)
axes.hist((real * 2**16).abs().log10().numpy(), bins=bins, color=ORANGE, alpha=0.45)
edge, top = math.log10(2**-25), axes.get_ylim()[1]
axes.axvline(edge, color=RED, linestyle=":")
axes.text(edge - 0.1, 1.06 * top, "zero in float16", color=RED, ha="right", va="top")
axes.text(-9.5, 0.6 * top, "gradient", color=BLUE, ha="right")
axes.text(-2.5, 0.6 * top, "× 65,536", color="#A06A00", ha="left")
axes.set(xlabel="size of a number of the gradient (power of ten)", ylabel="how many", ylim=(0, 1.08 * top))
axes.set_title("Scaling the loss moves the gradient out of float16's blind range")
plt.show()

# %% [markdown]
# The sizes of all numbers in the gradient of the logits (blue), and of the same multiplied by 65,536 (orange). Left of the dotted line float16 has only zero. Multiplying the **loss** by
# that factor multiplies every gradient of the backward pass by it, at no cost; before the step they are divided again. The factor is found while training: where a
# gradient is infinite the step is skipped and the factor halved; after a long time without that, it is doubled. `torch.amp.GradScaler` does this. By hand:

# %%
def scaled_step(loss: Tensor, optimizer: Optimizer, scale: float) -> float:
    """One step with loss scaling; return the factor of the next step."""
    (loss * scale).backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    for gradient in gradients:
        gradient.div_(scale)
    finite = all(gradient.isfinite().all() for gradient in gradients)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return scale if finite else scale / 2


def half_precision_losses(by_hand: bool, n_steps: int = 6, scale: float = 2.0**40) -> list[float]:
    model = new_model()
    (optimizer,) = build_optimizers(model, "adamw", 3e-3)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale), []
    for pair in batches[:n_steps]:
        with torch.autocast("cpu", torch.float16):
            loss = story_loss(model, *(part[:2] for part in pair)).float()
        losses.append(loss.item())
        if by_hand:
            scale = scaled_step(loss, optimizer, scale)
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    print(f"{'by hand' if by_hand else 'GradScaler':10} factor at the end 2^{math.log2(scale if by_hand else scaler.get_scale()):.0f}")
    return losses


ours, theirs = half_precision_losses(by_hand=True), half_precision_losses(by_hand=False)
compare("losses with scaling by hand against GradScaler", ours, theirs, 1e-5)

# %% [markdown]
# The factor began far too high, and both halved it at every step until gradients were finite again.
#
# ### Loss, memory and time of the three formats
#
# What training keeps from the forward to the backward pass is counted, tensor by tensor, as autograd saves it. The count depends on no machine. The same function will
# serve for checkpointing.

# %%
def kept_bytes(model: GPTModel, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps during `forward`, each storage once, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}  # address -> the tensor itself, so that its memory is not given to another

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def train_in(name: str, n_steps: int = 30) -> tuple[float, int, float]:
    """Loss after some steps, bytes that the blocks of tales-1m keep, seconds of one thread for a step."""
    model, losses, started = new_model(), [], time.process_time()
    (optimizer,) = build_optimizers(model, "adamw", 3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=name == "float16")
    context = lambda: torch.autocast("cpu", formats[name], enabled=name != "float32")
    for pair in batches[:n_steps]:
        with context():
            loss = story_loss(model, *(part[:4] for part in pair)).float()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.process_time() - started) / n_steps
    wide = new_model(GPTConfig.preset("tales-1m"))
    with context():
        kept = kept_bytes(wide, lambda: wide.hidden_states(inputs))
    return sum(losses[-5:]) / 5, kept, seconds

# %%
results = {name: train_in(name) for name in formats}
losses = {name: loss for name, (loss, _, _) in results.items()}
for name, (loss, kept, _) in results.items():
    print(f"{name:9} loss {loss:.1f}; the blocks keep {kept / results['float32'][1]:.0%} of float32's activations")
assert all(abs(loss / losses["float32"] - 1) < 0.02 for loss in losses.values())
assert all(results[name][1] < 0.85 * results["float32"][1] for name in ("bfloat16", "float16"))

# %% tags=["nbval-ignore-output"]
for name, (_, kept, seconds) in results.items():
    print(f"{name:9} {1000 * seconds:6.1f} ms a step, {kept / 1e6:.2f} MB kept")

# %% [markdown]
# All three reach the same loss. The kept bytes fall by less than half, since the vectors between blocks and in norms stay in float32. The times are those of this processor and
# say little about yours: a CPU without 16-bit units converts back and forth and is slower, an accelerator is several times faster.
#
# ## Activation checkpointing: compute twice, keep less
#
# The backward pass needs what the forward pass computed. A **checkpointed** block keeps its input only and computes itself again when its turn comes (Chen et al., 2016). It costs
# one more forward pass, a third more work; what is kept falls to one vector per token and block.

# %%
def checkpoint_blocks(model: GPTModel) -> GPTModel:
    """Make each block of the model forget everything but its input."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


deep = GPTConfig.preset("tales-1m", emb_dim=32, n_layers=8, n_heads=2)
plain, forgetful = new_model(deep), checkpoint_blocks(new_model(deep))
kept = [kept_bytes(model, lambda m=model: m.hidden_states(inputs)) for model in (plain, forgetful)]
one_input = 4 * inputs.numel() * deep.emb_dim
print(f"8 blocks keep {kept[0]:,} bytes; checkpointed {kept[1]:,}, {kept[0] / kept[1]:.0f} times less")
print(f"the inputs of 8 blocks are {8 * one_input:,} bytes")
assert 8 * one_input <= kept[1] < 12 * one_input

# %%
work = []
for model in (plain, forgetful):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.hidden_states(inputs).square().mean().backward()
    work.append(counter.get_total_flops())
print(f"{work[0]:,} FLOPs; checkpointed {work[1]:,}, {work[1] / work[0]:.3f} times as many")
assert 1.25 < work[1] / work[0] < 4 / 3
compare("gradients with checkpointing", gradients(forgetful), gradients(plain), 1e-7)

# %% [markdown]
# The gradients are the same, for a little less than a third more FLOPs: the last product of a block is not needed again.

# %% [markdown]
# ## Packing instead of padding
#
# Texts have different lengths. In a padded batch the rest of each row is computed and thrown away. **Packing** puts several stories into one row. Then a story must not
# see the ones before it: the attention mask has to say which tokens belong together, and positions start again at each story.

# %%
def pack(rows: list, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put stories into rows of `length`, each where it first fits, longest first.

    Returns inputs and targets (rows, length), and for each token the number of its story; 0 is padding.
    """
    bins: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        fitting = (b for b in bins if sum(len(rows[j]) - 1 for j in b) + len(rows[i]) - 1 <= length)
        home = next(fitting, None)
        if home is None:
            bins.append(home := [])
        home.append(i)
    inputs = torch.zeros(len(bins), length, dtype=torch.int64)
    targets, story = torch.full_like(inputs, IGNORED), torch.zeros_like(inputs)
    for row, members in enumerate(bins):
        start = 0
        for i in members:
            ids, end = torch.from_numpy(rows[i]), start + len(rows[i]) - 1
            inputs[row, start:end], targets[row, start:end], story[row, start:end] = ids[:-1], ids[1:], i + 1
            start = end
    return inputs, targets, story


def packed_logits(model: GPTModel, inputs: Tensor, story: Tensor) -> Tensor:
    """Logits of packed rows; each token sees the earlier tokens of its own story."""
    mask = (story[:, :, None] == story[:, None, :])[:, None]  # (rows, 1, tokens, tokens), the layer adds causality
    index = torch.arange(story.shape[1]).expand_as(story)
    first = torch.where(story != story.roll(1, dims=1), index, 0)
    first[:, 0] = 0
    positions = index - first.cummax(dim=1).values
    x = model.token_embedding(inputs)
    if model.position_embedding is not None:
        x = x + model.position_embedding(positions)
    for block in model.blocks:
        x = block(x, attention_mask=mask, positions=positions)
    return model.output_head(model.final_norm(x))


texts = [row if i % 3 == 0 else row[: 40 + 29 * i % 140] for i, row in enumerate(rows[:48])]
packed_inputs, packed_targets, story = pack(texts, 512)
lengths = torch.tensor([len(text) - 1 for text in texts])
shares = {
    "padded to 256, the context": lengths.sum() / (48 * 256),
    "padded to the longest": lengths.sum() / (48 * lengths.max()),
    "packed into rows of 512": lengths.sum() / packed_inputs.numel(),
}
print(f"{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens")
for label, share in shares.items():
    print(f"{label:27} {share:.0%} of the computed tokens are useful")
assert shares["packed into rows of 512"] > 0.9

# %% [markdown]
# ### Proof: packed stories lose what they lose alone
#
# Two texts in three are cut short here, so that lengths differ as they do in a mixed corpus; one row below holds several. The loss of every text, alone in a padded row, and packed. First with the mask, then without it.

# %%
long = {name: replace(tiny, context_length=512, positions=name) for name in ("rotary", "learned")}
alone_inputs, alone_targets = collate(texts)


@torch.no_grad()
def story_losses(logits: Tensor, targets: Tensor, numbers: Tensor) -> Tensor:
    """Loss of each story: sums of the losses of its tokens; (48,)."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return torch.zeros(49).index_add(0, numbers.flatten(), losses)[1:]


leaks = {}
for name, config in long.items():
    model = new_model(config)
    train_steps(model, build_optimizers(model, "adamw", 5e-3), batches[:40], clip=1.0)
    numbers = torch.arange(1, 49)[:, None].expand_as(alone_inputs)
    alone = story_losses(model(alone_inputs), alone_targets, numbers)
    packed = story_losses(packed_logits(model, packed_inputs, story), packed_targets, story)
    compare(f"{name} positions, packed with the mask against alone", packed / alone, torch.ones(48), 1e-5)
    leaky = story_losses(model(packed_inputs), packed_targets, story)
    leaks[name] = (leaky - alone).abs()
    first = [int(numbers[0]) - 1 for numbers in story]
    others = [i for i in range(48) if i not in first]
    print(f"  without it: first stories of a row off by {leaks[name][first].max():.3f}, others by up to {leaks[name][others].max():.1f} nats")
    assert leaks[name][first].max() < 1e-2 < leaks[name][others].min()

# %% [markdown]
# With the mask each story has its own loss to the last digits. Without it every story but the first of its row is changed by what stands before it. Nothing would have failed: the
# loss is still a number.
#
# Throughput must be counted in useful tokens, and the longer row makes attention dearer:

# %% tags=["nbval-ignore-output"]
model = new_model(long["rotary"])


def useful_tokens_per_second(forward: Callable[[], Tensor], targets: Tensor) -> float:
    started = time.process_time()
    for _ in range(3):
        F.cross_entropy(forward().flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    return 3 * int((targets != IGNORED).sum()) / (time.process_time() - started)


print(f"padded to the longest: {useful_tokens_per_second(lambda: model(alone_inputs), alone_targets):,.0f} useful tokens a second")
print(f"packed with the mask: {useful_tokens_per_second(lambda: packed_logits(model, packed_inputs, story), packed_targets):,.0f}")

# %% [markdown]
# On a processor an explicit mask over 512 × 512 pairs costs a part of what is won. Batches of similar length, as the ones above, are the other remedy, and cheaper where lengths differ little. Packing pays
# where lengths differ much, and with kernels that skip what is masked.

# %% [markdown]
# ## Many machines: what each way splits
#
# A training step has rows of data, weights, and the states of the optimizer. Four ways to spread them over GPUs cut along different lines:

# %%
ways = {
    "DDP": "data split; model\nand states repeated",
    "FSDP": "data split; every\nmatrix and state split",
    "tensor": "every matrix split;\ndata repeated",
    "pipeline": "blocks split; data\nflows through",
}
figure, panels = plt.subplots(1, 4, figsize=(10, 3.4))
for axes, (name, text) in zip(panels, ways.items(), strict=True):
    for block in range(4):  # four blocks of a model, from bottom to top
        for part in range(4):  # four quarters of each matrix
            owner = {"FSDP": part, "tensor": part, "pipeline": block}.get(name)
            color = GREY if owner is None else COLORS[owner]
            axes.add_patch(plt.Rectangle((part, 1.4 * block), 1, 1.1, facecolor=color, alpha=0.6, edgecolor="white"))
    for row in range(4):
        color = COLORS[row] if name in ("DDP", "FSDP") else GREY
        axes.add_patch(plt.Rectangle((0, -1.5 - 0.35 * row), 4, 0.28, facecolor=color, alpha=0.6))
    axes.set(xlim=(-0.1, 4.1), ylim=(-4.2, 6))
    axes.text(2, -3.0, text, ha="center", va="top", fontsize=9)
    axes.set_axis_off()
    axes.set_title(name, fontsize=11)
figure.suptitle("Four GPUs (colours): who holds which weights, above, and which rows of the batch, below", x=0.01, ha="left", fontsize=12)
plt.show()

# %% [markdown]
# Above four blocks of a model, each cut into quarters; below four rows of a batch. A colour is one of four GPUs, grey means on all of them. **DDP** (distributed data parallel) repeats the model and averages
# gradients. **FSDP** (fully sharded; ZeRO stage 3) also splits rows of data, and every weight has one owner; before a block works, its weights are gathered, and dropped afterwards.
# **Tensor** parallelism splits the products inside a block, **pipeline** parallelism splits the stack of blocks.
#
# ### Tensor parallelism is arithmetic
#
# Two matrices follow each other in a feed-forward network: cut the first by columns, the second by rows. Each GPU gets a part of the hidden numbers from start to end, and one sum at the end puts the
# results together.

# %%
torch.manual_seed(0)
x, up, down = torch.randn(5, 8), torch.randn(8, 32), torch.randn(32, 8)
whole = F.gelu(x @ up) @ down
partial_sums = [F.gelu(x @ columns) @ rows_ for columns, rows_ in zip(up.chunk(4, dim=1), down.chunk(4, dim=0), strict=True)]
compare("four parts, summed, against the whole", sum(partial_sums), whole, 1e-4)

# %% [markdown]
# The same with attention, where a part is a group of heads: the real layer of `shared.attention`, its matrices cut by heads.

# %%
def head_group(layer: MultiHeadAttention, part: int, n_parts: int) -> MultiHeadAttention:
    """The part of an attention layer that holds every n-th group of heads."""
    heads, width = layer.n_heads // n_parts, layer.head_dim
    cut = slice(part * heads * width, (part + 1) * heads * width)
    group = MultiHeadAttention(layer.emb_dim, heads, head_dim=width, causal=True, out_bias=False)
    with torch.no_grad():
        group.qkv.weight.copy_(torch.cat([matrix[cut] for matrix in layer.qkv.weight.chunk(3)]))
        group.output.weight.copy_(layer.output.weight[:, cut])
    return group


layer, x = MultiHeadAttention(32, 4, causal=True, out_bias=False), torch.randn(2, 6, 32)
groups = [head_group(layer, part, 2) for part in range(2)]
compare("two groups of heads, summed, against all", sum(group(x) for group in groups), layer(x))

# %% [markdown]
# ### Pipeline parallelism is arithmetic too
#
# Stages hold consecutive blocks. The batch is cut into micro-batches, so that a stage works on one while the next works on the one before.

# %%
model = new_model(replace(deep, n_layers=4))
stages = [model.blocks[:2], model.blocks[2:]]


def run_stage(stage: nn.ModuleList, x: Tensor) -> Tensor:
    for block in stage:
        x = block(x)
    return x


through = [run_stage(stages[1], run_stage(stages[0], model.token_embedding(part))) for part in inputs.split(2)]
joined = model.output_head(model.final_norm(torch.cat(through)))
compare("two stages, four micro-batches, against the model", joined, model(inputs), 1e-4)

# %%
def bubble(n_stages: int, n_micro: int) -> float:
    """Share of the time in which a stage waits (Huang et al., 2019): all forward, then all backward."""
    return (n_stages - 1) / (n_micro + n_stages - 1)


n_stages, n_micro = 4, 6
figure, axes = plt.subplots(figsize=(9, 2.6))
for stage in range(n_stages):
    for i in range(n_micro):
        forward = stage + i
        backward = n_micro + n_stages - 1 + 2 * (n_stages - 1 - stage + i)
        axes.barh(stage, 0.94, left=forward, color=BLUE, height=0.8)
        axes.barh(stage, 1.94, left=backward, color=ORANGE, height=0.8)
        axes.text(forward + 0.47, stage, i + 1, ha="center", va="center", color="white", fontsize=9)
        axes.text(backward + 0.97, stage, i + 1, ha="center", va="center", fontsize=9)
axes.set(yticks=range(n_stages), yticklabels=[f"stage {i + 1}" for i in range(n_stages)], xlabel="time (one forward pass of a micro-batch = 1)")
axes.invert_yaxis()
axes.grid(False)
axes.set_title(f"{n_stages} stages and {n_micro} micro-batches: each stage idles for {bubble(n_stages, n_micro):.0%} of the time")
plt.show()
total, busy = 3 * (n_micro + n_stages - 1), 3 * n_micro
assert abs(1 - busy / total - bubble(n_stages, n_micro)) < 1e-12

# %% [markdown]
# Blue are forward passes, orange backward passes, which take twice as long; the numbers are micro-batches. White is idle. More micro-batches make the share of white smaller.
#
# ### Proof: DDP and FSDP2 as two real processes
#
# [`distributed_demo.py`](distributed_demo.py) is started by `torchrun` as two processes that talk through gloo, the way that needs no GPU. Both train a small GPT on halves of each batch, once with DDP, once with
# FSDP2, and count what they hold and send. Here one process trains on whole batches.

# %%
def run_demo() -> dict[str, dict]:
    """Results of the two processes; where torchrun with gloo is not to be had (Windows), those of the record."""
    if os.name != "posix":
        return json.loads(Path("distributed_demo.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*command, "distributed_demo.py", "--output", output], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(output.read_text(encoding="utf-8"))


two, alone = run_demo(), distributed_demo.train_alone()
for name, result in two.items():
    compare(f"{name}: losses of {len(alone)} steps against one process", result["losses"], alone, 1e-5)
print(f"the loss falls from {alone[0]:.2f} to {alone[-1]:.2f}")
record("DDP and FSDP2, two processes", "losses of one process", "", "largest allowed difference 1e-5")

# %%
n_bytes = 4 * distributed_demo.new_model().n_parameters
table = pd.DataFrame({name: result["memory"][0] for name, result in two.items()}).T
assert all(result["memory"][0] == result["memory"][1] for result in two.values())
for name in ("weights", "gradients", "optimizer"):
    assert table[name]["ddp"] == 2 * table[name]["fsdp"] == (2 if name == "optimizer" else 1) * n_bytes
assert table.weights_before["fsdp"] == n_bytes
table[["weights", "gradients", "optimizer"]].astype(int)

# %% [markdown]
# Bytes on each of the two ranks, counted tensor by tensor. Before sharding FSDP's ranks held all weights as well; afterwards they hold half of everything. What it costs:

# %%
for name, result in two.items():
    print(name, {kind: f"{sent:,} bytes a step" for kind, sent in result["bytes_per_step"].items()})
blocks = 4 * sum(parameter.numel() for parameter in distributed_demo.new_model().blocks.parameters())
assert two["ddp"]["bytes_per_step"]["reduced"] == n_bytes
assert two["fsdp"]["bytes_per_step"] == {"gathered": n_bytes + blocks, "scattered": n_bytes}

# %% [markdown]
# DDP reduces a buffer of the size of the gradients. FSDP gathers all weights in the forward pass, the blocks once more in the backward pass (embedding and last norm are still there), and scatters the gradients.

# %% [markdown]
# ## Planning: from 124 million to 70 billion parameters
#
# A training run that does not fit, or that waits for its network, is better found on paper. The module below has the formulas, each short enough to check.

# %% [markdown] tags=["promote:planning"]
# What a training run needs: memory, communication and time from a model's shape and the way it is spread over GPUs.
#
# Every formula is checked against something that was counted: parameters and FLOPs exactly, activations and the bytes of two
# real processes to a few percent. Bandwidths and peaks are those of data sheets: the times are lower bounds of the right order.
#
# Left out: mixtures of experts, context parallelism, offloading, memory that an allocator loses.
#
# Follows Rajbhandari et al. (2020, "ZeRO"), Narayanan et al. (2021, "Efficient Large-Scale Language Model Training on GPU
# Clusters Using Megatron-LM") and Korthikanti et al. (2022, "Reducing Activation Recomputation in Large Transformer Models").

# %% tags=["promote:planning"]
def block_matrices(config: GPTConfig) -> int:
    """Return the number of weights in the matrices of one block, biases left out."""
    heads = (2 * config.n_heads + 2 * (config.n_kv_heads or config.n_heads)) * config.actual_head_dim
    maps = 3 if config.feed_forward == "swiglu" else 2
    return config.emb_dim * (heads + maps * feed_forward_width(config))


def feed_forward_width(config: GPTConfig) -> int:
    """Return the width inside the feed-forward network; ValueError for a mixture of experts."""
    if config.feed_forward == "moe":
        raise ValueError("config.feed_forward must be gelu or swiglu, got 'moe'")
    widths = {"gelu": 4 * config.emb_dim, "swiglu": 8 * math.ceil(config.emb_dim / 3)}
    return config.feed_forward_dim or widths[config.feed_forward]


def parameter_count(config: GPTConfig) -> int:
    """Return the number of parameters of a model that is not built; ValueError for a mixture of experts."""
    D, L, V = config.emb_dim, config.n_layers, config.vocab_size
    head_dim, kv_heads = config.actual_head_dim, config.n_kv_heads or config.n_heads
    norm = D * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = (config.n_heads + 2 * kv_heads) * head_dim if config.qkv_bias else 0
    if config.bias:
        maps = 2 if config.feed_forward == "swiglu" else 1
        biases += D + maps * feed_forward_width(config) + D
    block = block_matrices(config) + biases + 2 * norm + (2 * head_dim if config.qk_norm else 0)
    tables = V * D * (1 if config.tie_weights else 2)
    positions = config.context_length * D if config.positions == "learned" else 0
    return tables + positions + L * block + (norm if config.pre_norm else 0)


def flops_per_token(config: GPTConfig, n_tokens: int) -> int:
    """Return the FLOPs to train on one token in sequences of `n_tokens`: products of matrices, forward and backward.

    A product of a weight with a number counts as two, the backward pass as twice the forward pass; attention is counted
    over all pairs of tokens, as usual, although half of them are masked.
    """
    attention = 2 * n_tokens * config.n_heads * config.actual_head_dim
    head = config.vocab_size * config.emb_dim
    return 6 * (config.n_layers * (block_matrices(config) + attention) + head)


def kept_numbers(config: GPTConfig) -> int:
    """Return how many numbers one block keeps per token from the forward to the backward pass, without dropout."""
    D, width = config.emb_dim, config.actual_head_dim
    queries, keys = config.n_heads * width, (config.n_kv_heads or config.n_heads) * width
    # Inputs and outputs of two norms; queries, keys and values; the heads' outputs; the feed-forward network.
    kept = 4 * D + queries + 2 * keys + queries
    kept += (4 if config.feed_forward == "swiglu" else 2) * feed_forward_width(config)
    if config.norm == "rmsnorm":
        kept += 2 * D  # torch keeps the normalised input as well
    if config.positions == "rotary":
        kept += queries + keys  # the projection stays too, for the values in it
    if config.qk_norm:
        kept += 3 * (queries + keys) // 2
    return kept


# %% tags=["promote:planning"]
@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    Attributes:
        peak: FLOP per second of one GPU in 16-bit products of matrices.
        memory: Bytes of one GPU.
        node: GPUs of a node.
        inside, between: Bytes per second that one GPU sends to others of its node, or of other nodes.
        utilisation: Share of the peak that is reached while nothing waits for data.
    """

    peak: float
    memory: float
    node: int
    inside: float
    between: float
    utilisation: float = 0.5


H100 = Machine(peak=989e12, memory=80e9, node=8, inside=450e9, between=50e9)  # SXM, NVLink, 400 Gbit/s a GPU


@dataclass(frozen=True)
class Layout:
    """How a model is spread: `data` copies of it, each over `tensor` * `pipeline` GPUs.

    With `sharded` (FSDP, ZeRO stage 3) the copies share weights, gradients and optimizer states.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def n_gpus(self) -> int:
        """Number of GPUs."""
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        parts = [("FSDP" if self.sharded else "DDP", self.data), ("TP", self.tensor), ("PP", self.pipeline)]
        return " × ".join(f"{name} {n}" for name, n in parts if n > 1) or "one GPU"


@dataclass(frozen=True)
class Plan:
    """What one GPU holds, sends and waits for in one step.

    Attributes:
        layout: The layout.
        state, activations: Bytes of weights, gradients and optimizer states; of activations at their largest.
        sent: Bytes that a GPU sends in a step.
        seconds: Time of a step.
        flops: FLOPs of a step, all GPUs together.
    """

    layout: Layout
    state: float
    activations: float
    sent: float
    seconds: float
    flops: float

    @property
    def memory(self) -> float:
        """Bytes that one GPU needs."""
        return self.state + self.activations


# %% tags=["promote:planning"]
def state_bytes(n_parameters: float, layout: Layout, weights: int = 2, gradients: int = 2, optimizer: int = 12) -> float:
    """Return the bytes of weights, gradients and optimizer states on one GPU.

    The defaults are those of mixed precision with AdamW: 16-bit weights and gradients, and a 32-bit copy of the weights
    with two averages (Rajbhandari et al., 2020, section 3). Training in float32 has 4, 4 and 8.
    """
    shares = layout.tensor * layout.pipeline * (layout.data if layout.sharded else 1)
    return (weights + gradients + optimizer) * n_parameters / shares


def data_parallel_bytes(n_bytes: float, n_ranks: int, sharded: bool) -> float:
    """Return the bytes that a rank sends in a step for the gradients, and with `sharded` for the weights.

    `n_bytes` is the size of all weights in the type in which they travel. A ring all-reduce sends 2 (n - 1) / n of it; the
    sharded way gathers the weights in the forward and in the backward pass and scatters the gradients: 3 (n - 1) / n.
    """
    return (3 if sharded else 2) * (n_ranks - 1) / n_ranks * n_bytes


def activation_bytes(
    config: GPTConfig, layout: Layout, n_rows: int, n_tokens: int, width: int = 2, checkpointing: bool = True
) -> float:
    """Return the bytes of activations on one GPU for micro-batches of `n_rows` sequences.

    With checkpointing every block keeps its input, and one block at a time all it needs. The first stage of a pipeline
    holds as many micro-batches as there are stages (one forward, one backward). Logits are kept in `width` and 4 bytes.
    """
    tokens, layers = n_rows * n_tokens, config.n_layers / layout.pipeline
    block = kept_numbers(config) * width / layout.tensor
    blocks = layers * config.emb_dim * width + block if checkpointing else layers * block
    logits = config.vocab_size * (width + 4) / layout.tensor
    # The last stage has the logits and one micro-batch, the first has many micro-batches and no logits.
    return tokens * (blocks + logits if layout.pipeline == 1 else max(blocks * layout.pipeline, blocks + logits))


def plan(config: GPTConfig, layout: Layout, machine: Machine, n_rows: int, n_tokens: int, micro_rows: int = 1) -> Plan:
    """Return what a step on `n_rows` sequences of `n_tokens` costs with activation checkpointing.

    Checkpointing computes the forward pass a second time: 4/3 of the FLOPs. Sending gradients and weights overlaps with
    computing, so the longer of the two counts; tensor parallelism has to wait for its sums (two in each direction of each
    block), and a pipeline of p stages idles for p - 1 of its micro-batches (Narayanan et al., 2021).

    Raises:
        ValueError: The rows do not divide, or the layout does not divide heads, blocks or nodes.
    """
    per_copy = n_rows // layout.data
    for name, value, divisor in (
        ("n_rows", n_rows, layout.data * micro_rows),
        ("n_layers", config.n_layers, layout.pipeline),
        ("n_heads", config.n_heads, layout.tensor),
        ("machine.node", machine.node, layout.tensor),
    ):
        if value % divisor:
            raise ValueError(f"{name}={value} must be a multiple of {divisor} for {layout}")
    parameters, micro_batches = parameter_count(config), per_copy // micro_rows
    flops = flops_per_token(config, n_tokens) * n_rows * n_tokens
    computing = 4 / 3 * flops / layout.n_gpus / (machine.peak * machine.utilisation)
    computing *= (micro_batches + layout.pipeline - 1) / micro_batches
    weights = 2 * parameters / layout.tensor / layout.pipeline
    data = data_parallel_bytes(weights, layout.data, layout.sharded)
    if layout.sharded:  # without enough memory to keep them, the weights are gathered again for every micro-batch
        data += (micro_batches - 1) * data_parallel_bytes(weights, layout.data, False)
    sum_bytes = 2 * per_copy * n_tokens * config.emb_dim  # one all-reduce of hidden vectors, all micro-batches
    blocks = config.n_layers / layout.pipeline
    # Two sums forward, two in the forward pass that is repeated, two backward.
    tensor = 6 * blocks * data_parallel_bytes(sum_bytes, layout.tensor, False)
    stages = 2 * sum_bytes if layout.pipeline > 1 else 0  # hidden vectors on, their gradients back
    within = layout.n_gpus <= machine.node
    seconds = max(computing, (data + stages) / (machine.inside if within else machine.between))
    return Plan(
        layout,
        # While a block works, its weights and those of the next are whole.
        state_bytes(parameters, layout) + (2 * 2 * block_matrices(config) / layout.tensor if layout.sharded else 0),
        activation_bytes(config, layout, micro_rows, n_tokens),
        data + tensor + stages,
        seconds + tensor / machine.inside,
        flops,
    )


def best_plan(config: GPTConfig, n_gpus: int, machine: Machine, n_rows: int, n_tokens: int) -> Plan | None:
    """Return the plan with the shortest step among those that fit into 90 % of the memory; None if none does."""
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            data = n_gpus // (tensor * pipeline)
            for sharded in (False, True)[: 2 if data > 1 else 1]:
                for micro_rows in (1, 2, 4, 8):
                    try:
                        layout = Layout(data, tensor, pipeline, sharded)
                        found.append(plan(config, layout, machine, n_rows, n_tokens, micro_rows))
                    except ValueError:  # does not divide
                        continue
    fitting = [p for p in found if p.layout.n_gpus == n_gpus and p.memory <= 0.9 * machine.memory]
    return min(fitting, key=lambda p: (p.seconds, p.sent), default=None)

# %% [markdown]
# ### Proof: the formulas against what was counted
#
# Parameters against models; kept activations against autograd; memory and traffic of a rank against the two processes above.

# %%
for name in PRESETS:
    with torch.device("meta"):
        assert parameter_count(GPTConfig.preset(name)) == GPTModel(GPTConfig.preset(name)).n_parameters
print(f"parameters: equal for all {len(PRESETS)} presets")

two_ranks = {"ddp": Layout(data=2), "fsdp": Layout(data=2, sharded=True)}
for name, layout in two_ranks.items():
    counted = sum(two[name]["memory"][0][kind] for kind in ("weights", "gradients", "optimizer"))
    assert counted == state_bytes(n_bytes // 4, layout, weights=4, gradients=4, optimizer=8)
    # A ring sends (n - 1) / n of each buffer that is gathered or scattered, and twice that to reduce it.
    traffic = two[name]["bytes_per_step"]
    sent = sum(size / 2 * (2 if kind == "reduced" else 1) for kind, size in traffic.items())
    formula = data_parallel_bytes(n_bytes, 2, layout.sharded)
    print(f"{name}: memory {counted:,} bytes, equal; traffic {sent:,.0f} bytes a step, formula {formula:,.0f}")
    assert 0.85 < sent / formula <= 1

# %%
shape = {"emb_dim": 64, "n_heads": 4, "vocab_size": 2048, "context_length": 256, "dropout": 0.0}
for name, options in {"GPT-2's parts": {}, "tales' parts": GPTConfig.preset("tales-1m").__dict__}.items():
    for checkpointing in (False, True):
        counted = []
        for n_layers in (4, 8):
            config = GPTConfig(**{**options, **shape, "n_layers": n_layers})
            model = checkpoint_blocks(new_model(config)) if checkpointing else new_model(config)
            counted.append(kept_bytes(model, lambda m=model: m.hidden_states(inputs)))
        formula = 4 * 4 * inputs.numel() * (config.emb_dim if checkpointing else kept_numbers(config))
        ratio = (counted[1] - counted[0]) / formula
        print(f"{name:14} {'with' if checkpointing else 'without':7} checkpointing: counted / formula {ratio:.2f}")
        assert 0.95 < ratio < 1.05


# %% [markdown]
# ### The table
#
# Six shapes, the larger ones those of Llama 2 (Touvron et al., 2023), on 1 to 1,024 GPUs of 80 GB with the data sheet's figures of an H100, four million tokens a step, AdamW in mixed precision,
# activation checkpointing, 20 tokens a parameter. For each number of GPUs the layout with the shortest step among those that fit.

# %%
llama = {**GPTConfig.preset("tales-1m").__dict__, "vocab_size": 32000, "context_length": 4096, "tie_weights": False}
llama_shapes = {"7B": (4096, 32, 32, 32, 11008), "13B": (5120, 40, 40, 40, 13824), "70B": (8192, 80, 64, 8, 28672)}
planned = {name: GPTConfig.preset(preset) for name, preset in (("124M", "gpt2-small"), ("355M", "gpt2-medium"), ("1.6B", "gpt2-xl"))}
for name, (emb_dim, n_layers, n_heads, n_kv_heads, width) in llama_shapes.items():
    shape = {"emb_dim": emb_dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    planned[name] = GPTConfig(**{**llama, **shape, "feed_forward_dim": width})

rows_of_table = []
for name, config in planned.items():
    n_tokens, n_parameters = config.context_length, parameter_count(config)
    for n_gpus in (1, 8, 64, 256, 1024):
        best = best_plan(config, n_gpus, H100, 2**22 // n_tokens, n_tokens)
        row = {"model": name, "parameters": f"{n_parameters / 1e9:.3g}B", "GPUs": n_gpus}
        if best is None:
            rows_of_table.append({**row, "layout": "does not fit"})
            continue
        days = 20 * n_parameters / 2**22 * best.seconds / 86400
        used = best.flops / best.seconds / n_gpus / H100.peak
        row |= {"layout": str(best.layout), "GB a GPU": f"{best.memory / 1e9:.0f}", "GB sent a step": f"{best.sent / 1e9:.1f}"}
        rows_of_table.append({**row, "seconds a step": f"{best.seconds:.3g}", "utilisation": f"{used:.0%}", "days": f"{days:.3g}"})
pd.DataFrame(rows_of_table).fillna("").set_index(["model", "parameters", "GPUs"])

# %% [markdown]
# Read it as orders of magnitude. Small models fit everywhere, and more GPUs only make the step shorter. Where one GPU cannot hold weights, gradients and optimizer states, sharding does it; at a thousand GPUs the
# rows per GPU become few, and splitting matrices inside a node lowers the traffic between nodes. The formulas assume that every GPU works all the time and that nothing fails.

# %% [markdown]
# ## How much of the machine is used?
#
# **FLOPs utilisation** is the arithmetic that the model needs, per second, as a share of what the machine can do (Chowdhery et al., 2022). The first is a count:

# %%
config = GPTConfig.preset("tales-1m")
model, counted_rows = new_model(config), inputs[:, :128]
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
    model(counted_rows).sum().backward()
formula = counted_rows.numel() * flops_per_token(config, 128)
print(f"counted {counter.get_total_flops():,}, formula {formula:,} FLOPs")
assert counter.get_total_flops() == formula

# %% [markdown]
# The second is measured by a product of two large matrices in the same run, since it depends on the processor and on what else it does.

# %% tags=["nbval-ignore-output"]
def best_rate(work: Callable[[], object], flops: float, n_times: int) -> float:
    """FLOP per second of one thread, the best of several times."""
    seconds = []
    for _ in range(n_times):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return flops / min(seconds)


square = torch.randn(1024, 1024)
peak = best_rate(lambda: square @ square, 2 * 1024**3, 8)
for name in ("2x32", "2x64", "5x128"):
    model = new_model(config_of(name))
    work = inputs.numel() * flops_per_token(model.config, inputs.shape[1])
    reached = best_rate(lambda m=model: story_loss(m, inputs, targets).backward(), work, 3)
    print(f"{name}: {reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, utilisation {reached / peak:.0%}")

# %% [markdown]
# ## Surviving a crash
#
# A long run ends early: a machine restarts, a disk fills up, somebody needs the processor. What was learnt must not
# be lost, and the run that goes on must be the same run: equal losses, to the last digit. Two things make that hold.
#
# 1. **Everything that the next step depends on is saved**: weights, the optimiser's moments, its step count and
#    learning rate, the state of the random generator. Batches come from (seed, step) alone, as `ResumableSampler`
#    gives them, so the step number stands for the position in the data.
# 2. **A checkpoint exists whole or not at all.** Writing takes time, and the end may come in the middle. So the files
#    are written into a folder with another name, `fsync` asks the system to bring them to the disk, and one
#    `rename` gives the folder its name. POSIX defines renaming as one step: no program ever sees half of it.
#    An old checkpoint is taken away the same way, renamed before it is deleted.

# %% [markdown] tags=["promote:checkpoint"]
# Checkpoints that survive a crash: written whole or not at all, read back to the last bit.
#
# A checkpoint is a folder `step-00001000` with `model.safetensors`, `optimizer.safetensors`, `random.safetensors` and
# `state.json`: numbers and JSON, never pickles, which can run code when they are read. It is written under another
# name, brought to the disk with fsync and then renamed, so that a killed process or a full disk leaves the earlier
# ones as they were. SHA-256 sums in `state.json` show damage when it is read.
#
# Left out: writing in the background, each process writing its own part (a sharded model is gathered first), and two
# processes that write into the same folder at once.
#
# Follows the usual order write, fsync, rename, fsync of the folder (Pillai et al., 2014, "All File Systems Are Not
# Created Equal").

# %% [markdown]
# First the small parts. A model's state leaves out tensors that are another one under a second name: a tied output
# head is the token embedding. The state of torch's random generators is itself a tensor of bytes.

# %% tags=["promote:checkpoint"]
def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and saved buffers by name, each tensor once: a tied output head is left out."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach()
    return kept


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state of `model_state` into a model of the same shape.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs.
    """
    own = model_state(model)
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the state does not fit the model: {'; '.join(wrong[:5])}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def random_states() -> dict[str, Tensor]:
    """Return the states of torch's random generators, uint8: of the CPU and, where there is one, the CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Set the generators to states of `random_states`; one that this machine lacks is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

# %% [markdown]
# An optimiser's `state_dict()` mixes tensors and plain values. The tensors go to a safetensors file, under a name made
# of their place; the rest is JSON, where Python writes a float so that reading gives the same float.

# %% tags=["promote:checkpoint"]
def split_optimizer_state(state: Mapping) -> tuple[dict[str, Tensor], dict]:
    """Split an optimiser's `state_dict()` into (tensors by name "parameter/key", everything else)."""
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                plain[f"{index}/{key}"] = value
    return tensors, {"values": plain, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: Mapping[str, Tensor], rest: Mapping) -> dict:
    """Return the `state_dict()` that `split_optimizer_state` split; tuples come back as lists."""
    state: dict[int, dict] = {}
    for name, value in {**tensors, **rest["values"]}.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    return {"state": dict(sorted(state.items())), "param_groups": rest["param_groups"]}

# %% [markdown]
# Now the folder. `state.json` is written last among the files, with the checksums of the others.

# %% tags=["promote:checkpoint"]
STATE_FILE = "state.json"


class CheckpointError(OSError):
    """A checkpoint cannot be written or read; the message names the folder and the reason."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: Steps done.
        model: Tensors by name, as `model_state` returns them.
        optimizers: A `state_dict()` of each optimiser.
        random: As `random_states` returns them; empty where none were saved.
        extra: What the caller added, a JSON object.
    """

    step: int
    model: dict[str, Tensor]
    optimizers: list[dict]
    random: dict[str, Tensor]
    extra: dict


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    model: Mapping[str, Tensor],
    optimizers: Sequence[Mapping] = (),
    *,
    random: Mapping[str, Tensor] | None = None,
    extra: Mapping | None = None,
    keep_last: int | None = None,
) -> Path:
    """Write the checkpoint `folder/step-{step:08d}` in one step and return its path.

    Args:
        folder: Where checkpoints are kept; it is created if needed. Only one process may write into it.
        step: Steps done, at least 0.
        model: As `model_state(model)` returns it.
        optimizers: A `state_dict()` of each optimiser.
        random: As `random_states()` returns them.
        extra: Anything that JSON can hold.
        keep_last: Afterwards delete all but this many of the newest checkpoints; None keeps all.

    Raises:
        CheckpointError: It cannot be written (disk full, no permission, a checkpoint of that step exists). What was
            there before is untouched.
        ValueError: `step` or `keep_last` is too small.
    """
    if step < 0 or (keep_last is not None and keep_last < 1):
        raise ValueError(f"step is {step}, keep_last {keep_last}; at least 0 and at least 1 are needed")
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    part = folder / f".{final.name}.part"
    parts = [split_optimizer_state(state) for state in optimizers]
    moments = {f"{i}/{name}": tensor for i, (tensors, _) in enumerate(parts) for name, tensor in tensors.items()}
    files = {"model.safetensors": model, "optimizer.safetensors": moments, "random.safetensors": random or {}}
    state = {"step": step, "optimizers": [rest for _, rest in parts], "extra": dict(extra or {}), "sha256": {}}
    try:
        if final.exists():
            raise FileExistsError("it exists already")
        folder.mkdir(parents=True, exist_ok=True)
        _remove_litter(folder)
        part.mkdir()
        for name, tensors in files.items():
            # A copy for views, and for tensors that share memory: the format stores each one whole.
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / name)
            state["sha256"][name] = _sha256(part / name)
        (part / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in (*part.iterdir(), part):
            _to_disk(path)
        os.rename(part, final)  # the moment in which the checkpoint comes into being
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"{final} was not written: {error}; earlier checkpoints are untouched") from error
    for path in checkpoints(folder)[:-keep_last] if keep_last else ():
        _remove(path)
    return final


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the paths of the checkpoints in a folder, oldest first; an empty list where the folder is missing."""
    found = Path(folder).glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """Return the path of the newest checkpoint in a folder, or None where there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read the checkpoint at `path`, tensors on the CPU.

    Raises:
        CheckpointError: A file is missing, unreadable or not the one that was written.
    """
    path = Path(path)
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _sha256(path / name) != expected:
                raise ValueError(f"{name} has another SHA-256 than when it was written")
        model, moments, random = (load_file(path / name) for name in state["sha256"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    optimizers = []
    for i, rest in enumerate(state["optimizers"]):
        own = {name.split("/", 1)[1]: tensor for name, tensor in moments.items() if name.startswith(f"{i}/")}
        optimizers.append(join_optimizer_state(own, rest))
    return Checkpoint(state["step"], model, optimizers, random, state["extra"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Ask the system to bring a file, or the names in a folder, to the disk; Windows has no way for folders."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no half of it keeps its name."""
    doomed = path.with_name(f".{path.name}.old")
    try:
        os.rename(path, doomed)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be deleted: {error}") from error
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_litter(folder: Path) -> None:
    """Delete what killed processes left behind: unfinished checkpoints and half-deleted ones."""
    for path in (*folder.glob(".step-*.part"), *folder.glob(".step-*.old")):
        shutil.rmtree(path, ignore_errors=True)

# %% [markdown]
# ### Proof: a killed write leaves the old checkpoint
#
# The writer is stopped at each of its steps in turn: before each file, before each checksum, before each `fsync`,
# before the name is given, before the old one goes. An exception stands for the kill here, so that the cell runs
# on every system; `tests/test_checkpoint.py` does the same with SIGKILL, which no program can catch. Afterwards the
# newest checkpoint is read. It is always whole: the old one, or the new one where the name had been given already.

# %%
class Killed(BaseException):
    """Stands for SIGKILL: nothing in `save_checkpoint` handles it."""


def write_and_die(folder: Path, name: str, call: int) -> bool:
    """Save step 2 and die before the call number `call` of `name`; return whether the writer got that far."""
    owner = os if name == "rename" else shared.checkpoint
    real, n_calls = getattr(owner, name), 0

    def dying(*arguments):
        nonlocal n_calls
        n_calls += 1
        if n_calls > call:
            raise Killed
        return real(*arguments)

    with mock.patch.object(owner, name, dying):
        try:
            shared.checkpoint.save_checkpoint(folder, 2, {"weight": torch.zeros(3)}, keep_last=1)
        except Killed:
            return True
    return False


# %%
outcomes = Counter()
for name in ("save_file", "_sha256", "_to_disk", "rename"):
    for call in range(10):
        with tempfile.TemporaryDirectory() as folder:
            shared.checkpoint.save_checkpoint(folder, 1, {"weight": torch.ones(3)})
            if not write_and_die(Path(folder), name, call):
                break
            newest = shared.checkpoint.load_checkpoint(shared.checkpoint.latest_checkpoint(folder))
            assert torch.equal(newest.model["weight"], torch.full((3,), 2.0 - newest.step))
            outcomes[name, f"step {newest.step}"] += 1
for (name, survivor), count in outcomes.items():
    print(f"killed in {name:9} {count} times: the newest whole checkpoint is of {survivor}")

# %% [markdown]
# ### Proof: the resumed run is the same run
#
# A small model with dropout is trained for 20 steps. A second run does ten, is saved and thrown away; a new process's
# worth of objects (other weights, another state of the random generator) takes up the checkpoint and does the rest.
# The losses are compared with `==`: no rounding is allowed.

# %%
SMALL = GPTConfig(vocab_size=50, context_length=16, emb_dim=32, n_heads=2, n_layers=2, dropout=0.1)


def new_run(seed: int) -> tuple[GPTModel, list[torch.optim.Optimizer]]:
    """Return a small model and its optimizers."""
    torch.manual_seed(seed)
    model = GPTModel(SMALL)
    return model, build_optimizers(model, "muon", 0.003)


def some_steps(model: GPTModel, optimizers: list[torch.optim.Optimizer], steps: range) -> list[float]:
    """Train; the batch depends on the step alone, dropout on the global random generator."""
    losses = []
    for step in steps:
        ids = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %%
unbroken = some_steps(*new_run(0), range(20))
with tempfile.TemporaryDirectory() as folder:
    model, optimizers = new_run(0)
    losses = some_steps(model, optimizers, range(10))
    states = [optimizer.state_dict() for optimizer in optimizers]
    save_checkpoint(folder, 10, model_state(model), states, random=random_states())

    model, optimizers = new_run(1)
    saved = load_checkpoint(latest_checkpoint(folder))
    load_model_state(model, saved.model)
    for optimizer, state in zip(optimizers, saved.optimizers, strict=True):
        optimizer.load_state_dict(state)
    set_random_states(saved.random)
    losses += some_steps(model, optimizers, range(saved.step, 20))
print("losses equal to the last digit:", sum(a == b for a, b in zip(losses, unbroken, strict=True)), "of 20")

# %% [markdown]
# Leave out one part and the proof fails; which parts matter shows when they are left out one at a time.

# %%
def resumed_without(missing: str) -> int:
    """Return how many of the 10 losses after resuming equal the unbroken run's when one part is not restored."""
    with tempfile.TemporaryDirectory() as folder:
        model, optimizers = new_run(0)
        some_steps(model, optimizers, range(10))
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(folder, 10, model_state(model), states, random=random_states())
        saved = load_checkpoint(latest_checkpoint(folder))
    model, optimizers = new_run(1)
    if missing != "weights":
        load_model_state(model, saved.model)
    for optimizer, state in zip(optimizers, saved.optimizers, strict=True):
        if missing != "optimiser":
            optimizer.load_state_dict(state)
    if missing != "random state":
        set_random_states(saved.random)
    again = some_steps(model, optimizers, range(10, 20))
    return sum(a == b for a, b in zip(again, unbroken[10:], strict=True))


for part in ("nothing", "weights", "optimiser", "random state"):
    print(f"without {part:12}: {resumed_without(part):2} of 10 losses are equal")
assert resumed_without("nothing") == 10

# %% [markdown]
# ## With a network
#
# Nothing here needs one: data, models and records are in the repository. With machines of your own, the same loop for real work is `ch05_pretraining/pretrain.py`, started by `torchrun`
# as the demonstration was.
#
# ## What you built
#
# - [`shared/schedules.py`](../shared/schedules.py): six schedules, equal to transformers' and torch's.
# - [`shared/optimizers.py`](../shared/optimizers.py): `Muon`, `Lion`, and `build_optimizers`, which work on whole and on sharded parameters alike.
# - [`shared/planning.py`](../shared/planning.py): parameters, FLOPs, memory, traffic and time of a run before it starts.
#
# ## What can go wrong
#
# - **The first update does nothing.** With a warm-up the factor of step 0 is 0. Call the schedule with step + 1, or live with it.
# - **Weight decay on norms.** `torch.optim.AdamW(model.parameters(), weight_decay=0.1)` pulls their scales to zero. Use groups.
# - **Means of micro-batches averaged.** The gradient is wrong wherever micro-batches have different numbers of targets. The same holds between ranks: divide by the targets of all.
# - **Clipping before unscaling.** With loss scaling the norm of a scaled gradient means nothing. Call `scaler.unscale_(optimizer)` first.
# - **Clipping each rank's shard.** The norm must be that of the whole gradient. With FSDP2 `clip_grad_norm_` sees to it, a norm by hand does not.
# - **Packing without a mask.** Nothing fails, the loss is only another one.
# - **A rank that takes another path.** Every rank must call the same collectives in the same order; an `if rank == 0` around one of them waits for ever.
# - **Rates carried over.** Learning rates belong to an optimizer, a batch size and a size of model. Muon's are a hundred times Lion's.
#
# ## Exercises
#
# **1.** How many of 1,000 steps with a warm-up of 100 do *cosine* and *wsd* spend above half of the peak?

# %% tags=["solution"] jupyter={"source_hidden": true}
for name in ("cosine", "wsd"):
    schedule = build_schedule(name, 1000, 100)
    print(name, sum(schedule(step) > 0.5 for step in range(1000)))

# %% [markdown]
# **2.** How far can one step of Lion move a weight, whatever the gradient? And what does Muon's first step change when the gradient is multiplied by 1,000?

# %% tags=["solution"] jupyter={"source_hidden": true}
weight = nn.Parameter(torch.zeros(3))
weight.grad = torch.tensor([1e-6, 1.0, 1e6])
Lion([weight], lr=0.01).step()
print("Lion:", weight.tolist())
assert torch.allclose(weight.abs(), torch.full((3,), 0.01))
gradient = torch.randn(8, 8)
compare("Muon: orthogonalised gradient times 1,000", orthogonalise(1000 * gradient), orthogonalise(gradient), 1e-4)

# %% [markdown]
# **3.** A pipeline has 8 stages. How many micro-batches keep the idle share below 10 %?

# %% tags=["solution"] jupyter={"source_hidden": true}
# (8 - 1) / (m + 8 - 1) < 0.1 means m > 63.
fewest = next(m for m in range(1, 1000) if bubble(8, m) < 0.1)
print(fewest)
assert fewest == 64

# %% [markdown]
# **4.** What is the largest model with the shape of Llama's blocks (32 of them, heads of 128) that one GPU of 80 GB can train in mixed precision with AdamW? Vary the width.

# %% tags=["solution"] jupyter={"source_hidden": true}
fitting = []
for n_heads in range(4, 40):
    config = GPTConfig(**{**llama, "emb_dim": 128 * n_heads, "n_heads": n_heads, "n_layers": 32})
    if best_plan(config, 1, H100, 64, 4096):
        fitting.append((parameter_count(config), config.emb_dim))
n_parameters, width = max(fitting)
print(f"width {width}, {n_parameters / 1e9:.1f} billion parameters, {16 * n_parameters / 1e9:.0f} GB of states")
assert 16 * n_parameters < 72e9

# %% [markdown]
# ## References
#
# - Loshchilov, I., Hutter, F. (2017). *SGDR: Stochastic Gradient Descent with Warm Restarts*. ICLR.
# - Hoffmann, J., et al. (2022). *Training Compute-Optimal Large Language Models*. arXiv:2203.15556. After Kaplan, J., et al. (2020). *Scaling Laws for Neural Language Models*. arXiv:2001.08361.
# - Jordan, K., et al. (2024). *Muon: An optimizer for hidden layers in neural networks*. kellerjordan.github.io/posts/muon. And Chen, X., et al. (2023). *Symbolic Discovery of Optimization Algorithms*. NeurIPS.
# - Micikevicius, P., et al. (2018). *Mixed Precision Training*. ICLR. And Chen, T., Xu, B., Zhang, C., Guestrin, C. (2016). *Training Deep Nets with Sublinear Memory Cost*. arXiv:1604.06174.
# - Smith, L. (2017). *Cyclical Learning Rates for Training Neural Networks*. WACV. And Pascanu, R., Mikolov, T., Bengio, Y. (2013). *On the difficulty of training recurrent neural networks*. ICML.
# - Rajbhandari, S., Rasley, J., Ruwase, O., He, Y. (2020). *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*. SC20.
# - Narayanan, D., et al. (2021). *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM*. SC21. After Huang, Y., et al. (2019). *GPipe*. NeurIPS.
# - Chowdhery, A., et al. (2022). *PaLM: Scaling Language Modeling with Pathways*. arXiv:2204.02311. Touvron, H., et al. (2023). *Llama 2: Open Foundation and Fine-Tuned Chat Models*. arXiv:2307.09288. Hu, S., et al. (2024). *MiniCPM*. arXiv:2404.06395.

