"""`shared/doctor/speed.py`: the measurement is sane and short, the forecast by hand, README's table, the verdicts."""

import dataclasses
import json
import math
import time

import pytest
import torch

from shared.doctor.findings import ROOT
from shared.doctor.speed import (
    EFFICIENCY,
    GPT2,
    GPT2_XL,
    JOBS,
    REFERENCE,
    SHARES,
    SMOLLM2,
    Job,
    in_words,
    job_table,
    judge,
    measure_speed,
    median_seconds,
    readme_times,
    stretch,
    summary,
)
from shared.model.gpt import GPTConfig
from shared.training.planning import parameter_count
from shared.weights.configs import read_config
from tests.tools.architecture import notebooks


def changed(**values: float):
    return dataclasses.replace(REFERENCE, **values)


def test_the_measurement_is_finite_and_leaves_the_threads_as_they_were():
    before, start = torch.get_num_threads(), time.monotonic()
    speed = measure_speed(1)
    assert time.monotonic() - start < 30  # a second and a half, on a machine that does nothing else
    assert torch.get_num_threads() == before
    assert all(math.isfinite(value) and value > 0 for value in dataclasses.astuple(speed))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        measure_speed(0)


def test_the_threads_are_restored_after_a_failure(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("shared.doctor.speed.median_seconds", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_speed(before + 1)
    assert torch.get_num_threads() == before


def test_the_median_of_calls():
    calls = []
    assert median_seconds(lambda: calls.append(1), shortest=0.0, runs=5) > 0
    assert len(calls) == 7  # one that does not count, one that says how many fill a run
    slow = median_seconds(lambda: time.sleep(0.01), shortest=0.03, runs=3)
    assert 0.01 <= slow < 0.1


def test_the_stretch_by_hand():
    assert stretch(REFERENCE) == pytest.approx(1)
    shares = (0.3, 0.1, 0.6)
    half = changed(float32=REFERENCE.float32 / 2)
    assert stretch(half, shares=shares) == pytest.approx(0.6 + 0.1 + 0.6)
    narrow = changed(bandwidth=REFERENCE.bandwidth / 10)
    assert stretch(narrow, shares=shares) == pytest.approx(0.3 + 1.0 + 0.6)
    quick = changed(
        steps=2 * REFERENCE.steps, float32=2 * REFERENCE.float32, bandwidth=2 * REFERENCE.bandwidth
    )
    assert stretch(quick) == pytest.approx(0.5)
    # Larger matrices and bfloat16 have no part in it.
    assert stretch(changed(float32_large=1, bfloat16=1, bfloat16_large=1, threads=9)) == pytest.approx(1)
    assert sum(SHARES) == pytest.approx(1)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5), ()])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="shares must be three"):
        stretch(REFERENCE, shares=shares)


def test_readme_has_a_time_for_every_notebook():
    times = readme_times()
    assert list(times) == [path.relative_to(ROOT).with_suffix("").as_posix() for path in notebooks()]
    assert all(0 < seconds <= 180 for seconds in times.values())


def test_other_tables_of_notebooks():
    row = "| [a/01_x](a/01_x.ipynb) | build | proof | 25 s |\n"
    assert readme_times(row + "| [b/02_y](b/02_y.ipynb) | 7 s |\n| [text](x.md) | 3 |\n") == {
        "a/01_x": 25,
        "b/02_y": 7,
    }
    for text in ("", "no table", row + "| [b/02_y](b/02_y.ipynb) | build | proof | soon |\n"):
        with pytest.raises(ValueError, match="rows that end in a time"):
            readme_times(text)


def test_a_training_by_hand():
    job = Job("train", 1_000_000, 20_000_000, 6, 16)
    found = judge(job, changed(float32_large=100.0), free=1e9, efficiency=0.5)
    assert found.memory == 16_000_000
    assert found.seconds == pytest.approx(6 * 1e6 * 20e6 / 50e9) == pytest.approx(2400)
    assert found.verdict == "yes"
    assert judge(job, changed(float32_large=5.0), 1e9, 0.5).verdict == "slow"
    assert judge(job, changed(float32_large=0.05), 1e9, 0.5).verdict == "no"
    assert judge(job, changed(float32_large=100.0), 15_999_999, 0.5).verdict == "no"
    assert judge(job, changed(float32_large=100.0), 16_000_000, 0.5).verdict == "yes"


def test_a_generation_by_hand():
    # 1 billion parameters: 4 GB at 20 GB/s are 0.2 s a token, 2 billion operations at 100 GFLOP/s 0.02.
    job = Job("generate", 10**9, 10, 2, 4)
    speed = changed(float32=100.0, bandwidth=20.0, bfloat16=200.0)
    assert judge(job, speed, 8e9).seconds == pytest.approx(2.0)
    assert judge(job, speed, 8e9).verdict == "yes"
    assert judge(job, changed(bandwidth=19.0), 8e9).verdict == "slow"
    assert judge(job, changed(bandwidth=1.0), 8e9).verdict == "no"
    assert judge(job, speed, 3.9e9).verdict == "no"
    # bfloat16 halves the bytes, but where the processor has none of its own, the arithmetic decides.
    half = dataclasses.replace(job, n_bytes=2)
    assert judge(half, speed, 8e9).seconds == pytest.approx(1.0)
    assert judge(half, changed(bfloat16=1.0, bandwidth=20.0), 8e9).seconds == pytest.approx(20.0)


@pytest.mark.parametrize("efficiency", [0.0, -1, 1.01, math.nan])
def test_efficiencies_that_are_none(efficiency):
    with pytest.raises(ValueError, match="efficiency must be above 0"):
        judge(JOBS[0], REFERENCE, 1e9, efficiency)


def test_the_efficiency_is_that_of_the_recorded_training():
    folder = ROOT / "shared" / "checkpoints" / "tales-1m"
    recorded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    job, tokens, seconds = JOBS[0], recorded["results"]["tokens"], recorded["cpu_seconds"]
    assert (job.n_parameters, job.n_tokens) == (recorded["results"]["parameters"], tokens)
    assert job.n_parameters == parameter_count(read_config(folder / "config.json")[1])
    reached = 6 * job.n_parameters * tokens / seconds / 1e9
    assert reached / REFERENCE.float32_large == pytest.approx(EFFICIENCY, abs=0.001)


def test_the_sizes_of_the_models_are_those_of_their_layouts():
    assert parameter_count(GPTConfig.preset("gpt2-small", qkv_bias=True)) == GPT2
    assert parameter_count(GPTConfig.preset("gpt2-xl", qkv_bias=True)) == GPT2_XL
    smollm2 = GPTConfig(
        49152,
        emb_dim=576,
        n_heads=9,
        n_kv_heads=3,
        n_layers=30,
        qkv_bias=False,
        bias=False,
        norm="rmsnorm",
        positions="rotary",
        feed_forward="swiglu",
        feed_forward_dim=1536,
    )
    assert parameter_count(smollm2) == SMOLLM2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.04 s"),
        (3.2, "3.2 s"),
        (35.4, "35 s"),
        (99, "99 s"),
        (150, "2.5 minutes"),
        (5999, "100 minutes"),
        (7200, "2.0 hours"),
        (86400 * 3, "3.0 days"),
        (86400 * 365.25 * 4, "4 years"),
    ],
)
def test_times_in_words(seconds, text):
    assert in_words(seconds) == text


def test_the_tables_have_a_line_for_each_job(monkeypatch):
    lines = job_table(REFERENCE, 1e9).splitlines()
    assert len(lines) == len(JOBS) and {line.split()[0] for line in lines} <= {"yes", "slow", "no"}
    assert [line.endswith("is not free") for line in lines] == [
        job.n_parameters * job.n_bytes > 1e9 for job in JOBS
    ]
    assert all((" -  " in line) == line.endswith("is not free") for line in lines)
    monkeypatch.setattr(
        "shared.doctor.speed.measure_speed", lambda n: dataclasses.replace(REFERENCE, threads=n)
    )
    text = summary(2, 1e9, {"a": 60, "b": 60})
    assert "all 2 notebooks, 2 threads: about 2.0 minutes" in text and text.count("100.0") == 3
