"""The command of the doctor: will the course run here, and what helps if not?

    python -m shared.doctor              the findings, then what to do; exit status 1 if there is a problem, else 0
    python shared/doctor                 the same, where the course is not installed
    python -m shared.doctor --offline    without asking whether the package index and the model hub answer
    python -m shared.doctor --full       also the SHA-256 of the model packages
    python -m shared.doctor --speed      also measures this machine and says how long the notebooks will take
    python -m shared.doctor --json       for programs

Left out: repairing anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Sequence  # noqa: UP035 (an old Python has to get past here)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from shared.doctor.examination import GROUPS, examine
    from shared.doctor.findings import report
    from shared.doctor.software import check_python

    parser = argparse.ArgumentParser(prog="python -m shared.doctor", description="Will the course run here?")
    parser.add_argument("--offline", action="store_true", help="do not ask whether servers answer")
    parser.add_argument("--full", action="store_true", help="also the SHA-256 of the model packages")
    parser.add_argument(
        "--speed", action="store_true", help="also measure, and say how long the notebooks take"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)

    # An older Python cannot go on from its own finding.
    findings = [check_python()]
    if findings[0].status != "problem":
        groups = [group for group in GROUPS if group != "network" or not options.offline]
        findings = examine(*groups, full=options.full)
    problems = sum(finding.status == "problem" for finding in findings)

    if options.json:
        print(json.dumps({"problems": problems, "findings": [asdict(f) for f in findings]}, indent=1))
        return int(problems > 0)
    print(report(findings))
    print(f"\nProblems: {problems}" if problems else "\nNo problem: the course will run here.")
    if options.speed and not problems:
        from shared.doctor.machine import memory, usable_cpus
        from shared.doctor.speed import summary

        print("\n" + summary(usable_cpus(), memory()[1]))
    return int(problems > 0)


if __name__ == "__main__":
    if not __package__:  # called by its path, which must not be where names are looked up first
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
