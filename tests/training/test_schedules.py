"""`shared.training.schedules` against transformers' and torch's schedulers, and what every schedule must fulfil."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from shared.training.schedules import (
    FALLS,
    SCHEDULES,
    build_schedule,
    constant,
    cosine,
    linear,
    step_decay,
    warm_restarts,
    warmup_stable_decay,
)


def library(build, n_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = build(optimizer), []
    for _ in range(n_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@settings(deadline=None, max_examples=15)
@given(n_warmup=st.integers(0, 20), n_rest=st.integers(1, 60), final=st.floats(0.001, 0.99))
def test_schedules_equal_transformers(n_warmup, n_rest, final):
    n, beyond = n_warmup + n_rest, n_warmup + n_rest + 5
    t = transformers
    pairs = (
        (constant, {}, lambda o: t.get_constant_schedule_with_warmup(o, n_warmup)),
        (linear, {}, lambda o: t.get_linear_schedule_with_warmup(o, n_warmup, n)),
        (
            linear,
            {"final": final},
            lambda o: t.get_polynomial_decay_schedule_with_warmup(o, n_warmup, n, lr_end=final),
        ),
        (cosine, {}, lambda o: t.get_cosine_schedule_with_warmup(o, n_warmup, n)),
        (
            warm_restarts,
            {"n_cycles": 3, "growth": 1.0},
            lambda o: t.get_cosine_with_hard_restarts_schedule_with_warmup(o, n_warmup, n, 3),
        ),
    )
    for ours, options, theirs in pairs:
        # transformers' cosine rises again after its end; ours stays.
        length = n if ours is cosine else beyond
        found = [ours(step, n, n_warmup, **options) for step in range(length)]
        expected = library(theirs, length)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=ours.__name__)


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_warmup_stable_decay_equals_transformers(shape, final):
    def theirs(optimizer):
        return transformers.get_wsd_schedule(optimizer, 0, 30, 100, decay_type=shape, min_lr_ratio=final)

    found = [warmup_stable_decay(step, 100, decay=0.3, shape=shape, final=final) for step in range(110)]
    np.testing.assert_allclose(found, library(theirs, 110), atol=1e-12)


def test_cosine_with_a_final_rate_equals_transformers_and_torch():
    def theirs(optimizer):
        return transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 0, 80, min_lr_rate=0.1)

    found = [cosine(step, 80, final=0.1) for step in range(80)]
    np.testing.assert_allclose(found, library(theirs, 80), atol=1e-12)
    annealing = library(lambda o: lr_scheduler.CosineAnnealingLR(o, 80, eta_min=0.1), 80)
    np.testing.assert_allclose(found, annealing, atol=1e-12)


@pytest.mark.parametrize(("growth", "n_cycles", "first"), [(1, 4, 25), (2, 3, 10), (3, 3, 7)])
def test_restarts_equal_torch(growth, n_cycles, first):
    n = first * sum(growth**i for i in range(n_cycles))
    found = [warm_restarts(step, n, n_cycles=n_cycles, growth=growth, final=0.05) for step in range(n)]
    build = lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=first, T_mult=growth, eta_min=0.05)
    np.testing.assert_allclose(found, library(build, n), atol=1e-12)
    assert warm_restarts(n, n, n_cycles=n_cycles, growth=growth, final=0.05) == 0.05


def test_steps_equal_torch_and_warm_up_is_torch_s_linear():
    found = [step_decay(step, 100, drops=(0.3, 0.6, 0.9), factor=0.5) for step in range(100)]
    expected = library(lambda o: lr_scheduler.MultiStepLR(o, [30, 60, 90], gamma=0.5), 100)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    warm = library(lambda o: lr_scheduler.LinearLR(o, start_factor=1e-9, total_iters=20), 20)
    np.testing.assert_allclose([constant(step, 100, 20) for step in range(20)], warm, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    n_warmup=st.integers(0, 30),
    n_rest=st.integers(40, 200),
    step=st.integers(0, 400),
)
def test_every_schedule_rises_to_one_stays_in_range_and_stands_still_after_its_end(
    name, n_warmup, n_rest, step
):
    n = n_warmup + n_rest
    schedule = build_schedule(name, n, n_warmup)
    assert 0 <= schedule(step) <= 1
    assert schedule(n_warmup) == 1
    assert schedule(n + step) == schedule(n)
    if n_warmup:
        assert schedule(0) == 0
        assert schedule(min(step, n_warmup)) == pytest.approx(min(step, n_warmup) / n_warmup)
    assert pickle.loads(pickle.dumps(schedule))(step) == schedule(step)


def test_bad_arguments_are_named():
    for call, message in (
        (lambda: build_schedule("exponential", 10), "name must be one of constant, .*got 'exponential'"),
        (lambda: build_schedule("linear", 10, 10), "n_warmup must be from 0 to below n_steps=10, got 10"),
        (lambda: linear(-1, 10), "step must not be negative, got -1"),
        (lambda: cosine(0, 10, final=1.5), r"final must be in \[0, 1\], got 1.5"),
        (lambda: build_schedule("step", 10, drops=(0.0,)), "drops"),
        (lambda: warm_restarts(0, 10, n_cycles=0), "n_cycles must be at least 1"),
        (lambda: build_schedule("wsd", 10, 5, decay=0.8), "decay must leave 1 to 5 of 10 steps, got 0.8"),
        (lambda: build_schedule("wsd", 10, shape="square"), "shape must be one of linear, cosine, 1-sqrt"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_drops_may_come_from_an_iterator():
    expected = build_schedule("step", 10, drops=[0.2, 0.5])
    found = build_schedule("step", 10, drops=iter([0.2, 0.5]))
    assert [found(step) for step in range(11)] == [expected(step) for step in range(11)]
    assert step_decay(9, 10, drops=iter([0.2, 0.5])) == expected(9) == pytest.approx(0.01)
