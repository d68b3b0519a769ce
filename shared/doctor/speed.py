"""How fast is this machine, how long will the notebooks take on it, and what else is feasible?

Three speeds say most of it: the arithmetic of matrix products, the bytes that come from memory, and the small steps
that Python and torch take one after the other. The time of a notebook on the reference machine is cut into three parts
by `SHARES`, and each part stretched by its own ratio of speeds. That is a rough forecast: one notebook is all products
and another all small steps, disks and downloads are not in it, and what else runs on the machine is measured with it.

Large jobs are counted: about 6 operations for each parameter and token of a training (Kaplan et al., 2020, "Scaling
Laws for Neural Language Models"), 16 bytes for each parameter (weight, gradient, two moments of AdamW), and for each
generated token one reading of all weights or their arithmetic, whichever takes longer (Williams et al., 2009,
"Roofline").

Left out: graphics cards, activations, the cache of keys and values, several machines (`shared.training.planning`).

Explained in ch01_intro/02_setup_check.ipynb.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass
from typing import Callable, Mapping, Sequence  # noqa: UP035 (an old Python has to get past here)

from shared.doctor.findings import GB, ROOT

SMALL, LARGE = 256, 1024  # rows and columns of the measured matrices
BIG = 2**26  # float32 numbers, 268 MB: more than caches hold
EVENING, MONTH = 5 * 3600, 30 * 86400  # seconds
EFFICIENCY = 0.395  # of the products' speed in the training of tales-1m: see its config.json


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second with `threads` threads.

    Attributes:
        threads: CPU threads.
        float32, float32_large: Billions of operations of a product of matrices of `SMALL` and of `LARGE` rows.
        bfloat16, bfloat16_large: The same in bfloat16.
        bandwidth: Billions of bytes read from memory.
        steps: Thousands of small steps: a line of Python with one operation of torch on 8 numbers.
    """

    threads: int
    float32: float
    float32_large: float
    bfloat16: float
    bfloat16_large: float
    bandwidth: float
    steps: float


# An AMD EPYC server processor, one thread, on a quiet machine: that of the times in README.
REFERENCE = Speed(1, 100.0, 95.0, 205.0, 205.0, 25.0, 370.0)
# What products, memory and small steps have in the time of a notebook: tests/benchmarks/notebook_shares.py.
SHARES = (0.21, 0.06, 0.73)


def median_seconds(function: Callable[[], object], shortest: float = 0.02, runs: int = 7) -> float:
    """Return the time of a call: the median of some runs, each of as many calls as fill `shortest` seconds.

    Shorter runs would slip through between the turns of other programs, and a busy machine would look like a free one.
    """
    function()
    start = time.perf_counter()
    function()
    repeats = max(1, math.ceil(shortest / max(time.perf_counter() - start, 1e-7)))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def measure_speed(threads: int = 1) -> Speed:
    """Measure this machine in about a second and a half; raises ValueError if `threads` is below 1."""
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")

    def products(dtype: torch.dtype, n: int) -> float:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        return 2 * n**3 / median_seconds(lambda: a @ b) / 1e9

    def small_steps(x: torch.Tensor) -> None:
        for _ in range(1000):
            x = x + 1

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            numbers[name] = products(dtype, SMALL)
            # A processor without bfloat16 of its own would take seconds for the large one.
            slow = numbers[name] < 10
            numbers[f"{name}_large"] = numbers[name] if slow else products(dtype, LARGE)
        row = torch.ones(BIG)
        matrix, vector = row.view(8192, -1), torch.ones(BIG // 8192)
        reading = min(median_seconds(row.sum), median_seconds(lambda: matrix @ vector))
        steps = 1 / median_seconds(lambda: small_steps(torch.ones(8)))
    finally:
        torch.set_num_threads(before)
    return Speed(threads, bandwidth=row.nbytes / reading / 1e9, steps=steps, **numbers)


def stretch(speed: Speed, reference: Speed = REFERENCE, shares: Sequence[float] = SHARES) -> float:
    """Return how many times longer a notebook takes at `speed` than at `reference`: each part by its own ratio.

    Raises ValueError if the three shares are negative or do not make 1.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares must be three, none negative, together 1, got {shares}")
    ratios = (
        reference.float32 / speed.float32,
        reference.bandwidth / speed.bandwidth,
        reference.steps / speed.steps,
    )
    return sum(share * ratio for share, ratio in zip(shares, ratios))  # noqa: B905 (`strict` is too new)


def readme_times(text: str | None = None) -> dict[str, int]:
    """Return the seconds of each notebook on the reference machine, by its path without ending.

    Args:
        text: With the table of notebooks; default: the course's README.

    Raises:
        ValueError: There is no such table, or a notebook's row ends in no time such as "25 s".
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8") if text is None else text
    rows = re.findall(r"^\| \[[^\]]*\]\(([\w/]+)\.ipynb\) \|(?:.*\|)? *([^|]*?) *\|\s*$", text, re.M)
    wrong = [name for name, seconds in rows if not re.fullmatch(r"\d+ s", seconds)]
    if wrong or not rows:
        raise ValueError(
            f"the table must have rows that end in a time such as '25 s', got {wrong or 'no row'}"
        )
    return {name: int(seconds[:-2]) for name, seconds in rows}


@dataclass(frozen=True)
class Job:
    """Work on a model of `n_parameters` with `n_tokens` tokens.

    Attributes:
        name: What is done.
        flops: Operations for each parameter and token: 6 for training, 4 where most weights stay as they are, 2 for
            generating.
        n_bytes: Memory for each parameter: 16 for training with AdamW, 4 or 2 for weights in float32 or bfloat16.
    """

    name: str
    n_parameters: int
    n_tokens: int
    flops: int
    n_bytes: int


@dataclass(frozen=True)
class Verdict:
    """What a machine makes of a job: bytes of memory, seconds, and "yes", "slow" or "no"."""

    job: Job
    memory: float
    seconds: float
    verdict: str


SMOLLM2, GPT2, GPT2_XL = 134_515_008, 124_439_808, 1_557_611_200
JOBS = (
    Job("train tales-1m", 1_053_824, 17_208_017, 6, 16),
    Job("adapt SmolLM2 to 1 million tokens, LoRA", SMOLLM2, 1_000_000, 4, 4),
    Job("adapt SmolLM2 to 1 million tokens, all weights", SMOLLM2, 1_000_000, 6, 16),
    Job("train GPT-2 (124M), 20 tokens a parameter", GPT2, 20 * GPT2, 6, 16),
    Job("100 tokens by SmolLM2, float32", SMOLLM2, 100, 2, 4),
    Job("100 tokens by GPT-2 XL (1.5B), float32", GPT2_XL, 100, 2, 4),
    Job("100 tokens by GPT-2 XL (1.5B), bfloat16", GPT2_XL, 100, 2, 2),
)


def judge(job: Job, speed: Speed, free: float, efficiency: float = EFFICIENCY) -> Verdict:
    """Return whether a machine can do a job.

    "no": its memory is too small, or a training takes over a month, or a token over 2 seconds. "yes": a training is
    done within an evening (5 hours), or 5 tokens come in a second, about as fast as one reads. Else "slow".

    Args:
        job: The job.
        speed: Of the machine.
        free: Bytes of memory that can be used.
        efficiency: The part of the products' speed that a training reaches.

    Raises:
        ValueError: The efficiency is not above 0 and at most 1.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be above 0 and at most 1, got {efficiency}")
    memory, operations = job.n_parameters * job.n_bytes, job.flops * job.n_parameters * job.n_tokens
    if job.flops == 2:
        # A token: all weights are read once, and each is used for two operations. The slower of the two decides.
        products = speed.bfloat16 if job.n_bytes == 2 else speed.float32
        seconds = max(memory * job.n_tokens / speed.bandwidth, operations / products) / 1e9
        quick, bearable = 0.2 * job.n_tokens, 2.0 * job.n_tokens
    else:
        seconds = operations / (efficiency * speed.float32_large * 1e9)
        quick, bearable = EVENING, MONTH
    fits = memory <= free
    verdict = "yes" if fits and seconds <= quick else "slow" if fits and seconds <= bearable else "no"
    return Verdict(job, memory, seconds, verdict)


def in_words(seconds: float) -> str:
    """Return a time in its largest unit: "0.2 s", "12 minutes", "3.5 hours", "20 days", "4 years"."""
    units = (("s", 1, 100), ("minutes", 60, 6000), ("hours", 3600, 172800), ("days", 86400, 6.3e7))
    for unit, size, limit in units:
        if seconds < limit:
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.{1 if amount >= 1 else 2}f} {unit}"
    return f"{seconds / 31_557_600:.0f} years"


def job_table(speed: Speed, free: float, jobs: Sequence[Job] = JOBS, efficiency: float = EFFICIENCY) -> str:
    """Return a line for each job: the verdict, the time (a dash where the memory forbids the job), the memory."""
    lines = []
    for found in (judge(job, speed, free, efficiency) for job in jobs):
        needed, duration = f"{found.memory / GB:.2g} GB", in_words(found.seconds)
        if found.memory > free:
            needed, duration = f"{needed} is not free", "-"
        lines.append(f"{found.verdict:5} {found.job.name:47} {duration:>12}  {needed}")
    return "\n".join(lines)


def summary(threads: int, free: float, times: Mapping[str, int] | None = None) -> str:
    """Measure with one thread and with all, and return the speeds, the time of all notebooks, and the jobs."""
    speeds = [measure_speed(n) for n in sorted({1, threads})]
    rows = [
        ("GFLOP/s, float32", "float32"),
        ("GFLOP/s, bfloat16", "bfloat16"),
        ("GB/s from memory", "bandwidth"),
    ]
    rows += [("thousand small steps/s", "steps")]
    lines = [
        f"{'':24}" + "".join(f"{f'{speed.threads} threads':>12}" for speed in speeds) + f"{'reference':>12}"
    ]
    for label, name in rows:
        lines.append(
            f"{label:24}" + "".join(f"{getattr(speed, name):12.1f}" for speed in (*speeds, REFERENCE))
        )
    times = readme_times() if times is None else times
    for speed in speeds:
        expected = in_words(sum(times.values()) * stretch(speed))
        lines.append(f"all {len(times)} notebooks, {speed.threads} threads: about {expected}")
    return "\n".join([*lines, "", job_table(speeds[-1], free)])
