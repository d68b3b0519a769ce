"""Learning-rate schedules: functions of the step that return a factor, 1.0 at the peak.

A step counts finished updates, from 0. All schedules rise linearly from 0 in the first `n_warmup` steps
and end at step `n_steps`, after which they stay where they are. As in transformers and torch, the first
update of a warm-up has the factor 0; who does not want it calls the schedule with step + 1.

Left out: schedules that watch the loss, warm-ups that are not straight.

Explained and proven in ch05_pretraining/03_schedules_and_optimizers.ipynb; written from there by `make
promote`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial


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
    drops = tuple(drops)
    if not all(0 < drop <= 1 for drop in drops) or not 0 < factor <= 1:
        raise ValueError(f"drops and factor must be in (0, 1], got {drops} and {factor}")
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
            return warm * (
                final + (1 - final) * 0.5 * (1 + math.cos(math.pi * max(0.0, position) / growth**i))
            )
        position -= growth**i
    return warm * final


def warmup_stable_decay(
    step: int,
    n_steps: int,
    n_warmup: int = 0,
    *,
    decay: float = 0.2,
    shape: str = "linear",
    final: float = 0.0,
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


def build_schedule(name: str, n_steps: int, n_warmup: int = 0, **options: object) -> Callable[[int], float]:
    """Return the schedule `name` of `SCHEDULES` as a function of the step alone; it can be pickled.

    Raises ValueError for an unknown name or, already here, for options that the schedule refuses.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name must be one of {', '.join(SCHEDULES)}, got {name!r}")
    # An iterator would be empty from the second step on.
    options = {key: tuple(value) if isinstance(value, Iterator) else value for key, value in options.items()}
    schedule = partial(SCHEDULES[name], n_steps=n_steps, n_warmup=n_warmup, **options)
    schedule(0)
    return schedule
