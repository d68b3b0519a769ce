"""`shared/pretraining/divergence.py`: which losses stop a run."""

import math

import pytest

from shared.pretraining.divergence import FEWEST_COMPARED, Diverged, check_loss

ENOUGH = [1.0] * FEWEST_COMPARED


@pytest.mark.parametrize(
    ("loss", "norm", "recent", "factor"),
    [
        (3.0, 1.0, ENOUGH, 3.0),  # the limit itself
        (9.0, 1.0, ENOUGH[1:], 3.0),  # too few to compare with
        (9.0, 1.0, [], 3.0),
        (9.0, 1.0, ENOUGH, 0.0),  # explosions allowed
        (9.0, 1.0, [*ENOUGH[:11], *[4.0] * 12], 3.0),  # far above the smallest, not above the median
    ],
)
def test_usual_losses_pass(loss, norm, recent, factor):
    check_loss(7, loss, norm, recent, factor)


@pytest.mark.parametrize(
    ("loss", "norm", "message"),
    [
        (math.nan, 1.0, "step 7: loss nan, gradient norm 1.0: not finite"),
        (1.0, math.inf, "step 7: loss 1.0, gradient norm inf: not finite"),
        (3.1, 1.0, r"step 7: loss 3\.1000: exploded, the median of the last steps is 1\.0000"),
    ],
)
def test_others_name_the_step_and_the_value(loss, norm, message):
    with pytest.raises(Diverged, match=f"^{message}$") as caught:
        check_loss(7, loss, norm, ENOUGH, 3.0)
    assert caught.value.step == 7
