"""Run chosen notebooks and tests as several other processors would: what they print and assert must hold on each.

    python -m tests.tools.processors                                     all notebooks, seeds 1, 2 and 3
    python -m tests.tools.processors ch04_gpt/02_gpt.ipynb tests/training/test_loop.py --seeds 1 2
    python -m tests.tools.processors --capabilities default avx2 --threads 1 2

Each combination of a seed (the order of sums, `other_processor.py`), a set of vector instructions
(ATEN_CPU_CAPABILITY; "native" is what this processor has) and a number of threads is one run of pytest, whose full
output goes to build/processors/. A line a run says what passed, a line for each what did not; the exit status is 1 when
anything failed.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys

from tests.tools import checked_run
from tests.tools.architecture import ROOT, notebooks


def run(paths: list[str], seed: int, capability: str, threads: int) -> tuple[str, list[str]]:
    """Run pytest in one setting; return its last line and the names of what failed."""
    environment = checked_run.environment() | {
        checked_run.ORDER_OF_SUMS: str(seed),
        "OMP_NUM_THREADS": str(threads),
    }
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability != "native":
        environment["ATEN_CPU_CAPABILITY"] = capability
    workers = max(1, (os.cpu_count() or 1) // threads)
    options = ["-n", str(workers), "--dist", "loadscope", "--tb=short", "--color=no"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", *options, *paths],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    log = ROOT / "build" / "processors" / f"seed{seed}_{capability}_{threads}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout, encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode and not failed:
        failed = [f"pytest ended with status {done.returncode}; see {log.relative_to(ROOT)}"]
    return last, failed


def main(arguments: list[str] | None = None) -> int:
    """Run every combination and print what failed; return the exit status."""
    parser = argparse.ArgumentParser(description="Run notebooks and tests as other processors would.")
    parser.add_argument("paths", nargs="*", help="notebooks and test files; default: all notebooks")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="0: torch's own order of sums"
    )
    parser.add_argument("--capabilities", nargs="+", default=["native"], metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    options = parser.parse_args(arguments)
    if min(options.seeds) < 0 or min(options.threads) < 1:
        parser.error("seeds must be at least 0 and threads at least 1")
    known = ("native", "default", "avx2", "avx512")
    if unknown := [name for name in options.capabilities if name not in known]:
        parser.error(f"capabilities must be among {', '.join(known)}, got {unknown[0]!r}")
    paths = options.paths or [path.relative_to(ROOT).as_posix() for path in notebooks()]
    status = 0
    for setting in itertools.product(options.seeds, options.capabilities, options.threads):
        last, failed = run(paths, *setting)
        seed, capability, threads = setting
        print(f"seed {seed}, {capability}, {threads} thread{'s' * (threads > 1)}: {last}", flush=True)
        for name in failed:
            print(f"    {name}", flush=True)
        status |= bool(failed)
    return status


if __name__ == "__main__":
    sys.exit(main())
