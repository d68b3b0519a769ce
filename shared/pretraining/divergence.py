"""When a training run has diverged: a loss that is not finite, or far above those before it."""

import math
import statistics
from collections.abc import Collection

COMPARED = 100  # the last losses, to whose median a new one is compared
FEWEST_COMPARED = 20  # before so many there is no explosion


class Diverged(Exception):
    """The loss of step `step` is not finite or has exploded."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


def check_loss(step: int, loss: float, grad_norm: float, recent: Collection[float], factor: float) -> None:
    """Raise Diverged if the loss of a step is not as it should be.

    Args:
        step: Its number.
        loss, grad_norm: Of the step; both must be finite.
        recent: Losses of the steps before.
        factor: A loss above this many times their median has exploded; 0: none has.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(step, f"loss {loss}, gradient norm {grad_norm}: not finite")
    if factor and len(recent) >= FEWEST_COMPARED:
        median = statistics.median(recent)
        if loss > factor * median:
            raise Diverged(step, f"loss {loss:.4f}: exploded, the median of the last steps is {median:.4f}")
