"""First aid for a training run: measurements that tell one cause of failure from another, each with the
range in which a healthy run lies.

`diagnose` looks at a new model and the batches it is about to read, before any time is spent on training.
The ranges are rules of thumb for small Transformers trained with Adam and its relatives, not laws.

Left out: memory, several processes, anything that only a finished run can tell.

Follows Karpathy (2019, "A Recipe for Training Neural Networks") for the first loss and the one batch,
Prechelt (1998, "Early Stopping - But When?") for stopping.

Explained and proven in ch05_pretraining/09_troubleshooting.ipynb; written from there by `make promote`.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from shared.training.batches import IGNORE, Batch
from shared.training.loop import check_parameters
from shared.training.losses import next_token_loss
from shared.weights.names import unwrap, unwrapped_name


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


def gradient_norms(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the norm of the mean loss's gradient for each part of `model`, each block being a part of its own.

    The `.grad` of the parameters stays as it is.
    """
    parameters = unwrap(model).named_parameters()
    named = [(unwrapped_name(name), p) for name, p in parameters if p.requires_grad]
    loss = next_token_loss(model(inputs), targets)
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    squares: dict[str, float] = defaultdict(float)
    for (name, _), gradient in zip(named, gradients, strict=True):
        first, *rest = name.split(".")
        part = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
        squares[part] += 0.0 if gradient is None else gradient.double().square().sum().item()
    return {part: math.sqrt(square) for part, square in squares.items()}


def update_ratios(model: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Call `step`, which updates the weights once, and return for each matrix the size of its change over its own size.

    Sizes are root mean squares, the matrix's own taken before the step. A matrix of zeros gives infinity, or NaN
    where nothing changed.
    """
    parameters = unwrap(model).named_parameters()
    matrices = {unwrapped_name(name): p for name, p in parameters if p.dim() > 1 and p.requires_grad}
    before = {name: p.detach().clone() for name, p in matrices.items()}
    step()
    return {
        name: ((p.detach() - before[name]).norm() / before[name].norm()).item()
        for name, p in matrices.items()
    }


Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def overfit(model: nn.Module, batch: Batch, optimizers: Optimizers, n_steps: int = 40) -> list[float]:
    """Train `model` on one batch again and again and return the loss before each step and after the last."""
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    check_parameters(optimizers, model)
    inputs, targets = batch
    losses = []
    for _ in range(n_steps):
        loss = next_token_loss(model(inputs), targets)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        return [*losses, next_token_loss(model(inputs), targets).item()]


def row_learnt(
    model: nn.Module, batch: Batch, make_optimizers: Callable[[nn.Module], Optimizers], update: float
) -> float:
    """Return to what share of its first value copies of `model` bring the loss of the first 32 targets of one row.

    Args:
        model: It stays as it is.
        batch: Inputs and targets; one row of them is learnt.
        make_optimizers: As in `diagnose`.
        update: The largest update over weight at the rates that they come with; 0 leaves these rates.
    """
    # The first row with targets, up to the 32nd of them.
    inputs, targets = batch
    row = int((targets != IGNORE).any(dim=1).int().argmax())
    end = int((targets[row] != IGNORE).nonzero()[:32].max()) + 1
    small = inputs[row : row + 1, :end], targets[row : row + 1, :end]
    # At two rates, as a small model needs larger steps than a wide one; the better counts.
    shares = []
    for wanted in (0.3, 1.0):
        pupil = copy.deepcopy(model)
        made = make_optimizers(pupil)
        optimizers = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["lr"] * (wanted / update if update else 1)
        losses = overfit(pupil, small, optimizers, n_steps=60)
        shares.append(losses[-1] / losses[0])
        if shares[-1] < 0.1:
            break
    return min(shares)  # a NaN that stands first stays


def diagnose(
    model: nn.Module,
    batches: Sequence[Batch],
    make_optimizers: Callable[[nn.Module], Optimizers],
    n_steps: int,
) -> list[Check]:
    """Examine a new model and the first batches of its training; model, gradients and random numbers stay as they are.

    Args:
        model: Untrained; it maps ids (batch, tokens) to logits (batch, tokens, vocab_size).
        batches: At least two, in the order in which training reads them; the more, the surer is the order's check.
        make_optimizers: Called with a copy of the model it returns the optimizer of the run, or several, at their peak
            learning rates: `lambda model: build_optimizers(model, "adamw", 3e-4)`.
        n_steps: Planned number of updates.

    Returns:
        The checks, causes that hide others first: the first one that has not passed is the one to look into.

    Raises:
        ValueError: There are fewer than two batches, or the optimizers hold no parameter of the copy.
    """
    with torch.random.fork_rng():
        # An untrained copy, without dropout, on the first batch: its targets, its loss, its gradients.
        drift, (inputs, targets) = order_drift(batches), batches[0]
        pupil = copy.deepcopy(unwrap(model)).eval()
        with torch.no_grad():
            logits = pupil(inputs)
        first = next_token_loss(logits, targets).item() / math.log(logits.shape[-1])
        offset, share = target_offset(inputs, targets)
        norms = gradient_norms(pupil, inputs, targets)
        blocks = [norm for part, norm in norms.items() if part[-1].isdigit()] or list(norms.values())
        # One update: how far does the learning rate go? A matrix of zeros has no size to compare with, and lets no
        # gradient through to the others, so one that begins so gets an update beforehand.
        optimizers = make_optimizers(pupil)
        if any(p.dim() > 1 and not p.any() for p in pupil.parameters()):
            overfit(pupil, batches[0], optimizers, n_steps=1)
        ratios = update_ratios(pupil, lambda: overfit(pupil, batches[0], optimizers, n_steps=1))
        largest = max((ratio for ratio in ratios.values() if math.isfinite(ratio)), default=math.nan)
        # Other copies learn one row by heart.
        learnt = row_learnt(copy.deepcopy(unwrap(model)).eval(), batches[0], make_optimizers, largest)
        # Causes that hide others come first.
        return [
            Check(
                "places that targets are ahead",
                offset if share > 0.99 else math.nan,
                1,
                1,
                "shift of the targets",
            ),
            Check("order of the batches", drift, 0, 1.3, "data not shuffled"),
            Check("first loss / ln V", first, 0.9, 1.1, "initial weights"),
            Check(
                "gradient, largest / smallest block",
                max(blocks) / max(min(blocks), 1e-30),
                1,
                30,
                "initial weights",
            ),
            Check("largest update / weight", largest, 0, 2.0, "learning rate too high, no warm-up"),
            Check("updates of the run / weight", largest * n_steps, 5, math.inf, "learning rate too low"),
            Check(
                "one row learnt, loss after / before",
                learnt,
                0,
                0.1,
                "anything above; model; loss",
            ),
        ]


def early_stop(losses: Sequence[float], patience: int) -> tuple[int, bool]:
    """Return the position of the lowest loss so far, and whether `patience` later ones have not been lower.

    NaN is never the lowest. Raises ValueError if there is no loss, or patience is below 1.
    """
    if not losses or patience < 1:
        raise ValueError(
            f"losses must not be empty and patience at least 1, got {len(losses)} and {patience}"
        )
    best = min(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
    return best, len(losses) - 1 - best >= patience


def operator_times(
    step: Callable[[], object], n_steps: int = 1
) -> tuple[dict[str, float], dict[str, int], float]:
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
