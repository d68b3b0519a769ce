"""`ch05_pretraining/sweep_optimizers.py` and `sweep_scaling.py`: their runs, and what their records must hold."""

import pytest
from torch import nn

from ch05_pretraining import sweep_optimizers, sweep_scaling
from shared.notebook.records import read_rows


def test_optimizers_of_the_comparison():
    model = sweep_optimizers.GPTModel(sweep_optimizers.small_config())
    for name in sweep_optimizers.RATES:
        built = sweep_optimizers.optimizers_of(model, name, 0.01)
        assert built[0].param_groups[0]["lr"] == 0.01
        shared = [
            parameter
            for optimizer in built
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        assert len(shared) == len(list(model.parameters()))
    split, whole = (sweep_optimizers.optimizers_of(model, "muon", 0.01, flag)[0] for flag in (False, True))
    assert any(group["split"] for group in split.param_groups)
    assert not any(group["split"] for group in whole.param_groups)
    assert split.param_groups[0]["lr"] == 0.01


def test_a_short_run_of_each_script():
    done = sweep_optimizers.run("muon", 0.02, 0, n_steps=4)
    assert len(done.losses) == 4 and isinstance(done.model, nn.Module)
    assert done.losses[0] == pytest.approx(7.64, abs=0.1)
    done = sweep_scaling.run("2x32", 4 * sweep_scaling.BATCH * sweep_scaling.TOKENS_PER_STORY)
    assert len(done.losses) == 4 and done.model.config == sweep_scaling.config_of("2x32")


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be one of sgd, adam, adamw, lion, muon, got 'rmsprop'"):
        sweep_optimizers.run("rmsprop", 0.1, 0)
    with pytest.raises(ValueError, match=r"size must be one of 2x32, .*, got '9x9'"):
        sweep_scaling.config_of("9x9")


def test_the_record_of_the_optimizers_is_complete():
    recorded = read_rows(sweep_optimizers.RESULTS)
    keys = {
        (row["role"], row["optimizer"], float(row["learning_rate"]), int(row["seed"])) for row in recorded
    }
    assert len(keys) == len(recorded)
    best, steps = sweep_optimizers.best_rates(), sweep_optimizers.recorded_steps()
    for name, rates in sweep_optimizers.RATES.items():
        assert {("search", name, rate, sweep_optimizers.SEARCH_SEED) for rate in rates} <= keys
        assert {("compared", name, best[name], seed) for seed in sweep_optimizers.SEEDS} <= keys
    assert {row["steps"] for row in recorded if row["role"] == "short"} == {str(sweep_optimizers.SHORT_STEPS)}
    assert all(int(row["steps"]) == steps[row["optimizer"]] for row in recorded if row["role"] != "short")
    assert all(float(row["loss_per_story"]) > float(row["floor"]) for row in recorded)


def test_the_record_of_the_scaling_is_complete():
    recorded = read_rows(sweep_scaling.RESULTS)
    keys = {(row["size"], int(row["tokens"])) for row in recorded}
    wanted = {
        (size, tokens)
        for size in sweep_scaling.SIZES
        for tokens in (*sweep_scaling.TOKENS, *sweep_scaling.MORE_TOKENS.get(size, ()))
    }
    assert wanted <= keys and len(keys) == len(recorded)
