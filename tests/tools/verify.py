"""Verify the whole course: lint, format, types, promotion, tests, and every notebook's stored outputs.

    python -m tests.tools.verify             what `make test` runs

Each step prints its own output; the last lines are a summary. The exit status is the number of failed steps.
"""

import subprocess
import sys
import time

from tests.tools import checked_run
from tests.tools.architecture import ROOT, notebooks

PYTHON = [sys.executable, "-m"]
NBVAL = ["pytest", "--nbval", "-n", "2", "--dist", "loadscope", "--tb=short"]

STEPS = {
    "lint": [*PYTHON, "ruff", "check", "."],
    "format": [*PYTHON, "ruff", "format", "--check", "."],
    "types": [*PYTHON, "mypy"],
    "promotion": [*PYTHON, "tests.tools.promote", "--check"],
    "audit": [*PYTHON, "tests.tools.audit", "--teaching"],
    "architecture": [*PYTHON, "pytest", "tests/course/test_architecture.py"],
    "pytest": [
        *(*PYTHON, "pytest", "--ignore=tests/course/test_architecture.py"),
        *("-m", "not service", "--durations=5", "tests"),
    ],
    "service": [*PYTHON, "pytest", "-m", "service", "--durations=5", "tests/serving"],
    "notebooks": [*PYTHON, *NBVAL, *map(str, notebooks())],
}


def main() -> int:
    """Run every step, print the summary, return the number of failed steps."""
    environment = checked_run.environment()
    lines, failed = [], 0
    for name, command in STEPS.items():
        print(f"\n== {name}: {' '.join(['python', *command[1:]])}", flush=True)
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        failed += status != 0
        lines.append(
            f"{name:<13}{'passed' if status == 0 else 'FAILED':<8}{time.monotonic() - started:7.0f} s"
        )
    print(f"\n== summary ({len(notebooks())} notebooks)")
    print("\n".join(lines))
    print(f"verify: {len(STEPS) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
