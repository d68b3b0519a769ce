"""The record of the dates' learning curves is what `sweep_dates.py` does, with room for the processor."""

import csv

import pytest
import torch

from ch03_attention import sweep_dates as sweep


class Enough(Exception):
    """Ends a training run early."""


@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_the_recorded_curve_begins_as_a_live_run_does(name):
    losses: list[float] = []

    def watch(model: torch.nn.Module, so_far: list[float]) -> None:
        losses[:] = so_far
        if len(so_far) == 2 * sweep.WATCH:
            raise Enough

    with pytest.raises(Enough):
        sweep.train(sweep.MODELS[name], 0, sweep.ONE_DATE, watch)
    live = [sum(losses[i : i + sweep.WATCH]) / sweep.WATCH for i in (0, sweep.WATCH)]
    with sweep.CURVES.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == name]
    recorded = {seed: [float(row["loss"]) for row in rows if row["seed"] == seed][:2] for seed in "012"}
    assert live == pytest.approx(recorded["0"], abs=0.003)
    assert all(live != pytest.approx(recorded[seed], abs=0.003) for seed in "12")
